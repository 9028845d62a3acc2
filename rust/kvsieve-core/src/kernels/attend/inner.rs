//! The loops of the decode kernel: scores, weights and weighted sums of one tile.

use half::bf16;

use super::ahead::Ahead;
use super::tile::{Piece, TILE};
use crate::kernels::simd::{Elem, Simd, exp};

/// Rows of keys and the queries that meet them.
#[derive(Clone, Copy)]
pub(super) struct Rows<E> {
    /// `n` rows of `dim` elements, `dim` apart.
    pub keys: *const E,
    pub n: usize,
    pub dim: usize,
    /// Queries of `width` elements, zero beyond `dim`.
    pub queries: *const f32,
    pub width: usize,
}

impl<E> Rows<E> {
    /// The same rows of keys that are known to be `bf16`.
    #[inline(always)]
    pub fn of_bf16(self) -> Rows<bf16> {
        let Rows { keys, n, dim, queries, width } = self;
        Rows { keys: keys.cast(), n, dim, queries, width }
    }
}

/// Writes the sums of a row of accumulators for each of `HB` queries: `scores[h * TILE + i]`.
///
/// # Safety
/// As for [`Simd`]; four scores from `i` on for each query.
#[inline(always)]
unsafe fn put4<S: Simd, const HB: usize>(scores: *mut f32, i: usize, acc: [[S::V; 4]; HB]) {
    for (h, acc) in acc.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { S::sum4(scores.add(h * TILE + i), acc) };
    }
}

/// Scores keys against `HB` queries: `scores[h * TILE + i]`.
///
/// # Safety
/// As for [`Simd`]; the rows and `HB` queries are readable; `n` scores for each query.
#[inline(always)]
pub(super) unsafe fn score<S: Simd, E: Elem, const HB: usize>(rows: &Rows<E>, scores: *mut f32, ahead: &mut Ahead<'_>) {
    let Rows { keys, n, dim, queries, width } = *rows;
    let whole = dim / S::LANES * S::LANES;
    let mut i = 0;
    // SAFETY: rows `i..i + 4` are below `n`; channels below `dim`, the last few by a partial load; the queries are padded with
    // zeros to whole vectors.
    unsafe {
        while i + 4 <= n {
            let k = keys.add(i * dim);
            let mut acc = [[S::splat(0.0); 4]; HB];
            let mut c = 0;
            while c < whole {
                // Not by a closure: that would be compiled without the instruction set.
                let mut x = [S::splat(0.0); 4];
                for (j, x) in x.iter_mut().enumerate() {
                    *x = E::load::<S>(k.add(j * dim + c));
                }
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = S::load(queries.add(h * width + c));
                    for j in 0..4 {
                        acc[j] = S::fma(x[j], q, acc[j]);
                    }
                }
                ahead.ask::<S>();
                c += S::LANES;
            }
            if whole < dim {
                for j in 0..4 {
                    let x = E::load_part::<S>(k.add(j * dim + whole), dim - whole);
                    for (h, acc) in acc.iter_mut().enumerate() {
                        acc[j] = S::fma(x, S::load(queries.add(h * width + whole)), acc[j]);
                    }
                }
            }
            put4::<S, HB>(scores, i, acc);
            i += 4;
        }
        while i < n {
            let k = keys.add(i * dim);
            let mut acc = [S::splat(0.0); HB];
            let mut c = 0;
            while c < whole {
                let x = E::load::<S>(k.add(c));
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x, S::load(queries.add(h * width + c)), *acc);
                }
                c += S::LANES;
            }
            if whole < dim {
                let x = E::load_part::<S>(k.add(whole), dim - whole);
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x, S::load(queries.add(h * width + whole)), *acc);
                }
            }
            for (h, acc) in acc.iter().enumerate() {
                *scores.add(h * TILE + i) = S::sum(*acc);
            }
            i += 1;
        }
    }
}

/// [`score`] for raw keys, each turned on its way by the angles of its own row of `trig` (`pairs` cosines, then `pairs` sines).
///
/// # Safety
/// As for [`score`]; channel `i` pairs with `i + pairs`; `pairs` and `dim` are multiples of the lanes, `2 * pairs <= dim`; `n` rows
/// of `trig`.
#[inline(always)]
pub(super) unsafe fn score_turned<S: Simd, E: Elem, const HB: usize>(
    rows: &Rows<E>,
    (trig, pairs): (*const f32, usize),
    scores: *mut f32,
    ahead: &mut Ahead<'_>,
) {
    let Rows { keys, n, dim, queries, width } = *rows;
    let mut i = 0;
    // SAFETY: rows and trigonometry `i..i + 4` are below `n`; all channels below `dim`, in whole vectors.
    unsafe {
        while i + 4 <= n {
            let mut acc = [[S::splat(0.0); 4]; HB];
            // Two rows at a time: with four, what is turned and the sums would not fit into the registers.
            for two in [0, 2] {
                let (k, t) = (keys.add((i + two) * dim), trig.add((i + two) * 2 * pairs));
                let mut sums = [[S::splat(0.0); 2]; HB];
                let mut c = 0;
                while c < pairs {
                    let mut turned = [(S::splat(0.0), S::splat(0.0)); 2];
                    for (j, turned) in turned.iter_mut().enumerate() {
                        let (a, b) = (E::load::<S>(k.add(j * dim + c)), E::load::<S>(k.add(j * dim + pairs + c)));
                        let t = t.add(j * 2 * pairs + c);
                        let (cos, sin) = (S::load(t), S::load(t.add(pairs)));
                        *turned = (S::sub(S::mul(a, cos), S::mul(b, sin)), S::fma(b, cos, S::mul(a, sin)));
                    }
                    for (h, sums) in sums.iter_mut().enumerate() {
                        let q = queries.add(h * width + c);
                        let (qa, qb) = (S::load(q), S::load(q.add(pairs)));
                        for (turned, sum) in turned.iter().zip(sums) {
                            *sum = S::fma(turned.1, qb, S::fma(turned.0, qa, *sum));
                        }
                    }
                    ahead.ask::<S>();
                    c += S::LANES;
                }
                let mut c = 2 * pairs;
                while c < dim {
                    for j in 0..2 {
                        let x = E::load::<S>(k.add(j * dim + c));
                        for (h, sums) in sums.iter_mut().enumerate() {
                            sums[j] = S::fma(x, S::load(queries.add(h * width + c)), sums[j]);
                        }
                    }
                    c += S::LANES;
                }
                for (acc, sums) in acc.iter_mut().zip(&sums) {
                    (acc[two], acc[two + 1]) = (sums[0], sums[1]);
                }
            }
            put4::<S, HB>(scores, i, acc);
            i += 4;
        }
        while i < n {
            let (k, t) = (keys.add(i * dim), trig.add(i * 2 * pairs));
            let mut acc = [S::splat(0.0); HB];
            for c in (0..pairs).step_by(S::LANES) {
                let (a, b) = (E::load::<S>(k.add(c)), E::load::<S>(k.add(pairs + c)));
                let (cos, sin) = (S::load(t.add(c)), S::load(t.add(pairs + c)));
                let x = S::sub(S::mul(a, cos), S::mul(b, sin));
                let y = S::fma(b, cos, S::mul(a, sin));
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = queries.add(h * width + c);
                    *acc = S::fma(x, S::load(q), *acc);
                    *acc = S::fma(y, S::load(q.add(pairs)), *acc);
                }
            }
            for c in (2 * pairs..dim).step_by(S::LANES) {
                let x = E::load::<S>(k.add(c));
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x, S::load(queries.add(h * width + c)), *acc);
                }
            }
            for (h, acc) in acc.iter().enumerate() {
                *scores.add(h * TILE + i) = S::sum(*acc);
            }
            i += 1;
        }
    }
}

/// [`score`] of `bf16` keys and `bf16` queries (`queries` of [`Rows`] points at those), two products a lane.
///
/// # Safety
/// As for [`score`]; `S` has such products; `dim` is a multiple of `2 * LANES`; the queries are rows of `width` elements of `bf16`.
#[inline(always)]
pub(super) unsafe fn score_dots<S: Simd, const HB: usize>(rows: &Rows<bf16>, scores: *mut f32, ahead: &mut Ahead<'_>) {
    let Rows { keys, n, dim, queries, width } = *rows;
    let queries = queries.cast::<bf16>();
    let step = 2 * S::LANES;
    let mut i = 0;
    // SAFETY: rows `i..i + 4` are below `n`, channels below `dim`, in whole pairs of vectors.
    unsafe {
        while i + 4 <= n {
            let k = keys.add(i * dim);
            let mut acc = [[S::splat(0.0); 4]; HB];
            let mut c = 0;
            while c < dim {
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = queries.add(h * width + c);
                    for (j, acc) in acc.iter_mut().enumerate() {
                        *acc = S::dot_bf16(*acc, k.add(j * dim + c), q);
                    }
                }
                ahead.ask::<S>();
                c += step;
            }
            put4::<S, HB>(scores, i, acc);
            i += 4;
        }
        while i < n {
            let k = keys.add(i * dim);
            for h in 0..HB {
                let mut acc = S::splat(0.0);
                for c in (0..dim).step_by(step) {
                    acc = S::dot_bf16(acc, k.add(c), queries.add(h * width + c));
                }
                *scores.add(h * TILE + i) = S::sum(acc);
            }
            i += 1;
        }
    }
}

/// Adds the weighted values of a tile to `HB` sums, `C` vectors of channels from `c0` on. A partial last vector when `PART`.
///
/// # Safety
/// As for [`Simd`]; the pieces hold rows of `dim` elements; `HB` rows of weights and of sums.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Elem, const HB: usize, const C: usize, const PART: bool>(
    pieces: &[Piece<E>],
    (dim, c0): (usize, usize),
    weights: *const f32,
    (sums, width): (*mut f32, usize),
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: channels `c0..c0 + C * LANES` are below `dim` (below it by a partial load when `PART`), and below `width`, which is
    // whole vectors; key `t` of the tile has a weight.
    unsafe {
        let mut acc = [[S::splat(0.0); C]; HB];
        for (h, acc) in acc.iter_mut().enumerate() {
            for (j, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(sums.add(h * width + c0 + j * S::LANES));
            }
        }
        let mut t = 0;
        for piece in pieces {
            let mut v = piece.values.add(c0);
            for _ in 0..piece.len {
                let mut x = [S::splat(0.0); C];
                for (j, x) in x.iter_mut().enumerate() {
                    *x = if PART { E::load_part::<S>(v, dim - c0) } else { E::load::<S>(v.add(j * S::LANES)) };
                }
                for (h, acc) in acc.iter_mut().enumerate() {
                    let w = S::splat(*weights.add(h * TILE + t));
                    for j in 0..C {
                        acc[j] = S::fma(w, x[j], acc[j]);
                    }
                }
                ahead.ask::<S>();
                v = v.wrapping_add(dim);
                t += 1;
            }
        }
        for (h, acc) in acc.iter().enumerate() {
            for (j, acc) in acc.iter().enumerate() {
                S::store(sums.add(h * width + c0 + j * S::LANES), *acc);
            }
        }
    }
}

/// How often [`weigh_all`] goes over the keys.
pub(super) fn passes<S: Simd>(dim: usize) -> usize {
    let rest = dim % (4 * S::LANES);
    dim / (4 * S::LANES)
        + rest / (2 * S::LANES)
        + rest % (2 * S::LANES) / S::LANES
        + usize::from(!rest.is_multiple_of(S::LANES))
}

/// [`weigh`] for all channels.
///
/// # Safety
/// As for [`weigh`].
#[inline(always)]
pub(super) unsafe fn weigh_all<S: Simd, E: Elem, const HB: usize>(
    pieces: &[Piece<E>],
    dim: usize,
    weights: *const f32,
    (sums, width): (*mut f32, usize),
    ahead: &mut Ahead<'_>,
) {
    let mut c = 0;
    // SAFETY: each call covers channels that are still below `dim`.
    unsafe {
        while c + 4 * S::LANES <= dim {
            weigh::<S, E, HB, 4, false>(pieces, (dim, c), weights, (sums, width), ahead);
            c += 4 * S::LANES;
        }
        if c + 2 * S::LANES <= dim {
            weigh::<S, E, HB, 2, false>(pieces, (dim, c), weights, (sums, width), ahead);
            c += 2 * S::LANES;
        }
        if c + S::LANES <= dim {
            weigh::<S, E, HB, 1, false>(pieces, (dim, c), weights, (sums, width), ahead);
            c += S::LANES;
        }
        if c < dim {
            weigh::<S, E, HB, 1, true>(pieces, (dim, c), weights, (sums, width), ahead);
        }
    }
}

/// Turns the scores of one head into weights relative to the greatest so far, and rescales what was summed up before.
///
/// # Safety
/// As for [`Simd`]; `TILE` scores, of which `n` are set.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd>(
    scores: &mut [f32],
    n: usize,
    (max, total): (&mut f32, &mut f32),
    sums: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let end = n.next_multiple_of(S::LANES);
    scores[n..end].fill(f32::NEG_INFINITY);
    let p = scores.as_mut_ptr();
    // SAFETY: `end <= scores.len()`, for lanes divide a tile; sums are whole vectors.
    unsafe {
        let mut top = S::splat(f32::NEG_INFINITY);
        for i in (0..end).step_by(S::LANES) {
            // NaN is passed over here and comes back through the weights.
            top = S::max(S::load(p.add(i)), top);
        }
        let top = S::top(top).max(*max);
        let base = S::splat(if top == f32::NEG_INFINITY { 0.0 } else { top });
        let mut sum = S::splat(0.0);
        for i in (0..end).step_by(S::LANES) {
            let w = exp::<S>(S::sub(S::load(p.add(i)), base));
            S::store(p.add(i), w);
            sum = S::add(sum, w);
            ahead.ask::<S>();
        }
        if top > *max {
            let c = if *max == f32::NEG_INFINITY { 0.0 } else { (*max - top).exp() };
            *total *= c;
            let c = S::splat(c);
            for i in (0..sums.len()).step_by(S::LANES) {
                let at = sums.as_mut_ptr().add(i);
                S::store(at, S::mul(S::load(at), c));
            }
            *max = top;
        }
        *total += S::sum(sum);
    }
}

/// Writes the scores of slots `at..at + 2 * LANES` as far as they lie in `lo..hi`; `scores` are those from `slot` on.
///
/// # Safety
/// As for [`Simd`]; scores for all slots of the piece.
#[inline(always)]
pub(super) unsafe fn put<S: Simd, const HB: usize>(
    acc: [[S::V; 2]; HB],
    base: [f32; HB],
    (at, lo, hi): (usize, usize, usize),
    slot: usize,
    scores: *mut f32,
) {
    // SAFETY: slots `lo..hi` lie in the piece, whose scores there is room for; the buffer takes two vectors.
    unsafe {
        for (h, (acc, base)) in acc.into_iter().zip(base).enumerate() {
            let (x, y) = (S::add(acc[0], S::splat(base)), S::add(acc[1], S::splat(base)));
            let to = scores.add(h * TILE);
            if lo <= at && at + 2 * S::LANES <= hi {
                S::store(to.add(at - slot), x);
                S::store(to.add(at - slot + S::LANES), y);
                continue;
            }
            let mut buf = [0f32; 32];
            S::store(buf.as_mut_ptr(), x);
            S::store(buf.as_mut_ptr().add(S::LANES), y);
            let (first, end) = (lo.max(at), hi.min(at + 2 * S::LANES));
            std::ptr::copy_nonoverlapping(buf.as_ptr().add(first - at), to.add(first - slot), end - first);
        }
    }
}
