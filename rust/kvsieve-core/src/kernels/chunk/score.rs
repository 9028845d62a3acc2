//! Scores of keys for many queries at once.

use super::product::{product, turn_keys};
use super::shape::{ROWS, STRIP, Shape, Words};
use crate::kernels::simd::{Elem, Simd};

/// Keys to score, for [`score`].
pub(super) struct Batch<'a> {
    /// Addresses of the keys.
    pub keys: &'a [*const u8],
    /// For each key the first query that may see it; empty when all may.
    pub seen_from: &'a [u32],
    pub shape: Shape,
    /// `[padded_rows(num_queries)][padded]`, by [`super::product::queries`].
    pub queries: &'a [u32],
    pub num_queries: usize,
    pub turned: &'a mut Words,
    pub spare: &'a mut Words,
    /// For each key its greatest product with a query that may see it.
    pub out: &'a mut [f32],
}

/// Scores a batch.
///
/// # Safety
/// As for [`Simd`]; all keys are rows of the shape's channels.
#[inline(always)]
pub(super) unsafe fn score<S: Simd, E: Elem, const DOTS: bool>(batch: &mut Batch<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::HEADS >= 4 {
            score_by::<S, E, DOTS, 4>(batch);
        } else {
            score_by::<S, E, DOTS, 2>(batch);
        }
    }
}

#[inline(always)]
unsafe fn score_by<S: Simd, E: Elem, const DOTS: bool, const N: usize>(batch: &mut Batch<'_>) {
    let Batch { keys, seen_from, shape, queries, num_queries, turned, spare, out } = batch;
    let (words, padded) = (shape.words(), shape.padded());
    let turned = turned.of(padded * STRIP).as_mut_ptr();
    let lines = (shape.dim * size_of::<E>()).div_ceil(64);
    let width = N * S::LANES;
    for (i, (mine, out)) in keys.chunks(STRIP).zip(out.chunks_mut(STRIP)).enumerate() {
        for key in keys.iter().skip((i + 1) * STRIP).take(STRIP) {
            for line in 0..lines {
                // SAFETY: any address may be asked for.
                unsafe { S::prefetch(key.wrapping_add(line * 64)) };
            }
        }
        // SAFETY: `mine` are at most a strip of keys.
        unsafe { turn_keys::<S, E, DOTS>(mine, shape, (turned, STRIP), spare) };
        let from = if seen_from.is_empty() { &[][..] } else { &seen_from[i * STRIP..][..mine.len()] };
        let ragged = from.iter().any(|&f| f > 0);
        let mut found = [f32::NEG_INFINITY; STRIP];
        for column in (0..mine.len()).step_by(width) {
            // SAFETY: a strip is a multiple of every width; queries are filled up to whole rows of blocks.
            unsafe {
                let mut best = [S::splat(f32::NEG_INFINITY); N];
                for row in (0..*num_queries).step_by(ROWS) {
                    let a = (queries.as_ptr().add(row * padded), padded);
                    let b = (turned.add(column).cast_const(), STRIP);
                    let acc = product::<S, DOTS, N>(a, b, words, [[S::splat(0.0); N]; ROWS]);
                    let real = ROWS.min(*num_queries - row);
                    if ragged {
                        let mut scores = [[0f32; 64]; ROWS];
                        for (scores, acc) in scores.iter_mut().zip(acc) {
                            for (n, acc) in acc.into_iter().enumerate() {
                                S::store(scores.as_mut_ptr().add(n * S::LANES), acc);
                            }
                        }
                        for (r, scores) in scores.iter().enumerate().take(real) {
                            for (j, &x) in scores.iter().enumerate().take(width.min(mine.len() - column)) {
                                let at = column + j;
                                if (row + r) as u32 >= from[at] && x > found[at] {
                                    found[at] = x;
                                }
                            }
                        }
                    } else {
                        // Rows that fill up a block would score 0.
                        for (r, acc) in acc.iter().enumerate() {
                            if r < real {
                                for n in 0..N {
                                    // In this order NaN is less than everything.
                                    best[n] = S::max(acc[n], best[n]);
                                }
                            }
                        }
                    }
                }
                if !ragged {
                    for (n, best) in best.into_iter().enumerate() {
                        S::store(found.as_mut_ptr().add(column + n * S::LANES), best);
                    }
                }
            }
        }
        out.copy_from_slice(&found[..out.len()]);
    }
}
