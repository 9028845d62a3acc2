//! Moving tokens: into a table, and together within one.

use super::{Edit, Held, Positions, Scores, Table};
use crate::ids::{BLOCK, Run};

/// How many runs beyond the densest packing a table may keep before it is worth moving tokens.
const LOOSE_RUNS: usize = 2;

/// How many blocks beyond the densest packing a table may hold where tokens leave from between others.
const LOOSE_BLOCKS: usize = 4;

impl Table {
    /// Takes over tokens that another memory let go, and keeps text order even when they are older than some residents.
    pub fn receive(&mut self, tokens: &[Held], edit: &mut Edit<'_>) {
        let Some(first) = tokens.first() else { return };
        let at = self.positions().below(first.position);
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

    /// Takes over tokens that a later memory gives back. What is fresh stays so.
    pub fn receive_back(&mut self, tokens: &[Held], edit: &mut Edit<'_>) {
        let Some(last) = tokens.last() else { return };
        let fresh = self.fresh;
        self.receive(tokens, edit);
        // Only those behind all that came back are the latest step's alone.
        self.fresh = fresh.min(self.len() - self.positions().below(last.position + 1));
    }

    /// Moves residents together where tokens that left have left many blocks half empty.
    pub fn close_up(&mut self, edit: &mut Edit<'_>) {
        if self.blocks().count() > self.len().div_ceil(BLOCK as usize) + LOOSE_BLOCKS {
            let all: Vec<usize> = (0..self.len()).collect();
            self.keep(&all, edit);
        }
    }

    /// Keeps the residents `keep` (ascending). Moves tokens only if leaving them in place would leave many short runs, and packed ones
    /// only into packed blocks.
    pub fn keep(&mut self, keep: &[usize], edit: &mut Edit<'_>) {
        let (packed, plain) = keep.split_at(keep.partition_point(|&i| i < self.num_packed()));
        let mut kept = Vec::new();
        let mut loose = false;
        for keep in [packed, plain] {
            let trimmed = self.trimmed(keep);
            loose |= trimmed.len() > keep.len().div_ceil(BLOCK as usize) + LOOSE_RUNS;
            kept.extend(trimmed);
        }
        if loose {
            self.repack(packed, plain, edit);
        } else {
            self.shrink_to(kept, edit);
        }
        let fresh_from = self.len() - self.fresh;
        self.fresh = keep.len() - keep.partition_point(|&i| i < fresh_from);
        let positions = self.positions();
        let (positions, scores): (Positions, Scores) =
            keep.iter().map(|&i| (positions.at(i), self.scores.at(i))).unzip();
        (self.positions, self.scores) = (positions, scores);
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

    /// Moves residents together, into whole blocks of their kind. Blocks of their own are filled from the front: a token's new place
    /// never lies behind its old one, so moves in text order never overwrite what is still to be read. Shared blocks are left as
    /// they are.
    fn repack(&mut self, packed: &[usize], plain: &[usize], edit: &mut Edit<'_>) {
        let (packed_blocks, plain_blocks): (Vec<_>, Vec<_>) = self.blocks().partition(|block| block.is_packed());
        let mut runs = Vec::new();
        for (keep, old) in [(packed, packed_blocks), (plain, plain_blocks)] {
            let held = self.held(keep.iter().copied());
            let before = runs.len();
            for (chunk, &home) in held.chunks(BLOCK as usize).zip(&old) {
                let in_place = chunk.iter().enumerate().all(|(j, t)| t.block == home && t.slot == j as u32);
                let mut to = home;
                if !in_place && edit.pool.is_shared(home) {
                    to = edit.pool.alloc_like(home);
                    edit.retired.push(home);
                }
                for (slot, token) in (0..).zip(chunk) {
                    edit.push_move(token.block, token.slot, to, slot);
                }
                runs.push(Run { block: to, lo: 0, hi: chunk.len() as u32 });
            }
            edit.retired.extend_from_slice(&old[runs.len() - before..]);
        }
        self.runs = runs;
    }

    /// Moves the first residents up to number `upto` that are not packed yet into packed blocks. Those are filled in steps of `align`
    /// slots: tokens that share a scale come together. A block that is not full is filled further if nobody reads it but this table and
    /// `copies` of it, whose tokens end where the new ones begin.
    pub fn pack(&mut self, upto: usize, align: u32, copies: u32, edit: &mut Edit<'_>) {
        let from = self.num_packed();
        if upto <= from {
            return;
        }
        let held = self.held(from..upto);
        let (mut runs, rest) = (self.runs_of(0..from), self.runs_of(upto..self.len()));
        let mut slots = held.len() as u32;
        let mut places = Vec::new();
        if let Some(tail) = runs.last_mut()
            && tail.hi.is_multiple_of(align)
            && edit.pool.refs(tail.block) <= 1 + copies
        {
            let taken = slots.min(BLOCK - tail.hi);
            places.extend((tail.hi..tail.hi + taken).map(|slot| (tail.block, slot)));
            tail.hi += taken;
            slots -= taken;
        }
        while slots > 0 {
            let (block, hi) = (edit.pool.alloc_packed(), slots.min(BLOCK));
            places.extend((0..hi).map(|slot| (block, slot)));
            runs.push(Run { block, lo: 0, hi });
            slots -= hi;
        }
        for (token, (block, slot)) in held.iter().zip(places) {
            edit.push_move(token.block, token.slot, block, slot);
        }
        let mut left = super::blocks_of(&rest).peekable();
        for block in self.blocks().filter(|block| !block.is_packed()) {
            if left.next_if_eq(&block).is_none() {
                edit.retired.push(block);
            }
        }
        drop(left);
        runs.extend(rest);
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
