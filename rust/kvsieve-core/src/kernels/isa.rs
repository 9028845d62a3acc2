//! Which instruction set the kernels run on.

use std::sync::OnceLock;

use crate::{Error, Result};

/// An instruction set that the kernels are compiled for, from the slowest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust that the compiler vectorises with what the target always has.
    Portable,
    /// What every 64-bit ARM has.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same and AVX-512 BF16.
    Avx512Bf16,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Neon => "neon",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this machine has it. The kernels rely on this check for soundness.
    pub fn available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                std::is_x86_feature_detected!("avx2")
                    && std::is_x86_feature_detected!("fma")
                    && std::is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.available()
                    && std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512vl")
                    && std::is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => Level::Avx512.available() && std::is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            // Levels of other machines.
            _ => false,
        }
    }

    /// Refuses a level that this machine lacks: running it would be undefined.
    pub(crate) fn check(self) -> Result<()> {
        if self.available() { Ok(()) } else { Err(refused(self.name())) }
    }
}

fn refused(got: &str) -> Error {
    Error::OutOfRange {
        what: "KVSIEVE_ISA",
        expected: "portable, neon, avx2, avx512 or avx512bf16, and one that this machine has",
        got: got.to_string(),
    }
}

/// Every level of this machine, the slowest first.
pub fn levels() -> Vec<Level> {
    [Level::Portable, Level::Neon, Level::Avx2, Level::Avx512, Level::Avx512Bf16]
        .into_iter()
        .filter(|l| l.available())
        .collect()
}

fn choose(asked: Option<&str>) -> Result<Level> {
    match asked {
        None | Some("") => Ok(levels().pop().unwrap_or(Level::Portable)),
        Some(name) => levels().into_iter().find(|l| l.name() == name).ok_or_else(|| refused(name)),
    }
}

/// The level that runs: the fastest of this machine, or the one named by the environment variable `KVSIEVE_ISA`, read once.
pub fn isa() -> Result<Level> {
    static CHOSEN: OnceLock<Result<Level>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| {
            let asked = std::env::var_os("KVSIEVE_ISA");
            choose(asked.as_ref().map(|a| a.to_str().unwrap_or("not text")))
        })
        .clone()
}

/// Whether the processor is Intel's: some libraries of others run their fast code on those alone.
pub fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn every_64_bit_arm_runs_on_neon() {
        assert_eq!(levels(), [Level::Portable, Level::Neon]);
        assert_eq!(choose(None), Ok(Level::Neon));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_maker_is_the_one_that_linux_names() {
        let told = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        assert_eq!(is_intel(), told.contains("GenuineIntel"));
    }

    #[test]
    fn an_unknown_level_is_refused() {
        assert_eq!(choose(Some("sse9")), Err(refused("sse9")));
        assert_eq!(choose(Some("portable")), Ok(Level::Portable));
        assert_eq!(choose(None).ok(), levels().pop());
    }
}
