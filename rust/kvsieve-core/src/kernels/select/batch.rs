//! Keys, wherever they lie, against the queries that share a choice: the kernel, for each instruction set.

use half::{bf16, f16};

use crate::kernels::four::{Queries, four};
use crate::kernels::isa::Level;
use crate::kernels::simd::{self, Elem, Simd};
use crate::tensor::Dtype;

/// Keys that are asked for ahead of the one at hand.
const AHEAD: usize = 24;

/// A batch of keys and the queries that score them.
pub(super) struct Batch<'a> {
    /// Addresses, a multiple of four of them: the last is repeated.
    pub keys: &'a [*const u8],
    /// For each key the first query that may see it; empty when all may.
    pub seen_from: &'a [u32],
    pub dim: usize,
    /// `[queries][width]`, zero beyond `dim`; as `bf16` where they are that, else empty.
    pub queries: &'a [f32],
    pub dots: &'a [bf16],
    pub width: usize,
    pub num_queries: usize,
    pub out: &'a mut [f32],
}

/// Compiled for an instruction set, a dtype and a number of channels.
pub(super) type Kernel = unsafe fn(&mut Batch<'_>);

/// Scores a batch: the maximum product of each key with a query that may see it.
///
/// # Safety
/// As for [`Simd`]; all keys are rows of `dim` elements of `E`; `D` is 0 or `dim`.
#[inline(always)]
unsafe fn run_batch<S: Simd, E: Elem, const D: usize>(batch: &mut Batch<'_>) {
    let dim = if D > 0 { D } else { batch.dim };
    let dots = S::DOTS && E::IS_BF16 && dim.is_multiple_of(2 * S::LANES) && !batch.dots.is_empty();
    let lines = (dim * size_of::<E>()).div_ceil(64);
    let num_keys = batch.keys.len();
    let queries = Queries { wide: batch.queries.as_ptr(), dots: batch.dots.as_ptr(), width: batch.width };
    for i in 0..num_keys.min(AHEAD) {
        for line in 0..lines {
            // SAFETY: any address may be asked for.
            unsafe { S::prefetch(batch.keys[i].wrapping_add(line * 64)) };
        }
    }
    for i in (0..num_keys).step_by(4) {
        for next in i + AHEAD..(i + AHEAD + 4).min(num_keys) {
            for line in 0..lines {
                // SAFETY: as above.
                unsafe { S::prefetch(batch.keys[next].wrapping_add(line * 64)) };
            }
        }
        let keys: [*const E; 4] =
            [batch.keys[i].cast(), batch.keys[i + 1].cast(), batch.keys[i + 2].cast(), batch.keys[i + 3].cast()];
        let mut from = [0; 4];
        if !batch.seen_from.is_empty() {
            from.copy_from_slice(&batch.seen_from[i..i + 4]);
        }
        let mut best = [f32::NEG_INFINITY; 4];
        // Queries that see none of the four come first, then those that see some.
        let mut h = from[0].min(from[1]).min(from[2]).min(from[3]) as usize;
        let latest = from[0].max(from[1]).max(from[2]).max(from[3]) as usize;
        while h < batch.num_queries {
            let count = (batch.num_queries - h).min(S::HEADS);
            let mut scores = [[f32::NEG_INFINITY; 4]; 4];
            let (to, queries) = (scores.as_flattened_mut().as_mut_ptr(), queries.from(h));
            // SAFETY: the caller's promise; `count` queries from `h` on, and room for four scores of each.
            unsafe {
                match (count, dots) {
                    (4, true) => four::<S, E, 4, true>(keys, &queries, dim, to, 4),
                    (4, false) => four::<S, E, 4, false>(keys, &queries, dim, to, 4),
                    (3, true) => four::<S, E, 3, true>(keys, &queries, dim, to, 4),
                    (3, false) => four::<S, E, 3, false>(keys, &queries, dim, to, 4),
                    (2, true) => four::<S, E, 2, true>(keys, &queries, dim, to, 4),
                    (2, false) => four::<S, E, 2, false>(keys, &queries, dim, to, 4),
                    (_, true) => four::<S, E, 1, true>(keys, &queries, dim, to, 4),
                    (_, false) => four::<S, E, 1, false>(keys, &queries, dim, to, 4),
                }
            }
            for (g, scores) in scores.iter_mut().enumerate().take(count) {
                if h + g < latest {
                    for j in 0..4 {
                        scores[j] = if h + g < from[j] as usize { f32::NEG_INFINITY } else { scores[j] };
                    }
                }
                // Without a branch: which is greater cannot be foreseen. NaN is less than everything.
                for j in 0..4 {
                    best[j] = if scores[j] > best[j] { scores[j] } else { best[j] };
                }
            }
            h += count;
        }
        batch.out[i..i + 4].copy_from_slice(&best);
    }
}

macro_rules! compiled {
    ($name:ident, $simd:ty, $arch:literal, $features:literal) => {
        #[cfg(target_arch = $arch)]
        #[target_feature(enable = $features)]
        unsafe fn $name<E: Elem, const D: usize>(batch: &mut Batch<'_>) {
            // SAFETY: passed on to the caller.
            unsafe { run_batch::<$simd, E, D>(batch) }
        }
    };
}
compiled!(run_avx2, simd::Avx2, "x86_64", "avx2,fma,f16c");
compiled!(run_avx512, simd::Avx512<false>, "x86_64", "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");
compiled!(run_avx512_bf16, simd::Avx512<true>, "x86_64", "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");
compiled!(run_neon, simd::Neon, "aarch64", "neon");

unsafe fn run_portable<E: Elem, const D: usize>(batch: &mut Batch<'_>) {
    // SAFETY: passed on to the caller.
    unsafe { run_batch::<simd::Portable, E, D>(batch) }
}

/// The kernel for keys of this dtype and so many channels.
pub(super) fn kernel(level: Level, dtype: Dtype, dim: usize) -> Kernel {
    macro_rules! sized {
        ($run:ident, $elem:ty) => {
            match dim {
                64 => $run::<$elem, 64>,
                128 => $run::<$elem, 128>,
                256 => $run::<$elem, 256>,
                _ => $run::<$elem, 0>,
            }
        };
    }
    macro_rules! typed {
        ($run:ident) => {
            match dtype {
                Dtype::F32 => sized!($run, f32),
                Dtype::BF16 => sized!($run, bf16),
                Dtype::F16 => sized!($run, f16),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if dtype == Dtype::BF16 => sized!(run_avx512_bf16, bf16),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => typed!(run_avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => typed!(run_avx2),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => typed!(run_neon),
        _ => typed!(run_portable),
    }
}
