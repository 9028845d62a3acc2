//! Slots that hold another token for each head.

use super::{Edit, Table, blocks_of, push_piece};
use crate::ids::{Position, Run};

impl Table {
    /// Drops all but the slots of the first `count` residents and the last `recent` residents, and returns where the residents
    /// before the recent ones lay and where the first `count` of them, chosen anew for each head, are to be written.
    ///
    /// What lies there afterwards differs from head to head, so the positions become placeholders, the numbers of the slots: they
    /// increase, and stay below those of the recent tokens. Blocks that others read too are replaced by new ones.
    pub fn sieve(&mut self, count: usize, recent: usize, edit: &mut Edit<'_>) -> (Vec<Run>, Vec<Run>) {
        let end = self.len() - recent;
        let from = self.runs_of(0..end);
        self.cut(count..end, edit);
        self.own_first(count, edit);
        (0..).zip(&mut self.positions.list()[..count]).for_each(|(slot, p): (Position, _)| *p = slot);
        self.scores.forget(0..count);
        (from, self.runs_of(0..count))
    }

    /// Gives the first `count` residents blocks of their own, without a copy: all of them are about to be written.
    fn own_first(&mut self, count: usize, edit: &mut Edit<'_>) {
        let n = self.len();
        let mut runs = Vec::with_capacity(self.runs.len() + 1);
        let mut own = Vec::new();
        let (mut base, mut last) = (0, None);
        for run in &self.runs {
            let before = runs.len();
            push_piece(&mut runs, run, base, &(0..count));
            if runs.len() > before && edit.pool.is_shared(run.block) {
                if last.is_none_or(|last| !run.goes_on(&last)) {
                    own.push(edit.pool.alloc_like(run.block));
                }
                runs[before].block = own[own.len() - 1];
                last = Some(*run);
            }
            push_piece(&mut runs, run, base, &(count..n));
            base += run.len() as usize;
        }
        // The block with the last of them may hold recent tokens too, which are read where they are.
        let mut left = blocks_of(&runs).filter(|block| !own.contains(block)).peekable();
        edit.retired.extend(blocks_of(&self.runs).filter(|block| left.next_if_eq(block).is_none()));
        drop(left);
        self.runs = runs;
    }
}
