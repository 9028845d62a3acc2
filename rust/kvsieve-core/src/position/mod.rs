//! At which distance a query sees a key.
//!
//! [`view`] answers which keys a query sees and how many lie before it; [`spans`] and [`parts`] render that answer for the kernels.

pub mod naive;
pub mod parts;
pub mod spans;
pub mod view;

use crate::ids::Position;
use crate::pins::Pins;
use std::ops::Range;

/// The rule that assigns distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionRule {
    /// The true distance.
    Original,
    /// Visible keys are numbered without gaps; the distance is the difference of numbers.
    InCache,
    /// The true distance for keys nearer than the visible range, this one for sinks beyond it.
    Capped { distance: u64 },
    /// This one distance for every key.
    Fixed { distance: u64 },
}

/// How one memory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub position: PositionRule,
    /// Keys at positions below this stay visible at any distance, and so does what is pinned.
    pub sinks: Position,
    /// Other keys are visible only below this true distance.
    pub visible: Option<u64>,
    pub top_k: usize,
}

impl Rule {
    /// The rule of a memory that holds `pins` beside its sinks. They take their places from its window: as many tokens as are pinned
    /// are no longer seen at its far end.
    pub fn beside(self, pins: &Pins) -> Self {
        let pinned = if pins.is_empty() { 0 } else { pins.count_from(self.sinks) };
        Self { visible: self.visible.map(|near| near.saturating_sub(pinned).max(near.min(1))), ..self }
    }
}

/// The positions that every query of one memory of one row sees, however far they are.
#[derive(Clone, Copy, Debug)]
pub struct Always<'a> {
    pub sinks: Position,
    /// Sorted, not touching each other. Empty in all memories but the first.
    pub pins: &'a [Range<Position>],
}

impl<'a> Always<'a> {
    /// The positions as sorted ranges that do not overlap. The first one may be empty.
    pub fn ranges(self) -> impl Iterator<Item = Range<Position>> + 'a {
        let joined = self.pins.partition_point(|r| r.start <= self.sinks);
        let first = 0..joined.checked_sub(1).map_or(self.sinks, |last| self.pins[last].end.max(self.sinks));
        std::iter::once(first).chain(self.pins[joined..].iter().cloned())
    }
}
