//! At which distance a query sees a key.
//!
//! [`view`] answers which keys a query sees and how many lie before it; [`spans`] and [`parts`] render that answer for the kernels.

pub mod naive;
pub mod parts;
pub mod spans;
pub mod view;

use crate::ids::Position;

/// The rule that assigns distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The true distance.
    True,
    /// Visible keys are numbered without gaps; the distance is the difference of numbers.
    Slots,
    /// The true distance for keys nearer than the visible range, this one for sinks beyond it.
    Ceiling { distance: u64 },
    /// This one distance for every key.
    Fixed { distance: u64 },
}

/// How one memory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub place: Place,
    /// Keys at positions below this stay visible at any distance.
    pub sinks: Position,
    /// Other keys are visible only below this true distance.
    pub visible: Option<u64>,
    pub top_k: usize,
}
