//! Eight lanes of AVX2, with FMA and F16C.

// The one reason for all blocks of this module: the trait's contract, the instruction set by the caller's check and the pointers by
// the caller's promise. Unaligned forms are used throughout.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::Simd;

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
