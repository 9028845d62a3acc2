//! What a rule is asked, and what it answers.

use std::ops::Range;

/// What a rule is asked for.
#[derive(Debug)]
pub struct Asked<'a> {
    /// The residents to select from.
    pub region: Range<u32>,
    /// The first stage to compute.
    pub start: usize,
    /// What went into each stage the last time: read for `start`, and written for the later ones. Of no use to a rule of one stage.
    pub inputs: &'a mut Inputs,
}

/// For each stage, the ranges of residents that went into it.
pub type Inputs = Vec<Vec<Range<u32>>>;

/// What one query block reads of one key-value head, between sinks and window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Selected ranges of residents, ascending.
    pub blocks: Vec<Range<u32>>,
    /// Representative keys scored; one that is met twice counts twice, though it may have been read once.
    pub reads: u64,
    /// Levels of the tree, or stages, that were scored.
    pub rounds: u32,
}
