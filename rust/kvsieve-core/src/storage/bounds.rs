//! The greatest and the least number of every key channel of a block: what its keys can score at most, without reading them.

use super::slabs::{Slabs, needs, number, reserve_all};
use crate::ids::{BLOCK, BlockId};
use crate::tensor::Dtype;
use crate::{Error, Result};

/// Bounds of the blocks of one layer; made when asked for, and void as soon as the block is written again.
///
/// Of each block `[heads][greatest of every channel, then least]`, of the arena's dtype.
pub(super) struct Bounds {
    slabs: Slabs,
    /// By block.
    made: Vec<bool>,
}

impl Bounds {
    pub fn new(heads: usize, key_dim: usize, dtype: Dtype) -> Self {
        let row_bytes = 2 * key_dim * dtype.size();
        Bounds { slabs: Slabs::of_blocks(heads, row_bytes), made: Vec::new() }
    }

    pub fn bytes(&self) -> usize {
        self.slabs.bytes()
    }

    pub fn touch(&mut self, block: BlockId) {
        if let Some(made) = self.made.get_mut(block.0 as usize) {
            *made = false;
        }
    }

    /// Takes back the memory of a block's bounds.
    pub fn free(&mut self, block: usize) {
        self.slabs.free(block);
        self.touch(BlockId(block as u32));
    }

    pub fn has(&self, block: BlockId) -> bool {
        self.made.get(block.0 as usize).is_some_and(|&made| made)
    }

    pub fn row(&self, block: BlockId, head: usize) -> Option<*mut u8> {
        let held = self.slabs.get(number(block))?;
        Some(held.start.as_ptr().wrapping_add(head * held.hop))
    }

    /// Gives a block memory.
    pub fn reserve(&mut self, block: BlockId) -> Result<()> {
        reserve_all(std::iter::once(&mut self.slabs), &needs(std::iter::once((block, BLOCK))))?;
        let end = block.0 as usize + 1;
        if self.made.len() < end {
            let more = end - self.made.len();
            self.made.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes: more })?;
            self.made.resize(end, false);
        }
        Ok(())
    }

    /// Makes the bounds of a block, `keys[head]` being its keys of a head.
    ///
    /// # Safety
    /// `[BLOCK][dim]` keys of the dtype for each head, aligned, and not this memory.
    pub unsafe fn make(&mut self, block: BlockId, keys: impl Iterator<Item = *const u8>, dim: usize, dtype: Dtype) {
        let n = BLOCK as usize * dim;
        for (head, keys) in keys.enumerate() {
            let Some(to) = self.row(block, head) else { continue };
            // SAFETY: the caller's promise; the bounds were given room for two rows, which are aligned, for slabs are and rows are whole
            // elements.
            unsafe {
                match dtype {
                    Dtype::F32 => fold::<u32>(
                        std::slice::from_raw_parts(keys.cast(), n),
                        std::slice::from_raw_parts_mut(to.cast(), 2 * dim),
                    ),
                    Dtype::BF16 | Dtype::F16 => fold::<u16>(
                        std::slice::from_raw_parts(keys.cast(), n),
                        std::slice::from_raw_parts_mut(to.cast(), 2 * dim),
                    ),
                }
            }
        }
        self.made[block.0 as usize] = true;
    }
}

/// The bits of a float, in an order: from the least number to the greatest, NaN beyond infinity on the side of its sign.
trait Bits: Copy {
    type Ordered: Copy + Ord;
    fn ordered(self) -> Self::Ordered;
    fn back(ordered: Self::Ordered) -> Self;
}

impl Bits for u16 {
    type Ordered = i16;
    fn ordered(self) -> i16 {
        let x = self.cast_signed();
        x ^ (x >> 15 & i16::MAX)
    }
    fn back(x: i16) -> u16 {
        (x ^ (x >> 15 & i16::MAX)).cast_unsigned()
    }
}

impl Bits for u32 {
    type Ordered = i32;
    fn ordered(self) -> i32 {
        let x = self.cast_signed();
        x ^ (x >> 31 & i32::MAX)
    }
    fn back(x: i32) -> u32 {
        (x ^ (x >> 31 & i32::MAX)).cast_unsigned()
    }
}

/// Greatest and least of every channel of `keys` `[n][dim]` to `to` `[2][dim]`. A NaN is found as one of both.
fn fold<T: Bits>(keys: &[T], to: &mut [T]) {
    let dim = to.len() / 2;
    let first: Vec<T::Ordered> = keys[..dim].iter().map(|x| x.ordered()).collect();
    let (mut most, mut least) = (first.clone(), first);
    for key in keys.chunks_exact(dim).skip(1) {
        for ((most, least), x) in most.iter_mut().zip(&mut least).zip(key) {
            let x = x.ordered();
            *most = (*most).max(x);
            *least = (*least).min(x);
        }
    }
    for (to, x) in to.iter_mut().zip(most.into_iter().chain(least)) {
        *to = T::back(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_ordered_by_their_bits() {
        for x in [0.0f32, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE] {
            assert_eq!(u32::back(x.to_bits().ordered()), x.to_bits());
            assert!(x.to_bits().ordered() <= f32::INFINITY.to_bits().ordered());
        }
        assert!((-2f32).to_bits().ordered() < (-1f32).to_bits().ordered());
    }
}
