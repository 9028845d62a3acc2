//! Which keys one query sees, as index ranges: a few numbers, found by binary search.

use super::Rule;
use crate::ids::Position;

/// The keys of one memory in text order: residents, then the new tokens of the step (first memory only).
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    pub residents: &'a [Position],
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
        self.residents.partition_point(|&p| p < position) + new
    }

    /// True positions of keys `lo..hi`.
    pub fn positions(&self, lo: usize, hi: usize) -> impl Iterator<Item = Position> + '_ {
        let n = self.residents.len();
        let old = self.residents[lo.min(n)..hi.min(n)].iter().copied();
        let new = lo.max(n)..hi.max(n);
        old.chain(new.map(move |i| self.first_new + (i - n) as u64))
    }
}

/// What one query sees: keys `0..beyond` (sinks outside its visible range) and keys `band..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub beyond: usize,
    pub band: usize,
    pub end: usize,
    /// Keys strictly before the query, visible or not.
    before: usize,
}

impl View {
    /// What the `i`-th new token sees.
    pub fn new(keys: &Keys<'_>, rule: &Rule, i: usize) -> Self {
        let position = keys.first_new + i as u64;
        let before = keys.residents.len() + i.min(keys.num_new);
        let end = before + usize::from(i < keys.num_new);
        let band = match rule.visible {
            Some(near) => keys.below((position + 1).saturating_sub(near)).min(before),
            None => 0,
        };
        Self { beyond: keys.below(rule.sinks).min(band), band, end, before }
    }

    /// How many visible keys lie before the query.
    pub fn visible_before(&self) -> usize {
        self.beyond + self.before - self.band
    }

    /// The number of key `index` among the visible keys.
    pub fn rank(&self, index: usize) -> usize {
        if index < self.beyond { index } else { index - (self.band - self.beyond) }
    }
}
