//! What a planner knows, and the calls that rearrange it between forwards.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::check;
use super::early::Early;
use super::open::Open;
use super::row::{Row, RowState};
use super::spec::{self, MemorySpec};
use crate::block::pool::Pool;
use crate::block::table::Edit;
use crate::error::{Error, Result};
use crate::evict::Decision;
use crate::ids::BLOCK;
use crate::plan::{Frame, Move};
use crate::position::Rule;

/// One per stream. All layers of the model share its decisions.
#[derive(Debug)]
pub struct Planner {
    pub(super) memories: Vec<MemorySpec>,
    pub(super) rules: Vec<Rule>,
    pub(super) frame: Frame,
    pub(super) pool: Arc<Mutex<Pool>>,
    pub(super) rows: Vec<Row>,
    pub(super) columns: u64,
    pub(super) open: Option<Open>,
    /// What was pinned before there were rows.
    pub(super) early: Vec<Early>,
}

/// A pool is consistent between any two of its calls, so a panic elsewhere does not spoil it.
pub(super) fn lock(pool: &Mutex<Pool>) -> MutexGuard<'_, Pool> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Planner {
    pub fn new(memories: Vec<MemorySpec>, frame: Frame) -> Result<Self> {
        spec::check_chain(&memories, frame)?;
        let rules = memories.iter().map(MemorySpec::rule).collect();
        let pool = Arc::new(Mutex::new(Pool::new()));
        Ok(Self { memories, rules, frame, pool, rows: Vec::new(), columns: 0, open: None, early: Vec::new() })
    }

    /// Lets every memory of every row retain, and returns the moves to run, in order, before anything else.
    ///
    /// Choosing by score waits until a whole block can be won, unless `force`.
    pub fn settle(&mut self, force: bool) -> Result<Vec<Move>> {
        self.check_closed("settle")?;
        let Self { rows, memories, pool, .. } = self;
        edit(pool, |edit| rows.iter_mut().try_for_each(|row| row.settle(memories, 0, force, edit)))
    }

    /// Moves the highest blocks into free lower ones, so that the stores can give memory back at their end, and what was left of a
    /// block when its other tokens were packed to the beginning of one. Blocks that a fork or another row shares stay where they are.
    pub fn tidy(&mut self) -> Result<Vec<Move>> {
        self.check_closed("tidy")?;
        let Self { rows, pool, .. } = self;
        edit(pool, |edit| {
            rows.iter_mut().flat_map(|row| &mut row.tables).for_each(|table| table.pull_up(edit));
            if !edit.pool.has_gaps() {
                return Ok(());
            }
            let mut held: Vec<_> = rows
                .iter()
                .flat_map(|row| &row.tables)
                .enumerate()
                .flat_map(|(table, t)| t.blocks().map(move |block| (block, table)).collect::<Vec<_>>())
                .filter(|&(block, _)| !edit.pool.is_shared(block))
                .collect();
            held.sort_unstable();
            let width = rows.first().map_or(1, |row| row.tables.len());
            for (block, table) in held.into_iter().rev() {
                if edit.pool.lowest_free(block).is_none_or(|free| free > block) {
                    continue;
                }
                let to = edit.pool.alloc_like(block);
                rows[table / width].tables[table % width].relocate(block, to, edit);
            }
            Ok(())
        })
    }

    /// Keeps only the residents `keep` of one memory of one row; the rest goes down the chain.
    pub fn keep(&mut self, memory: usize, row: usize, keep: &[usize]) -> Result<Vec<Move>> {
        self.check_closed("keep")?;
        let table = self.table(memory, row)?;
        check::keep(&self.memories, memory, table, &self.rows[row].pins, keep)?;
        let Self { rows, memories, pool, .. } = self;
        edit(pool, |edit| {
            rows[row].apply(memory, Decision::Keep(keep.to_vec()), edit);
            rows[row].settle(memories, memory + 1, false, edit)
        })
    }

    /// Moves the residents of the first memory up to number `upto` that are not packed yet into packed blocks, and returns the moves
    /// that pack them. A packed block is entered only at slots that are multiples of `align`. `copies` forks of this planner, to return to
    /// if packing fails, do not count as readers of a block that is not full.
    pub fn pack(&mut self, row: usize, upto: usize, align: u32, copies: u32) -> Result<Vec<Move>> {
        self.check_closed("pack")?;
        let len = self.table(0, row)?.len();
        if upto > len {
            return Err(Error::OutOfRange {
                what: "tokens to pack",
                expected: "residents",
                got: format!("{upto} of {len}"),
            });
        }
        if align == 0 || !BLOCK.is_multiple_of(align) {
            return Err(Error::OutOfRange { what: "align", expected: "a divisor of a block", got: align.to_string() });
        }
        if self.memories.len() > 1 {
            return Err(Error::Unsupported(
                "packing in a chain of memories: tokens that flow on would have to be unpacked",
            ));
        }
        let Self { rows, pool, .. } = self;
        edit(pool, |edit| {
            rows[row].tables[0].pack(upto, align, copies, edit);
            Ok(())
        })
    }

    /// Sets the scores of the newest residents of the first memory.
    pub fn set_scores(&mut self, row: usize, values: &[f32]) -> Result<()> {
        self.check_closed("set_scores")?;
        let have = self.table(0, row)?.len();
        if values.len() > have {
            return Err(Error::Shape {
                what: "scores",
                expected: format!("at most ({have},)"),
                got: format!("({},)", values.len()),
            });
        }
        if !values.is_empty() {
            self.rows[row].tables[0].scores_mut().known()[have - values.len()..].copy_from_slice(values);
        }
        Ok(())
    }

    /// Multiplies the scores of each memory's residents by its factor.
    pub fn decay(&mut self, factors: &[f32]) -> Result<()> {
        self.check_closed("decay")?;
        if factors.len() != self.memories.len() {
            return Err(Error::Shape {
                what: "factors",
                expected: format!("({},)", self.memories.len()),
                got: format!("({},)", factors.len()),
            });
        }
        if let Some(bad) = factors.iter().find(|f| !f.is_finite() || **f < 0.0) {
            return Err(Error::OutOfRange {
                what: "factor",
                expected: "a finite number that is not negative",
                got: bad.to_string(),
            });
        }
        for row in &mut self.rows {
            for (table, factor) in row.tables.iter_mut().zip(factors) {
                table.scores_mut().scale(*factor);
            }
        }
        Ok(())
    }

    /// Forgets the newest `n` columns.
    pub fn crop(&mut self, n: u64) -> Result<()> {
        if self.rows.is_empty() && n > 0 {
            return Err(Error::CropTooLong { row: 0, asked: n, seen: 0 });
        }
        self.crop_rows(&vec![n; self.rows.len()])?;
        self.columns -= n;
        Ok(())
    }

    /// Forgets the newest `tokens[row]` tokens of each row. The columns stay: the caller masks them as pads.
    pub fn crop_rows(&mut self, tokens: &[u64]) -> Result<()> {
        self.check_closed("crop")?;
        self.check_rows(tokens.len())?;
        for (row, (state, &asked)) in self.rows.iter().zip(tokens).enumerate() {
            if asked > state.seen {
                return Err(Error::CropTooLong { row, asked, seen: state.seen });
            }
        }
        let Self { rows, pool, .. } = self;
        edit(pool, |edit| {
            rows.iter_mut().zip(tokens).for_each(|(row, asked)| row.crop(row.seen - asked, edit));
            Ok(())
        })?;
        lock(pool).mark_reach();
        Ok(())
    }

    /// New row `r` is old row `index[r]`.
    pub fn select_rows(&mut self, index: &[usize]) -> Result<()> {
        self.check_closed("select_rows")?;
        let have = self.rows.len();
        if let Some(bad) = index.iter().find(|&&i| i >= have) {
            return Err(Error::OutOfRange { what: "row", expected: "a row of the cache", got: bad.to_string() });
        }
        if index.is_empty() {
            return Err(Error::OutOfRange { what: "rows", expected: "at least one", got: "none".into() });
        }
        let pool = Arc::clone(&self.pool);
        let mut pool = lock(&pool);
        let selected = index.iter().map(|&i| self.rows[i].share(&mut pool)).collect();
        std::mem::replace(&mut self.rows, selected).into_iter().for_each(|row| row.release(&mut pool));
        pool.mark_reach();
        Ok(())
    }

    /// A stream that starts where this one is. Both read the same blocks; each writes only to its own.
    pub fn fork(&self) -> Result<Self> {
        self.check_closed("fork")?;
        let mut pool = lock(&self.pool);
        Ok(Self {
            memories: self.memories.clone(),
            rules: self.rules.clone(),
            frame: self.frame,
            pool: Arc::clone(&self.pool),
            rows: self.rows.iter().map(|row| row.share(&mut pool)).collect(),
            columns: self.columns,
            open: None,
            early: self.early.clone(),
        })
    }

    /// Forgets everything, the number of rows included.
    pub fn reset(&mut self) {
        self.undo_open();
        let pool = Arc::clone(&self.pool);
        let mut pool = lock(&pool);
        self.rows.drain(..).for_each(|row| row.release(&mut pool));
        self.columns = 0;
        self.early.clear();
        pool.mark_reach();
    }

    /// Allocates places for a saved stream. The caller then writes each memory's tokens, in text order, to [`Planner::runs`].
    pub fn restore(&mut self, columns: u64, rows: &[RowState]) -> Result<()> {
        self.check_closed("restore")?;
        if !self.rows.is_empty() {
            return Err(Error::Unsupported("a stream is restored into an empty one; reset it first"));
        }
        rows.iter().try_for_each(|row| check::state(row, columns, self.memories.len()))?;
        let Self { rows: own, pool, .. } = self;
        edit(pool, |edit| {
            for row in rows {
                let mut state = Row { seen: row.seen, ..Row::new(row.memories.len()) };
                for (table, (positions, scores)) in state.tables.iter_mut().zip(&row.memories) {
                    table.load(positions, scores, edit);
                }
                own.push(state);
            }
            Ok(())
        })?;
        self.columns = columns;
        Ok(())
    }

    pub(super) fn check_closed(&self, what: &'static str) -> Result<()> {
        if self.open.is_some() { Err(Error::StepOpen { what }) } else { Ok(()) }
    }

    pub(super) fn check_rows(&self, got: usize) -> Result<()> {
        let have = self.rows.len();
        if have == got { Ok(()) } else { Err(Error::RowMismatch { have, got }) }
    }
}

impl Drop for Planner {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Runs one rearrangement against the pool and returns its moves.
pub(super) fn edit(pool: &Mutex<Pool>, run: impl FnOnce(&mut Edit<'_>) -> Result<()>) -> Result<Vec<Move>> {
    let mut pool = lock(pool);
    pool.mark_reach();
    let mut edit = Edit::new(&mut pool);
    let done = run(&mut edit);
    let moves = edit.finish();
    done.map(|()| moves)
}
