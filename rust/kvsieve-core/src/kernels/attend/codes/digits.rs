//! What a code counts in products, and scales as numbers.

use half::{bf16, f16};

use crate::ids::BLOCK;
use crate::kernels::simd::Simd;

pub(super) const SLOTS: usize = BLOCK as usize;

/// What a digit of so many bits, as [`Simd::digits`] has it, is taken to be more than its distance from the middle: a pair for products.
pub(super) const fn middle(digit: u32) -> [bf16; 2] {
    // 130 or 136.
    let x = bf16::from_bits(if digit == 2 { 0x4302 } else { 0x4308 });
    [x, x]
}

/// The code in the middle, by its digits.
pub(super) const fn middle_code(bits: u32) -> f32 {
    match bits {
        2 => 2.0,
        4 => 8.0,
        _ => 136.0,
    }
}

/// The bit in its word at which the code of a channel begins.
#[inline(always)]
pub(super) const fn shift(channel: usize, bits: u32) -> u32 {
    let at = channel as u32 % (32 / bits);
    at / 2 * bits + at % 2 * 16
}

/// Halves as numbers, zero beyond the `n` that are there.
///
/// # Safety
/// As for [`Simd`]; as many halves at `p` as `n` and the lanes allow.
#[inline(always)]
pub(super) unsafe fn load_halves<S: Simd>(p: *const u16, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if n >= S::LANES {
            S::load_f16(p.cast::<f16>())
        } else if n > 0 {
            S::load_part_f16(p.cast::<f16>(), n)
        } else {
            S::splat(0.0)
        }
    }
}
