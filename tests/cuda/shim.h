// Runs a CUDA kernel on the CPU, to see whether it computes what it should. No part of kvsieve; no model of a GPU's memory.
//
// Thread blocks run one after another. Each of a block's threads is a fibre; a barrier, a shuffle or a ballot is a rendezvous at which
// it waits for the others. Who runs next is drawn at random: in half of the blocks any thread alike, in the others one warp before
// all others as far as it gets, with a new order now and then. So a missing barrier is a wrong answer sooner or later. Shared memory
// holds NaN until it is written, with guards between arrays. An asynchronous copy happens at once or when it is waited for, at random.
// Reported: threads that wait for others that will never come; lanes of a warp that meet in different operations; guards written over.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define KV_SHARED(type, name, count) type* const name = static_cast<type*>(shim::shared(__COUNTER__, sizeof(type) * (count)))

namespace shim {

// Stacks lie an odd number of cache lines apart: a multiple of the cache's size would put all of their tops into the same few lines.
constexpr int kMaxThreads = 256, kStack = (96 << 10) + 64 * 9, kShared = 48 << 10, kGuard = 64;

struct Dim {
    unsigned x = 0, y = 0, z = 0;
};

enum class Meeting { none, sync, shuffle, ballot };

struct Copy {
    void* to;
    const void* from;
    int group;
};

struct Fibre {
    Dim index;
    bool done = false;
    int parity = 0, group = 0;
    std::vector<Copy> copies;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

struct Warp {
    std::vector<int> ready;
    int arrived = 0;
    Meeting kind = Meeting::none;
    uint64_t values[2][32];
};

struct State {
    Dim block_index, block_dim, grid_dim;
    std::vector<Fibre> fibres{kMaxThreads};
    char* stacks = static_cast<char*>(std::malloc(size_t(kMaxThreads) * kStack));  // untouched memory costs nothing
    std::vector<Warp> warps{kMaxThreads / 32};
    std::vector<int> order;  // of warps
    bool unfair = false;
    int num = 0, current = -1, alive = 0, at_barrier = 0, num_ready = 0;
    alignas(128) char memory[kShared + 64 * kGuard];
    size_t used = 0, charged = 0;
    std::vector<std::pair<int, void*>> sites;
    std::vector<size_t> guards;
    uint64_t random = 1;
    char error[256] = {0};
    void (*body)(const uint64_t*) = nullptr;
    const uint64_t* args = nullptr;
#if defined(__x86_64__)
    void* main_pointer = nullptr;
#else
    ucontext_t main_context;
#endif
};

inline State state;

inline unsigned draw(unsigned below) {
    state.random ^= state.random << 13;
    state.random ^= state.random >> 7;
    state.random ^= state.random << 17;
    return unsigned((state.random >> 32) * below >> 32);
}

inline void fail(const char* format, ...) {
    if (state.error[0]) return;
    va_list list;
    va_start(list, format);
    vsnprintf(state.error, sizeof state.error, format, list);
    va_end(list);
}

#if defined(__x86_64__)
// Saves the registers that a call preserves, then goes on with another stack.
extern "C" void kv_shim_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
kv_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void leave(int from, int to) {
    void** save = from < 0 ? &state.main_pointer : &state.fibres[from].stack_pointer;
    kv_shim_switch(save, to < 0 ? state.main_pointer : state.fibres[to].stack_pointer);
}
#else
inline void leave(int from, int to) {
    swapcontext(from < 0 ? &state.main_context : &state.fibres[from].context,
                to < 0 ? &state.main_context : &state.fibres[to].context);
}
#endif

inline void make_ready(int thread) {
    state.warps[thread / 32].ready.push_back(thread);
    state.num_ready++;
}

inline void shuffle_order() {
    for (size_t i = state.order.size(); i > 1; i--) std::swap(state.order[i - 1], state.order[draw(unsigned(i))]);
}

inline int choose() {
    std::vector<int>* ready = nullptr;
    unsigned at = 0;
    if (state.unfair) {
        if (draw(4096) == 0) shuffle_order();
        for (int warp : state.order) {
            ready = &state.warps[warp].ready;
            if (!ready->empty()) break;
        }
        at = draw(unsigned(ready->size()));
    } else {
        at = draw(unsigned(state.num_ready));
        for (int warp : state.order) {
            ready = &state.warps[warp].ready;
            if (at < ready->size()) break;
            at -= unsigned(ready->size());
        }
    }
    const int to = (*ready)[at];
    (*ready)[at] = ready->back();
    ready->pop_back();
    state.num_ready--;
    return to;
}

// Goes on with another thread that can; back to the launcher when none can.
inline void go_on() {
    const int from = state.current;
    const int to = state.num_ready && !state.error[0] ? choose() : -1;
    state.current = to;
    if (to != from) leave(from, to);
}

inline void finish(Copy& copy) { memcpy(copy.to, copy.from, 16); }

inline void enter() {
    state.body(state.args);
    Fibre& me = state.fibres[state.current];
    for (Copy& copy : me.copies) finish(copy);
    me.copies.clear();
    me.done = true;
    state.alive--;
    if (state.at_barrier) fail("a thread ended while others wait at a barrier");
    go_on();
}

inline void prepare(int i) {
    Fibre& f = state.fibres[i];
    char* stack = state.stacks + size_t(i) * kStack;
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(63);
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;                               // where `enter` would return to; also sets the alignment that a call has
    *--at = reinterpret_cast<void*>(&enter);
    for (int r = 0; r < 6; r++) *--at = nullptr;
    f.stack_pointer = at;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, reinterpret_cast<void (*)()>(&enter), 0);
#endif
}

inline void barrier() {
    if (++state.at_barrier < state.num) {
        if (state.alive < state.num) fail("a thread ended while others wait at a barrier");
    } else {
        state.at_barrier = 0;
        for (int i = 0; i < state.num; i++) make_ready(i);
    }
    go_on();
}

inline void meet(Meeting kind) {
    Warp& warp = state.warps[state.current / 32];
    if (warp.arrived == 0) warp.kind = kind;
    if (warp.kind != kind) fail("lanes of a warp meet in different operations");
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        const int first = state.current / 32 * 32;
        for (int i = first; i < first + 32; i++) make_ready(i);
    }
    go_on();
}

template <typename T>
inline T exchange(T value, int from) {
    static_assert(sizeof(T) <= 8, "a register's worth");
    const int me = state.current;
    Warp& warp = state.warps[me / 32];
    const int parity = state.fibres[me].parity ^= 1;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    warp.values[parity][me % 32] = bits;
    meet(Meeting::shuffle);
    bits = warp.values[parity][from & 31];
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned ballot(bool value) {
    const int me = state.current;
    Warp& warp = state.warps[me / 32];
    const int parity = state.fibres[me].parity ^= 1;
    warp.values[parity][me % 32] = value;
    meet(Meeting::ballot);
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) all |= unsigned(warp.values[parity][lane] & 1) << lane;
    return all;
}

inline void* shared(int site, size_t bytes) {
    for (auto& known : state.sites)
        if (known.first == site) return known.second;
    void* at = state.memory + state.used;
    state.charged += bytes;
    state.used += (bytes + 63) / 64 * 64;
    state.guards.push_back(state.used);
    state.used += kGuard;
    if (state.charged > size_t(kShared)) {
        fail("more than %d bytes of shared memory", kShared);
        state.used = 0;
    }
    state.sites.emplace_back(site, at);
    return at;
}

inline void run_block() {
    memset(state.memory, 0xff, sizeof state.memory);
    state.used = state.charged = 0;
    state.sites.clear();
    state.guards.clear();
    state.alive = state.num;
    state.at_barrier = state.num_ready = 0;
    state.order.clear();
    for (int warp = 0; warp < state.num / 32; warp++) {
        state.order.push_back(warp);
        state.warps[warp].ready.clear();
        state.warps[warp].arrived = 0;
    }
    shuffle_order();
    state.unfair = draw(2) != 0;
    for (int i = 0; i < state.num; i++) {
        Fibre& f = state.fibres[i];
        f.index = {i % state.block_dim.x, i / state.block_dim.x % state.block_dim.y, i / (state.block_dim.x * state.block_dim.y)};
        f.done = false;
        f.parity = f.group = 0;
        f.copies.clear();
        prepare(i);
        make_ready(i);
    }
    state.current = -1;
    go_on();
    if (state.alive > 0) fail("%d of %d threads wait for others that will never come", state.alive, state.num);
    for (size_t guard : state.guards)
        for (int i = 0; i < kGuard; i++)
            if (state.memory[guard + i] != char(0xff)) return fail("shared memory was written beyond the end of an array");
}

inline const char* launch(void (*body)(const uint64_t*), const uint64_t* args, const unsigned* grid, const unsigned* block,
                          uint64_t seed) {
    state.body = body;
    state.args = args;
    state.grid_dim = {grid[0], grid[1], grid[2]};
    state.block_dim = {block[0], block[1], block[2]};
    state.num = int(block[0] * block[1] * block[2]);
    state.random = seed * 0x9e3779b97f4a7c15ull | 1;
    state.error[0] = 0;
    if (state.num > kMaxThreads || state.num % 32) fail("a block of %d threads is not whole warps", state.num);
    for (unsigned z = 0; z < grid[2] && !state.error[0]; z++)
        for (unsigned y = 0; y < grid[1] && !state.error[0]; y++)
            for (unsigned x = 0; x < grid[0] && !state.error[0]; x++) {
                state.block_index = {x, y, z};
                run_block();
            }
    return state.error;
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

#define threadIdx shim::state.fibres[shim::state.current].index
#define blockIdx shim::state.block_index
#define blockDim shim::state.block_dim
#define gridDim shim::state.grid_dim

inline void __syncthreads() { shim::barrier(); }
inline void __syncwarp() { shim::meet(shim::Meeting::sync); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, shim::state.current % 32 ^ mask);
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
    return shim::exchange(value, lane);
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

inline void kv_copy16(void* to, const void* from) {
    if (shim::draw(2)) {
        memcpy(to, from, 16);
    } else {
        shim::Fibre& me = shim::state.fibres[shim::state.current];
        me.copies.push_back({to, from, me.group});
    }
}
inline void kv_commit() { shim::state.fibres[shim::state.current].group++; }
template <int PENDING>
inline void kv_wait() {
    shim::Fibre& me = shim::state.fibres[shim::state.current];
    size_t kept = 0;
    for (shim::Copy& copy : me.copies) {
        if (copy.group < me.group - PENDING) {
            shim::finish(copy);
        } else {
            me.copies[kept++] = copy;
        }
    }
    me.copies.resize(kept);
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
