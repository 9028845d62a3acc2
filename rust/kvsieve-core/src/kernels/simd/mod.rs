//! The vector operations that the kernels are written in, once for each instruction set.
//!
//! Every method is `#[inline(always)]` and is only ever called from a function compiled with the features of its implementation,
//! into which it is inlined. That is why the trait is unsafe to use and why the kernels check [`super::isa::Level::available`] first.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elem;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod vector;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use elem::Elem;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
pub(crate) use vector::{Simd, exp, tanh};

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
            $crate::kernels::isa::Level::Avx512 | $crate::kernels::isa::Level::Avx512Bf16 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::kernels::isa::Level::Avx2 => unsafe { avx2($($arg),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            $crate::kernels::isa::Level::Neon => unsafe { neon($($arg),*) },
            // SAFETY: the portable level needs nothing; the arguments meet the contract of the function.
            _ => unsafe { $run::<$crate::kernels::simd::Portable, $($g),*>($($arg),*) },
        }
    }};
}
pub(crate) use dispatch;
