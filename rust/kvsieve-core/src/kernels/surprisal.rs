//! How unexpected each realised token was: the negative log-probability under the logits.

use half::{bf16, f16};

use super::isa::Level;
use super::simd::{Elem, Simd, dispatch, exp};
use super::threads::{self, BREATH, INLINE};
use crate::tensor::{Dtype, View, check_dtype, check_len};
use crate::{Error, Result, fault};

/// Elements between two looks at what came out: a chunk stays in the first-level cache for a second look.
const CHUNK: usize = 2048;

/// More than a chunk of terms at the base: some are above it, and the further they are the fewer bits their exponents have left.
const MUCH: f32 = 2.0 * CHUNK as f32;

/// The sum of `e^(x - base)`, without asking whether the base suits: NaN where there is NaN, and more than [`MUCH`] where an element
/// is far above the base.
///
/// # Safety
/// As for [`Simd`]; `n` elements at `x`.
#[inline(always)]
unsafe fn sum_over<S: Simd, E: Elem>(x: *const E, n: usize, base: f32) -> f32 {
    // SAFETY: all loads are below `n`.
    unsafe {
        let shift = S::splat(base);
        let mut sums = [S::splat(0.0); 4];
        let step = 4 * S::LANES;
        let whole = n / step * step;
        for c in (0..whole).step_by(step) {
            let [a, b] = E::load_pair::<S>(x.add(c));
            let [d, e] = E::load_pair::<S>(x.add(c + 2 * S::LANES));
            for (sum, x) in sums.iter_mut().zip([a, b, d, e]) {
                *sum = S::add(*sum, S::exp_any(S::sub(x, shift)));
            }
        }
        let mut sum = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        for c in whole..n {
            sum += ((*x.add(c)).to_f32() - base).exp();
        }
        sum
    }
}

/// # Safety
/// As for [`Simd`]; `n` elements at `x`.
#[inline(always)]
unsafe fn row<S: Simd, E: Elem>(x: *const E, n: usize, id: usize) -> f32 {
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0f64);
    let mut at = 0;
    // SAFETY: all loads are of `len <= CHUNK` elements from `at` on, which lie below `n`; so does `id`, checked by the caller.
    unsafe {
        while at < n {
            let len = CHUNK.min(n - at);
            let whole = len / S::LANES * S::LANES;
            let chunk = x.add(at);
            if max.is_finite() {
                let part = sum_over::<S, E>(chunk, len, max);
                if part <= MUCH {
                    sum += f64::from(part);
                    at += len;
                    continue;
                }
            }
            let mut tops = [S::splat(f32::NEG_INFINITY); 4];
            for c in (0..whole).step_by(S::LANES) {
                let lane = c / S::LANES % 4;
                tops[lane] = S::max(E::load::<S>(chunk.add(c)), tops[lane]);
            }
            let mut top = S::top(S::max(S::max(tops[0], tops[1]), S::max(tops[2], tops[3])));
            for c in whole..len {
                top = top.max((*chunk.add(c)).to_f32());
            }
            if top > max {
                // A sum of nothing so far has no scale to change; NaN in it must stay.
                if max != f32::NEG_INFINITY {
                    sum *= f64::from(max - top).exp();
                }
                max = top;
            }
            // Before any finite logit was seen, differences to the maximum would be NaN for no reason.
            let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let mut sums = [S::splat(0.0); 4];
            for c in (0..whole).step_by(S::LANES) {
                let lane = c / S::LANES % 4;
                let e = exp::<S>(S::sub(E::load::<S>(chunk.add(c)), S::splat(base)));
                sums[lane] = S::add(sums[lane], e);
            }
            sum += f64::from(S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]))));
            for c in whole..len {
                sum += f64::from(((*chunk.add(c)).to_f32() - base).exp());
            }
            at += len;
        }
        let realised = (*x.add(id)).to_f32();
        if sum.is_nan() && max != f32::INFINITY {
            return f32::NAN;
        }
        if max == f32::INFINITY {
            return if realised == f32::INFINITY { 0.0 } else { f32::MAX };
        }
        let surprise = f64::from(max) - f64::from(realised) + sum.ln();
        if surprise < f64::from(f32::MAX) { surprise.max(0.0) as f32 } else { f32::MAX }
    }
}

/// # Safety
/// As for [`Simd`]; the dtype of the view is `E`; the ids lie inside the rows, of which `first` is the first.
#[inline(always)]
unsafe fn run<S: Simd, E: Elem>(logits: &View<'_>, first: usize, ids: &[i64], out: &mut [f32]) {
    for (i, (&id, out)) in ids.iter().zip(out).enumerate() {
        let x = logits.row(0, 0, first + i).as_bytes_ptr().cast::<E>();
        // SAFETY: a checked row of the view; the caller vouches for the rest.
        *out = unsafe { row::<S, E>(x, logits.shape()[3], id as usize) };
    }
}

fn rows(level: Level, dtype: Dtype, logits: &View<'_>, first: usize, ids: &[i64], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            dispatch!(level, run::<f32>(logits: &View<'_>, first: usize, ids: &[i64], out: &mut [f32]) -> ())
        }
        Dtype::BF16 => {
            dispatch!(level, run::<bf16>(logits: &View<'_>, first: usize, ids: &[i64], out: &mut [f32]) -> ())
        }
        Dtype::F16 => {
            dispatch!(level, run::<f16>(logits: &View<'_>, first: usize, ids: &[i64], out: &mut [f32]) -> ())
        }
    }
}

/// Negative log-probability of `ids[i]` under row `i` of `logits` (`[1, 1, rows, vocabulary]`), in one pass over memory.
///
/// Never infinite: an impossible token costs `f32::MAX`. NaN when the row holds NaN, unless it also holds `+inf`. `stop` is asked
/// every few milliseconds, and then there is [`Error::Interrupted`].
pub fn surprisal(
    logits: &View<'_>,
    dtype: Dtype,
    ids: &[i64],
    out: &mut [f32],
    (level, threads): (Level, usize),
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    level.check()?;
    threads::check(threads)?;
    check_dtype("logits", logits.elems(), dtype)?;
    let [one, first, num_rows, vocabulary] = logits.shape();
    if (one, first) != (1, 1) {
        let got = format!("{:?}", logits.shape());
        return Err(Error::Shape { what: "logits", expected: "[1, 1, rows, vocabulary]".to_string(), got });
    }
    check_len("ids", ids.len(), num_rows)?;
    check_len("out", out.len(), num_rows)?;
    if let Some(id) = ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocabulary)) {
        let (what, expected) = ("token id", "below the number of logits, and not negative");
        return Err(Error::OutOfRange { what, expected, got: id.to_string() });
    }
    let bytes = vocabulary * dtype.size();
    let workers = if num_rows * bytes < INLINE { 1 } else { threads };
    let breath = (BREATH / bytes.max(1)).max(1) * threads;
    for (i, (ids, out)) in ids.chunks(breath).zip(out.chunks_mut(breath)).enumerate() {
        if i > 0 && stop() {
            return Err(Error::Interrupted);
        }
        fault::may_panic();
        let first = i * breath;
        let one = |(i, (id, out)): (usize, (&i64, &mut f32))| {
            rows(level, dtype, logits, first + i, std::slice::from_ref(id), std::slice::from_mut(out));
        };
        if workers == 1 {
            rows(level, dtype, logits, first, ids, out);
        } else {
            threads::map(workers, ids.iter().zip(out).enumerate(), one)?;
        }
    }
    Ok(())
}
