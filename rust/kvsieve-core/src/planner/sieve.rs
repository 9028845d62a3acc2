//! Letting go per head: which slots are left. Which tokens they hold is for each head of each layer to say.

use super::check;
use super::state::{Planner, edit};
use crate::error::Result;
use crate::ids::Run;

/// What every layer's store does next: head by head, the residents it chose among those of `from` go to the slots of `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sieve {
    pub from: Vec<Run>,
    pub to: Vec<Run>,
}

impl Planner {
    /// Leaves `count` slots, whose tokens each head chooses among all residents but the last `recent`, and those.
    ///
    /// The positions of the first `count` residents are placeholders from then on. The stores must be rearranged before anything
    /// else is planned: what `from` names may be handed out again.
    pub fn sieve(&mut self, memory: usize, row: usize, count: usize, recent: usize) -> Result<Sieve> {
        self.check_closed("sieve")?;
        check::sieve(&self.memories, self.table(memory, row)?, count, recent)?;
        self.sieve_row(memory, row, count, recent)
    }

    pub(super) fn sieve_row(&mut self, memory: usize, row: usize, count: usize, recent: usize) -> Result<Sieve> {
        let Self { rows, pool, .. } = self;
        let mut out = Sieve { from: Vec::new(), to: Vec::new() };
        edit(pool, |edit| {
            (out.from, out.to) = rows[row].tables[memory].sieve(count, recent, edit);
            Ok(())
        })?;
        Ok(out)
    }
}
