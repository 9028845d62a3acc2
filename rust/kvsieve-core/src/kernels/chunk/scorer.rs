//! Scores for the search of one unit.

use std::ops::Range;

use super::job::Common;
use super::residents::Residents;
use super::score::Batch;
use super::shape::{Shape, Words, padded_rows};
use crate::ids::BLOCK;
use crate::select::Score;

/// Scores for one unit.
pub(super) struct Scorer<'a> {
    pub common: &'a Common<'a>,
    pub residents: &'a Residents,
    pub head: usize,
    pub queries: &'a [u32],
    pub num_queries: usize,
    /// Keys from here on are not seen by the first sampled query, after as many more as the stride not by the second, and so on.
    pub edge: i64,
    pub turned: &'a mut Words,
    pub spare: &'a mut Words,
    pub keys: &'a mut Vec<*const u8>,
    pub seen_from: &'a mut Vec<u32>,
    pub scores: &'a mut Vec<f32>,
    /// The rows of the sampled queries.
    pub rows: &'a [*const u8],
    pub split: &'a mut Vec<u32>,
    pub split_words: &'a mut Words,
}

impl Score for Scorer<'_> {
    fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>) {
        out.clear();
        let Scorer { common, keys, seen_from, scores, .. } = self;
        keys.clear();
        seen_from.clear();
        // A rule may be anybody's; beyond the residents there is no key to read.
        assert!(stretches.iter().all(|s| s.end <= self.residents.len), "a rule asks for keys outside its region");
        for stretch in stretches {
            self.residents.each(stretch.clone(), self.head, common.bytes, |key, _| keys.push(key));
        }
        if keys.is_empty() {
            return;
        }
        if stretches.iter().any(|s| i64::from(s.end) > self.edge) {
            let stride = common.args.query_stride as i64;
            for i in stretches.iter().flat_map(Clone::clone) {
                let hidden = (i64::from(i) + 1 - self.edge).max(0);
                seen_from.push((hidden as u64).div_ceil(stride as u64) as u32 * common.group as u32);
            }
        }
        scores.resize(keys.len(), 0.0);
        let mut batch = Batch {
            keys,
            seen_from,
            shape: common.shape,
            queries: self.queries,
            num_queries: self.num_queries,
            turned: self.turned,
            spare: self.spare,
            out: &mut scores[..keys.len()],
        };
        // SAFETY: the level is available, and the kernel is the arena's; `Residents` hands out rows of the arena.
        unsafe { (common.kernels.score)(&mut batch) };
        let mut at = 0;
        for stretch in stretches {
            let mut best = f32::NEG_INFINITY;
            for &x in &scores[at..at + stretch.len()] {
                best = if x > best { x } else { best };
            }
            at += stretch.len();
            out.push(best);
        }
    }

    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        let Scorer { common, keys, seen_from, rows, split, split_words, .. } = self;
        let shape = Shape { dim: 2 * common.shape.dim, ..common.shape };
        let row_bytes = 2 * common.bytes.0;
        // Words, so that rows of any dtype are aligned in them.
        let row_words = row_bytes.div_ceil(4);
        split.clear();
        split.resize(rows.len() * row_words, 0);
        for (row, to) in rows.iter().zip(split.chunks_exact_mut(row_words)) {
            // SAFETY: rows of the view's channels, of the dtype that the kernels are for; twice as many fit into the words.
            unsafe { split_row(*row, common.shape.dim, common.bytes.0, to.as_mut_ptr().cast()) };
        }
        let made: Vec<*const u8> = split.chunks_exact(row_words).map(|row| row.as_ptr().cast()).collect();
        let size = padded_rows(rows.len()) * shape.padded();
        let words = &mut split_words.of(size)[..size];
        words[rows.len() * shape.padded()..].fill(0);
        // SAFETY: as in `unit::bring`.
        unsafe { (common.kernels.queries)(&made, &shape, words) };

        keys.clear();
        let bounds = &self.residents.bounds[blocks.start as usize..blocks.end as usize];
        keys.extend(bounds.iter().map(|(row, stride)| row.wrapping_add(self.head * stride)));
        seen_from.clear();
        if !blocks.is_empty() && i64::from((blocks.end - 1) * BLOCK) >= self.edge {
            let stride = common.args.query_stride as i64;
            seen_from.extend(blocks.map(|block| {
                let hidden = (i64::from(block * BLOCK) + 1 - self.edge).max(0);
                (hidden as u64).div_ceil(stride as u64) as u32 * common.group as u32
            }));
        }
        out.resize(keys.len(), 0.0);
        let mut batch = Batch {
            keys,
            seen_from,
            shape,
            queries: words,
            num_queries: self.num_queries,
            turned: self.turned,
            spare: self.spare,
            out,
        };
        // SAFETY: as in `best`; `unit::run_unit` has seen that every block of the region has bounds, two rows of the arena's dtype.
        unsafe { (common.kernels.score)(&mut batch) };
    }
}

/// What is above zero of each channel, then what is below: a product with the greatest and the least numbers is then the greatest one.
///
/// # Safety
/// A row of `dim` elements and `bytes` in all, and room for twice as much.
unsafe fn split_row(row: *const u8, dim: usize, bytes: usize, to: *mut u8) {
    // SAFETY: the caller's promise; a sign is the highest bit of the last byte of an element, whatever its dtype.
    unsafe {
        let size = bytes / dim;
        for c in 0..dim {
            let from = row.add(c * size);
            let at = if *from.add(size - 1) >> 7 == 1 { bytes } else { 0 } + c * size;
            std::ptr::copy_nonoverlapping(from, to.add(at), size);
        }
    }
}
