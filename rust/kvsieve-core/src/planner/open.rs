//! A step between its beginning and its end.

use crate::block::table::Mark;
use crate::ids::BlockId;

/// What it takes to undo or to finish the open step.
#[derive(Debug)]
pub(super) struct Open {
    pub new_lens: Vec<usize>,
    pub num_queries: usize,
    pub marks: Vec<Mark>,
    /// Shared tail blocks that were replaced by copies; still referenced, so that undoing can return to them.
    pub retired: Vec<BlockId>,
    /// This step is the stream's first: undoing it forgets the number of rows.
    pub first: bool,
}
