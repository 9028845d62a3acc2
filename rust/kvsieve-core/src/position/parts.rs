//! Per row and memory: positions of all keys and all queries of a chunk, for the path on which new tokens are read unstored.

use super::view::{Keys, View};
use super::{Always, PositionRule, Rule};
use crate::block::table::Table;
use crate::ids::Position;
use crate::plan::{Part, Placing};
use std::ops::Range;

/// One memory of one row, before the step's tokens are appended.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub row: usize,
    pub memory: usize,
    pub table: &'a Table,
    pub keys: Keys<'a>,
    pub rule: &'a Rule,
    pub pins: &'a [Range<Position>],
    pub num_queries: usize,
    /// Per query, the visible keys before it in all earlier memories, sinks beyond their window left out.
    pub earlier: &'a [usize],
    /// Keys of later memories, which stand between this one's sinks and its window.
    pub later: usize,
}

/// Positions of keys and queries under one placing.
struct Placed {
    keys: Vec<i64>,
    queries: Vec<i64>,
    placing: Placing,
}

impl Source<'_> {
    pub fn parts(&self, out: &mut Vec<Part>) {
        if self.keys.is_empty() || self.num_queries == 0 {
            return;
        }
        if self.hides_nothing() {
            out.extend(self.whole());
            return;
        }
        self.beyond(out);
        out.extend(self.band());
    }

    fn view(&self, i: usize) -> View<'_> {
        View::new(&self.keys, self.rule, self.pins, i)
    }

    fn query_true(&self) -> Vec<i64> {
        (0..self.num_queries).map(|i| self.keys.first_new as i64 + i as i64).collect()
    }

    fn key_true(&self, lo: usize, hi: usize) -> Vec<i64> {
        self.keys.positions(lo, hi).map(|p| p as i64).collect()
    }

    /// Whether nothing has left, and no query misses a key before it.
    fn hides_nothing(&self) -> bool {
        let last = self.view(self.num_queries - 1);
        let one_rule = matches!(self.rule.position, PositionRule::Original | PositionRule::InCache);
        let complete = self.keys.first_new == self.keys.residents.len() as u64;
        one_rule && self.later == 0 && complete && last.beyond == last.band
    }

    /// All keys in one part, so that a window that nothing has left yet is computed as if there were none.
    fn whole(&self) -> Option<Part> {
        let hi = self.keys.len();
        let placed = match self.rule.position {
            PositionRule::InCache => self.by_index(0, hi),
            _ => self.by_position(0, hi, Placing::Relative),
        };
        Some(self.part(0, hi, i64::MAX, 0, placed))
    }

    /// All keys that some query sees within the visible range.
    fn band(&self) -> Option<Part> {
        let (lo, hi) = (self.view(0).band, self.keys.len());
        if lo == hi {
            return None;
        }
        let placed = match self.rule.position {
            PositionRule::Original | PositionRule::Capped { .. } => self.by_position(lo, hi, Placing::Relative),
            PositionRule::Fixed { distance } => self.by_position(lo, hi, Placing::Fixed(distance as i64)),
            PositionRule::InCache => self.by_index(lo, hi),
        };
        let near = self.rule.visible.and_then(|near| i64::try_from(near).ok()).unwrap_or(i64::MAX);
        Some(self.part(lo, hi, near, 0, placed))
    }

    /// The sinks and what is pinned, a part a range, for the queries that have them beyond their visible range.
    fn beyond(&self, out: &mut Vec<Part>) {
        let Some(far) = self.rule.visible.and_then(|near| i64::try_from(near).ok()) else { return };
        let (always, band) = (Always { sinks: self.rule.sinks, pins: self.pins }, self.view(self.num_queries - 1).band);
        let mut rank = 0;
        for range in always.ranges() {
            let (lo, hi) = (self.keys.below(range.start), self.keys.below(range.end));
            if lo >= hi.min(band) {
                continue;
            }
            let placed = match self.rule.position {
                PositionRule::Original => self.by_position(lo, hi, Placing::Relative),
                PositionRule::Capped { distance } | PositionRule::Fixed { distance } => {
                    self.by_position(lo, hi, Placing::Fixed(distance as i64))
                }
                PositionRule::InCache => self.by_rank(lo, hi, rank),
            };
            out.push(self.part(lo, hi, i64::MAX, far, placed));
            rank += hi - lo;
        }
    }

    /// True positions, counted from the first key so that the numbers stay small.
    fn by_position(&self, lo: usize, hi: usize, placing: Placing) -> Placed {
        let mut keys = self.key_true(lo, hi);
        let mut queries = self.query_true();
        let base = keys.first().copied().unwrap_or(0);
        keys.iter_mut().chain(&mut queries).for_each(|p| *p -= base);
        Placed { keys, queries, placing }
    }

    /// Indices among all keys: for keys in the visible range, differences of indices count visible keys.
    fn by_index(&self, lo: usize, hi: usize) -> Placed {
        let keys = (0..(hi - lo) as i64).collect();
        let before = |i: usize| self.keys.residents.len() + i.min(self.keys.num_new);
        let queries = (0..self.num_queries).map(|i| (before(i) + self.earlier[i]) as i64 - lo as i64).collect();
        Placed { keys, queries, placing: Placing::Relative }
    }

    /// Ranks among the keys that each query sees, from the `rank` of key `lo` on.
    fn by_rank(&self, lo: usize, hi: usize, rank: usize) -> Placed {
        let queries = (0..self.num_queries)
            .map(|i| (self.view(i).visible_before() + self.earlier[i] + self.later) as i64)
            .collect();
        Placed { keys: (rank..rank + hi - lo).map(|r| r as i64).collect(), queries, placing: Placing::Relative }
    }

    fn part(&self, lo: usize, hi: usize, near: i64, far: i64, placed: Placed) -> Part {
        let n = self.keys.residents.len();
        Part {
            row: self.row,
            memory: self.memory,
            runs: self.table.runs_of(lo.min(n)..hi.min(n)),
            new_lo: lo.saturating_sub(n),
            new_hi: hi.saturating_sub(n),
            key_true: self.key_true(lo, hi),
            key_positions: placed.keys,
            query_true: self.query_true(),
            query_positions: placed.queries,
            near,
            far,
            placing: placed.placing,
            top_k: self.rule.top_k,
        }
    }
}
