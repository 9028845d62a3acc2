//! Bounds of the blocks of an arena.

use super::memory::Arena;
use crate::Result;
use crate::ids::{BLOCK, BlockId, Run};
use crate::storage::bounds::Bounds;

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
            let keys = (0..heads).map(|head| self.rows(run.block, head, 0).0);
            // SAFETY: a block has so many keys of the dtype for each head, aligned, for slabs are and rows are whole elements. The arena
            // and its bounds are two memories.
            unsafe { bounds.make(run.block, keys, dim, dtype) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Move;
    use crate::tensor::{Dtype, Elems};
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
    fn a_nan_is_found() {
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
    }
}
