//! A stream that goes on from several forks of one: what they read side by side, one after the other in one table.
//!
//! Nothing is copied: the tables share blocks, as those of forks do. Every fork's tail of the common past lies in a block of its own,
//! before what the fork read; those slots are in no run of the joined table.

use super::row::Row;
use super::state::{Planner, lock};
use crate::block::pool::Pool;
use crate::error::{Error, Result};
use crate::ids::{BlockId, Position};
use std::sync::Arc;

impl Planner {
    /// A stream that holds what this one holds, and then what each of `forks` of it has read since. Row `r` has them in the order
    /// `orders[r]`. Positions number the tokens of a row in that order, without gaps between the forks.
    pub fn join(&self, forks: &[Self], orders: &[Vec<usize>]) -> Result<Self> {
        self.check_closed("join")?;
        if self.memories.len() > 1 {
            return Err(Error::Unsupported("joining streams of a chain of memories"));
        }
        forks.iter().try_for_each(|fork| self.check_fork(fork))?;
        let num_rows = forks.iter().map(|fork| fork.rows.len()).max().unwrap_or(0).max(self.rows.len());
        check_orders(orders, num_rows, forks.len())?;
        let mut joined = self.fork()?;
        if num_rows > 0 {
            joined.rows.resize_with(num_rows, || Row::new(1));
            joined.early.clear();
        }
        joined.columns += forks.iter().map(|fork| fork.columns.saturating_sub(self.columns)).sum::<u64>();
        let mut pool = lock(&self.pool);
        for (index, (row, order)) in joined.rows.iter_mut().zip(orders).enumerate() {
            let past = row.seen;
            row.pins.remove(&(past..Position::MAX));
            for other in order.iter().filter_map(|&fork| forks[fork].rows.get(index)) {
                row.go_on_with(other, past, &mut pool);
            }
            joined.columns = joined.columns.max(row.seen);
        }
        Ok(joined)
    }

    fn check_fork(&self, fork: &Self) -> Result<()> {
        fork.check_closed("join")?;
        if !Arc::ptr_eq(&self.pool, &fork.pool) {
            return Err(Error::Unsupported("joining streams that share no memory; join forks of one stream"));
        }
        if !self.rows.is_empty() || fork.rows.is_empty() {
            self.check_rows(fork.rows.len())?;
        }
        for (row, other) in fork.rows.iter().enumerate() {
            let past = self.rows.get(row).map_or(0, |r| r.seen);
            if other.seen < past {
                return Err(Error::CropTooLong { row, asked: past, seen: other.seen });
            }
            if other.tables[0].blocks_from(past).into_iter().any(BlockId::is_packed) {
                return Err(Error::Unsupported(
                    "joining what is packed already: packed tokens are the first ones of a row",
                ));
            }
        }
        Ok(())
    }
}

fn check_orders(orders: &[Vec<usize>], num_rows: usize, num_forks: usize) -> Result<()> {
    let whole = |order: &Vec<usize>| {
        let mut order = order.clone();
        order.sort_unstable();
        order.into_iter().eq(0..num_forks)
    };
    if orders.len() == num_rows && orders.iter().all(whole) {
        return Ok(());
    }
    Err(Error::OutOfRange {
        what: "orders",
        expected: "an order of all streams for each row",
        got: format!("{} for {num_rows} rows", orders.len()),
    })
}

impl Row {
    /// Adds what `other` has read since it had seen `past` tokens.
    fn go_on_with(&mut self, other: &Self, past: Position, pool: &mut Pool) {
        for pinned in other.pins.ranges() {
            let (lo, hi) = (pinned.start.max(past), pinned.end.min(other.seen));
            if lo < hi {
                self.pins.add(self.seen + (lo - past)..self.seen + (hi - past));
            }
        }
        self.tables[0].share_from(&other.tables[0], past, self.seen, pool);
        self.seen += other.seen - past;
    }
}
