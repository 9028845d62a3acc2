//! The kernels for each level and dtype.

use half::{bf16, f16};

use super::attend::{self, Block, Place, Scratch};
use super::product;
use super::score::{self, Batch};
use super::shape::Shape;
use super::tile::Tiles;
use crate::kernels::isa::Level;
use crate::kernels::simd::{self, Elem};
use crate::tensor::Dtype;

/// What is compiled for a level and a dtype.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub queries: unsafe fn(&[*const u8], &Shape, &mut [u32]),
    pub score: unsafe fn(&mut Batch<'_>),
    pub attend: unsafe fn(&Block<'_>, &mut dyn Tiles, &dyn Place, &mut Scratch),
}

macro_rules! compiled {
    ($name:ident, $simd:ty, [$($arch:literal, $features:literal)?]) => {
        $(#[cfg(target_arch = $arch)])?
        mod $name {
            use super::*;
            $(#[target_feature(enable = $features)])?
            unsafe fn queries<E: Elem, const DOTS: bool>(from: &[*const u8], shape: &Shape, to: &mut [u32]) {
                // SAFETY: passed on to the caller.
                unsafe { product::queries::<$simd, E, DOTS>(from, shape, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn score<E: Elem, const DOTS: bool>(batch: &mut Batch<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { score::score::<$simd, E, DOTS>(batch) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend<E: Elem, const DOTS: bool>(
                block: &Block<'_>,
                tiles: &mut dyn Tiles,
                place: &dyn Place,
                scratch: &mut Scratch,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { attend::attend::<$simd, E, DOTS>(block, tiles, place, scratch) }
            }
            pub fn kernels<E: Elem, const DOTS: bool>() -> Kernels {
                Kernels { queries: queries::<E, DOTS>, score: score::<E, DOTS>, attend: attend::<E, DOTS> }
            }
        }
    };
}
compiled!(avx2, simd::Avx2, ["x86_64", "avx2,fma,f16c"]);
compiled!(avx512, simd::Avx512<false>, ["x86_64", "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"]);
compiled!(avx512_bf16, simd::Avx512<true>, ["x86_64", "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"]);
compiled!(neon, simd::Neon, ["aarch64", "neon"]);
compiled!(portable, simd::Portable, []);

/// Those for a level and a dtype; `dots`: with products of pairs of `bf16`.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(unused_variables, reason = "no other architecture's level has such products")
)]
pub(super) fn kernels(level: Level, dtype: Dtype, dots: bool) -> Kernels {
    macro_rules! typed {
        ($level:ident) => {
            match dtype {
                Dtype::F32 => $level::kernels::<f32, false>(),
                Dtype::BF16 => $level::kernels::<bf16, false>(),
                Dtype::F16 => $level::kernels::<f16, false>(),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if dots => avx512_bf16::kernels::<bf16, true>(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => typed!(avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => typed!(avx2),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => typed!(neon),
        _ => typed!(portable),
    }
}
