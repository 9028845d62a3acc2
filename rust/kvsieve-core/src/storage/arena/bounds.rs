//! Bounds of the residents of an arena.

use std::convert::Infallible;

use super::memory::Arena;
use crate::Result;
use crate::ids::{BlockId, Run};
use crate::storage::bounds::{Bounds, Found, try_stretches};

impl Arena {
    /// Whether whole 64 residents of the runs, which are all of a row in text order, have no bounds.
    pub fn lacks_bounds(&self, runs: &[Run]) -> bool {
        let has = |stretch: &[Run]| self.bounds.as_ref().is_some_and(|bounds| bounds.get(stretch).is_some());
        try_stretches::<()>(runs, |stretch| if has(stretch) { Ok(()) } else { Err(()) }).is_err()
    }

    /// Makes the bounds of all whole 64 residents of the runs that have none; on failure some may have them. They are bounds of the numbers
    /// that attention reads: of codes, and zero where a channel was dropped.
    pub fn make_bounds(&mut self, runs: &[Run]) -> Result<()> {
        let (heads, dim, dtype) = (self.num_kv_heads(), self.key_dim(), self.dtype());
        let mut bounds = self.bounds.take().unwrap_or_else(|| Bounds::new(heads, dim, dtype));
        let done = try_stretches(runs, |stretch| {
            if bounds.get(stretch).is_some() {
                return Ok(());
            }
            stretch.iter().try_for_each(|run| self.check_span(run.block, run.lo, run.hi))?;
            bounds.make(stretch, heads, |head, run, found| self.bounds_of(head, run, found))
        });
        self.bounds = Some(bounds);
        done
    }

    /// Takes in the bounds of a run, which has memory and is not empty.
    fn bounds_of(&self, head: usize, run: &Run, found: &mut Found) {
        let dim = self.key_dim();
        match &self.packed {
            Some(packed) if run.block.is_packed() => {
                let (mut most, mut least) = (vec![0f32; dim], vec![0f32; dim]);
                // SAFETY: the run was found to lie in a block with memory and channels; so many channels has a key.
                unsafe { packed.bounds_f32(run, head, &mut most, &mut least) };
                found.take(most.into_iter(), least.into_iter());
            }
            _ => {
                let keys = self.rows(run.block, head, run.lo).0;
                // SAFETY: the run lies in the block, which has so many keys of the dtype, aligned, for slabs are and rows are whole
                // elements.
                unsafe { found.take_keys(keys, run.len() as usize, self.dtype()) };
            }
        }
    }

    /// Calls `each` with the address of the bounds of every whole 64 residents of the runs for head 0, and the bytes from head to head; null
    /// where they have none.
    pub(crate) fn each_bound(&self, runs: &[Run], mut each: impl FnMut(*const u8, usize)) {
        let Ok(()) = try_stretches::<Infallible>(runs, |stretch| {
            let bounds = self.bounds.as_ref().and_then(|bounds| bounds.get(stretch));
            let (row, hop) = bounds.map_or((std::ptr::null(), 0), |(row, hop)| (row.cast_const(), hop));
            each(row, hop);
            Ok(())
        });
    }

    /// Bytes of the bounds.
    pub fn bounds_bytes(&self) -> usize {
        self.bounds.as_ref().map_or(0, Bounds::bytes)
    }

    /// These slots of blocks are written: a block, and the first of them.
    pub(super) fn void_bounds(&mut self, block: BlockId, slot: u32) {
        let Some(bounds) = &mut self.bounds else { return };
        let group = match &self.packed {
            // Numbers that share a scale change together.
            Some(packed) if block.is_packed() && packed.packing().key_bits > 0 => packed.packing().group as u32,
            _ => 1,
        };
        bounds.touch(block, slot / group * group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{BLOCK, PACKED};
    use crate::plan::Move;
    use crate::storage::packed::{Channels, Chosen, Packing};
    use crate::tensor::{Dtype, Elems};
    use half::{bf16, f16};
    use std::sync::Arc;

    fn whole(block: u32) -> Run {
        Run { block: BlockId(block), lo: 0, hi: BLOCK }
    }

    fn arena(keys: &[u16], heads: usize, blocks: u32) -> Arena {
        let mut arena = Arena::new(heads, 4, 4, Dtype::BF16).unwrap();
        let runs: Vec<Run> = (0..blocks).map(whole).collect();
        arena.write(&runs, Elems::Bits(keys), Elems::Bits(keys)).unwrap();
        arena
    }

    /// Bounds of all stretches of `runs` for a head; none where one has none.
    fn rows(arena: &Arena, runs: &[Run], head: usize) -> Option<Vec<Vec<f32>>> {
        let mut found = Vec::new();
        arena.each_bound(runs, |row, stride| found.push((row, stride)));
        let dim = arena.key_dim();
        let wide = |(row, stride): (*const u8, usize)| {
            let row = row.wrapping_add(head * stride);
            // SAFETY: twice the channels.
            let one = |c: usize| unsafe {
                match arena.dtype() {
                    Dtype::F32 => *row.cast::<f32>().add(c),
                    Dtype::BF16 => (*row.cast::<bf16>().add(c)).to_f32(),
                    Dtype::F16 => (*row.cast::<f16>().add(c)).to_f32(),
                }
            };
            (!row.is_null()).then(|| (0..2 * dim).map(one).collect())
        };
        found.into_iter().map(wide).collect()
    }

    fn row(arena: &Arena, block: u32, head: usize) -> Option<Vec<f32>> {
        rows(arena, &[whole(block)], head).map(|mut rows| rows.remove(0))
    }

    #[test]
    fn greatest_and_least_of_every_channel() {
        let mut noise = Noise(1);
        let keys: Vec<u16> = (0..2 * 3 * 64 * 4).map(|_| bf16::from_f32(noise.unit()).to_bits()).collect();
        let mut arena = arena(&keys, 2, 3);
        let runs = [whole(0), whole(2), Run { block: BlockId(1), lo: 0, hi: 63 }];
        assert!(arena.lacks_bounds(&runs) && arena.bounds_bytes() == 0);
        arena.make_bounds(&runs).unwrap();
        assert!(!arena.lacks_bounds(&runs) && arena.lacks_bounds(&[whole(1)]));
        assert!(row(&arena, 1, 0).is_none(), "of whole blocks only");
        assert_eq!(arena.bounds_bytes(), 2 * 2 * 2 * 4 * 2, "two blocks, two heads, two rows");
        for (block, head) in [(0u32, 0usize), (0, 1), (2, 0), (2, 1)] {
            let at = |slot: usize, c: usize| {
                bf16::from_bits(keys[((head * 3 + block as usize) * 64 + slot) * 4 + c]).to_f32()
            };
            let found = row(&arena, block, head).unwrap();
            for c in 0..4 {
                let all: Vec<f32> = (0..64).map(|slot| at(slot, c)).collect();
                assert_eq!(found[c], all.iter().copied().fold(f32::MIN, f32::max));
                assert_eq!(found[4 + c], all.iter().copied().fold(f32::MAX, f32::min));
            }
        }

        // Whatever writes to a block makes its bounds void.
        let one = vec![bf16::from_f32(99.0).to_bits(); 2 * 4];
        arena.write(&[Run { block: BlockId(0), lo: 5, hi: 6 }], Elems::Bits(&one), Elems::Bits(&one)).unwrap();
        assert!(row(&arena, 0, 0).is_none() && row(&arena, 2, 0).is_some());
        let copy = Move { from: BlockId(0), from_slot: 5, to: BlockId(2), to_slot: 9, len: 1 };
        arena.apply(&[copy]).unwrap();
        assert!(row(&arena, 2, 0).is_none());
        arena.make_bounds(&runs).unwrap();
        assert_eq!((row(&arena, 0, 1).unwrap()[0], row(&arena, 2, 0).unwrap()[3]), (99.0, 99.0));

        arena.free_unused(&[true], &[]);
        assert!(row(&arena, 2, 0).is_none() && row(&arena, 0, 0).is_some());
        assert_eq!(arena.bounds_bytes(), 2 * 2 * 4 * 2);
    }

    #[test]
    fn a_nan_is_found() {
        let minus = |x: u16| x | 0x8000;
        for nan in [bf16::NAN.to_bits(), minus(bf16::NAN.to_bits())] {
            let mut keys = vec![bf16::from_f32(-1.5).to_bits(); 64 * 4];
            keys[17 * 4 + 2] = nan;
            let mut arena = arena(&keys, 1, 1);
            arena.make_bounds(&[whole(0)]).unwrap();
            let found = row(&arena, 0, 0).unwrap();
            assert!(found[2].is_nan() != found[6].is_nan(), "{found:?}");
            assert_eq!((found[0], found[4]), (-1.5, -1.5));
        }
    }

    /// What is written behind the end of a stretch does not concern it; what is written into it does, wherever it lies.
    #[test]
    fn a_stretch_lies_in_pieces() {
        let mut noise = Noise(7);
        let keys: Vec<u16> = (0..3 * 64 * 4).map(|_| bf16::from_f32(noise.unit()).to_bits()).collect();
        let mut arena = arena(&keys, 1, 3);
        let run = |block: u32, lo, hi| Run { block: BlockId(block), lo, hi };
        let runs = [run(0, 8, 64), run(1, 0, 30), run(2, 0, 42)];
        arena.make_bounds(&runs).unwrap();
        let one = vec![bf16::from_f32(77.0).to_bits(); 4];
        let mut write = |block, slot| {
            arena.write(&[run(block, slot, slot + 1)], Elems::Bits(&one), Elems::Bits(&one)).unwrap();
            let left = !arena.lacks_bounds(&runs);
            arena.make_bounds(&runs).unwrap();
            (left, rows(&arena, &runs, 0).unwrap().iter().map(|row| row[0] == 77.0).collect::<Vec<_>>())
        };
        assert_eq!(write(2, 42), (true, vec![false, false]));
        assert_eq!(write(1, 30), (true, vec![false, false]));
        assert_eq!(write(1, 29), (false, vec![false, true]));
        assert_eq!(write(1, 7), (false, vec![true, true]), "the first stretch ends in block 1");
    }

    /// Rows that share a block in which a stretch begins, and go on in blocks of their own.
    #[test]
    fn rows_that_part_have_bounds_each() {
        let mut noise = Noise(5);
        let keys: Vec<u16> = (0..3 * 64 * 4).map(|_| bf16::from_f32(noise.unit()).to_bits()).collect();
        let mut arena = arena(&keys, 1, 3);
        let run = |block: u32, lo, hi| Run { block: BlockId(block), lo, hi };
        let (one, two) = ([run(0, 0, 40), run(1, 0, 24)], [run(0, 0, 40), run(2, 0, 24)]);
        for runs in [&one, &two, &one] {
            arena.make_bounds(runs).unwrap();
            check(&arena, runs, 0);
        }
        assert!(!arena.lacks_bounds(&one) && !arena.lacks_bounds(&two));
        assert_eq!(arena.bounds_bytes(), 2 * 2 * 4 * 2);
        fill(&mut arena, &mut noise, run(2, 3, 4));
        assert!(!arena.lacks_bounds(&one) && arena.lacks_bounds(&two));
        arena.free_unused(&[true, true], &[]);
        assert_eq!(arena.bounds_bytes(), 2 * 4 * 2, "what no longer holds takes no memory");
    }

    struct Noise(u64);

    impl Noise {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % n
        }

        fn unit(&mut self) -> f32 {
            self.below(4001) as f32 / 1000.0 - 2.0
        }
    }

    /// Random layouts of plain and packed runs, changed again and again: bounds are those of what the arena says that it holds, and no key
    /// of a stretch lies outside of them.
    #[test]
    fn bounds_are_of_what_is_stored_wherever_it_lies() {
        let mut noise = Noise(11);
        for round in 0..60 {
            let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
            let (heads, dim, bits) = (1 + noise.below(2), [4, 33, 64][noise.below(3)], [0, 2, 4, 8][noise.below(4)]);
            let (kept, group) =
                (if noise.below(2) == 0 { dim } else { 1 + noise.below(dim) }, [8, 32, 64][noise.below(3)]);
            let mut arena = Arena::new(heads, dim, dim, dtype).unwrap();
            arena.set_packing(Packing { key_kept: kept, key_bits: bits, value_bits: 0, group }).unwrap();
            let first = noise.below(dim - kept + 1) as i64;
            let index: Vec<i64> = (0..heads).flat_map(|_| first..first + kept as i64).collect();
            let channels = Arc::new(Channels::new(&index, &vec![0; heads], dim).unwrap());
            for block in 0..6 {
                fill(&mut arena, &mut noise, whole(block));
                let to = BlockId(PACKED + block);
                let all = Move { from: BlockId(block), from_slot: 0, to, to_slot: 0, len: 64 };
                arena.pack(&[all], &Chosen::New(Arc::clone(&channels))).unwrap();
            }
            for _ in 0..12 {
                let mut runs = Vec::new();
                for block in 0..6u32 {
                    let (lo, hi) = [(0, 64), (noise.below(64), 64), (0, 1 + noise.below(64))][noise.below(3)];
                    let block = BlockId(if noise.below(2) == 0 { block } else { PACKED + block });
                    runs.push(Run { block, lo: lo as u32, hi: hi as u32 });
                }
                arena.make_bounds(&runs).unwrap();
                check(&arena, &runs, bits);
                let (block, slot) = (noise.below(6) as u32, noise.below(64) as u32);
                match noise.below(3) {
                    0 => fill(&mut arena, &mut noise, Run { block: BlockId(block), lo: slot, hi: slot + 1 }),
                    1 => {
                        fill(&mut arena, &mut noise, whole(block));
                        let (from, to) = (BlockId(block), BlockId(PACKED + noise.below(6) as u32));
                        let (from_slot, len) = (slot / 8 * 8, 8);
                        let some = Move { from, from_slot, to, to_slot: noise.below(8) as u32 * 8, len };
                        arena.pack(&[some], &Chosen::Like(to)).unwrap();
                    }
                    _ => {
                        let (from, to) = (BlockId(PACKED + block), BlockId(PACKED + (block + 1) % 6));
                        let some = Move { from, from_slot: slot, to, to_slot: noise.below(60) as u32, len: 1 };
                        arena.apply(&[some]).unwrap();
                    }
                }
                arena.make_bounds(&runs).unwrap();
                check(&arena, &runs, bits);
            }
        }
    }

    fn fill(arena: &mut Arena, noise: &mut Noise, run: Run) {
        let n = arena.num_kv_heads() * run.len() as usize * arena.key_dim();
        let numbers: Vec<f32> = (0..n).map(|_| noise.unit()).collect();
        let narrow = numbers.iter().map(|&x| match arena.dtype() {
            Dtype::BF16 => bf16::from_f32(x).to_bits(),
            _ => f16::from_f32(x).to_bits(),
        });
        let narrow: Vec<u16> = narrow.collect();
        let elems = if arena.dtype() == Dtype::F32 { Elems::F32(&numbers) } else { Elems::Bits(&narrow) };
        arena.write(&[run], elems, elems).unwrap();
    }

    fn check(arena: &Arena, runs: &[Run], bits: u32) {
        let slots: Vec<(BlockId, u32)> = runs.iter().flat_map(|r| (r.lo..r.hi).map(|slot| (r.block, slot))).collect();
        for head in 0..arena.num_kv_heads() {
            let found = rows(arena, runs, head).expect("bounds");
            assert_eq!(found.len(), slots.len() / 64);
            for (row, slots) in found.iter().zip(slots.chunks_exact(64)) {
                let keys: Vec<Vec<f64>> =
                    slots.iter().map(|&(b, slot)| arena.token(b, head, slot).unwrap().0).collect();
                for c in 0..arena.key_dim() {
                    let most = keys.iter().map(|key| key[c]).fold(f64::MIN, f64::max);
                    let least = keys.iter().map(|key| key[c]).fold(f64::MAX, f64::min);
                    let (above, below) = (f64::from(row[c]), f64::from(row[arena.key_dim() + c]));
                    assert!(above >= most && below <= least, "no key lies outside");
                    let exact = bits == 0 || arena.dtype() == Dtype::F32;
                    // Of sixteen bits a number is at most so far from its neighbour.
                    let near = |a: f64, b: f64| (a - b).abs() <= if exact { 0.0 } else { b.abs() / 128.0 + 1e-7 };
                    assert!(near(above, most) && near(below, least), "{above} {most} {below} {least}");
                }
            }
        }
    }
}
