//! Weighted sums of a tile's values, however they lie.

use super::ahead::Ahead;
use super::codes::{Codes, Values, code_passes, of_bits};
use super::heads::by_heads;
use super::inner::{passes, weigh_all};
use super::job::Job;
use super::scratch::Parts;
use super::tile::{Piece, TILE, Tile};
use crate::kernels::simd::{Elem, Simd};
use crate::storage::packed::{PAIRED, Packed};

/// Bits of the codes that a tile's values lie as; 0 where they lie as numbers.
#[inline(always)]
fn code_bits<E: Elem>(job: &Job<'_, '_>, tile: &Tile<'_, E>) -> u32 {
    job.packed.map_or(0, |packed| if tile.channels.is_some() { packed.packing().value_bits } else { 0 })
}

/// Whether they lie as codes, in pairs of tokens.
#[inline(always)]
fn in_pairs(job: &Job<'_, '_>, bits: u32) -> bool {
    bits > 0 && job.packed.is_some_and(|packed| packed.packing().group >= PAIRED)
}

/// How often weighing a tile asks for memory.
#[inline(always)]
pub(super) fn weigh_calls<S: Simd, E: Elem>(job: &Job<'_, '_>, tile: &Tile<'_, E>) -> usize {
    let bits = code_bits(job, tile);
    match in_pairs(job, bits) {
        true => tile.len / 2 * job.passes::<S>() * code_passes::<S>(job.value_dim, bits),
        false => tile.len * job.passes::<S>() * passes::<S>(job.value_dim),
    }
}

/// Adds a tile's values to the sums of each head of the group, by their weights.
///
/// # Safety
/// As for [`super::unit::run_unit`].
#[inline(always)]
pub(super) unsafe fn weigh_tile<S: Codes, E: Elem>(
    job: &Job<'_, '_>,
    tile: &Tile<'_, E>,
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let bits = code_bits(job, tile);
    // SAFETY: the caller's promise.
    unsafe {
        match job.packed {
            Some(packed) if in_pairs(job, bits) => weigh_pairs::<S, E>(job, (packed, bits), tile, parts, ahead),
            Some(packed) if bits > 0 => weigh_numbers::<S, E>(job, packed, tile, parts, ahead),
            _ => weigh_pieces::<S, E>(job, tile.pieces(), parts, ahead),
        }
    }
}

/// Values that lie as codes in pairs of tokens, from where they lie.
///
/// # Safety
/// As for [`weigh_tile`].
#[inline(always)]
unsafe fn weigh_pairs<S: Codes, E: Elem>(
    job: &Job<'_, '_>,
    (packed, bits): (&Packed, u32),
    tile: &Tile<'_, E>,
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let Job { kv_head, value_dim, value_width, group, .. } = *job;
    let mut at = 0;
    for piece in tile.pieces() {
        let scales = packed.rows(piece.block, kv_head, 0).value_scales;
        let (codes, slot, len) = (piece.values.cast(), piece.slot as usize, piece.len);
        let mine = Values { codes, scales, dim: value_dim, group: packed.packing().group, slot, len };
        let (scores, scratch) = (parts.scores[at..].as_ptr(), parts.values.as_mut_ptr());
        let to = parts.sums.as_mut_ptr();
        // SAFETY: the piece lies in its block; weights and sums for the heads from `h` on, of which there are at least `HB`, at most
        // four; the scratch memory has `value_dim` numbers for each slot.
        unsafe {
            for h in (0..group).step_by(S::HEADS) {
                let to = (to.add(h * value_width), value_width);
                let weigh = S::WEIGH[of_bits(bits)][S::HEADS.min(group - h) - 1];
                weigh(&mine, scores.add(h * TILE), scratch, to, ahead);
            }
        }
        at += len;
    }
}

/// Values that lie as codes in rows, once they are numbers.
///
/// # Safety
/// As for [`weigh_tile`].
#[inline(always)]
unsafe fn weigh_numbers<S: Simd, E: Elem>(
    job: &Job<'_, '_>,
    packed: &Packed,
    tile: &Tile<'_, E>,
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let dim = job.value_dim;
    let mut at = 0;
    for piece in tile.pieces() {
        let to = &mut parts.values[at * dim..(at + piece.len) * dim];
        // SAFETY: the piece lies in its block; the tile has room for all its pieces.
        unsafe { packed.values_f32(piece.block, job.kv_head, piece.slot, to) };
        at += piece.len;
    }
    let pieces = [Piece::of_values(parts.values.as_ptr(), tile.len)];
    // SAFETY: as many rows of numbers.
    unsafe { weigh_pieces::<S, f32>(job, &pieces, parts, ahead) };
}

/// Values that lie as numbers.
///
/// # Safety
/// As for [`weigh_tile`]; weights and sums for all heads of the group.
#[inline(always)]
unsafe fn weigh_pieces<S: Simd, E: Elem>(
    job: &Job<'_, '_>,
    pieces: &[Piece<E>],
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let Job { value_dim, value_width, group, .. } = *job;
    by_heads!(group, |h, HB| {
        let (weights, to) =
            (parts.scores[h * TILE..].as_ptr(), (parts.sums[h * value_width..].as_mut_ptr(), value_width));
        // SAFETY: weights and sums for the heads from `h` on, of which there are at least `HB`.
        unsafe { weigh_all::<S, E, HB>(pieces, value_dim, weights, to, ahead) };
    });
}
