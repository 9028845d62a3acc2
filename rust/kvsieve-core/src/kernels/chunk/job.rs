//! What the units of a call have in common, and where their results go.

use std::ops::Range;

use super::attend::Place;
use super::compiled::Kernels;
use super::residents::Residents;
use super::shape::Shape;
use crate::kernels::sparse::Sparse;
use crate::select::Rule;

/// Consecutive queries of a row that share a choice.
#[derive(Clone)]
pub(super) struct Queries {
    pub row: usize,
    /// The position of the first.
    pub first: usize,
    pub columns: Range<usize>,
}

/// What all units have in common.
pub(super) struct Common<'a> {
    pub rule: &'a Rule,
    pub args: &'a Sparse<'a>,
    pub residents: &'a [Residents],
    pub kernels: Kernels,
    pub shape: Shape,
    /// Bytes of a key and of a value.
    pub bytes: (usize, usize),
    pub group: usize,
    pub out: *mut u8,
    pub lse: Option<*mut f32>,
}

// SAFETY: the pointers are into memory that is borrowed for the call; a unit writes the rows of its own queries and heads alone.
unsafe impl Sync for Common<'_> {}

/// Where the rows of a unit go.
pub(super) struct Rows<'a> {
    pub common: &'a Common<'a>,
    pub row: usize,
    pub column: usize,
    pub head: usize,
}

impl Rows<'_> {
    fn column_and_head(&self, row: usize) -> (usize, usize) {
        let group = self.common.group;
        (self.column + row / group, self.head * group + row % group)
    }
}

impl Place for Rows<'_> {
    unsafe fn out(&self, row: usize) -> *mut u8 {
        let [_, heads, columns, _] = self.common.args.q.shape();
        let (column, head) = self.column_and_head(row);
        let at = (self.row * columns + column) * heads + head;
        self.common.out.wrapping_add(at * self.common.bytes.1)
    }

    unsafe fn lse(&self, row: usize, lse: f32) {
        let [_, heads, columns, _] = self.common.args.q.shape();
        let (column, head) = self.column_and_head(row);
        if let Some(to) = self.common.lse {
            // SAFETY: `check` has seen that there is a place for every query; this one is the unit's own.
            unsafe { *to.add((self.row * heads + head) * columns + column) = lse };
        }
    }
}
