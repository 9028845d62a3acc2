//! Keys made into rows of `f32`, whatever a block stores, and turned to their distances: for scoring a key here and a key there.

use half::{bf16, f16};

use super::isa::Level;
use super::rotate::{Distances, load_row, rotate_row};
use super::simd::{Elem, Simd, dispatch};
use super::view::Dtype;
use crate::ids::{BLOCK, BlockId};
use crate::store::arena::Arena;

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
            unsafe { unpack::<E>(making, source, row) };
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

/// Asks for the numbers of a packed key, which lie in columns: two channels to a word in `bf16`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn ask_columns<S: Simd, E: Elem>(making: &Making<'_>, source: &Source) {
    let Some(packed) = making.arena.packed().filter(|packed| packed.packing().key_bits == 0) else { return };
    let (keys, kept) = (packed.rows(source.block, making.head, 0).keys, packed.packing().key_kept);
    let (width, columns) = if E::IS_BF16 { (4, kept.div_ceil(2)) } else { (size_of::<E>(), kept) };
    for column in 0..columns {
        let at = (column * BLOCK as usize + source.slot as usize) * width;
        // SAFETY: any address may be asked for.
        unsafe { S::prefetch(keys.wrapping_add(at)) };
    }
}

/// # Safety
/// The source is a packed key of the head, in a block with memory; `E` is the arena's dtype; a row has all channels.
#[inline(always)]
unsafe fn unpack<E: Elem>(making: &Making<'_>, source: &Source, row: &mut [f32]) {
    let Some(packed) = making.arena.packed() else { return };
    let rows = packed.rows(source.block, making.head, 0);
    let (index, slot) = (rows.channels.of(making.head), source.slot as usize);
    row.fill(0.0);
    if packed.packing().key_bits > 0 {
        let mut thin = vec![0f32; index.len()];
        // SAFETY: the caller's promise.
        unsafe { packed.keys_f32(source.block, making.head, source.slot, &mut thin) };
        thin.iter().zip(index).for_each(|(&x, &c)| row[usize::from(c)] = x);
        return;
    }
    // In `bf16` two channels are a word, but for the last of an odd number.
    let in_words = if E::IS_BF16 { index.len() / 2 * 2 } else { 0 };
    let (pairs, rest) = index.split_at(in_words);
    for (word, pair) in pairs.chunks_exact(2).enumerate() {
        // SAFETY: a word of the block, which has so many for each slot.
        let word = unsafe { *rows.keys.cast::<u32>().add(word * BLOCK as usize + slot) };
        row[usize::from(pair[0])] = f32::from_bits(word << 16);
        row[usize::from(pair[1])] = f32::from_bits(word & 0xffff_0000);
    }
    for (c, &channel) in rest.iter().enumerate() {
        // SAFETY: a number of the block, likewise.
        let x = unsafe { *rows.keys.cast::<E>().add((in_words + c) * BLOCK as usize + slot) };
        row[usize::from(channel)] = x.to_f32();
    }
}
