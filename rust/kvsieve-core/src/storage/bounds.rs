//! The greatest and the least number of every key channel of [`BLOCK`] residents: what their keys can score at most, without reading
//! them.
//!
//! Residents are counted in text order, so these are one whole block wherever nothing was evicted, packed or shared; otherwise they lie in
//! pieces of several.

use std::result;

use half::{bf16, f16};

use super::buf::Buf;
use super::slabs::{Slabs, needs, number, reserve_all};
use crate::ids::{BLOCK, BlockId, PACKED, Run};
use crate::tensor::Dtype;
use crate::{Error, Result, fault};

/// Calls `each` with every [`BLOCK`] residents of `runs`, as the runs that they lie in: neighbours of one block are one. What is left at the
/// end is none.
pub(super) fn try_stretches<E>(
    runs: &[Run],
    mut each: impl FnMut(&[Run]) -> result::Result<(), E>,
) -> result::Result<(), E> {
    let (mut open, mut len) = (Vec::<Run>::new(), 0);
    for run in runs {
        let mut lo = run.lo;
        while lo < run.hi {
            let hi = run.hi.min(lo + BLOCK - len);
            match open.last_mut() {
                Some(last) if last.block == run.block && last.hi == lo => last.hi = hi,
                _ => open.push(Run { block: run.block, lo, hi }),
            }
            (len, lo) = (len + hi - lo, hi);
            if len == BLOCK {
                each(&open)?;
                open.clear();
                len = 0;
            }
        }
    }
    Ok(())
}

/// Bounds of the residents of one layer; made when asked for, and void as soon as what they are of is written again.
///
/// Of each stretch `[heads][greatest of every channel, then least]`, of the arena's dtype. Those of whole blocks lie side by side. Others are
/// kept with the block in which they begin: rows that share it may go on in blocks of their own.
pub(super) struct Bounds {
    dtype: Dtype,
    dim: usize,
    plain: Kind,
    packed: Kind,
}

/// Bounds of stretches that begin in blocks of one kind, and what is known of these blocks.
struct Kind {
    slabs: Slabs,
    /// By block, for those that are a stretch: how often it had been written.
    whole: Vec<Option<u32>>,
    /// By the first block.
    split: Vec<Vec<Split>>,
    /// By block.
    written: Vec<Written>,
}

/// Bounds of a stretch in pieces.
struct Split {
    /// Where the tokens lie, and how often each block had been written.
    pieces: Vec<(Run, u32)>,
    rows: Buf,
}

/// How often a block was written where bounds knew it, and the end of what they know.
#[derive(Clone, Copy, Default)]
struct Written {
    times: u32,
    known: u32,
}

/// Whether a stretch is a block.
fn is_whole(stretch: &[Run]) -> bool {
    stretch.len() == 1 && stretch[0].len() == BLOCK
}

/// Makes room for a number `at` of a list.
fn room<T>(list: &mut Vec<T>, at: usize, empty: impl FnMut() -> T) -> Result<()> {
    let more = (at + 1).saturating_sub(list.len());
    fault::may_lack(more * size_of::<T>())?;
    list.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes: more * size_of::<T>() })?;
    list.resize_with(list.len() + more, empty);
    Ok(())
}

impl Kind {
    fn new(heads: usize, row_bytes: usize) -> Self {
        Kind { slabs: Slabs::of_blocks(heads, row_bytes), whole: Vec::new(), split: Vec::new(), written: Vec::new() }
    }

    fn times(&self, block: BlockId) -> u32 {
        self.written.get(number(block)).map_or(0, |written| written.times)
    }

    fn free(&mut self, block: usize) {
        self.slabs.free(block);
        if let Some(whole) = self.whole.get_mut(block) {
            *whole = None;
        }
        if let Some(split) = self.split.get_mut(block) {
            split.clear();
        }
        self.write(block, 0);
    }

    fn write(&mut self, block: usize, from: u32) {
        if let Some(written) = self.written.get_mut(block)
            && from < written.known
        {
            *written = Written { times: written.times.wrapping_add(1), known: 0 };
        }
    }
}

impl Bounds {
    pub fn new(heads: usize, dim: usize, dtype: Dtype) -> Self {
        let row_bytes = 2 * dim * dtype.size();
        Bounds { dtype, dim, plain: Kind::new(heads, row_bytes), packed: Kind::new(heads, row_bytes) }
    }

    pub fn bytes(&self) -> usize {
        let kinds = [&self.plain, &self.packed];
        let splits = kinds.iter().flat_map(|kind| kind.split.iter().flatten()).map(|split| split.rows.len());
        kinds.iter().map(|kind| kind.slabs.bytes()).sum::<usize>() + splits.sum::<usize>()
    }

    fn row_bytes(&self) -> usize {
        2 * self.dim * self.dtype.size()
    }

    fn kind(&self, block: BlockId) -> &Kind {
        if block.is_packed() { &self.packed } else { &self.plain }
    }

    fn kind_mut(&mut self, block: BlockId) -> &mut Kind {
        if block.is_packed() { &mut self.packed } else { &mut self.plain }
    }

    /// Slots of a block are written, from this one on.
    pub fn touch(&mut self, block: BlockId, from: u32) {
        self.kind_mut(block).write(number(block), from);
    }

    /// Takes back the memory of what begins in blocks that are not in use, and of what no longer holds.
    pub fn free_unused(&mut self, in_use: &[bool], packed_in_use: &[bool]) {
        for (kind, in_use) in [(&mut self.plain, in_use), (&mut self.packed, packed_in_use)] {
            for block in 0..kind.written.len() {
                if !in_use.get(block).copied().unwrap_or(false) {
                    kind.free(block);
                }
            }
        }
        for block in 0..self.plain.split.len() {
            self.forget(BlockId(block as u32));
        }
        for block in 0..self.packed.split.len() {
            self.forget(BlockId(PACKED + block as u32));
        }
    }

    /// Forgets what begins in a block and no longer holds.
    fn forget(&mut self, block: BlockId) {
        let Some(splits) = self.kind_mut(block).split.get_mut(number(block)).filter(|splits| !splits.is_empty()) else {
            return;
        };
        let mut splits = std::mem::take(splits);
        splits.retain(|split| split.pieces.iter().all(|(run, times)| self.kind(run.block).times(run.block) == *times));
        self.kind_mut(block).split[number(block)] = splits;
    }

    /// Where the bounds of a stretch lie, and the bytes from head to head.
    pub fn get(&self, stretch: &[Run]) -> Option<(*mut u8, usize)> {
        let first = stretch.first()?;
        let kind = self.kind(first.block);
        if is_whole(stretch) {
            let held = kind.slabs.get(number(first.block))?;
            let holds = kind.whole.get(number(first.block)) == Some(&Some(kind.times(first.block)));
            return holds.then_some((held.start.as_ptr(), held.hop));
        }
        let same =
            |(run, (of, times)): (&Run, &(Run, u32))| run == of && self.kind(run.block).times(run.block) == *times;
        let mut splits = kind.split.get(number(first.block))?.iter();
        let found =
            splits.find(|split| split.pieces.len() == stretch.len() && stretch.iter().zip(&split.pieces).all(same))?;
        Some((found.rows.ptr().as_ptr(), self.row_bytes()))
    }

    /// Makes the bounds of a stretch. `of(head, run, found)` tells those of a piece of it.
    pub fn make(&mut self, stretch: &[Run], heads: usize, of: impl Fn(usize, &Run, &mut Found)) -> Result<()> {
        let Some(first) = stretch.first() else { return Ok(()) };
        let (block, at) = (first.block, number(first.block));
        for run in stretch {
            let (written, at) = (&mut self.kind_mut(run.block).written, number(run.block));
            room(written, at, Written::default)?;
            written[at].known = written[at].known.max(run.hi);
        }
        if is_whole(stretch) {
            let kind = self.kind_mut(block);
            room(&mut kind.whole, at, || None)?;
            reserve_all(std::iter::once(&mut kind.slabs), &needs(std::iter::once((block, BLOCK))))?;
            kind.whole[at] = Some(kind.times(block));
        } else {
            let rows = Buf::zeroed(heads * self.row_bytes())?;
            let pieces = stretch.iter().map(|run| (*run, self.kind(run.block).times(run.block))).collect();
            room(&mut self.kind_mut(block).split, at, Vec::new)?;
            self.forget(block);
            self.kind_mut(block).split[at].push(Split { pieces, rows });
        }
        let Some((rows, hop)) = self.get(stretch) else { return Ok(()) };
        for head in 0..heads {
            let mut found = Found::new(self.dim);
            stretch.iter().for_each(|run| of(head, run, &mut found));
            let to = rows.wrapping_add(head * hop);
            let numbers = found.most.iter().map(|&x| (x, true)).chain(found.least.iter().map(|&x| (x, false)));
            for (i, (x, up)) in numbers.enumerate() {
                let x = u32::back(x);
                // SAFETY: there is room for two rows of the dtype for each head, which are aligned, for slabs and buffers are and rows are
                // whole elements.
                unsafe {
                    match self.dtype {
                        Dtype::F32 => to.cast::<u32>().add(i).write(x),
                        Dtype::BF16 => to.cast::<u16>().add(i).write(outwards(f32::from_bits(x), up, &BF16)),
                        Dtype::F16 => to.cast::<u16>().add(i).write(outwards(f32::from_bits(x), up, &F16)),
                    }
                }
            }
        }
        Ok(())
    }
}

/// The greatest and the least number of every channel so far, in the order of [`Bits`].
pub(super) struct Found {
    most: Vec<i32>,
    least: Vec<i32>,
    is_first: bool,
}

impl Found {
    fn new(dim: usize) -> Self {
        Found { most: vec![0; dim], least: vec![0; dim], is_first: true }
    }

    /// Takes in greatest and least numbers of every channel.
    pub fn take(&mut self, most: impl Iterator<Item = f32>, least: impl Iterator<Item = f32>) {
        for ((mine, mine_least), (most, least)) in self.most.iter_mut().zip(&mut self.least).zip(most.zip(least)) {
            let (most, least) = (most.to_bits().ordered(), least.to_bits().ordered());
            (*mine, *mine_least) =
                if self.is_first { (most, least) } else { ((*mine).max(most), (*mine_least).min(least)) };
        }
        self.is_first = false;
    }

    /// Takes in keys `[n][dim]`.
    ///
    /// # Safety
    /// `n` rows of as many elements of the dtype as there are channels, aligned; at least one.
    pub unsafe fn take_keys(&mut self, keys: *const u8, n: usize, dtype: Dtype) {
        let dim = self.most.len();
        let mut both = vec![0u32; 2 * dim];
        // SAFETY: the caller's promise.
        unsafe {
            if dtype == Dtype::F32 {
                fold::<u32>(std::slice::from_raw_parts(keys.cast(), n * dim), &mut both);
            } else {
                let mut narrow = vec![0u16; 2 * dim];
                fold::<u16>(std::slice::from_raw_parts(keys.cast(), n * dim), &mut narrow);
                let wide = |x: u16| match dtype {
                    Dtype::F16 => f16::from_bits(x).to_f32(),
                    _ => bf16::from_bits(x).to_f32(),
                };
                both.iter_mut().zip(narrow).for_each(|(to, x)| *to = wide(x).to_bits());
            }
        }
        let (most, least) = both.split_at(dim);
        self.take(most.iter().map(|&x| f32::from_bits(x)), least.iter().map(|&x| f32::from_bits(x)));
    }
}

/// How a format of 16 bits rounds, and its greatest number.
struct Half {
    near: fn(f32) -> u16,
    wide: fn(u16) -> f32,
    most: u16,
}

const BF16: Half =
    Half { near: |x| bf16::from_f32(x).to_bits(), wide: |x| bf16::from_bits(x).to_f32(), most: bf16::MAX.to_bits() };
const F16: Half =
    Half { near: |x| f16::from_f32(x).to_bits(), wide: |x| f16::from_bits(x).to_f32(), most: f16::MAX.to_bits() };

/// The nearest number of the format that is not below `x`, or not above it. Finite numbers stay finite.
fn outwards(x: f32, up: bool, half: &Half) -> u16 {
    let near = (half.near)(x);
    let wide = (half.wide)(near);
    if wide.is_infinite() && x.is_finite() {
        return if x > 0.0 { half.most } else { half.most | 0x8000 };
    }
    let next = match up {
        true if wide < x => near.ordered() + 1,
        false if wide > x => near.ordered() - 1,
        _ => return near,
    };
    let next = u16::back(next);
    if (half.wide)(next).is_infinite() { near } else { next }
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

    #[test]
    fn bounds_that_are_rounded_stay_bounds() {
        let mut state = 1u32;
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(state);
            for half in [&BF16, &F16] {
                let (below, above) = ((half.wide)(outwards(x, false, half)), (half.wide)(outwards(x, true, half)));
                if x.is_nan() {
                    assert!(below.is_nan() && above.is_nan());
                    continue;
                }
                let most = (half.wide)(half.most);
                assert!(below <= x.max(-most) && x.min(most) <= above, "{below} {x} {above}");
                let exact = (half.wide)((half.near)(x)) == x;
                assert!(!exact || (below == x && above == x));
                assert!(x.is_infinite() || (below.is_finite() && above.is_finite()));
            }
        }
    }

    #[test]
    fn stretches_are_of_a_block_of_residents() {
        let run = |block, lo, hi| Run { block: BlockId(block), lo, hi };
        let of = |runs: &[Run]| {
            let mut found = Vec::new();
            let all: Result<()> = try_stretches(runs, |stretch| {
                found.push(stretch.to_vec());
                Ok(())
            });
            all.unwrap();
            found
        };
        assert_eq!(of(&[run(3, 0, 64), run(1, 0, 63)]), [[run(3, 0, 64)]]);
        assert_eq!(of(&[run(3, 0, 32), run(3, 32, 64)]), [[run(3, 0, 64)]], "in one piece, however it is told");
        let ragged = [run(9, 0, 20), run(2, 8, 64), run(4, 0, 64), run(5, 3, 4)];
        let first = vec![run(9, 0, 20), run(2, 8, 52)];
        assert_eq!(of(&ragged), [first, vec![run(2, 52, 64), run(4, 0, 52)]]);
    }
}
