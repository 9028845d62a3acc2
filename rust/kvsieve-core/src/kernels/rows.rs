//! Keys made into rows of `f32`, whatever a block stores, and turned to their distances: for scoring a key here and a key there.

use half::{bf16, f16};

use super::isa::Level;
use super::rotate::{load_row, rotate_row};
use super::simd::{Elem, Simd, dispatch};
use crate::ids::{BLOCK, BlockId};
use crate::rope::Distances;
use crate::storage::arena::Arena;
use crate::storage::packed::Packing;
use crate::tensor::Dtype;

/// One key to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    /// Its row; null where it is packed.
    pub key: *const u8,
    pub block: BlockId,
    pub slot: u32,
    /// How far the query is away.
    pub distance: i64,
}

/// How the keys of one head are made.
pub(super) struct Making<'a> {
    pub arena: &'a Arena,
    pub head: usize,
    /// To turn each key by its distance.
    pub distances: Option<Distances<'a>>,
    pub level: Level,
}

/// Makes row after row of `to`, `width` apart and zero beyond the channels: dropped channels are zero, codes become numbers. Asks the
/// memory for those that are next.
///
/// # Safety
/// The level is available; the sources are keys of the head in blocks with memory; `to` has a row for each.
pub(super) unsafe fn make(making: &Making<'_>, sources: &[Source], ahead: &[Source], width: usize, to: &mut [f32]) {
    match making.arena.dtype() {
        Dtype::F32 => dispatch!(
            making.level,
            run::<f32>(making: &Making<'_>, sources: &[Source], ahead: &[Source], width: usize, to: &mut [f32]) -> ()
        ),
        Dtype::BF16 => dispatch!(
            making.level,
            run::<bf16>(making: &Making<'_>, sources: &[Source], ahead: &[Source], width: usize, to: &mut [f32]) -> ()
        ),
        Dtype::F16 => dispatch!(
            making.level,
            run::<f16>(making: &Making<'_>, sources: &[Source], ahead: &[Source], width: usize, to: &mut [f32]) -> ()
        ),
    }
}

/// # Safety
/// As for [`make`]; `E` is the arena's dtype.
#[inline(always)]
unsafe fn run<S: Simd, E: Elem>(
    making: &Making<'_>,
    sources: &[Source],
    ahead: &[Source],
    width: usize,
    to: &mut [f32],
) {
    let dim = making.arena.key_dim();
    let lines = (dim * size_of::<E>()).div_ceil(64);
    let mut trig = vec![0f32; making.distances.as_ref().map_or(0, |d| d.rope().rotary_dim())];
    let coded = making.arena.packed().filter(|packed| packed.packing().key_bits > 0);
    let mut scratch = vec![0f32; coded.map_or(0, |packed| 3 * packed.packing().key_kept)];
    for (i, (source, row)) in sources.iter().zip(to.chunks_exact_mut(width)).enumerate() {
        if let Some(next) = ahead.get(i) {
            // SAFETY: any address may be asked for.
            unsafe {
                if next.key.is_null() {
                    ask_columns::<S, E>(making, next);
                } else {
                    (0..lines).for_each(|line| S::prefetch(next.key.wrapping_add(line * 64)));
                }
            }
        }
        let (row, rest) = row.split_at_mut(dim);
        rest.fill(0.0);
        if source.key.is_null() {
            // SAFETY: the caller's promise.
            unsafe { unpack::<S, E>(making, source, &mut scratch, row) };
        } else {
            // SAFETY: a row of `dim` elements of the arena's dtype.
            unsafe { load_row::<S, E>(source.key.cast(), row) };
        }
        if let Some(distances) = &making.distances {
            distances.trig(source.distance, &mut trig);
            let (cos, sin) = trig.split_at_mut(distances.rope().inv_freq().len());
            // Back to where the query is.
            sin.iter_mut().for_each(|x| *x = -*x);
            rotate_row(row, cos, sin, distances.rope().layout());
        }
    }
}

/// Asks for a packed key, which lies in columns: two channels to a word in `bf16`, several codes to one.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn ask_columns<S: Simd, E: Elem>(making: &Making<'_>, source: &Source) {
    let Some(packed) = making.arena.packed() else { return };
    let Packing { key_kept: kept, key_bits: bits, group, .. } = packed.packing();
    let rows = packed.rows(source.block, making.head, 0);
    let (width, columns) = match bits {
        0 if E::IS_BF16 => (4, kept.div_ceil(2)),
        0 => (size_of::<E>(), kept),
        _ => (4, packed.key_bytes().div_ceil(4)),
    };
    for column in 0..columns {
        let at = (column * rows.slots + source.slot as usize) * width;
        // SAFETY: any address may be asked for.
        unsafe { S::prefetch(rows.keys.wrapping_add(at)) };
    }
    let scales = rows.key_scales.wrapping_add(source.slot as usize / group * 2 * kept).cast::<u8>();
    for at in (0..if bits > 0 { 4 * kept } else { 0 }).step_by(64) {
        // SAFETY: as above.
        unsafe { S::prefetch(scales.wrapping_add(at)) };
    }
}

/// # Safety
/// As for [`Simd`]; the source is a packed key of the head, in a block with memory; `E` is the arena's dtype; a row has all channels;
/// `scratch` has three numbers for each kept channel where keys are codes.
#[inline(always)]
unsafe fn unpack<S: Simd, E: Elem>(making: &Making<'_>, source: &Source, scratch: &mut [f32], row: &mut [f32]) {
    let Some(packed) = making.arena.packed() else { return };
    let rows = packed.rows(source.block, making.head, 0);
    let (index, slot) = (rows.channels.of(making.head), source.slot as usize);
    row.fill(0.0);
    let Packing { key_bits: bits, group, .. } = packed.packing();
    if bits > 0 {
        let kept = index.len();
        let (steps, rest) = scratch.split_at_mut(kept);
        let (leasts, codes) = rest.split_at_mut(kept);
        // SAFETY: the scales of the slot's group; codes of the block, as `Packed` says they lie.
        unsafe {
            let scales = rows.key_scales.add(slot / group * 2 * kept).cast::<f16>();
            load_row::<S, f16>(scales, steps);
            load_row::<S, f16>(scales.add(kept), leasts);
            read_codes(rows.keys, packed.key_bytes(), bits, slot, codes);
        }
        for ((&c, code), (&step, &least)) in index.iter().zip(&*codes).zip(steps.iter().zip(&*leasts)) {
            row[usize::from(c)] = step.mul_add(*code, least);
        }
        return;
    }
    // In `bf16` two channels are a word, but for the last of an odd number.
    let in_words = if E::IS_BF16 { index.len() / 2 * 2 } else { 0 };
    let (pairs, rest) = index.split_at(in_words);
    for (word, pair) in pairs.chunks_exact(2).enumerate() {
        // SAFETY: a word of the block, which has so many for each slot.
        let word = unsafe { *rows.keys.cast::<u32>().add(word * rows.slots + slot) };
        row[usize::from(pair[0])] = f32::from_bits(word << 16);
        row[usize::from(pair[1])] = f32::from_bits(word & 0xffff_0000);
    }
    for (c, &channel) in rest.iter().enumerate() {
        // SAFETY: a number of the block, likewise.
        let x = unsafe { *rows.keys.cast::<E>().add((in_words + c) * rows.slots + slot) };
        row[usize::from(channel)] = x.to_f32();
    }
}

/// The codes of one key of a block that has `bytes` for each: words of several channels, even ones in the low half, odd ones in the high
/// half, the words of all slots side by side; then bytes in channel order, likewise.
///
/// # Safety
/// The block is readable.
#[inline(always)]
unsafe fn read_codes(keys: *const u8, bytes: usize, bits: u32, slot: usize, to: &mut [f32]) {
    let (block, each, words) = (BLOCK as usize, 32 / bits as usize, bytes / 4);
    let mask = (1u32 << bits) - 1;
    let (whole, rest) = to.split_at_mut((words * each).min(to.len()));
    for (i, to) in whole.chunks_mut(each).enumerate() {
        // SAFETY: the words of all slots lie in the block.
        let word = unsafe { *keys.cast::<u32>().add(i * block + slot) };
        for (at, to) in to.iter_mut().enumerate() {
            *to = (word >> (at as u32 / 2 * bits + at as u32 % 2 * 16) & mask) as f32;
        }
    }
    for (at, to) in rest.iter_mut().enumerate() {
        let bit = at * bits as usize;
        // SAFETY: the bytes that are left lie behind the words.
        let byte = unsafe { *keys.add(words * block * 4 + bit / 8 * block + slot) };
        *to = (u32::from(byte) >> (bit % 8) & mask) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{PACKED, Run};
    use crate::kernels::isa::levels;
    use crate::plan::Move;
    use crate::storage::packed::{Channels, Chosen};
    use crate::tensor::Elems;
    use std::sync::Arc;

    /// Number for number what the store says it holds.
    #[test]
    fn packed_keys_are_made_as_they_are_stored() {
        let mut state = 1u64;
        let mut next = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        for round in 0..120 {
            let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
            let (heads, dim, bits) = (1 + next(2), [8, 33, 64, 128][next(4)], [0, 2, 4, 8][next(4)]);
            let kept = 1 + next(dim);
            let mut arena = Arena::new(heads, dim, dim, dtype).unwrap();
            let numbers: Vec<f32> = (0..heads * 64 * dim).map(|_| next(2001) as f32 / 500.0 - 2.0).collect();
            let narrow: Vec<u16> = numbers
                .iter()
                .map(|&x| if dtype == Dtype::BF16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() })
                .collect();
            let elems = if dtype == Dtype::F32 { Elems::F32(&numbers) } else { Elems::Bits(&narrow) };
            arena.write(&[Run { block: BlockId(0), lo: 0, hi: 64 }], elems, elems).unwrap();
            let group = [1, 8, 32][next(3)];
            let packing = Packing { key_kept: kept, key_bits: bits, value_bits: 0, group };
            arena.set_packing(packing).unwrap();
            let first = next(dim - kept + 1) as i64;
            let index: Vec<i64> = (0..heads).flat_map(|_| first..first + kept as i64).collect();
            let channels = Arc::new(Channels::new(&index, &vec![0; heads], dim).unwrap());
            let to = BlockId(PACKED);
            let all = Move { from: BlockId(0), from_slot: 0, to, to_slot: 0, len: 64 };
            arena.pack(&[all], &Chosen::New(channels)).unwrap();
            let (head, width) = (next(heads), dim.next_multiple_of(32));
            let sources: Vec<Source> = (0..9)
                .map(|_| Source { key: std::ptr::null(), block: to, slot: next(64) as u32, distance: 0 })
                .collect();
            for level in levels() {
                let making = Making { arena: &arena, head, distances: None, level };
                let mut rows = vec![f32::NAN; sources.len() * width];
                // SAFETY: the level is available; packed slots of a head; a row for each.
                unsafe { make(&making, &sources, &sources, width, &mut rows) };
                for (row, source) in rows.chunks_exact(width).zip(&sources) {
                    let exact = arena.token(source.block, head, source.slot).unwrap().0;
                    let got: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                    assert_eq!(got[..dim], exact, "{level:?} {dtype:?} {packing:?}");
                    assert!(got[dim..].iter().all(|&x| x == 0.0));
                }
            }
        }
    }
}
