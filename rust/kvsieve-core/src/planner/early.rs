//! What was pinned before there were rows.

use std::ops::Range;

use crate::ids::Position;
use crate::pins::Pins;

/// A pin or its end that came before the first step: of one row, or of all.
#[derive(Clone, Debug)]
pub struct Early {
    pub row: Option<usize>,
    pub range: Range<Position>,
    pub add: bool,
}

impl Early {
    /// What row `row` starts with.
    pub fn pins(all: &[Self], row: usize) -> Pins {
        let mut pins = Pins::default();
        for early in all.iter().filter(|early| early.row.is_none_or(|r| r == row)) {
            early.apply(&mut pins);
        }
        pins
    }

    pub fn apply(&self, pins: &mut Pins) {
        if self.add { pins.add(self.range.clone()) } else { pins.remove(&self.range) }
    }
}
