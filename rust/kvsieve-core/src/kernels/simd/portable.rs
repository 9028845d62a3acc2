//! Plain Rust, vectorised by the compiler.

use half::{bf16, f16};

use super::elem::Elem;
use super::vector::Simd;

/// Four lanes in plain Rust: what every 64-bit target has a register for.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[derive(Clone, Copy)]
pub(crate) struct Four([f32; 4]);

impl Four {
    #[inline(always)]
    fn zip(self, b: Four, f: impl Fn(f32, f32) -> f32) -> Four {
        Four([f(self.0[0], b.0[0]), f(self.0[1], b.0[1]), f(self.0[2], b.0[2]), f(self.0[3], b.0[3])])
    }
}

impl Simd for Portable {
    const LANES: usize = 4;
    const HEADS: usize = 2;
    type V = Four;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Four {
        Four([x; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Four {
        // SAFETY: the caller vouches for four elements; an array of floats is read without alignment.
        Four(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Four {
        // SAFETY: the caller vouches for four elements.
        Four(unsafe { p.cast::<[bf16; 4]>().read_unaligned() }.map(Elem::to_f32))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Four {
        // SAFETY: the caller vouches for four elements.
        Four(unsafe { p.cast::<[f16; 4]>().read_unaligned() }.map(Elem::to_f32))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Four) {
        // SAFETY: the caller vouches for four elements.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v.0) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut f16, v: Four) {
        // SAFETY: the caller vouches for four elements.
        unsafe { p.cast::<[f16; 4]>().write_unaligned(v.0.map(f16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn add(a: Four, b: Four) -> Four {
        a.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Four, b: Four) -> Four {
        a.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Four, b: Four) -> Four {
        a.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Four, b: Four) -> Four {
        a.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Four, b: Four, c: Four) -> Four {
        // Not `mul_add`: without the instruction that is a call into the C library.
        a.zip(b, |a, b| a * b).zip(c, |ab, c| ab + c)
    }
    #[inline(always)]
    unsafe fn max(a: Four, b: Four) -> Four {
        a.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(a: Four) -> Four {
        // Adding 1.5 * 2^23 leaves no bits for a fraction. Good for |a| < 2^22, which the exponents are.
        const MAGIC: f32 = 12_582_912.0;
        Four(a.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    unsafe fn scale2(a: Four, n: Four) -> Four {
        a.zip(n, |a, n| a * f32::from_bits((((n as i32) + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn pick_less(x: Four, y: Four, a: Four, b: Four) -> Four {
        let pick = |i: usize| if x.0[i] < y.0[i] { a.0[i] } else { b.0[i] };
        Four([pick(0), pick(1), pick(2), pick(3)])
    }
    #[inline(always)]
    unsafe fn sum(a: Four) -> f32 {
        (a.0[0] + a.0[2]) + (a.0[1] + a.0[3])
    }
    #[inline(always)]
    unsafe fn top(a: Four) -> f32 {
        a.0[0].max(a.0[1]).max(a.0[2].max(a.0[3]))
    }
    #[inline(always)]
    unsafe fn sum4(p: *mut f32, v: [Four; 4]) {
        // SAFETY: the caller vouches for four elements.
        unsafe {
            let sums = Four([Self::sum(v[0]), Self::sum(v[1]), Self::sum(v[2]), Self::sum(v[3])]);
            Self::store(p, sums);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}

    type W = [u32; 4];
    #[inline(always)]
    unsafe fn words(p: *const u32) -> [u32; 4] {
        // SAFETY: the caller vouches for four words; an array is read without alignment.
        unsafe { p.cast::<[u32; 4]>().read_unaligned() }.map(u32::from_le)
    }
    #[inline(always)]
    unsafe fn code(w: [u32; 4], shift: u32, bits: u32) -> Four {
        Four(w.map(|w| (w >> shift & ((1 << bits) - 1)) as f32))
    }
    #[inline(always)]
    unsafe fn pair_bf16(w: [u32; 4]) -> (Four, Four) {
        (Four(w.map(|w| f32::from_bits(w << 16))), Four(w.map(|w| f32::from_bits(w & 0xffff_0000))))
    }
}
