//! Which residents stay. Pure functions of counts and scores; nothing here knows blocks.

pub mod naive;
pub mod surprisal;

use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::ids::BLOCK;
use crate::store::table::Table;
use std::ops::Range;

/// The rule by which a memory lets tokens go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retain {
    All,
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
    Manual {
        budget: Budget,
    },
}

/// What a memory lets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Nothing,
    /// Residents of this range go.
    Cut(Range<usize>),
    /// All but these residents go.
    Keep(Vec<usize>),
}

impl Retain {
    pub fn check(&self) -> Result<()> {
        match *self {
            Retain::All => Ok(()),
            Retain::Window { window: 0, .. } => {
                Err(Error::OutOfRange { what: "window", expected: "at least 1", got: "0".into() })
            }
            Retain::Window { sinks, window } if sinks.checked_add(window).is_none() => Err(Error::OutOfRange {
                what: "window",
                expected: "a number of tokens that a machine can hold",
                got: window.to_string(),
            }),
            Retain::Window { .. } => Ok(()),
            Retain::Surprisal { budget, .. } | Retain::Manual { budget } => budget.check().map(|_| ()),
        }
    }

    pub fn sinks(&self) -> usize {
        match *self {
            Retain::All => 0,
            Retain::Window { sinks, .. } => sinks,
            Retain::Surprisal { budget, .. } | Retain::Manual { budget } => budget.sinks,
        }
    }

    /// What goes now. Choosing by score moves tokens, so unless `force` it waits until a whole block can be won.
    pub fn decide(&self, table: &Table, force: bool) -> Result<Decision> {
        let n = table.len();
        match *self {
            Retain::All | Retain::Manual { .. } => Ok(Decision::Nothing),
            Retain::Window { sinks, window } if n > sinks + window => Ok(Decision::Cut(sinks..n - window)),
            Retain::Window { .. } => Ok(Decision::Nothing),
            Retain::Surprisal { budget, published } => {
                let due = n > budget.total && (force || n - budget.total >= BLOCK as usize);
                if !due {
                    return Ok(Decision::Nothing);
                }
                let kept = if published {
                    let slots = budget.total - budget.sinks - budget.recent;
                    surprisal::keep_published(table.scores(), budget.sinks, slots, budget.recent, 0)?
                } else {
                    surprisal::keep(table.scores(), budget, table.pending_tail())?
                };
                Ok(Decision::Keep(kept))
            }
        }
    }
}

/// The first `sinks` and the last `window` of `n`.
pub fn keep_window(n: usize, sinks: usize, window: usize) -> Vec<usize> {
    if n <= sinks.saturating_add(window) {
        return (0..n).collect();
    }
    (0..sinks).chain(n - window..n).collect()
}
