// Rows of keys and values, and how a warp shares them out among its lanes.
#pragma once
#include "common.cuh"

template <int N>
__device__ __forceinline__ constexpr int ceil_pow2() {
    int p = 1;
    while (p < N) p *= 2;
    return p;
}

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int floor_pow2(int n) {
    int p = 1;
    while (2 * p <= n) p *= 2;
    return p;
}

// How a row of D elements of T is split over the lanes of a warp: `lanes` lanes with `pieces` pieces of 16 bytes each.
template <typename T, int D>
struct Rows {
    static_assert(D % kVec<T> == 0, "a row must be whole 16-byte pieces");
    static constexpr int vec = kVec<T>;
    static constexpr int lanes = smaller(32, ceil_pow2<D / vec>());
    static constexpr int pieces = (D / vec + lanes - 1) / lanes;
    static constexpr int together = 32 / lanes;  // rows that a warp reads at once
    static constexpr int channels = pieces * vec;

    __device__ static int at(int lane, int piece) { return ((lane % lanes) + piece * lanes) * vec; }
    __device__ static bool inside(int lane, int piece) { return D == lanes * pieces * vec || at(lane, piece) < D; }
};

// Sums N values over LANES lanes, N <= LANES, both powers of two. Lane `kl` of the LANES is left with value kl / (LANES / N).
template <int N, int LANES>
__device__ __forceinline__ float reduce_scattered(float (&v)[N], int lane) {
    int width = LANES / 2;
#pragma unroll
    for (int n = N / 2; n > 0; n /= 2) {
        const bool upper = (lane & width) != 0;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float give = upper ? v[i] : v[i + n];
            const float keep = upper ? v[i + n] : v[i];
            v[i] = keep + __shfl_xor_sync(0xffffffffu, give, width);
        }
        width /= 2;
    }
#pragma unroll
    for (; width > 0; width /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], width);
    return v[0];
}
