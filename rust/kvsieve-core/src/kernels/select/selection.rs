//! What is selected, for which queries, and how.

use std::ops::Range;

use crate::ids::Run;
use crate::kernels::isa::Level;
use crate::rope::Rope;
use crate::select::{Select, Shown};
use crate::tensor::View;

/// Queries of one row that share a choice: `columns` of `q`, one after another in the text.
#[derive(Clone, Debug)]
pub struct QueryBlock<'a> {
    pub row: usize,
    pub columns: Range<usize>,
    /// The row's residents, in text order. All of them: a resident's number is its position.
    pub runs: &'a [Run],
    /// Where each run is seen. Empty where [`Selection::turn`] does not ask.
    pub shown: &'a [Shown],
    /// The position of the first query.
    pub first: usize,
    /// The residents to choose from.
    pub region: Range<u32>,
}

/// How keys that were stored before their rotation meet the queries.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    pub rope: &'a Rope,
    /// Whether the rope's factor is still to be applied, to query and key.
    pub apply_factor: bool,
    /// All keys at one distance, the window's: the query is rotated by that, and keys stay as they lie. Otherwise keys are scored where
    /// they are shown.
    pub relative: bool,
}

/// Everything about a selection but the keys.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// `[rows, heads, columns, key_dim]`, of the arena's dtype and in the frame of its keys.
    pub q: View<'a>,
    /// `None` to score keys as they lie.
    pub turn: Option<Turn<'a>>,
    pub blocks: &'a [QueryBlock<'a>],
    /// Of a query block, every so many queries are scored, counted back from its last one.
    pub query_stride: usize,
    /// A query does not score the keys that its window shows anyway.
    pub window: usize,
    pub rule: &'a dyn Select,
    /// The first stage to compute, with what went into each stage the last time.
    pub start: usize,
    pub threads: usize,
    pub level: Level,
}

impl Selection<'_> {
    /// Whether it may ask for page bounds.
    pub(super) fn asks_pages(&self) -> bool {
        self.start == 0 && self.rule.page_bounds()
    }
}

/// Of `count` queries, the first that is scored, and the end; from there by `stride`.
pub(in crate::kernels) fn sampled(count: usize, stride: usize) -> Range<usize> {
    count.saturating_sub(1) % stride..count
}
