//! What a vector can do, and functions made of that.

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
