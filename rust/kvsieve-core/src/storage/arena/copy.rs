//! Tokens to and from a caller's memory.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::memory::Arena;
use crate::ids::Run;
use crate::tensor::{Elems, ElemsMut, check_dtype, check_len};
use crate::{Error, Result};

impl Arena {
    /// The number of tokens of the runs, when `k` and `v` are `[heads, total, dim]` with room for them from row `at` on.
    pub(super) fn check_runs(&self, runs: &[Run], k: Elems<'_>, v: Elems<'_>, at: usize, total: usize) -> Result<()> {
        for run in runs {
            Self::check_slots("run", run.lo, run.hi)?;
            self.check_id(run.block.0)?;
        }
        let n: usize = runs.iter().map(|r| r.len() as usize).sum();
        if at.checked_add(n).is_none_or(|end| end > total) {
            let got = format!("{n} tokens at row {at} of {total}");
            return Err(Error::Shape { what: "runs", expected: "room for all tokens".to_string(), got });
        }
        for (what, elems, dim) in [("k", k, self.key_dim), ("v", v, self.value_dim)] {
            check_dtype(what, elems, self.dtype)?;
            let len = total.checked_mul(self.heads * dim);
            check_len(what, elems.len(), len.unwrap_or(usize::MAX))?;
        }
        Ok(())
    }

    /// For each run of plain blocks and head: its first key and value here, its first row there, its length. For the others `packed`.
    fn each_run(
        &self,
        runs: &[Run],
        at: usize,
        total: usize,
        mut plain: impl FnMut(*const u8, *const u8, usize, usize),
        mut packed: impl FnMut(&Run, usize, usize),
    ) {
        for head in 0..self.heads {
            let mut row = head * total + at;
            for run in runs.iter().filter(|r| !r.is_empty()) {
                if run.block.is_packed() {
                    packed(run, head, row);
                } else {
                    let (keys, values) = self.rows(run.block, head, run.lo);
                    plain(keys, values, row, run.len() as usize);
                }
                row += run.len() as usize;
            }
        }
    }

    /// Copies the tokens of the runs to rows `at..` of `k` and `v`, each `[heads, total, dim]`; dropped channels are zero.
    pub fn gather(
        &self,
        runs: &[Run],
        mut k: ElemsMut<'_>,
        mut v: ElemsMut<'_>,
        at: usize,
        total: usize,
    ) -> Result<()> {
        self.check_runs(runs, k.as_ref(), v.as_ref(), at, total)?;
        if let Some(bad) = runs.iter().find(|run| !self.holds_to(run.block, run.hi)) {
            return Err(self.bad_block(bad.block.0));
        }
        let (kb, vb) = (self.key_dim * self.dtype.size(), self.value_dim * self.dtype.size());
        let (k, v) = (k.as_bytes_mut_ptr(), v.as_bytes_mut_ptr());
        let plain = |keys: *const u8, values: *const u8, row: usize, n: usize| {
            // SAFETY: `check_runs` found room for all rows; the source is inside a block; a caller's buffer cannot overlap the arena.
            unsafe {
                std::ptr::copy_nonoverlapping(keys, k.add(row * kb), n * kb);
                std::ptr::copy_nonoverlapping(values, v.add(row * vb), n * vb);
            }
        };
        let packed = |run: &Run, head: usize, row: usize| {
            if let Some(packed) = &self.packed {
                // SAFETY: as above; the block was found to have memory.
                unsafe {
                    packed.unpack(run.block, head, run.lo, run.len() as usize, k.add(row * kb), v.add(row * vb));
                }
            }
        };
        self.each_run(runs, at, total, plain, packed);
        Ok(())
    }

    /// The inverse of [`Arena::gather`] from row 0 on: stores saved tokens at the slots of the runs. Packed blocks must have channels.
    pub fn write(&mut self, runs: &[Run], k: Elems<'_>, v: Elems<'_>) -> Result<()> {
        let total = runs.iter().map(|r| r.hi.saturating_sub(r.lo) as usize).sum();
        self.check_runs(runs, k, v, 0, total)?;
        if let Some(bad) = runs.iter().find(|run| run.block.is_packed() && !self.holds(run.block)) {
            return Err(self.bad_block(bad.block.0));
        }
        let (packed, plain): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.block.is_packed());
        self.reserve(plain.iter().map(|run| (run.block, run.hi)))?;
        if let Some(mine) = &mut self.packed {
            mine.reserve(packed.iter().map(|run| (run.block, run.hi)))?;
        }
        self.touch(runs.iter().map(|r| (r.block, r.lo)));
        let (kb, vb) = (self.key_dim * self.dtype.size(), self.value_dim * self.dtype.size());
        let (k, v) = (k.as_bytes_ptr(), v.as_bytes_ptr());
        let mut mine = self.packed.take();
        // SAFETY: as in `gather`, the other way round; `&mut self` gives the right to write to the arena's memory.
        let plain = |keys: *const u8, values: *const u8, row: usize, n: usize| unsafe {
            std::ptr::copy_nonoverlapping(k.add(row * kb), keys.cast_mut(), n * kb);
            std::ptr::copy_nonoverlapping(v.add(row * vb), values.cast_mut(), n * vb);
        };
        let packed = |run: &Run, head: usize, row: usize| {
            if let Some(packed) = &mut mine {
                // SAFETY: as above; the block was found to have memory and channels.
                unsafe {
                    packed.put(run.block, head, run.lo, k.add(row * kb), v.add(row * vb), run.len() as usize);
                }
            }
        };
        let done = catch_unwind(AssertUnwindSafe(|| self.each_run(runs, 0, total, plain, packed)));
        self.packed = mine;
        done.unwrap_or_else(|panic| resume_unwind(panic));
        Ok(())
    }
}
