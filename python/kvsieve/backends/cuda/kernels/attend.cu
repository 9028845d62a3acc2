// Attention of a few queries over the blocks of a store, read where they lie: the decode kernel.
//
//     x[j]  = scale * <turn(q, span), k[j] or turn(k[j], its slot)>      then cap * tanh(x / cap) where there is a cap
//     lse   = log sum exp x[j]        out = sum exp(x[j] - lse) v[j]     over the keys j of all spans of the query
//
// Shapes (row-major, `item` = row * num_queries + query):
//     q          [rows, heads, queries, DK]  any strides but 1 along DK
//     blocks     [blocks]                    where each block lies: head-major slabs [kv_heads][tokens][D]
//     starts     [items + 1]                 item i reads spans starts[i] .. starts[i + 1]; read here, so that a captured graph
//                                            can be replayed with another plan
//     turns      [.., 2 * pairs]             cosines and sines of the queries' rotations, see rotate.cu
//     in_block   [64, 2 * pairs]             cosines and sines of the slots 0 .. 63, for keys that are stored unrotated
//     part_out   [items, heads, splits, DV]  float, normalised; not written where part_lse is -inf
//     part_lse   [items, heads, splits]      float, natural logarithm
//     logits     [heads, total_keys]         float, natural; null unless attention scores are wanted. Keys of item i begin at key_starts[i]
//     packed     [packed blocks]             where each packed block lies, see packed.cuh; spans name them from kPackedFrom on
//
// Where part_out is null no value is read: the logits and the log-sum-exp are all that is wanted.
//
// Launch: grid (splits, kv_heads * chunks of HEADS * SUBSETS query heads, items), block 128.
//
// One thread block takes a contiguous share of an item's spans, for one key-value head and up to HEADS * SUBSETS query heads of its
// group: every key and value is read from memory once for all of them. (Several queries of a row read for themselves: what one has
// read, the others find in the second-level cache.) Tiles of TILE slots (16 KB of keys and values) pass through
// two stages of shared memory, the next one under way (cp.async) while this one is computed.
//
// In a tile, a warp owns every (4 / SUBSETS)-th run of keys and HEADS query heads. For the scores its lanes split the channels
// (16 bytes a lane) of 32 / LANES_K keys at a time; partial products of UNROLL keys are reduced together, each exchange halving
// what is left to exchange, so that a lane ends with one key's score. For the values its lanes split channels again and every lane
// adds up its own. Softmax is online in base 2, per warp; warps meet once, at the end.
//
// With RAW, keys of spans so marked are rotated by their slot's angle as they leave shared memory. The angles of all blocks are the
// same 64 rows, which stay in the first-level cache; the query is rotated once per span, by the block's base distance.
//
// With KB >= 0 spans may lie in packed blocks, among plain ones: keys of fewer channels (KB = 0) or codes of KB bits, values of T (VB = 0)
// or codes of VB bits. A tile of up to `packed_tile` slots passes through the same stages, cut into rows and scales; rows are copied in
// whole 16-byte pieces from wherever in a block they begin. The query is gathered to the kept channels once for a set of them and a
// turn. Where no more than half of the channels are kept, the lanes that would have nothing to do take every other key. A code c becomes 1 + c / 2^bits by putting its bits under an exponent, so
// that a number is one multiply-add away, by steps and least values that a lane keeps in registers for a group of keys, and loads
// for each value. Nothing of full width is ever written. With RAW the angles of the kept pairs are gathered as they are needed.
//
// Tried, by the assembler's report only (nothing here was timed on a GPU yet): at least 4 thread blocks a multiprocessor spills at
// D = 128 in 16 bits (48 bytes stored, raw keys 176); 3 (at most 168 registers) does not, and keeps 48 KB on their way. Multiply-add
// only; from 8 query heads a group on, tensor cores should pay.
#include "packed.cuh"
#include "rows.cuh"

template <typename T, int DK, int DV>
struct Tiles {
    // 16 KB of keys and values a stage, at most a block of tokens.
    static constexpr int tile = smaller(kBlock, larger(1, floor_pow2(int(16384 / ((DK + DV) * sizeof(T))))));
    static constexpr int stage = tile * (DK + DV);  // elements
};

// Rotates the numbers of a thin row from `at` on; `number` gives one of the row's, whose first `kept_pairs` and the next as many turn
// together.
template <int N, typename F>
__device__ __forceinline__ void turn_thin(float (&x)[N], F number, int at, const short* channels, int kept_pairs, const float* trig,
                                          int pairs, int layout) {
    if (at >= 2 * kept_pairs) return;
#pragma unroll
    for (int e = 0; e < N; e++) {
        const int j = at + e;
        if (j < 2 * kept_pairs) {
            const bool first = j < kept_pairs;
            const int stored = channels[j], c = stored < 0 ? -1 - stored : stored;
            const int pair = layout == kHalf ? (c < pairs ? c : c - pairs) : c >> 1;
            const float part = number(first ? j + kept_pairs : j - kept_pairs) * trig[pairs + pair];
            x[e] = fmaf(x[e], trig[pair], first ? -part : part);
        }
    }
}

// Thread blocks that a multiprocessor should hold: as many as its registers allow without spills.
constexpr int resident(int subsets, bool raw, int kb, int vb) {
    if (kb > 0 || vb > 0 || (kb == 0 && (raw || subsets > 1))) return 2;
    return subsets == 1 || (subsets == 2 && !raw) ? 3 : 2;
}

__device__ __forceinline__ int up16(int bytes) { return (bytes + 15) & ~15; }

template <typename T, int DK, int DV, int HEADS, int SUBSETS, bool RAW, int KB = -1, int VB = -1>
__global__ void __launch_bounds__(kThreads, resident(SUBSETS, RAW, KB, VB))
attend(const T* __restrict__ q, i64 q_row, i64 q_head, i64 q_query, const Block* __restrict__ blocks,
       const int* __restrict__ starts, const Span* __restrict__ spans, const float* __restrict__ turns,
       const float* __restrict__ in_block, i64 pairs_, i64 layout_, double factor, double scale, double softcap, i64 num_queries,
       i64 group_, float* __restrict__ part_out, float* __restrict__ part_lse, float* __restrict__ logits,
       const i64* __restrict__ key_starts, i64 total_keys, const PackedBlock* __restrict__ packed, i64 kept_, i64 wide_, i64 log_group_,
       i64 packed_tile_) {
    constexpr bool PACKED = KB >= 0;
    constexpr bool KEEPS = KB > 0 && !RAW;  // scales in registers: those that turn keys need them for other things
    using K = Rows<T, DK>;
    using V = Rows<T, DV>;
    constexpr int TILE = Tiles<T, DK, DV>::tile;
    constexpr int STAGE = Tiles<T, DK, DV>::stage;
    constexpr int KEY_WARPS = kWarps / SUBSETS;
    constexpr int PER_WARP = larger(1, TILE / (KEY_WARPS * K::together));  // rounds of `together` keys, per warp and tile
    constexpr int UNROLL = smaller(4, smaller(PER_WARP, K::lanes));
    constexpr int KEYS = UNROLL * K::together;  // keys that a warp scores before it reads their values
    constexpr int HELD = HEADS * SUBSETS;
    constexpr int STRIDE_P = HEADS == 3 ? 4 : HEADS;
    constexpr int BATCH = 32;  // spans looked up at once
    constexpr int ROUNDS = PACKED ? larger(PER_WARP, kBlock / (KEY_WARPS * K::together)) : PER_WARP;

    struct alignas(16) Where {
        u64 key, value;
        int lo, hi, before, turn_rotate;
    };
    struct Scales {
        u64 keys, values, channels;  // channels is 0 for a plain block
    };

    KV_SHARED(T, tiles, 2 * STAGE);
    KV_SHARED(float, base, HELD * DK);
    KV_SHARED(float, weights, kWarps * KEYS * STRIDE_P);
    KV_SHARED(Where, where, BATCH);
    KV_SHARED(Scales, scales_of, PACKED ? BATCH : 1);
    KV_SHARED(short, channels, PACKED ? DK + 1 : 1);
    static_assert(2 * STAGE * sizeof(T) >= kWarps * HEADS * (DV + 2) * sizeof(float), "the last merge reuses the tiles");

    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const int subset = warp % SUBSETS, key_warp = warp / SUBSETS;
    const int group = int(group_), pairs = int(pairs_), layout = int(layout_);
    const int chunks = (group + HELD - 1) / HELD;
    const int kv_head = int(blockIdx.y) / chunks, first = (int(blockIdx.y) % chunks) * HELD;  // first head within the group
    const int kv_heads = int(gridDim.y) / chunks;
    const i64 item = blockIdx.z;
    const int split = int(blockIdx.x), splits = int(gridDim.x);
    const i64 heads = i64(kv_heads) * group;

    // The queries, scaled; in base 2 unless the cap needs the logits as they are.
    const float to_base2 = softcap > 0 ? 1.f : KV_LOG2E;
    const float cap = float(softcap);
    const bool reads_values = part_out != nullptr;
    for (int i = tid; i < HELD * DK; i += kThreads) {
        const int g = first + i / DK, c = i % DK;
        float x = 0.f;
        if (g < group) {
            const i64 row = item / num_queries, query = item % num_queries;
            x = widen(q[row * q_row + (i64(kv_head) * group + g) * q_head + query * q_query + c]) * float(scale) * to_base2;
            if (c < 2 * pairs) x *= float(factor);
        }
        base[i] = x;
    }

    float top[HEADS], sum[HEADS], acc[HEADS][V::channels], turned[HEADS][K::channels];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        top[h] = -KV_INF;
        sum[h] = 0.f;
#pragma unroll
        for (int c = 0; c < V::channels; c++) acc[h][c] = 0.f;
    }
    int facing = -1;  // the turn that `turned` has, twice; plus 1 where it has been gathered to kept channels

    // A packed tile in a stage: rows of keys, their scales, rows of values, their scales.
    const int kept = int(kept_), wide = int(wide_), log_group = int(log_group_), packed_tile = int(packed_tile_);
    const int key_row = int(row_bytes<T, larger(KB, 0)>(wide)), key_scale_row = 4 * wide;
    constexpr int value_row = int(VB > 0 ? DV * VB / 8 : DV * sizeof(T));
    const int value_scale_row = 4 * (DV >> log_group);
    const int at_key_scales = up16(packed_tile * key_row) + (KB > 0 ? 16 : 0);
    const int at_values = at_key_scales + (KB > 0 ? (((packed_tile - 1) >> log_group) + 2) * key_scale_row : 0);
    const int at_value_scales = at_values + up16(packed_tile * value_row) + (VB > 0 ? 16 : 0);
    u64 known = 0;  // whose channels `channels` has
    // Thin rows that half of the lanes can read: the upper half takes the odd ones of a round's keys.
    constexpr bool FOLDS = PACKED && K::pieces == 1 && K::lanes >= 16 && UNROLL > 1;  // with 8 lanes it spills
    const bool folded = FOLDS && 2 * wide <= K::lanes * K::vec, upper = folded && (lane & (K::lanes / 2)) != 0;
    auto place = [&](int piece) { return folded ? (lane % larger(K::lanes / 2, 1)) * K::vec : K::at(lane, piece); };

    const i64 from = starts[item], count = starts[item + 1] - from;
    const i64 begin = from + count * split / splits, end = from + count * (split + 1) / splits;

    for (i64 batch = begin; batch < end; batch += BATCH) {
        const int num = end - batch < BATCH ? int(end - batch) : BATCH;
        __syncthreads();  // the last batch's table and tiles are done with; the queries are there
        if (tid < num) {
            const Span span = spans[batch + tid];
            const i64 head = kv_head + span.head();
            Where w;
            if (PACKED && span.block >= kPackedFrom) {
                const PackedBlock block = packed[span.block - kPackedFrom];
                const i64 rows = head * block.stride;
                w.key = block.key + u64(rows * key_row);
                w.value = block.value + u64(rows * value_row);
                Scales s;
                s.keys = block.key_scales + u64((rows >> log_group) * key_scale_row);
                s.values = block.value_scales + u64(rows * value_scale_row);
                s.channels = block.channels + u64(head) * (1 + wide) * sizeof(short);
                scales_of[tid] = s;
            } else {
                const Block block = blocks[span.block];
                w.key = block.key + u64(head * block.stride) * (DK * sizeof(T));
                w.value = block.value + u64(head * block.stride) * (DV * sizeof(T));
                if (PACKED) scales_of[tid].channels = 0;
            }
            w.lo = span.lo();
            w.hi = span.hi();
            w.before = span.before;
            w.turn_rotate = span.turn << 1 | int(span.rotate());
            where[tid] = w;
        }
        __syncthreads();

        // Asks for slots at .. at + TILE of a span. Only slots inside the span are read.
        auto fetch = [&](int s, int at, int stage) {
            const Where w = where[s];
            if constexpr (PACKED) {
                const Scales more = scales_of[s];
                if (more.channels != 0) {
                    const int n = w.hi - at < packed_tile ? w.hi - at : packed_tile;
                    char* to = (char*)(tiles + stage * STAGE);
                    auto copy = [&](char* to, u64 from, int bytes) {
                        const char* begin = (const char*)(from & ~u64(15));
                        const int end = bytes + int(u32(from) & 15u);
                        for (int i = tid * 16; i < end; i += kThreads * 16) kv_copy16(to + i, begin + i);
                    };
                    copy(to, w.key + u32(at * key_row), n * key_row);
                    if (reads_values) copy(to + at_values, w.value + u32(at * value_row), n * value_row);
                    if (KB > 0) {
                        const int group = at >> log_group, groups = ((at + n - 1) >> log_group) - group + 1;
                        copy(to + at_key_scales, more.keys + u32(group * key_scale_row), groups * key_scale_row);
                    }
                    if (VB > 0 && reads_values) copy(to + at_value_scales, more.values + u32(at * value_scale_row), n * value_scale_row);
                    return;
                }
            }
            const int n = w.hi - at < TILE ? w.hi - at : TILE;
            const T* keys = (const T*)w.key + i64(at) * DK;
            const T* values = (const T*)w.value + i64(at) * DV;
            T* to = tiles + stage * STAGE;
            for (int i = tid; i < n * (DK / K::vec); i += kThreads) kv_copy16(to + i * K::vec, keys + i * K::vec);
            to += TILE * DK;
            for (int i = tid; reads_values && i < n * (DV / V::vec); i += kThreads) kv_copy16(to + i * V::vec, values + i * V::vec);
        };

        int s = 0;
        while (s < num && where[s].lo >= where[s].hi) s++;
        int at = s < num ? where[s].lo : 0, stage = 0;
        if (s < num) fetch(s, at, 0);
        kv_commit();
        while (s < num) {
            kv_wait<0>();
            __syncthreads();  // this tile has arrived for everyone, and everyone has left the other stage
            const Where w = where[s];
            const Scales more = PACKED ? scales_of[s] : Scales{0, 0, 0};
            const bool is_packed = PACKED && more.channels != 0;
            const int tile = is_packed ? packed_tile : TILE;
            const int now = at, n = w.hi - at < tile ? w.hi - at : tile;
            at += tile;
            if (at >= w.hi) {
                do s++;
                while (s < num && where[s].lo >= where[s].hi);
                at = s < num ? where[s].lo : 0;
            }
            if (s < num) fetch(s, at, stage ^ 1);
            kv_commit();

            const T* keys = tiles + stage * STAGE;
            const T* values = keys + TILE * DK;
            const unsigned char* staged = (const unsigned char*)keys;
            stage ^= 1;

            if (is_packed && more.channels != known) {
                known = more.channels;
                facing = -1;
                for (int i = tid; i <= wide; i += kThreads) channels[i] = ((const short*)known)[i];
                __syncthreads();
            }
            const int face = layout == 0 ? 0 : w.turn_rotate >> 1, way = 2 * face + int(is_packed);
            if (way != facing && is_packed) {
                facing = way;
                const float* trig = turns + i64(face - 1) * 2 * pairs;
#pragma unroll
                for (int i = 0; i < K::channels; i++) {
                    const int j = place(i / K::vec) + i % K::vec, c = j < kept ? channels[1 + j] : -1;
                    const bool turning = face && c >= 0 && c < 2 * pairs;
                    const bool first = layout == kHalf ? c < pairs : (c & 1) == 0;
                    const int pair = layout == kHalf ? (first ? c : c - pairs) : c >> 1;
                    const int mate = layout == kHalf ? (first ? c + pairs : pair) : c ^ 1;
                    const float cosine = turning ? trig[pair] : 1.f, sine = turning ? trig[pairs + pair] : 0.f;
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float* row = base + (subset * HEADS + h) * DK;
                        float x = c < 0 ? 0.f : row[c];
                        if (turning) x = fmaf(x, cosine, first ? -row[mate] * sine : row[mate] * sine);
                        turned[h][i] = x;
                    }
                }
            }
            if (way != facing) {
                facing = way;
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float* row = base + (subset * HEADS + h) * DK;
#pragma unroll
                    for (int p = 0; p < K::pieces; p++) {
                        float x[K::vec];
#pragma unroll
                        for (int e = 0; e < K::vec; e++) x[e] = 0.f;
                        if (K::inside(lane, p)) {
                            load<K::vec>(row + K::at(lane, p), x);
                            if (face) turn<K::vec>(x, row, K::at(lane, p), turns + i64(face - 1) * 2 * pairs, pairs, layout);
                        }
#pragma unroll
                        for (int e = 0; e < K::vec; e++) turned[h][p * K::vec + e] = x[e];
                    }
                }
            }
            const bool rotate = RAW && layout != 0 && (w.turn_rotate & 1) != 0;

            // Of a packed tile: its rows, and the steps (times 2^KB) and least values (less that) of the group that this lane last met.
            const unsigned char* key_rows = staged + (KB > 0 ? int(u32(w.key) + u32(now) * u32(key_row)) & 15 : 0);
            const f16* key_scales = (const f16*)(staged + at_key_scales);
            const unsigned char* value_rows = staged + at_values + (VB > 0 ? int(u32(w.value) + u32(now) * u32(value_row)) & 15 : 0);
            const unsigned char* value_scales = staged + at_value_scales + (int(u32(more.values) + u32(now) * u32(value_scale_row)) & 15);
            float steps[KEEPS ? K::channels : 1], leasts[KEEPS ? K::channels : 1];
            int met = -1;

#pragma unroll 1
            for (int round = 0; round < ROUNDS; round += UNROLL) {
                // Key `i` (of KEYS) of this warp and round; the same for every lane that asks.
                auto key_of = [&](int i) {
                    return ((round + i / K::together) * KEY_WARPS + key_warp) * K::together + i % K::together;
                };
                if (key_of(0) >= n) break;

                float scores[HEADS][UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    if (FOLDS && is_packed && folded && u % 2 == 1) continue;  // the round before gave it its score
#pragma unroll
                    for (int h = 0; h < HEADS; h++) scores[h][u] = 0.f;
                    const int j = key_of((u + int(FOLDS && is_packed && upper)) * K::together + lane / K::lanes);
                    if (PACKED && is_packed && j < n) {
                        const unsigned char* row = key_rows + j * key_row;
                        const f16* scales = key_scales;
                        if constexpr (KB > 0) {
                            const int group = ((now + j) >> log_group) - (now >> log_group);
                            scales += group * 2 * wide;
                            if (KEEPS && group != met) {
                                met = group;
#pragma unroll
                                for (int i = 0; i < (KEEPS ? K::channels : 0); i++) {
                                    const int c = place(i / K::vec) + i % K::vec;
                                    steps[i] = c < wide ? widen(scales[c]) * float(1 << KB) : 0.f;
                                    leasts[i] = (c < wide ? widen(scales[wide + c]) : 0.f) - steps[i];
                                }
                            }
                        }
#pragma unroll
                        for (int p = 0; p < K::pieces; p++) {
                            const int from = place(p);
                            if (from < wide) {
                                float x[K::vec];
                                if constexpr (KB > 0) {
                                    fractions<K::vec, KB>(row + from * KB / 8, x);
#pragma unroll
                                    for (int e = 0; e < K::vec; e++) {
                                        if constexpr (KEEPS) {
                                            x[e] = fmaf(steps[p * K::vec + e], x[e], leasts[p * K::vec + e]);
                                        } else {
                                            const int c = from + e;
                                            const float step = widen(scales[c]) * float(1 << KB);
                                            x[e] = fmaf(step, x[e], widen(scales[wide + c]) - step);
                                        }
                                    }
                                } else {
                                    load<K::vec>((const T*)row + from, x);
                                }
                                if constexpr (RAW) {
                                    auto number = [&](int i) {
                                        if constexpr (KB > 0) {
                                            return fmaf(widen(scales[i]), float(code_at<larger(KB, 1)>(row, i)), widen(scales[wide + i]));
                                        } else {
                                            return widen(((const T*)row)[i]);
                                        }
                                    };
                                    if (rotate)
                                        turn_thin<K::vec>(x, number, from, channels + 1, channels[0],
                                                          in_block + i64(now + j) * 2 * pairs, pairs, layout);
                                }
#pragma unroll
                                for (int h = 0; h < HEADS; h++)
#pragma unroll
                                    for (int e = 0; e < K::vec; e++)
                                        scores[h][u] = fmaf(x[e], turned[h][p * K::vec + e], scores[h][u]);
                            }
                        }
                    } else if (j < n) {
                        const T* row = keys + j * DK;
#pragma unroll
                        for (int p = 0; p < K::pieces; p++) {
                            if (K::inside(lane, p)) {
                                float x[K::vec];
                                load<K::vec>(row + K::at(lane, p), x);
                                if constexpr (RAW) {
                                    if (rotate)
                                        turn<K::vec>(x, row, K::at(lane, p), in_block + i64(now + j) * 2 * pairs, pairs, layout);
                                }
#pragma unroll
                                for (int h = 0; h < HEADS; h++)
#pragma unroll
                                    for (int e = 0; e < K::vec; e++)
                                        scores[h][u] = fmaf(x[e], turned[h][p * K::vec + e], scores[h][u]);
                            }
                        }
                    }
                    if (FOLDS && is_packed && folded) {
#pragma unroll
                        for (int h = 0; h < HEADS; h++) {
                            scores[h][(u + 1) % UNROLL] = upper ? scores[h][u] : 0.f;
                            if (upper) scores[h][u] = 0.f;
                        }
                    }
                }

                // The key whose score this lane will hold. Lanes that hold the same one are neighbours.
                constexpr int SAME = K::lanes / UNROLL;
                const int mine = (lane % K::lanes) / SAME * K::together + lane / K::lanes;
                const bool valid = key_of(mine) < n;
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    float x = reduce_scattered<UNROLL, K::lanes>(scores[h], lane);
                    if (cap > 0.f) x = cap * tanhf(x / cap) * KV_LOG2E;
                    if (!valid) x = -KV_INF;
                    if (logits != nullptr && valid && lane % SAME == 0) {
                        const i64 g = first + subset * HEADS + h;
                        if (g < group)
                            logits[(i64(kv_head) * group + g) * total_keys + key_starts[item] + w.before + now - w.lo + key_of(mine)] =
                                x * KV_LN2;
                    }
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
                    if (lane % SAME == 0) weights[(warp * KEYS + mine) * STRIDE_P + h] = weight;
                }
                __syncwarp();

#pragma unroll
                for (int i = 0; i < KEYS; i += V::together) {
                    const int k = i + lane / V::lanes;
                    const int j = key_of(k);
                    if ((KEYS % V::together == 0 || k < KEYS) && j < n && reads_values) {
                        float weight[HEADS];
#pragma unroll
                        for (int h = 0; h < HEADS; h++) weight[h] = weights[(warp * KEYS + k) * STRIDE_P + h];
                        const T* row = values + j * DV;
#pragma unroll
                        for (int p = 0; p < V::pieces; p++) {
                            if (V::inside(lane, p)) {
                                float x[V::vec];
                                if (PACKED && is_packed) {
                                    const int c = V::at(lane, p);
                                    if constexpr (VB > 0) {
                                        const f16* scales = (const f16*)(value_scales + j * value_scale_row) + (c >> log_group);
                                        const float step = widen(scales[0]) * float(1 << VB);
                                        const float least = widen(scales[DV >> log_group]) - step;
                                        fractions<V::vec, VB>(value_rows + j * value_row + c * VB / 8, x);
#pragma unroll
                                        for (int e = 0; e < V::vec; e++) x[e] = fmaf(step, x[e], least);
                                    } else {
                                        load<V::vec>((const T*)(value_rows + j * value_row) + c, x);
                                    }
                                } else {
                                    load<V::vec>(row + V::at(lane, p), x);
                                }
#pragma unroll
                                for (int h = 0; h < HEADS; h++)
#pragma unroll
                                    for (int e = 0; e < V::vec; e++)
                                        acc[h][p * V::vec + e] = fmaf(weight[h], x[e], acc[h][p * V::vec + e]);
                            }
                        }
                    }
                }
                __syncwarp();  // the weights are read before the next round writes its own
            }
        }
    }

    // Each warp's share of the sums, into the tiles' memory: [warp][HEADS][DV], then [warp][HEADS] maxima and sums of weights.
    constexpr int SAME = K::lanes / UNROLL;
    float* all = (float*)tiles;
    float* tops = all + kWarps * HEADS * DV;
    float* sums = tops + kWarps * HEADS;
    kv_wait<0>();
    __syncthreads();
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float total = sum[h];
#pragma unroll
        for (int width = 16; width >= SAME; width /= 2) total += __shfl_xor_sync(0xffffffffu, total, width);
#pragma unroll
        for (int c = 0; c < V::channels; c++)
#pragma unroll
            for (int width = 16; width >= V::lanes; width /= 2) acc[h][c] += __shfl_xor_sync(0xffffffffu, acc[h][c], width);
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
    __syncthreads();
    for (int i = tid; i < HELD * DV; i += kThreads) {
        const int held = i / DV, c = i % DV;
        if (first + held >= group) continue;
        float most = -KV_INF;
        for (int k = 0; k < KEY_WARPS; k++) most = fmaxf(most, tops[(k * SUBSETS + held / HEADS) * HEADS + held % HEADS]);
        float total = 0.f, value = 0.f;
        for (int k = 0; k < KEY_WARPS; k++) {
            const int at = (k * SUBSETS + held / HEADS) * HEADS + held % HEADS;
            const float share = tops[at] == most ? 1.f : exp2f(tops[at] - most);
            total = fmaf(share, sums[at], total);
            value = fmaf(share, all[at * DV + c], value);
        }
        const i64 to = (item * heads + i64(kv_head) * group + first + held) * splits + split;
        if (total != 0.f && reads_values) part_out[to * DV + c] = value / total;
        if (c == 0) part_lse[to] = total != 0.f ? (most + log2f(total)) * KV_LN2 : -KV_INF;
    }
}
