//! Tokens to and from packed blocks.

use half::{bf16, f16};

use super::blocks::Packed;
use super::packing::Packing;
use super::places::{key_place, thin_place, value_place};
use crate::ids::{BLOCK, BlockId, Run};
use crate::tensor::Dtype;

impl Packed {
    /// Stores tokens in slots `slot..` of `block`. `keys` and `values` are rows of the layer's dtype, one token after another.
    ///
    /// Where a group of keys shares a scale, what lies before `slot` in its group is kept and what lies behind is forgotten.
    ///
    /// # Safety
    /// `n` rows of `key_dim` and `value_dim` elements; the slots lie in the block, which has memory and channels.
    pub(in crate::storage) unsafe fn put(
        &mut self,
        block: BlockId,
        head: usize,
        slot: u32,
        keys: *const u8,
        values: *const u8,
        n: usize,
    ) {
        let Packing { key_kept, key_bits, value_bits, group } = self.packing;
        let (key_dim, value_dim, dtype) = (self.key_dim, self.value_dim, self.dtype);
        let value_bytes = self.value_bytes();
        let to = self.rows(block, head, slot);
        let (index, zeroed) = (to.channels.of(head), to.channels.zeroed(head));
        let es = dtype.size();
        // SAFETY: rows `i < n` at all places, by the caller's promise; `&mut self` gives the right to write to the slabs.
        unsafe {
            if key_bits == 0 {
                for i in 0..n {
                    let from = keys.add(i * key_dim * es);
                    for (j, (&c, &zero)) in index.iter().zip(zeroed).enumerate() {
                        let at = to.keys.cast_mut().add(thin_place(key_kept, dtype, to.slots, slot as usize + i, j));
                        if zero {
                            at.write_bytes(0, es);
                        } else {
                            std::ptr::copy_nonoverlapping(from.add(c as usize * es), at, es);
                        }
                    }
                }
            } else {
                let mut tokens = vec![0f32; n * key_kept];
                for (i, row) in tokens.chunks_exact_mut(key_kept).enumerate() {
                    for (x, (&c, &zero)) in row.iter_mut().zip(index.iter().zip(zeroed)) {
                        *x = if zero { 0.0 } else { element(dtype, keys.add((i * key_dim + c as usize) * es)) };
                    }
                }
                self.put_keys(block, head, slot, &tokens);
            }
            let to = self.rows(block, head, slot);
            if value_bits == 0 {
                std::ptr::copy_nonoverlapping(values, to.values.cast_mut(), n * value_bytes);
            } else {
                let mut row = vec![0f32; value_dim];
                for i in 0..n {
                    for (c, x) in row.iter_mut().enumerate() {
                        *x = element(dtype, values.add((i * value_dim + c) * es));
                    }
                    let slot = slot as usize + i;
                    for (g, x) in row.chunks_exact(group).enumerate() {
                        let scale = Scale::of(x.iter().copied(), value_bits);
                        let (step, least) = scale.halves();
                        let scales = to.value_scales.cast_mut().add(g * BLOCK as usize + slot);
                        *scales = step;
                        *scales.add(value_dim / group * BLOCK as usize) = least;
                        for (i, &x) in x.iter().enumerate() {
                            let place = value_place(&self.packing, value_dim, value_bytes, slot, g * group + i);
                            put_code(to.values.cast_mut(), place, value_bits, scale.code(x));
                        }
                    }
                }
            }
        }
    }

    /// Stores keys, rows of `key_kept` numbers, as codes in slots `slot..`; see [`Packed::put`].
    ///
    /// # Safety
    /// As for [`Packed::put`].
    pub(super) unsafe fn put_keys(&mut self, block: BlockId, head: usize, slot: u32, tokens: &[f32]) {
        let Packing { key_kept: kept, key_bits: bits, group, .. } = self.packing;
        let (bytes, n) = (self.key_bytes(), tokens.len() / kept);
        let (first, end) = (slot as usize, slot as usize + n);
        let base = self.rows(block, head, 0);
        let mut rows = vec![0f32; group * kept];
        for g in first / group..end.div_ceil(group) {
            let start = g * group;
            let (lo, hi) = (first.max(start) - start, end.min(start + group) - start);
            if lo > 0 {
                // SAFETY: slots `start..start + lo` lie in the block.
                unsafe { self.keys_f32(block, head, start as u32, &mut rows[..lo * kept]) };
            }
            rows[lo * kept..hi * kept].copy_from_slice(&tokens[(start + lo - first) * kept..][..(hi - lo) * kept]);
            // SAFETY: the group's scales and rows lie in the block; `&mut self` gives the right to write to them.
            unsafe {
                let scales = std::slice::from_raw_parts_mut(base.key_scales.cast_mut().add(g * 2 * kept), 2 * kept);
                let (steps, leasts) = scales.split_at_mut(kept);
                for c in 0..kept {
                    let column = || rows[..hi * kept].iter().skip(c).step_by(kept).copied();
                    let scale = Scale::of(column(), bits);
                    (steps[c], leasts[c]) = scale.halves();
                    for (i, x) in column().enumerate() {
                        put_code(base.keys.cast_mut(), key_place(bytes, bits, start + i, c), bits, scale.code(x));
                    }
                }
            }
        }
    }

    /// Keys of the kept channels from `slot` on, as many as `out` has rows for.
    ///
    /// # Safety
    /// The slots lie in the block, which has memory and channels.
    pub(crate) unsafe fn keys_f32(&self, block: BlockId, head: usize, slot: u32, out: &mut [f32]) {
        let Packing { key_kept: kept, key_bits: bits, group, .. } = self.packing;
        let (rows, bytes) = (self.rows(block, head, slot), self.key_bytes());
        for (i, out) in out.chunks_exact_mut(kept).enumerate() {
            // SAFETY: the row and the scales of its group lie in the block.
            unsafe {
                let slot = slot as usize + i;
                if bits == 0 {
                    for (c, x) in out.iter_mut().enumerate() {
                        *x = element(self.dtype, rows.keys.add(thin_place(kept, self.dtype, rows.slots, slot, c)));
                    }
                    continue;
                }
                let scales = rows.key_scales.add(slot / group * 2 * kept);
                for (c, x) in out.iter_mut().enumerate() {
                    let code = code(rows.keys, key_place(bytes, bits, slot, c), bits);
                    *x = number(*scales.add(c), *scales.add(kept + c), code);
                }
            }
        }
    }

    /// The greatest and the least number of every channel of the keys of a run; 0 for one that was dropped. NaN where a group is.
    ///
    /// # Safety
    /// The run lies in its block, which has memory and channels, and is not empty; `most` and `least` have a number for each channel.
    pub(in crate::storage) unsafe fn bounds_f32(&self, run: &Run, head: usize, most: &mut [f32], least: &mut [f32]) {
        let Packing { key_kept: kept, key_bits: bits, group, .. } = self.packing;
        let (rows, bytes) = (self.rows(run.block, head, 0), self.key_bytes());
        let (lo, hi) = (run.lo as usize, run.hi as usize);
        most.fill(0.0);
        least.fill(0.0);
        for (c, &channel) in rows.channels.of(head).iter().enumerate() {
            let (mut above, mut below) = (f32::NEG_INFINITY, f32::INFINITY);
            let mut take = |most: f32, least: f32| {
                // A NaN stays: it is neither greater nor less than anything.
                above = if most > above || most.is_nan() { most } else { above };
                below = if least < below || least.is_nan() { least } else { below };
            };
            // SAFETY: the slots of a column, and the scales of their groups, lie in the block.
            unsafe {
                if bits == 0 {
                    for slot in lo..hi {
                        let x = element(self.dtype, rows.keys.add(thin_place(kept, self.dtype, rows.slots, slot, c)));
                        take(x, x);
                    }
                } else {
                    // Codes of a channel lie equally far apart.
                    let ((first, bit), (second, _)) = (key_place(bytes, bits, 0, c), key_place(bytes, bits, 1, c));
                    for g in lo / group..hi.div_ceil(group) {
                        let (mut top, mut bottom) = (0, u32::MAX);
                        for slot in lo.max(g * group)..hi.min((g + 1) * group) {
                            let code = code(rows.keys, (first + slot * (second - first), bit), bits);
                            (top, bottom) = (top.max(code), bottom.min(code));
                        }
                        let scales = rows.key_scales.add(g * 2 * kept);
                        let of = |code| number(*scales.add(c), *scales.add(kept + c), code);
                        take(of(top), of(bottom));
                    }
                }
            }
            (most[usize::from(channel)], least[usize::from(channel)]) = (above, below);
        }
    }

    /// Values from `slot` on, as many as `out` has rows for.
    ///
    /// # Safety
    /// As for [`Packed::keys_f32`].
    pub(crate) unsafe fn values_f32(&self, block: BlockId, head: usize, slot: u32, out: &mut [f32]) {
        let Packing { value_bits: bits, group, .. } = self.packing;
        let (rows, bytes, dim) = (self.rows(block, head, slot), self.value_bytes(), self.value_dim);
        for (i, out) in out.chunks_exact_mut(dim).enumerate() {
            // SAFETY: the row and its scales lie in the block.
            unsafe {
                if bits == 0 {
                    let row = rows.values.add(i * bytes);
                    out.iter_mut()
                        .enumerate()
                        .for_each(|(c, x)| *x = element(self.dtype, row.add(c * self.dtype.size())));
                    continue;
                }
                let slot = slot as usize + i;
                for (c, x) in out.iter_mut().enumerate() {
                    let code = code(rows.values, value_place(&self.packing, dim, bytes, slot, c), bits);
                    let scales = rows.value_scales.add(c / group * BLOCK as usize + slot);
                    *x = number(*scales, *scales.add(dim / group * BLOCK as usize), code);
                }
            }
        }
    }

    /// Writes tokens from `slot` on at full width, in the layer's dtype: zero where a channel was dropped.
    ///
    /// # Safety
    /// `n` slots in the block, which has memory and channels; room for `n` rows of `key_dim` and `value_dim` elements.
    pub(in crate::storage) unsafe fn unpack(
        &self,
        block: BlockId,
        head: usize,
        slot: u32,
        n: usize,
        keys: *mut u8,
        values: *mut u8,
    ) {
        let (kept, es) = (self.packing.key_kept, self.dtype.size());
        let rows = self.rows(block, head, slot);
        let index = rows.channels.of(head);
        // SAFETY: the caller's promise, row by row.
        unsafe {
            keys.write_bytes(0, n * self.key_dim * es);
            if self.packing.key_bits == 0 {
                for i in 0..n {
                    let to = keys.add(i * self.key_dim * es);
                    for (j, &c) in index.iter().enumerate() {
                        let from = rows.keys.add(thin_place(kept, self.dtype, rows.slots, slot as usize + i, j));
                        std::ptr::copy_nonoverlapping(from, to.add(c as usize * es), es);
                    }
                }
            } else {
                let mut tokens = vec![0f32; n * kept];
                self.keys_f32(block, head, slot, &mut tokens);
                for (i, row) in tokens.chunks_exact(kept).enumerate() {
                    for (&x, &c) in row.iter().zip(index) {
                        put_element(self.dtype, keys.add((i * self.key_dim + c as usize) * es), x);
                    }
                }
            }
            if self.packing.value_bits == 0 {
                std::ptr::copy_nonoverlapping(rows.values, values, n * self.value_bytes());
            } else {
                let mut tokens = vec![0f32; n * self.value_dim];
                self.values_f32(block, head, slot, &mut tokens);
                tokens.iter().enumerate().for_each(|(i, &x)| put_element(self.dtype, values.add(i * es), x));
            }
        }
    }
}

/// The step and least value of a group, as they are stored.
#[derive(Clone, Copy)]
struct Scale {
    step: f16,
    least: f16,
    top: f32,
}

impl Scale {
    /// The scale of a group of numbers. A group with a number that is not finite, or that a half cannot hold, becomes NaN.
    fn of(numbers: impl Iterator<Item = f32>, bits: u32) -> Self {
        let top = ((1u32 << bits) - 1) as f32;
        let (mut min, mut max, mut sound) = (f32::INFINITY, f32::NEG_INFINITY, true);
        for x in numbers {
            (min, max) = (min.min(x), max.max(x));
            sound &= x.is_finite();
        }
        // Downwards, so that no number lies below it.
        let mut least = f16::from_f32(min);
        if least.to_f32() > min {
            least = if least == f16::ZERO { f16::from_bits(0x8001) } else { step_down(least) };
        }
        let step = f16::from_f32((max - least.to_f32()) / top);
        if !sound || !least.is_finite() || !step.is_finite() {
            return Scale { step: f16::NAN, least: f16::NAN, top };
        }
        Scale { step, least, top }
    }

    fn halves(self) -> (u16, u16) {
        (self.step.to_bits(), self.least.to_bits())
    }

    /// The code of the nearest number.
    fn code(self, x: f32) -> u32 {
        let step = self.step.to_f32();
        // Also NaN becomes 0 here; its group is NaN by its scale.
        if step > 0.0 { ((x - self.least.to_f32()) / step).round().clamp(0.0, self.top) as u32 } else { 0 }
    }
}

/// The next half below one that is not zero.
fn step_down(x: f16) -> f16 {
    f16::from_bits(if x.is_sign_negative() { x.to_bits() + 1 } else { x.to_bits() - 1 })
}

#[inline(always)]
fn number(step: u16, least: u16, code: u32) -> f32 {
    f16::from_bits(step).to_f32().mul_add(code as f32, f16::from_bits(least).to_f32())
}

/// # Safety
/// The byte of the place is readable.
#[inline(always)]
unsafe fn code(codes: *const u8, (byte, bit): (usize, u32), bits: u32) -> u32 {
    // SAFETY: the caller's promise.
    u32::from(unsafe { *codes.add(byte) }) >> bit & ((1 << bits) - 1)
}

/// # Safety
/// The byte of the place is readable and writable.
#[inline(always)]
unsafe fn put_code(codes: *mut u8, (byte, bit): (usize, u32), bits: u32, code: u32) {
    let mask = (((1u32 << bits) - 1) << bit) as u8;
    // SAFETY: the caller's promise.
    unsafe {
        let byte = codes.add(byte);
        *byte = *byte & !mask | (code << bit) as u8;
    }
}

/// # Safety
/// An element of `dtype` at `p`, wherever it begins: callers' rows come as bytes.
#[inline(always)]
unsafe fn element(dtype: Dtype, p: *const u8) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            Dtype::F32 => p.cast::<f32>().read_unaligned(),
            Dtype::BF16 => bf16::from_bits(p.cast::<u16>().read_unaligned()).to_f32(),
            Dtype::F16 => f16::from_bits(p.cast::<u16>().read_unaligned()).to_f32(),
        }
    }
}

/// # Safety
/// Room for an element of `dtype` at `p`, wherever it begins.
#[inline(always)]
unsafe fn put_element(dtype: Dtype, p: *mut u8, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            Dtype::F32 => p.cast::<f32>().write_unaligned(x),
            Dtype::BF16 => p.cast::<u16>().write_unaligned(bf16::from_f32(x).to_bits()),
            Dtype::F16 => p.cast::<u16>().write_unaligned(f16::from_f32(x).to_bits()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_may_begin_at_any_byte() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let mut bytes = [0u8; 9];
            for at in 0..4 {
                let p = bytes[at..].as_mut_ptr();
                // SAFETY: at least five bytes are left.
                let back = unsafe {
                    put_element(dtype, p, -1.5);
                    element(dtype, p)
                };
                assert_eq!(back.to_bits(), (-1.5f32).to_bits());
            }
        }
    }
}
