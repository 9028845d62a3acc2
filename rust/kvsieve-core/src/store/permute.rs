//! Each head keeps residents of its own.

use super::arena::Arena;
use crate::ids::{BlockId, Run};
use crate::kernels::view::{Dtype, Elems};
use crate::{Error, Result};

/// Rows that wait to be written.
enum Rows {
    F32(Vec<f32>),
    Bits(Vec<u16>),
}

impl Rows {
    fn with_room(dtype: Dtype, elements: usize) -> Self {
        match dtype {
            Dtype::F32 => Rows::F32(Vec::with_capacity(elements)),
            Dtype::BF16 | Dtype::F16 => Rows::Bits(Vec::with_capacity(elements)),
        }
    }

    /// Adds a row of the same width, as every row of one arena is.
    fn push(&mut self, row: Elems<'_>) {
        match (self, row) {
            (Rows::F32(rows), Elems::F32(row)) => rows.extend_from_slice(row),
            (Rows::Bits(rows), Elems::Bits(row)) => rows.extend_from_slice(row),
            (Rows::F32(_), Elems::Bits(_)) | (Rows::Bits(_), Elems::F32(_)) => unreachable!("an arena has one dtype"),
        }
    }

    fn elems(&self) -> Elems<'_> {
        match self {
            Rows::F32(rows) => Elems::F32(rows),
            Rows::Bits(rows) => Elems::Bits(rows),
        }
    }
}

impl Arena {
    /// For each head `h` and each `j` below the number of tokens of `to`: resident `keep[h][j]` of `from` goes to slot `j` of `to`.
    ///
    /// `keep` is `[heads][tokens of to]`. All is read before anything is written, so the two may overlap in any way.
    pub fn permute(&mut self, from: &[Run], keep: &[i64], to: &[Run]) -> Result<()> {
        let (heads, slots) = (self.num_kv_heads(), self.slots(from)?);
        let count: usize = to.iter().map(|run| run.hi.saturating_sub(run.lo) as usize).sum();
        if Some(keep.len()) != count.checked_mul(heads) {
            let (expected, got) = (format!("[{heads}, {count}]"), format!("{} elements", keep.len()));
            return Err(Error::Shape { what: "keep", expected, got });
        }
        let mut keys = Rows::with_room(self.dtype(), keep.len() * self.key_dim());
        let mut values = Rows::with_room(self.dtype(), keep.len() * self.value_dim());
        for (i, &resident) in keep.iter().enumerate() {
            let Some(&(block, slot)) = usize::try_from(resident).ok().and_then(|at| slots.get(at)) else {
                let got = format!("{resident} of {}", slots.len());
                return Err(Error::OutOfRange { what: "keep", expected: "indices of residents", got });
            };
            keys.push(self.key(block, i / count, slot)?);
            values.push(self.value(block, i / count, slot)?);
        }
        self.write(to, keys.elems(), values.elems())
    }

    fn slots(&self, runs: &[Run]) -> Result<Vec<(BlockId, u32)>> {
        runs.iter().try_for_each(|run| self.check_span(run.block, run.lo, run.hi))?;
        Ok(runs.iter().flat_map(|run| (run.lo..run.hi).map(|slot| (run.block, slot))).collect())
    }
}
