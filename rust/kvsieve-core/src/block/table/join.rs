//! Residents of another table, shared.

use super::{Table, blocks_of};
use crate::block::pool::Pool;
use crate::ids::{BlockId, Position};

impl Table {
    /// The blocks that hold the residents from position `from` on.
    pub fn blocks_from(&self, from: Position) -> Vec<BlockId> {
        blocks_of(&self.runs_of(self.within(&(from..Position::MAX)))).collect()
    }

    /// Goes on with the residents of `other` from position `from` on, which is `to` here. Their blocks are shared.
    pub fn share_from(&mut self, other: &Self, from: Position, to: Position, pool: &mut Pool) {
        let range = other.within(&(from..Position::MAX));
        let runs = other.runs_of(range.clone());
        let known = usize::from(self.runs.last().zip(runs.first()).is_some_and(|(last, run)| run.goes_on(last)));
        blocks_of(&runs).skip(known).for_each(|block| pool.retain(block));
        self.runs.extend(runs);
        self.positions.extend(other.positions().of(range.clone()).map(|p| p - from + to));
        self.scores.extend(range.map(|i| other.scores.at(i)));
        self.fresh = 0;
    }
}
