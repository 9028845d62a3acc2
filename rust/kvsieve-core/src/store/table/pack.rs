//! Moving tokens: into a table, and together within one.

use super::{Edit, Held, Table};
use crate::ids::{BLOCK, BlockId, Run};

/// How many runs beyond the densest packing a table may keep before it is worth moving tokens.
const LOOSE_RUNS: usize = 2;

impl Table {
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
        let slots = places.iter().flat_map(|run| (run.lo..run.hi).map(|slot| (run.block, slot)));
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
                _ => out.push(Run { block: held.block, lo: held.slot, hi: held.slot + 1 }),
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
            let in_place = chunk.iter().enumerate().all(|(j, t)| t.block == home && t.slot == j as u32);
            let mut to = home;
            if !in_place && edit.pool.is_shared(home) {
                to = edit.pool.alloc();
                edit.retired.push(home);
            }
            for (slot, token) in (0..).zip(chunk) {
                edit.push_move(token.block, token.slot, to, slot);
            }
            runs.push(Run { block: to, lo: 0, hi: chunk.len() as u32 });
        }
        edit.retired.extend_from_slice(&old[runs.len()..]);
        self.runs = runs;
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
