//! Index types: every index has its own type, so that a slot can never be used where a block is meant.

use std::fmt;

/// Tokens in one block. A block is the unit of allocation, of sharing and of freeing.
pub const BLOCK: u32 = 64;

/// Blocks from this number on hold packed tokens: fewer key channels, fewer bits. Those below hold tokens as they came.
pub const PACKED: u32 = 1 << 25;

/// The number of a token in its sequence, counted over real (never padded) tokens, from 0.
pub type Position = u64;

/// One block of [`BLOCK`] slots, valid in every layer's store alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// Whether its tokens are packed. The number alone tells, so that whatever passes blocks around need not know.
    pub fn is_packed(self) -> bool {
        self.0 >= PACKED
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_packed() { write!(f, "p{}", self.0 - PACKED) } else { write!(f, "b{}", self.0) }
    }
}

/// A run of resident slots `[lo, hi)` of one block, in text order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub block: BlockId,
    pub lo: u32,
    pub hi: u32,
}

impl Run {
    pub fn len(&self) -> u32 {
        self.hi - self.lo
    }

    pub fn is_empty(&self) -> bool {
        self.hi == self.lo
    }

    /// Whether this run lies behind `before` in the same block.
    pub fn goes_on(&self, before: &Self) -> bool {
        self.block == before.block && self.lo >= before.hi
    }
}
