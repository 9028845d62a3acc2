//! Rotary position encoding: the angle of each pair of channels at each position.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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
