// Stores new tokens: each goes to one slot of one block, for every key-value head.
//
//     slot[list[i]] = (k, v)[row, :, column]        i < counts[0]
//
// Shapes: k [rows, kv_heads, columns, DK] and v [.., DV] of T, any strides but 1 along the last axis, rows aligned to 16 bytes; list
// [capacity] of Append; counts [1]: read here, so that a captured graph can be replayed with another plan; blocks [blocks].
//
// Launch: grid (tokens * kv_heads * 16-byte pieces over 128, at most 1024), block 128: threads take pieces, keys and values alike.
//
// Tried: first version, not yet timed on a GPU. It moves a few kilobytes a step: the launch decides.
#include "common.cuh"

template <typename T, int DK, int DV>
__global__ void __launch_bounds__(kThreads)
append(const T* __restrict__ k, i64 k_row, i64 k_head, i64 k_column, const T* __restrict__ v, i64 v_row, i64 v_head, i64 v_column,
       const Block* __restrict__ blocks, const Append* __restrict__ list, const int* __restrict__ counts, i64 kv_heads) {
    constexpr int PK = DK / kVec<T>, PIECES = PK + DV / kVec<T>;
    const i64 total = i64(counts[0]) * kv_heads * PIECES;
    for (i64 i = i64(blockIdx.x) * kThreads + threadIdx.x; i < total; i += i64(gridDim.x) * kThreads) {
        const int piece = int(i % PIECES);
        const i64 head = i / PIECES % kv_heads;
        const Append a = list[i / PIECES / kv_heads];
        const Block b = blocks[a.block];
        const i64 slot = head * b.stride + a.slot;
        if (piece < PK) {
            const T* from = k + a.row * k_row + head * k_head + a.column * k_column + piece * kVec<T>;
            *(Pack16*)((T*)b.key + slot * DK + piece * kVec<T>) = *(const Pack16*)from;
        } else {
            const T* from = v + a.row * v_row + head * v_head + a.column * v_column + (piece - PK) * kVec<T>;
            *(Pack16*)((T*)b.value + slot * DV + (piece - PK) * kVec<T>) = *(const Pack16*)from;
        }
    }
}
