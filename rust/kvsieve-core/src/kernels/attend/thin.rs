//! Scores of packed keys that lie as numbers, fewer of them than a head has channels (`crate::storage::packed`).
//!
//! A lane is a token: the numbers of a channel, or the pairs of two channels in `bf16`, lie side by side for all tokens of a block. So
//! nothing is summed over lanes, and any number of channels and pairs takes whole vectors.

use half::bf16;

use super::ahead::Ahead;
use super::inner::put;
use crate::ids::BLOCK;
use crate::kernels::simd::{Elem, Simd};

/// Tokens of a block that is full, and slots of a rotation.
pub(super) const SLOTS: usize = BLOCK as usize;

/// Keys of a block, and which of them are meant.
#[derive(Clone, Copy)]
pub(super) struct Columns<E> {
    /// Of the block.
    pub keys: *const E,
    pub kept: usize,
    /// Tokens of the block that have memory: the numbers of a channel.
    pub slots: usize,
    pub slot: usize,
    pub len: usize,
}

impl<E: Elem> Columns<E> {
    /// The numbers of a channel: `N` where that is known when the kernel is compiled, which full blocks are worth.
    #[inline(always)]
    fn stride<const N: usize>(&self) -> usize {
        if N > 0 { N } else { self.slots }
    }

    /// Channel `c` of the keys in slots `at..at + LANES`.
    ///
    /// # Safety
    /// As for [`Simd`]; the channel is kept; the slots lie in the block.
    #[inline(always)]
    unsafe fn channel<S: Simd, const N: usize>(&self, c: usize, at: usize) -> S::V {
        // SAFETY: the column lies in the block.
        unsafe {
            if E::IS_BF16 && c / 2 < self.kept / 2 {
                let (low, high) = S::pair_bf16(S::words(self.keys.add(c / 2 * 2 * self.stride::<N>() + 2 * at).cast()));
                if c.is_multiple_of(2) { low } else { high }
            } else {
                E::load::<S>(self.keys.add(c * self.stride::<N>() + at))
            }
        }
    }
}

/// How often scoring asks for memory, for each number of heads that it takes at a time.
pub(super) fn asks<S: Simd, E: Elem>(kept: usize, len: usize) -> usize {
    len.div_ceil(2 * S::LANES) * if E::IS_BF16 { kept.div_ceil(2) } else { kept }
}

/// Scores keys against `HB` queries: `scores[h * TILE + i]`. Where the queries are there in `bf16` too, by products of that.
///
/// # Safety
/// As for [`Simd`]; the block is readable, and has memory for `N` tokens, or for some if that is 0; `HB` queries of `width` elements;
/// `dots` only if there are such products.
#[inline(always)]
pub(super) unsafe fn score_columns<S: Simd, E: Elem, const HB: usize, const N: usize>(
    columns: &Columns<E>,
    (queries, width): (*const f32, usize),
    dots: Option<*const bf16>,
    scores: *mut f32,
    ahead: &mut Ahead,
) {
    let Columns { keys, kept, slot, len, .. } = *columns;
    let slots = columns.stride::<N>();
    let (lo, hi) = (slot, slot + len);
    let mut at = lo / (2 * S::LANES) * (2 * S::LANES);
    // SAFETY: columns have a number for each of `slots`, a multiple of twice the lanes, and vectors begin at multiples of that.
    unsafe {
        while at < hi {
            let mut acc = [[S::splat(0.0); 2]; HB];
            let mut c = 0;
            while E::IS_BF16 && c + 1 < kept {
                let p = keys.add(c * slots + 2 * at).cast();
                let w = [S::words(p), S::words(p.add(S::LANES))];
                if S::DOTS
                    && let Some(dots) = dots
                {
                    for (h, acc) in acc.iter_mut().enumerate() {
                        let q = dots.add(h * width + c);
                        acc[0] = S::dot_pair(acc[0], w[0], q);
                        acc[1] = S::dot_pair(acc[1], w[1], q);
                    }
                } else {
                    let x = [S::pair_bf16(w[0]), S::pair_bf16(w[1])];
                    for (h, acc) in acc.iter_mut().enumerate() {
                        let q = queries.add(h * width + c);
                        let (low, high) = (S::splat(*q), S::splat(*q.add(1)));
                        acc[0] = S::fma(x[0].1, high, S::fma(x[0].0, low, acc[0]));
                        acc[1] = S::fma(x[1].1, high, S::fma(x[1].0, low, acc[1]));
                    }
                }
                ahead.ask::<S>();
                c += 2;
            }
            while c < kept {
                let p = keys.add(c * slots + at);
                let x = [E::load::<S>(p), E::load::<S>(p.add(S::LANES))];
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = S::splat(*queries.add(h * width + c));
                    acc[0] = S::fma(x[0], q, acc[0]);
                    acc[1] = S::fma(x[1], q, acc[1]);
                }
                ahead.ask::<S>();
                c += 1;
            }
            put::<S, HB>(acc, [0.0; HB], (at, lo, hi), slot, scores);
            at += 2 * S::LANES;
        }
    }
}

/// [`score_columns`] for raw keys: `trig` holds for each of the `pairs` the cosines of all slots, then the sines.
///
/// # Safety
/// As for [`score_columns`]; channel `i` pairs with `i + pairs`.
#[inline(always)]
pub(super) unsafe fn score_columns_turned<S: Simd, E: Elem, const HB: usize, const N: usize>(
    columns: &Columns<E>,
    (trig, pairs): (*const f32, usize),
    (queries, width): (*const f32, usize),
    scores: *mut f32,
    ahead: &mut Ahead,
) {
    let Columns { kept, slot, len, .. } = *columns;
    let (lo, hi) = (slot, slot + len);
    let mut at = lo / (2 * S::LANES) * (2 * S::LANES);
    // SAFETY: as for `score_columns`; there is a rotation for each pair and slot.
    unsafe {
        while at < hi {
            let mut acc = [[S::splat(0.0); 2]; HB];
            for i in 0..pairs {
                let q = queries.add(i);
                for half in 0..2 {
                    let at = at + half * S::LANES;
                    let (a, b) = (columns.channel::<S, N>(i, at), columns.channel::<S, N>(i + pairs, at));
                    let t = trig.add(i * 2 * SLOTS + at);
                    let (cos, sin) = (S::load(t), S::load(t.add(SLOTS)));
                    let first = S::sub(S::mul(a, cos), S::mul(b, sin));
                    let second = S::fma(b, cos, S::mul(a, sin));
                    for (h, acc) in acc.iter_mut().enumerate() {
                        let q = q.add(h * width);
                        acc[half] = S::fma(first, S::splat(*q), acc[half]);
                        acc[half] = S::fma(second, S::splat(*q.add(pairs)), acc[half]);
                    }
                }
                ahead.ask::<S>();
            }
            for c in 2 * pairs..kept {
                for half in 0..2 {
                    let x = columns.channel::<S, N>(c, at + half * S::LANES);
                    for (h, acc) in acc.iter_mut().enumerate() {
                        acc[half] = S::fma(x, S::splat(*queries.add(h * width + c)), acc[half]);
                    }
                }
                ahead.ask::<S>();
            }
            put::<S, HB>(acc, [0.0; HB], (at, lo, hi), slot, scores);
            at += 2 * S::LANES;
        }
    }
}
