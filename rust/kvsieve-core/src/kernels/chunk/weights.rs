//! Weights of a tile, and its weighted values.

use std::slice;

use super::product::product;
use super::shape::{ROWS, Shape, TILE};
use super::tile::Tile;
use crate::kernels::rotate::load_row;
use crate::kernels::simd::{Elem, Simd, tanh};

/// Brings the values of a tile together: as they are, or of two keys each in one word.
///
/// # Safety
/// As for [`Simd`]; room for a tile.
#[inline(always)]
pub(super) unsafe fn bring_values<S: Simd, E: Elem, const DOTS: bool>(
    tile: &Tile,
    shape: &Shape,
    num_queries: usize,
    (to, width): (*mut u32, usize),
    odd: &mut Vec<usize>,
) {
    let dim = shape.value_dim;
    odd.clear();
    if tile.ragged {
        for i in 0..tile.len {
            if tile.from[i] > 0 || (tile.to[i] as usize) < num_queries {
                let value = tile.values[i].cast::<E>();
                let mut sum = 0f32;
                for c in 0..dim {
                    // SAFETY: a row of `dim` elements. Zero times what is not finite is NaN.
                    sum += unsafe { (*value.add(c)).to_f32() } * 0.0;
                }
                if sum.is_nan() {
                    odd.push(i);
                }
            }
        }
    }
    // SAFETY: rows of `dim` elements, and room for a tile of them.
    unsafe {
        if DOTS {
            for i in (0..tile.len).step_by(2) {
                let (a, b) = (tile.values[i].cast::<u16>(), tile.values[(i + 1).min(tile.len - 1)].cast::<u16>());
                let to = slice::from_raw_parts_mut(to.add(i / 2 * width), width);
                let (a, b) = (slice::from_raw_parts(a, dim), slice::from_raw_parts(b, dim));
                let a_mask = if odd.contains(&i) { 0 } else { u32::MAX };
                let b_mask = if i + 1 == tile.len || odd.contains(&(i + 1)) { 0 } else { u32::MAX };
                for c in 0..dim {
                    to[c] = (u32::from(a[c]) & a_mask) | (u32::from(b[c]) << 16 & b_mask);
                }
                to[dim..].fill(0);
            }
        } else {
            for i in 0..tile.len {
                let to = slice::from_raw_parts_mut(to.add(i * width).cast::<f32>(), width);
                if odd.contains(&i) {
                    to.fill(0.0);
                } else {
                    load_row::<S, E>(tile.values[i].cast(), &mut to[..dim]);
                    to[dim..].fill(0.0);
                }
            }
        }
    }
}

/// Makes a row of scores weights: scaled, capped, hidden, against the greatest so far. What older sums are worth is in `decay`.
///
/// # Safety
/// As for [`Simd`]; `count` scores in whole vectors, room for as many weights.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd, const DOTS: bool>(
    scores: *mut f32,
    count: usize,
    (scale, softcap): (f32, Option<f32>),
    see: Option<(f32, &[f32; TILE], &[f32; TILE])>,
    (max, total, decay): (&mut f32, &mut f32, &mut f32),
    weights: *mut u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let none = S::splat(f32::NEG_INFINITY);
        let scale = S::splat(scale);
        let mut best = none;
        for i in (0..count).step_by(S::LANES) {
            let mut x = S::mul(S::load(scores.add(i)), scale);
            if let Some(cap) = softcap {
                x = S::mul(tanh::<S>(S::div(x, S::splat(cap))), S::splat(cap));
            }
            if let Some((query, from, to)) = see {
                let query = S::splat(query);
                x = S::pick_less(S::load(from.as_ptr().add(i)), query, x, none);
                x = S::pick_less(query, S::load(to.as_ptr().add(i)), x, none);
            }
            // In this order NaN is no maximum.
            best = S::max(x, best);
            S::store(scores.add(i), x);
        }
        let old = *max;
        let new = old.max(S::top(best));
        *max = new;
        *decay = if old == new {
            1.0
        } else if old == f32::NEG_INFINITY {
            0.0
        } else {
            (old - new).exp()
        };
        let shift = S::splat(if new == f32::NEG_INFINITY { 0.0 } else { new });
        let (zero, least) = (S::splat(0.0), S::splat(f32::MIN));
        let mut sum = zero;
        for i in (0..count).step_by(S::LANES) {
            let x = S::load(scores.add(i));
            // Not NaN, and exactly nothing for what is hidden.
            let w = S::pick_less(x, least, zero, S::exp_any(S::sub(x, shift)));
            sum = S::add(sum, w);
            if DOTS {
                S::narrow(weights.add(i / 2).cast(), w);
            } else {
                S::store(weights.add(i).cast(), w);
            }
        }
        *total = *total * *decay + S::sum(sum);
    }
}

/// `to = decay * to + weights @ values`, for [`ROWS`] rows.
///
/// # Safety
/// As for [`product`]; `decay` and `to` for as many rows.
#[inline(always)]
pub(super) unsafe fn weigh<S: Simd, const DOTS: bool, const N: usize>(
    a: (*const u32, usize),
    b: (*const u32, usize),
    steps: usize,
    decay: &[f32],
    (to, stride): (*mut f32, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; ROWS];
        for (r, acc) in acc.iter_mut().enumerate() {
            let by = S::splat(decay[r]);
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::mul(S::load(to.add(r * stride + n * S::LANES)), by);
            }
        }
        let acc = product::<S, DOTS, N>(a, b, steps, acc);
        for (r, acc) in acc.into_iter().enumerate() {
            for (n, acc) in acc.into_iter().enumerate() {
                S::store(to.add(r * stride + n * S::LANES), acc);
            }
        }
    }
}
