//! One unit of work: the queries of one group over a stretch of spans, tile by tile.

use half::bf16;

use super::ahead::Ahead;
use super::codes::Codes;
use super::inner::softmax;
use super::job::Job;
use super::scores::{Known, score_calls, score_tile};
use super::scratch::{Parts, Scratch};
use super::sums::{weigh_calls, weigh_tile};
use super::tile::{TILE, Tile};
use super::units::{Common, Unit};
use crate::kernels::rotate::load_row;
use crate::kernels::simd::{Elem, Simd, tanh};

/// # Safety
/// As for [`Simd`]; all spans lie in blocks with memory; `E` is the dtype of arena and queries; `D` is 0 or both dims, and 0 where
/// there are packed blocks.
#[inline(always)]
pub(super) unsafe fn run_unit<S: Codes, E: Elem, const D: usize>(
    common: &Common<'_>,
    unit: &mut Unit<'_>,
    scratch: &mut Scratch,
) {
    let job = Job::new::<S, E, D>(common, unit.kv_head);
    let mut parts = scratch.cut(job.group, job.width, job.value_width, job.packed.is_some());
    // SAFETY: the caller's promise.
    unsafe { start::<S, E>(&job, unit.item, &mut parts) };

    // Two, by turns: while one is worked on, the other is already on its way from memory.
    let mut tiles = [Tile::<E>::new(), Tile::<E>::new()];
    let mut turn = 0;
    let (mut next, end) = (unit.spans.start, unit.spans.end);
    let mut done = 0;
    let mut known = Known::default();
    tiles[0].fill::<D>(common, unit.kv_head, &mut next, end);
    while tiles[turn].len > 0 {
        tiles[1 - turn].fill::<D>(common, unit.kv_head, &mut next, end);
        let (tile, following) = (&tiles[turn], &tiles[1 - turn]);

        // Of the next tile, its keys while this one is scored, and its values while this one is weighed: memory is read at one pace.
        let mut stretches = [(std::ptr::null(), 0); TILE];
        let mut ahead = Ahead::new(following.stretches(false, &mut stretches), score_calls::<S, E>(&job, tile));
        // SAFETY: the caller's promise: every piece lies in its block.
        unsafe {
            ask_for_scales::<S, E>(&job, following);
            score_tile::<S, E>(&job, tile, &mut parts, &mut known, &mut ahead);
            make_weights::<S>(&job, (done, tile.len), unit.logits, &mut parts, &mut ahead);
        }

        if common.values {
            let mut stretches = [(std::ptr::null(), 0); TILE];
            let mut ahead = Ahead::new(following.stretches(true, &mut stretches), weigh_calls::<S, E>(&job, tile));
            // SAFETY: as above.
            unsafe { weigh_tile::<S, E>(&job, tile, &mut parts, &mut ahead) };
        }
        done += tile.len;
        turn = 1 - turn;
    }
    finish(&job, &parts, unit.partial);
}

/// Copies the group's queries, with the rope's factor where it is still missing.
///
/// # Safety
/// As for [`Simd`]; `E` is the dtype of the queries.
#[inline(always)]
unsafe fn load_queries<S: Simd, E: Elem>(job: &Job<'_, '_>, item: usize, base: &mut [f32]) {
    let common = job.common;
    let [_, _, queries, dim] = common.args.q.shape();
    for (g, to) in base.chunks_exact_mut(job.width).enumerate() {
        let from = common.args.q.row(item / queries, job.kv_head * common.group + g, item % queries);
        // SAFETY: a checked row of `dim` elements of the dtype that the caller vouches for.
        unsafe { load_row::<S, E>(from.as_bytes_ptr().cast(), &mut to[..dim]) };
        to[dim..].fill(0.0);
        if common.factor != 1.0 {
            let rotary = common.args.trig.map_or(0, |trig| trig.rope.rotary_dim());
            to[..rotary].iter_mut().for_each(|x| *x *= common.factor);
        }
    }
}

/// Loads the queries of the group, and begins with sums of nothing.
///
/// # Safety
/// As for [`load_queries`].
#[inline(always)]
unsafe fn start<S: Simd, E: Elem>(job: &Job<'_, '_>, item: usize, parts: &mut Parts<'_>) {
    // SAFETY: the caller's promise.
    unsafe { load_queries::<S, E>(job, item, parts.base) };
    if job.use_dots {
        // SAFETY: as many halves as floats fit into the `dots`, twice.
        let to = unsafe { std::slice::from_raw_parts_mut(parts.dots.as_mut_ptr().cast::<bf16>(), parts.base.len()) };
        // The queries were `bf16`, so nothing is rounded.
        to.iter_mut().zip(parts.base.iter()).for_each(|(to, &x)| *to = bf16::of_f32(x));
    }
    parts.sums.fill(0.0);
    parts.max.fill(f32::NEG_INFINITY);
    parts.total.fill(0.0);
}

/// Asks for the scales of the next tile's codes, all at once: they are few.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn ask_for_scales<S: Simd, E: Elem>(job: &Job<'_, '_>, following: &Tile<'_, E>) {
    if let Some(packed) = job.packed
        && following.num_pieces > 0
        && following.channels.is_some()
    {
        let rows = packed.rows(following.pieces[0].block, job.kv_head, 0);
        for (scales, bytes) in [rows.key_scales, rows.value_scales].into_iter().zip(packed.scale_bytes()) {
            for line in (0..bytes).step_by(64) {
                // SAFETY: prefetching reads nothing; any address will do.
                unsafe { S::prefetch(scales.cast::<u8>().wrapping_add(line)) };
            }
        }
    }
}

/// Makes the scores of a tile of `len` keys weights; `logits` remembers the scores from number `done` on, where there is room for them.
///
/// # Safety
/// As for [`Simd`]; a tile of scores for each head of the group.
#[inline(always)]
unsafe fn make_weights<S: Simd>(
    job: &Job<'_, '_>,
    (done, len): (usize, usize),
    logits: &mut [f32],
    parts: &mut Parts<'_>,
    ahead: &mut Ahead<'_>,
) {
    let (args, value_width) = (job.common.args, job.value_width);
    let unit_keys = logits.len() / job.group;
    for g in 0..job.group {
        let scores = &mut parts.scores[g * TILE..(g + 1) * TILE];
        // SAFETY: a whole tile of scores, in whole vectors.
        unsafe { scale_logits::<S>(&mut scores[..len.next_multiple_of(S::LANES)], args.scale, args.softcap) };
        if unit_keys > 0 {
            logits[g * unit_keys + done..][..len].copy_from_slice(&scores[..len]);
        }
        let sums = &mut parts.sums[g * value_width..(g + 1) * value_width];
        // SAFETY: a whole tile of scores; sums are padded to whole vectors.
        unsafe { softmax::<S>(scores, len, (&mut parts.max[g], &mut parts.total[g]), sums, ahead) };
    }
}

/// Hands over what was found.
fn finish(job: &Job<'_, '_>, parts: &Parts<'_>, partial: &mut [f32]) {
    let Job { value_dim, value_width, group, .. } = *job;
    for g in 0..group {
        partial[g * value_dim..(g + 1) * value_dim]
            .copy_from_slice(&parts.sums[g * value_width..g * value_width + value_dim]);
    }
    partial[group * value_dim..group * (value_dim + 1)].copy_from_slice(&parts.max[..group]);
    partial[group * (value_dim + 1)..].copy_from_slice(&parts.total[..group]);
}

/// Scores to logits.
///
/// # Safety
/// As for [`Simd`]; whole vectors.
#[inline(always)]
unsafe fn scale_logits<S: Simd>(scores: &mut [f32], scale: f32, softcap: Option<f32>) {
    for x in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: a vector of scores.
        unsafe {
            let y = S::mul(S::load(x.as_ptr()), S::splat(scale));
            let y = match softcap {
                Some(cap) => S::mul(S::splat(cap), tanh::<S>(S::mul(y, S::splat(1.0 / cap)))),
                None => y,
            };
            S::store(x.as_mut_ptr(), y);
        }
    }
}
