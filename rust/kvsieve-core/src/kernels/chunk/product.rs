//! Products of small matrices, and how their factors are brought together.

use std::slice;

use half::bf16;

use super::shape::{ROWS, Shape, Words};
use crate::kernels::rotate::load_row;
use crate::kernels::simd::{Elem, Simd};

/// `acc += A B` for [`ROWS`] rows of `A` and `N` vectors of `B`'s columns, over `steps` words of a row.
///
/// # Safety
/// As for [`Simd`]; `steps` words at `a` and the rows below it, `steps` rows of `N` vectors at `b`.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, const DOTS: bool, const N: usize>(
    (a, a_stride): (*const u32, usize),
    (b, b_stride): (*const u32, usize),
    steps: usize,
    mut acc: [[S::V; N]; ROWS],
) -> [[S::V; N]; ROWS] {
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..steps {
            let row = b.add(i * b_stride);
            if DOTS {
                let mut x = [S::words(row); N];
                for (n, x) in x.iter_mut().enumerate().skip(1) {
                    *x = S::words(row.add(n * S::LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = a.add(r * a_stride + i).cast::<bf16>();
                    for n in 0..N {
                        acc[n] = S::dot_pair(acc[n], x[n], q);
                    }
                }
            } else {
                let mut x = [S::load(row.cast()); N];
                for (n, x) in x.iter_mut().enumerate().skip(1) {
                    *x = S::load(row.add(n * S::LANES).cast());
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = S::splat(*a.add(r * a_stride + i).cast::<f32>());
                    for n in 0..N {
                        acc[n] = S::fma(x[n], q, acc[n]);
                    }
                }
            }
        }
    }
    acc
}

/// Turns keys into columns: `to[word * stride + key]`, for up to the next multiple of 16 keys.
///
/// # Safety
/// As for [`Simd`]; all keys are rows of `dim` elements of `E`; room for `padded` rows of `stride` words at `to`, and for 16 keys in
/// `spare`.
#[inline(always)]
pub(super) unsafe fn turn_keys<S: Simd, E: Elem, const DOTS: bool>(
    keys: &[*const u8],
    shape: &Shape,
    (to, stride): (*mut u32, usize),
    spare: &mut Words,
) {
    let padded = shape.padded();
    let spare = spare.of(16 * padded).as_mut_ptr();
    let as_they_lie = shape.words() == padded && (size_of::<E>() == 4 || (DOTS && shape.dim == 2 * padded));
    for (i, keys) in keys.chunks(16).enumerate() {
        let mut rows = [keys[keys.len() - 1].cast::<u32>(); 16];
        for (row, &key) in rows.iter_mut().zip(keys) {
            *row = key.cast();
        }
        if !as_they_lie {
            for (j, row) in rows.iter_mut().enumerate() {
                // SAFETY: one of the 16 keys that there is room for.
                unsafe {
                    let to = spare.add(j * padded);
                    bring::<S, E, DOTS>(row.cast(), shape.dim, slice::from_raw_parts_mut(to, padded));
                    *row = to;
                }
            }
        }
        for word in (0..padded).step_by(16) {
            for row in &mut rows {
                if word > 0 {
                    *row = row.wrapping_add(16);
                }
            }
            // SAFETY: every row has `padded` words; there is room for as many rows of `stride` words.
            unsafe { S::turn(&rows, to.add(word * stride + i * 16), stride) };
        }
    }
}

/// One row as words, zero beyond its channels.
///
/// # Safety
/// As for [`Simd`]; `dim` elements of `E`, which is `bf16` if `DOTS`.
#[inline(always)]
unsafe fn bring<S: Simd, E: Elem, const DOTS: bool>(from: *const E, dim: usize, to: &mut [u32]) {
    // SAFETY: `to` holds the whole row: `dim` numbers, or half as many words.
    unsafe {
        to.fill(0);
        if DOTS {
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr().cast::<E>(), dim);
        } else {
            load_row::<S, E>(from, slice::from_raw_parts_mut(to.as_mut_ptr().cast(), dim));
        }
    }
}

/// # Safety
/// As for [`Simd`]; rows of the shape's channels, and room for as many.
#[inline(always)]
pub(super) unsafe fn queries<S: Simd, E: Elem, const DOTS: bool>(from: &[*const u8], shape: &Shape, to: &mut [u32]) {
    for (&from, to) in from.iter().zip(to.chunks_exact_mut(shape.padded())) {
        // SAFETY: the caller's promise.
        unsafe { bring::<S, E, DOTS>(from.cast(), shape.dim, to) };
    }
}
