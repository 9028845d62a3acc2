//! Scores of keys and of pages for one query block and key-value head.

use std::ops::Range;

use half::bf16;

use super::batch::{Batch, Kernel};
use super::residents::Residents;
use crate::ids::{BLOCK, BlockId};
use crate::kernels::attend::CodeScorer;
use crate::kernels::rows::{Making, Source, make};
use crate::kernels::simd::Elem;
use crate::select::Score;
use crate::storage::packed::Channels;

/// Keys that are made at a time: their rows stay in the first-level cache, or near it.
const MADE: usize = 64;

/// Codes of fewer keys that lie side by side are made into rows: their columns would be read for the others, too.
const FEW: u32 = 8;

/// Memory that a thread keeps from selection to selection.
#[derive(Default)]
pub(super) struct Scratch {
    pub queries: Vec<f32>,
    pub dots: Vec<bf16>,
    pub keys: Vec<*const u8>,
    pub seen_from: Vec<u32>,
    pub scores: Vec<f32>,
    pub sources: Vec<Source>,
    /// Keys that were made, `[MADE][width]`; which of the keys they are, the first query that sees each, and their scores.
    pub rows: Vec<f32>,
    pub places: Vec<u32>,
    pub made_from: Vec<u32>,
    pub made_scores: Vec<f32>,
    /// Queries of the channels that coded keys keep, scores of a block, and what the kernel needs.
    pub thin: Vec<f32>,
    pub tile: Vec<f32>,
    pub spare: Vec<f32>,
    /// Queries at the distance of the window, for the page bounds of raw keys; empty where `queries` are that.
    pub by_content: Vec<f32>,
    /// Queries for page bounds, as `queries` and `dots`: what is above zero of each channel, then what is below.
    pub split: Vec<f32>,
    pub split_dots: Vec<bf16>,
}

/// Scores for one query block and key-value head.
pub(super) struct Scorer<'a> {
    pub residents: &'a Residents<'a>,
    /// How keys are made, where they do not lie as they are scored.
    pub making: Option<&'a Making<'a>>,
    /// Scores codes where they lie, if they are scored as they do.
    pub codes: Option<&'a CodeScorer>,
    /// Of which channels the thin queries are.
    pub thin_of: Option<*const Channels>,
    pub head: usize,
    pub row_bytes: usize,
    pub dim: usize,
    pub width: usize,
    pub num_queries: usize,
    pub group: usize,
    /// Keys from here on are not seen by the first query, after as many more as the stride not by the second, and so on.
    pub edge: i64,
    pub stride: usize,
    pub kernel: Kernel,
    /// The kernel for page bounds, which are twice as wide.
    pub bounds_kernel: Kernel,
    /// Whether the queries, as they came, are `bf16`, and meet bounds of that.
    pub bounds_dots: bool,
    pub scratch: &'a mut Scratch,
}

impl Scorer<'_> {
    /// Scores `self.scratch.keys`, a multiple of four of them, for the queries that see each.
    fn run(&mut self, made: bool) {
        let Scratch { queries, dots, keys, seen_from, made_from, scores, made_scores, .. } = &mut *self.scratch;
        let (seen_from, out) = if made { (made_from, made_scores) } else { (seen_from, scores) };
        let (dim, width, num_queries) = (self.dim, self.width, self.num_queries);
        let out = &mut out[..keys.len()];
        let mut batch = Batch { keys, seen_from, dim, queries, dots, width, num_queries, out };
        // SAFETY: `select` has checked the level, the runs and the region, so all keys are rows of the arena's dtype and width, or were
        // made as such of `f32`; the kernel was chosen for those.
        unsafe { (self.kernel)(&mut batch) };
    }

    /// Scores all ranges, key by key, into the scratch memory.
    fn score(&mut self, ranges: &[Range<u32>]) {
        let Scratch { keys, seen_from, scores, .. } = &mut *self.scratch;
        keys.clear();
        seen_from.clear();
        // A rule may be anybody's; beyond the residents there is no key to read.
        assert!(ranges.iter().all(|range| range.end <= self.residents.len), "a rule asks for keys outside its region");
        let count: usize = ranges.iter().map(ExactSizeIterator::len).sum();
        let whole = count.next_multiple_of(4);
        scores.resize(whole, 0.0);
        if count == 0 {
            return;
        }
        if ranges.iter().any(|s| i64::from(s.end) > self.edge) {
            for i in ranges.iter().flat_map(Clone::clone) {
                let hidden = (i64::from(i) + 1 - self.edge).max(0) as usize;
                seen_from.push((hidden.div_ceil(self.stride) * self.group) as u32);
            }
            seen_from.resize(whole, seen_from[count - 1]);
        }
        if let Some(making) = self.making {
            return self.score_made(making, ranges);
        }
        keys.reserve(whole);
        for range in ranges {
            let mut i = range.start;
            while i < range.end {
                let (key, n) = self.residents.key(i, self.head, self.row_bytes);
                let n = n.min(range.end - i);
                for j in 0..n as usize {
                    keys.push(key.wrapping_add(j * self.row_bytes));
                }
                i += n;
            }
        }
        keys.resize(whole, keys[count - 1]);
        self.run(false);
    }

    /// Scores keys that do not lie as they are scored. Codes that lie side by side are scored there, all others are made into rows.
    fn score_made(&mut self, making: &Making<'_>, ranges: &[Range<u32>]) {
        self.scratch.sources.clear();
        self.scratch.places.clear();
        let mut at = 0;
        for together in ranges.chunk_by(|a, b| a.end == b.start) {
            let (Some(first), Some(last)) = (together.first(), together.last()) else { continue };
            let mut i = first.start;
            while i < last.end {
                let (run, slot, n) = self.residents.place(i);
                let n = n.min(last.end - i);
                match self.codes.filter(|_| n >= FEW && run.block.is_packed()) {
                    Some(codes) => self.score_codes(making, codes, (run.block, slot..slot + n), at),
                    None => {
                        let Scratch { sources, places, .. } = &mut *self.scratch;
                        self.residents.sources(i..i + n, self.head, self.row_bytes, sources);
                        places.extend(at as u32..at as u32 + n);
                    }
                }
                i += n;
                at += n as usize;
            }
        }
        let Some(&last) = self.scratch.sources.last() else { return };
        let whole = self.scratch.sources.len().next_multiple_of(4);
        self.scratch.sources.resize(whole, last);
        self.scratch.rows.resize(MADE * self.width, 0.0);
        self.scratch.made_scores.resize(MADE, 0.0);
        for at in (0..whole).step_by(MADE) {
            let Scratch { keys, sources, rows, places, seen_from, made_from, .. } = &mut *self.scratch;
            let mine = &sources[at..whole.min(at + MADE)];
            let ahead = &sources[whole.min(at + MADE)..whole.min(at + 2 * MADE)];
            // SAFETY: `select` has checked the runs, so all sources are keys of this head.
            unsafe { make(making, mine, ahead, self.width, rows) };
            keys.clear();
            keys.extend(rows.chunks_exact(self.width).take(mine.len()).map(|row| row.as_ptr().cast::<u8>()));
            let here = &places[at..places.len().min(at + MADE)];
            made_from.clear();
            if !seen_from.is_empty() {
                made_from.extend(here.iter().map(|&place| seen_from[place as usize]));
                made_from.resize(mine.len(), made_from[here.len() - 1]);
            }
            self.run(true);
            let Scratch { places, scores, made_scores, .. } = &mut *self.scratch;
            let here = &places[at..places.len().min(at + MADE)];
            here.iter().zip(&*made_scores).for_each(|(&place, &x)| scores[place as usize] = x);
        }
    }

    /// Scores codes of some slots of a block, which are the keys from number `at` on.
    fn score_codes(
        &mut self,
        making: &Making<'_>,
        codes: &CodeScorer,
        (block, slots): (BlockId, Range<u32>),
        at: usize,
    ) {
        let Some(packed) = making.arena.packed() else { return };
        let rows = packed.rows(block, self.head, 0);
        let Scratch { queries, thin, tile, spare, seen_from, scores, .. } = &mut *self.scratch;
        if self.thin_of != Some(std::ptr::from_ref(rows.channels)) {
            self.thin_of = Some(rows.channels);
            thin.clear();
            thin.resize(self.num_queries * codes.width(), 0.0);
            for (query, to) in queries.chunks_exact(self.width).zip(thin.chunks_exact_mut(codes.width())) {
                for (x, &c) in to.iter_mut().zip(rows.channels.of(self.head)) {
                    *x = query[usize::from(c)];
                }
            }
        }
        let n = slots.len();
        // SAFETY: `select` has checked the level and the runs, so the slots lie in a packed block of the layer.
        unsafe { codes.score(&rows, slots, thin, spare, tile) };
        for i in 0..n {
            let from = seen_from.get(at + i).map_or(0, |&from| from as usize);
            let mut best = f32::NEG_INFINITY;
            for scores in tile.chunks_exact(BLOCK as usize).skip(from) {
                best = if scores[i] > best { scores[i] } else { best };
            }
            scores[at + i] = best;
        }
    }
}

impl Score for Scorer<'_> {
    fn best(&mut self, ranges: &[Range<u32>], out: &mut Vec<f32>) {
        out.clear();
        self.score(ranges);
        out.reserve(ranges.len());
        let mut at = 0;
        for range in ranges {
            let mut best = f32::NEG_INFINITY;
            for &x in &self.scratch.scores[at..at + range.len()] {
                best = if x > best { x } else { best };
            }
            at += range.len();
            out.push(best);
        }
    }

    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        let (count, dim) = (blocks.len(), 2 * self.dim);
        if count == 0 {
            return;
        }
        let width = dim.next_multiple_of(32);
        let Scratch { queries, keys, seen_from, by_content, split, split_dots, .. } = &mut *self.scratch;
        let queries = if by_content.is_empty() { queries } else { by_content };
        split.clear();
        split.resize(self.num_queries * width, 0.0);
        for (query, to) in queries.chunks_exact(self.width).zip(split.chunks_exact_mut(width)) {
            let (above, below) = to[..dim].split_at_mut(self.dim);
            for ((&x, above), below) in query.iter().zip(above).zip(below) {
                *(if x.is_sign_negative() { below } else { above }) = x;
            }
        }
        split_dots.clear();
        if self.bounds_dots {
            split_dots.extend(split.iter().map(|&x| bf16::of_f32(x)));
        }
        let whole = count.next_multiple_of(4);
        let bounds = &self.residents.bounds[blocks.start as usize..blocks.end as usize];
        keys.clear();
        keys.extend(bounds.iter().map(|(row, stride)| row.wrapping_add(self.head * stride)));
        keys.resize(whole, keys[count - 1]);
        seen_from.clear();
        if i64::from((blocks.end - 1) * BLOCK) >= self.edge {
            seen_from.extend(blocks.map(|block| {
                let hidden = (i64::from(block * BLOCK) + 1 - self.edge).max(0) as usize;
                (hidden.div_ceil(self.stride) * self.group) as u32
            }));
            seen_from.resize(whole, seen_from[count - 1]);
        }
        out.resize(whole, 0.0);
        let num_queries = self.num_queries;
        let mut batch = Batch { keys, seen_from, dim, queries: split, dots: split_dots, width, num_queries, out };
        // SAFETY: as in `run`; `select` has seen that every block of the region has bounds, two rows of the arena's dtype.
        unsafe { (self.bounds_kernel)(&mut batch) };
        out.truncate(count);
    }
}
