//! Keys made into rows of `f32`, whatever a block stores, and turned to their distances: for scoring a key here and a key there.

use half::{bf16, f16};

use super::isa::Level;
use super::rotate::{Distances, load_row, rotate_row};
use super::simd::{Elem, Simd, dispatch};
use super::view::Dtype;
use crate::ids::BlockId;
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
            for line in 0..lines {
                // SAFETY: any address may be asked for; that of a packed key is null.
                unsafe { S::prefetch(next.key.wrapping_add(line * 64)) };
            }
        }
        let (row, rest) = row.split_at_mut(dim);
        rest.fill(0.0);
        if source.key.is_null() {
            // SAFETY: the caller's promise.
            unsafe { unpack(making, source, row) };
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

/// # Safety
/// The source is a packed key of the head, in a block with memory.
unsafe fn unpack(making: &Making<'_>, source: &Source, row: &mut [f32]) {
    let Some(packed) = making.arena.packed() else { return };
    let channels = packed.rows(source.block, making.head, source.slot).channels;
    // As many numbers as a row, of which the kept ones come first; then each goes to its place.
    let mut thin = vec![0f32; channels.kept()];
    // SAFETY: the caller's promise.
    unsafe { packed.keys_f32(source.block, making.head, source.slot, &mut thin) };
    row.fill(0.0);
    thin.iter().zip(channels.of(making.head)).for_each(|(&x, &c)| row[usize::from(c)] = x);
}
