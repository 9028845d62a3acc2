// Copies runs of slots to contiguous tensors, or back.
//
//     gather:  (k, v)[:, at + i] = slot[block, lo + i]        scatter: the inverse        for every run, i < hi - lo
//
// Shapes: k [kv_heads, tokens, DK] and v [kv_heads, tokens, DV] of T, contiguous, rows aligned to 16 bytes; runs [num] of Run.
//
// Launch: grid (num, kv_heads), block 128: a thread block takes a run of one head, threads take 16-byte pieces.
//
// Tried: first version, not yet timed on a GPU; a copy.
#include "common.cuh"

template <typename T, int DK, int DV, bool BACK>
__global__ void __launch_bounds__(kThreads)
gather(const Block* __restrict__ blocks, const Run* __restrict__ runs, T* __restrict__ k, T* __restrict__ v, i64 tokens) {
    const Run run = runs[blockIdx.x];
    const Block block = blocks[run.block];
    const i64 head = blockIdx.y, slot = head * block.stride + run.lo, token = head * tokens + run.at;
    const int n = run.hi - run.lo;
    auto copy = [&](T* store, T* dense, int dim) {
        const int pieces = n * (dim / kVec<T>);
        Pack16* a = (Pack16*)(store + slot * dim);
        Pack16* b = (Pack16*)(dense + token * dim);
        for (int i = int(threadIdx.x); i < pieces; i += kThreads) {
            if (BACK) {
                a[i] = b[i];
            } else {
                b[i] = a[i];
            }
        }
    };
    copy((T*)block.key, k, DK);
    copy((T*)block.value, v, DV);
}
