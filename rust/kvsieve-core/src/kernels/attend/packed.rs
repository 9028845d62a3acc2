//! Scores of packed keys: queries meet the kept channels only.

use half::bf16;

use super::ahead::Ahead;
use super::codes::{Codes, Keys, of_bits};
use super::heads::by_heads;
use super::job::Job;
use super::scratch::Parts;
use super::thin::{Columns, SLOTS, asks, score_columns, score_columns_turned};
use super::tile::{Piece, TILE};
use super::trig::SpanTrig;
use super::units::Common;
use crate::ids::BLOCK;
use crate::kernels::simd::{Elem, Simd};
use crate::rope::{Layout, Rope};
use crate::storage::packed::{Channels, Packed, Packing};

/// Keys of a packed block, from number `at` of the tile on.
pub(super) struct PackedPiece<'a, 'b, E> {
    pub packed: &'b Packed,
    pub channels: &'a Channels,
    pub piece: &'b Piece<E>,
    pub at: usize,
}

/// For which channels and rotation the thin queries were made, and for which channels the rotations of slots.
#[derive(Default)]
pub(super) struct Thin<'a> {
    queries: Option<(&'a Channels, u32)>,
    trig: Option<&'a Channels>,
}

/// Which pair of `rope` the first of two kept channels belongs to.
#[inline(always)]
fn pair_of(channel: u16, layout: Layout) -> usize {
    match layout {
        Layout::Half => channel.into(),
        Layout::Interleaved => channel as usize / 2,
    }
}

/// Scores a piece of packed keys.
///
/// # Safety
/// As for [`super::unit::run_unit`].
#[inline(always)]
pub(super) unsafe fn score_packed<'a, S: Codes, E: Elem>(
    job: &Job<'_, '_>,
    this: &PackedPiece<'a, '_, E>,
    parts: &mut Parts<'_>,
    known: &mut Thin<'a>,
    ahead: &mut Ahead<'_>,
) {
    let PackedPiece { packed, channels, piece, .. } = *this;
    let same = |of: Option<&Channels>| of.is_some_and(|of| std::ptr::eq(of, channels));
    let bits = packed.packing().key_bits;
    let use_dots = takes_dots::<S, E>(job.common, bits);
    if !same(known.queries.map(|q| q.0)) || known.queries.is_none_or(|q| q.1 != piece.variant) {
        thin_queries(job, channels, piece.variant, use_dots, parts);
        known.queries = Some((channels, piece.variant));
    }
    let rope = job.common.args.trig.filter(|_| piece.rotate).map(|trig| &*trig.rope);
    if let Some(rope) = rope
        && !same(known.trig)
    {
        thin_rotations(rope, channels, job.kv_head, parts.thin_trig);
        known.trig = Some(channels);
    }
    // SAFETY: the caller's promise.
    unsafe {
        if bits > 0 {
            score_coded::<S, E>(job, this, rope.is_some(), parts, ahead);
        } else {
            score_numbers::<S, E>(job, this, (rope.is_some(), use_dots), parts, ahead);
        }
    }
}

/// Queries of the kept channels, rotated by the piece's shift; as `bf16` too, where those are used.
#[inline(always)]
fn thin_queries(job: &Job<'_, '_>, channels: &Channels, variant: u32, use_dots: bool, parts: &mut Parts<'_>) {
    let (width, kept) = (job.width, channels.kept());
    let (index, pairs) = (channels.of(job.kv_head), channels.pairs(job.kv_head));
    let Parts { base, thin, thin_dots, .. } = parts;
    for (from, to) in base.chunks_exact(width).zip(thin.chunks_exact_mut(width)) {
        for (x, &c) in to.iter_mut().zip(index) {
            *x = from[c as usize];
        }
        to[kept..].fill(0.0);
    }
    if let Some(trig) = job.common.args.trig
        && variant != 0
    {
        let SpanTrig { rope, table, .. } = trig;
        let all = rope.inv_freq().len();
        let (cos, sin) = table[(variant as usize - 1) * 2 * all..][..2 * all].split_at(all);
        for row in thin.chunks_exact_mut(width) {
            let (a, b) = row[..2 * pairs].split_at_mut(pairs);
            for ((a, b), &c) in a.iter_mut().zip(b).zip(index) {
                let (cos, sin) = (cos[pair_of(c, rope.layout())], sin[pair_of(c, rope.layout())]);
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    if use_dots {
        // SAFETY: as many halves as floats fit into the `thin_dots`, twice.
        let to = unsafe { std::slice::from_raw_parts_mut(thin_dots.as_mut_ptr().cast::<bf16>(), thin.len()) };
        to.iter_mut().zip(thin.iter()).for_each(|(to, &x)| *to = bf16::of_f32(x));
    }
}

/// The rotations of a block's slots, for the kept pairs of a head. The slots lie side by side, and so do their rotations.
#[inline(always)]
fn thin_rotations(rope: &Rope, channels: &Channels, kv_head: usize, to: &mut [f32]) {
    let (index, pairs) = (channels.of(kv_head), channels.pairs(kv_head));
    let all = rope.inv_freq().len();
    for (slot, from) in rope.in_block().chunks_exact(2 * all).enumerate() {
        for (i, &c) in index[..pairs].iter().enumerate() {
            let (pair, at) = (pair_of(c, rope.layout()), i * 2 * BLOCK as usize + slot);
            (to[at], to[at + BLOCK as usize]) = (from[pair], from[all + pair]);
        }
    }
}

/// Scores keys that lie as codes; `turned`: that are to be rotated.
///
/// # Safety
/// As for [`score_packed`].
#[inline(always)]
unsafe fn score_coded<S: Codes, E: Elem>(
    job: &Job<'_, '_>,
    this: &PackedPiece<'_, '_, E>,
    turned: bool,
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let PackedPiece { packed, channels, piece, at } = *this;
    let Job { kv_head, width, group, .. } = *job;
    let Packing { group: tokens, key_bits: bits, .. } = packed.packing();
    let (scales, bytes) = (packed.rows(piece.block, kv_head, 0).key_scales, packed.key_bytes());
    let (codes, slot, len) = (piece.keys.cast(), piece.slot as usize, piece.len);
    let keys = Keys { codes, scales, bytes, kept: channels.kept(), group: tokens, slot, len };
    let scratch = parts.keys.as_mut_ptr();
    let to = parts.scores[at..].as_mut_ptr();
    // SAFETY: the piece lies in its block; queries and scores for the heads from `h` on, of which there are at least `HB`, at most
    // four; the scratch memory has a whole query for each slot; `pairs` rotations for each slot.
    unsafe {
        for h in (0..group).step_by(S::HEADS) {
            let queries = (parts.thin[h * width..].as_ptr(), width);
            let (heads, to) = (S::HEADS.min(group - h), to.add(h * TILE));
            if turned {
                let trig = (parts.thin_trig.as_ptr(), channels.pairs(kv_head));
                S::SCORE_TURNED[heads - 1](&keys, bits, trig, queries, scratch, to, ahead);
            } else {
                S::SCORE[of_bits(bits)][heads - 1](&keys, queries, scratch, to, ahead);
            }
        }
    }
}

/// Scores keys that lie as numbers.
///
/// # Safety
/// As for [`score_packed`].
#[inline(always)]
unsafe fn score_numbers<S: Simd, E: Elem>(
    job: &Job<'_, '_>,
    this: &PackedPiece<'_, '_, E>,
    (turned, use_dots): (bool, bool),
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let PackedPiece { channels, piece, at, .. } = *this;
    let Job { kv_head, width, group, .. } = *job;
    let have = piece.slots as usize;
    let (slot, len) = (piece.slot as usize, piece.len);
    let columns = Columns { keys: piece.keys, kept: channels.kept(), slots: have, slot, len };
    let dots = (use_dots && piece.variant == 0).then_some(parts.thin_dots.as_ptr().cast::<bf16>());
    let queries = |h: usize| (parts.thin[h * width..].as_ptr(), width);
    let to = parts.scores[at..].as_mut_ptr();
    // SAFETY: the piece lies in its block; queries and scores for the heads from `h` on, of which there are at least `HB`; `pairs`
    // rotations for each slot.
    unsafe {
        if turned {
            let trig = (parts.thin_trig.as_ptr(), channels.pairs(kv_head));
            by_heads!(group, |h, HB| {
                let (queries, to) = (queries(h), to.add(h * TILE));
                if have == SLOTS {
                    score_columns_turned::<S, E, HB, SLOTS>(&columns, trig, queries, to, ahead);
                } else {
                    score_columns_turned::<S, E, HB, 0>(&columns, trig, queries, to, ahead);
                }
            });
        } else {
            by_heads!(group, |h, HB| {
                let (queries, dots) = (queries(h), dots.map(|dots| dots.wrapping_add(h * width)));
                let to = to.add(h * TILE);
                if have == SLOTS {
                    score_columns::<S, E, HB, SLOTS>(&columns, queries, dots, to, ahead);
                } else {
                    score_columns::<S, E, HB, 0>(&columns, queries, dots, to, ahead);
                }
            });
        }
    }
}

/// Whether packed keys, as numbers, meet queries in `bf16`.
#[inline(always)]
fn takes_dots<S: Simd, E: Elem>(common: &Common<'_>, bits: u32) -> bool {
    S::DOTS && E::IS_BF16 && bits == 0 && common.factor == 1.0
}

/// How often scoring packed keys asks for memory, for each number of heads that it takes at a time.
#[inline(always)]
pub(super) fn packed_calls<S: Simd, E: Elem>(packed: &Packed, piece: &Piece<E>, len: usize) -> usize {
    let Packing { key_kept: kept, key_bits: bits, .. } = packed.packing();
    match bits {
        _ if piece.rotate => len.div_ceil(2 * S::LANES) * kept / if bits > 0 { 1 } else { 2 },
        0 => asks::<S, E>(kept, len),
        _ => len.div_ceil(2 * S::LANES) * packed.key_bytes().div_ceil(4),
    }
}
