//! What callers say of tokens by their positions: these are never evicted, those are evicted now.

use super::check;
use super::early::Early;
use super::row::Row;
use super::sieve::Sieve;
use super::state::{Planner, edit};
use crate::block::table::Edit;
use crate::error::{Error, Result};
use crate::ids::Position;
use crate::pins::Pins;
use crate::plan::Move;
use std::ops::Range;

impl Planner {
    /// The pinned positions of a row, as ranges that ascend and do not touch.
    pub fn pins(&self, row: usize) -> Result<Pins> {
        if self.rows.is_empty() {
            return Ok(Early::pins(&self.early, row));
        }
        self.table(0, row)?;
        Ok(self.rows[row].pins.clone())
    }

    /// What was said of tokens before the first step, in order; empty once there are rows.
    pub fn early(&self) -> &[Early] {
        if self.rows.is_empty() { &self.early } else { &[] }
    }

    /// The tokens at positions `range` of these rows (`None`: of all) are not evicted until they are unpinned, or evicted by name.
    /// Positions that were not seen yet are pinned as they come, before the first step too. What has flowed down a chain comes back to
    /// its first memory.
    ///
    /// Where each head chose its own residents (`per_head`), the planner does not know who holds what: the caller has looked. All rows
    /// are checked before any is changed: they must hold what is pinned now, and the budget must hold all that is pinned and one more.
    pub fn pin(&mut self, rows: Option<&[usize]>, range: &Range<Position>, per_head: bool) -> Result<Vec<Move>> {
        check::range(range)?;
        self.change(rows, &[(range.clone(), true)], per_head)
    }

    /// As [`Planner::pin`], with exactly these ranges: what else was pinned is not any more.
    pub fn set_pins(&mut self, row: usize, ranges: &[Range<Position>], per_head: bool) -> Result<Vec<Move>> {
        ranges.iter().try_for_each(check::range)?;
        let mut changes = vec![(0..Position::MAX, false)];
        changes.extend(ranges.iter().map(|range| (range.clone(), true)));
        self.change(Some(&[row]), &changes, per_head)
    }

    /// The tokens at positions `range` of these rows (`None`: of all) may be evicted again.
    pub fn unpin(&mut self, rows: Option<&[usize]>, range: &Range<Position>) -> Result<()> {
        check::range(range)?;
        self.change(rows, &[(range.clone(), false)], true).map(|_| ())
    }

    /// Evicts the residents at positions `range` of these rows (`None`: of all) now, from every memory, pinned or not. What was evicted
    /// before, or not yet seen, does not matter.
    pub fn evict(&mut self, rows: Option<&[usize]>, range: &Range<Position>) -> Result<Vec<Move>> {
        self.check_closed("evict")?;
        self.unpin(rows, range)?;
        let rows = self.named(rows);
        let Self { rows: all, pool, .. } = self;
        edit(pool, |edit| {
            rows.iter().for_each(|&row| all[row].evict(range, edit));
            Ok(())
        })
    }

    /// Where each head chose its own residents: leaves `count` slots, whose tokens each head chooses among all residents but the last
    /// `recent`, and those. As [`Planner::sieve`], for a caller who evicts tokens by name; it never leaves more than there were.
    pub fn evict_per_head(
        &mut self,
        row: usize,
        range: &Range<Position>,
        count: usize,
        recent: usize,
    ) -> Result<Sieve> {
        self.check_closed("evict")?;
        check::range(range)?;
        check::sieves(&self.memories, self.table(0, row)?, count, recent)?;
        let sieve = self.sieve_row(0, row, count, recent)?;
        self.rows[row].pins.remove(range);
        Ok(sieve)
    }

    /// The rows that are meant, of those that there are.
    fn named(&self, rows: Option<&[usize]>) -> Vec<usize> {
        rows.map_or_else(
            || (0..self.rows.len()).collect(),
            |rows| if self.rows.is_empty() { vec![] } else { rows.to_vec() },
        )
    }

    fn change(
        &mut self,
        rows: Option<&[usize]>,
        changes: &[(Range<Position>, bool)],
        per_head: bool,
    ) -> Result<Vec<Move>> {
        self.check_closed("pin")?;
        if self.rows.is_empty() {
            self.change_early(rows, changes)?;
            return Ok(Vec::new());
        }
        let named = self.named(rows);
        let added = changes.iter().filter(|(_, add)| *add).map(|(range, _)| range);
        let mut wanted = Vec::with_capacity(named.len());
        for row in named {
            self.table(0, row)?;
            let mut pins = self.rows[row].pins.clone();
            changes.iter().for_each(|(range, add)| if *add { pins.add(range.clone()) } else { pins.remove(range) });
            check::fits(&self.memories, row, &pins)?;
            if !per_head {
                self.rows[row].check_held(row, added.clone())?;
            }
            wanted.push((row, pins));
        }
        let Self { rows, pool, .. } = self;
        edit(pool, |edit| {
            for (row, pins) in wanted {
                rows[row].pins = pins;
                if !per_head {
                    added.clone().for_each(|range| rows[row].promote(range, edit));
                }
            }
            Ok(())
        })
    }

    fn change_early(&mut self, rows: Option<&[usize]>, changes: &[(Range<Position>, bool)]) -> Result<()> {
        let mut early = self.early.clone();
        for row in rows.map_or(vec![None], |rows| rows.iter().copied().map(Some).collect()) {
            early.extend(changes.iter().map(|(range, add)| Early { row, range: range.clone(), add: *add }));
        }
        let (named, others) = Early::by_row(&early);
        check::fits(&self.memories, (0..).find(|row| !named.contains_key(row)).unwrap_or(0), &others)?;
        named.iter().try_for_each(|(&row, pins)| check::fits(&self.memories, row, pins))?;
        self.early = early;
        Ok(())
    }
}

impl Row {
    /// Whether every position of `ranges` that was seen is held, by whichever memory.
    fn check_held<'a>(&self, row: usize, ranges: impl Iterator<Item = &'a Range<Position>>) -> Result<()> {
        let mut gone = Vec::new();
        for range in ranges {
            gone.extend(self.missing(range.start..range.end.min(self.seen)));
        }
        if gone.is_empty() {
            return Ok(());
        }
        let list: Vec<_> = gone.iter().take(4).map(|r| format!("{}..{}", r.start, r.end)).collect();
        let more = if gone.len() > list.len() { ", ..." } else { "" };
        let count: Position = gone.iter().map(|r| r.end - r.start).sum();
        Err(Error::PinsGone { row, what: format!("{count} ({}{more})", list.join(", ")) })
    }

    /// The parts of `range` that no memory holds.
    fn missing(&self, range: Range<Position>) -> Vec<Range<Position>> {
        let mut gone = Pins::default();
        gone.add(range.clone());
        for table in &self.tables {
            let held: Vec<_> = table.positions().of(table.within(&range)).collect();
            let mut at = 0;
            while at < held.len() {
                let end = at + held[at..].iter().zip(held[at]..).take_while(|&(&p, want)| p == want).count();
                gone.remove(&(held[at]..held[end - 1] + 1));
                at = end;
            }
        }
        gone.ranges().to_vec()
    }

    /// Takes the residents at positions `range` of later memories back into the first one.
    fn promote(&mut self, range: &Range<Position>, edit: &mut Edit<'_>) {
        let (first, later) = self.tables.split_at_mut(1);
        for table in later {
            let held = table.within(range);
            first[0].receive_back(&table.held(held.clone()), edit);
            table.cut(held, edit);
            table.close_up(edit);
        }
    }

    fn evict(&mut self, range: &Range<Position>, edit: &mut Edit<'_>) {
        self.pins.remove(range);
        for table in &mut self.tables {
            table.cut(table.within(range), edit);
            table.close_up(edit);
        }
    }
}
