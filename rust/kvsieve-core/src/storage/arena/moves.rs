//! Tokens into blocks, and from block to block.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use std::sync::Arc;

use super::memory::Arena;
use crate::ids::{BlockId, Run};
use crate::plan::{Move, Step};
use crate::storage::packed::Chosen;
use crate::storage::slabs::MAX_BLOCKS;
use crate::tensor::{View, check_dtype, check_len};
use crate::{Error, Result, fault};

impl Arena {
    /// Gives the packed blocks of `to` memory and the channels of those of `from`.
    pub(super) fn share_channels(&mut self, from: &[Run], to: &[Run]) -> Result<()> {
        let to: Vec<_> = to.iter().filter(|run| run.block.is_packed()).map(|run| (run.block, run.hi)).collect();
        let first = from.iter().map(|run| run.block).find(|block| block.is_packed());
        let (Some(packed), Some(first)) = (&mut self.packed, first) else {
            return match to.first() {
                Some((block, _)) => Err(self.bad_block(block.0)),
                None => Ok(()),
            };
        };
        let channels = Arc::clone(packed.channels_of(first)?);
        packed.reserve(to.iter().copied())?;
        packed.choose(to.iter().map(|&(block, _)| block), &channels);
        Ok(())
    }

    /// Makes moves from plain blocks to packed ones: what lands there keeps these channels.
    pub fn pack(&mut self, moves: &[Move], chosen: &Chosen) -> Result<()> {
        self.load_for(moves.iter().map(|m| m.from))?;
        let (heads, key_dim, kb) = (self.heads, self.key_dim, self.key_dim * self.dtype.size());
        let vb = self.value_dim * self.dtype.size();
        for m in moves {
            Self::check_slots("move", m.from_slot, m.from_slot.saturating_add(m.len))?;
            Self::check_slots("move", m.to_slot, m.to_slot.saturating_add(m.len))?;
            if m.from.is_packed() || !self.holds_to(m.from, m.from_slot + m.len) {
                return Err(self.bad_block(m.from.0));
            }
            self.check_id(m.to.0)?;
            if !m.to.is_packed() {
                return Err(self.bad_block(m.to.0));
            }
        }
        let Some(packed) = &mut self.packed else {
            return Err(Error::Unsupported("this layer was not told how to pack"));
        };
        let channels = match chosen {
            Chosen::New(channels) => Arc::clone(channels),
            Chosen::Like(block) if block.is_packed() => Arc::clone(packed.channels_of(*block)?),
            Chosen::Like(block) => return Err(Error::BadBlock { block: block.0, have: 0 }),
        };
        let fits = channels.kept() == packed.packing().key_kept && channels.heads() == heads;
        if !fits || channels.highest() >= key_dim {
            let expected = format!("[{heads}, {}]", packed.packing().key_kept);
            let got = format!("[{}, {}]", channels.heads(), channels.kept());
            return Err(Error::Shape { what: "channels", expected, got });
        }
        packed.reserve(moves.iter().map(ends))?;
        packed.choose(moves.iter().map(|m| m.to), &channels);
        self.touch(moves.iter().map(|m| (m.to, m.to_slot)));
        let mut packed = self.packed.take();
        // After a panic it is there again.
        let done = catch_unwind(AssertUnwindSafe(|| {
            for packed in packed.iter_mut() {
                for head in 0..heads {
                    for run in joined(moves) {
                        fault::may_panic();
                        // Neighbouring moves into one block become one, so that numbers that share a scale are seen together.
                        let n: usize = run.iter().map(|m| m.len as usize).sum();
                        let (mut keys, mut values) = (vec![0u8; n * kb], vec![0u8; n * vb]);
                        let mut at = 0;
                        for m in run {
                            let (k, v) = self.rows(m.from, head, m.from_slot);
                            let len = m.len as usize;
                            // SAFETY: the source was checked to lie in its block; the buffers have room for all moves of the run.
                            unsafe {
                                std::ptr::copy_nonoverlapping(k, keys.as_mut_ptr().add(at * kb), len * kb);
                                std::ptr::copy_nonoverlapping(v, values.as_mut_ptr().add(at * vb), len * vb);
                            }
                            at += len;
                        }
                        // SAFETY: `n` rows at both pointers; the slots were checked, and the block was given memory and channels.
                        unsafe { packed.put(run[0].to, head, run[0].to_slot, keys.as_ptr(), values.as_ptr(), n) };
                    }
                }
            }
        }));
        self.packed = packed;
        done.unwrap_or_else(|panic| resume_unwind(panic));
        Ok(())
    }

    /// Makes the step's copies, then stores its new tokens from `k` and `v` (`[rows, heads, columns, dim]`).
    pub fn append(&mut self, k: &View<'_>, v: &View<'_>, step: &Step) -> Result<()> {
        for (what, view, dim) in [("k", k, self.key_dim), ("v", v, self.value_dim)] {
            check_dtype(what, view.elems(), self.dtype)?;
            let expected = [step.num_rows, self.heads, step.num_queries, dim];
            if view.shape() != expected {
                return Err(Error::Shape {
                    what,
                    expected: format!("{expected:?}"),
                    got: format!("{:?}", view.shape()),
                });
            }
        }
        check_len("new_lens", step.new_lens.len(), step.num_rows)?;
        if step.new_lens.iter().any(|&n| n > step.num_queries) {
            let expected = format!("at most {} new tokens a row", step.num_queries);
            return Err(Error::Shape { what: "new_lens", expected, got: format!("{:?}", step.new_lens) });
        }
        for a in &step.appends {
            Self::check_slots("append", a.slot, a.slot.saturating_add(a.len))?;
            let fits = step.new_lens.get(a.row).is_some_and(|&n| a.new <= n && a.len as usize <= n - a.new);
            if !fits {
                let got = format!("tokens {}..+{} of row {}", a.new, a.len, a.row);
                return Err(Error::OutOfRange { what: "append", expected: "new tokens of the step", got });
            }
            if a.block.0 >= step.num_blocks.min(MAX_BLOCKS) {
                return Err(Error::BadBlock { block: a.block.0, have: step.num_blocks });
            }
        }
        self.load_for(step.copies.iter().map(|m| m.from))?;
        self.check_moves(&step.copies)?;
        if let Some(m) = step.copies.iter().find(|m| m.to.is_packed()) {
            return Err(self.bad_block(m.to.0));
        }
        let appended = step.appends.iter().map(|a| (a.block, a.slot + a.len));
        self.reserve(step.copies.iter().map(ends).chain(appended))?;

        fault::may_panic();
        self.move_tokens(&step.copies);
        self.touch(step.appends.iter().map(|a| (a.block, a.slot)));
        let es = self.dtype.size();
        for a in step.appends.iter().filter(|a| a.len > 0) {
            let column = step.num_queries - step.new_lens[a.row] + a.new;
            for head in 0..self.heads {
                let (keys, values) = self.rows_mut(a.block, head, a.slot);
                for (to, view, dim) in [(keys, k, self.key_dim), (values, v, self.value_dim)] {
                    for i in 0..a.len as usize {
                        let from = view.row(a.row, head, column + i).as_bytes_ptr();
                        // SAFETY: `from` is a checked row of `dim` elements; `to` is the row of slot `a.slot + i`, which was
                        // checked to lie in the block. A borrowed view cannot overlap memory that the arena owns.
                        unsafe { std::ptr::copy_nonoverlapping(from, to.add(i * dim * es), dim * es) };
                    }
                }
            }
        }
        Ok(())
    }

    fn check_moves(&self, moves: &[Move]) -> Result<()> {
        for (i, m) in moves.iter().enumerate() {
            Self::check_slots("move", m.from_slot, m.from_slot.saturating_add(m.len))?;
            Self::check_slots("move", m.to_slot, m.to_slot.saturating_add(m.len))?;
            self.check_id(m.to.0)?;
            if m.from.is_packed() != m.to.is_packed() {
                return Err(Error::Unsupported("tokens cannot be moved between plain and packed blocks; pack them"));
            }
            // What an earlier move fills may be moved on, though it has no memory yet.
            let end = m.from_slot + m.len;
            let filled = |earlier: &Move| earlier.to == m.from && end <= earlier.to_slot + earlier.len;
            if !self.holds_to(m.from, end) && !moves[..i].iter().any(filled) {
                return Err(self.bad_block(m.from.0));
            }
        }
        Ok(())
    }

    /// Makes checked moves, each as a memmove: bits are carried over, never computed with.
    ///
    /// Head by head, keys before values: each is then one walk through memory, where all of them at once would be dozens.
    fn move_tokens(&mut self, moves: &[Move]) {
        self.touch(moves.iter().map(|m| (m.to, m.to_slot)));
        let (kb, vb) = (self.key_dim * self.dtype.size(), self.value_dim * self.dtype.size());
        // Where the first head's rows lie, and how many bytes further on the next head's.
        let hops = moves.iter().filter(|m| m.len > 0).map(|m| {
            let hops = |block: BlockId| self.place(block).map_or((0, 0), |place| place.hops);
            let (from, to) = (self.rows(m.from, 0, m.from_slot), self.rows(m.to, 0, m.to_slot));
            // The buffers are raw memory owned through `&mut self`, so writing through their pointers is allowed.
            let to = (to.0.cast_mut(), to.1.cast_mut());
            (from, to, hops(m.from), hops(m.to), m.len as usize)
        });
        let hops: Vec<_> = hops.collect();
        for head in 0..self.heads {
            fault::may_panic();
            for &(from, to, from_hop, to_hop, len) in &hops {
                // SAFETY: both ranges were checked to lie inside their blocks, which have memory; `copy` allows them to overlap.
                unsafe { std::ptr::copy(from.0.add(head * from_hop.0), to.0.add(head * to_hop.0), len * kb) };
            }
            for &(from, to, from_hop, to_hop, len) in &hops {
                // SAFETY: as above.
                unsafe { std::ptr::copy(from.1.add(head * from_hop.1), to.1.add(head * to_hop.1), len * vb) };
            }
        }
    }

    /// Applies the moves in order.
    pub fn apply(&mut self, moves: &[Move]) -> Result<()> {
        self.load_for(moves.iter().map(|m| m.from))?;
        self.check_moves(moves)?;
        let (packed, plain): (Vec<Move>, Vec<Move>) = moves.iter().partition(|m| m.to.is_packed());
        self.reserve(plain.iter().map(ends))?;
        self.touch(packed.iter().map(|m| (m.to, m.to_slot)));
        if let Some(mine) = &mut self.packed
            && !packed.is_empty()
        {
            mine.reserve(packed.iter().map(ends))?;
            mine.move_tokens(&packed)?;
        }
        self.move_tokens(&plain);
        Ok(())
    }
}

/// The block that a move writes, and up to which slot.
fn ends(m: &Move) -> (BlockId, u32) {
    (m.to, m.to_slot + m.len)
}

/// The moves, cut where one does not go on where the last one ended.
fn joined(moves: &[Move]) -> impl Iterator<Item = &[Move]> {
    moves.chunk_by(|a, b| a.to == b.to && a.to_slot + a.len == b.to_slot).filter(|run| run.iter().any(|m| m.len > 0))
}
