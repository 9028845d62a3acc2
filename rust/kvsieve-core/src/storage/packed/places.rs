//! Where numbers and codes lie in a block.

use super::packing::Packing;
use crate::ids::BLOCK;
use crate::tensor::Dtype;

/// Where channel `c` of a key of `kept` numbers lies in its head's block, which has memory for `slots` tokens. The numbers of all tokens
/// are neighbours; in `bf16` two channels are, in words of all tokens, but for the last channel of an odd number.
pub(super) fn thin_place(kept: usize, dtype: Dtype, slots: usize, slot: usize, c: usize) -> usize {
    match dtype {
        Dtype::BF16 if c / 2 < kept / 2 => c / 2 * 4 * slots + slot * 4 + c % 2 * 2,
        _ => (c * slots + slot) * dtype.size(),
    }
}

/// Where the code of channel `c` of a key lies in its head's block of `bytes` a token: the byte, and the bit in it.
///
/// A word of 32 bits takes the codes of `32 / bits` channels, those of even channels in its low half and those of odd ones in its high
/// half; the words of all tokens for these channels are neighbours. What is left of a row is bytes, in channel order, that are
/// neighbours likewise.
pub(super) fn key_place(bytes: usize, bits: u32, slot: usize, c: usize) -> (usize, u32) {
    let (block, bits) = (BLOCK as usize, bits as usize);
    let (words, word, at) = (bytes / 4, c * bits / 32, c % (32 / bits));
    if word < words {
        let bit = at / 2 * bits + at % 2 * 16;
        (word * block * 4 + slot * 4 + bit / 8, (bit % 8) as u32)
    } else {
        let bit = at * bits;
        (words * block * 4 + bit / 8 * block + slot, (bit % 8) as u32)
    }
}

/// The fewest numbers to a scale for which values lie in pairs of tokens: then all codes at one place of so many words share theirs.
pub(crate) const PAIRED: usize = 16;

/// A stretch of halves of words that hold the values of two tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    /// The first word, and how many there are: 16, or for the rest of a row 8, 4, 2 or 1.
    pub word: usize,
    pub words: usize,
    /// The first channel.
    pub channel: usize,
}

impl Chunk {
    /// The stretch that begins at `word` of a row of `words`, its first channel being `channel`.
    #[inline(always)]
    fn at(word: usize, words: usize, channel: usize) -> Option<Self> {
        let left = words - word;
        (left > 0).then(|| Chunk { word, words: 1 << left.min(16).ilog2(), channel })
    }

    /// The first stretch of a row.
    #[inline(always)]
    pub fn first(value_dim: usize, bits: u32) -> Option<Self> {
        Chunk::at(0, value_dim * bits as usize / 16, 0)
    }

    /// The stretch behind this one.
    #[inline(always)]
    pub fn next(self, value_dim: usize, bits: u32) -> Option<Self> {
        let channel = self.channel + self.words * (16 / bits as usize);
        Chunk::at(self.word + self.words, value_dim * bits as usize / 16, channel)
    }
}

/// Where the code of channel `c` of a value lies in its head's block of `bytes` a token: the byte, and the bit in it.
///
/// Word `i` of two neighbouring tokens holds codes of the first one in its low half and of the second one in its high half. In a
/// stretch of `n` words ([`Chunk`]) those at the lowest bits are of the first `n` channels, those above them of the next `n`, and so on.
/// With scales for fewer than [`PAIRED`] numbers codes lie in rows, in channel order.
pub(super) fn value_place(packing: &Packing, value_dim: usize, bytes: usize, slot: usize, c: usize) -> (usize, u32) {
    let bits = packing.value_bits;
    if packing.group < PAIRED {
        let bit = c * bits as usize;
        return (slot * bytes + bit / 8, (bit % 8) as u32);
    }
    let mut chunk = Chunk::first(value_dim, bits);
    while let Some(Chunk { word, words, channel }) = chunk {
        let at = c - channel;
        if at < words * (16 / bits as usize) {
            let bit = at / words * bits as usize;
            let half = 2 * (word + at % words) + slot % 2;
            return (slot / 2 * 2 * bytes + 2 * half + bit / 8, (bit % 8) as u32);
        }
        chunk = chunk.and_then(|chunk| chunk.next(value_dim, bits));
    }
    panic!("channel {c} of {value_dim}");
}
