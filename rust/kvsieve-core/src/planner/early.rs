//! What was pinned before there were rows.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, Result};
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

    /// What each row starts with that is named, by row; and what all others start with.
    pub fn by_row(all: &[Self]) -> (BTreeMap<usize, Pins>, Pins) {
        let mut named = BTreeMap::new();
        for row in all.iter().filter_map(|early| early.row) {
            named.entry(row).or_insert_with(|| Self::pins(all, row));
        }
        let mut others = Pins::default();
        all.iter().filter(|early| early.row.is_none()).for_each(|early| early.apply(&mut others));
        (named, others)
    }

    /// Refuses pins of a row that an input of `given` rows does not have.
    pub fn check_rows(all: &[Self], given: usize) -> Result<()> {
        let (named, others) = Self::by_row(all);
        match named.range(given..).find(|(_, pins)| **pins != others) {
            None => Ok(()),
            Some((row, _)) => Err(Error::OutOfRange {
                what: "a row with pins of its own",
                expected: "one of the input; unpin its tokens, or give more rows",
                got: format!("row {row} of {given}"),
            }),
        }
    }

    pub fn apply(&self, pins: &mut Pins) {
        if self.add { pins.add(self.range.clone()) } else { pins.remove(&self.range) }
    }
}
