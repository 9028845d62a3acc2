//! How tokens are packed.

use crate::ids::BLOCK;
use crate::tensor::Dtype;
use crate::{Error, Result};

/// How a layer packs its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Kept channels of a key, the same number for each head.
    pub key_kept: usize,
    /// Bits of a key's code: 2, 4 or 8; 0 to keep numbers as they came.
    pub key_bits: u32,
    /// Bits of a value's code: 2, 4 or 8; 0 to keep numbers as they came.
    pub value_bits: u32,
    /// How many numbers share a step and a least value: tokens of a key channel, channels of a value.
    pub group: usize,
}

impl Packing {
    pub(in crate::storage) fn check(&self, key_dim: usize, value_dim: usize) -> Result<()> {
        if self.key_kept == 0 || self.key_kept > key_dim {
            let got = self.key_kept.to_string();
            return Err(Error::OutOfRange { what: "key_kept", expected: "between 1 and the key's channels", got });
        }
        for (what, bits) in [("key_bits", self.key_bits), ("value_bits", self.value_bits)] {
            if ![0, 2, 4, 8].contains(&bits) {
                return Err(Error::OutOfRange { what, expected: "0, 2, 4 or 8", got: bits.to_string() });
            }
        }
        let fits = self.group > 0 && (BLOCK as usize).is_multiple_of(self.group);
        if !fits || (self.value_bits > 0 && !value_dim.is_multiple_of(self.group)) {
            let got = self.group.to_string();
            return Err(Error::OutOfRange {
                what: "group",
                expected: "a divisor of 64 and of the value's channels",
                got,
            });
        }
        Ok(())
    }
}

/// Bytes of a row of `n` numbers.
pub(super) fn row_bytes(n: usize, bits: u32, dtype: Dtype) -> usize {
    if bits == 0 { n * dtype.size() } else { (n * bits as usize).div_ceil(8) }
}
