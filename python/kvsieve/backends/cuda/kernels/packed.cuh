// Packed blocks: tokens with fewer key channels and fewer bits a number. backends/reference/storage.py is their specification.
//
// A block of 64 tokens of one head holds, row-major, with `wide` = the kept channels rounded up to whole 16 bytes of T:
//
//     keys          [64][wide]            of T, or codes of KB bits: what lies beyond the kept channels is zero
//     key scales    [64 / group][2][wide] halves, with codes: steps, then least values (per channel over tokens)
//     values        [64][DV]              of T, or codes of VB bits
//     value scales  [64][2][DV / group]   halves, with codes: steps, then least values (per token over channels)
//
// A number is least + step * code; codes lie in the order of their channels, the first one in the low bits. Rows are padded to whole
// vectors, not to 16 bytes: a row of codes begins at a multiple of its own vector's bytes, whole blocks at multiples of 16.
#pragma once
#include "common.cuh"

constexpr int kPackedFrom = 1 << 25;  // blocks from this number on are packed: PACKED in rust/kvsieve-core/src/ids.rs

// Where a packed block lies, by addresses of head 0. Rows of head h begin h * stride rows later, scales likewise.
struct alignas(16) PackedBlock {
    u64 key;
    u64 key_scales;
    u64 value;
    u64 value_scales;
    u64 channels;  // int16 [heads][1 + wide]: rotary pairs kept, then the channels of a row; -1 - c: channel c, stored as zero
    i64 stride;    // tokens from one head to the next
    u64 unused[2];
};

// Bytes of a row of n numbers as codes of BITS, or as they came.
template <typename T, int BITS>
__device__ __forceinline__ i64 row_bytes(i64 n) {
    return BITS > 0 ? n * BITS / 8 : n * i64(sizeof(T));
}

template <int BITS>
__device__ __forceinline__ u32 code_at(const unsigned char* row, i64 i) {
    return u32(row[i * BITS / 8]) >> (i * BITS % 8) & ((1u << BITS) - 1u);
}

// Where the first `head` of a block's rows and scales lie.
struct PackedHead {
    unsigned char *keys, *values;
    f16 *key_scales, *value_scales;
    const short* channels;
};

template <typename T, int KB, int VB>
__device__ __forceinline__ PackedHead packed_head(const PackedBlock& block, i64 head, i64 wide, i64 value_dim, i64 log_group) {
    PackedHead at;
    const i64 rows = head * block.stride;
    at.keys = (unsigned char*)block.key + rows * row_bytes<T, KB>(wide);
    at.key_scales = (f16*)block.key_scales + (rows >> log_group) * 2 * wide;
    at.values = (unsigned char*)block.value + rows * row_bytes<T, VB>(value_dim);
    at.value_scales = (f16*)block.value_scales + rows * 2 * (value_dim >> log_group);
    at.channels = (const short*)block.channels + head * (1 + wide);
    return at;
}

// Number j of the thin key in `slot`.
template <typename T, int KB>
__device__ __forceinline__ float thin_key(const PackedHead& at, i64 slot, i64 j, i64 wide, i64 log_group) {
    const unsigned char* row = at.keys + slot * row_bytes<T, KB>(wide);
    if constexpr (KB == 0) {
        return widen(((const T*)row)[j]);
    } else {
        const f16* scales = at.key_scales + (slot >> log_group) * 2 * wide;
        return fmaf(widen(scales[j]), float(code_at<KB>(row, j)), widen(scales[wide + j]));
    }
}

// The step and the least value of a group of numbers, as they are stored.
struct Scale {
    f16 step, least;
    float top;

    __device__ u32 code(float x) const {
        const float by = widen(step);
        if (!(by > 0.f)) return 0;  // a NaN, too: its group is NaN by its scale
        const float c = floorf((x - widen(least)) / by + 0.5f);
        return u32(fminf(fmaxf(c, 0.f), top));
    }
};

// Gathers a group's extremes, then makes its scale.
template <int BITS>
struct Extremes {
    float low = KV_INF, high = -KV_INF;
    bool sound = true;

    __device__ void add(float x) {
        low = fminf(low, x);
        high = fmaxf(high, x);
        sound = sound && x - x == 0.f;  // finite
    }

    __device__ Scale scale() const {
        Scale s;
        s.top = float((1 << BITS) - 1);
        s.least = narrow<f16>(low);
        if (widen(s.least) > low) {  // the next half below
            const bool negative = (s.least.bits & 0x8000u) != 0;
            if ((s.least.bits & 0x7fffu) == 0) {
                s.least.bits = 0x8001u;
            } else {
                s.least.bits = u16(negative ? s.least.bits + 1 : s.least.bits - 1);
            }
        }
        s.step = narrow<f16>((high - widen(s.least)) / s.top);
        const float least = widen(s.least), step = widen(s.step);
        if (!sound || least - least != 0.f || step - step != 0.f) s.step.bits = s.least.bits = 0x7e00u;
        return s;
    }
};

// N codes of BITS each as 1 + code / 2^BITS: the code's bits under the exponent of 1. `from` is a multiple of their bytes.
template <int N, int BITS>
__device__ __forceinline__ void fractions(const unsigned char* from, float (&to)[N]) {
    static_assert(N == 4 || N == 8, "a vector of T");
    constexpr int bytes = N * BITS / 8, per_word = 32 / BITS;
    u32 words[2] = {0, 0};
    if constexpr (bytes == 8) {
        const u64 both = *(const u64*)from;
        words[0] = u32(both);
        words[1] = u32(both >> 32);
    } else if constexpr (bytes == 4) {
        words[0] = *(const u32*)from;
    } else if constexpr (bytes == 2) {
        words[0] = *(const u16*)from;
    } else {
        words[0] = *from;
    }
#pragma unroll
    for (int e = 0; e < N; e++) {
        const u32 word = words[e / per_word];
        constexpr int shift = 23 - BITS;
        const int at = e % per_word * BITS;
        const u32 placed = at > shift ? word >> (at - shift) : word << (shift - at);
        to[e] = __uint_as_float((placed & (((1u << BITS) - 1u) << shift)) | 0x3f800000u);
    }
}
