//! Each head keeps residents of its own.

use super::memory::Arena;
use crate::ids::{BlockId, Run};
use crate::tensor::{Dtype, Elems, ElemsMut};
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

    fn zeroed(dtype: Dtype, elements: usize) -> Self {
        match dtype {
            Dtype::F32 => Rows::F32(vec![0.0; elements]),
            Dtype::BF16 | Dtype::F16 => Rows::Bits(vec![0; elements]),
        }
    }

    /// These rows of `width` elements.
    fn picked(&self, rows: impl Iterator<Item = usize>, width: usize) -> Self {
        match self {
            Rows::F32(all) => Rows::F32(rows.flat_map(|row| &all[row * width..][..width]).copied().collect()),
            Rows::Bits(all) => Rows::Bits(rows.flat_map(|row| &all[row * width..][..width]).copied().collect()),
        }
    }

    fn elems_mut(&mut self) -> ElemsMut<'_> {
        match self {
            Rows::F32(rows) => ElemsMut::F32(rows),
            Rows::Bits(rows) => ElemsMut::Bits(rows),
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
        self.load_for(from.iter().map(|run| run.block))?;
        let (heads, slots) = (self.num_kv_heads(), self.slots(from)?);
        let count: usize = to.iter().map(|run| run.hi.saturating_sub(run.lo) as usize).sum();
        if Some(keep.len()) != count.checked_mul(heads) {
            let (expected, got) = (format!("[{heads}, {count}]"), format!("{} elements", keep.len()));
            return Err(Error::Shape { what: "keep", expected, got });
        }
        if from.iter().chain(to).any(|run| run.block.is_packed()) {
            return self.permute_packed(from, keep, to, (slots.len(), count));
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

    /// [`Arena::permute`] of `n` residents where some are packed: they are read at full width, and packed again where they land in a
    /// packed block, with the channels that the residents have.
    fn permute_packed(&mut self, from: &[Run], keep: &[i64], to: &[Run], (n, count): (usize, usize)) -> Result<()> {
        let (heads, key_dim, value_dim) = (self.num_kv_heads(), self.key_dim(), self.value_dim());
        if let Some(bad) = keep.iter().find(|&&at| usize::try_from(at).is_ok_and(|at| at >= n) || at < 0) {
            let got = format!("{bad} of {n}");
            return Err(Error::OutOfRange { what: "keep", expected: "indices of residents", got });
        }
        self.share_channels(from, to)?;
        let (mut k, mut v) =
            (Rows::zeroed(self.dtype(), heads * n * key_dim), Rows::zeroed(self.dtype(), heads * n * value_dim));
        self.gather(from, k.elems_mut(), v.elems_mut(), 0, n)?;
        let rows = || keep.iter().enumerate().map(|(i, &at)| i / count * n + at as usize);
        let (k, v) = (k.picked(rows(), key_dim), v.picked(rows(), value_dim));
        self.write(to, k.elems(), v.elems())
    }

    fn slots(&self, runs: &[Run]) -> Result<Vec<(BlockId, u32)>> {
        runs.iter().try_for_each(|run| self.check_span(run.block, run.lo, run.hi))?;
        Ok(runs.iter().flat_map(|run| (run.lo..run.hi).map(|slot| (run.block, slot))).collect())
    }
}
