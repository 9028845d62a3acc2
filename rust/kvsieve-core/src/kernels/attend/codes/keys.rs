//! Scores of keys that lie as codes.

use half::bf16;

use super::digits::{SLOTS, load_halves, middle, middle_code, shift};
use crate::kernels::attend::ahead::Ahead;
use crate::kernels::attend::inner::put;
use crate::kernels::simd::Simd;

/// Codes of keys, and which of them are meant.
#[derive(Clone, Copy)]
pub(in crate::kernels::attend) struct Keys {
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

/// Scores keys that lie as codes against `HB` queries: `scores[h * TILE + i]`.
///
/// # Safety
/// As for [`Simd`]; the block and its scales are readable; `HB` queries of `width` elements, zero beyond the kept channels; `width`
/// is a multiple of 16; `scratch` has room for `HB` of them and for a word for each slot.
#[inline(always)]
pub(super) unsafe fn score_codes<S: Simd, const BITS: u32, const HB: usize>(
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
pub(super) unsafe fn score_codes_turned<S: Simd, const HB: usize>(
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
