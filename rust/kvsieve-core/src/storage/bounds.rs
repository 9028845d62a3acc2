//! The greatest and the least number of every key channel of a block: what its keys can score at most, without reading them.

use super::arena::Arena;
use super::slabs::{Slabs, needs, number, reserve_all};
use crate::ids::{BLOCK, BlockId, Run};
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

    fn has(&self, block: BlockId) -> bool {
        self.made.get(block.0 as usize).is_some_and(|&made| made)
    }

    fn row(&self, block: BlockId, head: usize) -> Option<*mut u8> {
        let held = self.slabs.get(number(block))?;
        Some(held.start.as_ptr().wrapping_add(head * held.hop))
    }

    /// Gives a block memory.
    fn reserve(&mut self, block: BlockId) -> Result<()> {
        reserve_all(std::iter::once(&mut self.slabs), &needs(std::iter::once((block, BLOCK))))?;
        let end = block.0 as usize + 1;
        if self.made.len() < end {
            let more = end - self.made.len();
            self.made.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes: more })?;
            self.made.resize(end, false);
        }
        Ok(())
    }
}

/// Whether bounds are kept of a run: of whole plain blocks only.
fn is_bounded(run: &Run) -> bool {
    run.lo == 0 && run.hi == BLOCK && !run.block.is_packed()
}

impl Arena {
    /// Whether a whole block of the runs has no bounds.
    pub fn lacks_bounds(&self, runs: &[Run]) -> bool {
        let has = |block| self.bounds.as_ref().is_some_and(|bounds| bounds.has(block));
        runs.iter().any(|run| is_bounded(run) && !has(run.block))
    }

    /// Makes the bounds of all whole blocks of the runs that have none; on failure some may have them.
    pub fn make_bounds(&mut self, runs: &[Run]) -> Result<()> {
        let (heads, dim, dtype) = (self.num_kv_heads(), self.key_dim(), self.dtype());
        let mut bounds = self.bounds.take().unwrap_or_else(|| Bounds::new(heads, dim, dtype));
        let done = runs.iter().filter(|run| is_bounded(run)).try_for_each(|run| {
            if bounds.has(run.block) {
                return Ok(());
            }
            self.check_span(run.block, run.lo, run.hi)?;
            bounds.reserve(run.block)?;
            for head in 0..heads {
                let (keys, _) = self.rows(run.block, head, 0);
                let Some(to) = bounds.row(run.block, head) else { continue };
                let n = BLOCK as usize * dim;
                // SAFETY: a block has so many keys of the dtype for each head, and its bounds were given room for two rows; both are
                // aligned, for slabs are and rows are whole elements. The arena and its bounds are two memories.
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
            bounds.made[run.block.0 as usize] = true;
            Ok(())
        });
        self.bounds = Some(bounds);
        done
    }

    /// The bounds of a block for a head, `2 * key_dim` elements, if they were made since it was last written.
    pub(crate) fn bound(&self, block: BlockId, head: usize) -> Option<*const u8> {
        assert!(head < self.num_kv_heads(), "head {head} outside the arena");
        let bounds = self.bounds.as_ref().filter(|bounds| bounds.has(block))?;
        bounds.row(block, head).map(|row| row.cast_const())
    }

    /// Bytes of the bounds of blocks.
    pub fn bounds_bytes(&self) -> usize {
        self.bounds.as_ref().map_or(0, Bounds::bytes)
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
    use crate::plan::Move;
    use crate::tensor::Elems;
    use half::bf16;

    fn arena(keys: &[u16], heads: usize, blocks: u32) -> Arena {
        let mut arena = Arena::new(heads, 4, 4, Dtype::BF16).unwrap();
        let runs: Vec<Run> = (0..blocks).map(|b| Run { block: BlockId(b), lo: 0, hi: BLOCK }).collect();
        arena.write(&runs, Elems::Bits(keys), Elems::Bits(keys)).unwrap();
        arena
    }

    fn row(arena: &Arena, block: u32, head: usize) -> Vec<f32> {
        let row = arena.bound(BlockId(block), head).expect("bounds");
        // SAFETY: twice the four channels.
        let row = unsafe { std::slice::from_raw_parts(row.cast::<bf16>(), 8) };
        row.iter().map(|x| x.to_f32()).collect()
    }

    #[test]
    fn greatest_and_least_of_every_channel() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32((state >> 20) as f32 / 100.0 - 20.0).to_bits()
        };
        let keys: Vec<u16> = (0..2 * 3 * 64 * 4).map(|_| next()).collect();
        let mut arena = arena(&keys, 2, 3);
        let whole = |block| Run { block: BlockId(block), lo: 0, hi: BLOCK };
        let runs = [whole(0), whole(2), Run { block: BlockId(1), lo: 0, hi: 63 }];
        assert!(arena.lacks_bounds(&runs) && arena.bounds_bytes() == 0);
        arena.make_bounds(&runs).unwrap();
        assert!(!arena.lacks_bounds(&runs) && arena.lacks_bounds(&[whole(1)]));
        assert!(arena.bound(BlockId(1), 0).is_none(), "of whole blocks only");
        assert_eq!(arena.bounds_bytes(), 3 * 2 * 2 * 4 * 2 / 3 * 2, "two blocks, two heads, two rows");
        for (block, head) in [(0u32, 0usize), (0, 1), (2, 0), (2, 1)] {
            let at = |slot: usize, c: usize| {
                bf16::from_bits(keys[((head * 3 + block as usize) * 64 + slot) * 4 + c]).to_f32()
            };
            for c in 0..4 {
                let all: Vec<f32> = (0..64).map(|slot| at(slot, c)).collect();
                let found = row(&arena, block, head);
                assert_eq!(found[c], all.iter().copied().fold(f32::MIN, f32::max));
                assert_eq!(found[4 + c], all.iter().copied().fold(f32::MAX, f32::min));
            }
        }

        // Whatever writes to a block makes its bounds void.
        let one = vec![bf16::from_f32(99.0).to_bits(); 2 * 4];
        arena.write(&[Run { block: BlockId(0), lo: 5, hi: 6 }], Elems::Bits(&one), Elems::Bits(&one)).unwrap();
        assert!(arena.bound(BlockId(0), 0).is_none() && arena.bound(BlockId(2), 0).is_some());
        let copy = Move { from: BlockId(0), from_slot: 5, to: BlockId(2), to_slot: 9, len: 1 };
        arena.apply(&[copy]).unwrap();
        assert!(arena.bound(BlockId(2), 0).is_none());
        arena.make_bounds(&runs).unwrap();
        assert_eq!((row(&arena, 0, 1)[0], row(&arena, 2, 0)[3]), (99.0, 99.0));

        arena.free_unused(&[true], &[]);
        assert!(arena.bound(BlockId(2), 0).is_none() && arena.bound(BlockId(0), 0).is_some());
        assert_eq!(arena.bounds_bytes(), 2 * 2 * 4 * 2);
    }

    #[test]
    fn nan_and_signs() {
        let minus = |x: u16| x | 0x8000;
        for nan in [bf16::NAN.to_bits(), minus(bf16::NAN.to_bits())] {
            let mut keys = vec![bf16::from_f32(-1.5).to_bits(); 64 * 4];
            keys[17 * 4 + 2] = nan;
            let mut arena = arena(&keys, 1, 1);
            arena.make_bounds(&[Run { block: BlockId(0), lo: 0, hi: BLOCK }]).unwrap();
            let found = row(&arena, 0, 0);
            assert!(found[2].is_nan() != found[6].is_nan(), "{found:?}");
            assert_eq!((found[0], found[4]), (-1.5, -1.5));
        }
        for x in [0.0f32, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE] {
            assert_eq!(u32::back(x.to_bits().ordered()), x.to_bits());
            assert!(x.to_bits().ordered() <= f32::INFINITY.to_bits().ordered());
        }
        assert!((-2f32).to_bits().ordered() < (-1f32).to_bits().ordered());
    }
}
