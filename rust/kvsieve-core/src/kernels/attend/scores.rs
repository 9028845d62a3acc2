//! Scores of a tile: queries against keys, however they lie.

use half::bf16;

use super::ahead::Ahead;
use super::codes::Codes;
use super::heads::by_heads;
use super::inner::{Rows, score, score_dots, score_turned};
use super::job::Job;
use super::packed::{PackedPiece, Thin, packed_calls, score_packed};
use super::scratch::Parts;
use super::tile::{Piece, TILE, Tile};
use crate::kernels::four::{Queries, four};
use crate::kernels::rotate::{load_row, rotate_row};
use crate::kernels::simd::{Elem, Simd};
use crate::rope::{Layout, Rope};

/// What the scratch memory holds from piece to piece.
#[derive(Default)]
pub(super) struct Known<'a> {
    /// For which rotation the queries were turned.
    variant: u32,
    thin: Thin<'a>,
}

/// How often scoring a tile and making its weights ask for memory.
#[inline(always)]
pub(super) fn score_calls<S: Simd, E: Elem>(job: &Job<'_, '_>, tile: &Tile<'_, E>) -> usize {
    let first = &tile.pieces[0];
    let step = if job.use_dots && first.variant == 0 && !first.rotate { 2 * S::LANES } else { S::LANES };
    let calls = match job.packed {
        Some(packed) if tile.channels.is_some() => packed_calls::<S, E>(packed, first, tile.len),
        _ => tile.len * job.dim / (4 * step),
    };
    calls * job.passes::<S>() + job.group * tile.len / S::LANES
}

/// Scores of all keys of a tile, for each head of the group.
///
/// # Safety
/// As for [`super::unit::run_unit`].
#[inline(always)]
pub(super) unsafe fn score_tile<'a, S: Codes, E: Elem>(
    job: &Job<'_, '_>,
    tile: &Tile<'a, E>,
    parts: &mut Parts<'_>,
    known: &mut Known<'a>,
    ahead: &mut Ahead<'_>,
) {
    if tile.is_scattered() {
        // SAFETY: the caller's promise: every piece has `len` rows of `dim` elements.
        return unsafe { score_scattered::<S, E>(job, tile, parts, ahead) };
    }
    let mut at = 0;
    for piece in tile.pieces() {
        // SAFETY: the caller's promise; there are scores for all heads, from where the piece begins.
        unsafe {
            if let (Some(packed), Some(channels)) = (job.packed, tile.channels) {
                let this = PackedPiece { packed, channels, piece, at };
                score_packed::<S, E>(job, &this, parts, &mut known.thin, ahead);
            } else {
                score_rows::<S, E>(job, (piece, at), parts, &mut known.variant, ahead);
            }
        }
        at += piece.len;
    }
}

/// Scores of a piece of plain keys, from number `at` of the tile on.
///
/// # Safety
/// As for [`score_tile`].
#[inline(always)]
unsafe fn score_rows<S: Simd, E: Elem>(
    job: &Job<'_, '_>,
    (piece, at): (&Piece<E>, usize),
    parts: &mut Parts<'_>,
    variant: &mut u32,
    ahead: &mut Ahead<'_>,
) {
    let Job { dim, width, group, use_dots, .. } = *job;
    let args = job.common.args;
    if let Some(trig) = args.trig
        && piece.variant != 0
        && piece.variant != *variant
    {
        *variant = piece.variant;
        let pairs = trig.rope.inv_freq().len();
        let (cos, sin) = trig.table[(*variant as usize - 1) * 2 * pairs..][..2 * pairs].split_at(pairs);
        for (from, to) in parts.base.chunks_exact(width).zip(parts.turned.chunks_exact_mut(width)) {
            to.copy_from_slice(from);
            rotate_row(to, cos, sin, trig.rope.layout());
        }
    }
    let q: &[f32] = if piece.variant == 0 { parts.base } else { parts.turned };
    let rope = args.trig.filter(|_| piece.rotate).map(|trig| &trig.rope);
    let rows = |h: usize| {
        let queries = q[h * width..].as_ptr();
        Rows { keys: piece.keys, n: piece.len, dim, queries, width }
    };
    let to = parts.scores.as_mut_ptr();
    // SAFETY: `piece.len` rows of `dim` elements at all places; queries and scores for the heads from `h` on, of which there are at
    // least `HB`; the table of the rope has `BLOCK` rows, and the piece lies inside one block.
    unsafe {
        match rope {
            None if use_dots && piece.variant == 0 => by_heads!(group, |h, HB| {
                let queries = parts.dots.as_ptr().cast::<bf16>().add(h * width).cast();
                let rows = Rows { queries, ..rows(h).of_bf16() };
                score_dots::<S, HB>(&rows, to.add(h * TILE + at), ahead);
            }),
            None => by_heads!(group, |h, HB| score::<S, E, HB>(&rows(h), to.add(h * TILE + at), ahead)),
            Some(rope) if turns_by_vectors::<S>(rope, dim) => {
                let pairs = rope.inv_freq().len();
                let trig = (rope.in_block()[piece.slot as usize * 2 * pairs..].as_ptr(), pairs);
                by_heads!(group, |h, HB| score_turned::<S, E, HB>(&rows(h), trig, to.add(h * TILE + at), ahead));
            }
            Some(rope) => {
                rotate_keys::<S, E>(piece, rope, dim, parts.keys);
                let keys = parts.keys.as_ptr();
                by_heads!(group, |h, HB| {
                    let Rows { n, dim, queries, width, .. } = rows(h);
                    let rows = Rows { keys, n, dim, queries, width };
                    score::<S, f32, HB>(&rows, to.add(h * TILE + at), ahead);
                });
            }
        }
    }
}

/// Rotates the keys of a piece by their slots, into `[TILE][dim]`: for layouts of pairs that [`score_turned`] does not take.
///
/// # Safety
/// As for [`Simd`]; the piece holds `len` rows of `dim` elements.
#[inline(always)]
unsafe fn rotate_keys<S: Simd, E: Elem>(piece: &Piece<E>, rope: &Rope, dim: usize, to: &mut [f32]) {
    let pairs = rope.inv_freq().len();
    let table = rope.in_block();
    for (i, to) in to.chunks_exact_mut(dim).enumerate().take(piece.len) {
        let trig = &table[(piece.slot as usize + i) * 2 * pairs..][..2 * pairs];
        // SAFETY: row `i` of the piece has `dim` elements.
        unsafe { load_row::<S, E>(piece.keys.add(i * dim), to) };
        rotate_row(to, &trig[..pairs], &trig[pairs..], rope.layout());
    }
}

/// Whether [`score_turned`] can do it.
#[inline(always)]
fn turns_by_vectors<S: Simd>(rope: &Rope, dim: usize) -> bool {
    rope.layout() == Layout::Half && rope.inv_freq().len().is_multiple_of(S::LANES) && dim.is_multiple_of(S::LANES)
}

/// Scores of a tile of short pieces, four keys at a time.
///
/// # Safety
/// As for [`super::unit::run_unit`]; every piece has rows of the job's channels.
#[inline(always)]
unsafe fn score_scattered<S: Simd, E: Elem>(
    job: &Job<'_, '_>,
    tile: &Tile<'_, E>,
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let Job { dim, width, group, use_dots, .. } = *job;
    let queries = Queries { wide: parts.base.as_ptr(), dots: parts.dots.as_ptr().cast(), width };
    let mut rows = [std::ptr::null(); TILE];
    let mut n = 0;
    for piece in tile.pieces() {
        for i in 0..piece.len {
            rows[n] = piece.keys.wrapping_add(i * dim);
            n += 1;
        }
    }
    // A tile is whole fours; the last key stands in for those that are missing.
    let end = n.next_multiple_of(4);
    for i in n..end {
        rows[i] = rows[n - 1];
    }
    let calls = dim.div_ceil(if use_dots { 2 * S::LANES } else { S::LANES });
    for i in (0..end).step_by(4) {
        let keys = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
        let to = parts.scores.as_mut_ptr();
        by_heads!(group, |h, HB| {
            // SAFETY: four rows of `dim` elements; `HB` queries and rows of scores from `h` on.
            unsafe {
                let to = to.add(h * TILE + i);
                if use_dots {
                    four::<S, E, HB, true>(keys, &queries.from(h), dim, to, TILE);
                } else {
                    four::<S, E, HB, false>(keys, &queries.from(h), dim, to, TILE);
                }
                for _ in 0..calls {
                    ahead.ask::<S>();
                }
            }
        });
    }
}
