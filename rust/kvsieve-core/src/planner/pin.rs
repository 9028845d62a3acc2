//! What callers say of tokens by their positions: these are never evicted, those are evicted now.

use super::row::Row;
use super::{Planner, check, edit};
use crate::error::{Error, Result};
use crate::ids::Position;
use crate::pins::Pins;
use crate::plan::Move;
use crate::store::table::Edit;
use std::ops::Range;

impl Planner {
    /// The pinned positions of a row, as ranges that ascend and do not touch.
    pub fn pins(&self, row: usize) -> Result<&[Range<Position>]> {
        self.table(0, row)?;
        Ok(self.rows[row].pins.ranges())
    }

    /// The tokens at positions `range` of these rows are not evicted until they are unpinned, or evicted by name. Positions that were
    /// not seen yet are pinned as they come. What has flowed down a chain comes back to its first memory.
    ///
    /// Where each head chose its own residents (`per_head`), the planner does not know who holds what: the caller has looked. All rows
    /// are checked before any is changed: they must hold what is pinned now, and the budget must hold all that is pinned and one more.
    pub fn pin(&mut self, rows: &[usize], range: &Range<Position>, per_head: bool) -> Result<Vec<Move>> {
        let mut wanted = Vec::with_capacity(rows.len());
        for &row in rows {
            self.table(0, row)?;
            let mut pins = self.rows[row].pins.clone();
            pins.add(range.clone());
            wanted.push((row, pins));
        }
        self.change_pins(wanted, std::slice::from_ref(range), per_head)
    }

    /// As [`Planner::pin`], with exactly these ranges: what else was pinned is not any more.
    pub fn set_pins(&mut self, row: usize, ranges: &[Range<Position>], per_head: bool) -> Result<Vec<Move>> {
        self.table(0, row)?;
        let mut pins = Pins::default();
        ranges.iter().for_each(|range| pins.add(range.clone()));
        self.change_pins(vec![(row, pins)], ranges, per_head)
    }

    /// The tokens at positions `range` of these rows may be evicted again.
    pub fn unpin(&mut self, rows: &[usize], range: &Range<Position>) -> Result<()> {
        self.check_closed("unpin")?;
        check::range(range)?;
        rows.iter().try_for_each(|&row| self.table(0, row).map(|_| ()))?;
        rows.iter().for_each(|&row| self.rows[row].pins.remove(range));
        Ok(())
    }

    /// Evicts the residents at positions `range` of these rows now, from every memory, pinned or not. What was evicted before, or not
    /// yet seen, does not matter.
    pub fn evict(&mut self, rows: &[usize], range: &Range<Position>) -> Result<Vec<Move>> {
        self.check_closed("evict")?;
        check::range(range)?;
        rows.iter().try_for_each(|&row| self.table(0, row).map(|_| ()))?;
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
    ) -> Result<super::Sieve> {
        self.check_closed("evict")?;
        check::range(range)?;
        check::sieves(&self.memories, self.table(0, row)?, count, recent)?;
        let sieve = self.sieve_row(0, row, count, recent)?;
        self.rows[row].pins.remove(range);
        Ok(sieve)
    }

    fn change_pins(
        &mut self,
        wanted: Vec<(usize, Pins)>,
        new: &[Range<Position>],
        per_head: bool,
    ) -> Result<Vec<Move>> {
        self.check_closed("pin")?;
        new.iter().try_for_each(check::range)?;
        for (row, pins) in &wanted {
            check::fits(&self.memories, *row, pins)?;
            if !per_head {
                self.rows[*row].check_held(*row, new)?;
            }
        }
        let Self { rows, pool, .. } = self;
        edit(pool, |edit| {
            for (row, pins) in wanted {
                rows[row].pins = pins;
                if !per_head {
                    new.iter().for_each(|range| rows[row].promote(range, edit));
                }
            }
            Ok(())
        })
    }
}

impl Row {
    /// Whether every position of `ranges` that was seen is held, by whichever memory.
    fn check_held(&self, row: usize, ranges: &[Range<Position>]) -> Result<()> {
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
            let positions = table.positions();
            let held = &positions[table.within(&range)];
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
