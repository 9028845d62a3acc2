//! Weighted sums of values that lie as codes.

use half::bf16;

use super::digits::{SLOTS, load_halves, middle, middle_code};
use crate::kernels::attend::ahead::Ahead;
use crate::kernels::attend::tile::TILE;
use crate::kernels::simd::Simd;
use crate::storage::packed::Chunk;

/// Codes of values, and which of them are meant.
#[derive(Clone, Copy)]
pub(in crate::kernels::attend) struct Values {
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
pub(in crate::kernels::attend) fn code_passes<S: Simd>(dim: usize, bits: u32) -> usize {
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
pub(super) unsafe fn weigh_codes<S: Simd, const BITS: u32, const HB: usize>(
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
