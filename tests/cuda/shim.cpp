// Runs the threads of a kernel that was compiled with shim.h; its first lines say how.
#include "shim.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shim {

// Stacks lie an odd number of cache lines apart: a multiple of the cache's size would put all of their tops into the same few lines.
constexpr int kMaxThreads = 256, kStack = (96 << 10) + 64 * 9, kShared = 48 << 10, kGuard = 64;
constexpr const char* kDifferent = "lanes of a warp meet in different operations";

struct Copy {
    void* to;
    const void* from;
    int group;
};

struct alignas(64) Fibre : Thread {
    int thread = 0;
    // Operations of the warp that were begun, of those the ones that all lanes meet in, and the lane that is waited for in a pair.
    int operations = 0, meetings = 0, awaited = -1;
    int group = 0;
    uint64_t received = 0;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

struct Warp {
    int ready[32];
    int num_ready = 0, arrived = 0;
    Meeting kind = Meeting::none;
    uint64_t values[2][32];
};

struct State {
    bool unfair = false;
    int num = 0, alive = 0, at_barrier = 0, num_ready = 0;
    uint64_t random = 1;
    int ready[kMaxThreads];  // where the schedule is fair; else each warp has its own
    int order[kMaxThreads / 32];  // of warps
    Fibre fibres[kMaxThreads];
    std::vector<Copy> copies[kMaxThreads];  // that each thread has yet to wait for
    Warp warps[kMaxThreads / 32];
    char* stacks = static_cast<char*>(std::malloc(size_t(kMaxThreads) * kStack));  // untouched memory costs nothing
    alignas(128) char memory[kShared + 64 * kGuard];
    size_t used = 0, charged = 0;
    std::vector<std::pair<int, void*>> sites;
    std::vector<size_t> guards;
    char error[256] = {0};
    void (*body)(const uint64_t*) = nullptr;
    const uint64_t* args = nullptr;
#if defined(__x86_64__)
    void* main_pointer = nullptr;
#else
    ucontext_t main_context;
#endif
};

static State state;
Now now;

static Fibre& me() { return static_cast<Fibre&>(*now.me); }

static uint64_t draw() {
    state.random ^= state.random << 13;
    state.random ^= state.random >> 7;
    state.random ^= state.random << 17;
    return state.random;
}

static unsigned draw(unsigned below) { return unsigned((draw() >> 32) * below >> 32); }

static void fail(const char* format, ...) {
    if (state.error[0]) return;
    va_list list;
    va_start(list, format);
    vsnprintf(state.error, sizeof state.error, format, list);
    va_end(list);
}

#if defined(__x86_64__)
// Saves the registers that a call preserves, then goes on with another stack.
extern "C" __attribute__((visibility("hidden"))) void kv_shim_switch(void** save, void* to);
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
static void leave(Fibre* from, Fibre* to) {
    kv_shim_switch(from ? &from->stack_pointer : &state.main_pointer, to ? to->stack_pointer : state.main_pointer);
}
#else
static void leave(Fibre* from, Fibre* to) {
    swapcontext(from ? &from->context : &state.main_context, to ? &to->context : &state.main_context);
}
#endif

static void make_ready(int thread) {
    Warp& warp = state.warps[thread / 32];
    (state.unfair ? warp.ready[warp.num_ready++] : state.ready[state.num_ready]) = thread;
    state.num_ready++;
}

static void shuffle_order() {
    for (int i = state.num / 32; i > 1; i--) std::swap(state.order[i - 1], state.order[draw(unsigned(i))]);
}

static int choose() {
    int *ready = state.ready, *count = &state.num_ready;
    if (state.unfair) {
        if ((state.random & 4095) == 0) shuffle_order();
        const int* at = state.order;
        while (state.warps[*at].num_ready == 0) at++;
        ready = state.warps[*at].ready;
        count = &state.warps[*at].num_ready;
        state.num_ready--;
    }
    const unsigned at = draw(unsigned(*count));
    const int to = ready[at];
    ready[at] = ready[--*count];
    return to;
}

// Goes on with another thread that can; back to the launcher when none can.
static void go_on() {
    Fibre* const from = static_cast<Fibre*>(now.me);
    Fibre* const to = state.num_ready && !state.error[0] ? &state.fibres[choose()] : nullptr;
    now.me = to;
    if (to != from) leave(from, to);
}

static void finish(Copy& copy) { memcpy(copy.to, copy.from, 16); }

static void enter() {
    state.body(state.args);
    std::vector<Copy>& late = state.copies[me().thread];
    for (Copy& copy : late) finish(copy);
    late.clear();
    state.alive--;
    if (state.at_barrier) fail("a thread ended while others wait at a barrier");
    go_on();
}

static void prepare(int i) {
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

void barrier() {
    if (++state.at_barrier < state.num) {
        if (state.alive < state.num) fail("a thread ended while others wait at a barrier");
    } else {
        state.at_barrier = 0;
        for (int i = 0; i < state.num; i++) make_ready(i);
    }
    go_on();
}

void meet(Meeting kind) {
    const int first = me().thread / 32 * 32;
    Warp& warp = state.warps[first / 32];
    me().operations++;
    if (warp.arrived == 0) warp.kind = kind;
    if (warp.kind != kind) fail(kDifferent);
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        for (int i = first; i < first + 32; i++) make_ready(i);
    }
    go_on();
}

const uint64_t* show(uint64_t given, Meeting kind) {
    const int mine = me().thread;
    uint64_t* const values = state.warps[mine / 32].values[++me().meetings & 1];
    values[mine % 32] = given;
    meet(kind);
    return values;
}

uint64_t swap(uint64_t given, int mask) {
    Fibre& mine = me();
    Fibre& mate = state.fibres[mine.thread ^ mask];
    mine.operations++;
    if (mask == 0) return given;
    if (mate.awaited == mine.thread) {
        if (mate.operations == mine.operations) {
            std::swap(mate.received, given);
            mate.awaited = -1;
            make_ready(mate.thread);
            return given;
        }
        fail(kDifferent);
    }
    mine.received = given;
    mine.awaited = mate.thread;
    go_on();
    return mine.received;
}

unsigned ballot(bool value) {
    const uint64_t* values = show(value, Meeting::ballot);
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) all |= unsigned(values[lane] & 1) << lane;
    return all;
}

void copy(void* to, const void* from) {
    if (draw(2)) {
        memcpy(to, from, 16);
    } else {
        state.copies[me().thread].push_back({to, from, me().group});
    }
}

void commit() { me().group++; }

void wait_for_copies(int pending) {
    std::vector<Copy>& late = state.copies[me().thread];
    size_t kept = 0;
    for (Copy& copy : late) {
        if (copy.group < me().group - pending) {
            finish(copy);
        } else {
            late[kept++] = copy;
        }
    }
    late.resize(kept);
}

void* shared(int site, size_t bytes) {
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

static void run_block() {
    memset(state.memory, 0xff, sizeof state.memory);
    state.used = state.charged = 0;
    state.sites.clear();
    state.guards.clear();
    state.alive = state.num;
    state.at_barrier = state.num_ready = 0;
    for (int warp = 0; warp < state.num / 32; warp++) {
        state.order[warp] = warp;
        state.warps[warp].num_ready = state.warps[warp].arrived = 0;
    }
    shuffle_order();
    state.unfair = draw(2) != 0;
    for (int i = 0; i < state.num; i++) {
        Fibre& f = state.fibres[i];
        f.index = {i % now.block_dim.x, i / now.block_dim.x % now.block_dim.y, i / (now.block_dim.x * now.block_dim.y)};
        f.thread = i;
        f.operations = f.meetings = f.group = 0;
        f.awaited = -1;
        state.copies[i].clear();
        prepare(i);
        make_ready(i);
    }
    now.me = nullptr;
    go_on();
    for (int i = 0; i < state.num && state.alive > 0; i++)
        if (state.fibres[i].awaited >= 0 && state.warps[i / 32].arrived > 0) fail(kDifferent);
    if (state.alive > 0) fail("%d of %d threads wait for others that will never come", state.alive, state.num);
    for (size_t guard : state.guards)
        for (int i = 0; i < kGuard; i++)
            if (state.memory[guard + i] != char(0xff)) return fail("shared memory was written beyond the end of an array");
}

const char* launch(void (*body)(const uint64_t*), const uint64_t* args, const unsigned* grid, const unsigned* block, uint64_t seed) {
    state.body = body;
    state.args = args;
    now.grid_dim = {grid[0], grid[1], grid[2]};
    now.block_dim = {block[0], block[1], block[2]};
    state.num = int(block[0] * block[1] * block[2]);
    state.random = seed * 0x9e3779b97f4a7c15ull | 1;
    state.error[0] = 0;
    if (state.num > kMaxThreads || state.num % 32) fail("a block of %d threads is not whole warps", state.num);
    for (unsigned z = 0; z < grid[2] && !state.error[0]; z++)
        for (unsigned y = 0; y < grid[1] && !state.error[0]; y++)
            for (unsigned x = 0; x < grid[0] && !state.error[0]; x++) {
                now.block_index = {x, y, z};
                run_block();
            }
    return state.error;
}

}  // namespace shim
