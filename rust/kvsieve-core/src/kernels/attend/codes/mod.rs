//! Attention over keys and values that lie as codes (`crate::storage::packed`).
//!
//! A number is `least + step * code`, so
//!
//! * a score is `sum_c (q_c step_c) code_c + sum_c q_c least_c`: queries take over the steps once for each group of tokens, and what
//!   does not depend on the token is added at the end;
//! * a sum of values is `sum_t (w_t step_t) code_t + sum_t w_t least_t` within a group of channels, likewise.
//!
//! What is left is a product with small integers. Where tokens came as `bf16` and the machine multiplies that, folded queries and weights
//! are rounded to it, and codes become `bf16` by being put into the fraction of 128; a code of eight bits counts as two digits of four.
//! The 128 and the middle of the digits are taken away from the sum of the rounded factors, so that what is rounded multiplies small
//! numbers only. Everywhere else all is `f32`.

mod digits;
mod keys;
mod values;

use std::ops::Range;

use super::ahead::Ahead;
use super::tile::TILE;
use crate::kernels::isa::Level;
use crate::kernels::simd::{self, Simd};
use crate::storage::packed::{Packed, Rows};

pub(super) use keys::Keys;
use keys::{score_codes, score_codes_turned};
use values::weigh_codes;
pub(super) use values::{Values, code_passes};

type Score = unsafe fn(&Keys, (*const f32, usize), *mut f32, *mut f32, &mut Ahead);
type ScoreTurned = unsafe fn(&Keys, u32, (*const f32, usize), (*const f32, usize), *mut f32, *mut f32, &mut Ahead);
type Weigh = unsafe fn(&Values, *const f32, *mut f32, (*mut f32, usize), &mut Ahead);

/// The functions of this file for an instruction set: compiled once, and not once more for each dtype of tokens.
///
/// Indices: bits of a code, as [`of_bits`] has them, then heads less one.
pub(super) trait Codes: Simd {
    const SCORE: [[Score; 4]; 3];
    const SCORE_TURNED: [ScoreTurned; 4];
    const WEIGH: [[Weigh; 4]; 3];
}

/// The index of 2, 4 or 8 bits.
#[inline(always)]
pub(super) fn of_bits(bits: u32) -> usize {
    bits as usize / 4
}

/// Compiles the functions for an instruction set and for these numbers of heads.
macro_rules! compile {
    ($name:ident, $simd:ty, [$($heads:literal),*] $(, $features:literal)?) => {
        mod $name {
            use super::*;

            $(#[target_feature(enable = $features)])?
            unsafe fn score<const BITS: u32, const HB: usize>(
                keys: &Keys,
                queries: (*const f32, usize),
                scratch: *mut f32,
                scores: *mut f32,
                ahead: &mut Ahead,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { score_codes::<$simd, BITS, HB>(keys, queries, scratch, scores, ahead) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn score_turned<const HB: usize>(
                keys: &Keys,
                bits: u32,
                trig: (*const f32, usize),
                queries: (*const f32, usize),
                scratch: *mut f32,
                scores: *mut f32,
                ahead: &mut Ahead,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { score_codes_turned::<$simd, HB>(keys, bits, trig, queries, scratch, scores, ahead) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn weigh<const BITS: u32, const HB: usize>(
                values: &Values,
                weights: *const f32,
                scratch: *mut f32,
                sums: (*mut f32, usize),
                ahead: &mut Ahead,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { weigh_codes::<$simd, BITS, HB>(values, weights, scratch, sums, ahead) }
            }

            impl Codes for $simd {
                const SCORE: [[Score; 4]; 3] =
                    [[$(score::<2, $heads>),*], [$(score::<4, $heads>),*], [$(score::<8, $heads>),*]];
                const SCORE_TURNED: [ScoreTurned; 4] = [$(score_turned::<$heads>),*];
                const WEIGH: [[Weigh; 4]; 3] =
                    [[$(weigh::<2, $heads>),*], [$(weigh::<4, $heads>),*], [$(weigh::<8, $heads>),*]];
            }
        }
    };
}

// No more heads at a time than `Simd::HEADS`.
compile!(portable, simd::Portable, [1, 2, 2, 2]);
#[cfg(target_arch = "x86_64")]
compile!(avx2, simd::Avx2, [1, 2, 2, 2], "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
compile!(avx512, simd::Avx512<false>, [1, 2, 3, 4], "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
compile!(avx512_bf16, simd::Avx512<true>, [1, 2, 3, 4], "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");
#[cfg(target_arch = "aarch64")]
compile!(neon, simd::Neon, [1, 2, 3, 4], "neon");

/// Scores of keys that lie as codes, for a search: as the decode kernel makes them, but always in `f32`.
pub(in crate::kernels) struct CodeScorer {
    by_heads: [Score; 4],
    /// Queries at a time.
    heads: usize,
    bytes: usize,
    kept: usize,
    group: usize,
}

impl CodeScorer {
    /// For the keys of a layer, if they are packed as codes.
    pub fn new(level: Level, packed: &Packed) -> Option<Self> {
        let packing = packed.packing();
        if packing.key_bits == 0 {
            return None;
        }
        let of = of_bits(packing.key_bits);
        let (by_heads, heads) = match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => {
                (<simd::Avx512<false> as Codes>::SCORE[of], <simd::Avx512<false> as Simd>::HEADS)
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => (<simd::Avx2 as Codes>::SCORE[of], <simd::Avx2 as Simd>::HEADS),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => (<simd::Neon as Codes>::SCORE[of], <simd::Neon as Simd>::HEADS),
            _ => (<simd::Portable as Codes>::SCORE[of], <simd::Portable as Simd>::HEADS),
        };
        Some(CodeScorer { by_heads, heads, bytes: packed.key_bytes(), kept: packing.key_kept, group: packing.group })
    }

    /// Numbers of a query of the kept channels: zero beyond them.
    pub fn width(&self) -> usize {
        self.kept.next_multiple_of(32)
    }

    /// Scores the keys of some slots of a block against queries, rows of [`CodeScorer::width`]: `scores[query * 64 + i]`.
    ///
    /// # Safety
    /// The level is available; `rows` are a head of a block of the layer, and the slots lie in it.
    pub unsafe fn score(
        &self,
        rows: &Rows<'_>,
        slots: Range<u32>,
        queries: &[f32],
        scratch: &mut Vec<f32>,
        scores: &mut Vec<f32>,
    ) {
        let (width, num) = (self.width(), queries.len() / self.width());
        scratch.resize((self.heads + 1) * width + TILE, 0.0);
        scores.resize(num * TILE, 0.0);
        let keys = Keys {
            codes: rows.keys,
            scales: rows.key_scales,
            bytes: self.bytes,
            kept: self.kept,
            group: self.group,
            slot: slots.start as usize,
            len: slots.len(),
        };
        let mut ahead = Ahead::new(&[], 1);
        for first in (0..num).step_by(self.heads) {
            let run = self.by_heads[self.heads.min(num - first) - 1];
            let (query, to) = (queries[first * width..].as_ptr(), scores[first * TILE..].as_mut_ptr());
            // SAFETY: the caller's promise; so many queries, and room for their scores; the scratch memory has a row for each, and a word
            // for each slot.
            unsafe { run(&keys, (query, width), scratch.as_mut_ptr(), to, &mut ahead) };
        }
    }
}
