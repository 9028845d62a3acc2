// What every kernel shares: element types, the tables that the host writes, 16-byte loads, asynchronous copies.
//
// Every kernel argument is 8 bytes wide: a pointer, a signed 64-bit count, or a double. Offsets are 64-bit: 2^31 elements are only
// 2.1 million tokens of one layer of 8 heads of 128 channels. No CUDA header is included, so that NVRTC needs nothing but these files.
//
// The same sources are compiled by g++ in the tests, where a shim included first (tests/cuda/shim.h) runs each thread as a fibre. It
// provides: the index variables, __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, __ballot_sync, atomicAdd, atomicMax,
// __threadfence, KV_SHARED, kv_copy16, kv_commit, kv_wait.
#pragma once

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#define KV_INF __uint_as_float(0x7f800000u)
#define KV_NAN __uint_as_float(0x7fc00000u)
#define KV_FLT_MAX __uint_as_float(0x7f7fffffu)
#define KV_LN2 0.693147180559945309f
#define KV_LOG2E 1.44269504088896341f

constexpr int kBlock = 64;     // slots of a block
constexpr int kThreads = 128;  // threads of a thread block, for every kernel
constexpr int kWarps = kThreads / 32;

// Where a block of keys and values lies. Keys of head h, slot s start at key + (h * stride + s) * key_bytes, values likewise.
// Packed blocks have a table of their own, see packed.cuh.
struct alignas(16) Block {
    u64 key;
    u64 value;
    i64 stride;  // tokens from one head to the next
    u64 bounds;  // [kv_heads][2][DK]: each head's maximum of every key channel, then the minimum; 0 where none are kept
};

// Slots [lo, hi) of a block, as one query reads them. See `Span` in rust/kvsieve-core/src/plan.rs.
struct alignas(16) Span {
    int block;
    u32 slots;   // lo | hi << 8 | (keys are rotated by their slot) << 16 | head << 17
    int before;  // keys of this item before the span
    int turn;    // row of the table of turns by which the query is rotated, plus one; 0 for none

    __device__ int lo() const { return int(slots & 255u); }
    __device__ int hi() const { return int(slots >> 8 & 255u); }
    __device__ bool rotate() const { return (slots >> 16 & 1u) != 0; }
    // Added to the thread block's key-value head. Not 0 where each item is one head's, which read different keys (pieces.py).
    __device__ int head() const { return int(slots >> 17); }
};

// Column `column` of row `row` of the input goes to `slot` of `block`.
struct alignas(16) Append {
    int row;
    int column;
    int block;
    int slot;
};

// `len` tokens move from one place to another.
struct alignas(16) Move {
    int from;
    int to;
    u32 slots;  // from_slot | to_slot << 16
    int len;
};

struct alignas(16) Run {
    int block;
    int lo;
    int hi;
    int at;  // tokens before this run
};

struct alignas(16) Pack16 {
    u32 x, y, z, w;
};

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

#ifdef __CUDACC_RTC__

#define KV_SHARED(type, name, count) __shared__ alignas(16) type name[count]

__device__ __forceinline__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void kv_copy16(void* to, const void* from) {
    const u32 address = u32(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void kv_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void kv_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
__device__ __forceinline__ void kv_copy16(void* to, const void* from) { *(Pack16*)to = *(const Pack16*)from; }
__device__ __forceinline__ void kv_commit() {}
template <int PENDING>
__device__ __forceinline__ void kv_wait() {}
#endif

#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
    return narrow_f16(x);
}
// To the nearest, ties to even. A NaN stays one.
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    const u32 bits = __float_as_uint(x);
    bf16 y;
    y.bits = x != x ? u16(bits >> 16 | 64u) : u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    return y;
}

// Elements in 16 bytes.
template <typename T>
constexpr int kVec = int(16 / sizeof(T));

template <typename T>
__device__ __forceinline__ void unpack(const Pack16& pack, float (&to)[kVec<T>]) {
    const u32 words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4) {
            to[i] = __uint_as_float(words[i]);
        } else {
            T low, high;
            low.bits = u16(words[i] & 0xffffu);
            high.bits = u16(words[i] >> 16);
            to[2 * i] = widen(low);
            to[2 * i + 1] = widen(high);
        }
    }
}

// N consecutive elements, aligned to 16 bytes, as floats.
template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    static_assert(N % kVec<T> == 0, "whole 16-byte pieces");
#pragma unroll
    for (int i = 0; i < N; i += kVec<T>) {
        float piece[kVec<T>];
        unpack<T>(*(const Pack16*)(from + i), piece);
#pragma unroll
        for (int e = 0; e < kVec<T>; e++) to[i + e] = piece[e];
    }
}

// How channels are paired. 0: nothing turns. 1: channel i with i + pairs. 2: channel 2 i with 2 i + 1.
constexpr int kHalf = 1;
constexpr int kInterleaved = 2;

// Rotates the N channels from `at` on. `row` holds the whole unrotated row (for a partner outside the piece), `x` the piece.
// `trig` holds `pairs` cosines, then `pairs` sines, aligned to 16 bytes. Channels from 2 * pairs on pass through.
template <int N, typename T>
__device__ __forceinline__ void turn(float (&x)[N], const T* row, int at, const float* trig, int pairs, int layout) {
    if (at >= 2 * pairs) return;
    if (layout == kHalf && pairs % N == 0) {
        const bool low = at < pairs;
        const int pair = low ? at : at - pairs;
        float other[N], cosine[N], sine[N];
        load<N>(row + (low ? at + pairs : pair), other);
        load<N>(trig + pair, cosine);
        load<N>(trig + pairs + pair, sine);
#pragma unroll
        for (int e = 0; e < N; e++) x[e] = fmaf(x[e], cosine[e], low ? -other[e] * sine[e] : other[e] * sine[e]);
        return;
    }
    float y[N];
#pragma unroll
    for (int e = 0; e < N; e++) {
        const int c = at + e;
        y[e] = x[e];
        if (c < 2 * pairs) {
            const bool first = layout == kHalf ? c < pairs : (c & 1) == 0;
            const int pair = layout == kHalf ? (first ? c : c - pairs) : c >> 1;
            const float other = layout == kHalf ? widen(row[first ? c + pairs : pair]) : x[e ^ 1];
            const float part = other * trig[pairs + pair];
            y[e] = fmaf(x[e], trig[pair], first ? -part : part);
        }
    }
#pragma unroll
    for (int e = 0; e < N; e++) x[e] = y[e];
}
