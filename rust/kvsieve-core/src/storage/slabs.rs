//! The memory of blocks: a slab a block, that comes and goes.
//!
//! A slab holds all 64 slots of its block, or only the first ones: the block at the end of a text takes memory as it fills, some slots
//! at a time, and is copied when it grows. A whole slab never moves; where heads take whole pages, those of neighbouring blocks lie side
//! by side head by head ([`GROUPS`]), so that reading a head goes through memory in long stretches.

use std::ops::Range;
use std::ptr::NonNull;

use super::buf::{Buf, HUGE};
use super::dense::Dense;
use super::reservation::Reservation;
use crate::Result;
use crate::ids::{BLOCK, BlockId, PACKED};

/// No stream is this long (2 billion tokens); a block number beyond it is a mistake, not a reason to allocate.
pub(super) const MAX_BLOCKS: u32 = PACKED;

/// Slots that rows grow by.
const STEP: u32 = 8;

/// Slots that columns grow by: a multiple of the most that a kernel takes at once.
pub(crate) const COLUMN: u32 = 32;

/// Slabs whose addresses are reserved together: those of the blocks before each of these, then of as many as the last at a time.
const EXTENTS: [usize; 2] = [128, 1024];

/// Below each of these block numbers so many blocks lie together.
const GROUPS: [(usize, usize); 4] = [(32, 1), (128, 4), (1024, 16), (usize::MAX, 64)];

/// The blocks that lie together with this one. All are of one extent.
fn group(block: usize) -> Range<usize> {
    let size = GROUPS.iter().find(|(end, _)| block < *end).map_or(1, |group| group.1);
    block / size * size..block / size * size + size
}

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
#[derive(Clone, Copy)]
pub(super) struct Held {
    /// Of head 0.
    pub start: NonNull<u8>,
    /// Bytes from head to head.
    pub hop: usize,
    /// Of each head.
    pub slots: usize,
}

pub(super) struct Slab {
    start: NonNull<u8>,
    hop: usize,
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
    heads: usize,
    /// Stretches of memory of each head in which all slots of a block lie side by side.
    columns: usize,
    /// Of a slot in each of them.
    slot_bytes: usize,
    /// Slots come so many at a time.
    step: u32,
    /// Of one head of a whole block.
    head_bytes: usize,
    held: Dense<Slab>,
    extents: Vec<Option<Reservation>>,
    /// Memory of whole blocks that was [laid by](Slabs::lay_by).
    spare: Vec<Buf>,
}

impl Slabs {
    /// For blocks of `[heads][slots][row]`.
    pub fn of_rows(heads: usize, row_bytes: usize) -> Self {
        let whole = Slabs::of_blocks(heads, BLOCK as usize * row_bytes);
        Slabs { columns: 1, slot_bytes: row_bytes, step: STEP, ..whole }
    }

    /// For blocks of `[heads][columns][slots][number]`.
    pub fn of_columns(heads: usize, columns: usize, number_bytes: usize) -> Self {
        let whole = Slabs::of_blocks(heads, BLOCK as usize * columns * number_bytes);
        Slabs { columns, slot_bytes: number_bytes, step: COLUMN, ..whole }
    }

    /// For blocks of `[heads][bytes]` that are always there as a whole.
    pub fn of_blocks(heads: usize, bytes: usize) -> Self {
        let (held, extents, spare) = (Dense::default(), Vec::new(), Vec::new());
        Slabs { heads, columns: 0, slot_bytes: 0, step: BLOCK, head_bytes: bytes, held, extents, spare }
    }

    /// Blocks that may have memory: none from here on has.
    pub fn len(&self) -> usize {
        self.held.blocks()
    }

    /// Blocks that have memory, in no order, and how many slots of each.
    pub fn held(&self) -> impl Iterator<Item = (usize, u32)> {
        self.held.iter().map(|(block, slab)| (block, slab.slots))
    }

    /// Where the block lies, if it has memory.
    #[inline]
    pub fn get(&self, block: usize) -> Option<Held> {
        let slab = self.held.get(block)?;
        Some(Held { start: slab.start, hop: slab.hop, slots: slab.slots as usize })
    }

    /// Slots of the block that have memory.
    pub fn slots(&self, block: usize) -> u32 {
        self.held.get(block).map_or(0, |slab| slab.slots)
    }

    /// Bytes of the slabs.
    pub fn bytes(&self) -> usize {
        self.held().map(|(_, slots)| self.bytes_of(slots)).sum()
    }

    /// Bytes of a slab of so many slots.
    fn bytes_of(&self, slots: u32) -> usize {
        self.heads * self.head_bytes_of(slots)
    }

    fn head_bytes_of(&self, slots: u32) -> usize {
        if slots == BLOCK { self.head_bytes } else { self.columns * slots as usize * self.slot_bytes }
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
        if let Err(err) = self.held.reserve(len, made.len()) {
            self.discard(Prepared(made));
            return Err(err);
        }
        Ok(Prepared(made))
    }

    /// Slabs for neighbours in one extent; on failure `made` is as it was.
    fn make(&mut self, blocks: Range<usize>, slots: u32, made: &mut Vec<(usize, Slab)>) -> Result<()> {
        let before = made.len();
        if slots == BLOCK && self.extent(blocks.start).is_some() {
            let (ranges, places) = (self.ranges(&blocks), blocks.clone().map(|block| self.place(block)));
            let places: Vec<_> = places.collect();
            if let Some(extent) = self.extent(blocks.start) {
                for (i, range) in ranges.iter().enumerate() {
                    if let Err(err) = extent.commit(range.clone()) {
                        ranges[..i].iter().for_each(|range| extent.release(range.clone()));
                        return Err(err);
                    }
                }
                let slab = |(offset, hop)| Slab { start: extent.at(offset), hop, slots, own: None };
                made.extend(blocks.zip(places.into_iter().map(slab)));
                return Ok(());
            }
        }
        let hop = self.head_bytes_of(slots);
        for block in blocks {
            match Buf::zeroed(self.bytes_of(slots)) {
                Ok(buf) => made.push((block, Slab { start: buf.ptr(), hop, slots, own: Some(buf) })),
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
            if let Some(old) = self.held.get(block) {
                let (have, more) = (old.slots as usize * self.slot_bytes, slab.slots as usize * self.slot_bytes);
                for (head, i) in (0..self.heads).flat_map(|head| (0..self.columns).map(move |i| (head, i))) {
                    // SAFETY: both have so many columns of every head, the new one longer ones; they are two memories.
                    unsafe {
                        let (from, to) =
                            (old.start.add(head * old.hop + i * have), slab.start.add(head * slab.hop + i * more));
                        std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), have);
                    }
                }
            }
            self.held.set(block, slab);
        }
    }

    /// The blocks that lie together with this one head by head. Only whole pages can come and go by themselves.
    fn group(&self, block: usize) -> Range<usize> {
        if Reservation::suits(self.head_bytes) { group(block) } else { block..block + 1 }
    }

    /// Where the block begins in its extent, and the bytes from head to head.
    fn place(&self, block: usize) -> (usize, usize) {
        let (group, first) = (self.group(block), extent(block).1.start);
        let start = (group.start - first) * self.bytes_of(BLOCK) + (block - group.start) * self.head_bytes;
        (start, group.len() * self.head_bytes)
    }

    /// What the blocks take of their extent: one range for neighbouring groups that are whole, one for each head of what is left.
    fn ranges(&self, blocks: &Range<usize>) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut next = blocks.start;
        while next < blocks.end {
            let group = self.group(next);
            let end = group.end.min(blocks.end);
            let (start, hop) = self.place(next);
            if next == group.start && end == group.end {
                let whole = start..start + group.len() * self.bytes_of(BLOCK);
                match ranges.last_mut() {
                    Some(last) if last.end == whole.start => last.end = whole.end,
                    _ => ranges.push(whole),
                }
            } else {
                let (heads, bytes) = (0..self.heads, (end - next) * self.head_bytes);
                ranges.extend(heads.map(|head| start + head * hop..start + head * hop + bytes));
            }
            next = end;
        }
        ranges
    }

    /// What the whole slab of the block shares with its neighbours, if it should.
    fn extent(&mut self, block: usize) -> Option<&mut Reservation> {
        let bytes = self.bytes_of(BLOCK);
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
        if let Some(slab) = self.held.take(block) {
            self.release(block, &slab);
        }
    }

    /// Takes the block's memory back, and keeps it for another one, where it is not part of an extent's.
    pub fn lay_by(&mut self, block: usize) {
        match self.held.take(block) {
            Some(Slab { slots: BLOCK, own: Some(buf), .. }) => self.spare.push(buf),
            Some(slab) => self.release(block, &slab),
            None => {}
        }
    }

    /// Memory for a whole block that has none: what was laid by, or new one, but none of an extent's, which the kernel would have to give
    /// and zero. Whatever lies in it is to be written over.
    pub fn lend(&mut self, block: usize) -> Result<()> {
        self.held.reserve(block + 1, 1)?;
        let buf = self.spare.pop().map_or_else(|| Buf::zeroed(self.bytes_of(BLOCK)), Ok)?;
        self.held.set(block, Slab { start: buf.ptr(), hop: self.head_bytes, slots: BLOCK, own: Some(buf) });
        Ok(())
    }

    /// Gives back what was laid by and not lent.
    pub fn tidy(&mut self) {
        self.spare = Vec::new();
    }

    fn release(&mut self, block: usize, slab: &Slab) {
        if slab.own.is_some() {
            return;
        }
        let ranges = self.ranges(&(block..block + 1));
        if let Some(Some(reservation)) = self.extents.get_mut(extent(block).0) {
            ranges.into_iter().for_each(|range| reservation.release(range));
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
    use crate::Error;

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
    fn groups_tile_the_extents() {
        let mut next = 0;
        while next < 3000 {
            let blocks = group(next);
            assert_eq!(blocks.start, next);
            assert!(blocks.clone().all(|block| group(block) == blocks && extent(block) == extent(next)));
            next = blocks.end;
        }
        assert_eq!([31, 32, 128, 1024].map(|block| group(block).len()), [1, 4, 16, 64]);
    }

    /// Whichever blocks have memory, no two of them share a byte, and what is committed is what they are.
    #[test]
    fn blocks_of_a_group_come_and_go_by_themselves() {
        let page = 1 << 12;
        let mut slabs = Slabs::of_rows(3, page / 64 * 3);
        let mut held: Vec<Option<u8>> = vec![None; 160];
        let mut noise = 88_172_645_463_325_252u64;
        for turn in 0..600u32 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let (at, len) = (noise as usize % 160, 1 + (noise >> 20) as usize % 9);
            let blocks = at..(at + len).min(160);
            if noise >> 40 & 3 > 0 {
                let wanted = blocks.clone().map(|block| (BlockId(block as u32), BLOCK));
                reserve_all([&mut slabs].into_iter(), &needs(wanted)).unwrap();
                for block in blocks {
                    let (mark, place) = (turn as u8 | 1, slabs.get(block).unwrap());
                    let fresh = held[block].is_none();
                    held[block] = Some(mark);
                    for head in 0..3 {
                        // SAFETY: a head of a block that was just given memory.
                        let mine = unsafe {
                            std::slice::from_raw_parts_mut(place.start.as_ptr().add(head * place.hop), 3 * page)
                        };
                        assert!(!fresh || mine.iter().all(|&x| x == 0), "new memory is zero");
                        mine.fill(mark);
                    }
                }
            } else {
                for block in blocks {
                    slabs.free(block);
                    held[block] = None;
                }
            }
            assert_eq!(slabs.bytes(), held.iter().flatten().count() * 9 * page);
            for (block, mark) in held.iter().enumerate().filter_map(|(block, mark)| mark.map(|mark| (block, mark))) {
                let place = slabs.get(block).unwrap();
                for byte in (0..3).flat_map(|head| [0, 3 * page - 1].map(|at| head * place.hop + at)) {
                    // SAFETY: the first and the last byte of each head.
                    assert_eq!(unsafe { *place.start.as_ptr().add(byte) }, mark, "block {block} at turn {turn}");
                }
            }
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
            let (mut rest, mut columns) = (Slabs::of_blocks(3, 10), Slabs::of_columns(7, 1, 4));
            let mark = |slabs: &Slabs, block: usize, slot: usize, head: usize| {
                let place = slabs.get(block).expect("memory");
                // SAFETY: rows of the slab.
                unsafe { place.start.as_ptr().add(head * place.hop + slot * row) }
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
