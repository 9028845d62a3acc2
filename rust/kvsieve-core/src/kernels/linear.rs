//! Products of a few rows with a matrix of weights, of which each is read once: a linear layer in a step of several conversations.
//!
//! ```text
//! out[row, n] = bias[n] + sum of x[row, k] * weights[n, k] over k
//!
//! for every four outputs                        their weights are a tile, which stays in the first-level cache
//!     for as many rows as there are registers
//!         add up, lane by lane, and ask for a share of the next tile
//! ```
//!
//! Libraries' products are made for many rows. Intel's, which torch calls, takes 8 rows of float32 at 4 to 7 GB/s of weights on one
//! thread of a machine that reads 14; one row is a product with a vector, at 12.
//!
//! The sums of a row run over the same lanes in the same order whatever stands beside it, and whatever the number of threads.

use super::isa::Level;
use super::simd::{Simd, dispatch};
use super::threads::{self, BREATH, INLINE};
use crate::tensor::{Dtype, View, check_dtype, check_len};
use crate::{Error, Result, fault};

/// Outputs of a tile.
const TILE: usize = 4;

/// Floats of a line of the caches.
const LINE: usize = 16;

/// Rows of floats, `stride` apart.
#[derive(Clone, Copy)]
struct Rows {
    first: *const f32,
    stride: usize,
    count: usize,
}

impl Rows {
    fn of(view: &View<'_>) -> Self {
        let first = view.elems().as_bytes_ptr().cast();
        Rows { first, stride: view.strides()[2], count: view.shape()[2] }
    }

    /// Row `i`, or the last one: what is beyond is computed and not stored.
    #[inline(always)]
    fn at(&self, i: usize) -> *const f32 {
        self.first.wrapping_add(i.min(self.count - 1) * self.stride)
    }
}

/// One product.
#[derive(Clone, Copy)]
struct Job<'a> {
    x: Rows,
    weights: Rows,
    dim: usize,
    bias: Option<&'a [f32]>,
    /// `[rows, outputs]`.
    out: *mut f32,
}

// SAFETY: of what it points to, inputs are only read, and every output is written by the one thread that its item went to.
unsafe impl Sync for Job<'_> {}

/// Sums of `HB` rows and a tile, `TILE` to a row, while the lines of `ahead` are asked for.
///
/// # Safety
/// As for [`Simd`]; `dim` elements in every row.
#[inline(always)]
unsafe fn sums<S: Simd, const HB: usize>(
    tile: &[*const f32; TILE],
    rows: [*const f32; HB],
    dim: usize,
    ahead: &[*const f32],
) -> [[f32; TILE]; HB] {
    let whole = dim / S::LANES * S::LANES;
    // SAFETY: elements below `dim`, the last few by partial loads; any address may be asked for.
    unsafe {
        let mut acc = [[S::splat(0.0); TILE]; HB];
        let mut c = 0;
        while c < whole {
            if S::LANES >= LINE || c.is_multiple_of(LINE) {
                for line in ahead {
                    S::prefetch(line.wrapping_add(c).cast());
                }
            }
            let w =
                [S::load(tile[0].add(c)), S::load(tile[1].add(c)), S::load(tile[2].add(c)), S::load(tile[3].add(c))];
            for (row, acc) in rows.iter().zip(&mut acc) {
                let x = S::load(row.add(c));
                for j in 0..TILE {
                    acc[j] = S::fma(w[j], x, acc[j]);
                }
            }
            c += S::LANES;
        }
        if whole < dim {
            for j in 0..TILE {
                let w = S::load_part(tile[j].add(whole), dim - whole);
                for (row, acc) in rows.iter().zip(&mut acc) {
                    acc[j] = S::fma(w, S::load_part(row.add(whole), dim - whole), acc[j]);
                }
            }
        }
        let mut found = [[0f32; TILE]; HB];
        for (acc, found) in acc.into_iter().zip(&mut found) {
            S::sum4(found.as_mut_ptr(), acc);
        }
        found
    }
}

/// `HB` rows from the `first` on, and the outputs `n..end` of one tile.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn pass<S: Simd, const HB: usize>(job: &Job<'_>, first: usize, n: usize, end: usize, ahead: &[*const f32]) {
    let tile = [job.weights.at(n), job.weights.at(n + 1), job.weights.at(n + 2), job.weights.at(n + 3)];
    let rows = std::array::from_fn(|i| job.x.at(first + i));
    // SAFETY: rows of both matrices have `dim` elements; there are as many rows, and outputs below `end`.
    unsafe {
        for (i, sums) in sums::<S, HB>(&tile, rows, job.dim, ahead).iter().enumerate() {
            for j in 0..end - n {
                let bias = job.bias.map_or(0.0, |bias| bias[n + j]);
                *job.out.add((first + i) * job.weights.count + n + j) = sums[j] + bias;
            }
        }
    }
}

/// Outputs `from..to` of all rows.
///
/// # Safety
/// As for [`Simd`]; the views are of the job's shape, with at least one row each, and `out` has room for all outputs of all rows.
#[inline(always)]
unsafe fn run<S: Simd>(job: &Job<'_>, from: usize, to: usize) {
    // SAFETY: the caller's promise; two rows fit the registers everywhere.
    unsafe {
        match job.x.count {
            1 => few::<S, 1>(job, from, to),
            2 => few::<S, 2>(job, from, to),
            _ => many::<S>(job, from, to),
        }
    }
}

/// [`run`] of `HB` rows, which are as many as the registers hold at once: between two tiles little is left to be done, so that the
/// processor goes on reading.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn few<S: Simd, const HB: usize>(job: &Job<'_>, from: usize, to: usize) {
    let rows = std::array::from_fn(|i| job.x.at(i));
    let (stride, count) = (job.weights.stride, job.weights.count);
    let whole = from + (to - from) / TILE * TILE;
    let mut line = job.weights.at(from);
    let mut n = from;
    while n < whole {
        let tile = std::array::from_fn(|j| line.wrapping_add(j * stride));
        line = line.wrapping_add(TILE * stride);
        // Beyond the last tile too: any address may be asked for.
        let next: [*const f32; TILE] = std::array::from_fn(|j| line.wrapping_add(j * stride));
        // SAFETY: as in `pass`, of a tile that is whole.
        unsafe {
            for (i, sums) in sums::<S, HB>(&tile, rows, job.dim, &next).iter().enumerate() {
                let out = job.out.add(i * count + n);
                for (j, sum) in sums.iter().enumerate() {
                    *out.add(j) = sum + job.bias.map_or(0.0, |bias| bias[n + j]);
                }
            }
        }
        n += TILE;
    }
    if whole < to {
        // SAFETY: the caller's promise.
        unsafe { pass::<S, HB>(job, 0, whole, to, &[]) }
    }
}

/// [`run`] of any number of rows, so many at a time as the registers hold.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn many<S: Simd>(job: &Job<'_>, from: usize, to: usize) {
    let passes = job.x.count.div_ceil(S::HEADS);
    for n in (from..to).step_by(TILE) {
        let next = [0, 1, 2, 3].map(|j| job.weights.at(n + TILE + j));
        for p in 0..passes {
            let first = p * S::HEADS;
            let end = to.min(n + TILE);
            let ahead = if n + TILE < to { &next[p * TILE / passes..(p + 1) * TILE / passes] } else { &next[..0] };
            // SAFETY: the caller's promise; `first` and as many rows as are left, or fit the registers.
            unsafe {
                match (job.x.count - first).min(S::HEADS) {
                    4 => pass::<S, 4>(job, first, n, end, ahead),
                    3 => pass::<S, 3>(job, first, n, end, ahead),
                    2 => pass::<S, 2>(job, first, n, end, ahead),
                    _ => pass::<S, 1>(job, first, n, end, ahead),
                }
            }
        }
    }
}

fn outputs(level: Level, job: &Job<'_>, from: usize, to: usize) {
    dispatch!(level, run::<>(job: &Job<'_>, from: usize, to: usize) -> ());
}

/// `x` (`[1, 1, rows, inputs]`) times the transposed `weights` (`[1, 1, outputs, inputs]`), plus `bias` (`[outputs]`), both of `f32`,
/// into `out` (`[rows, outputs]`). `stop` is asked every few milliseconds, and then there is [`Error::Interrupted`].
pub fn linear(
    x: &View<'_>,
    weights: &View<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
    (level, threads): (Level, usize),
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    level.check()?;
    threads::check(threads)?;
    for (what, view) in [("x", x), ("weights", weights)] {
        check_dtype(what, view.elems(), Dtype::F32)?;
        if view.shape()[..2] != [1, 1] {
            let got = format!("{:?}", view.shape());
            return Err(Error::Shape { what, expected: "[1, 1, rows, inputs]".to_string(), got });
        }
    }
    let ([_, _, rows, dim], [_, _, count, inputs]) = (x.shape(), weights.shape());
    if inputs != dim {
        let expected = format!("[outputs, {dim}], as many inputs as x has");
        return Err(Error::Shape { what: "weights", expected, got: format!("[{count}, {inputs}]") });
    }
    check_len("out", out.len(), rows.saturating_mul(count))?;
    if let Some(bias) = bias {
        check_len("bias", bias.len(), count)?;
    }
    if rows == 0 || count == 0 {
        return Ok(());
    }
    let job = Job { x: Rows::of(x), weights: Rows::of(weights), dim, bias, out: out.as_mut_ptr() };
    let bytes = (dim * size_of::<f32>()).max(1);
    let workers = if count * bytes < INLINE { 1 } else { threads };
    let breath = (BREATH / bytes).max(1).next_multiple_of(TILE) * workers;
    for (i, from) in (0..count).step_by(breath).enumerate() {
        if i > 0 && stop() {
            return Err(Error::Interrupted);
        }
        fault::may_panic();
        let to = count.min(from + breath);
        // Several for each thread, so that none waits long for the last.
        let step = if workers == 1 { to - from } else { (to - from).div_ceil(4 * workers).next_multiple_of(TILE) };
        let mut items: Vec<(usize, usize)> = (from..to).step_by(step).map(|at| (at, to.min(at + step))).collect();
        threads::for_each(workers, &mut items, |&mut (from, to)| outputs(level, &job, from, to))?;
    }
    Ok(())
}
