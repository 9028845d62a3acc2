//! The vector operations that the kernels are written in, once for each instruction set.
//!
//! Every method is `#[inline(always)]` and is only ever called from a function compiled with the features of its implementation,
//! into which it is inlined. That is why the trait is unsafe to use and why the kernels check [`super::Level::available`] first.

use half::{bf16, f16};

/// One instruction set.
///
/// # Safety
/// All methods: the running machine has the features of the implementation. Methods with pointers: the named number of elements is
/// readable or writable there; no alignment is needed.
pub(crate) trait Simd: Copy {
    /// Lanes of a vector; divides 16.
    const LANES: usize;
    /// Query heads that one pass over the keys serves: as many as leave four keys and their sums in registers.
    const HEADS: usize;
    type V: Copy;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    unsafe fn load_f16(p: *const f16) -> Self::V;
    /// `2 * LANES` elements, in whatever order is the least work.
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const bf16) -> [Self::V; 2] {
        // SAFETY: the caller's promise is the callees'.
        unsafe { [Self::load_bf16(p), Self::load_bf16(p.add(Self::LANES))] }
    }
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn store_f16(p: *mut f16, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The greater of both, and `b` when either is NaN: the order of operands decides whether NaN passes.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for an integral `n` in -126..=127.
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V;
    /// Where `x < y`, `a`, else `b`.
    unsafe fn pick_less(x: Self::V, y: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `e^x` as [`exp`] for `x` up to 88; beyond, at least `e^88`.
    #[inline(always)]
    unsafe fn exp_any(x: Self::V) -> Self::V {
        // SAFETY: the caller's promise is the callees'.
        unsafe {
            let most = Self::splat(88.0);
            // In this order NaN passes.
            exp::<Self>(Self::pick_less(most, x, most, x))
        }
    }
    unsafe fn sum(a: Self::V) -> f32;
    /// The greatest lane. Unspecified when a lane is NaN.
    unsafe fn top(a: Self::V) -> f32;
    /// Stores the sums of the four vectors to `p[0..4]`.
    unsafe fn sum4(p: *mut f32, v: [Self::V; 4]);
    /// Asks for the cache line at `p`, which may be any address, in the second-level cache: the first is too small for a tile of
    /// keys, one of values and what comes next, and a burst of requests to it stalls the loads at hand.
    unsafe fn prefetch(p: *const u8);
    /// Whether [`Simd::dot_bf16`] exists.
    const DOTS: bool = false;
    /// `acc + k . q` over `2 * LANES` products, a lane taking two of them.
    unsafe fn dot_bf16(acc: Self::V, _k: *const bf16, _q: *const bf16) -> Self::V {
        acc
    }
    /// Loads `n < LANES` elements; the other lanes are zero.
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V {
        let mut buf = [0f32; 16];
        // SAFETY: the caller vouches for `n` elements; `n < LANES <= 16`; the buffer is a whole vector.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
            Self::load(buf.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_part_bf16(p: *const bf16, n: usize) -> Self::V {
        let mut buf = [bf16::ZERO; 16];
        // SAFETY: as for `load_part`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
            Self::load_bf16(buf.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_part_f16(p: *const f16, n: usize) -> Self::V {
        let mut buf = [f16::ZERO; 16];
        // SAFETY: as for `load_part`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
            Self::load_f16(buf.as_ptr())
        }
    }

    /// `LANES` words of 32 bits that hold codes.
    type W: Copy;
    unsafe fn words(p: *const u32) -> Self::W;
    /// `n < LANES` words; the others are zero.
    #[inline(always)]
    unsafe fn words_part(p: *const u32, n: usize) -> Self::W {
        let mut buf = [0u32; 16];
        // SAFETY: as for `load_part`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
            Self::words(buf.as_ptr())
        }
    }
    /// Turns 16 rows of 16 words: word `i` of row `j` goes to `to[i * stride + j]`.
    #[inline(always)]
    unsafe fn turn(rows: &[*const u32; 16], to: *mut u32, stride: usize) {
        for (j, row) in rows.iter().enumerate() {
            for i in 0..16 {
                // SAFETY: the caller vouches for 16 words in every row, and for the places that they go to.
                unsafe { *to.add(i * stride + j) = row.add(i).read_unaligned() };
            }
        }
    }
    /// The `bits` (2, 4 or 8) of each word from bit `shift` on, as a number.
    unsafe fn code(w: Self::W, shift: u32, bits: u32) -> Self::V;
    /// The `bf16` in the low halves and those in the high halves.
    unsafe fn pair_bf16(w: Self::W) -> (Self::V, Self::V);
    /// Where there is [`Simd::DOTS`]: the `bits` (2 or 4) of each half word from bit `shift` on, as a `bf16`, plus 128.
    unsafe fn digits(w: Self::W, _shift: u32, _bits: u32) -> Self::W {
        w
    }
    /// Where there is [`Simd::DOTS`]: adds the products of pairs of `bf16` with the pair at `q`.
    unsafe fn dot_pair(acc: Self::V, _w: Self::W, _q: *const bf16) -> Self::V {
        acc
    }
    /// Where there is [`Simd::DOTS`]: rounds to nearest; what `bf16` has only as a subnormal becomes zero.
    unsafe fn narrow(_p: *mut bf16, _v: Self::V) {}
}

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

/// `e^x` for `x <= 0` to 2e-7 relative near zero, where it counts, and 6e-8 times `|x|` beyond; at least `2^-126` (never quite
/// zero), NaN for NaN.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller vouches for the instruction set; there is no memory access.
    unsafe {
        // As a power of two. The bound is the first operand, so that NaN passes through.
        let x = S::max(S::splat(-126.0), S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let n = S::round(x);
        let r = S::sub(x, n);
        // 2^r on [-1/2, 1/2] with the least relative error, 9e-8, among polynomials of degree 5 that are 1 at 0.
        let p = S::splat(1.326_472_7e-3);
        let p = S::fma(p, r, S::splat(9.671_513e-3));
        let p = S::fma(p, r, S::splat(5.550_733_6e-2));
        let p = S::fma(p, r, S::splat(0.240_222_43));
        // Not quite ln 2.
        #[allow(clippy::approx_constant)]
        let p = S::fma(p, r, S::splat(0.693_147));
        let p = S::fma(p, r, S::splat(1.0));
        S::scale2(p, n)
    }
}

/// `tanh x`, to about 1e-7 relative, near zero too: logits are small where a soft cap hardly acts.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller vouches for the instruction set; there is no memory access.
    unsafe {
        let zero = S::splat(0.0);
        let minus = S::sub(zero, x);
        let abs = S::pick_less(x, zero, minus, x);
        let z = S::mul(x, x);
        let p = S::splat(-5.704_988_7e-3);
        let p = S::fma(p, z, S::splat(2.063_909e-2));
        let p = S::fma(p, z, S::splat(-5.373_971_6e-2));
        let p = S::fma(p, z, S::splat(1.333_144_2e-1));
        let p = S::fma(p, z, S::splat(-3.333_328e-1));
        let small = S::fma(S::mul(p, z), x, x);
        // 1 - 2 e^-2|x| / (1 + e^-2|x|), which cannot overflow.
        let e = exp::<S>(S::mul(abs, S::splat(-2.0)));
        let one = S::splat(1.0);
        let large = S::sub(one, S::div(S::add(e, e), S::add(one, e)));
        let large = S::pick_less(x, zero, S::sub(zero, large), large);
        S::pick_less(abs, S::splat(0.625), small, large)
    }
}

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

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    // The one reason for all blocks of this module: the trait's contract, the instruction set by the caller's check and the
    // pointers by the caller's promise. Unaligned forms are used throughout.
    #![allow(clippy::undocumented_unsafe_blocks)]

    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::Simd;

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    impl Simd for Avx2 {
        const LANES: usize = 8;
        const HEADS: usize = 2;
        type V = __m256;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m256 {
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
        }
        #[inline(always)]
        unsafe fn load_bf16_pair(p: *const bf16) -> [__m256; 2] {
            unsafe {
                let pairs = _mm256_loadu_si256(p.cast());
                let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000));
                [_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(odd)]
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut f16, v: __m256) {
            unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn round(a: __m256) -> __m256 {
            unsafe { _mm256_round_ps(a, NEAREST) }
        }
        #[inline(always)]
        unsafe fn scale2(a: __m256, n: __m256) -> __m256 {
            unsafe {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))
            }
        }
        #[inline(always)]
        unsafe fn pick_less(x: __m256, y: __m256, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ)) }
        }
        #[inline(always)]
        unsafe fn sum(a: __m256) -> f32 {
            unsafe {
                let s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
                let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
                _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)))
            }
        }
        #[inline(always)]
        unsafe fn top(a: __m256) -> f32 {
            unsafe {
                let s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
                let s = _mm_max_ps(s, _mm_movehl_ps(s, s));
                _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)))
            }
        }
        #[inline(always)]
        unsafe fn sum4(p: *mut f32, v: [__m256; 4]) {
            unsafe {
                let s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
                _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch(p.cast(), _MM_HINT_T1) }
        }

        #[inline(always)]
        unsafe fn load_part(p: *const f32, n: usize) -> __m256 {
            unsafe { _mm256_maskload_ps(p, first(n)) }
        }

        type W = __m256i;
        #[inline(always)]
        unsafe fn words(p: *const u32) -> __m256i {
            unsafe { _mm256_loadu_si256(p.cast()) }
        }
        #[inline(always)]
        unsafe fn words_part(p: *const u32, n: usize) -> __m256i {
            unsafe { _mm256_maskload_epi32(p.cast(), first(n)) }
        }
        #[inline(always)]
        unsafe fn turn(rows: &[*const u32; 16], to: *mut u32, stride: usize) {
            // Squares of eight.
            for (down, across) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
                unsafe {
                    let mut x = [_mm256_setzero_ps(); 8];
                    for j in 0..8 {
                        x[j] = _mm256_loadu_ps(rows[down + j].add(across).cast());
                    }
                    let mut y = x;
                    for j in (0..8).step_by(2) {
                        y[j] = _mm256_unpacklo_ps(x[j], x[j + 1]);
                        y[j + 1] = _mm256_unpackhi_ps(x[j], x[j + 1]);
                    }
                    for j in (0..8).step_by(4) {
                        x[j] = _mm256_shuffle_ps(y[j], y[j + 2], 0x44);
                        x[j + 1] = _mm256_shuffle_ps(y[j], y[j + 2], 0xee);
                        x[j + 2] = _mm256_shuffle_ps(y[j + 1], y[j + 3], 0x44);
                        x[j + 3] = _mm256_shuffle_ps(y[j + 1], y[j + 3], 0xee);
                    }
                    for j in 0..4 {
                        let (lo, hi) = (to.add((across + j) * stride + down), to.add((across + 4 + j) * stride + down));
                        _mm256_storeu_ps(lo.cast(), _mm256_permute2f128_ps(x[j], x[j + 4], 0x20));
                        _mm256_storeu_ps(hi.cast(), _mm256_permute2f128_ps(x[j], x[j + 4], 0x31));
                    }
                }
            }
        }
        #[inline(always)]
        unsafe fn code(w: __m256i, shift: u32, bits: u32) -> __m256 {
            unsafe {
                let w = _mm256_srlv_epi32(w, _mm256_set1_epi32(shift as i32));
                _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32((1 << bits) - 1)))
            }
        }
        #[inline(always)]
        unsafe fn pair_bf16(w: __m256i) -> (__m256, __m256) {
            unsafe {
                let high = _mm256_and_si256(w, _mm256_set1_epi32(-65536));
                (_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(high))
            }
        }
    }

    /// All bits of the first `n` lanes.
    #[inline(always)]
    unsafe fn first(n: usize) -> __m256i {
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    /// The numbers of two and of four bits, over and over: a look-up sees more bits than the code has.
    const NUMBERS: [[f32; 16]; 2] = {
        let mut table = [[0.0; 16]; 2];
        let mut i = 0;
        while i < 16 {
            (table[0][i], table[1][i]) = ((i % 4) as f32, i as f32);
            i += 1;
        }
        table
    };

    /// `BF16`: with the products of pairs of `bf16` that newer machines have.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512<const BF16: bool>;

    impl<const BF16: bool> Simd for Avx512<BF16> {
        const LANES: usize = 16;
        const HEADS: usize = 4;
        type V = __m512;

        const DOTS: bool = BF16;
        #[inline(always)]
        unsafe fn dot_bf16(acc: __m512, k: *const bf16, q: *const bf16) -> __m512 {
            if BF16 {
                // SAFETY: vectors of bits; the same size.
                let load =
                    |p: *const bf16| unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())) };
                unsafe { _mm512_dpbf16_ps(acc, load(k), load(q)) }
            } else {
                acc
            }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m512 {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
        }
        #[inline(always)]
        unsafe fn load_bf16_pair(p: *const bf16) -> [__m512; 2] {
            unsafe {
                let pairs = _mm512_loadu_si512(p.cast());
                let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000));
                [_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(odd)]
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut f16, v: __m512) {
            unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn round(a: __m512) -> __m512 {
            unsafe { _mm512_roundscale_ps(a, NEAREST) }
        }
        #[inline(always)]
        unsafe fn scale2(a: __m512, n: __m512) -> __m512 {
            unsafe { _mm512_scalef_ps(a, n) }
        }
        #[inline(always)]
        unsafe fn pick_less(x: __m512, y: __m512, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a) }
        }
        #[inline(always)]
        unsafe fn exp_any(x: __m512) -> __m512 {
            // No bounds, and no rounding by itself: one instruction takes the fraction (0 of an infinity), another scales by a power
            // of two with the integer part.
            unsafe {
                let x = _mm512_mul_ps(x, Self::splat(std::f32::consts::LOG2_E));
                let r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
                // 2^r on [0, 1] with the least relative error, 8e-8, among polynomials of degree 5 that are 1 at 0.
                let p = Self::splat(1.867_130_3e-3);
                let p = Self::fma(p, r, Self::splat(9.017_029e-3));
                let p = Self::fma(p, r, Self::splat(5.579_991_3e-2));
                let p = Self::fma(p, r, Self::splat(0.240_164_44));
                let p = Self::fma(p, r, Self::splat(0.693_151_3));
                let p = Self::fma(p, r, Self::splat(1.0));
                _mm512_scalef_ps(p, x)
            }
        }
        #[inline(always)]
        unsafe fn sum(a: __m512) -> f32 {
            unsafe { _mm512_reduce_add_ps(a) }
        }
        #[inline(always)]
        unsafe fn top(a: __m512) -> f32 {
            unsafe { _mm512_reduce_max_ps(a) }
        }
        #[inline(always)]
        unsafe fn sum4(p: *mut f32, v: [__m512; 4]) {
            unsafe {
                // Within each quarter: first pairs of vectors, then pairs of pairs; then the quarters are added up.
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let lo = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                let hi = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
                let s = _mm512_add_ps(lo, hi);
                let s = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
                _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch(p.cast(), _MM_HINT_T1) }
        }

        #[inline(always)]
        unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
            unsafe { _mm512_maskz_loadu_ps((1 << n) - 1, p) }
        }
        #[inline(always)]
        unsafe fn load_part_bf16(p: *const bf16, n: usize) -> __m512 {
            unsafe {
                let half = _mm256_maskz_loadu_epi16((1 << n) - 1, p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
            }
        }
        #[inline(always)]
        unsafe fn load_part_f16(p: *const f16, n: usize) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1 << n) - 1, p.cast())) }
        }

        type W = __m512i;
        #[inline(always)]
        unsafe fn words(p: *const u32) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn words_part(p: *const u32, n: usize) -> __m512i {
            unsafe { _mm512_maskz_loadu_epi32((1 << n) - 1, p.cast()) }
        }
        #[inline(always)]
        unsafe fn turn(rows: &[*const u32; 16], to: *mut u32, stride: usize) {
            unsafe {
                let mut x = [_mm512_setzero_si512(); 16];
                for j in 0..16 {
                    x[j] = _mm512_loadu_si512(rows[j].cast());
                }
                let mut y = x;
                for j in (0..16).step_by(2) {
                    y[j] = _mm512_unpacklo_epi32(x[j], x[j + 1]);
                    y[j + 1] = _mm512_unpackhi_epi32(x[j], x[j + 1]);
                }
                // Quarter `i` of `x[4 j + c]`: word `4 i + c` of rows `4 j` to `4 j + 3`.
                for j in (0..16).step_by(4) {
                    x[j] = _mm512_unpacklo_epi64(y[j], y[j + 2]);
                    x[j + 1] = _mm512_unpackhi_epi64(y[j], y[j + 2]);
                    x[j + 2] = _mm512_unpacklo_epi64(y[j + 1], y[j + 3]);
                    x[j + 3] = _mm512_unpackhi_epi64(y[j + 1], y[j + 3]);
                }
                for c in 0..4 {
                    let even = _mm512_shuffle_i32x4(x[c], x[c + 4], 0x88);
                    let odd = _mm512_shuffle_i32x4(x[c], x[c + 4], 0xdd);
                    let low_even = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0x88);
                    let low_odd = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0xdd);
                    let to = to.add(c * stride);
                    _mm512_storeu_si512(to.cast(), _mm512_shuffle_i32x4(even, low_even, 0x88));
                    _mm512_storeu_si512(to.add(4 * stride).cast(), _mm512_shuffle_i32x4(odd, low_odd, 0x88));
                    _mm512_storeu_si512(to.add(8 * stride).cast(), _mm512_shuffle_i32x4(even, low_even, 0xdd));
                    _mm512_storeu_si512(to.add(12 * stride).cast(), _mm512_shuffle_i32x4(odd, low_odd, 0xdd));
                }
            }
        }
        #[inline(always)]
        unsafe fn code(w: __m512i, shift: u32, bits: u32) -> __m512 {
            unsafe {
                let w = _mm512_srlv_epi32(w, _mm512_set1_epi32(shift as i32));
                if bits == 8 {
                    _mm512_cvtepi32_ps(_mm512_and_si512(w, _mm512_set1_epi32(255)))
                } else {
                    // The look-up takes no more than four bits.
                    _mm512_permutexvar_ps(w, _mm512_loadu_ps(NUMBERS[usize::from(bits == 4)].as_ptr()))
                }
            }
        }
        #[inline(always)]
        unsafe fn pair_bf16(w: __m512i) -> (__m512, __m512) {
            unsafe {
                let high = _mm512_and_si512(w, _mm512_set1_epi32(-65536));
                (_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(high))
            }
        }
        #[inline(always)]
        unsafe fn digits(w: __m512i, shift: u32, bits: u32) -> __m512i {
            unsafe {
                let w = _mm512_srlv_epi32(w, _mm512_set1_epi32(shift as i32));
                // At 128 the last bit of a `bf16` counts one: `w & mask | 128` in one operation.
                let mask = _mm512_set1_epi32(0x0001_0001 * ((1 << bits) - 1));
                _mm512_ternarylogic_epi32::<0xea>(w, mask, _mm512_set1_epi32(0x4300_4300))
            }
        }
        #[inline(always)]
        unsafe fn dot_pair(acc: __m512, w: __m512i, q: *const bf16) -> __m512 {
            if BF16 {
                unsafe { _mm512_dpbf16_ps(acc, bits(w), bits(_mm512_set1_epi32(q.cast::<i32>().read_unaligned()))) }
            } else {
                acc
            }
        }
        #[inline(always)]
        unsafe fn narrow(p: *mut bf16, v: __m512) {
            if BF16 {
                unsafe {
                    let v = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
                    _mm256_storeu_si256(p.cast(), v);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn bits(v: __m512i) -> __m512bh {
        // SAFETY: vectors of bits; the same size.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
    }
}

/// Compiles the function `$run` for every level and calls the one for `$level`.
///
/// `$run` is `#[inline(always)]` and generic over [`Simd`] first. The caller has checked that the level is available; the block that
/// the macro expands to is sound because of that check and of `$run`'s own contract.
macro_rules! dispatch {
    ($level:expr, $run:ident::<$($g:ty),*>($($arg:ident: $ty:ty),*) -> $ret:ty) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($arg: $ty),*) -> $ret {
            // SAFETY: passed on to the caller.
            unsafe { $run::<$crate::kernels::simd::Avx2, $($g),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        unsafe fn avx512($($arg: $ty),*) -> $ret {
            // SAFETY: passed on to the caller.
            unsafe { $run::<$crate::kernels::simd::Avx512<false>, $($g),*>($($arg),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon")]
        unsafe fn neon($($arg: $ty),*) -> $ret {
            // SAFETY: passed on to the caller.
            unsafe { $run::<$crate::kernels::simd::Neon, $($g),*>($($arg),*) }
        }
        match $level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level was checked to be available; the arguments meet the contract of the function.
            $crate::kernels::Level::Avx512 | $crate::kernels::Level::Avx512Bf16 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::kernels::Level::Avx2 => unsafe { avx2($($arg),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            $crate::kernels::Level::Neon => unsafe { neon($($arg),*) },
            // SAFETY: the portable level needs nothing; the arguments meet the contract of the function.
            _ => unsafe { $run::<$crate::kernels::simd::Portable, $($g),*>($($arg),*) },
        }
    }};
}
pub(crate) use dispatch;
