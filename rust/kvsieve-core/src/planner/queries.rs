//! What can be asked about a stream.

use super::state::{Planner, lock};
use crate::block::table::Table;
use crate::error::{Error, Result};
use crate::ids::{BlockId, Position, Run};
use crate::plan::Frame;

impl Planner {
    pub fn frame(&self) -> Frame {
        self.frame
    }

    pub fn num_memories(&self) -> usize {
        self.memories.len()
    }

    /// 0 before the first step.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Columns seen, pads included.
    pub fn columns(&self) -> u64 {
        self.columns
    }

    pub fn step_open(&self) -> bool {
        self.open.is_some()
    }

    /// Real tokens seen.
    pub fn seen(&self, row: usize) -> Result<u64> {
        self.rows.get(row).map(|r| r.seen).ok_or_else(|| no_row(row))
    }

    pub fn resident(&self, memory: usize, row: usize) -> Result<usize> {
        Ok(self.table(memory, row)?.len())
    }

    pub fn positions(&self, memory: usize, row: usize) -> Result<Vec<Position>> {
        Ok(self.table(memory, row)?.positions().to_vec())
    }

    /// A score that is not known yet is NaN.
    pub fn scores(&self, memory: usize, row: usize) -> Result<Vec<f32>> {
        Ok(self.table(memory, row)?.scores().list().into_owned())
    }

    pub fn runs(&self, memory: usize, row: usize) -> Result<&[Run]> {
        Ok(self.table(memory, row)?.runs())
    }

    /// How many of the residents are packed: the first ones.
    pub fn num_packed(&self, row: usize) -> Result<usize> {
        Ok(self.table(0, row)?.num_packed())
    }

    /// Blocks in use by this stream and its forks together.
    pub fn used_blocks(&self) -> usize {
        lock(&self.pool).used()
    }

    /// For every plain block ever handed out, whether it is in use.
    pub fn blocks_in_use(&self) -> Vec<bool> {
        lock(&self.pool).in_use()
    }

    /// For every packed block ever handed out, counted from [`crate::ids::PACKED`], whether it is in use.
    pub fn packed_in_use(&self) -> Vec<bool> {
        lock(&self.pool).packed_in_use()
    }

    /// Packed blocks that the stores must hold before the latest step or moves are run.
    pub fn num_packed_blocks(&self) -> u32 {
        lock(&self.pool).packed_reach()
    }

    /// Plain blocks that the stores must hold before the latest step or moves are run.
    pub fn num_blocks(&self) -> u32 {
        lock(&self.pool).reach()
    }

    /// References to a block, from this stream and its forks together.
    pub fn block_refs(&self, block: BlockId) -> u32 {
        lock(&self.pool).refs(block)
    }

    /// Blocks that wait to be handed out again.
    pub fn free_blocks(&self) -> Vec<BlockId> {
        lock(&self.pool).free_blocks().collect()
    }

    pub(super) fn table(&self, memory: usize, row: usize) -> Result<&Table> {
        let state = self.rows.get(row).ok_or_else(|| no_row(row))?;
        state.tables.get(memory).ok_or_else(|| Error::OutOfRange {
            what: "memory",
            expected: "a memory of the stream",
            got: memory.to_string(),
        })
    }
}

fn no_row(row: usize) -> Error {
    Error::OutOfRange { what: "row", expected: "a row of the cache", got: row.to_string() }
}
