//! What a rearrangement of tables leaves to do.

use crate::block::pool::Pool;
use crate::ids::{BlockId, Run};
use crate::plan::Move;

/// What changes beside the table itself while it is rearranged.
///
/// A block that the table lets go is only retired here, and released by the caller when the whole operation is planned: it still
/// has to be read, so it must not be handed out as a destination before.
#[derive(Debug)]
pub struct Edit<'a> {
    pub pool: &'a mut Pool,
    pub retired: Vec<BlockId>,
    pub moves: Vec<Move>,
}

impl<'a> Edit<'a> {
    pub fn new(pool: &'a mut Pool) -> Self {
        Self { pool, retired: Vec::new(), moves: Vec::new() }
    }

    /// Releases what was retired and hands over the moves.
    pub fn finish(self) -> Vec<Move> {
        for block in self.retired {
            self.pool.release(block);
        }
        self.moves
    }

    /// Moves a whole run to the same slots of another block.
    pub(super) fn push_run(&mut self, run: Run, to: BlockId) {
        self.moves.push(Move { from: run.block, from_slot: run.lo, to, to_slot: run.lo, len: run.len() });
    }

    /// Adds the move of one token, to the last move where it continues that.
    pub(super) fn push_move(&mut self, from: BlockId, from_slot: u32, to: BlockId, to_slot: u32) {
        if from == to && from_slot == to_slot {
            return;
        }
        if let Some(last) = self.moves.last_mut()
            && last.from == from
            && last.to == to
            && last.from_slot + last.len == from_slot
            && last.to_slot + last.len == to_slot
        {
            last.len += 1;
            return;
        }
        self.moves.push(Move { from, from_slot, to, to_slot, len: 1 });
    }
}
