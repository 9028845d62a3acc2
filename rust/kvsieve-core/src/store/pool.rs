//! Blocks with reference counts. One table holds at most one reference to a block, however many of its runs lie in it.

use crate::ids::BlockId;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The blocks of a stream and of all its forks. Lowest free block first, so that stores stay short.
#[derive(Debug, Default)]
pub struct Pool {
    refs: Vec<u32>,
    free: BinaryHeap<Reverse<u32>>,
    used: usize,
    high: u32,
    reach: u32,
}

impl Pool {
    pub fn new() -> Self {
        Self::default()
    }

    /// A block that nobody else holds, with one reference.
    pub fn alloc(&mut self) -> BlockId {
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
        BlockId(id)
    }

    /// The block that [`Pool::alloc`] would hand out, if it has been handed out before.
    pub fn lowest_free(&self) -> Option<BlockId> {
        self.free.peek().map(|r| BlockId(r.0))
    }

    /// Adds a reference to a block that is already held.
    pub fn retain(&mut self, block: BlockId) {
        debug_assert!(self.refs[block.0 as usize] > 0, "{block:?} is free");
        self.refs[block.0 as usize] += 1;
    }

    /// Gives one reference back; the last one frees the block.
    pub fn release(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        debug_assert!(*refs > 0, "{block:?} is free");
        *refs -= 1;
        if *refs == 0 {
            self.used -= 1;
            self.free.push(Reverse(block.0));
            self.lower_high();
        }
    }

    pub fn is_shared(&self, block: BlockId) -> bool {
        self.refs[block.0 as usize] > 1
    }

    pub fn refs(&self, block: BlockId) -> u32 {
        self.refs.get(block.0 as usize).copied().unwrap_or(0)
    }

    /// Blocks with at least one reference.
    pub fn used(&self) -> usize {
        self.used
    }

    /// One past the highest block in use.
    pub fn high(&self) -> u32 {
        self.high
    }

    /// One past the highest block in use at any time since [`Pool::mark_reach`]. A list of moves may pass through a block that is
    /// free again at its end; the stores must still hold it.
    pub fn reach(&self) -> u32 {
        self.reach
    }

    pub fn mark_reach(&mut self) {
        self.reach = self.high;
    }

    /// For every block ever handed out, whether it is in use.
    pub fn in_use(&self) -> Vec<bool> {
        self.refs.iter().map(|&refs| refs > 0).collect()
    }

    /// Ids that wait to be handed out again, in no order.
    pub fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.free.iter().map(|r| BlockId(r.0))
    }

    fn lower_high(&mut self) {
        while self.high > 0 && self.refs[self.high as usize - 1] == 0 {
            self.high -= 1;
        }
    }
}
