// Attention to sinks, a window, and what a search has chosen between them; keys and values are read where they lie.
//
//     start   = min(region end, p + 1 - window)                      for a query at position p; frozen for queries after the choice
//     kept    = [0, min(sinks, start)), the chosen ranges below `start`, [start, p]
//     x[j]    = scale * <q, k[j]>, then cap * tanh(x / cap) where there is a cap
//     out     = sum exp(x[j] - lse) v[j], lse = log sum exp x[j]     over the kept keys j
//
// Shapes as for search.cu, and (row-major):
//     at         [rows * queries, 2]                  block of queries and number in it of each query; -1 for a pad
//     part_out   [rows * queries, heads, splits, DV]  float, normalised; not written where part_lse is -inf
//     part_lse   [rows * queries, heads, splits]      float, natural logarithm
//     out        [rows, queries, heads, DV]           with CHUNK, of T: the answer, learned sinks (`learned`, [heads] or null) included
//     read       [rows * queries, kv_heads]           how many keys were kept
//
//     angles     [.., 2 * pairs]                      with RAW, whose keys are stored before RoPE: cosines and sines of positions. Queries
//                                                     and keys are turned to their numbers among the residents; or, `alone`, to their
//                                                     numbers among the kept keys: 0, 1, ..., and the query has the last
//
// Launch: grid (splits, kv_heads * sets of HEADS query heads, rows * queries), block 128: four warps take a share each of a split's
// keys, and meet once, at the end. With CHUNK: grid (queries of a block / 4, kv_heads * sets, blocks of queries), block 128: a warp takes a
// query and all of its keys. The warps of a block of queries read nearly the same keys at about the same time, which then lie in the
// first-level cache.
//
// A chosen range may be two tokens long, so keys are numbered through (sinks, ranges, window) and lanes look up 32 of them at a
// time, the next 32 while these are computed with. Then a warp reads KEYS rows of keys and of values straight into registers, 16
// bytes a lane, and computes with them as attend.cu does: nothing is staged, no warp waits for another.
//
// Tried: not yet timed on a GPU. Staging tiles in shared memory as attend.cu does was not tried: rows of two tokens leave cp.async
// nothing to save but registers. For chunks, tensor cores would need the queries of a block as one matrix and masks for its window: the chosen
// ranges are the same for all of them.
#include "residents.cuh"

// Thread blocks that a multiprocessor should hold.
constexpr int resident(int key_pieces, int value_pieces) { return key_pieces + value_pieces > 2 ? 2 : 3; }

template <typename T, int DK, int DV, int HEADS, bool CHUNK, bool RAW = false>
__global__ void __launch_bounds__(kThreads, RAW ? 2 : resident(Rows<T, DK>::pieces, Rows<T, DV>::pieces))
sparse(const T* __restrict__ q, i64 q_row, i64 q_head, i64 q_query, const Block* __restrict__ blocks, const int* __restrict__ starts,
       const Span* __restrict__ spans, i64 items, const QueryBlock* __restrict__ queries, const int* __restrict__ at_, i64 columns,
       i64 group_, i64 sinks_, i64 window_, i64 stage, i64 range_, i64 most_, int* __restrict__ held, int* __restrict__ spare,
       double scale, double softcap, float* __restrict__ part_out, float* __restrict__ part_lse, T* __restrict__ out,
       const float* __restrict__ learned, int* __restrict__ read, const float* __restrict__ angles_, i64 pairs, i64 layout,
       double by, i64 alone) {
    using K = Rows<T, DK>;
    using V = Rows<T, DV>;
    constexpr int UNROLL = smaller(4, K::lanes);
    constexpr int KEYS = UNROLL * K::together;  // read at once, at most 32
    constexpr int SAME = K::lanes / UNROLL;
    constexpr int ROUNDS = (KEYS + V::together - 1) / V::together;
    constexpr int STRIDE_P = HEADS == 3 ? 4 : HEADS;

    KV_SHARED(float, weights, kWarps * KEYS * STRIDE_P);
    KV_SHARED(float, all, CHUNK ? 1 : kWarps * HEADS * (DV + 2));

    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const int group = int(group_), sets = (group + HEADS - 1) / HEADS;
    const int kv_head = int(blockIdx.y) / sets, first = (int(blockIdx.y) % sets) * HEADS;  // first head within the group
    const int kv_heads = int(gridDim.y) / sets;
    const i64 heads = i64(kv_heads) * group;
    const int split = CHUNK ? 0 : int(blockIdx.x), splits = CHUNK ? 1 : int(gridDim.x);

    const i64 which = CHUNK ? i64(blockIdx.z) : i64(at_[2 * blockIdx.z]);
    const int number = CHUNK ? int(blockIdx.x) * kWarps + warp : at_[2 * blockIdx.z + 1];
    if (which < 0) {  // a pad
        for (int h = tid; h < HEADS; h += kThreads)
            if (first + h < group) part_lse[(i64(blockIdx.z) * heads + i64(kv_head) * group + first + h) * splits + split] = -KV_INF;
        if (tid == 0 && split == 0 && first == 0) read[i64(blockIdx.z) * kv_heads + kv_head] = 0;
        return;
    }
    const QueryBlock mine = queries[which];
    if (CHUNK && number >= mine.count) return;
    const i64 query = i64(mine.row) * columns + mine.column + number;

    // The kept keys, numbered through.
    const int position = mine.first + number, slot = mine.slots[stage];
    int start = 0, num_sinks = 0, num_chosen = 0;
    const int range = int(range_);
    const int* chosen = nullptr;
    if (slot >= 0) {
        const int* from = chosen_at(held, spare, slot, kv_head, kv_heads, most_);
        chosen = from + 4;
        start = larger(0, smaller(mine.hi, position + 1 - int(window_)));
        num_sinks = smaller(int(sinks_), start);
        int below = ((const Chosen*)from)->count;
        if (start < mine.hi) {
            int least = 0;  // how many begin before `start`
            while (least < below) {
                const int middle = (least + below) / 2;
                if (chosen[middle] < start) {
                    least = middle + 1;
                } else {
                    below = middle;
                }
            }
        }
        if (below > 0) num_chosen = below * range - larger(0, chosen[below - 1] + range - start);
    }
    const int total = num_sinks + num_chosen + position + 1 - start;
    if (split == 0 && first == 0 && (CHUNK ? lane : tid) == 0) read[query * kv_heads + kv_head] = total;

    int begin = int(i64(total) * split / splits), end = int(i64(total) * (split + 1) / splits);
    if (!CHUNK) {
        const int share = end - begin, from = begin;
        begin = from + share * warp / kWarps;
        end = from + share * (warp + 1) / kWarps;
    }
    const Residents residents(blocks, starts, spans, mine.row, items);
    const Angles angles{angles_, int(pairs), int(layout), float(by), int(alone)};
    auto look_up = [&](int j, u64& key, u64& value, int& place) {
        key = value = 0;
        place = j;
        if (j >= end) return;
        int t = j;
        if (j >= num_sinks) {
            const int c = j - num_sinks;
            t = c < num_chosen ? chosen[c / range] + c % range : start + c - num_chosen;
        }
        if (angles.alone == 0) place = t;
        int at;
        const Block where = residents.find(t, at);
        const i64 row = i64(kv_head) * where.stride + at;
        key = where.key + u64(row) * (DK * sizeof(T));
        value = where.value + u64(row) * (DV * sizeof(T));
    };

    // The queries, scaled; in base 2 unless the cap needs the logits as they are.
    const float cap = float(softcap), factor = float(scale) * (cap > 0.f ? 1.f : KV_LOG2E);
    float top[HEADS], sum[HEADS], acc[HEADS][V::channels], turned[HEADS][K::channels];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        top[h] = -KV_INF;
        sum[h] = 0.f;
#pragma unroll
        for (int c = 0; c < V::channels; c++) acc[h][c] = 0.f;
        const i64 head = i64(kv_head) * group + smaller(first + h, group - 1);
        const T* row = q + mine.row * q_row + head * q_head + (mine.column + number) * q_query;
#pragma unroll
        for (int p = 0; p < K::pieces; p++) {
            float x[K::vec];
#pragma unroll
            for (int e = 0; e < K::vec; e++) x[e] = 0.f;
            if (K::inside(lane, p)) {
                load<K::vec>(row + K::at(lane, p), x);
                if constexpr (RAW) angles.turn_query<K::vec>(x, row, K::at(lane, p), angles.alone != 0 ? total - 1 : position);
            }
#pragma unroll
            for (int e = 0; e < K::vec; e++) turned[h][p * K::vec + e] = x[e] * factor;
        }
    }

    u64 next_key, next_value;
    int next_place;
    look_up(begin + lane, next_key, next_value, next_place);
#pragma unroll 1
    for (int at = begin; at < end; at += 32) {
        const u64 key = next_key, value = next_value;
        const int place = next_place;
        look_up(at + 32 + lane, next_key, next_value, next_place);
#pragma unroll 1
        for (int from = 0; from < 32 && at + from < end; from += KEYS) {
            const int n = end - at - from;  // keys left, those of this turn among them
            Pack16 keys[UNROLL][K::pieces], values[ROUNDS][V::pieces];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const u64 row = __shfl_sync(0xffffffffu, key, from + u * K::together + lane / K::lanes);
#pragma unroll
                for (int p = 0; p < K::pieces; p++) {
                    keys[u][p] = Pack16{0, 0, 0, 0};
                    if (row != 0 && K::inside(lane, p)) keys[u][p] = ((const Pack16*)row)[K::at(lane, p) / K::vec];
                }
            }
#pragma unroll
            for (int r = 0; r < ROUNDS; r++) {
                const int k = r * V::together + lane / V::lanes;
                const u64 row = __shfl_sync(0xffffffffu, value, (from + k) & 31);
#pragma unroll
                for (int p = 0; p < V::pieces; p++) {
                    values[r][p] = Pack16{0, 0, 0, 0};
                    if (k < smaller(n, KEYS) && V::inside(lane, p)) values[r][p] = ((const Pack16*)row)[V::at(lane, p) / V::vec];
                }
            }

            float scores[HEADS][UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                for (int h = 0; h < HEADS; h++) scores[h][u] = 0.f;
                u64 whole = 0;
                int its_place = 0;
                if constexpr (RAW) {
                    const int source = from + u * K::together + lane / K::lanes;
                    whole = __shfl_sync(0xffffffffu, key, source);
                    its_place = __shfl_sync(0xffffffffu, place, source);
                }
#pragma unroll
                for (int p = 0; p < K::pieces; p++) {
                    float x[K::vec];
                    unpack<T>(keys[u][p], x);
                    if constexpr (RAW) {
                        if (whole != 0 && K::inside(lane, p))
                            turn<K::vec>(x, (const T*)whole, K::at(lane, p), angles.at(its_place), angles.pairs, angles.layout);
                    }
#pragma unroll
                    for (int h = 0; h < HEADS; h++)
#pragma unroll
                        for (int e = 0; e < K::vec; e++)
                            scores[h][u] = fmaf(x[e], turned[h][p * K::vec + e], scores[h][u]);
                }
            }

            // The key whose score this lane will hold. Lanes that hold the same one are neighbours.
            const int held_key = lane % K::lanes / SAME * K::together + lane / K::lanes;
            const bool valid = held_key < n;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float x = reduce_scattered<UNROLL, K::lanes>(scores[h], lane);
                if (cap > 0.f) x = cap * tanhf(x / cap) * KV_LOG2E;
                if (!valid) x = -KV_INF;
                float most = x;
#pragma unroll
                for (int width = 16; width >= SAME; width /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, width));
                if (most > top[h]) {  // the same for all lanes of the warp
                    const float shrink = exp2f(top[h] - most);
                    sum[h] *= shrink;
#pragma unroll
                    for (int c = 0; c < V::channels; c++) acc[h][c] *= shrink;
                    top[h] = most;
                }
                const float weight = valid && x != -KV_INF ? exp2f(x - top[h]) : 0.f;  // NaN stays NaN
                sum[h] += weight;
                if (lane % SAME == 0) weights[(warp * KEYS + held_key) * STRIDE_P + h] = weight;
            }
            __syncwarp();
#pragma unroll
            for (int r = 0; r < ROUNDS; r++) {
                const int k = r * V::together + lane / V::lanes;
                if (k < smaller(n, KEYS)) {
                    float weight[HEADS];
#pragma unroll
                    for (int h = 0; h < HEADS; h++) weight[h] = weights[(warp * KEYS + k) * STRIDE_P + h];
#pragma unroll
                    for (int p = 0; p < V::pieces; p++) {
                        float x[V::vec];
                        unpack<T>(values[r][p], x);
#pragma unroll
                        for (int h = 0; h < HEADS; h++)
#pragma unroll
                            for (int e = 0; e < V::vec; e++)
                                acc[h][p * V::vec + e] = fmaf(weight[h], x[e], acc[h][p * V::vec + e]);
                    }
                }
            }
            __syncwarp();  // the weights are read before the next turn writes its own
        }
    }

    // Sums over the lanes; with CHUNK they are the answer, else the warps' shares meet.
    float* tops = all + kWarps * HEADS * DV;
    float* sums = tops + kWarps * HEADS;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float total = sum[h];
#pragma unroll
        for (int width = 16; width >= SAME; width /= 2) total += __shfl_xor_sync(0xffffffffu, total, width);
#pragma unroll
        for (int c = 0; c < V::channels; c++)
#pragma unroll
            for (int width = 16; width >= V::lanes; width /= 2) acc[h][c] += __shfl_xor_sync(0xffffffffu, acc[h][c], width);
        if constexpr (CHUNK) {
            if (first + h >= group) continue;
            const i64 head = i64(kv_head) * group + first + h;
            if (learned != nullptr && total != 0.f) total += exp2f(learned[head] * KV_LOG2E - top[h]);
            const float share = total != 0.f ? 1.f / total : 0.f;
            if (lane < V::lanes) {
#pragma unroll
                for (int p = 0; p < V::pieces; p++)
                    if (V::inside(lane, p))
#pragma unroll
                        for (int e = 0; e < V::vec; e++)
                            out[(query * heads + head) * DV + V::at(lane, p) + e] = narrow<T>(acc[h][p * V::vec + e] * share);
            }
        } else {
            if (lane < V::lanes) {
#pragma unroll
                for (int p = 0; p < V::pieces; p++)
                    if (V::inside(lane, p))
#pragma unroll
                        for (int e = 0; e < V::vec; e++)
                            all[(warp * HEADS + h) * DV + V::at(lane, p) + e] = acc[h][p * V::vec + e];
            }
            if (lane == 0) {
                tops[warp * HEADS + h] = top[h];
                sums[warp * HEADS + h] = total;
            }
        }
    }
    if constexpr (!CHUNK) {
        __syncthreads();
        for (int i = tid; i < HEADS * DV; i += kThreads) {
            const int h = i / DV, c = i % DV;
            if (first + h >= group) continue;
            float most = -KV_INF;
            for (int w = 0; w < kWarps; w++) most = fmaxf(most, tops[w * HEADS + h]);
            float total = 0.f, value = 0.f;
            for (int w = 0; w < kWarps; w++) {
                const float share = tops[w * HEADS + h] == most ? 1.f : exp2f(tops[w * HEADS + h] - most);
                total = fmaf(share, sums[w * HEADS + h], total);
                value = fmaf(share, all[(w * HEADS + h) * DV + c], value);
            }
            const i64 to = (i64(blockIdx.z) * heads + i64(kv_head) * group + first + h) * splits + split;
            if (total != 0.f) part_out[to * DV + c] = value / total;
            if (c == 0) part_lse[to] = total != 0.f ? (most + log2f(total)) * KV_LN2 : -KV_INF;
        }
    }
}
