//! Which residents stay. Pure functions of counts and scores; nothing here knows blocks.

pub mod naive;
pub mod surprisal;

use crate::block::table::Table;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::ids::{BLOCK, Position};
use crate::pins::Pins;
use std::ops::Range;

/// The rule by which a memory lets tokens go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    KeepAll,
    /// The first `sinks` and the last `window` tokens.
    Window {
        sinks: usize,
        window: usize,
    },
    /// Sinks, recent tokens, and those with the highest scores. `published` follows the rule of the published code, in which sinks
    /// compete for the places of the highest scores too.
    Surprisal {
        budget: Budget,
        published: bool,
    },
    /// The caller decides.
    Own {
        budget: Budget,
    },
}

/// What a memory lets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Nothing,
    /// Residents of this range go.
    Cut(Range<usize>),
    /// Residents of these ranges go; they ascend.
    Cuts(Vec<Range<usize>>),
    /// All but these residents go.
    Keep(Vec<usize>),
}

impl Eviction {
    pub fn check(&self) -> Result<()> {
        match *self {
            Eviction::KeepAll => Ok(()),
            Eviction::Window { window: 0, .. } => {
                Err(Error::OutOfRange { what: "window", expected: "at least 1", got: "0".into() })
            }
            Eviction::Window { sinks, window } if sinks.checked_add(window).is_none() => Err(Error::OutOfRange {
                what: "window",
                expected: "a number of tokens that a machine can hold",
                got: window.to_string(),
            }),
            Eviction::Window { .. } => Ok(()),
            Eviction::Surprisal { budget, .. } | Eviction::Own { budget } => budget.check().map(|_| ()),
        }
    }

    pub fn sinks(&self) -> usize {
        match *self {
            Eviction::KeepAll => 0,
            Eviction::Window { sinks, .. } => sinks,
            Eviction::Surprisal { budget, .. } | Eviction::Own { budget } => budget.sinks,
        }
    }

    /// How many tokens there may be; none if there is no bound.
    pub fn budget(&self) -> Option<Budget> {
        match *self {
            Eviction::KeepAll => None,
            Eviction::Window { sinks, window } => Some(Budget { total: sinks + window, sinks, recent: 0 }),
            Eviction::Surprisal { budget, .. } | Eviction::Own { budget } => Some(budget),
        }
    }

    /// What a later memory of a chain lets go now: its sinks are its first residents, its window the last ones. Choosing by score
    /// moves tokens, so unless `force` it waits until a whole block can be won.
    pub fn decide(&self, table: &Table, force: bool) -> Result<Decision> {
        let n = table.len();
        match *self {
            Eviction::KeepAll | Eviction::Own { .. } => Ok(Decision::Nothing),
            Eviction::Window { sinks, window } if n > sinks + window => Ok(Decision::Cut(sinks..n - window)),
            Eviction::Window { .. } => Ok(Decision::Nothing),
            Eviction::Surprisal { budget, published } => by_score(table, budget, published, &[], force),
        }
    }

    /// What the first memory lets go now, of a row that has seen `seen` tokens. Its sinks are the first positions, its window the last
    /// ones, whether or not all of them are held; what is pinned stays, and takes its places from the window, or from those for high
    /// scores.
    pub fn decide_first(&self, table: &Table, seen: Position, pins: &Pins, force: bool) -> Result<Decision> {
        let below = |at: Position| table.positions().below(at);
        match *self {
            Eviction::KeepAll | Eviction::Own { .. } => Ok(Decision::Nothing),
            Eviction::Window { sinks, window } => {
                let pinned = if pins.is_empty() { 0 } else { pins.count_from(sinks as Position) };
                let edge = seen.saturating_sub((window as Position).saturating_sub(pinned));
                let (lo, hi) = (below(sinks as Position), below(edge));
                if lo >= hi {
                    return Ok(Decision::Nothing);
                }
                if pins.is_empty() {
                    return Ok(Decision::Cut(lo..hi));
                }
                let cuts = gaps(lo..hi, pins.held_in(below));
                Ok(if cuts.is_empty() { Decision::Nothing } else { Decision::Cuts(cuts) })
            }
            Eviction::Surprisal { budget, published } => {
                let held = Budget { sinks: below(budget.sinks as Position), ..budget };
                let pinned: Vec<_> = pins.held_in(below).collect();
                by_score(table, held, published, &pinned, force)
            }
        }
    }
}

fn by_score(table: &Table, budget: Budget, published: bool, pinned: &[Range<usize>], force: bool) -> Result<Decision> {
    let n = table.len();
    let due = n > budget.total && (force || n - budget.total >= BLOCK as usize);
    if !due {
        return Ok(Decision::Nothing);
    }
    let kept = if published {
        let slots = budget.total - budget.sinks - budget.recent;
        surprisal::keep_published(&table.scores().list(), budget.sinks, slots, budget.recent, 0, pinned)?
    } else {
        surprisal::keep(&table.scores().list(), budget, table.pending_tail(), pinned)?
    };
    Ok(Decision::Keep(kept))
}

/// `range` without `stay`, whose ranges ascend and do not overlap.
fn gaps(range: Range<usize>, stay: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut out = Vec::new();
    let mut from = range.start;
    for held in stay {
        if from < held.start.min(range.end) {
            out.push(from..held.start.min(range.end));
        }
        from = from.max(held.end);
    }
    if from < range.end {
        out.push(from..range.end);
    }
    out
}

/// The first `sinks` and the last `window` of `n`.
pub fn keep_window(n: usize, sinks: usize, window: usize) -> Vec<usize> {
    if n <= sinks.saturating_add(window) {
        return (0..n).collect();
    }
    (0..sinks).chain(n - window..n).collect()
}
