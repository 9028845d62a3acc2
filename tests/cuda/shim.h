// Runs a CUDA kernel on the CPU, to see whether it computes what it should. No part of kvsieve; no model of a GPU's memory.
//
// Thread blocks run one after another. Each of a block's threads is a fibre; a barrier, a shuffle or a ballot is a rendezvous at which
// it waits for the others, and a shuffle by xor one of two lanes. Who runs next is drawn at random: in half of the blocks any thread
// alike, in the others one warp before all others as far as it gets, with a new order now and then. So a missing barrier is a wrong
// answer sooner or later. Shared memory holds NaN until it is written, with guards between arrays. An asynchronous copy happens at once
// or when it is waited for, at random. Reported: threads that wait for others that will never come; lanes of a warp that meet in
// different operations; guards written over.
//
// Here is what a kernel is compiled with; shim.cpp, which runs it, is compiled once for all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define KV_SHARED(type, name, count) type* const name = static_cast<type*>(shim::shared(__COUNTER__, sizeof(type) * (count)))

#pragma GCC visibility push(hidden)
namespace shim {

struct Dim {
    unsigned x = 0, y = 0, z = 0;
};

struct Thread {
    Dim index;
};

struct Now {
    Dim block_index, block_dim, grid_dim;
    Thread* me = nullptr;  // who runs
};

enum class Meeting { none, sync, shuffle, ballot };

extern Now now;

void barrier();
// All lanes of a warp wait for each other.
void meet(Meeting kind);
// The same after which every lane may read what each gave.
const uint64_t* show(uint64_t given, Meeting kind);
// Two lanes wait for each other, and the one that comes last goes on at once.
uint64_t swap(uint64_t given, int mask);
unsigned ballot(bool value);
// The array that a thread block has for this place in the source.
void* shared(int site, size_t bytes);
// 16 bytes, now or when they are waited for.
void copy(void* to, const void* from);
void commit();
// For copies but those of the last `pending` groups.
void wait_for_copies(int pending);
// An error's text, or an empty one.
const char* launch(void (*body)(const uint64_t*), const uint64_t* args, const unsigned* grid, const unsigned* block, uint64_t seed);

}  // namespace shim
#pragma GCC visibility pop

namespace shim {

template <typename T>
inline uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8, "a register's worth");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
inline T of_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename A>
inline A argument(uint64_t bits) {
    static_assert(sizeof(A) == 8, "every argument of a kernel is 8 bytes wide");
    A value;
    memcpy(&value, &bits, 8);
    return value;
}

template <typename... A, size_t... I>
inline void call(void (*kernel)(A...), const uint64_t* args, std::index_sequence<I...>) {
    kernel(argument<A>(args[I])...);
}

template <typename... A>
inline void call(void (*kernel)(A...), const uint64_t* args) {
    call(kernel, args, std::index_sequence_for<A...>());
}

template <typename... A>
constexpr int arity(void (*)(A...)) {
    return int(sizeof...(A));
}

}  // namespace shim

#define threadIdx shim::now.me->index
#define blockIdx shim::now.block_index
#define blockDim shim::now.block_dim
#define gridDim shim::now.grid_dim

inline void __syncthreads() { shim::barrier(); }
inline void __syncwarp() { shim::meet(shim::Meeting::sync); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::of_bits<T>(shim::swap(shim::bits_of(value), mask & 31));
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
    return shim::of_bits<T>(shim::show(shim::bits_of(value), shim::Meeting::shuffle)[lane & 31]);
}
inline unsigned __ballot_sync(unsigned, bool value) { return shim::ballot(value); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned atomicAdd(unsigned* to, unsigned value) {
    const unsigned before = *to;
    *to += value;
    return before;
}
inline unsigned atomicMax(unsigned* to, unsigned value) {
    const unsigned before = *to;
    *to = before > value ? before : value;
    return before;
}
inline void __threadfence() {}
// As the library's, without its call.
inline float kv_max(float a, float b) { return b != b ? a : a > b ? a : b; }
inline float kv_min(float a, float b) { return a < b || b != b ? a : b; }
#define fmaxf kv_max
#define fminf kv_min
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline void kv_copy16(void* to, const void* from) { shim::copy(to, from); }
inline void kv_commit() { shim::commit(); }
template <int PENDING>
inline void kv_wait() {
    shim::wait_for_copies(PENDING);
}

struct f16;
inline float widen(f16 x);
inline f16 narrow_f16(float x);

#define KV_VISIBLE extern "C" __attribute__((visibility("default")))
#define KV_EXPORT(name, ...)                                                                                                   \
    static void body_##name(const uint64_t* args) { shim::call(&__VA_ARGS__, args); }                                            \
    KV_VISIBLE int arity_##name() { return shim::arity(&__VA_ARGS__); }                                                          \
    KV_VISIBLE const char* run_##name(const uint64_t* args, const unsigned* grid, const unsigned* block, uint64_t seed) {        \
        return shim::launch(&body_##name, args, grid, block, seed);                                                              \
    }
