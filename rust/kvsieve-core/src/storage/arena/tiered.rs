//! Blocks of an arena that lie in a file: which of them are in memory, and how they come and go.
//!
//! ```text
//!   written      in memory, no copy in the file
//!   spill        the copy is written, unless there is one, and then memory is given back
//!   fetch        memory again, and the copy stays: another spill writes nothing
//!   write, move  the block is loaded first where it must be; the copy is void
//! ```
//!
//! Where values alone may lie in the file, all of this is said of them: the keys of every block are in memory.
//!
//! What reads a block that is not in memory is refused ([`Error::NotInMemory`]); [`Arena::gather_any`] reads it from the file.

use std::collections::HashSet;
use std::sync::Arc;

use super::memory::{Arena, Place};
use crate::ids::{BLOCK, BlockId, Run};
use crate::storage::slabs::number;
use crate::storage::tier::{Copied, Counts, Order, Tier, TierFile};
use crate::tensor::ElemsMut;
use crate::{Error, Result, fault};

impl Arena {
    /// Full blocks may lie in `file`, or with `values_alone` their values, and about `capacity` blocks are in memory. Once, at any time.
    pub fn set_tier(&mut self, file: Arc<TierFile>, capacity: usize, order: Order, values_alone: bool) -> Result<()> {
        if self.tier.is_some() {
            return Err(Error::Unsupported("a layer's blocks lie in one file; it cannot change"));
        }
        let mut tier = Tier::new(file, capacity, order, values_alone)?;
        (0..self.values.len()).filter(|&block| self.values.get(block).is_some()).for_each(|block| tier.touch(block));
        self.tier = Some(tier);
        Ok(())
    }

    /// What the layer's blocks did; nothing without a file.
    pub fn tier_counts(&self) -> Counts {
        self.tier.as_ref().map(Tier::counts).unwrap_or_default()
    }

    /// Bytes of this layer's copies in the file.
    pub fn tier_bytes(&self) -> u64 {
        self.tier.as_ref().map_or(0, Tier::copied_bytes)
    }

    /// Whether the block lies in the file and not in memory.
    pub fn is_spilled(&self, block: BlockId) -> bool {
        !block.is_packed() && self.spilled(number(block))
    }

    /// Whether keys stay in memory, and only values leave it.
    pub fn values_alone(&self) -> bool {
        self.tier.as_ref().is_some_and(|tier| tier.values_alone)
    }

    pub(super) fn spilled(&self, block: usize) -> bool {
        self.values.get(block).is_none() && self.tier.as_ref().is_some_and(|tier| tier.copy(block).is_some())
    }

    /// Full blocks that are in memory, in no order. Values leave with the keys of their block, or alone.
    pub(super) fn full_blocks(&self) -> impl Iterator<Item = usize> {
        self.values.held().filter(|&(_, slots)| slots == BLOCK).map(|(block, _)| block)
    }

    /// Bytes of what moves of a block.
    fn block_bytes(&self) -> usize {
        let values = self.heads * self.value_dim * self.dtype.size();
        BLOCK as usize * if self.values_alone() { values } else { self.token_bytes() }
    }

    pub(super) fn tier(&mut self) -> Result<&mut Tier> {
        self.tier.as_mut().ok_or(Error::Unsupported("this layer's blocks lie in no file; open the stream with one"))
    }

    /// Plain blocks by number, each once.
    pub(super) fn numbers(&self, blocks: impl Iterator<Item = BlockId>) -> Result<Vec<usize>> {
        let mut numbers = Vec::new();
        for block in blocks {
            if block.is_packed() || !(self.holds(block) || self.is_spilled(block)) {
                return Err(self.bad_block(block.0));
            }
            numbers.push(number(block));
        }
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    /// Writes full blocks to the file and gives their memory back. After an error some have left memory, and none is lost.
    pub fn spill(&mut self, blocks: &[BlockId]) -> Result<()> {
        self.collect()?;
        self.tier()?.failure()?;
        for block in self.numbers(blocks.iter().copied())? {
            if self.values.slots(block) == BLOCK {
                self.spill_one(block)?;
            }
        }
        Ok(())
    }

    fn spill_one(&mut self, block: usize) -> Result<()> {
        self.copy_out(block)?;
        if self.values.get(block).is_some() {
            self.give_back(block);
        }
        Ok(())
    }

    /// Writes a block of memory to the file, unless it has a copy there.
    fn copy_out(&mut self, block: usize) -> Result<()> {
        self.await_block(block)?;
        if self.values.get(block).is_none() || self.tier()?.copy(block).is_some() {
            return Ok(());
        }
        let bytes = self.packed_up(block)?;
        let tier = self.tier()?;
        let extent = tier.file.allocate(bytes.len())?;
        match tier.file.write(extent, &bytes) {
            Ok(sum) => tier.copied(block, Copied { extent, sum }, bytes.len()),
            Err(err) => {
                tier.file.free(extent);
                return Err(err);
            }
        }
        Ok(())
    }

    /// Gives back the memory of a block that has a copy.
    pub(super) fn give_back(&mut self, block: usize) {
        if !self.values_alone() {
            self.keys.free(block);
        }
        self.values.free(block);
    }

    /// Makes the blocks of the runs stay in memory until this thread fetches again, or [`Arena::trim`]s. Others that have a copy in the
    /// file leave memory for them, as far as the capacity asks for it.
    ///
    /// After an error those that were loaded are in memory. Without a file all blocks are, and nothing happens.
    pub fn fetch(&mut self, runs: &[Run]) -> Result<()> {
        if self.tier.is_none() {
            return Ok(());
        }
        self.collect()?;
        let wanted = self.numbers(runs.iter().map(|run| run.block).filter(|block| !block.is_packed()))?;
        let missing: Vec<_> = wanted.iter().copied().filter(|&block| self.spilled(block)).collect();
        self.tier()?.lease(&wanted);
        if !missing.is_empty() {
            self.drop_copied(missing.len());
        }
        self.announce(&missing)?;
        let fetched = self.fetch_each(&wanted);
        self.keys.tidy();
        self.values.tidy();
        fetched
    }

    fn fetch_each(&mut self, wanted: &[usize]) -> Result<()> {
        let mut bytes = Vec::new();
        for &block in wanted {
            if self.spilled(block) {
                self.load(block, &mut bytes)?;
            } else {
                self.tier()?.hit(block);
            }
        }
        Ok(())
    }

    /// Gives back memory of blocks that have a copy, so that `more` have place within the capacity.
    ///
    /// Nothing is written here. Where a block without a copy was the one to leave, another one leaves in its place, and the end of the
    /// step writes a copy of the first.
    fn drop_copied(&mut self, more: usize) {
        let Some(tier) = &mut self.tier else { return };
        let full: Vec<_> = self.values.held().filter(|&(_, slots)| slots == BLOCK).map(|(block, _)| block).collect();
        let over = (full.len() + more).saturating_sub(tier.capacity);
        if over == 0 {
            return;
        }
        let first: HashSet<_> = tier.leaving(full.iter().copied(), over).into_iter().collect();
        let leaving = tier.leaving(full.into_iter().filter(|&block| tier.copy(block).is_some()), over);
        tier.copies_due += leaving.iter().filter(|block| !first.contains(block)).count();
        let alone = tier.values_alone;
        for block in leaving {
            if !alone {
                self.keys.lay_by(block);
            }
            self.values.lay_by(block);
        }
    }

    /// These blocks stay in memory, whatever is fetched, until the next [`Arena::trim`] says otherwise.
    pub fn hold(&mut self, blocks: &[BlockId]) -> Result<()> {
        self.collect()?;
        let numbers = self.numbers(blocks.iter().copied())?;
        self.tier()?.protect_also(numbers.iter().copied());
        self.load_all(&numbers)
    }

    /// A step is over: what this thread fetched has been read, and full blocks leave memory until no more than the capacity are there,
    /// but never those of `keep`. After an error some have left memory, and none is lost.
    pub fn trim(&mut self, keep: &[BlockId]) -> Result<()> {
        let (leaving, next) = self.leaving(keep)?;
        leaving.into_iter().try_for_each(|block| self.spill_one(block))?;
        without_space(next.into_iter().try_for_each(|block| self.copy_out(block)))
    }

    /// A step is over, and only `keep` must stay; says which blocks leave memory, and which are the next to leave and get a copy for it.
    pub(super) fn leaving(&mut self, keep: &[BlockId]) -> Result<(Vec<usize>, Vec<usize>)> {
        self.collect()?;
        let held: Vec<_> = self.full_blocks().collect();
        // A number that is no block's keeps nothing, and makes no list as long as itself.
        let known = |block: &BlockId| !block.is_packed() && (self.holds(*block) || self.is_spilled(*block));
        let kept: Vec<_> = keep.iter().copied().filter(known).map(number).collect();
        let tier = self.tier()?;
        tier.failure()?;
        tier.end_lease();
        tier.protect(kept.into_iter());
        let over = held.len().saturating_sub(tier.capacity);
        let leaving = tier.leaving(held.iter().copied(), over);
        let most = std::mem::take(&mut tier.copies_due);
        let uncopied = held.into_iter().filter(|block| tier.copy(*block).is_none() && !leaving.contains(block));
        let next = if most > 0 { tier.leaving(uncopied, most) } else { Vec::new() };
        Ok((leaving, next))
    }

    /// A step is over in which blocks got so much attention, over all heads and queries; see [`Order::Scores`].
    pub fn score(&mut self, blocks: &[BlockId], mass: &[f64]) -> Result<()> {
        if blocks.len() != mass.len() {
            let (expected, got) = (format!("{} numbers", blocks.len()), mass.len().to_string());
            return Err(Error::Shape { what: "mass", expected, got });
        }
        self.numbers(blocks.iter().copied())?;
        let scores: Vec<_> = blocks.iter().map(|&block| number(block)).zip(mass.iter().copied()).collect();
        self.tier()?.score(&scores);
        Ok(())
    }

    /// Loads those of these blocks that are not in memory: they are about to be written, or moved.
    pub(super) fn load_for(&mut self, blocks: impl Iterator<Item = BlockId>) -> Result<()> {
        if self.tier.is_none() {
            return Ok(());
        }
        let numbers: Vec<_> = blocks.filter(|block| !block.is_packed()).map(number).collect();
        self.load_all(&numbers)
    }

    /// Begins to read several blocks from the file at once; a single one is read at once anyway.
    fn announce(&mut self, missing: &[usize]) -> Result<()> {
        if missing.len() > 1 {
            self.tier()?.will_need(missing);
        }
        Ok(())
    }

    /// Has the system begin to read those of these blocks that are not in memory, into its own cache: nothing is waited for, no memory of
    /// the arena's is taken, and no block leaves for it. A fetch that comes later finds them there, and says what went wrong.
    pub fn prefetch(&mut self, runs: &[Run]) -> Result<()> {
        if self.tier.is_none() {
            return Ok(());
        }
        self.collect()?;
        let wanted = self.numbers(runs.iter().map(|run| run.block).filter(|block| !block.is_packed()))?;
        let missing: Vec<_> = wanted.into_iter().filter(|&block| self.spilled(block)).collect();
        self.tier()?.will_need(&missing);
        Ok(())
    }

    fn load_all(&mut self, blocks: &[usize]) -> Result<()> {
        let missing: Vec<_> = blocks.iter().copied().filter(|&block| self.spilled(block)).collect();
        self.announce(&missing)?;
        let mut bytes = Vec::new();
        // A block may be named twice.
        missing
            .into_iter()
            .try_for_each(|block| if self.spilled(block) { self.load(block, &mut bytes) } else { Ok(()) })
    }

    /// Loads a block that is not in memory, by way of `bytes`; after an error it is as it was.
    fn load(&mut self, block: usize, bytes: &mut Vec<u8>) -> Result<()> {
        self.read_copy(block, bytes)?;
        self.put_back(block, bytes)
    }

    /// A block that is not in memory is there again.
    fn put_back(&mut self, block: usize, bytes: &[u8]) -> Result<()> {
        let alone = self.values_alone();
        if !alone {
            self.keys.lend(block)?;
        }
        if let Err(err) = self.values.lend(block) {
            if !alone {
                self.keys.free(block);
            }
            return Err(err);
        }
        // SAFETY: the buffer is as long as a block, and the block was just given memory.
        self.each_head(block, |from, to, n| unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr().add(from), to, n);
        })?;
        self.tier()?.loaded(block, bytes.len());
        Ok(())
    }

    /// The copy of a block, checked.
    fn read_copy(&self, block: usize, to: &mut Vec<u8>) -> Result<()> {
        let bytes = self.block_bytes();
        let Some((tier, copy)) = self.tier.as_ref().and_then(|tier| Some((tier, tier.copy(block)?))) else {
            return Err(self.bad_block(block as u32));
        };
        to.clear();
        fault::may_lack(bytes)?;
        to.try_reserve(bytes).map_err(|_| Error::OutOfMemory { bytes })?;
        to.resize(bytes, 0);
        tier.file.read(copy.extent, copy.sum, block as u32, to)
    }

    /// A full block as it lies in the file: `[heads][64][key_dim]`, then values; or values alone.
    pub(super) fn packed_up(&self, block: usize) -> Result<Vec<u8>> {
        let len = self.block_bytes();
        let mut bytes = Vec::new();
        fault::may_lack(len)?;
        bytes.try_reserve(len).map_err(|_| Error::OutOfMemory { bytes: len })?;
        bytes.resize(len, 0);
        let start = bytes.as_mut_ptr();
        // SAFETY: the buffer is as long as a block.
        self.each_head(block, |at, from, n| unsafe { std::ptr::copy_nonoverlapping(from, start.add(at), n) })?;
        Ok(bytes)
    }

    /// Calls with where a head's keys, and then its values, are in a packed up block, where they lie in memory, and their bytes.
    fn each_head(&self, block: usize, mut each: impl FnMut(usize, *mut u8, usize)) -> Result<()> {
        let Place { keys, values, hops, .. } = self.place(BlockId(block as u32))?;
        let parts = [(keys, hops.0, self.key_dim), (values, hops.1, self.value_dim)];
        let mut at = 0;
        for &(start, hop, dim) in &parts[usize::from(self.values_alone())..] {
            let bytes = BLOCK as usize * dim * self.dtype.size();
            for head in 0..self.heads {
                // SAFETY: the block has memory for so many heads.
                each(at, unsafe { start.as_ptr().add(head * hop) }, bytes);
                at += bytes;
            }
        }
        Ok(())
    }

    /// As [`Arena::gather`], and what is not in memory is read from the file. It is not in memory then either.
    pub fn gather_any(
        &self,
        runs: &[Run],
        mut k: ElemsMut<'_>,
        mut v: ElemsMut<'_>,
        at: usize,
        total: usize,
    ) -> Result<()> {
        let (mut at, mut bytes) = (at, Vec::new());
        for stretch in runs.chunk_by(|a, b| !self.is_spilled(a.block) && !self.is_spilled(b.block)) {
            let tokens: usize = stretch.iter().map(|run| run.hi.saturating_sub(run.lo) as usize).sum();
            let [run, ..] = stretch else { continue };
            if self.is_spilled(run.block) {
                self.check_runs(stretch, k.as_ref(), v.as_ref(), at, total)?;
                if !run.is_empty() {
                    self.read_copy(number(run.block), &mut bytes)?;
                    self.unpack_run(run, &bytes, &mut k, &mut v, (at, total))?;
                    self.tier.iter().for_each(|tier| tier.passed(bytes.len()));
                }
            } else {
                self.gather(stretch, k.reborrow(), v.reborrow(), at, total)?;
            }
            at += tokens;
        }
        if runs.is_empty() { self.gather(runs, k, v, at, total) } else { Ok(()) }
    }

    /// Copies a checked run of a packed up block to rows `at..` of `total`; keys that are in memory from there.
    fn unpack_run(
        &self,
        run: &Run,
        bytes: &[u8],
        k: &mut ElemsMut<'_>,
        v: &mut ElemsMut<'_>,
        (at, total): (usize, usize),
    ) -> Result<()> {
        let es = self.dtype.size();
        let (first, n) = (run.lo as usize, run.len() as usize);
        let rows = |dim: usize, from: usize, head: usize| {
            let from = from + (head * BLOCK as usize + first) * dim * es;
            &bytes[from..from + n * dim * es]
        };
        let (k, v) = (k.as_bytes_mut_ptr(), v.as_bytes_mut_ptr());
        for head in 0..self.heads {
            let (to_k, to_v) = (self.key_dim * es, self.value_dim * es);
            let row = head * total + at;
            let (keys, values) = if self.values_alone() {
                (self.keys_from(run.block, head, run.lo)?, rows(self.value_dim, 0, head))
            } else {
                let behind = self.heads * BLOCK as usize * self.key_dim * es;
                (rows(self.key_dim, 0, head).as_ptr(), rows(self.value_dim, behind, head))
            };
            // SAFETY: the caller checked that there is room for the run in each head; a block that left memory was full, so keys that
            // stayed have memory for all of it.
            unsafe {
                std::ptr::copy_nonoverlapping(keys, k.add(row * to_k), n * to_k);
                std::ptr::copy_nonoverlapping(values.as_ptr(), v.add(row * to_v), n * to_v);
            }
        }
        Ok(())
    }

    /// Whether the file has a copy of the block.
    pub fn is_copied(&self, block: BlockId) -> bool {
        !block.is_packed() && self.tier.as_ref().is_some_and(|tier| tier.copy(number(block)).is_some())
    }
}

/// Copies that are made ahead only save work: where the file has no space for them, there are none.
pub(super) fn without_space(made: Result<()>) -> Result<()> {
    match made {
        Err(Error::TierFull { .. }) => Ok(()),
        other => other,
    }
}
