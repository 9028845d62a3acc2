// Exact merge of attention over disjoint sets of keys, and the probability of every key.
//
//     total = log sum_s exp(lse[s])      out = sum_s exp(lse[s] - norm) part[s]      norm = log(exp(total) + exp(sink))
//     scores[j] = sum, or with `highest` the maximum, over the query heads of a group of exp(logit[j] - norm)
//
// Shapes: part [rows_, parts, DV] float, normalised; part_lse [rows_, parts] float, -inf where a part saw nothing (its `part` is then
// not read); rows_ = items * heads. sinks [heads] float or null: learned logits without a value. out [rows_, DV] of T; lse and norm
// [rows_] float, either may be null. logits [heads, total_keys], key_starts [items + 1], scores [kv_heads, total_keys] float.
//
// Launch: `merge` grid (rows_), block 128: threads take channels, and all parts of a row in turn. `attention_scores` grid (splits, kv_heads,
// items), block 128: threads take keys.
//
// Tried: a second launch costs about 2 microseconds a layer in a graph; letting the last block of `attend` merge would save it, at
// the price of a fence and a counter that nothing here can test. Not yet timed on a GPU.
#include "common.cuh"

template <typename T, int DV>
__global__ void __launch_bounds__(kThreads)
merge(const float* __restrict__ part, const float* __restrict__ part_lse, i64 parts, i64 heads, const float* __restrict__ sinks,
      T* __restrict__ out, float* __restrict__ lse, float* __restrict__ norms) {
    KV_SHARED(float, shares, kThreads);
    KV_SHARED(float, tops, kWarps);
    const int tid = int(threadIdx.x);
    const i64 row = blockIdx.x;
    const float* mine = part_lse + row * parts;

    float top = -KV_INF;
    for (i64 s = tid; s < parts; s += kThreads) top = fmaxf(top, mine[s]);
#pragma unroll
    for (int width = 16; width > 0; width /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, width));
    if (tid % 32 == 0) tops[tid / 32] = top;
    __syncthreads();
    top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));

    constexpr int HELD = (DV + kThreads - 1) / kThreads;
    float acc[HELD], sum = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) acc[i] = 0.f;
    for (i64 begin = 0; begin < parts; begin += kThreads) {
        const int num = parts - begin < kThreads ? int(parts - begin) : kThreads;
        __syncthreads();
        if (tid < num) {
            const float x = mine[begin + tid];
            shares[tid] = x != -KV_INF ? expf(x - top) : 0.f;  // NaN stays NaN
        }
        __syncthreads();
        for (int s = 0; s < num; s++) {
            const float share = shares[s];
            if (share == 0.f) continue;  // a part without keys may hold anything
            sum += share;
            const float* values = part + (row * parts + begin + s) * DV;
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int c = tid + i * kThreads;
                if (c < DV) acc[i] = fmaf(share, values[c], acc[i]);
            }
        }
    }
    const float sink = sinks == nullptr ? 0.f : expf(sinks[row % heads] - top);
    const float scale = sum != 0.f ? 1.f / (sum + sink) : 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int c = tid + i * kThreads;
        if (c < DV) out[row * DV + c] = narrow<T>(acc[i] * scale);
    }
    if (tid == 0) {
        if (lse != nullptr) lse[row] = sum != 0.f ? top + logf(sum) : -KV_INF;
        if (norms != nullptr) norms[row] = sum != 0.f ? top + logf(sum + sink) : KV_INF;
    }
}

__global__ void __launch_bounds__(kThreads)
attention_scores(const float* __restrict__ logits, const i64* __restrict__ key_starts, i64 total_keys,
                 const float* __restrict__ norms, i64 group, i64 highest, float* __restrict__ to) {
    const i64 kv_head = blockIdx.y, item = blockIdx.z, heads = i64(gridDim.y) * group;
    const i64 end = key_starts[item + 1];
    for (i64 j = key_starts[item] + i64(blockIdx.x) * kThreads + threadIdx.x; j < end; j += i64(gridDim.x) * kThreads) {
        float sum = 0.f;
        for (i64 g = 0; g < group; g++) {
            const i64 head = kv_head * group + g;
            const float share = expf(logits[head * total_keys + j] - norms[item * heads + head]);
            if (highest != 0) {
                sum = share > sum || share != share ? share : sum;  // NaN shows, and stays
            } else {
                sum += share;
            }
        }
        to[kv_head * total_keys + j] = sum;
    }
}
