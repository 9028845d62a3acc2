//! Moves of tokens between packed blocks.

use std::sync::Arc;

use super::blocks::{Packed, Rows};
use super::packing::Packing;
use super::places::PAIRED;
use crate::Result;
use crate::ids::BLOCK;
use crate::plan::Move;
use crate::tensor::Dtype;

impl Packed {
    /// Makes checked moves between packed blocks. Bits are carried over, but for keys whose group shares a scale: they are packed
    /// again with those they come to stand among, unless they move as a group.
    ///
    /// No token of a list is moved twice.
    pub(in crate::storage) fn move_tokens(&mut self, moves: &[Move]) -> Result<()> {
        for m in moves {
            let channels = Arc::clone(self.channels_of(m.from)?);
            self.choose(std::iter::once(m.to), &channels);
        }
        for head in 0..self.heads {
            self.move_keys(moves, head);
            for m in moves {
                let (from, to) = (self.rows(m.from, head, m.from_slot), self.rows(m.to, head, m.to_slot));
                // SAFETY: checked moves.
                unsafe { self.move_values(m, from, to) };
            }
        }
        Ok(())
    }

    /// # Safety
    /// A checked move between these two.
    unsafe fn move_values(&self, m: &Move, from: Rows<'_>, to: Rows<'_>) {
        let Packing { value_bits: bits, group, .. } = self.packing;
        let (bytes, len) = (self.value_bytes(), m.len as usize);
        let (first, second) = (m.from_slot as usize, m.to_slot as usize);
        // SAFETY: both ranges lie in their blocks; `copy` allows them to overlap, and so does the order in which words are taken.
        unsafe {
            if bits == 0 {
                return std::ptr::copy(from.values, to.values.cast_mut(), len * bytes);
            }
            for row in 0..2 * self.value_dim / group {
                let at = row * BLOCK as usize;
                let (from, to) = (from.value_scales.add(at + first), to.value_scales.add(at + second));
                std::ptr::copy(from, to.cast_mut(), len);
            }
            if group < PAIRED {
                let (from, to) = (from.values.add(first * bytes), to.values.add(second * bytes));
                return std::ptr::copy(from, to.cast_mut(), len * bytes);
            }
            let half = |slot: usize| slot / 2 * bytes + slot % 2;
            for i in 0..len {
                let i = if first < second { len - 1 - i } else { i };
                let from = from.values.cast::<u16>().add(half(first + i));
                let to = to.values.cast::<u16>().cast_mut().add(half(second + i));
                (0..bytes / 2).for_each(|word| *to.add(2 * word) = *from.add(2 * word));
            }
        }
    }

    /// Copies keys from slots to slots as they lie, without their scales.
    ///
    /// # Safety
    /// A checked move between these two.
    unsafe fn copy_keys(&self, m: &Move, from: Rows<'_>, to: Rows<'_>) {
        let (first, second, len) = (m.from_slot as usize, m.to_slot as usize, m.len as usize);
        let bytes = self.key_bytes();
        // How wide the columns are in which keys lie, and how wide those of what is left.
        let (width, rest) = match (self.packing.key_bits, self.dtype) {
            (0, Dtype::F16) => (2, 2),
            (0, _) => (4, 2),
            _ => (4, 1),
        };
        let (mut here, mut there) = (0, 0);
        for width in std::iter::repeat_n(width, bytes / width).chain(std::iter::repeat_n(rest, bytes % width / rest)) {
            // SAFETY: the columns lie in their blocks; `copy` allows the ranges to overlap.
            unsafe {
                let (from, to) = (from.keys.add(here + first * width), to.keys.add(there + second * width));
                std::ptr::copy(from, to.cast_mut(), len * width);
            }
            here += from.slots * width;
            there += to.slots * width;
        }
    }

    fn move_keys(&mut self, moves: &[Move], head: usize) {
        let (kept, group) = (self.packing.key_kept, self.packing.group as u32);
        if self.packing.key_bits == 0 {
            for m in moves {
                let (from, to) = (self.rows(m.from, head, m.from_slot), self.rows(m.to, head, m.to_slot));
                // SAFETY: a checked move.
                unsafe { self.copy_keys(m, from, to) };
            }
            return;
        }
        let whole = |m: &Move| m.from_slot.is_multiple_of(group) && m.to_slot.is_multiple_of(group);
        let goes_on = |a: &Move, b: &Move| a.to == b.to && a.to_slot + a.len == b.to_slot && !whole(a) && !whole(b);
        // All is read before anything is written: writing one token of a group changes what the others' codes mean.
        let mut tokens = Vec::new();
        for m in moves.iter().filter(|m| !whole(m)) {
            let at = tokens.len();
            tokens.resize(at + m.len as usize * kept, 0f32);
            // SAFETY: checked moves.
            unsafe { self.keys_f32(m.from, head, m.from_slot, &mut tokens[at..]) };
        }
        let mut rest = &tokens[..];
        for run in moves.chunk_by(goes_on) {
            let m = &run[0];
            // SAFETY: checked moves.
            unsafe {
                if whole(m) {
                    let (from, to) = (self.rows(m.from, head, m.from_slot), self.rows(m.to, head, m.to_slot));
                    self.copy_keys(m, from, to);
                    let scales = |slot: u32| (slot / group) as usize * 2 * kept;
                    let (from, to) = (from.key_scales.add(scales(m.from_slot)), to.key_scales.add(scales(m.to_slot)));
                    std::ptr::copy(from, to.cast_mut(), m.len.div_ceil(group) as usize * 2 * kept);
                } else {
                    let n: usize = run.iter().map(|m| m.len as usize).sum();
                    let (mine, others) = rest.split_at(n * kept);
                    rest = others;
                    self.put_keys(m.to, head, m.to_slot, mine);
                }
            }
        }
    }
}
