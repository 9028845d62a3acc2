//! Element types, loaded and stored as vectors of `f32`.

use half::{bf16, f16};

use super::vector::Simd;

/// An element type that keys and values are stored in.
pub(crate) trait Elem: Copy + Send + Sync + 'static {
    const IS_BF16: bool = false;
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// # Safety
    /// As for [`Simd::store`].
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    /// `2 * LANES` elements, in any order.
    ///
    /// # Safety
    /// As for [`Simd::load`].
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const Self) -> [S::V; 2] {
        // SAFETY: the caller's promise is the callees'.
        unsafe { [Self::load::<S>(p), Self::load::<S>(p.add(S::LANES))] }
    }
    fn to_f32(self) -> f32;
    fn of_f32(x: f32) -> Self;

    /// Loads `n < LANES` elements; the other lanes are zero.
    ///
    /// # Safety
    /// As for [`Simd::load`], with `n` elements readable.
    unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S::V;
}

impl Elem for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load_part(p, n) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut f32, v: S::V) {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::store(p, v) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of_f32(x: f32) -> f32 {
        x
    }
}

/// Rounds to nearest even. Branch-free, so that loops over it vectorise; the crate's own conversion does not.
#[inline(always)]
fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
}

impl Elem for bf16 {
    const IS_BF16: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S::V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const bf16) -> [S::V; 2] {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load_bf16_pair(p) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const bf16, n: usize) -> S::V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load_part_bf16(p, n) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut bf16, v: S::V) {
        let mut buf = [0f32; 16];
        // SAFETY: the buffer holds a whole vector, and the caller vouches for as many elements at `p`.
        unsafe {
            S::store(buf.as_mut_ptr(), v);
            for (i, &x) in buf[..S::LANES].iter().enumerate() {
                *p.add(i) = round_bf16(x);
            }
        }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn of_f32(x: f32) -> bf16 {
        round_bf16(x)
    }
}

impl Elem for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f16) -> S::V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const f16, n: usize) -> S::V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::load_part_f16(p, n) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut f16, v: S::V) {
        // SAFETY: the caller's promise is the callee's.
        unsafe { S::store_f16(p, v) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn of_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }
}
