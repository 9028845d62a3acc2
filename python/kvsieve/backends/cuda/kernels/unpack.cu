// Reads runs of packed tokens back at full width: zero where a channel was dropped.
//
//     (k, v)[:, at + i] = slot[block, lo + i]        for every run, i < hi - lo
//
// Shapes: k [kv_heads, tokens, key_dim] and v [kv_heads, tokens, value_dim] of T, contiguous; with THIN, k [kv_heads, tokens, wide] of
// float, the kept channels alone, and no v. runs [num] of Run, blocks counted from 0; from [..] of PackedBlock.
//
// Launch: grid (num, kv_heads), block 128: a thread block takes a run of one head, threads take elements of what is written.
//
// Tried: first version, not yet timed on a GPU; chunks use it, decoding reads in place.
#include "packed.cuh"

template <typename T, int KB, int VB, bool THIN>
__global__ void __launch_bounds__(kThreads)
unpack(const PackedBlock* __restrict__ from, const Run* __restrict__ runs, void* __restrict__ k, T* __restrict__ v, i64 tokens,
       i64 key_dim, i64 kept, i64 wide, i64 value_dim, i64 log_group) {
    KV_SHARED(short, column, 256);  // of each channel in a thin row; -1 where it was dropped
    const int tid = int(threadIdx.x);
    const i64 head = blockIdx.y;
    const Run run = runs[blockIdx.x];
    const PackedHead at = packed_head<T, KB, VB>(from[run.block], head, wide, value_dim, log_group);
    const i64 token = head * tokens + run.at;
    // At most a block of rows: what is counted here fits 32 bits, which divide without a call.
    const u32 n = u32(run.hi - run.lo), keys = u32(key_dim), values = u32(value_dim), width = u32(wide);
    if constexpr (THIN) {
        float* to = (float*)k + token * wide;
        for (u32 i = tid; i < n * width; i += kThreads) to[i] = thin_key<T, KB>(at, run.lo + i / width, i % width, wide, log_group);
        return;
    }
    for (u32 c = tid; c < keys; c += kThreads) column[c] = -1;
    __syncthreads();
    for (int j = tid; j < int(kept); j += kThreads) {
        const int c = at.channels[1 + j];
        column[c < 0 ? -1 - c : c] = short(j);
    }
    __syncthreads();
    T* to = (T*)k + token * key_dim;
    for (u32 i = tid; i < n * keys; i += kThreads) {
        const int j = column[i % keys];
        to[i] = narrow<T>(j < 0 ? 0.f : thin_key<T, KB>(at, run.lo + i / keys, j, wide, log_group));
    }
    to = v + token * value_dim;
    if constexpr (VB == 0) {
        const Pack16* rows = (const Pack16*)((const T*)at.values + run.lo * value_dim);
        for (u32 i = tid; i < n * values / kVec<T>; i += kThreads) ((Pack16*)to)[i] = rows[i];
    } else {
        const int shares = int(value_dim >> log_group);
        for (u32 i = tid; i < n * values; i += kThreads) {
            const i64 slot = run.lo + i / values;
            const u32 c = i % values;
            const f16* scales = at.value_scales + slot * 2 * shares + (c >> log_group);
            const u32 code = code_at<VB>(at.values + slot * row_bytes<T, VB>(value_dim), c);
            to[i] = narrow<T>(fmaf(widen(scales[0]), float(code), widen(scales[shares])));
        }
    }
}
