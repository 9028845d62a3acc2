// Rotary positions: tables of cosines and sines for integer positions, and rows rotated by them.
//
//     turns:   table[i] = cos(p_i f), then sin(p_i f)        for the frequencies f of a layer
//     rotate:  out[h, t] = turn(x[h, t], p_t) * factor on the rotated channels
//
// Angles are made in double from the integer position and only then rounded: at position 10^6 an angle in float is off by 0.06.
//
// Shapes: positions [n] 64-bit; frequencies [pairs] double; table [n, 2 * pairs] float; counts [1]: how many positions count (read
// here, for captured graphs) or null for n. x, out [heads, tokens, dim] of T and U, x with any strides but 1 along dim, out
// contiguous.
//
// Launch: both grid ((n * pairs) over 128, at most 4096), block 128: a thread takes one pair of one position. `rotate` then walks the
// heads, so an angle is made once for all of them, and passes the channels that do not turn.
//
// Tried: first version, not yet timed on a GPU. Double-precision sine and cosine cost about 100 operations; 16,384 blocks of a
// million tokens need a million of them a step.
#include "common.cuh"

__global__ void __launch_bounds__(kThreads)
turns(const i64* __restrict__ positions, i64 n, const int* __restrict__ counts, const double* __restrict__ frequencies, i64 pairs,
      float* __restrict__ table) {
    const i64 num = counts == nullptr ? n : counts[0];
    for (i64 i = i64(blockIdx.x) * kThreads + threadIdx.x; i < num * pairs; i += i64(gridDim.x) * kThreads) {
        const i64 row = i / pairs, pair = i % pairs;
        const double angle = double(positions[row]) * frequencies[pair];
        table[row * 2 * pairs + pair] = float(cos(angle));
        table[row * 2 * pairs + pairs + pair] = float(sin(angle));
    }
}

template <typename T, typename U>
__global__ void __launch_bounds__(kThreads)
rotate(const T* __restrict__ x, i64 x_head, i64 x_token, const i64* __restrict__ positions, const double* __restrict__ frequencies,
       i64 pairs, i64 layout, double factor, i64 heads, i64 tokens, i64 dim, U* __restrict__ out) {
    const i64 rest = dim - 2 * pairs, work = pairs + rest;
    for (i64 i = i64(blockIdx.x) * kThreads + threadIdx.x; i < tokens * work; i += i64(gridDim.x) * kThreads) {
        const i64 token = i / work, pair = i % work;
        const T* from = x + token * x_token;
        U* to = out + token * dim;
        if (pair >= pairs) {
            const i64 c = pair + pairs;
            for (i64 h = 0; h < heads; h++) to[h * tokens * dim + c] = narrow<U>(widen(from[h * x_head + c]));
            continue;
        }
        const double angle = double(positions[token]) * frequencies[pair];
        const float cosine = float(cos(angle) * factor), sine = float(sin(angle) * factor);
        const i64 a = layout == kHalf ? pair : 2 * pair, b = layout == kHalf ? pair + pairs : 2 * pair + 1;
        for (i64 h = 0; h < heads; h++) {
            const float p = widen(from[h * x_head + a]), q = widen(from[h * x_head + b]);
            to[h * tokens * dim + a] = narrow<U>(fmaf(p, cosine, -q * sine));
            to[h * tokens * dim + b] = narrow<U>(fmaf(q, cosine, p * sine));
        }
    }
}
