//! The residents of one memory of one row: runs of slots in text order, with a position and a score for each.

use crate::ids::{BLOCK, BlockId, Position, Run};
use crate::plan::Move;
use crate::store::pool::Pool;
use std::ops::Range;

/// How many runs beyond the densest packing a table may keep before it is worth moving tokens.
const LOOSE_RUNS: usize = 2;

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
        Self {
            pool,
            retired: Vec::new(),
            moves: Vec::new(),
        }
    }

    /// Releases what was retired and hands over the moves.
    pub fn finish(self) -> Vec<Move> {
        for block in self.retired {
            self.pool.release(block);
        }
        self.moves
    }

    fn push_move(&mut self, from: BlockId, from_slot: u32, to: BlockId, to_slot: u32) {
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
        self.moves.push(Move {
            from,
            from_slot,
            to,
            to_slot,
            len: 1,
        });
    }
}

#[derive(Clone, Debug, Default)]
pub struct Table {
    runs: Vec<Run>,
    positions: Vec<Position>,
    scores: Vec<f32>,
    fresh: usize,
}

impl Table {
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub fn positions(&self) -> &[Position] {
        &self.positions
    }

    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    pub fn scores_mut(&mut self) -> &mut [f32] {
        &mut self.scores
    }

    /// Trailing residents of the latest step whose score is not known yet.
    pub fn pending_tail(&self) -> usize {
        self.scores
            .iter()
            .rev()
            .take(self.fresh)
            .take_while(|s| s.is_nan())
            .count()
    }

    /// The blocks that this table holds a reference to. Runs of one block are neighbours, so each block comes once.
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
        Mark {
            num_runs: self.runs.len(),
            tail: self.runs.last().copied(),
            len: self.len(),
            fresh: self.fresh,
        }
    }

    /// Forgets what was appended since `mark`, and returns the blocks that were allocated for it.
    pub fn undo(&mut self, mark: &Mark) -> Vec<BlockId> {
        let tail_block = mark.tail.map(|t| t.block);
        let changed = &self.runs[mark.num_runs.saturating_sub(1)..];
        let allocated = changed
            .iter()
            .map(|r| r.block)
            .filter(|&b| Some(b) != tail_block)
            .collect();
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
        self.scores.resize(self.len(), f32::NAN);
        self.fresh = self.len() - before;
        self.grow(self.fresh, edit)
    }

    /// Appends tokens that are known already, from outside any table.
    pub fn load(&mut self, positions: &[Position], scores: &[f32], edit: &mut Edit<'_>) {
        self.positions.extend_from_slice(positions);
        self.scores.extend_from_slice(scores);
        self.fresh = 0;
        self.grow(positions.len(), edit);
    }

    /// Takes over tokens that another memory let go, and keeps text order even when they are older than some residents.
    pub fn receive(&mut self, tokens: &[Held], edit: &mut Edit<'_>) {
        let Some(first) = tokens.first() else { return };
        let at = self.positions.partition_point(|&p| p < first.position);
        let places = if at == self.len() {
            let places = self.grow(tokens.len(), edit);
            self.write(tokens, &places, edit);
            return;
        } else {
            self.detach_from(at, edit)
        };
        let merged = merge(&places, tokens);
        let fresh_runs = self.grow_blocks(merged.len(), edit);
        self.write(&merged, &fresh_runs, edit);
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

    /// Keeps the residents `keep` (ascending). Moves tokens only if leaving them in place would leave many short runs.
    pub fn keep(&mut self, keep: &[usize], edit: &mut Edit<'_>) {
        let trimmed = self.trimmed(keep);
        if trimmed.len() <= keep.len().div_ceil(BLOCK as usize) + LOOSE_RUNS {
            self.shrink_to(trimmed, edit);
        } else {
            self.repack(keep, edit);
        }
        let fresh_from = self.len() - self.fresh;
        self.fresh = keep.len() - keep.partition_point(|&i| i < fresh_from);
        self.positions = keep.iter().map(|&i| self.positions[i]).collect();
        self.scores = keep.iter().map(|&i| self.scores[i]).collect();
    }

    /// Residents `picked` (ascending) and where they sit.
    pub fn held(&self, picked: impl Iterator<Item = usize>) -> Vec<Held> {
        let mut out = Vec::with_capacity(picked.size_hint().0);
        let mut runs = self.runs.iter();
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
            out.push(Held {
                position: self.positions[i],
                score: self.scores[i],
                block: r.block,
                slot,
            });
        }
        out
    }

    /// Makes room for `n` more tokens at the end: first in the tail block, then in new ones.
    fn grow(&mut self, n: usize, edit: &mut Edit<'_>) -> Vec<Run> {
        let mut out = Vec::new();
        if n == 0 || self.runs.last().is_none_or(|tail| tail.hi == BLOCK) {
            out.extend(self.grow_blocks(n, edit));
            return out;
        }
        self.own_tail(edit);
        let mut taken = 0;
        if let Some(tail) = self.runs.last_mut() {
            taken = (BLOCK - tail.hi).min(u32::try_from(n).unwrap_or(BLOCK));
            out.push(Run {
                block: tail.block,
                lo: tail.hi,
                hi: tail.hi + taken,
            });
            tail.hi += taken;
        }
        out.extend(self.grow_blocks(n - taken as usize, edit));
        out
    }

    fn grow_blocks(&mut self, n: usize, edit: &mut Edit<'_>) -> Vec<Run> {
        let first = self.runs.len();
        for start in (0..n).step_by(BLOCK as usize) {
            let hi = (n - start).min(BLOCK as usize) as u32;
            self.runs.push(Run {
                block: edit.pool.alloc(),
                lo: 0,
                hi,
            });
        }
        self.runs[first..].to_vec()
    }

    /// Copies the tail run to a block of its own if others read its block too.
    fn own_tail(&mut self, edit: &mut Edit<'_>) {
        let earlier = self.runs.len().checked_sub(2).map(|i| self.runs[i].block);
        let Some(tail) = self.runs.last_mut() else { return };
        if !edit.pool.is_shared(tail.block) {
            return;
        }
        let to = edit.pool.alloc();
        edit.moves.push(Move {
            from: tail.block,
            from_slot: tail.lo,
            to,
            to_slot: tail.lo,
            len: tail.len(),
        });
        if earlier != Some(tail.block) {
            edit.retired.push(tail.block);
        }
        tail.block = to;
    }

    /// Takes the runs from the one that holds resident `at` out of the table, and returns what they held.
    fn detach_from(&mut self, at: usize, edit: &mut Edit<'_>) -> Vec<Held> {
        let (mut base, mut index) = (0, 0);
        while base + self.runs[index].len() as usize <= at {
            base += self.runs[index].len() as usize;
            index += 1;
        }
        let held = self.held(base..self.len());
        let runs = self.runs[..index].to_vec();
        self.shrink_to(runs, edit);
        self.positions.truncate(base);
        self.scores.truncate(base);
        self.fresh = 0;
        held
    }

    fn write(&mut self, tokens: &[Held], places: &[Run], edit: &mut Edit<'_>) {
        let slots = places
            .iter()
            .flat_map(|run| (run.lo..run.hi).map(|slot| (run.block, slot)));
        for (token, (block, slot)) in tokens.iter().zip(slots) {
            edit.push_move(token.block, token.slot, block, slot);
        }
        self.positions.extend(tokens.iter().map(|t| t.position));
        self.scores.extend(tokens.iter().map(|t| t.score));
        self.fresh = 0;
    }

    /// The slots of residents `keep`, left where they are.
    fn trimmed(&self, keep: &[usize]) -> Vec<Run> {
        let mut out: Vec<Run> = Vec::new();
        for held in self.held(keep.iter().copied()) {
            match out.last_mut() {
                Some(last) if last.block == held.block && last.hi == held.slot => last.hi += 1,
                _ => out.push(Run {
                    block: held.block,
                    lo: held.slot,
                    hi: held.slot + 1,
                }),
            }
        }
        out
    }

    /// Moves residents `keep` together, into whole blocks. Blocks of their own are filled from the front: a token's new place never
    /// lies behind its old one, so moves in text order never overwrite what is still to be read. Shared blocks are left as they are.
    fn repack(&mut self, keep: &[usize], edit: &mut Edit<'_>) {
        let old: Vec<BlockId> = self.blocks().collect();
        let held = self.held(keep.iter().copied());
        let mut runs = Vec::with_capacity(held.len().div_ceil(BLOCK as usize));
        for (chunk, &home) in held.chunks(BLOCK as usize).zip(&old) {
            let in_place = chunk
                .iter()
                .enumerate()
                .all(|(j, t)| t.block == home && t.slot == j as u32);
            let mut to = home;
            if !in_place && edit.pool.is_shared(home) {
                to = edit.pool.alloc();
                edit.retired.push(home);
            }
            for (slot, token) in (0..).zip(chunk) {
                edit.push_move(token.block, token.slot, to, slot);
            }
            runs.push(Run {
                block: to,
                lo: 0,
                hi: chunk.len() as u32,
            });
        }
        edit.retired.extend_from_slice(&old[runs.len()..]);
        self.runs = runs;
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

fn blocks_of(runs: &[Run]) -> impl Iterator<Item = BlockId> + '_ {
    let starts = (0..runs.len()).filter(|&i| i == 0 || runs[i - 1].block != runs[i].block);
    starts.map(|i| runs[i].block)
}

/// Adds the part of `run` (whose first resident is number `base`) that lies in `range`.
fn push_piece(out: &mut Vec<Run>, run: &Run, base: usize, range: &Range<usize>) {
    let end = base + run.len() as usize;
    let (lo, hi) = (range.start.clamp(base, end), range.end.clamp(base, end));
    if lo < hi {
        out.push(Run {
            block: run.block,
            lo: run.lo + (lo - base) as u32,
            hi: run.lo + (hi - base) as u32,
        });
    }
}

fn merge(left: &[Held], right: &[Held]) -> Vec<Held> {
    let mut out = Vec::with_capacity(left.len() + right.len());
    let (mut i, mut j) = (0, 0);
    while i < left.len() || j < right.len() {
        let take_left = j == right.len() || (i < left.len() && left[i].position < right[j].position);
        if take_left {
            out.push(left[i]);
            i += 1;
        } else {
            out.push(right[j]);
            j += 1;
        }
    }
    out
}
