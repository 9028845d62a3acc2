//! The residents of one memory of one row: runs of slots in text order, with a position and a score for each.

use crate::ids::{BLOCK, BlockId, Position, Run};
use crate::plan::Move;
use std::ops::Range;

mod edit;
mod join;
mod known;
mod pack;
mod sieve;
pub use edit::Edit;
pub use known::{Ascending, Positions, Scores};

/// One resident and where it sits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    pub position: Position,
    pub score: f32,
    pub block: BlockId,
    pub slot: u32,
}

/// Enough to undo what was appended since.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    num_runs: usize,
    tail: Option<Run>,
    len: usize,
    fresh: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Table {
    runs: Vec<Run>,
    positions: Positions,
    scores: Scores,
    fresh: usize,
}

impl Table {
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub fn positions(&self) -> Ascending<'_> {
        self.positions.view()
    }

    pub fn scores(&self) -> &Scores {
        &self.scores
    }

    pub fn scores_mut(&mut self) -> &mut Scores {
        &mut self.scores
    }

    /// Trailing residents of the latest step whose score is not known yet.
    pub fn pending_tail(&self) -> usize {
        self.scores.unknown_tail(self.fresh)
    }

    /// How many residents lie in packed blocks: always the first ones.
    pub fn num_packed(&self) -> usize {
        self.runs.iter().take_while(|run| run.block.is_packed()).map(|run| run.len() as usize).sum()
    }

    /// The residents at positions `range`, as a range of their numbers.
    pub fn within(&self, range: &Range<Position>) -> Range<usize> {
        let positions = self.positions();
        positions.below(range.start)..positions.below(range.end)
    }

    /// The blocks that this table holds a reference to, once for each reference. Runs of one block are neighbours and ascend, so each
    /// block comes once, unless streams were joined that share it.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        blocks_of(&self.runs)
    }

    /// The slots of residents `range`, as runs.
    pub fn runs_of(&self, range: Range<usize>) -> Vec<Run> {
        let mut out = Vec::new();
        let mut base = 0;
        for run in &self.runs {
            push_piece(&mut out, run, base, &range);
            base += run.len() as usize;
            if base >= range.end {
                break;
            }
        }
        out
    }

    pub fn mark(&self) -> Mark {
        Mark { num_runs: self.runs.len(), tail: self.runs.last().copied(), len: self.len(), fresh: self.fresh }
    }

    /// Forgets what was appended since `mark`, and returns the blocks that were allocated for it.
    pub fn undo(&mut self, mark: &Mark) -> Vec<BlockId> {
        let tail_block = mark.tail.map(|t| t.block);
        let changed = &self.runs[mark.num_runs.saturating_sub(1)..];
        let allocated = changed.iter().map(|r| r.block).filter(|&b| Some(b) != tail_block).collect();
        self.runs.truncate(mark.num_runs);
        if let (Some(last), Some(tail)) = (self.runs.last_mut(), mark.tail) {
            *last = tail;
        }
        self.positions.truncate(mark.len);
        self.scores.truncate(mark.len);
        self.fresh = mark.fresh;
        allocated
    }

    /// Appends the tokens of one step, their scores pending, and returns the slots to write.
    pub fn append(&mut self, positions: impl Iterator<Item = Position>, edit: &mut Edit<'_>) -> Vec<Run> {
        let before = self.len();
        self.positions.extend(positions);
        self.fresh = self.len() - before;
        self.scores.grow(self.fresh);
        self.grow(self.fresh, edit)
    }

    /// Appends tokens that are known already, from outside any table.
    pub fn load(&mut self, positions: &[Position], scores: &[f32], edit: &mut Edit<'_>) {
        self.positions.extend(positions.iter().copied());
        self.scores.extend(scores.iter().copied());
        self.fresh = 0;
        self.grow(positions.len(), edit);
    }

    /// Drops residents `range` without moving any token.
    pub fn cut(&mut self, range: Range<usize>, edit: &mut Edit<'_>) {
        if range.is_empty() {
            return;
        }
        let n = self.len();
        let mut runs = Vec::with_capacity(self.runs.len() + 1);
        let mut base = 0;
        for run in &self.runs {
            push_piece(&mut runs, run, base, &(0..range.start));
            push_piece(&mut runs, run, base, &(range.end..n));
            base += run.len() as usize;
        }
        self.shrink_to(runs, edit);
        let fresh_from = n - self.fresh;
        self.fresh -= range.end.saturating_sub(range.start.max(fresh_from));
        self.positions.drain(range.clone());
        self.scores.drain(range);
    }

    /// Moves what lies in block `from`, which nobody else holds, to the same slots of block `to`.
    pub fn relocate(&mut self, from: BlockId, to: BlockId, edit: &mut Edit<'_>) {
        for run in self.runs.iter_mut().filter(|run| run.block == from) {
            edit.push_run(*run, to);
            run.block = to;
        }
        edit.retired.push(from);
    }

    /// Moves the first plain run behind packed ones to the beginning of a block of its own, whose memory then ends where the run does.
    ///
    /// Nothing is done where others read the block, or another run lies in it.
    pub fn pull_up(&mut self, edit: &mut Edit<'_>) {
        let packed = self.runs.iter().take_while(|run| run.block.is_packed()).count();
        let next = self.runs.get(packed + 1).map(|run| run.block);
        let Some(run) = self.runs.get_mut(packed).filter(|run| packed > 0 && run.lo > 0) else { return };
        if next == Some(run.block) || edit.pool.is_shared(run.block) {
            return;
        }
        let to = edit.pool.alloc();
        edit.moves.push(Move { from: run.block, from_slot: run.lo, to, to_slot: 0, len: run.len() });
        edit.retired.push(run.block);
        *run = Run { block: to, lo: 0, hi: run.len() };
    }

    /// Residents `picked` (ascending) and where they sit.
    pub fn held(&self, picked: impl Iterator<Item = usize>) -> Vec<Held> {
        let mut out = Vec::with_capacity(picked.size_hint().0);
        let (mut runs, positions) = (self.runs.iter(), self.positions());
        let (mut base, mut run) = (0, runs.next());
        for i in picked {
            while let Some(r) = run
                && i >= base + r.len() as usize
            {
                base += r.len() as usize;
                run = runs.next();
            }
            let Some(r) = run else { break };
            let slot = r.lo + (i - base) as u32;
            out.push(Held { position: positions.at(i), score: self.scores.at(i), block: r.block, slot });
        }
        out
    }

    /// Makes room for `n` more tokens at the end: first in the tail block, then in new ones.
    fn grow(&mut self, n: usize, edit: &mut Edit<'_>) -> Vec<Run> {
        let mut out = Vec::new();
        if n == 0 || self.runs.last().is_none_or(|tail| tail.hi == BLOCK || tail.block.is_packed()) {
            out.extend(self.grow_blocks(n, edit));
            return out;
        }
        self.own_tail(edit);
        let mut taken = 0;
        if let Some(tail) = self.runs.last_mut() {
            taken = (BLOCK - tail.hi).min(u32::try_from(n).unwrap_or(BLOCK));
            out.push(Run { block: tail.block, lo: tail.hi, hi: tail.hi + taken });
            tail.hi += taken;
        }
        out.extend(self.grow_blocks(n - taken as usize, edit));
        out
    }

    fn grow_blocks(&mut self, n: usize, edit: &mut Edit<'_>) -> Vec<Run> {
        let first = self.runs.len();
        for start in (0..n).step_by(BLOCK as usize) {
            let hi = (n - start).min(BLOCK as usize) as u32;
            self.runs.push(Run { block: edit.pool.alloc(), lo: 0, hi });
        }
        self.runs[first..].to_vec()
    }

    /// Copies the tail run to a block of its own if others read its block too.
    fn own_tail(&mut self, edit: &mut Edit<'_>) {
        let before = self.runs.len().checked_sub(2).map(|i| self.runs[i]);
        let Some(tail) = self.runs.last_mut() else { return };
        if !edit.pool.is_shared(tail.block) {
            return;
        }
        let to = edit.pool.alloc();
        edit.moves.push(Move { from: tail.block, from_slot: tail.lo, to, to_slot: tail.lo, len: tail.len() });
        if before.is_none_or(|before| !tail.goes_on(&before)) {
            edit.retired.push(tail.block);
        }
        tail.block = to;
    }

    /// Replaces the runs by `runs`, which lie within them, and retires the blocks that are left empty.
    fn shrink_to(&mut self, runs: Vec<Run>, edit: &mut Edit<'_>) {
        let mut left = blocks_of(&runs).peekable();
        for block in blocks_of(&self.runs) {
            if left.next_if_eq(&block).is_none() {
                edit.retired.push(block);
            }
        }
        drop(left);
        self.runs = runs;
    }
}

/// A block for each reference that a table with these runs holds: one for neighbours that go on in it. A run that goes back to slots
/// which the run before it has too (a document that was joined twice) has a reference of its own, so that the block counts as shared.
fn blocks_of(runs: &[Run]) -> impl Iterator<Item = BlockId> + '_ {
    let starts = (0..runs.len()).filter(|&i| i == 0 || !runs[i].goes_on(&runs[i - 1]));
    starts.map(|i| runs[i].block)
}

/// Adds the part of `run` (whose first resident is number `base`) that lies in `range`.
fn push_piece(out: &mut Vec<Run>, run: &Run, base: usize, range: &Range<usize>) {
    let end = base + run.len() as usize;
    let (lo, hi) = (range.start.clamp(base, end), range.end.clamp(base, end));
    if lo < hi {
        out.push(Run { block: run.block, lo: run.lo + (lo - base) as u32, hi: run.lo + (hi - base) as u32 });
    }
}
