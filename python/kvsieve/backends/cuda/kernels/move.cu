// Moves tokens from slot to slot, in the order of the list, each move as if through a buffer (compaction, copy before write).
//
//     for m in list: to[m.to, to_slot .. + len] = from[m.from, from_slot .. + len]       for every head, keys and values
//
// Shapes: list [num] of Move, len <= 64; blocks [blocks].
//
// Launch: grid (DK / 16-byte pieces + DV / 16-byte pieces, kv_heads), block 64. A later move may read what an earlier one wrote, so
// moves are not parallel; channels are: a thread block takes one piece of 16 bytes of every token of one head through all moves. A
// thread holds one token's piece while all have read, then writes it.
//
// Tried: first version, not yet timed on a GPU. It runs when a score-based rule compacts, once in 64 tokens. Pieces of 16 bytes waste
// half of a 32-byte sector, for twice the thread blocks.
#include "common.cuh"

template <typename T, int DK, int DV>
__global__ void __launch_bounds__(kBlock)
move(const Block* __restrict__ blocks, const Move* __restrict__ list, i64 num) {
    constexpr int PK = DK / kVec<T>;
    const int slot = int(threadIdx.x), piece = int(blockIdx.x);
    const i64 head = blockIdx.y;
    const bool key = piece < PK;
    const i64 dim = key ? DK : DV, offset = (key ? piece : piece - PK) * kVec<T>;
    for (i64 i = 0; i < num; i++) {
        const Move m = list[i];
        const bool mine = slot < m.len;
        const Block from = blocks[m.from], to = blocks[m.to];
        Pack16 held;
        if (mine) {
            const i64 at = head * from.stride + i64(m.slots & 0xffffu) + slot;
            held = *(const Pack16*)((const T*)(key ? from.key : from.value) + at * dim + offset);
        }
        __syncthreads();  // everyone has read
        if (mine) {
            const i64 at = head * to.stride + i64(m.slots >> 16) + slot;
            *(Pack16*)((T*)(key ? to.key : to.value) + at * dim + offset) = held;
        }
        __syncthreads();  // everyone has written, before the next move reads
    }
}
