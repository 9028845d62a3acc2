//! Sixteen lanes of AVX-512, with or without its products of pairs of `bf16`.

// The one reason for all blocks of this module: the trait's contract, the instruction set by the caller's check and the pointers by
// the caller's promise. Unaligned forms are used throughout.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::Simd;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

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
