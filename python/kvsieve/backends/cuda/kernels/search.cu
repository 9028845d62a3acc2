// What query blocks read between sinks and window: the searches of HiP and InfiniteHiP (backends/reference/ has the definitions).
//
//     score(t) = max over the query heads of a group, and the sampled queries i of a block with t <= first + i - window, of q . k[t]
//     `hip`:    nodes = `most` equal ranges of a region's blocks; while one is longer than a block: halve all, keep the `most`
//               halves whose representative block has the best key
//     `narrow`: one stage of InfiniteHiP: cut what the stage before chose into chunks, score each by the best key met on a walk down
//               its halves, keep the `most` best
//
//     with BOUNDS, a chunk is a block of the text, and its score is max over the same queries of sum_c max(q[c] * most[c], q[c] * least[c])
//               over the bounds of its keys (see page_bounds.cu): what a key of it can score at most
//
// Of equal scores the earlier wins; NaN and what no query sees score -inf, and what scores -inf is not chosen in the end.
//
// Shapes (row-major):
//     q          [rows, heads, queries, DK]       any strides but 1 along DK; rows begin at multiples of 16 bytes
//     blocks     [blocks]                         where each block lies
//     starts     [rows * items + 1]               the residents of a row are the spans of the last of its `items`
//     queries    [blocks of queries]              see residents.cuh; those that begin with a later stage are left alone
//     *_held, *_spare  [slots, kv_heads, most]    choices, see `Chosen`: of the rows, and those that only a chunk needs
//     ranks      [blocks of queries, kv_heads, capacity]  scratch of `narrow`: scores as integers
//     arrivals   [blocks of queries, kv_heads, 2] counts of `narrow` with splits; zero before and after
//     searched   [blocks of queries, kv_heads]    representative keys scored
//
//     angles     [.., 2 * pairs]                  with RAW, whose keys are stored before RoPE: cosines and sines of positions, which are
//                                                 numbers of residents. Queries and keys are turned to theirs; or, `alone`, the queries
//                                                 to `window`, as if every key were so far away, and no key
//
// Launch: `hip` grid (1, kv_heads, blocks of queries): a thread block is one whole search, its nodes in shared memory (at most 1,024).
// `narrow` grid (splits, kv_heads, blocks of queries): chunks are judged wherever there is room, and the thread block that comes last
// chooses among them. Block 256 both.
//
// Each lane of a warp brings a key, found through the row's table; the warp reads the 32 keys where they lie, a row at a time across
// 16 bytes a lane, up to 8 rows under way, and scores each for all queries of the block, in registers in sets of HEADS. The best are
// found by value, eight bits a pass, and then taken in order by ballots, so that no order of threads matters.
//
// Tried: not yet timed on a GPU. A search of one row by 8 thread blocks (one for each key-value head) leaves most of a GPU idle and
// lives by the latency of its levels. In a chunk it is bound by multiply-adds: `Scorer::best` on tensor cores (16 keys by 8 queries
// at a time, both through ldmatrix from shared memory, keys gathered there by cp.async) would be worth about eight times as much.
#include "residents.cuh"

constexpr int kSearchers = 256;
constexpr int kNodes = 1024;
constexpr u32 kUnseen = 0x007fffffu;  // the rank of -inf; 0 is below everything

// Ascending integers for ascending scores. NaN is -inf, and both zeros are one.
__device__ __forceinline__ u32 rank_of(float x) {
    if (x != x) return kUnseen;
    const u32 bits = __float_as_uint(x + 0.f);
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// Scores keys for the queries of one block and key-value head; one for each warp.
// With BOUNDS a key is a block: its maxima, which its minima follow.
template <typename T, int DK, int HEADS, bool BOUNDS = false, bool RAW = false>
struct Scorer {
    using K = Rows<T, DK>;
    static constexpr int UNROLL = smaller(K::pieces == 1 && !BOUNDS && !RAW ? 8 : 4, K::lanes);  // those need more registers
    static constexpr int KEYS = UNROLL * K::together;  // read at once, at most 32
    static constexpr int SAME = K::lanes / UNROLL;

    int stride;  // from one sampled query to the next; the last is sampled
    const T* q;  // the first head's first sampled query
    i64 q_head, q_query;
    int group, num, edge, lane, held = -1;
    int window;
    Angles angles;
    float turned[HEADS][K::channels];

    __device__ Scorer(const T* q_, i64 q_row, i64 q_head_, i64 q_query_, const QueryBlock& of, int kv_head, i64 group_, i64 window_,
                      i64 stride_, const Angles& angles_)
        : stride(int(stride_)), q(q_ + of.row * q_row + kv_head * group_ * q_head_ + (of.column + skipped(of)) * q_query_),
          q_head(q_head_), q_query(q_query_ * stride_), group(int(group_)), num(((of.count - 1) / stride + 1) * int(group_)),
          edge(of.first + skipped(of) - int(window_)), lane(int(threadIdx.x) % 32), window(int(window_)), angles(angles_) {}

    // Queries of the block before the first one that is sampled.
    __device__ int skipped(const QueryBlock& of) const { return (of.count - 1) % stride; }

    // The best score of this lane's key, resident `t` at `address`, or of none (address 0). All lanes of a warp together.
    __device__ float best(u64 address, int t) {
        float mine = -KV_INF;
        const u32 live = __ballot_sync(0xffffffffu, address != 0);
#pragma unroll 1
        for (int from = 0; from < 32; from += KEYS) {
            if ((live >> from & (KEYS == 32 ? 0xffffffffu : (1u << KEYS % 32) - 1u)) == 0) continue;
            constexpr bool TURNS = RAW && !BOUNDS;
            Pack16 keys[UNROLL][K::pieces], leasts[BOUNDS ? UNROLL : 1][K::pieces];
            float rows[TURNS ? UNROLL : 1][K::channels];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int source = from + u * K::together + lane / K::lanes;
                const u64 key = __shfl_sync(0xffffffffu, address, source);
                if constexpr (TURNS) {
                    const int place = __shfl_sync(0xffffffffu, t, source);
#pragma unroll
                    for (int p = 0; p < K::pieces; p++) {
                        float x[K::vec];
#pragma unroll
                        for (int e = 0; e < K::vec; e++) x[e] = 0.f;
                        if (key != 0 && K::inside(lane, p)) {
                            load<K::vec>((const T*)key + K::at(lane, p), x);
                            if (angles.alone == 0)
                                turn<K::vec>(x, (const T*)key, K::at(lane, p), angles.at(place), angles.pairs, angles.layout);
                        }
#pragma unroll
                        for (int e = 0; e < K::vec; e++) rows[u][p * K::vec + e] = x[e];
                    }
                    continue;
                }
#pragma unroll
                for (int p = 0; p < K::pieces; p++) {
                    keys[u][p] = Pack16{0, 0, 0, 0};
                    if (key != 0 && K::inside(lane, p)) keys[u][p] = ((const Pack16*)key)[K::at(lane, p) / K::vec];
                    if constexpr (BOUNDS) {
                        leasts[u][p] = Pack16{0, 0, 0, 0};
                        if (key != 0 && K::inside(lane, p)) leasts[u][p] = ((const Pack16*)key)[(DK + K::at(lane, p)) / K::vec];
                    }
                }
            }
            const int at = __shfl_sync(0xffffffffu, t, from + lane % K::lanes / SAME * K::together + lane / K::lanes);
            const bool hides = at > edge;
            float top = -KV_INF;
#pragma unroll 1
            for (int set = 0; set < num; set += HEADS) {
                if (set != held) fetch(set);
                float scores[HEADS][UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                    for (int h = 0; h < HEADS; h++) scores[h][u] = 0.f;
#pragma unroll
                    for (int p = 0; p < K::pieces; p++) {
                        float x[K::vec], y[K::vec];
                        if constexpr (TURNS) {
#pragma unroll
                            for (int e = 0; e < K::vec; e++) x[e] = rows[u][p * K::vec + e];
                        } else {
                            unpack<T>(keys[u][p], x);
                        }
                        if constexpr (BOUNDS) unpack<T>(leasts[u][p], y);
#pragma unroll
                        for (int h = 0; h < HEADS; h++)
#pragma unroll
                            for (int e = 0; e < K::vec; e++) {
                                const float by = turned[h][p * K::vec + e];
                                if constexpr (BOUNDS) {  // of its positive and its negative part, as the definition has it
                                    scores[h][u] = fmaf(by < 0.f ? 0.f : by, x[e], scores[h][u]);
                                    scores[h][u] = fmaf(by > 0.f ? 0.f : by, y[e], scores[h][u]);
                                } else {
                                    scores[h][u] = fmaf(x[e], by, scores[h][u]);
                                }
                            }
                    }
                }
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float x = reduce_scattered<UNROLL, K::lanes>(scores[h], lane);
                    if (x > top && (!hides || at <= edge + smaller(set + h, num - 1) / group * stride)) top = x;
                }
            }
            const int k = lane - from;
            const float found = __shfl_sync(0xffffffffu, top, (k % K::together * K::lanes + k / K::together * SAME) & 31);
            if (k >= 0 && k < KEYS && address != 0) mine = found;
        }
        return mine;
    }

    // Queries set .. set + HEADS, all heads of the group for each; beyond the last, the last.
    __device__ void fetch(int set) {
        held = set;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const int i = smaller(set + h, num - 1);
            const T* row = q + i64(i % group) * q_head + i64(i / group) * q_query;
#pragma unroll
            for (int p = 0; p < K::pieces; p++) {
                float x[K::vec];
#pragma unroll
                for (int e = 0; e < K::vec; e++) x[e] = 0.f;
                if (K::inside(lane, p)) {
                    load<K::vec>(row + K::at(lane, p), x);
                    if constexpr (RAW) {
                        const int place = angles.alone != 0 ? window : edge + window + i / group * stride;
                        angles.turn_query<K::vec>(x, row, K::at(lane, p), place);
                    }
                }
#pragma unroll
                for (int e = 0; e < K::vec; e++) turned[h][p * K::vec + e] = x[e];
            }
        }
    }
};

// The value above which all are among the best, and how many of those equal to it.
struct Threshold {
    u32 rank, left;
};

// The threshold of the `k` best of `num` ranks, 1 <= k <= num. `histogram` has 256 entries, `chosen` 2.
__device__ __forceinline__ Threshold kth_best(const volatile u32* ranks, int num, u32 k, u32* histogram, u32* chosen) {
    const int tid = int(threadIdx.x);
    u32 prefix = 0, mask = 0;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
        histogram[tid] = 0;
        __syncthreads();  // and whatever wrote the ranks
        for (int i = tid; i < num; i += kSearchers) {
            const u32 rank = ranks[i];
            if ((rank & mask) == prefix) atomicAdd(&histogram[rank >> shift & 255u], 1u);
        }
        __syncthreads();
        if (tid < 32) {
            // A lane has eight counts; `above` are the counts of all lanes behind it.
            u32 mine = 0;
            for (int i = 0; i < 8; i++) mine += histogram[8 * tid + i];
            u32 all = mine, above = 0;
#pragma unroll
            for (int width = 1; width < 32; width *= 2) {
                const u32 other = __shfl_xor_sync(0xffffffffu, all, width);
                if ((tid & width) == 0) above += other;
                all += other;
            }
            if (above < k && k <= above + mine) {
                int bin = 8 * tid + 7;
                while (above + histogram[bin] < k) above += histogram[bin--];
                chosen[0] = u32(bin);
                chosen[1] = k - above;
            }
        }
        __syncthreads();
        prefix |= chosen[0] << shift;
        mask |= 255u << shift;
        k = chosen[1];
    }
    return Threshold{prefix, k};
}

// Calls take(i, n) for the n-th of the best, ascending; returns how many there are. `counts` has two entries for each warp.
template <typename F>
__device__ __forceinline__ u32 each_best(const volatile u32* ranks, int num, Threshold best, u32* counts, F take) {
    constexpr int WARPS = kSearchers / 32;
    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    u32 above = 0, equal = 0;  // before this range
    for (int begin = 0; begin < num; begin += kSearchers) {
        const int i = begin + tid;
        const u32 rank = i < num ? ranks[i] : 0;
        const bool is_above = i < num && rank > best.rank, is_equal = i < num && rank == best.rank;
        const u32 all_above = __ballot_sync(0xffffffffu, is_above), all_equal = __ballot_sync(0xffffffffu, is_equal);
        __syncthreads();  // the counts of the range before are read
        if (lane == 0) {
            counts[warp] = u32(__popc(all_above));
            counts[WARPS + warp] = u32(__popc(all_equal));
        }
        __syncthreads();
        const u32 before = (1u << lane) - 1u;
        u32 my_above = above + u32(__popc(all_above & before)), my_equal = equal + u32(__popc(all_equal & before));
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) {
                my_above += counts[w];
                my_equal += counts[WARPS + w];
            }
            above += counts[w];
            equal += counts[WARPS + w];
        }
        if (is_above || (is_equal && my_equal < best.left)) take(i, my_above + (my_equal < best.left ? my_equal : best.left));
    }
    return above + (equal < best.left ? equal : best.left);
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int width = 16; width > 0; width /= 2) x += __shfl_xor_sync(0xffffffffu, x, width);
    return x;
}

constexpr int kMiddle = 0;
constexpr int kFirst = 1;
constexpr int kLast = 2;
constexpr int kOracle = 3;

// Blocks of a node; of those that speak for it.
struct Node {
    int lo, hi;

    __device__ Node spoken(int representative) const {
        if (representative == kOracle) return *this;
        const int at = representative == kFirst ? lo : representative == kLast ? hi - 1 : lo + (hi - lo) / 2;
        return Node{at, at + 1};
    }
};

template <typename T, int DK, int HEADS, bool RAW = false>
__global__ void __launch_bounds__(kSearchers, 1)
hip(const T* __restrict__ q, i64 q_row, i64 q_head, i64 q_query, const Block* __restrict__ blocks, const int* __restrict__ starts,
    const Span* __restrict__ spans, i64 items, const QueryBlock* __restrict__ queries, i64 group, i64 window, i64 stride,
    i64 block_, i64 most_, i64 representative_, int* __restrict__ held, int* __restrict__ spare, int* __restrict__ searched,
    const float* __restrict__ angles, i64 pairs, i64 layout, double factor, i64 alone) {
    KV_SHARED(Node, nodes, 2 * kNodes);
    KV_SHARED(u32, scores, 2 * kNodes);
    KV_SHARED(u32, ranks, 2 * kNodes);
    KV_SHARED(u16, asked, 2 * kNodes);
    KV_SHARED(u32, histogram, 256);
    KV_SHARED(u32, counts, 2 * kSearchers / 32);
    KV_SHARED(u32, found, 2);
    KV_SHARED(u32, tally, 4);  // children to score; the longest node; keys read

    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const int kv_head = int(blockIdx.y), kv_heads = int(gridDim.y);
    const QueryBlock mine = queries[blockIdx.z];
    int* reads_to = searched + i64(blockIdx.z) * kv_heads + kv_head;
    if (mine.start > 0) {
        if (tid == 0) *reads_to = 0;
        return;
    }
    const int block = int(block_), width = int(most_), representative = int(representative_);
    const int tokens = mine.hi - mine.lo, num = (tokens + block - 1) / block;
    const Residents residents(blocks, starts, spans, mine.row, items);
    Scorer<T, DK, HEADS, false, RAW> scorer(q, q_row, q_head, q_query, mine, kv_head, group, window, stride,
                                            Angles{angles, int(pairs), int(layout), float(factor), int(alone)});

    if (tid < 4) tally[tid] = 0;
    for (int i = tid; i < width; i += kSearchers) {
        nodes[i] = Node{int(i64(num) * i / width), int(i64(num) * (i + 1) / width)};
        scores[i] = 0;  // unknown
    }
    int longest = (num + width - 1) / width, rounds = 0, now = 0, reads = 0;
    __syncthreads();
    while (longest > 1) {
        const Node* parents = nodes + now * kNodes;
        const u32* known = scores + now * kNodes;
        // The halves of all nodes. A block that has spoken for the parent need not be read again.
        for (int begin = 0; begin < 2 * width; begin += kSearchers) {
            const int c = begin + tid;
            bool asks = false;
            if (c < 2 * width) {
                const Node parent = parents[c / 2];
                const int middle = parent.lo + (parent.hi - parent.lo) / 2;
                const Node child = c % 2 == 0 ? Node{parent.lo, middle} : Node{middle, parent.hi};
                u32 rank = 0;
                if (child.lo < child.hi) {
                    const Node by = child.spoken(representative), before = parent.spoken(representative);
                    reads += smaller(by.hi * block, tokens) - by.lo * block;
                    asks = known[c / 2] == 0 || by.lo != before.lo || by.hi != before.hi;
                    rank = asks ? kUnseen : known[c / 2];
                }
                ranks[c] = rank;
            }
            const u32 all = __ballot_sync(0xffffffffu, asks);
            u32 base = 0;
            if (lane == 0 && all != 0) base = atomicAdd(&tally[0], u32(__popc(all)));
            base = __shfl_sync(0xffffffffu, base, 0);
            if (asks) asked[base + u32(__popc(all & ((1u << lane) - 1u)))] = u16(c);
        }
        __syncthreads();

        // A lane takes a key of a representative block; which lane does not matter.
        const int per = representative == kOracle ? (longest + 1) / 2 * block : block;
        const int keys = int(tally[0]) * per;
        for (int begin = warp * 32; begin < keys; begin += kSearchers) {
            const int j = begin + lane;
            int c = -1, t = 0;
            u64 address = 0;
            if (j < keys) {
                c = asked[j / per];
                const Node parent = parents[c / 2];
                const int middle = parent.lo + (parent.hi - parent.lo) / 2;
                const Node by = (c % 2 == 0 ? Node{parent.lo, middle} : Node{middle, parent.hi}).spoken(representative);
                const int at = by.lo * block + j % per;
                if (at < smaller(by.hi * block, tokens)) {
                    int slot;
                    t = mine.lo + at;
                    const Block where = residents.find(t, slot);
                    address = where.key + u64(i64(kv_head) * where.stride + slot) * (DK * sizeof(T));
                }
            }
            const float x = scorer.best(address, t);
            if (address != 0) atomicMax(&ranks[c], rank_of(x));
        }
        if (tid == 0) tally[1] = 0;

        const Threshold best = kth_best(ranks, 2 * width, u32(width), histogram, found);
        Node* next = nodes + (1 - now) * kNodes;
        u32* next_scores = scores + (1 - now) * kNodes;
        each_best(ranks, 2 * width, best, counts, [&](int c, u32 n) {
            const Node parent = parents[c / 2];
            const int middle = parent.lo + (parent.hi - parent.lo) / 2;
            const Node child = c % 2 == 0 ? Node{parent.lo, middle} : Node{middle, parent.hi};
            next[n] = child;
            next_scores[n] = ranks[c];
            atomicMax(&tally[1], u32(child.hi - child.lo));
        });
        __syncthreads();
        longest = int(tally[1]);
        if (tid == 0) tally[0] = 0;
        now = 1 - now;
        rounds++;
        __syncthreads();
    }

    reads = warp_sum(reads);
    if (lane == 0) atomicAdd(&tally[2], u32(reads));
    int* to = chosen_at(held, spare, mine.slots[0], kv_head, kv_heads, most_);
    const Node* last = nodes + now * kNodes;
    const u32 count = each_best(scores + now * kNodes, width, Threshold{kUnseen, 0}, counts,
                                [&](int i, u32 n) { to[4 + n] = mine.lo + last[i].lo * block; });
    if (tid == 0) {  // `each_best` has waited for everybody's reads
        *(Chosen*)to = Chosen{int(count), int(tally[2]), rounds, 0};
        *reads_to = int(tally[2]);
    }
}

template <typename T, int DK, int HEADS, bool BOUNDS = false, bool RAW = false>
__global__ void __launch_bounds__(kSearchers, 1)
narrow(const T* __restrict__ q, i64 q_row, i64 q_head, i64 q_query, const Block* __restrict__ blocks, const int* __restrict__ starts,
       const Span* __restrict__ spans, i64 items, const QueryBlock* __restrict__ queries, i64 group, i64 window, i64 stride,
       i64 stage, i64 chunk_, i64 from_chunk_, i64 most_, i64 from_most, i64 representative, int* __restrict__ from_held,
       int* __restrict__ from_spare, int* __restrict__ held, int* __restrict__ spare, u32* __restrict__ all_ranks, i64 capacity,
       u32* __restrict__ arrivals, int* __restrict__ searched, const float* __restrict__ angles, i64 pairs, i64 layout, double factor,
       i64 alone) {
    KV_SHARED(u32, histogram, 256);
    KV_SHARED(u32, counts, 2 * kSearchers / 32);
    KV_SHARED(u32, found, 2);
    KV_SHARED(u32, tally, 2);  // keys read; whether this thread block is the last

    const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
    const int kv_head = int(blockIdx.y), kv_heads = int(gridDim.y), split = int(blockIdx.x), splits = int(gridDim.x);
    const QueryBlock mine = queries[blockIdx.z];
    const i64 which = i64(blockIdx.z) * kv_heads + kv_head;
    if (mine.start > stage) {
        if (tid == 0 && split == 0) searched[which] = 0;
        return;
    }

    // Piece c of what the stage before chose. Only the last of its ranges can be short.
    const int chunk = int(chunk_), per = int(from_chunk_ / chunk_), most = int(most_);
    const int* from = nullptr;
    int num = (mine.hi - mine.lo + chunk - 1) / chunk;
    if (stage > 0) {
        const int* ranges = chosen_at(from_held, from_spare, mine.slots[stage - 1], kv_head, kv_heads, from_most);
        const int count = ((const Chosen*)ranges)->count;
        from = ranges + 4;
        num = 0;
        if (count > 0) {
            const int last = smaller(int(from_chunk_), mine.hi - from[count - 1]);
            num = (count - 1) * per + (last + chunk - 1) / chunk;
        }
    }
    auto begins = [&](int c) { return from == nullptr ? mine.lo + c * chunk : from[c / per] + c % per * chunk; };

    int* to = chosen_at(held, spare, mine.slots[stage], kv_head, kv_heads, most_);
    if (num <= most) {
        if (split == 0) {
            for (int c = tid; c < num; c += kSearchers) to[4 + c] = begins(c);
            if (tid == 0) {
                *(Chosen*)to = Chosen{num, 0, 0, 0};
                searched[which] = 0;
            }
        }
        return;
    }

    const Residents residents(blocks, starts, spans, mine.row, items);
    Scorer<T, DK, HEADS, BOUNDS, RAW> scorer(q, q_row, q_head, q_query, mine, kv_head, group, window, stride,
                                             Angles{angles, int(pairs), int(layout), float(factor), int(alone)});
    u32* ranks = all_ranks + which * capacity;
    auto score = [&](bool live, int t) {
        u64 address = 0;
        if (live) {
            int slot;
            const Block where = residents.find(t, slot);
            address = where.key + u64(i64(kv_head) * where.stride + slot) * (DK * sizeof(T));
        }
        const float x = scorer.best(address, t);
        return x == x ? x : -KV_INF;
    };

    if (tid == 0) tally[0] = 0;
    __syncthreads();
    int reads = 0;
    for (int begin = (warp * splits + split) * 32; begin < num; begin += splits * kSearchers) {
        // A lane walks down a chunk, always to the better half.
        const int c = begin + lane;
        int lo = c < num ? begins(c) : 0, hi = c < num ? smaller(lo + chunk, mine.hi) : 0;
        if constexpr (BOUNDS) {
            u64 address = 0;
            if (c < num) {
                int slot;
                address = residents.find(lo, slot).bounds + u64(kv_head) * (2 * DK * sizeof(T));
                reads += 2;
            }
            const float bound = scorer.best(address, lo);
            if (c < num) ranks[c] = rank_of(bound);
            continue;
        }
        float best = -KV_INF, left = -KV_INF;
        reads += hi - lo == 1 ? 1 : 0;
        if (representative == kFirst) {
            left = score(lo < hi, lo);
            best = left;
        } else if (__ballot_sync(0xffffffffu, hi - lo == 1) != 0) {
            best = score(hi - lo == 1, lo);
        }
        while (__ballot_sync(0xffffffffu, hi - lo > 1) != 0) {
            const bool live = hi - lo > 1;
            const int middle = (lo + hi) / 2;
            const float a = representative == kFirst ? left : score(live, (lo + middle) / 2);
            const float b = score(live, representative == kFirst ? middle : (middle + hi) / 2);
            if (live) {
                reads += 2;
                best = fmaxf(best, fmaxf(a, b));
                left = b > a ? b : a;
                if (b > a) {
                    lo = middle;
                } else {
                    hi = middle;
                }
            }
        }
        if (c < num) ranks[c] = rank_of(best);
    }
    reads = warp_sum(reads);
    if (lane == 0) atomicAdd(&tally[0], u32(reads));
    // The ranks are out before this thread block counts itself; the last one looks at them only after it has counted.
    if (splits > 1) __threadfence();
    __syncthreads();
    u32 total = tally[0];
    if (splits > 1) {
        volatile u32* arrived = arrivals + 2 * which;
        if (tid == 0) {
            atomicAdd((u32*)arrived + 1, total);
            __threadfence();
            tally[1] = atomicAdd((u32*)arrived, 1u);
        }
        __syncthreads();
        if (tally[1] != u32(splits - 1)) return;
        __threadfence();
        if (tid == 0) {
            total = arrived[1];
            arrived[0] = 0;
            arrived[1] = 0;
        }
    }

    Threshold best = kth_best(ranks, num, u32(most), histogram, found);
    if (best.rank <= kUnseen) best = Threshold{kUnseen, 0};
    const u32 count = each_best(ranks, num, best, counts, [&](int c, u32 n) { to[4 + n] = begins(c); });
    if (tid == 0) {
        *(Chosen*)to = Chosen{int(count), int(total), 1, 0};
        searched[which] = int(total);
    }
}
