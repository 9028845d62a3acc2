// Weighted sums of chosen values, each query head's own; they are read where they lie.
//
//     out[r, h] = sum over j of weights[r, h, j] * v[columns[r, h, j]]        over the keys j that have a weight other than zero
//
// Shapes (row-major):
//     columns    [rows, heads, num]  64-bit: keys of the row's item, counted over its spans in their order
//     weights    [rows, heads, num]  float; the value of a weight of zero is not read, whatever its column is
//     items      [rows]              the item whose spans a row reads: starts[item] .. starts[item + 1]
//     out        [rows, heads, DV]   of T
// blocks, starts, spans, packed as for attend.cu.
//
// Launch: grid (heads, rows), block 128: a thread block is one query head's sum. Its warps take 32 columns each in turn: a lane looks up
// one of them, by halving the spans, then the warp reads the values row by row, 16 bytes a lane, and each lane adds up its channels.
// The warps' sums meet once, at the end.
//
// With VB >= 0 spans may lie in packed blocks, among plain ones: values of T (VB = 0) or codes of VB bits.
//
// Tried: first version, not yet timed on a GPU. A hundred values a head are a few microseconds of latency; the looking up is most of it.
#include "packed.cuh"
#include "rows.cuh"

template <typename T, int DV, int VB = -1>
__global__ void __launch_bounds__(kThreads, 4)
add_values(const i64* __restrict__ columns, const float* __restrict__ weights, const int* __restrict__ items, i64 num,
           const Block* __restrict__ blocks, const int* __restrict__ starts, const Span* __restrict__ spans, i64 group,
           const PackedBlock* __restrict__ packed, i64 log_group, T* __restrict__ out) {
    using V = Rows<T, DV>;
    KV_SHARED(float, all, kWarps * DV);
    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const i64 head = blockIdx.x, heads = gridDim.x, row = blockIdx.y;
    const int kv_head = int(blockIdx.x) / int(group);  // 32 bits divide without a call
    const int item = items[row], first = starts[item], count = starts[item + 1] - first;
    const i64* my_columns = columns + (row * heads + head) * num;
    const float* my_weights = weights + (row * heads + head) * num;

    float acc[V::channels];
#pragma unroll
    for (int c = 0; c < V::channels; c++) acc[c] = 0.f;
    for (i64 begin = warp * 32; begin < num; begin += kThreads) {
        const float weight = begin + lane < num ? my_weights[begin + lane] : 0.f;
        int block = 0, slot = 0;
        if (weight != 0.f) {  // NaN, too
            const int column = int(my_columns[begin + lane]);
            int lo = 0, hi = count - 1;  // the last span that begins at the column, or before it
            while (lo < hi) {
                const int middle = (lo + hi + 1) / 2;
                if (spans[first + middle].before <= column) {
                    lo = middle;
                } else {
                    hi = middle - 1;
                }
            }
            const Span span = spans[first + lo];
            block = span.block;
            slot = span.lo() + column - span.before;
        }
#pragma unroll 1
        for (int from = 0; from < 32; from += V::together) {
            const int k = from + lane / V::lanes;
            const float by = __shfl_sync(0xffffffffu, weight, k);
            const int its_block = __shfl_sync(0xffffffffu, block, k), its_slot = __shfl_sync(0xffffffffu, slot, k);
            if (by == 0.f) continue;
#pragma unroll
            for (int p = 0; p < V::pieces; p++) {
                if (!V::inside(lane, p)) continue;
                const int at = V::at(lane, p);
                float x[V::vec];
                if (VB >= 0 && its_block >= kPackedFrom) {
                    const PackedBlock held = packed[its_block - kPackedFrom];
                    const i64 token = i64(kv_head) * held.stride + its_slot;
                    if constexpr (VB > 0) {
                        const unsigned char* codes = (const unsigned char*)held.value + token * row_bytes<T, VB>(DV);
                        const int shares = int(DV >> log_group);
                        const f16* scales = (const f16*)held.value_scales + token * 2 * shares + (at >> log_group);
                        const float step = widen(scales[0]), least = widen(scales[shares]);
#pragma unroll
                        for (int e = 0; e < V::vec; e++) x[e] = fmaf(step, float(code_at<larger(VB, 1)>(codes, at + e)), least);
                    } else {
                        load<V::vec>((const T*)held.value + token * DV + at, x);
                    }
                } else {
                    const Block held = blocks[its_block];
                    load<V::vec>((const T*)held.value + (i64(kv_head) * held.stride + its_slot) * DV + at, x);
                }
#pragma unroll
                for (int e = 0; e < V::vec; e++) acc[p * V::vec + e] = fmaf(by, x[e], acc[p * V::vec + e]);
            }
        }
    }

#pragma unroll
    for (int c = 0; c < V::channels; c++)
#pragma unroll
        for (int width = 16; width >= V::lanes; width /= 2) acc[c] += __shfl_xor_sync(0xffffffffu, acc[c], width);
    if (lane < V::lanes) {
#pragma unroll
        for (int p = 0; p < V::pieces; p++)
            if (V::inside(lane, p))
#pragma unroll
                for (int e = 0; e < V::vec; e++) all[warp * DV + V::at(lane, p) + e] = acc[p * V::vec + e];
    }
    __syncthreads();
    for (int c = tid; c < DV; c += kThreads) {
        float sum = 0.f;
        for (int w = 0; w < kWarps; w++) sum += all[w * DV + c];
        out[(row * heads + head) * DV + c] = narrow<T>(sum);
    }
}
