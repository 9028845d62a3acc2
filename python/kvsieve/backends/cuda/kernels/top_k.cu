// The k best of each row: their columns, ascending, and the k-th best value.
//
//     columns[i] = the k columns with the largest x[i]; of equal ones the first; NaN ranks below -inf
//     kth[i]     = the smallest value among them
//
// Shapes: x [rows, n] float, rows `stride` elements apart; columns [rows, k] 64-bit; kth [rows] float; 1 <= k <= n.
//
// Launch: grid (rows), block 128. Four passes of eight bits find the k-th value: a histogram of the candidates' next byte in shared
// memory, then the byte in which the k-th lies. A fifth pass writes the columns in order, 128 at a time, by ballots.
//
// Tried: first version, not yet timed on a GPU. A row is one thread block's, so few long rows leave the GPU idle.
#include "common.cuh"

// Ascending integers for ascending floats; NaN lowest.
__device__ __forceinline__ u32 rank_of(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0;
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

__global__ void __launch_bounds__(kThreads)
top_k(const float* __restrict__ x, i64 stride, i64 n, i64 k, i64* __restrict__ columns, float* __restrict__ kth) {
    KV_SHARED(u32, histogram, 256);
    KV_SHARED(u32, chosen, 2);
    KV_SHARED(u32, above_of, kWarps);
    KV_SHARED(u32, equal_of, kWarps);
    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const float* row = x + blockIdx.x * stride;

    u32 prefix = 0, mask = 0, left = u32(k);  // of the candidates, the `left`-th largest is wanted
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = tid; i < 256; i += kThreads) histogram[i] = 0;
        __syncthreads();
        for (i64 i = tid; i < n; i += kThreads) {
            const u32 rank = rank_of(row[i]);
            if ((rank & mask) == prefix) atomicAdd(&histogram[rank >> shift & 255u], 1u);
        }
        __syncthreads();
        if (tid == 0) {
            u32 want = left;
            int byte = 255;
            while (histogram[byte] < want) want -= histogram[byte--];
            chosen[0] = u32(byte);
            chosen[1] = want;
        }
        __syncthreads();
        prefix |= chosen[0] << shift;
        mask |= 255u << shift;
        left = chosen[1];
    }

    // All above the k-th, and the first `left` equal to it.
    i64* out = columns + blockIdx.x * k;
    u32 above = 0, equal = 0;  // in the columns before this range
    for (i64 begin = 0; begin < n; begin += kThreads) {
        const i64 i = begin + tid;
        const u32 rank = i < n ? rank_of(row[i]) : 0;
        const bool is_above = i < n && rank > prefix, is_equal = i < n && rank == prefix;
        const u32 all_above = __ballot_sync(0xffffffffu, is_above), all_equal = __ballot_sync(0xffffffffu, is_equal);
        __syncthreads();  // the last range's counts are read
        if (lane == 0) {
            above_of[warp] = u32(__popc(all_above));
            equal_of[warp] = u32(__popc(all_equal));
        }
        __syncthreads();
        const u32 before = (1u << lane) - 1u;
        u32 my_above = above + u32(__popc(all_above & before)), my_equal = equal + u32(__popc(all_equal & before));
        for (int w = 0; w < kWarps; w++) {
            if (w < warp) {
                my_above += above_of[w];
                my_equal += equal_of[w];
            }
            above += above_of[w];
            equal += equal_of[w];
        }
        if (is_above || (is_equal && my_equal < left)) out[my_above + (my_equal < left ? my_equal : left)] = i;
        if (is_equal && my_equal == left - 1) kth[blockIdx.x] = row[i];
    }
}
