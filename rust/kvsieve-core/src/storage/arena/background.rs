//! Blocks that leave memory while others compute: what the file's thread does for an arena.
//!
//! What a block holds is copied when it is to be written, and its memory is given back once that is done, unless the block was read or
//! written meanwhile.

use super::memory::Arena;
use super::tiered::without_space;
use crate::Result;
use crate::ids::{BLOCK, BlockId};
use crate::storage::slabs::number;
use crate::storage::tier::{Answer, Copied};

/// Blocks of a layer that are under way at most: they are in memory twice.
const UNDER_WAY: usize = 32;

impl Arena {
    /// As [`Arena::spill`], later. Blocks whose memory is not given back yet count as in memory.
    ///
    /// # Errors
    /// [`crate::Error::TierFull`] where there is no space for one; and what went wrong with those that were written meanwhile, which are in
    /// memory still.
    pub fn spill_later(&mut self, blocks: &[BlockId]) -> Result<()> {
        self.collect()?;
        self.tier()?.failure()?;
        for block in self.numbers(blocks.iter().copied())? {
            self.send_out(block, true)?;
        }
        Ok(())
    }

    /// As [`Arena::trim`], but what has no copy yet is written later.
    pub fn trim_later(&mut self, keep: &[BlockId]) -> Result<()> {
        let (leaving, next) = self.leaving(keep)?;
        leaving.into_iter().try_for_each(|block| self.send_out(block, true))?;
        without_space(next.into_iter().try_for_each(|block| self.send_out(block, false)))
    }

    /// Has a block written that has no copy; it `leaves` memory, or only gets one.
    fn send_out(&mut self, block: usize, leaves: bool) -> Result<()> {
        if self.values.slots(block) != BLOCK || self.tier()?.also_leaves(block, leaves) {
            return Ok(());
        }
        if self.tier()?.copy(block).is_some() {
            if leaves {
                self.give_back(block);
            }
            return Ok(());
        }
        self.make_way()?;
        let bytes = self.packed_up(block)?;
        let tier = self.tier()?;
        let extent = tier.file.allocate(bytes.len())?;
        tier.send(block, extent, bytes, leaves).inspect_err(|_| tier.file.free(extent))
    }

    /// Waits until nothing is under way, and says what went wrong.
    pub fn finish(&mut self) -> Result<()> {
        while self.tier()?.num_pending() > 0 {
            self.collect_some(true)?;
        }
        self.collect()?;
        self.tier()?.failure()
    }

    /// Waits until there is place for one more.
    fn make_way(&mut self) -> Result<()> {
        while self.tier()?.num_pending() >= UNDER_WAY {
            self.collect_some(true)?;
        }
        Ok(())
    }

    /// Waits until nothing is under way for a block.
    pub(super) fn await_block(&mut self, block: usize) -> Result<()> {
        while self.tier()?.is_pending(block) {
            self.collect_some(true)?;
        }
        Ok(())
    }

    /// What the thread has done takes effect.
    pub(super) fn collect(&mut self) -> Result<()> {
        if self.tier.is_some() { self.collect_some(false) } else { Ok(()) }
    }

    fn collect_some(&mut self, wait: bool) -> Result<()> {
        self.tier()?.answers(wait).into_iter().try_for_each(|answer| self.adopt(answer))
    }

    fn adopt(&mut self, answer: Answer) -> Result<()> {
        let (block, extent) = (answer.block, answer.extent);
        let tier = self.tier()?;
        let current = tier.is_current(&answer);
        match answer.written {
            Ok((sum, bytes)) if current.is_some() => {
                tier.copied(block, Copied { extent, sum }, bytes);
                let leaves = current == Some(true) && !tier.leaving(std::iter::once(block), 1).is_empty();
                if leaves {
                    self.give_back(block);
                }
            }
            written => {
                tier.file.free(extent);
                if let (Err(err), Some(_)) = (written, current) {
                    tier.failed(err);
                }
            }
        }
        Ok(())
    }

    /// Whether something is under way for the block; for tests.
    pub fn is_under_way(&self, block: BlockId) -> bool {
        !block.is_packed() && self.tier.as_ref().is_some_and(|tier| tier.is_pending(number(block)))
    }
}
