//! Rotary position encoding: rotates pairs of channels by an angle per position.

use half::{bf16, f16};

use super::isa::Level;
use super::simd::{Elem, Simd, dispatch};
use crate::rope::{Layout, Rope};
use crate::tensor::{Dtype, ElemsMut, View, check_dtype, check_len};
use crate::{Error, Result, fault};

/// Rotates the first `2 * cos.len()` channels of `x`.
#[inline(always)]
pub(crate) fn rotate_row(x: &mut [f32], cos: &[f32], sin: &[f32], layout: Layout) {
    let half = cos.len();
    let sin = &sin[..half];
    match layout {
        Layout::Half => {
            let (a, b) = x[..2 * half].split_at_mut(half);
            for i in 0..half {
                (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
            }
        }
        Layout::Interleaved => {
            for (pair, (c, s)) in x[..2 * half].chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
            }
        }
    }
}

struct Job<'a> {
    dim: usize,
    trig: &'a [f32],
    layout: Layout,
    pairs: usize,
    factor: f32,
}

/// Rotates one row of `E`s.
///
/// # Safety
/// As for [`Simd`]; `dim` elements at both pointers; `from` and `to` are rows of `dim` channels.
#[inline(always)]
unsafe fn run<S: Simd, E: Elem>(job: &Job<'_>, x: &View<'_>, out: *mut u8) {
    let [batch, heads, tokens, dim] = x.shape();
    let rotary = 2 * job.pairs;
    let mut row = vec![0f32; dim];
    let mut to = out.cast::<E>();
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..tokens {
                let from = x.row(b, h, i).as_bytes_ptr().cast::<E>();
                let trig = &job.trig[i * rotary..(i + 1) * rotary];
                // SAFETY: `from` is a checked row of `dim` elements; `to` runs through the `batch * heads * tokens` rows that the
                // caller vouches for; the scratch row has `dim` elements.
                unsafe {
                    load_row::<S, E>(from, &mut row);
                    rotate_row(&mut row, &trig[..job.pairs], &trig[job.pairs..], job.layout);
                    if job.factor != 1.0 {
                        row[..rotary].iter_mut().for_each(|x| *x *= job.factor);
                    }
                    store_row::<S, E>(&row, to);
                    to = to.add(job.dim);
                }
            }
        }
    }
}

/// # Safety
/// As for [`Simd`]; `to.len()` elements at `from`.
#[inline(always)]
pub(crate) unsafe fn load_row<S: Simd, E: Elem>(from: *const E, to: &mut [f32]) {
    let whole = to.len() / S::LANES * S::LANES;
    // SAFETY: whole vectors first, single elements after; all below `to.len()`.
    unsafe {
        for c in (0..whole).step_by(S::LANES) {
            S::store(to.as_mut_ptr().add(c), E::load::<S>(from.add(c)));
        }
        for (c, to) in to.iter_mut().enumerate().skip(whole) {
            *to = (*from.add(c)).to_f32();
        }
    }
}

/// # Safety
/// As for [`Simd`]; room for `from.len()` elements at `to`.
#[inline(always)]
pub(crate) unsafe fn store_row<S: Simd, E: Elem>(from: &[f32], to: *mut E) {
    let whole = from.len() / S::LANES * S::LANES;
    // SAFETY: whole vectors first, single elements after; all below `from.len()`.
    unsafe {
        for c in (0..whole).step_by(S::LANES) {
            E::store::<S>(to.add(c), S::load(from.as_ptr().add(c)));
        }
        for (c, &x) in from.iter().enumerate().skip(whole) {
            *to.add(c) = E::of_f32(x);
        }
    }
}

/// Rotates every token of `x` (`[.., .., tokens, dim]`) by its position into the contiguous `out`; with `inverse`, undoes that,
/// the factor included.
pub fn rotate(
    x: &View<'_>,
    dtype: Dtype,
    positions: &[i64],
    rope: &Rope,
    inverse: bool,
    mut out: ElemsMut<'_>,
    level: Level,
) -> Result<()> {
    level.check()?;
    fault::may_panic();
    let [batch, heads, tokens, dim] = x.shape();
    check_dtype("x", x.elems(), dtype)?;
    check_dtype("out", out.as_ref(), dtype)?;
    check_len("positions", positions.len(), tokens)?;
    let rows = batch.checked_mul(heads).and_then(|n| n.checked_mul(tokens)).and_then(|n| n.checked_mul(dim));
    check_len("out", out.len(), rows.unwrap_or(usize::MAX))?;
    if rope.rotary_dim() > dim {
        let expected = format!("at least {} channels", rope.rotary_dim());
        return Err(Error::Shape { what: "x", expected, got: format!("{dim} channels") });
    }
    let mut trig = Vec::with_capacity(tokens * rope.rotary_dim());
    for &p in positions {
        rope.push_trig(if inverse { p.wrapping_neg() } else { p }, &mut trig);
    }
    let factor = if inverse { 1.0 / rope.factor() } else { rope.factor() } as f32;
    let job = &Job { dim, trig: &trig, layout: rope.layout(), pairs: rope.inv_freq().len(), factor };
    let to = out.as_bytes_mut_ptr();
    match dtype {
        Dtype::F32 => dispatch!(level, run::<f32>(job: &Job<'_>, x: &View<'_>, to: *mut u8) -> ()),
        Dtype::BF16 => {
            dispatch!(level, run::<bf16>(job: &Job<'_>, x: &View<'_>, to: *mut u8) -> ())
        }
        Dtype::F16 => dispatch!(level, run::<f16>(job: &Job<'_>, x: &View<'_>, to: *mut u8) -> ()),
    }
    Ok(())
}
