// Moves packed tokens from slot to slot as they are, bit for bit, in the order of the list, each move as if through a buffer.
//
//     for m in list: to[m.to, to_slot .. + len] = from[m.from, from_slot .. + len]     for every head: keys, values, scales of values
//
// Keys that are codes share their scales with other tokens and cannot be carried: they are read (unpack.cu) and packed again (pack.cu).
//
// Shapes: list [num] of Move, len <= 64, blocks counted from 0; blocks [..] of PackedBlock; bytes of a row of each, 0 for what stays.
//
// Launch: grid (pieces, kv_heads), block 64, as `move`: a thread block takes one piece of every token of one head through all moves. A
// piece is as long as divides the row evenly, 16 bytes at most, so that it is aligned.
//
// Tried: first version, not yet timed on a GPU.
#include "packed.cuh"

__device__ __forceinline__ int piece_bytes(i64 row) {
    const i64 lowest = row & -row;
    return int(lowest < 16 ? lowest : 16);
}

__global__ void __launch_bounds__(kBlock)
carry(const PackedBlock* __restrict__ blocks, const Move* __restrict__ list, i64 num, i64 key_row, i64 value_row, i64 scale_row) {
    const int slot = int(threadIdx.x);
    const i64 head = blockIdx.y;
    const i64 rows[3] = {key_row, value_row, scale_row};
    int part = 0, piece = int(blockIdx.x);
    while (part < 2 && (rows[part] == 0 || piece >= int(rows[part] / piece_bytes(rows[part])))) {
        if (rows[part] != 0) piece -= int(rows[part] / piece_bytes(rows[part]));
        part++;
    }
    const i64 row = rows[part];
    const int bytes = piece_bytes(row);
    auto place = [&](const PackedBlock& b, i64 at) {
        const u64 base = part == 0 ? b.key : part == 1 ? b.value : b.value_scales;
        return (unsigned char*)base + (head * b.stride + at) * row + i64(piece) * bytes;
    };
    for (i64 i = 0; i < num; i++) {
        const Move m = list[i];
        const bool mine = slot < m.len;
        Pack16 held;
        if (mine) {
            const unsigned char* from = place(blocks[m.from], i64(m.slots & 0xffffu) + slot);
            if (bytes == 16) held = *(const Pack16*)from;
            if (bytes == 8) *(u64*)&held = *(const u64*)from;
            if (bytes == 4) held.x = *(const u32*)from;
            if (bytes == 2) held.x = *(const u16*)from;
            if (bytes == 1) held.x = *from;
        }
        __syncthreads();  // everyone has read
        if (mine) {
            unsigned char* to = place(blocks[m.to], i64(m.slots >> 16) + slot);
            if (bytes == 16) *(Pack16*)to = held;
            if (bytes == 8) *(u64*)to = *(const u64*)&held;
            if (bytes == 4) *(u32*)to = held.x;
            if (bytes == 2) *(u16*)to = u16(held.x);
            if (bytes == 1) *to = (unsigned char)held.x;
        }
        __syncthreads();  // everyone has written, before the next move reads
    }
}
