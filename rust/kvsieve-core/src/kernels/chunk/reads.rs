//! The keys that a unit reads, tile by tile.

use std::ops::Range;

use super::job::{Common, Queries};
use super::residents::Residents;
use super::shape::TILE;
use super::tile::{Tile, Tiles};
use crate::select::Chosen;

/// The keys that a unit reads, tile by tile.
pub(super) struct Reads<'a> {
    residents: &'a Residents,
    head: usize,
    bytes: (usize, usize),
    /// Ascending; the last one is `near..end`, what came before it is seen by all.
    stretches: Vec<Range<u32>>,
    next: usize,
    first: u32,
    count: u32,
    window: u32,
    near: u32,
    /// Residents from `near` on that are chosen or sinks, so that all queries after them see them.
    kept: Vec<bool>,
    /// Keys read, over all queries.
    pub read: u64,
}

impl<'a> Reads<'a> {
    /// What `queries` read with a head, of the region that was searched and of what was chosen of it.
    pub fn new(common: &Common<'a>, queries: &Queries, head: usize, region: &Range<u32>, chosen: &Chosen) -> Self {
        let (rule, first, count) = (common.rule, queries.first, queries.columns.len());
        // All queries see what the first one sees, but for its window; and from there on it is a matter of who asks.
        let near = region.end.min((first + 1).saturating_sub(rule.window) as u32);
        let mut stretches = Vec::new();
        rule.read(region, chosen, first, &mut |stretch: Range<u32>| {
            let far = stretch.start..stretch.end.min(near);
            if !far.is_empty() {
                stretches.push(far);
            }
        });
        stretches.push(near..(first + count) as u32);
        let mut kept = vec![false; (region.end - near) as usize];
        let sinks = near..region.end.min(rule.sinks as u32);
        for stretch in chosen.blocks.iter().rev().take_while(|b| b.end > near).chain([&sinks]) {
            for t in stretch.start.max(near)..stretch.end.min(region.end) {
                kept[(t - near) as usize] = true;
            }
        }
        Reads {
            residents: &common.residents[queries.row],
            head,
            bytes: common.bytes,
            stretches,
            next: 0,
            first: first as u32,
            count: count as u32,
            window: rule.window.min(u32::MAX as usize / 2) as u32,
            near,
            kept,
            read: 0,
        }
    }

    /// The queries that see resident `t` of the last stretch.
    fn seen_by(&self, t: u32) -> (u32, u32) {
        let from = t.saturating_sub(self.first);
        let kept = self.kept.get((t - self.near) as usize).copied().unwrap_or(false);
        let to = if kept { self.count } else { self.count.min((t + self.window).saturating_sub(self.first)) };
        (from.min(to), to)
    }
}

impl Tiles for Reads<'_> {
    fn next(&mut self, tile: &mut Tile) {
        (tile.len, tile.ragged) = (0, false);
        while tile.len < TILE && self.next < self.stretches.len() {
            let last = self.next + 1 == self.stretches.len();
            let whole = self.stretches[self.next].clone();
            let mine = whole.start..whole.end.min(whole.start + (TILE - tile.len) as u32);
            let from = tile.len;
            self.residents.each(mine.clone(), self.head, self.bytes, |key, value| {
                (tile.keys[tile.len], tile.values[tile.len]) = (key, value);
                tile.len += 1;
            });
            for (i, t) in (from..).zip(mine.clone()) {
                let (lo, hi) = if last { self.seen_by(t) } else { (0, self.count) };
                (tile.from[i], tile.to[i]) = (lo, hi);
                tile.ragged |= lo > 0 || hi < self.count;
                self.read += u64::from(hi - lo);
            }
            self.stretches[self.next].start = mine.end;
            self.next += usize::from(mine.end == whole.end);
        }
    }
}
