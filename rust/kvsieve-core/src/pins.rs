//! Positions of one row that are never evicted: sorted ranges that neither overlap nor touch.

use crate::ids::Position;
use std::ops::Range;

/// The pinned positions of one row. They may lie in the future: then the tokens are pinned as they come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    ranges: Vec<Range<Position>>,
}

impl Pins {
    pub fn ranges(&self) -> &[Range<Position>] {
        &self.ranges
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Adds `new`.
    pub fn add(&mut self, new: Range<Position>) {
        if new.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|r| r.end < new.start);
        let last = self.ranges.partition_point(|r| r.start <= new.end);
        let mut merged = new;
        for old in self.ranges.drain(first..last) {
            merged = merged.start.min(old.start)..merged.end.max(old.end);
        }
        self.ranges.insert(first, merged);
    }

    /// Takes `gone` out.
    pub fn remove(&mut self, gone: &Range<Position>) {
        if gone.is_empty() || self.is_empty() {
            return;
        }
        let pieces = self.ranges.iter().flat_map(|r| [r.start..r.end.min(gone.start), r.start.max(gone.end)..r.end]);
        self.ranges = pieces.filter(|r| !r.is_empty()).collect();
    }

    /// How many pinned positions are at least `first`.
    pub fn count_from(&self, first: Position) -> u64 {
        self.ranges.iter().map(|r| r.end.saturating_sub(r.start.max(first))).sum()
    }

    /// Which of some ascending positions are pinned, as ranges of their indices, where `below` says how many are below one.
    pub fn held_in<'a>(&'a self, below: impl Fn(Position) -> usize + 'a) -> impl Iterator<Item = Range<usize>> + 'a {
        self.ranges.iter().map(move |r| below(r.start)..below(r.end)).filter(|r| !r.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn ranges_are_a_set_of_positions(ops in prop::collection::vec((any::<bool>(), 0u64..40, 0u64..12), 0..20)) {
            let (mut pins, mut set) = (Pins::default(), BTreeSet::new());
            for (add, start, len) in ops {
                let range = start..start + len;
                if add {
                    pins.add(range.clone());
                    set.extend(range);
                } else {
                    pins.remove(&range);
                    set.retain(|p| !range.contains(p));
                }
                prop_assert!(pins.ranges().iter().cloned().flatten().eq(set.iter().copied()));
                prop_assert!(pins.ranges().windows(2).all(|w| w[0].end < w[1].start));
                prop_assert!(pins.ranges().iter().all(|r| !r.is_empty()));
                prop_assert_eq!(pins.count_from(9), set.range(9..).count() as u64);
            }
        }
    }
}
