//! Which keys one query sees, as index ranges: a few numbers, found by binary search.

use super::{Always, Rule};
use crate::block::table::Ascending;
use crate::ids::Position;
use std::ops::Range;

/// The keys of one memory in text order: residents, then the new tokens of the step (first memory only).
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    pub residents: Ascending<'a>,
    pub first_new: Position,
    pub num_new: usize,
}

impl Keys<'_> {
    pub fn len(&self) -> usize {
        self.residents.len() + self.num_new
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many keys have a position below `position`.
    pub fn below(&self, position: Position) -> usize {
        let new = usize::try_from(position.saturating_sub(self.first_new)).unwrap_or(usize::MAX).min(self.num_new);
        self.residents.below(position) + new
    }

    /// True positions of keys `lo..hi`.
    pub fn positions(&self, lo: usize, hi: usize) -> impl Iterator<Item = Position> + '_ {
        let n = self.residents.len();
        let old = self.residents.of(lo.min(n)..hi.min(n));
        let new = lo.max(n)..hi.max(n);
        old.chain(new.map(move |i| self.first_new + (i - n) as u64))
    }
}

/// Keys `lo..hi`, all seen by one query or all not, the first of which is number `rank` among those that it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub lo: usize,
    pub hi: usize,
    pub rank: usize,
    /// Outside the visible range: sinks, and what is pinned.
    pub beyond: bool,
}

/// What one query sees: keys `band..end`, and of those before them the ones that are always seen.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    keys: Keys<'a>,
    always: Always<'a>,
    /// How many keys are seen outside the visible range.
    pub beyond: usize,
    pub band: usize,
    pub end: usize,
    /// Keys strictly before the query, visible or not.
    before: usize,
}

impl<'a> View<'a> {
    /// What the `i`-th new token sees.
    pub fn new(keys: &Keys<'a>, rule: &Rule, pins: &'a [Range<Position>], i: usize) -> Self {
        let position = keys.first_new + i as u64;
        let before = keys.residents.len() + i.min(keys.num_new);
        let end = before + usize::from(i < keys.num_new);
        let band = match rule.visible {
            Some(near) => keys.below((position + 1).saturating_sub(near)).min(before),
            None => 0,
        };
        let always = Always { sinks: rule.sinks, pins };
        let mut view = Self { keys: *keys, always, beyond: 0, band, end, before };
        if band > 0 {
            view.beyond = view.outside().map(|seen| seen.hi - seen.lo).sum();
        }
        view
    }

    /// How many visible keys lie before the query.
    pub fn visible_before(&self) -> usize {
        self.beyond + self.before - self.band
    }

    /// What is seen, in text order: a few ranges of keys.
    pub fn seen(&self) -> impl Iterator<Item = Seen> + 'a {
        let near = Seen { lo: self.band, hi: self.end, rank: self.beyond, beyond: false };
        self.outside().chain(std::iter::once(near))
    }

    /// What is not seen, and lies behind the sinks: the keys that have left the visible range.
    pub fn hidden(&self) -> Vec<Range<usize>> {
        let mut out = Vec::new();
        let mut from = 0;
        for (number, range) in self.always.ranges().enumerate() {
            let (lo, hi) = (self.keys.below(range.start).min(self.band), self.keys.below(range.end).min(self.band));
            if number > 0 && from < lo {
                out.push(from..lo);
            }
            from = hi;
        }
        if from < self.band {
            out.push(from..self.band);
        }
        out
    }

    /// What is seen outside the visible range.
    pub fn outside(&self) -> impl Iterator<Item = Seen> + 'a {
        let (keys, band) = (self.keys, self.band);
        let mut rank = 0;
        self.always.ranges().take_while(move |_| band > 0).filter_map(move |range| {
            let (lo, hi) = (keys.below(range.start).min(band), keys.below(range.end).min(band));
            rank += hi - lo;
            (lo < hi).then(|| Seen { lo, hi, rank: rank - (hi - lo), beyond: true })
        })
    }
}
