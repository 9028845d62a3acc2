//! Blocks with reference counts. A table holds one reference for neighbouring runs that ascend in a block, however many they are; only a
//! joined table may come back to a block, or to slots of it, and then holds another.

use crate::ids::{BlockId, PACKED};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Blocks of one kind. Lowest free block first, so that stores stay short. Numbers in here count from 0.
#[derive(Debug, Default)]
struct Kind {
    refs: Vec<u32>,
    free: BinaryHeap<Reverse<u32>>,
    used: usize,
    high: u32,
    reach: u32,
}

impl Kind {
    fn alloc(&mut self) -> u32 {
        let id = match self.free.pop() {
            Some(Reverse(id)) => id,
            None => {
                self.refs.push(0);
                (self.refs.len() - 1) as u32
            }
        };
        self.refs[id as usize] = 1;
        self.used += 1;
        self.high = self.high.max(id + 1);
        self.reach = self.reach.max(self.high);
        id
    }

    fn release(&mut self, id: u32) {
        let refs = &mut self.refs[id as usize];
        debug_assert!(*refs > 0, "block {id} is free");
        *refs -= 1;
        if *refs == 0 {
            self.used -= 1;
            self.free.push(Reverse(id));
            while self.high > 0 && self.refs[self.high as usize - 1] == 0 {
                self.high -= 1;
            }
        }
    }

    /// Whether some free block lies below one in use.
    fn has_gaps(&self) -> bool {
        self.free.peek().is_some_and(|free| free.0 < self.high)
    }

    fn in_use(&self) -> Vec<bool> {
        self.refs.iter().map(|&refs| refs > 0).collect()
    }
}

/// The blocks of a stream and of all its forks: plain ones, and packed ones.
#[derive(Debug, Default)]
pub struct Pool {
    plain: Kind,
    packed: Kind,
}

impl Pool {
    pub fn new() -> Self {
        Self::default()
    }

    fn kind(&self, packed: bool) -> &Kind {
        if packed { &self.packed } else { &self.plain }
    }

    fn kind_of(&mut self, block: BlockId) -> (&mut Kind, u32) {
        if block.is_packed() { (&mut self.packed, block.0 - PACKED) } else { (&mut self.plain, block.0) }
    }

    /// A block that nobody else holds, with one reference.
    pub fn alloc(&mut self) -> BlockId {
        BlockId(self.plain.alloc())
    }

    /// A packed block that nobody else holds, with one reference.
    pub fn alloc_packed(&mut self) -> BlockId {
        BlockId(self.packed.alloc() + PACKED)
    }

    /// A block of the kind of `block`.
    pub fn alloc_like(&mut self, block: BlockId) -> BlockId {
        if block.is_packed() { self.alloc_packed() } else { self.alloc() }
    }

    /// The block of the kind of `like` that would be handed out next, if it has been handed out before.
    pub fn lowest_free(&self, like: BlockId) -> Option<BlockId> {
        let base = if like.is_packed() { PACKED } else { 0 };
        self.kind(like.is_packed()).free.peek().map(|r| BlockId(r.0 + base))
    }

    /// Whether some free block lies below one in use of its kind.
    pub fn has_gaps(&self) -> bool {
        self.plain.has_gaps() || self.packed.has_gaps()
    }

    /// Adds a reference to a block that is already held.
    pub fn retain(&mut self, block: BlockId) {
        let (kind, id) = self.kind_of(block);
        debug_assert!(kind.refs[id as usize] > 0, "{block:?} is free");
        kind.refs[id as usize] += 1;
    }

    /// Gives one reference back; the last one frees the block.
    pub fn release(&mut self, block: BlockId) {
        let (kind, id) = self.kind_of(block);
        kind.release(id);
    }

    pub fn is_shared(&self, block: BlockId) -> bool {
        self.refs(block) > 1
    }

    pub fn refs(&self, block: BlockId) -> u32 {
        let base = if block.is_packed() { PACKED } else { 0 };
        self.kind(block.is_packed()).refs.get((block.0 - base) as usize).copied().unwrap_or(0)
    }

    /// Blocks with at least one reference, of either kind.
    pub fn used(&self) -> usize {
        self.plain.used + self.packed.used
    }

    /// One past the highest plain block in use.
    pub fn high(&self) -> u32 {
        self.plain.high
    }

    /// One past the highest plain block in use at any time since [`Pool::mark_reach`]. A list of moves may pass through a block
    /// that is free again at its end; the stores must still hold it.
    pub fn reach(&self) -> u32 {
        self.plain.reach
    }

    /// As [`Pool::reach`], in packed blocks: how many, counted from [`PACKED`].
    pub fn packed_reach(&self) -> u32 {
        self.packed.reach
    }

    pub fn mark_reach(&mut self) {
        self.plain.reach = self.plain.high;
        self.packed.reach = self.packed.high;
    }

    /// For every plain block ever handed out, whether it is in use.
    pub fn in_use(&self) -> Vec<bool> {
        self.plain.in_use()
    }

    /// For every packed block ever handed out, counted from [`PACKED`], whether it is in use.
    pub fn packed_in_use(&self) -> Vec<bool> {
        self.packed.in_use()
    }

    /// Ids that wait to be handed out again, in no order.
    pub fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        let plain = self.plain.free.iter().map(|r| BlockId(r.0));
        plain.chain(self.packed.free.iter().map(|r| BlockId(r.0 + PACKED)))
    }
}
