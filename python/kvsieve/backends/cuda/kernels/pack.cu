// Packs tokens: kept channels and codes, from rows of full width to packed blocks.
//
//     keys[to_slot + i]   = narrow(row[channels])   or its codes, with the scales of their groups          i < len
//     values[to_slot + i] = the value               or its codes, with the scales of its groups
//
// Where keys share a scale, what lies before a run's first slot in its group is kept, coded anew, and what lies behind the run is
// forgotten. Neighbouring moves into one block are one run: numbers that share a scale are seen together.
//
// Shapes: from [..] of Block: rows of T, or, with THIN, float rows of `wide` numbers without values; list [num] of Move, those into
// one block together and in their order; starts [blocks + 1]: where each block's begin; to [..] of PackedBlock (a move's `to` counts
// from 0 here).
//
// Launch: grid (blocks, kv_heads), block 128. Numbers: a thread takes an element. Codes of keys: a thread takes a byte of a row, so all
// of its channels, through the tokens of one group, twice: extremes, then codes. Codes of values: a thread takes a group of one token.
//
// Tried: first version, not yet timed on a GPU. It reads a prompt once, after prefill has read it many times.
#include "packed.cuh"

struct Source {
    const Block* from;
    const Move* list;
    i64 head;

    // The row of the token that goes to `slot`, beginning the search at move `m`.
    __device__ i64 row(int slot, i64& m, int& block) const {
        while (slot >= int(list[m].slots >> 16) + list[m].len) m++;
        const Move move = list[m];
        block = move.from;
        return head * from[move.from].stride + int(move.slots & 0xffffu) + (slot - int(move.slots >> 16));
    }
};

template <typename T, int KB, int VB, bool THIN>
__global__ void __launch_bounds__(kThreads)
pack(const Block* __restrict__ from, const PackedBlock* __restrict__ to, const Move* __restrict__ list, const int* __restrict__ starts,
     i64 key_dim, i64 kept, i64 wide, i64 value_dim, i64 log_group) {
    const i64 head = blockIdx.y;
    const int tid = int(threadIdx.x), group = 1 << log_group;
    const Source source{from, list, head};
    i64 first = starts[blockIdx.x];
    const i64 stop = starts[blockIdx.x + 1];
    if (first == stop) return;
    const PackedHead at = packed_head<T, KB, VB>(to[list[first].to], head, wide, value_dim, log_group);

    // Number j of the thin row of a token.
    auto key = [&](int block, i64 row, i64 j) {
        if (THIN) return ((const float*)from[block].key)[row * wide + j];
        const int c = j < kept ? at.channels[1 + j] : -1;
        return c < 0 ? 0.f : widen(((const T*)from[block].key)[row * key_dim + c]);
    };

    while (first < stop) {
        i64 next = first + 1;
        while (next < stop && int(list[next].slots >> 16) == int(list[next - 1].slots >> 16) + list[next - 1].len) next++;
        const int begin = int(list[first].slots >> 16), end = int(list[next - 1].slots >> 16) + list[next - 1].len;

        if constexpr (KB == 0) {
            const u32 width = u32(wide), work = u32(end - begin) * width;
            i64 m = first;
            int block;
            for (u32 i = tid; i < work; i += kThreads) {
                const int slot = begin + int(i / width), j = int(i % width);
                const i64 row = source.row(slot, m, block);
                ((T*)at.keys)[slot * wide + j] = narrow<T>(key(block, row, j));
            }
        } else {
            constexpr int PER = 8 / KB;  // channels of a byte
            const int bytes = int(wide) * KB / 8, g0 = begin >> log_group, groups = ((end - 1) >> log_group) - g0 + 1;
            for (int i = tid; i < groups * bytes; i += kThreads) {
                const int g = g0 + i / bytes, column = i % bytes, start = g * group;
                const int lo = begin > start ? begin : start, hi = end < start + group ? end : start + group;
                f16* scales = at.key_scales + i64(g) * 2 * wide;
                unsigned char* codes = at.keys + column;
                float step[PER], least[PER];  // of what is kept
                Extremes<KB> extremes[PER];
                Scale scale[PER];
#pragma unroll
                for (int c = 0; c < PER; c++) {
                    step[c] = lo > start ? widen(scales[column * PER + c]) : 0.f;
                    least[c] = lo > start ? widen(scales[wide + column * PER + c]) : 0.f;
                }
                for (int slot = start; slot < lo; slot++) {
                    const unsigned char* byte = codes + i64(slot) * bytes;
#pragma unroll
                    for (int c = 0; c < PER; c++) extremes[c].add(fmaf(step[c], float(code_at<KB>(byte, c)), least[c]));
                }
                i64 m = first;
                int block;
                for (int slot = lo; slot < hi; slot++) {
                    const i64 row = source.row(slot, m, block);
#pragma unroll
                    for (int c = 0; c < PER; c++) extremes[c].add(key(block, row, column * PER + c));
                }
#pragma unroll
                for (int c = 0; c < PER; c++) {
                    scale[c] = extremes[c].scale();
                    scales[column * PER + c] = scale[c].step;
                    scales[wide + column * PER + c] = scale[c].least;
                }
                for (int slot = start; slot < lo; slot++) {
                    unsigned char* byte = codes + i64(slot) * bytes;
                    u32 word = 0;
#pragma unroll
                    for (int c = 0; c < PER; c++)
                        word |= scale[c].code(fmaf(step[c], float(code_at<KB>(byte, c)), least[c])) << (c * KB);
                    *byte = (unsigned char)word;
                }
                m = first;
                for (int slot = lo; slot < hi; slot++) {
                    const i64 row = source.row(slot, m, block);
                    u32 word = 0;
#pragma unroll
                    for (int c = 0; c < PER; c++) word |= scale[c].code(key(block, row, column * PER + c)) << (c * KB);
                    codes[i64(slot) * bytes] = (unsigned char)word;
                }
            }
        }

        if constexpr (!THIN) {
            i64 m = first;
            int block;
            if constexpr (VB == 0) {
                const int pieces = int(value_dim) / kVec<T>;
                for (int i = tid; i < (end - begin) * pieces; i += kThreads) {
                    const int slot = begin + i / pieces, piece = i % pieces;
                    const i64 row = source.row(slot, m, block);
                    ((Pack16*)at.values)[slot * pieces + piece] = ((const Pack16*)from[block].value)[row * pieces + piece];
                }
            } else {
                const int shares = int(value_dim) >> log_group;
                for (int i = tid; i < (end - begin) * shares; i += kThreads) {
                    const int slot = begin + i / shares, share = i % shares;
                    const i64 row = source.row(slot, m, block);
                    const T* values = (const T*)from[block].value + row * value_dim + share * group;
                    Extremes<VB> extremes;
                    for (int c = 0; c < group; c++) extremes.add(widen(values[c]));
                    const Scale scale = extremes.scale();
                    f16* scales = at.value_scales + i64(slot) * 2 * shares;
                    scales[share] = scale.step;
                    scales[shares + share] = scale.least;
                    unsigned char* codes = at.values + (i64(slot) * value_dim + share * group) * VB / 8;
                    for (int c = 0; c < group; c += 8 / VB) {
                        u32 word = 0;
#pragma unroll
                        for (int e = 0; e < 8 / VB; e++) word |= scale.code(widen(values[c + e])) << (e * VB);
                        codes[c * VB / 8] = (unsigned char)word;
                    }
                }
            }
        }
        first = next;
        __syncthreads();  // the next run may keep some of what this one wrote
    }
}
