// The maximum and the minimum of every key channel of whole blocks, each key-value head's own: what Quest judges blocks by.
//
//     bounds[block, h, 0, c] = max over the 64 keys of k[h, s, c]        bounds[block, h, 1, c] = min
//
// A channel with a NaN has NaN for both. Bounds are of T: no more is said than keys say themselves.
//
// Shapes: which [num] int32, blocks; blocks as for attend.cu, with the address of their bounds.
//
// Launch: grid (num, kv_heads), block 128: a thread block takes a block of one head; threads take channels, and a row's channels lie
// side by side.
//
// Tried: first version, not yet timed on a GPU; a block is bounded once, when it is full.
#include "common.cuh"

template <typename T, int DK>
__global__ void __launch_bounds__(kThreads)
page_bounds(const Block* __restrict__ blocks, const int* __restrict__ which) {
    const Block block = blocks[which[blockIdx.x]];
    const i64 head = blockIdx.y;
    const T* keys = (const T*)block.key + head * block.stride * DK;
    T* to = (T*)block.bounds + head * 2 * DK;
    for (int c = int(threadIdx.x); c < DK; c += kThreads) {
        float most = widen(keys[c]), least = most;
#pragma unroll 8
        for (int s = 1; s < kBlock; s++) {
            const float x = widen(keys[s * DK + c]);
            if (x != x || x > most) most = most != most ? most : x;
            if (x != x || x < least) least = least != least ? least : x;
        }
        to[c] = narrow<T>(most);
        to[DK + c] = narrow<T>(least);
    }
}
