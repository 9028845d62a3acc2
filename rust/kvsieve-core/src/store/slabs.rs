//! The memory of blocks, in slabs that come and go and never move.

use std::ops::Range;
use std::ptr::NonNull;

use super::buf::{Buf, HUGE};
use super::reservation::Reservation;
use crate::{Error, Result};

/// No stream is this long (2 billion tokens); a block number beyond it is a mistake, not a reason to allocate.
pub(super) const MAX_BLOCKS: u32 = crate::ids::PACKED;

/// Small slabs first, so that a short conversation or a small budget costs what it holds; large ones later, so that long ones need few.
const TIERS: [(u32, u32); 4] = [(32, 1), (128, 4), (1024, 16), (MAX_BLOCKS, 64)];

/// Blocks of the largest slab.
pub(super) const LARGEST: usize = TIERS[TIERS.len() - 1].1 as usize;

/// Slabs whose addresses are reserved together: those of the blocks before each of these, then of as many as the last at a time.
const EXTENTS: [usize; 2] = [128, 1024];

/// The slab of a block, the block's place in it, and the number of blocks of that slab.
pub(super) fn locate(block: u32) -> (usize, usize, usize) {
    let (mut first_block, mut first_slab) = (0, 0);
    for (end, size) in TIERS {
        if block < end {
            let at = block - first_block;
            return ((first_slab + at / size) as usize, (at % size) as usize, size as usize);
        }
        first_slab += (end - first_block) / size;
        first_block = end;
    }
    let (_, size) = TIERS[TIERS.len() - 1];
    (((block - first_block) / size + first_slab) as usize, ((block - first_block) % size) as usize, size as usize)
}

/// The blocks of a slab.
pub(super) fn blocks(slab: usize) -> Range<usize> {
    let (mut first_block, mut first_slab) = (0usize, 0usize);
    for (end, size) in TIERS {
        let slabs = (end as usize - first_block) / size as usize;
        if slab < first_slab + slabs {
            let first = first_block + (slab - first_slab) * size as usize;
            return first..first + size as usize;
        }
        first_slab += slabs;
        first_block = end as usize;
    }
    first_block..first_block + LARGEST
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

struct Slab {
    start: NonNull<u8>,
    /// Its memory, where it is not part of an extent's.
    own: Option<Buf>,
}

// SAFETY: the address is of `own` or of the reservation beside it, which may be sent and shared.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// Memory for blocks of `block_bytes`.
///
/// A slab that is not made of huge pages by itself grows into them with its neighbours: their addresses are reserved together, their
/// memory is not.
pub(super) struct Slabs {
    block_bytes: usize,
    slabs: Vec<Option<Slab>>,
    extents: Vec<Option<Reservation>>,
}

impl Slabs {
    pub fn new(block_bytes: usize) -> Self {
        Slabs { block_bytes, slabs: Vec::new(), extents: Vec::new() }
    }

    /// Slabs that may exist: none from here on does.
    pub fn len(&self) -> usize {
        self.slabs.len()
    }

    /// Where the slab begins, if it has memory.
    pub fn start(&self, slab: usize) -> Option<NonNull<u8>> {
        self.slabs.get(slab)?.as_ref().map(|slab| slab.start)
    }

    /// Bytes of the slabs that have memory.
    pub fn bytes(&self) -> usize {
        let held = self.slabs.iter().enumerate().filter(|(_, slab)| slab.is_some());
        held.map(|(slab, _)| blocks(slab).len() * self.block_bytes).sum()
    }

    /// Gives zeroed memory to consecutive slabs that have none; on failure nothing has changed.
    pub fn make(&mut self, slabs: Range<usize>) -> Result<()> {
        let oom = |bytes| Error::OutOfMemory { bytes };
        if self.slabs.len() < slabs.end {
            let more = slabs.end - self.slabs.len();
            self.slabs.try_reserve(more).map_err(|_| oom(more * size_of::<Option<Slab>>()))?;
            self.slabs.resize_with(slabs.end, || None);
        }
        let mut next = slabs.start;
        while next < slabs.end {
            let home = |slab| extent(blocks(slab).start).0;
            let end = (next..slabs.end).find(|&slab| home(slab) != home(next)).unwrap_or(slabs.end);
            if let Err(err) = self.make_in_extent(next..end) {
                (slabs.start..next).for_each(|slab| self.free(slab));
                return Err(err);
            }
            next = end;
        }
        Ok(())
    }

    fn make_in_extent(&mut self, slabs: Range<usize>) -> Result<()> {
        let (bytes, offset) = (self.bytes_of(&slabs), self.offset(slabs.start));
        if let Some(extent) = self.extent(slabs.start) {
            extent.commit(offset..offset + bytes)?;
            for slab in slabs {
                let offset = self.offset(slab);
                let start = self.extent(slab).map(|extent| extent.at(offset));
                self.slabs[slab] = start.map(|start| Slab { start, own: None });
            }
            return Ok(());
        }
        for slab in slabs.clone() {
            match Buf::zeroed(self.bytes_of(&(slab..slab + 1))) {
                Ok(buf) => self.slabs[slab] = Some(Slab { start: buf.ptr(), own: Some(buf) }),
                Err(err) => {
                    slabs.for_each(|slab| self.slabs[slab] = None);
                    return Err(err);
                }
            }
        }
        Ok(())
    }

    fn bytes_of(&self, slabs: &Range<usize>) -> usize {
        (blocks(slabs.end - 1).end - blocks(slabs.start).start) * self.block_bytes
    }

    /// Bytes between the beginning of the slab's extent and the slab.
    fn offset(&self, slab: usize) -> usize {
        let first = blocks(slab).start;
        (first - extent(first).1.start) * self.block_bytes
    }

    /// What the slab shares with its neighbours, if it should.
    fn extent(&mut self, slab: usize) -> Option<&mut Reservation> {
        let bytes = blocks(slab).len() * self.block_bytes;
        // A large slab loses little at its end, and need not tie up addresses for others.
        let ragged = !bytes.is_multiple_of(HUGE) && bytes < 4 * HUGE;
        if !ragged || !Reservation::suits(self.block_bytes) {
            return None;
        }
        let (index, blocks) = extent(blocks(slab).start);
        if self.extents.len() <= index {
            self.extents.resize_with(index + 1, || None);
        }
        if self.extents[index].is_none() {
            self.extents[index] = Reservation::new(blocks.len() * self.block_bytes);
        }
        self.extents[index].as_mut()
    }

    /// Takes the slab's memory back.
    pub fn free(&mut self, slab: usize) {
        let Some(Slab { own: None, .. }) = self.slabs[slab].take() else { return };
        let (offset, bytes) = (self.offset(slab), self.bytes_of(&(slab..slab + 1)));
        if let Some(Some(reservation)) = self.extents.get_mut(extent(blocks(slab).start).0) {
            reservation.release(offset..offset + bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_tile_the_blocks() {
        let mut block = 0usize;
        for slab in 0..200 {
            let size = blocks(slab).len();
            assert_eq!(blocks(slab).start, block);
            for i in 0..size {
                assert_eq!(locate((block + i) as u32), (slab, i, size));
            }
            block += size;
        }
        assert_eq!(locate(31).2, 1);
        assert_eq!(locate(32).2, 4);
        assert_eq!(locate(128).2, 16);
        assert_eq!(locate(1024).2, 64);
    }

    #[test]
    fn extents_tile_the_slabs() {
        let mut next = 0;
        for index in 0..6 {
            let (found, blocks) = extent(next);
            assert_eq!((found, blocks.start), (index, next));
            assert!(blocks.clone().all(|block| extent(block) == (index, blocks.clone())));
            assert_eq!((locate(blocks.start as u32).1, locate(blocks.end as u32).1), (0, 0), "cut between slabs");
            next = blocks.end;
        }
    }
}
