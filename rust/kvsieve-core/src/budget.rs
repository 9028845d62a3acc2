//! Budgets are counts of tokens, never ratios: what fits is known before anything is stored.

use crate::error::{Error, Result, at_least_one};

/// How many tokens a memory may hold, and how many of them are not up for choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub total: usize,
    /// The first tokens, never evicted.
    pub sinks: usize,
    /// The last tokens, never evicted.
    pub recent: usize,
}

impl Budget {
    /// A budget must hold its sinks and its recent tokens, and at least one token that is not a sink.
    pub fn check(self) -> Result<Self> {
        at_least_one("budget", self.total)?;
        if self.total < self.sinks.saturating_add(self.recent) {
            return Err(Error::BudgetTooSmall {
                budget: self.total as u64,
                sinks: self.sinks as u64,
                recent: self.recent as u64,
            });
        }
        if self.total == self.sinks {
            return Err(Error::OutOfRange {
                what: "budget",
                expected: "more than the number of sinks",
                got: self.total.to_string(),
            });
        }
        Ok(self)
    }
}
