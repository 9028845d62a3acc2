//! One row of the batch: a table per memory, and how tokens pass between them.

use super::spec::MemorySpec;
use crate::block::pool::Pool;
use crate::block::table::{Edit, Table};
use crate::error::Result;
use crate::evict::{Decision, Eviction};
use crate::ids::Position;
use crate::pins::Pins;
use crate::position::Rule;
use std::ops::Range;

/// The state of one row, to be restored. Per memory, the residents' positions and scores.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowState {
    pub seen: u64,
    pub memories: Vec<(Vec<u64>, Vec<f32>)>,
}

#[derive(Debug)]
pub(super) struct Row {
    pub seen: u64,
    pub tables: Vec<Table>,
    /// What the first memory never evicts.
    pub pins: Pins,
}

impl Row {
    pub fn new(num_memories: usize) -> Self {
        Self { seen: 0, tables: vec![Table::default(); num_memories], pins: Pins::default() }
    }

    /// A row with the same residents, which holds its own references.
    pub fn share(&self, pool: &mut Pool) -> Self {
        self.tables.iter().flat_map(Table::blocks).for_each(|b| pool.retain(b));
        Self { seen: self.seen, tables: self.tables.clone(), pins: self.pins.clone() }
    }

    /// How memory `m` is read, and what of it is pinned.
    pub fn rule(&self, rules: &[Rule], m: usize) -> (Rule, &[Range<Position>]) {
        if m == 0 { (rules[0].beside(&self.pins), self.pins.ranges()) } else { (rules[m], &[]) }
    }

    pub fn release(self, pool: &mut Pool) {
        self.tables.iter().flat_map(Table::blocks).for_each(|b| pool.release(b));
    }

    /// Lets every memory from `first` on retain in turn.
    pub fn settle(&mut self, memories: &[MemorySpec], first: usize, force: bool, edit: &mut Edit<'_>) -> Result<()> {
        for (m, memory) in memories.iter().enumerate().skip(first) {
            let decision = self.decide(&memory.evict, m, force)?;
            self.apply(m, decision, edit);
        }
        Ok(())
    }

    fn decide(&self, evict: &Eviction, m: usize, force: bool) -> Result<Decision> {
        match m {
            0 => evict.decide_first(&self.tables[0], self.seen, &self.pins, force),
            _ => evict.decide(&self.tables[m], force),
        }
    }

    /// Carries out a decision. What memory `m` lets go is copied to the next one first: making room may overwrite it.
    pub fn apply(&mut self, m: usize, decision: Decision, edit: &mut Edit<'_>) {
        let (here, later) = self.tables.split_at_mut(m + 1);
        let table = &mut here[m];
        match decision {
            Decision::Nothing => {}
            Decision::Cut(range) => {
                if let Some(next) = later.first_mut() {
                    next.receive(&table.held(range.clone()), edit);
                }
                table.cut(range, edit);
            }
            Decision::Cuts(ranges) => {
                if let Some(next) = later.first_mut() {
                    next.receive(&table.held(ranges.iter().cloned().flatten()), edit);
                }
                ranges.into_iter().rev().for_each(|range| table.cut(range, edit));
                table.close_up(edit);
            }
            Decision::Keep(keep) => {
                if let Some(next) = later.first_mut() {
                    next.receive(&table.held(others(table.len(), &keep)), edit);
                }
                table.keep(&keep, edit);
            }
        }
    }

    /// Forgets every token from position `seen` on.
    pub fn crop(&mut self, seen: u64, edit: &mut Edit<'_>) {
        self.seen = seen;
        self.pins.remove(&(seen..Position::MAX));
        for table in &mut self.tables {
            let from = table.positions().below(seen);
            table.cut(from..table.len(), edit);
        }
    }
}

/// The numbers below `n` that are not in `keep` (ascending).
fn others(n: usize, keep: &[usize]) -> impl Iterator<Item = usize> + '_ {
    let mut keep = keep.iter().copied().peekable();
    (0..n).filter(move |i| keep.next_if_eq(i).is_none())
}
