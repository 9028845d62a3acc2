//! The vector operations that the kernels are written in, once for each instruction set.
//!
//! Every method is `#[inline(always)]` and is only ever called from a function compiled with the features of its implementation,
//! into which it is inlined. That is why the trait is unsafe to use and why the kernels check [`super::isa::Level::available`] first.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dispatch;
mod elem;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod vector;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use dispatch::dispatch;
pub(crate) use elem::Elem;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
pub(crate) use vector::{Simd, exp, tanh};
