//! Reads memory and does next to nothing with it: how fast a kernel that has to read everything could be.

use super::isa::Level;
use super::simd::{Simd, dispatch};
use crate::{Result, fault};

/// Chains of additions: more than the latency of one times the additions that a core starts at once.
const CHAINS: usize = 8;

/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn run<S: Simd>(x: &[f32]) -> f32 {
    let step = CHAINS * S::LANES;
    let whole = x.len() / step * step;
    // SAFETY: the loads are of `step` elements from `at` on, all below `whole`.
    unsafe {
        let mut sums = [S::splat(0.0); CHAINS];
        for at in (0..whole).step_by(step) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::add(*sum, S::load(x.as_ptr().add(at + i * S::LANES)));
            }
        }
        sums.into_iter().map(|sum| S::sum(sum)).sum::<f32>() + x[whole..].iter().sum::<f32>()
    }
}

/// The sum of `x`, in one pass over memory.
pub fn read(x: &[f32], level: Level) -> Result<f32> {
    level.check()?;
    fault::may_panic();
    Ok(dispatch!(level, run::<>(x: &[f32]) -> f32))
}
