// How unexpected each realised token was, in one pass over the logits.
//
//     out[i] = log sum_v exp(x[i, v]) - x[i, ids[i]]        never below 0, never above the largest float
//
// NaN where the row holds NaN, unless it also holds +inf: then 0 for a token that has it, the largest float for another.
//
// Shapes: x [n, vocabulary] of T, rows `stride` elements apart; ids [n] 64-bit; out [n] float, nats. An id outside the vocabulary
// gives NaN (the host cannot look at it without waiting).
//
// Launch: grid (n), block 128. Threads keep a maximum and a sum each, in base 2, over 16 bytes at a time; they meet once at the end.
//
// Tried: first version, not yet timed on a GPU. One row of 128k logits is read by one multiprocessor; it happens once a token.
#include "common.cuh"

struct Tally {
    float top, sum;
    int odd;  // 1: NaN was seen, 2: +inf was seen

    __device__ void add(float x) {
        if (!(x < KV_INF)) {
            odd |= x != x ? 1 : 2;
        } else if (x > top) {
            sum = fmaf(sum, exp2f((top - x) * KV_LOG2E), 1.f);
            top = x;
        } else if (x > -KV_INF) {
            sum += exp2f((x - top) * KV_LOG2E);
        }
    }

    __device__ void join(float other_top, float other_sum, int other_odd) {
        odd |= other_odd;
        if (other_top > top) {
            sum = fmaf(sum, exp2f((top - other_top) * KV_LOG2E), other_sum);
            top = other_top;
        } else if (other_top > -KV_INF) {
            sum = fmaf(other_sum, exp2f((other_top - top) * KV_LOG2E), sum);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
surprisal(const T* __restrict__ x, i64 stride, i64 vocabulary, const i64* __restrict__ ids, float* __restrict__ out) {
    KV_SHARED(float, tops, kWarps);
    KV_SHARED(float, sums, kWarps);
    KV_SHARED(int, odds, kWarps);
    const int tid = int(threadIdx.x);
    const i64 row = blockIdx.x;
    const T* from = x + row * stride;
    Tally tally = {-KV_INF, 0.f, 0};

    // Whole pieces of 16 bytes between the first and the last aligned address; single elements around them.
    const i64 skew = i64(u64(from) / sizeof(T) % kVec<T>);
    const i64 head = skew == 0 ? 0 : (kVec<T> - skew < vocabulary ? kVec<T> - skew : vocabulary);
    const i64 pieces = (vocabulary - head) / kVec<T>;
    for (i64 i = tid; i < head; i += kThreads) tally.add(widen(from[i]));
    for (i64 i = tid; i < pieces; i += kThreads) {
        float piece[kVec<T>];
        load<kVec<T>>(from + head + i * kVec<T>, piece);
#pragma unroll
        for (int e = 0; e < kVec<T>; e++) tally.add(piece[e]);
    }
    for (i64 i = head + pieces * kVec<T> + tid; i < vocabulary; i += kThreads) tally.add(widen(from[i]));

#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
        const float top = __shfl_xor_sync(0xffffffffu, tally.top, width);
        const float sum = __shfl_xor_sync(0xffffffffu, tally.sum, width);
        const int odd = __shfl_xor_sync(0xffffffffu, tally.odd, width);
        tally.join(top, sum, odd);
    }
    if (tid % 32 == 0) {
        tops[tid / 32] = tally.top;
        sums[tid / 32] = tally.sum;
        odds[tid / 32] = tally.odd;
    }
    __syncthreads();
    if (tid == 0) {
        for (int w = 1; w < kWarps; w++) tally.join(tops[w], sums[w], odds[w]);
        const i64 id = ids[row];
        float result = KV_NAN;
        if (id >= 0 && id < vocabulary) {
            const float realised = widen(from[id]);
            if (tally.odd & 2) {
                result = realised == KV_INF ? 0.f : KV_FLT_MAX;
            } else if (tally.odd == 0) {
                const float surprise = tally.top - realised + logf(tally.sum);
                result = surprise < KV_FLT_MAX ? fmaxf(surprise, 0.f) : KV_FLT_MAX;  // an impossible row gives NaN here
            }
        }
        out[row] = result;
    }
}
