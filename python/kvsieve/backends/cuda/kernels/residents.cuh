// Where the residents of a row lie, and what its queries have chosen of them.
#pragma once
#include "rows.cuh"

constexpr int kStages = 8;  // of a search, at most

// Queries that share a choice: columns [column, column + count) of a row, the first of them at position `first`.
struct alignas(16) QueryBlock {
    int row;
    int column;
    int count;
    int first;
    int lo;  // the region [lo, hi) that was searched for the choice
    int hi;
    int start;  // the first stage to search; kStages or more for none
    int unused;
    int slots[kStages];  // where the choice of each stage lies: twice its number, plus 1 among the spare ones; -1: all of the region
};

// What a stage has chosen for one key-value head, in a slot: `head`, then the first tokens of the chosen ranges, ascending.
struct alignas(16) Chosen {
    int count;
    int reads;   // representative keys scored
    int rounds;  // levels of a tree, or stages, that were scored
    int unused;
};

__device__ __forceinline__ int* chosen_at(int* held, int* spare, int slot, int kv_head, int kv_heads, i64 most) {
    const i64 which = i64(slot >> 1) * kv_heads + kv_head;
    return ((slot & 1) != 0 ? spare : held) + which * ((most + 7) / 4 * 4);
}

// Turns of keys that are stored before RoPE, see ops/angles.py.
struct Angles {
    const float* table;
    int pairs, layout;
    float factor;
    int alone;

    __device__ const float* at(int place) const { return table + i64(place) * 2 * pairs; }

    // The N channels from `at` on of a query `row`, at a place; its turned channels are scaled by the factors of key and query.
    template <int N, typename T>
    __device__ __forceinline__ void turn_query(float (&x)[N], const T* row, int from, int place) const {
        turn<N>(x, row, from, at(place), pairs, layout);
#pragma unroll
        for (int e = 0; e < N; e++)
            if (from + e < 2 * pairs) x[e] *= factor;
    }
};

// The residents of one row, numbered in text order. Spans are the row's, whole and in that order.
struct Residents {
    const Block* blocks;
    const Span* spans;
    int num;

    // `starts` has `queries` items a row, the last of which reads everything.
    __device__ Residents(const Block* blocks_, const int* starts, const Span* spans_, i64 row, i64 queries) {
        const i64 item = row * queries + queries - 1;
        blocks = blocks_;
        spans = spans_ + starts[item];
        num = starts[item + 1] - starts[item];
    }

    // The block of resident `t`, and its slot there. All blocks but the last are full, as a rule, so that it is found at once.
    __device__ Block find(int t, int& slot) const {
        int i = t / kBlock < num ? t / kBlock : num - 1;
        Span span = spans[i];
        while (i + 1 < num && t >= span.before + span.hi() - span.lo()) span = spans[++i];
        slot = span.lo() + t - span.before;
        return blocks[span.block];
    }
};
