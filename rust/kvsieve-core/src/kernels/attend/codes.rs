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

use half::{bf16, f16};

use super::TILE;
use super::inner::Ahead;
use crate::ids::BLOCK;
use crate::kernels::simd::{self, Simd};
use crate::storage::packed::Chunk;

const SLOTS: usize = BLOCK as usize;

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

/// Codes of keys, and which of them are meant.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    /// Of the block.
    pub codes: *const u8,
    pub scales: *const u16,
    /// Bytes of a key.
    pub bytes: usize,
    pub kept: usize,
    /// Tokens to a scale.
    pub group: usize,
    pub slot: usize,
    pub len: usize,
}

impl Keys {
    /// Words of a key, the last of which may be less than whole.
    pub fn words(&self) -> usize {
        self.bytes.div_ceil(4)
    }

    /// The words of all tokens for the same channels.
    ///
    /// # Safety
    /// `word` is below [`Keys::words`]; `rest` holds what [`gather_rest`] makes.
    #[inline(always)]
    unsafe fn column(&self, word: usize, rest: *const u32) -> *const u32 {
        // SAFETY: the column lies in the block.
        unsafe { if word < self.bytes / 4 { self.codes.cast::<u32>().add(word * SLOTS) } else { rest } }
    }
}

/// What a digit of so many bits, as [`Simd::digits`] has it, is taken to be more than its distance from the middle: a pair for products.
const fn middle(digit: u32) -> [bf16; 2] {
    // 130 or 136.
    let x = bf16::from_bits(if digit == 2 { 0x4302 } else { 0x4308 });
    [x, x]
}

/// The code in the middle, by its digits.
const fn middle_code(bits: u32) -> f32 {
    match bits {
        2 => 2.0,
        4 => 8.0,
        _ => 136.0,
    }
}

/// The bit in its word at which the code of a channel begins.
#[inline(always)]
const fn shift(channel: usize, bits: u32) -> u32 {
    let at = channel as u32 % (32 / bits);
    at / 2 * bits + at % 2 * 16
}

/// Puts what is left of the keys behind their whole words into words of the same order.
///
/// # Safety
/// Room for a word for each slot.
#[inline(always)]
unsafe fn gather_rest(keys: &Keys, bits: u32, to: *mut u32) {
    let (left, from) = (keys.bytes % 4, keys.bytes / 4 * 4 * SLOTS);
    let each = 8 / bits as usize;
    // SAFETY: `left` columns of bytes lie behind the whole words.
    unsafe {
        to.write_bytes(0, SLOTS);
        for byte in 0..left {
            let column = keys.codes.add(from + byte * SLOTS);
            for i in 0..each {
                let (from, to_bit) = (i as u32 * bits, shift(byte * each + i, bits));
                for slot in 0..SLOTS {
                    *to.add(slot) |= (u32::from(*column.add(slot)) >> from & ((1 << bits) - 1)) << to_bit;
                }
            }
        }
    }
}

/// Halves as numbers, zero beyond the `n` that are there.
///
/// # Safety
/// As for [`Simd`]; as many halves at `p` as `n` and the lanes allow.
#[inline(always)]
unsafe fn load_halves<S: Simd>(p: *const u16, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if n >= S::LANES {
            S::load_f16(p.cast::<f16>())
        } else if n > 0 {
            S::load_part_f16(p.cast::<f16>(), n)
        } else {
            S::splat(0.0)
        }
    }
}

/// Multiplies queries by the steps of a group of tokens. Returns what its scores have in common.
///
/// For dots the products are rows of `2 * stride(width)` `bf16`, zero beyond the channels, and in the second halves of rows are 16 times
/// as much, for upper digits.
///
/// # Safety
/// As for [`score_codes`]; `scales` are those of the group.
#[inline(always)]
unsafe fn fold<S: Simd, const BITS: u32, const HB: usize>(
    scales: *const u16,
    kept: usize,
    (queries, width): (*const f32, usize),
    to: *mut f32,
) -> [f32; HB] {
    let (stride, end) = (stride(width), kept.next_multiple_of(16));
    let middle = middle(BITS.min(4));
    // SAFETY: channels below `kept` have scales, those below `width` queries and room; whole vectors of pairs make up a stride.
    unsafe {
        let code = S::splat(if S::DOTS { middle_code(BITS) } else { 0.0 });
        let mut base = [S::splat(0.0); HB];
        let mut c = 0;
        while c < end {
            let n = kept.saturating_sub(c);
            let step = load_halves::<S>(scales.wrapping_add(c), n);
            let least = S::fma(code, step, load_halves::<S>(scales.wrapping_add(kept + c), n));
            for (h, base) in base.iter_mut().enumerate() {
                let q = S::load(queries.add(h * width + c));
                *base = S::fma(q, least, *base);
                let folded = S::mul(q, step);
                if S::DOTS {
                    let to = to.cast::<bf16>().add(h * 2 * stride + c);
                    S::narrow(to, folded);
                    if BITS == 8 {
                        S::narrow(to.add(stride), S::mul(folded, S::splat(16.0)));
                    }
                } else {
                    S::store(to.add(h * width + c), folded);
                }
            }
            c += S::LANES;
        }
        let mut sums = [0f32; HB];
        for (h, (sum, base)) in sums.iter_mut().zip(base).enumerate() {
            let mut more = S::splat(0.0);
            for row in 0..if !S::DOTS { 0 } else { BITS.div_ceil(4) as usize } {
                let row = to.cast::<bf16>().add((h * 2 + row) * stride);
                if end < stride {
                    row.add(end).write_bytes(0, stride - end);
                }
                let mut c = 0;
                while c < stride {
                    more = S::dot_pair(more, S::words(row.add(c).cast()), middle.as_ptr());
                    c += 2 * S::LANES;
                }
            }
            *sum = S::sum(S::sub(base, more));
        }
        sums
    }
}

/// Numbers from one row of folded queries to the next.
#[inline(always)]
fn stride(width: usize) -> usize {
    width.next_multiple_of(32)
}

/// Writes the scores of slots `at..at + 2 * LANES` as far as they lie in `lo..hi`; `scores` are those from `slot` on.
///
/// # Safety
/// As for [`score_codes`].
#[inline(always)]
pub(super) unsafe fn put<S: Simd, const HB: usize>(
    acc: [[S::V; 2]; HB],
    base: [f32; HB],
    (at, lo, hi): (usize, usize, usize),
    slot: usize,
    scores: *mut f32,
) {
    // SAFETY: slots `lo..hi` lie in the piece, whose scores there is room for; the buffer takes two vectors.
    unsafe {
        for (h, (acc, base)) in acc.into_iter().zip(base).enumerate() {
            let (x, y) = (S::add(acc[0], S::splat(base)), S::add(acc[1], S::splat(base)));
            let to = scores.add(h * TILE);
            if lo <= at && at + 2 * S::LANES <= hi {
                S::store(to.add(at - slot), x);
                S::store(to.add(at - slot + S::LANES), y);
                continue;
            }
            let mut buf = [0f32; 32];
            S::store(buf.as_mut_ptr(), x);
            S::store(buf.as_mut_ptr().add(S::LANES), y);
            let (first, end) = (lo.max(at), hi.min(at + 2 * S::LANES));
            std::ptr::copy_nonoverlapping(buf.as_ptr().add(first - at), to.add(first - slot), end - first);
        }
    }
}

/// Scores keys that lie as codes against `HB` queries: `scores[h * TILE + i]`.
///
/// # Safety
/// As for [`Simd`]; the block and its scales are readable; `HB` queries of `width` elements, zero beyond the kept channels; `width`
/// is a multiple of 16; `scratch` has room for `HB` of them and for a word for each slot.
#[inline(always)]
unsafe fn score_codes<S: Simd, const BITS: u32, const HB: usize>(
    keys: &Keys,
    (queries, width): (*const f32, usize),
    scratch: *mut f32,
    scores: *mut f32,
    ahead: &mut Ahead,
) {
    let each = 32 / BITS as usize;
    let digit = BITS.min(4);
    let (lo, hi) = (keys.slot, keys.slot + keys.len);
    // SAFETY: columns have a word for each slot, and vectors begin at multiples of twice the lanes; the products reach to the end of
    // the last word, for it ends below a multiple of 16 channels.
    unsafe {
        let rest = scratch.add(HB * stride(width)).cast::<u32>();
        if !keys.bytes.is_multiple_of(4) {
            gather_rest(keys, BITS, rest);
        }
        for g in lo / keys.group..hi.div_ceil(keys.group) {
            let scales = keys.scales.add(g * 2 * keys.kept);
            let base = fold::<S, BITS, HB>(scales, keys.kept, (queries, width), scratch);
            let (lo, hi) = (lo.max(g * keys.group), hi.min((g + 1) * keys.group));
            let mut at = lo / (2 * S::LANES) * (2 * S::LANES);
            while at < hi {
                let mut acc = [[S::splat(0.0); 2]; HB];
                for word in 0..keys.words() {
                    let p = keys.column(word, rest).add(at);
                    let w = [S::words(p), S::words(p.add(S::LANES))];
                    if S::DOTS {
                        let q = scratch.cast::<bf16>().add(word * each);
                        for i in 0..16 / digit as usize {
                            let x =
                                [S::digits(w[0], i as u32 * digit, digit), S::digits(w[1], i as u32 * digit, digit)];
                            let q = if BITS == 8 { q.add(i / 2 * 2 + i % 2 * stride(width)) } else { q.add(2 * i) };
                            for (h, acc) in acc.iter_mut().enumerate() {
                                let q = q.add(h * 2 * stride(width));
                                acc[0] = S::dot_pair(acc[0], x[0], q);
                                acc[1] = S::dot_pair(acc[1], x[1], q);
                            }
                        }
                    } else {
                        let q = scratch.add(word * each).cast_const();
                        for i in 0..each {
                            let x = [S::code(w[0], shift(i, BITS), BITS), S::code(w[1], shift(i, BITS), BITS)];
                            for (h, acc) in acc.iter_mut().enumerate() {
                                let q = S::splat(*q.add(h * width + i));
                                acc[0] = S::fma(x[0], q, acc[0]);
                                acc[1] = S::fma(x[1], q, acc[1]);
                            }
                        }
                    }
                    ahead.ask::<S>();
                }
                put::<S, HB>(acc, base, (at, lo, hi), keys.slot, scores);
                at += 2 * S::LANES;
            }
        }
    }
}

/// [`score_codes`] for raw keys: `trig` holds for each of the `pairs` the cosines of all slots, then the sines.
///
/// # Safety
/// As for [`score_codes`]; channel `i` pairs with `i + pairs`.
#[inline(always)]
unsafe fn score_codes_turned<S: Simd, const HB: usize>(
    keys: &Keys,
    bits: u32,
    (trig, pairs): (*const f32, usize),
    (queries, width): (*const f32, usize),
    scratch: *mut f32,
    scores: *mut f32,
    ahead: &mut Ahead,
) {
    let (lo, hi) = (keys.slot, keys.slot + keys.len);
    let each = 32 / bits as usize;
    // SAFETY: as for `score_codes`; steps and least values of the kept channels fit into the scratch memory of two queries.
    unsafe {
        let (steps, leasts) = (scratch, scratch.add(width));
        let rest = scratch.add(2 * width).cast::<u32>();
        if !keys.bytes.is_multiple_of(4) {
            gather_rest(keys, bits, rest);
        }
        for g in lo / keys.group..hi.div_ceil(keys.group) {
            let scales = keys.scales.add(g * 2 * keys.kept);
            let mut c = 0;
            while c < keys.kept {
                S::store(steps.add(c), load_halves::<S>(scales.add(c), keys.kept - c));
                S::store(leasts.add(c), load_halves::<S>(scales.add(keys.kept + c), keys.kept - c));
                c += S::LANES;
            }
            let (lo, hi) = (lo.max(g * keys.group), hi.min((g + 1) * keys.group));
            let mut at = lo / (2 * S::LANES) * (2 * S::LANES);
            while at < hi {
                let mut acc = [[S::splat(0.0); 2]; HB];
                for half in 0..2 {
                    let at = at + half * S::LANES;
                    for i in 0..pairs {
                        let mut x = [S::splat(0.0); 2];
                        for (x, c) in x.iter_mut().zip([i, i + pairs]) {
                            let w = S::words(keys.column(c / each, rest).add(at));
                            let code = S::code(w, shift(c, bits), bits);
                            *x = S::fma(S::splat(*steps.add(c)), code, S::splat(*leasts.add(c)));
                        }
                        let t = trig.add(i * 2 * SLOTS + at);
                        let (cos, sin) = (S::load(t), S::load(t.add(SLOTS)));
                        let a = S::sub(S::mul(x[0], cos), S::mul(x[1], sin));
                        let b = S::fma(x[1], cos, S::mul(x[0], sin));
                        for (h, acc) in acc.iter_mut().enumerate() {
                            let q = queries.add(h * width + i);
                            let sum = S::fma(a, S::splat(*q), acc[half]);
                            acc[half] = S::fma(b, S::splat(*q.add(pairs)), sum);
                        }
                        ahead.ask::<S>();
                    }
                    for c in 2 * pairs..keys.kept {
                        let w = S::words(keys.column(c / each, rest).add(at));
                        let code = S::code(w, shift(c, bits), bits);
                        let x = S::fma(S::splat(*steps.add(c)), code, S::splat(*leasts.add(c)));
                        for (h, acc) in acc.iter_mut().enumerate() {
                            acc[half] = S::fma(x, S::splat(*queries.add(h * width + c)), acc[half]);
                        }
                    }
                }
                put::<S, HB>(acc, [0.0; HB], (at, lo, hi), keys.slot, scores);
                at += 2 * S::LANES;
            }
        }
    }
}

/// Codes of values, and which of them are meant.
#[derive(Clone, Copy)]
pub(super) struct Values {
    /// Of the block.
    pub codes: *const u8,
    pub scales: *const u16,
    pub dim: usize,
    /// Channels to a scale, at least [`crate::storage::packed::PAIRED`].
    pub group: usize,
    pub slot: usize,
    pub len: usize,
}

/// How often [`weigh_codes`] goes over pairs of tokens.
pub(super) fn code_passes<S: Simd>(dim: usize, bits: u32) -> usize {
    let rounds = if bits == 2 { 2 } else { 1 };
    let mut passes = 0;
    let mut chunk = Chunk::first(dim, bits);
    while let Some(this) = chunk {
        passes += this.words.div_ceil(S::LANES) * rounds;
        chunk = this.next(dim, bits);
    }
    passes
}

/// Multiplies weights by the steps of each group of channels, `[HB][groups][SLOTS]`, zero outside the piece, and adds to the sums what
/// does not depend on the codes.
///
/// # Safety
/// As for [`weigh_codes`].
#[inline(always)]
unsafe fn fold_weights<S: Simd, const BITS: u32, const HB: usize>(
    values: &Values,
    weights: *const f32,
    to: *mut f32,
    (sums, width): (*mut f32, usize),
) {
    let Values { dim, group, slot, len, .. } = *values;
    let groups = dim / group;
    // SAFETY: whole vectors of slots and of channels; `len` weights for each head.
    unsafe {
        let zero = S::splat(0.0);
        let code = S::splat(if S::DOTS { middle_code(BITS) } else { 0.0 });
        let middle = middle(BITS.min(4));
        let mut inside = [0f32; SLOTS];
        let mut mine = [[0f32; SLOTS]; HB];
        inside[slot..slot + len].fill(1.0);
        for (h, mine) in mine.iter_mut().enumerate() {
            std::ptr::copy_nonoverlapping(weights.add(h * TILE), mine.as_mut_ptr().add(slot), len);
        }
        for g in 0..groups {
            let mut least_sums = [zero; HB];
            // Dots need zeros everywhere else.
            let (mut at, end) = if S::DOTS { (0, SLOTS) } else { (slot / S::LANES * S::LANES, slot + len) };
            while at < end {
                // Scales of slots outside may be of tokens long gone, and may be NaN.
                let inside = S::load(inside.as_ptr().add(at));
                let scales = values.scales.add(g * SLOTS + at);
                let step = S::pick_less(zero, inside, load_halves::<S>(scales, SLOTS), zero);
                let least = load_halves::<S>(scales.add(groups * SLOTS), SLOTS);
                let least = S::pick_less(zero, inside, S::fma(code, step, least), zero);
                for (h, sum) in least_sums.iter_mut().enumerate() {
                    let w = S::load(mine[h].as_ptr().add(at));
                    *sum = S::fma(w, least, *sum);
                    let at = (h * groups + g) * SLOTS + at;
                    if S::DOTS {
                        S::narrow(to.cast::<bf16>().add(at), S::mul(w, step));
                    } else {
                        S::store(to.add(at), S::mul(w, step));
                    }
                }
                at += S::LANES;
            }
            if S::DOTS {
                for (h, sum) in least_sums.iter_mut().enumerate() {
                    let row = to.cast::<bf16>().add((h * groups + g) * SLOTS);
                    let mut more = zero;
                    let mut at = 0;
                    while at < SLOTS {
                        more = S::dot_pair(more, S::words(row.add(at).cast()), middle.as_ptr());
                        at += 2 * S::LANES;
                    }
                    // An upper digit counts 16 times, and so does its middle.
                    let times = if BITS == 8 { 17.0 } else { 1.0 };
                    *sum = S::fma(S::splat(-times), more, *sum);
                }
            }
            let mut least = [0f32; 4];
            S::sum4(least.as_mut_ptr(), [least_sums[0], least_sums[1 % HB], least_sums[2 % HB], least_sums[3 % HB]]);
            for (h, &least) in least[..HB].iter().enumerate() {
                for c in (g * group..(g + 1) * group).step_by(S::LANES) {
                    let to = sums.add(h * width + c);
                    S::store(to, S::add(S::load(to), S::splat(least)));
                }
            }
        }
    }
}

/// Adds the weighted values of a piece, which lie as codes, to `HB` sums.
///
/// # Safety
/// As for [`Simd`]; the block and its scales are readable; `HB` rows of `len` weights, `TILE` apart, and of sums; `scratch` has room for
/// `HB * dim / group` numbers for each slot.
#[inline(always)]
unsafe fn weigh_codes<S: Simd, const BITS: u32, const HB: usize>(
    values: &Values,
    weights: *const f32,
    scratch: *mut f32,
    (sums, width): (*mut f32, usize),
    ahead: &mut Ahead,
) {
    let (dim, groups) = (values.dim, values.dim / values.group);
    // SAFETY: the caller's promise; chunks cover the words of a row and the channels of a value.
    unsafe {
        fold_weights::<S, BITS, HB>(values, weights, scratch, (sums, width));
        let mut chunk = Chunk::first(dim, BITS);
        while let Some(this) = chunk {
            let mut i = 0;
            while i < this.words {
                let at = (this.word + i, S::LANES.min(this.words - i));
                let mut first = 0;
                while first < 16 / BITS as usize {
                    let channel = this.channel + first * this.words + i;
                    let to = (sums.add(channel), width);
                    let (place, folded) = ((channel, this.words), (scratch.cast_const(), groups));
                    // Two places are of 32 channels at most.
                    if values.group >= 32 {
                        weigh_words::<S, BITS, HB, true>(values, at, first as u32, place, folded, to, ahead);
                    } else {
                        weigh_words::<S, BITS, HB, false>(values, at, first as u32, place, folded, to, ahead);
                    }
                    first += 4;
                }
                i += S::LANES;
            }
            chunk = this.next(dim, BITS);
        }
    }
}

/// Adds what `n` words from `word` on hold at the place of the code number `first` and of up to three more. The codes at the first
/// place are of channels from `channel` on, those at the next ones each `apart` further. `SHARED`: two places each have one scale.
///
/// # Safety
/// As for [`weigh_codes`].
#[inline(always)]
unsafe fn weigh_words<S: Simd, const BITS: u32, const HB: usize, const SHARED: bool>(
    values: &Values,
    (word, n): (usize, usize),
    first: u32,
    (channel, apart): (usize, usize),
    (folded, groups): (*const f32, usize),
    (sums, width): (*mut f32, usize),
    ahead: &mut Ahead,
) {
    let digit = if S::DOTS { BITS.min(4) } else { BITS };
    let digits = (BITS / digit) as usize;
    // How many sums a head has here: one for each digit of a code.
    let num = (16 / digit as usize).min(4);
    let words = values.dim * BITS as usize / 16;
    // SAFETY: words below those of a row; a folded weight for each head, group and slot; channels below `dim`.
    unsafe {
        let mut group = [0; 4];
        for (i, group) in group.iter_mut().enumerate().take(num) {
            *group = (channel + i / digits * apart) / values.group * SLOTS;
        }
        let mut acc = [[S::splat(0.0); 4]; HB];
        for pair in values.slot / 2..(values.slot + values.len).div_ceil(2) {
            let p = values.codes.cast::<u32>().add(pair * words + word);
            let w = if n < S::LANES { S::words_part(p, n) } else { S::words(p) };
            let at = |i: usize| if SHARED { group[i / 2 * 2] } else { group[i] };
            if S::DOTS {
                let mut x = [w; 4];
                for (i, x) in x.iter_mut().enumerate().take(num) {
                    *x = S::digits(w, first * BITS + i as u32 * digit, digit);
                }
                for (h, acc) in acc.iter_mut().enumerate() {
                    let weights = folded.cast::<bf16>().add(h * groups * SLOTS + 2 * pair);
                    for i in 0..num {
                        acc[i] = S::dot_pair(acc[i], x[i], weights.add(at(i)));
                    }
                }
            } else {
                for i in 0..num {
                    let shift = first * BITS + i as u32 * digit;
                    let x = [S::code(w, shift, BITS), S::code(w, 16 + shift, BITS)];
                    for (h, acc) in acc.iter_mut().enumerate() {
                        let weight = folded.add(h * groups * SLOTS + at(i) + 2 * pair);
                        acc[i] = S::fma(x[0], S::splat(*weight), acc[i]);
                        acc[i] = S::fma(x[1], S::splat(*weight.add(1)), acc[i]);
                    }
                }
            }
            ahead.ask::<S>();
        }
        for (h, acc) in acc.iter().enumerate() {
            for i in 0..num / digits {
                let x = if digits == 2 { S::fma(S::splat(16.0), acc[2 * i + 1], acc[2 * i]) } else { acc[i] };
                let to = sums.add(h * width + i * apart);
                if n == S::LANES {
                    S::store(to, S::add(S::load(to), x));
                } else {
                    let mut buf = [0f32; 16];
                    S::store(buf.as_mut_ptr(), x);
                    for (i, x) in buf[..n].iter().enumerate() {
                        *to.add(i) += x;
                    }
                }
            }
        }
    }
}
