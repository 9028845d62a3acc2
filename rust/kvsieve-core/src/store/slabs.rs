//! The memory of blocks: a slab a block, that comes and goes.
//!
//! A slab holds all 64 slots of its block, or only the first ones: the block at the end of a text takes memory as it fills, some slots
//! at a time, and is copied when it grows. A whole slab never moves.

use std::ops::Range;
use std::ptr::NonNull;

use super::buf::{Buf, HUGE};
use super::reservation::Reservation;
use crate::ids::{BLOCK, BlockId, PACKED};
use crate::{Error, Result};

/// No stream is this long (2 billion tokens); a block number beyond it is a mistake, not a reason to allocate.
pub(super) const MAX_BLOCKS: u32 = PACKED;

/// Slots that rows grow by.
const STEP: u32 = 8;

/// Slots that columns grow by: a multiple of the most that a kernel takes at once.
pub(crate) const COLUMN: u32 = 32;

/// Slabs whose addresses are reserved together: those of the blocks before each of these, then of as many as the last at a time.
const EXTENTS: [usize; 2] = [128, 1024];

/// The extent of a block, and the blocks of the extent.
fn extent(block: usize) -> (usize, Range<usize>) {
    let [first, each] = EXTENTS;
    match block {
        _ if block < first => (0, 0..first),
        _ if block < each => (1, first..each),
        _ => (1 + block / each, block / each * each..(block / each + 1) * each),
    }
}

/// The number of a block among those of its kind.
pub(super) fn number(block: BlockId) -> usize {
    (if block.is_packed() { block.0 - PACKED } else { block.0 }) as usize
}

/// Memory for the slots of a block.
pub(super) struct Slab {
    start: NonNull<u8>,
    slots: u32,
    /// Its memory, where it is not part of an extent's.
    own: Option<Buf>,
}

// SAFETY: the address is of `own` or of the reservation beside it, which may be sent and shared.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// Slabs that have memory and are no block's yet.
pub(super) struct Prepared(Vec<(usize, Slab)>);

/// Which blocks must have memory, and up to which slot: ascending, each once.
pub(super) fn needs(wanted: impl Iterator<Item = (BlockId, u32)>) -> Vec<(usize, u32)> {
    let mut needs: Vec<_> = wanted.map(|(block, end)| (number(block), end)).collect();
    needs.sort_unstable();
    // The last of equals is the one that needs most.
    needs.reverse();
    needs.dedup_by_key(|need| need.0);
    needs.reverse();
    needs
}

/// The slabs of all blocks of one kind.
///
/// A whole slab that is not made of huge pages by itself grows into them with its neighbours: their addresses are reserved together,
/// their memory is not.
pub(super) struct Slabs {
    /// Stretches of memory in which all slots of a block lie side by side.
    stretches: usize,
    /// Of a slot in each of them.
    slot_bytes: usize,
    /// Slots come so many at a time.
    step: u32,
    block_bytes: usize,
    slabs: Vec<Option<Slab>>,
    extents: Vec<Option<Reservation>>,
}

impl Slabs {
    /// For blocks of `[heads][slots][row]`.
    pub fn of_rows(heads: usize, row_bytes: usize) -> Self {
        let whole = Slabs::of_blocks(heads, BLOCK as usize * row_bytes);
        Slabs { stretches: heads, slot_bytes: row_bytes, step: STEP, ..whole }
    }

    /// For blocks of `[columns][slots][number]`.
    pub fn of_columns(columns: usize, number_bytes: usize) -> Self {
        Slabs { step: COLUMN, ..Slabs::of_rows(columns, number_bytes) }
    }

    /// For blocks of `[heads][bytes]` that are always there as a whole.
    pub fn of_blocks(heads: usize, bytes: usize) -> Self {
        let (slabs, extents) = (Vec::new(), Vec::new());
        Slabs { stretches: 0, slot_bytes: 0, step: BLOCK, block_bytes: heads * bytes, slabs, extents }
    }

    /// Blocks that may have memory: none from here on has.
    pub fn len(&self) -> usize {
        self.slabs.len()
    }

    /// Where the slab of the block begins and how many slots it has, if it has memory.
    pub fn get(&self, block: usize) -> Option<(NonNull<u8>, usize)> {
        self.slabs.get(block)?.as_ref().map(|slab| (slab.start, slab.slots as usize))
    }

    /// Slots of the block that have memory.
    pub fn slots(&self, block: usize) -> u32 {
        self.slabs.get(block).and_then(Option::as_ref).map_or(0, |slab| slab.slots)
    }

    /// Bytes of the slabs.
    pub fn bytes(&self) -> usize {
        self.slabs.iter().flatten().map(|slab| self.bytes_of(slab.slots)).sum()
    }

    /// Bytes of a slab of so many slots.
    fn bytes_of(&self, slots: u32) -> usize {
        if slots == BLOCK { self.block_bytes } else { self.stretches * slots as usize * self.slot_bytes }
    }

    /// Memory, zeroed, for those of `needs` that have too little; it counts once it is [adopted](Slabs::adopt). On failure nothing has
    /// changed.
    pub fn prepare(&mut self, needs: &[(usize, u32)]) -> Result<Prepared> {
        let mut made = Vec::new();
        let slots = |need: u32| need.next_multiple_of(self.step).min(BLOCK);
        let missing: Vec<_> = needs.iter().map(|&(block, need)| (block, slots(need))).collect();
        let missing: Vec<_> = missing.into_iter().filter(|&(block, need)| self.slots(block) < need).collect();
        // Neighbours together: memory that fills a huge page at once needs no small ones before.
        let together = |a: &(usize, u32), b: &(usize, u32)| {
            a.0 + 1 == b.0 && a.1 == BLOCK && b.1 == BLOCK && extent(a.0).0 == extent(b.0).0
        };
        for blocks in missing.chunk_by(together) {
            let (first, slots) = blocks[0];
            if let Err(err) = self.make(first..first + blocks.len(), slots, &mut made) {
                self.discard(Prepared(made));
                return Err(err);
            }
        }
        let len = missing.last().map_or(0, |&(block, _)| block + 1);
        if self.slabs.len() < len {
            let more = len - self.slabs.len();
            if self.slabs.try_reserve(more).is_err() {
                self.discard(Prepared(made));
                return Err(Error::OutOfMemory { bytes: more * size_of::<Option<Slab>>() });
            }
            self.slabs.resize_with(len, || None);
        }
        Ok(Prepared(made))
    }

    /// Slabs for neighbours in one extent; on failure `made` is as it was.
    fn make(&mut self, blocks: Range<usize>, slots: u32, made: &mut Vec<(usize, Slab)>) -> Result<()> {
        let before = made.len();
        if slots == BLOCK {
            let (size, range) = (self.block_bytes, self.range(&blocks));
            if let Some(extent) = self.extent(blocks.start) {
                extent.commit(range.clone())?;
                let slab = |i: usize| Slab { start: extent.at(range.start + i * size), slots, own: None };
                made.extend(blocks.enumerate().map(|(i, block)| (block, slab(i))));
                return Ok(());
            }
        }
        for block in blocks {
            match Buf::zeroed(self.bytes_of(slots)) {
                Ok(buf) => made.push((block, Slab { start: buf.ptr(), slots, own: Some(buf) })),
                Err(err) => {
                    made.truncate(before);
                    return Err(err);
                }
            }
        }
        Ok(())
    }

    /// Takes back what was prepared.
    pub fn discard(&mut self, prepared: Prepared) {
        prepared.0.into_iter().for_each(|(block, slab)| self.release(block, &slab));
    }

    /// What was prepared becomes the blocks', with what they held before.
    pub fn adopt(&mut self, prepared: Prepared) {
        for (block, slab) in prepared.0 {
            if let Some(old) = &self.slabs[block] {
                let (have, more) = (old.slots as usize * self.slot_bytes, slab.slots as usize * self.slot_bytes);
                for i in 0..self.stretches {
                    // SAFETY: both have so many stretches, the new one longer ones; they are two memories.
                    unsafe {
                        let (from, to) = (old.start.add(i * have), slab.start.add(i * more));
                        std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), have);
                    }
                }
            }
            self.slabs[block] = Some(slab);
        }
    }

    /// Bytes of the blocks, counted from the beginning of their extent.
    fn range(&self, blocks: &Range<usize>) -> Range<usize> {
        let first = extent(blocks.start).1.start;
        (blocks.start - first) * self.block_bytes..(blocks.end - first) * self.block_bytes
    }

    /// What the whole slab of the block shares with its neighbours, if it should.
    fn extent(&mut self, block: usize) -> Option<&mut Reservation> {
        let bytes = self.block_bytes;
        // A large slab loses little at its end, and need not tie up addresses for others.
        let ragged = !bytes.is_multiple_of(HUGE) && bytes < 4 * HUGE;
        if !ragged || !Reservation::suits(bytes) {
            return None;
        }
        let (index, blocks) = extent(block);
        if self.extents.len() <= index {
            self.extents.resize_with(index + 1, || None);
        }
        if self.extents[index].is_none() {
            self.extents[index] = Reservation::new(blocks.len() * bytes);
        }
        self.extents[index].as_mut()
    }

    /// Takes the block's memory back.
    pub fn free(&mut self, block: usize) {
        if let Some(slab) = self.slabs.get_mut(block).and_then(Option::take) {
            self.release(block, &slab);
        }
    }

    fn release(&mut self, block: usize, slab: &Slab) {
        let range = self.range(&(block..block + 1));
        if slab.own.is_none()
            && let Some(Some(reservation)) = self.extents.get_mut(extent(block).0)
        {
            reservation.release(range);
        }
    }
}

/// Gives each of `sections` what it needs, or none of them anything.
pub(super) fn reserve_all<'a>(sections: impl Iterator<Item = &'a mut Slabs>, needs: &[(usize, u32)]) -> Result<()> {
    let mut prepared = Vec::new();
    for section in sections {
        match section.prepare(needs) {
            Ok(mine) => prepared.push((section, mine)),
            Err(err) => {
                prepared.into_iter().for_each(|(section, mine): (&mut Slabs, _)| section.discard(mine));
                return Err(err);
            }
        }
    }
    prepared.into_iter().for_each(|(section, mine)| section.adopt(mine));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_tile_the_blocks() {
        let mut next = 0;
        for index in 0..6 {
            let (found, blocks) = extent(next);
            assert_eq!((found, blocks.start), (index, next));
            assert!(blocks.clone().all(|block| extent(block) == (index, blocks.clone())));
            next = blocks.end;
        }
    }

    #[test]
    fn needs_are_what_is_needed_most() {
        let wanted = [(7, 3), (2, 64), (7, 20), (2, 1), (PACKED + 5, 57)];
        let found = needs(wanted.iter().map(|&(block, end)| (BlockId(block), end)));
        assert_eq!(found, [(2, 64), (5, 57), (7, 20)]);
    }

    /// Blocks fill and are freed; what they hold stays, and bytes are those of the slots that there are.
    #[test]
    fn blocks_grow_and_keep_what_they_hold() {
        // Sizes that whole pages hold, and that they do not.
        for row in [64, 24] {
            let mut slabs = Slabs::of_rows(3, row);
            let (mut rest, mut columns) = (Slabs::of_blocks(3, 10), Slabs::of_columns(7, 4));
            let mark = |slabs: &Slabs, block: usize, slot: usize, head: usize| {
                let (start, slots) = slabs.get(block).expect("memory");
                // SAFETY: rows of the slab.
                unsafe { start.as_ptr().add((head * slots + slot) * row) }
            };
            for end in 1..=BLOCK {
                let wanted = needs([(BlockId(3), end)].into_iter());
                reserve_all([&mut slabs, &mut rest, &mut columns].into_iter(), &wanted).unwrap();
                assert_eq!(slabs.bytes(), 3 * row * end.next_multiple_of(8) as usize);
                assert_eq!((rest.bytes(), columns.bytes()), (30, 7 * 4 * end.next_multiple_of(32) as usize));
                for head in 0..3 {
                    // SAFETY: a row that was just given memory.
                    unsafe {
                        let new = mark(&slabs, 3, end as usize - 1, head);
                        assert_eq!(*new, 0, "new memory is zero");
                        *new = (end as u8).wrapping_mul(3).wrapping_add(head as u8);
                    }
                    for slot in 0..end as usize {
                        let want = (slot as u8 + 1).wrapping_mul(3).wrapping_add(head as u8);
                        // SAFETY: as above.
                        assert_eq!(unsafe { *mark(&slabs, 3, slot, head) }, want);
                    }
                }
            }
            assert_eq!((slabs.slots(3), slabs.slots(2), slabs.slots(99)), (64, 0, 0));
            reserve_all([&mut slabs].into_iter(), &needs((0..6).map(|b| (BlockId(b), 64)))).unwrap();
            assert_eq!(slabs.bytes(), 6 * 3 * 64 * row);
            (0..9).for_each(|block| slabs.free(block));
            assert_eq!(slabs.bytes(), 0);
        }
    }

    #[test]
    fn what_one_section_cannot_have_no_section_gets() {
        let (mut small, mut huge) = (Slabs::of_rows(1, 64), Slabs::of_blocks(1, 1 << 60));
        let wanted = needs([(BlockId(1), 5), (BlockId(2), 64)].into_iter());
        assert!(matches!(reserve_all([&mut small, &mut huge].into_iter(), &wanted), Err(Error::OutOfMemory { .. })));
        assert_eq!((small.bytes(), huge.bytes()), (0, 0));
        assert!(reserve_all([&mut small].into_iter(), &wanted).is_ok());
    }
}
