//! The kernel for each level, dtype and head size.

use std::cell::RefCell;

use half::{bf16, f16};

use super::scratch::Scratch;
use super::unit::run_unit;
use super::units::{Common, Unit};
use crate::fault;
use crate::kernels::isa::Level;
use crate::kernels::simd::{self, Elem};
use crate::storage::arena::Arena;
use crate::tensor::Dtype;

/// One unit's kernel, compiled for a level, a dtype and a head size.
pub(super) type Kernel = unsafe fn(&Common<'_>, &mut Unit<'_>, &mut Scratch);

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<simd::Avx2, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<simd::Avx512<false>, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512_bf16<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<simd::Avx512<true>, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn run_neon<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<simd::Neon, E, D>(common, unit, scratch) }
}

unsafe fn run_portable<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<simd::Portable, E, D>(common, unit, scratch) }
}

/// The compiled kernel for the level, and for the arena's dtype and head size. Sizes that are common are constants, so that their
/// loops unroll.
pub(super) fn kernel(level: Level, arena: &Arena) -> Kernel {
    macro_rules! sized {
        ($run:ident, $elem:ty) => {
            match (arena.key_dim(), arena.value_dim()) {
                _ if arena.packed().is_some() => $run::<$elem, 0>,
                (64, 64) => $run::<$elem, 64>,
                (96, 96) => $run::<$elem, 96>,
                (128, 128) => $run::<$elem, 128>,
                _ => $run::<$elem, 0>,
            }
        };
    }
    macro_rules! typed {
        ($run:ident) => {
            match arena.dtype() {
                Dtype::F32 => sized!($run, f32),
                Dtype::BF16 => sized!($run, bf16),
                Dtype::F16 => sized!($run, f16),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if arena.dtype() == Dtype::BF16 => sized!(run_avx512_bf16, bf16),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => typed!(run_avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => typed!(run_avx2),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => typed!(run_neon),
        _ => typed!(run_portable),
    }
}

pub(super) fn run(kernel: Kernel, common: &Common<'_>, unit: &mut Unit<'_>) {
    fault::may_panic();
    thread_local! {
        static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
    }
    // SAFETY: `args::check` has made sure that the level is available and that all spans lie in blocks with memory; the kernel was chosen
    // for the arena's dtype and dims.
    SCRATCH.with_borrow_mut(|scratch| unsafe { kernel(common, unit, scratch) });
}
