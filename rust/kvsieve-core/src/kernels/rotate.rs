//! Rotary position encoding: rotates pairs of channels by an angle per position.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use half::{bf16, f16};

use super::isa::Level;
use super::simd::{Elem, Simd, dispatch};
use super::view::{Dtype, Elems, ElemsMut, View, check_dtype, check_len};
use crate::ids::BLOCK;
use crate::{Error, Result};

/// Which channels form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Channel `i` with `i + rotary_dim / 2`.
    Half,
    /// Channel `2 i` with `2 i + 1`.
    Interleaved,
}

/// A model's rotary encoding: the first [`Rope::rotary_dim`] channels are rotated, the others pass through.
///
/// Angles are computed in `f64` from the integer position and only then rounded: at position 10^6 an angle in `f32` is off by 0.06.
#[derive(Debug)]
pub struct Rope {
    inv_freq: Vec<f64>,
    layout: Layout,
    factor: f64,
    in_block: OnceLock<Vec<f32>>,
    of_blocks: Mutex<Arc<Vec<f32>>>,
}

/// Distances from here on are rare enough to be computed each time.
const FAR: i64 = 1 << 22;

/// Rotations by any distance, most of them made of two that are known: by whole blocks, and by a slot. Off by a rounding or two.
#[derive(Debug)]
pub(crate) struct Distances<'a> {
    rope: &'a Rope,
    of_blocks: Arc<Vec<f32>>,
}

impl Distances<'_> {
    pub fn rope(&self) -> &Rope {
        self.rope
    }

    /// Cosines, then sines, of a rotation by `distance`.
    #[inline(always)]
    pub fn trig(&self, distance: i64, to: &mut [f32]) {
        let pairs = self.rope.inv_freq.len();
        let (block, slot) = (distance >> BLOCK.trailing_zeros(), distance as usize % BLOCK as usize);
        let at = usize::try_from(block).unwrap_or(usize::MAX).saturating_mul(2 * pairs);
        let Some(far) = self.of_blocks.get(at..at.saturating_add(2 * pairs)) else {
            return self.rope.far_trig(distance, to);
        };
        let near = &self.rope.in_block()[slot * 2 * pairs..][..2 * pairs];
        let ((far_cos, far_sin), (near_cos, near_sin)) = (far.split_at(pairs), near.split_at(pairs));
        let (cos, sin) = to[..2 * pairs].split_at_mut(pairs);
        for i in 0..pairs {
            cos[i] = far_cos[i] * near_cos[i] - far_sin[i] * near_sin[i];
            sin[i] = far_sin[i] * near_cos[i] + far_cos[i] * near_sin[i];
        }
    }
}

impl Rope {
    /// `factor` multiplies cosine and sine, as some encodings for long texts do; 1 otherwise.
    pub fn new(inv_freq: Vec<f64>, layout: Layout, factor: f64) -> Result<Self> {
        if inv_freq.is_empty() || inv_freq.iter().any(|f| !f.is_finite()) {
            let got = format!("{inv_freq:?}");
            return Err(Error::OutOfRange { what: "inv_freq", expected: "a finite number for each pair", got });
        }
        if !factor.is_finite() || factor == 0.0 {
            return Err(Error::OutOfRange { what: "factor", expected: "finite and not 0", got: factor.to_string() });
        }
        Ok(Rope { inv_freq, layout, factor, in_block: OnceLock::new(), of_blocks: Mutex::default() })
    }

    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// Number of rotated channels.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Cosines, then sines, of `position`, without the factor.
    pub(crate) fn push_trig(&self, position: i64, to: &mut Vec<f32>) {
        let angle = |f: &f64| position as f64 * f;
        to.extend(self.inv_freq.iter().map(|f| angle(f).cos() as f32));
        to.extend(self.inv_freq.iter().map(|f| angle(f).sin() as f32));
    }

    #[cold]
    fn far_trig(&self, distance: i64, to: &mut [f32]) {
        let mut trig = Vec::with_capacity(self.rotary_dim());
        self.push_trig(distance, &mut trig);
        to[..trig.len()].copy_from_slice(&trig);
    }

    /// Rotations by distances, made to be quick up to `most`.
    pub(crate) fn distances(&self, most: i64) -> Distances<'_> {
        let blocks = (most.clamp(0, FAR) / i64::from(BLOCK) + 1) as usize;
        let mut known = self.of_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let have = known.len() / self.rotary_dim();
        if have < blocks {
            let mut table = Vec::clone(&known);
            // Ahead of a text that grows token by token.
            let end = blocks + blocks / 4 + 1;
            (have..end).for_each(|block| self.push_trig(block as i64 * i64::from(BLOCK), &mut table));
            *known = Arc::new(table);
        }
        Distances { rope: self, of_blocks: Arc::clone(&known) }
    }

    /// The rotations of the slots of a block: for each slot cosines, then sines. Every block shares them.
    pub(crate) fn in_block(&self) -> &[f32] {
        self.in_block.get_or_init(|| {
            let mut table = Vec::with_capacity(BLOCK as usize * self.rotary_dim());
            (0..i64::from(BLOCK)).for_each(|slot| self.push_trig(slot, &mut table));
            table
        })
    }
}

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
    let factor = if inverse { 1.0 / rope.factor } else { rope.factor } as f32;
    let job = &Job { dim, trig: &trig, layout: rope.layout, pairs: rope.inv_freq.len(), factor };
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

/// One element as `f64`, for the reference and for tests.
pub(crate) fn widen(elems: Elems<'_>, dtype: Dtype, at: usize) -> f64 {
    match (elems, dtype) {
        (Elems::F32(s), _) => f64::from(s[at]),
        (Elems::Bits(s), Dtype::F16) => f16::from_bits(s[at]).to_f64(),
        (Elems::Bits(s), _) => bf16::from_bits(s[at]).to_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_of_distances_are_those_of_positions() {
        let inv_freq = (0..20).map(|i| 1e4f64.powf(-f64::from(i) / 20.0)).collect();
        let rope = Rope::new(inv_freq, Layout::Half, 1.3).unwrap();
        for most in [100, 0, 5000, 300_000] {
            let distances = rope.distances(most);
            let (mut exact, mut got) = (Vec::new(), vec![7.0; 40]);
            for d in [0, 1, 63, 64, 65, most - 1, most, most + 99, 2 * most + 999, -1, -700, FAR, FAR + 77, 1 << 40] {
                exact.clear();
                rope.push_trig(d, &mut exact);
                distances.trig(d, &mut got);
                let off = got.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off <= 3e-7, "{d}: {off}");
            }
        }
    }
}
