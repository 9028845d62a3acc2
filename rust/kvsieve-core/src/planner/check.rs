//! Checks of what callers hand in, before anything is changed.

use super::row::RowState;
use super::spec::MemorySpec;
use crate::block::table::Table;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::evict::Eviction;
use crate::ids::Position;
use crate::pins::Pins;
use crate::position::PositionRule;
use std::ops::Range;

/// Whether `keep` can be what is left of the residents of `table`.
pub(super) fn keep(memories: &[MemorySpec], memory: usize, table: &Table, pins: &Pins, keep: &[usize]) -> Result<()> {
    let len = table.len();
    let bad = |expected, got: String| Err(Error::OutOfRange { what: "keep", expected, got });
    if let Some(pair) = keep.windows(2).find(|w| w[0] >= w[1]) {
        return bad("strictly ascending", format!("{} before {}", pair[0], pair[1]));
    }
    if let Some(&last) = keep.last()
        && last >= len
    {
        return bad("indices of residents", format!("{last} of {len}"));
    }
    if memory == 0 {
        let mut left = keep.iter().copied().peekable();
        for pinned in pins.held_in(|at| table.positions().below(at)).flatten() {
            while left.next_if(|&i| i < pinned).is_some() {}
            if left.peek() != Some(&pinned) {
                return bad("all pinned tokens included", format!("{} indices without {pinned}", keep.len()));
            }
        }
    }
    let Eviction::Own { budget } = memories[memory].evict else {
        return Ok(());
    };
    let sinks = match memory {
        0 => table.positions().below(budget.sinks as u64),
        _ => budget.sinks.min(len),
    };
    if keep.len() > budget.total {
        return bad("at most the budget", format!("{} indices for {}", keep.len(), budget.total));
    }
    let first_kept = keep.iter().zip(0..sinks).take_while(|(k, i)| **k == *i).count();
    let last_kept = keep.iter().rev().zip((0..len).rev()).take(budget.recent).take_while(|(k, i)| **k == *i).count();
    if first_kept < sinks || last_kept < budget.recent.min(len) {
        return bad("all sinks and recent tokens included", format!("{} of {len} indices", keep.len()));
    }
    Ok(())
}

/// Whether a saved row can be one of this stream.
pub(super) fn state(row: &RowState, columns: u64, num_memories: usize) -> Result<()> {
    let bad = |what, expected, got: String| Err(Error::OutOfRange { what, expected, got });
    if row.memories.len() != num_memories {
        return bad("memories", "as many as the stream has", row.memories.len().to_string());
    }
    if row.seen > columns {
        return bad("seen", "at most the number of columns", row.seen.to_string());
    }
    for (positions, scores) in &row.memories {
        if positions.len() != scores.len() {
            return bad("scores", "one per resident", format!("{} for {}", scores.len(), positions.len()));
        }
        let ascending = positions.windows(2).all(|w| w[0] < w[1]);
        if !ascending || positions.last().is_some_and(|&p| p >= row.seen) {
            return bad("positions", "strictly ascending and below seen", format!("{} positions", positions.len()));
        }
    }
    Ok(())
}

/// Whether each head may choose `count` of the residents of `table` beside the last `recent`.
pub(super) fn sieve(memories: &[MemorySpec], table: &Table, count: usize, recent: usize) -> Result<()> {
    let budget = sieves(memories, table, count, recent)?;
    if count + recent > budget.total {
        let got = format!("{count} and {recent} for {}", budget.total);
        return Err(Error::OutOfRange { what: "sieve", expected: "at most the budget", got });
    }
    Ok(())
}

/// As [`sieve`], for what may be over its budget still.
pub(super) fn sieves(memories: &[MemorySpec], table: &Table, count: usize, recent: usize) -> Result<Budget> {
    let [memory] = memories else {
        return Err(Error::Unsupported(
            "residents chosen per head cannot flow down a chain: their positions differ per head",
        ));
    };
    let Eviction::Own { budget } = memory.evict else {
        return Err(Error::Unsupported("only a memory whose residents the caller chooses can choose them per head"));
    };
    if memory.position != PositionRule::Original || memory.visible.is_some() {
        return Err(Error::Unsupported(
            "residents chosen per head are seen at their true distance only: positions differ per head",
        ));
    }
    let (len, total) = (table.len(), count.saturating_add(recent));
    if total > len {
        let got = format!("{count} and {recent} of {len}");
        return Err(Error::OutOfRange { what: "sieve", expected: "at most the residents", got });
    }
    Ok(budget)
}

/// Whether `range` can be one of positions.
pub(super) fn range(range: &Range<Position>) -> Result<()> {
    if range.start < range.end {
        return Ok(());
    }
    let got = format!("{} to {}", range.start, range.end);
    Err(Error::OutOfRange { what: "a range of tokens", expected: "at least one, the first before the last", got })
}

/// Whether the first memory has room for `pins`, its sinks, its recent tokens and one more.
pub(super) fn fits(memories: &[MemorySpec], row: usize, pins: &Pins) -> Result<()> {
    let Some(budget) = memories[0].evict.budget() else { return Ok(()) };
    let (total, sinks, recent) = (budget.total as u64, budget.sinks as u64, budget.recent as u64);
    let pinned = pins.count_from(sinks);
    if pinned == 0 || pinned < total - sinks - recent {
        return Ok(());
    }
    Err(Error::PinsTooMany { row, budget: total, sinks, recent, pinned })
}
