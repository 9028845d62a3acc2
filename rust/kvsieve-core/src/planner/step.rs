//! Opening, committing and undoing a step.

use super::early::Early;
use super::open::Open;
use super::render;
use super::row::Row;
use super::state::{Planner, lock};
use crate::block::table::{Edit, Table};
use crate::error::{Error, Result};
use crate::evict::Eviction;
use crate::ids::{BLOCK, PACKED, Position, Run};
use crate::plan::{Append, Step};
use crate::position::Always;
use std::ops::Range;
use std::sync::Arc;

const NOT_ALL: Error =
    Error::Unsupported("residents alone tell what is read only where one memory keeps and shows all of them");

/// What a step is to tell.
#[derive(Clone, Copy)]
enum Wanted {
    /// Spans, parts, or both.
    Reads {
        with_parts: bool,
    },
    Residents,
}

/// Larger chunks are read part by part: with many queries, reading each key once per chunk wins over one span list per query.
const MAX_SPAN_QUERIES: usize = 16;

/// New tokens of a forward, in all rows. More is a mistake, and its plan alone might not fit into memory.
const MAX_TOKENS: usize = 1 << 25;

impl Planner {
    /// Plans one forward over `num_queries` columns, of which the last `new_lens[row]` of each row are real tokens.
    ///
    /// Unless `store_all`, tokens that the step's own end would evict from a lone window are not stored at all. `with_parts` asks
    /// for parts even where spans suffice; memories read by selection are rendered as parts always.
    ///
    /// # Errors
    /// For rows that are not those of the stream, pins of a row that the first input does not have, and more tokens than a forward or
    /// the stream can have. Nothing has changed then.
    pub fn begin(&mut self, new_lens: &[usize], num_queries: usize, store_all: bool, with_parts: bool) -> Result<Step> {
        self.open(new_lens, num_queries, store_all, Wanted::Reads { with_parts })
    }

    /// As [`Planner::begin`], for layers that are told themselves what each query reads, and where: the step tells where the residents of
    /// each row lie, and has neither spans nor parts. Every new token is stored.
    ///
    /// # Errors
    /// Where some resident is not seen, or may have left.
    pub fn begin_residents(&mut self, new_lens: &[usize], num_queries: usize) -> Result<Step> {
        let ([memory], [rule]) = (&self.memories[..], &self.rules[..]) else { return Err(NOT_ALL) };
        if memory.evict != Eviction::KeepAll || rule.visible.is_some() || rule.top_k > 0 {
            return Err(NOT_ALL);
        }
        self.open(new_lens, num_queries, true, Wanted::Residents)
    }

    fn open(&mut self, new_lens: &[usize], num_queries: usize, store_all: bool, wanted: Wanted) -> Result<Step> {
        self.undo_open();
        self.check_lens(new_lens, num_queries)?;
        let first = self.rows.is_empty();
        if first {
            Early::check_rows(&self.early, new_lens.len())?;
            let new = |row| Row { pins: Early::pins(&self.early, row), ..Row::new(self.memories.len()) };
            self.rows = (0..new_lens.len()).map(new).collect();
        }
        let stored: Vec<_> = self.rows.iter().zip(new_lens).map(|(r, &n)| self.stored(r, n, store_all)).collect();
        let all_stored = stored.iter().zip(new_lens).all(|(stored, &n)| stored.first.end == n);
        let (reads, with_parts) = match wanted {
            Wanted::Residents => (false, false),
            Wanted::Reads { with_parts } => (true, with_parts),
        };
        let fast = reads && all_stored && num_queries <= MAX_SPAN_QUERIES;
        let mut parts = Vec::new();
        for (index, (row, &n)) in self.rows.iter().zip(new_lens).enumerate().filter(|_| reads) {
            render::parts(index, row, &self.rules, n, fast && !with_parts, &mut parts);
        }
        let marks = self.rows.iter().map(|row| row.tables[0].mark()).collect();
        let pool = Arc::clone(&self.pool);
        let mut pool = lock(&pool);
        pool.mark_reach();
        let mut edit = Edit::new(&mut pool);
        let mut appends = Vec::new();
        for (index, (row, stored)) in self.rows.iter_mut().zip(&stored).enumerate() {
            append(index, row.seen, &mut row.tables[0], stored, &mut edit, &mut appends);
        }
        let (copies, retired) = (edit.moves, edit.retired);
        self.open = Some(Open { new_lens: new_lens.to_vec(), num_queries, marks, retired, first });
        Ok(Step {
            frame: self.frame,
            num_rows: self.rows.len(),
            num_queries,
            new_lens: new_lens.to_vec(),
            num_blocks: pool.high(),
            copies,
            appends,
            spans: fast.then(|| render::spans(&self.rows, &self.rules, self.frame, new_lens, num_queries)),
            parts,
            residents: (!reads).then(|| self.rows.iter().map(|row| row.tables[0].runs().into()).collect()),
            first_new: self.rows.iter().map(|r| r.seen).collect(),
        })
    }

    /// Makes the open step count.
    pub fn commit(&mut self) -> Result<()> {
        let Some(open) = self.open.take() else {
            return Err(Error::NoStep { what: "commit" });
        };
        for (row, n) in self.rows.iter_mut().zip(open.new_lens) {
            row.seen += n as u64;
        }
        self.columns += open.num_queries as u64;
        let mut pool = lock(&self.pool);
        open.retired.into_iter().for_each(|b| pool.release(b));
        Ok(())
    }

    /// Undoes the open step.
    pub fn rollback(&mut self) -> Result<()> {
        if self.undo_open() { Ok(()) } else { Err(Error::NoStep { what: "rollback" }) }
    }

    pub(super) fn undo_open(&mut self) -> bool {
        let Some(open) = self.open.take() else { return false };
        let mut pool = lock(&self.pool);
        for (row, mark) in self.rows.iter_mut().zip(&open.marks) {
            row.tables[0].undo(mark).into_iter().for_each(|b| pool.release(b));
        }
        pool.mark_reach();
        if open.first {
            self.rows.clear();
        }
        true
    }

    fn check_lens(&self, new_lens: &[usize], num_queries: usize) -> Result<()> {
        if new_lens.is_empty() {
            return Err(Error::Shape { what: "input", expected: "at least one row".into(), got: "none".into() });
        }
        if !self.rows.is_empty() {
            self.check_rows(new_lens.len())?;
        }
        if let Some(n) = new_lens.iter().find(|&&n| n > num_queries) {
            return Err(Error::OutOfRange {
                what: "new tokens of a row",
                expected: "at most the number of columns",
                got: format!("{n} of {num_queries}"),
            });
        }
        let tokens = new_lens.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
        if num_queries.max(tokens) > MAX_TOKENS {
            let got = format!("{num_queries} columns, {tokens} tokens");
            return Err(Error::OutOfRange {
                what: "a forward",
                expected: "at most 33,554,432 columns and tokens",
                got,
            });
        }
        // A row's tokens may begin and end within a block, and a shared last block is copied.
        let blocks = tokens / BLOCK as usize + 3 * new_lens.len();
        if lock(&self.pool).used() + blocks > PACKED as usize {
            let got = format!("{tokens} more tokens");
            return Err(Error::OutOfRange { what: "a stream", expected: "at most 2,147,483,648 resident tokens", got });
        }
        Ok(())
    }

    /// Which of a row's `n` new tokens are stored.
    fn stored(&self, row: &Row, n: usize, store_all: bool) -> Stored {
        let all = Stored { first: 0..n, rest: Vec::new() };
        let Eviction::Window { sinks, window } = self.memories[0].evict else {
            return all;
        };
        if store_all || self.memories.len() > 1 {
            return all;
        }
        let new = |at: Position| at.saturating_sub(row.seen).min(n as u64) as usize;
        let window = window - (row.pins.count_from(sinks as u64) as usize).min(window);
        let always = Always { sinks: sinks as u64, pins: row.pins.ranges() };
        let mut ranges = always.ranges().map(|range| new(range.start)..new(range.end));
        let first = ranges.next().unwrap_or(0..0);
        if first.end + window >= n {
            return all;
        }
        let mut rest: Vec<_> = ranges.map(|r| r.start..r.end.min(n - window)).filter(|r| r.start < r.end).collect();
        rest.push(n - window..n);
        Stored { first, rest }
    }
}

/// The new tokens of a row that are stored, as ranges that ascend; the first one holds all of them where all are.
struct Stored {
    first: Range<usize>,
    rest: Vec<Range<usize>>,
}

impl Stored {
    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.first.clone().chain(self.rest.iter().cloned().flatten())
    }
}

fn append(row: usize, seen: Position, table: &mut Table, stored: &Stored, edit: &mut Edit<'_>, out: &mut Vec<Append>) {
    let mut new = stored.iter();
    let positions = stored.iter().map(|i| seen + i as u64);
    for Run { block, lo, hi } in table.append(positions, edit) {
        for slot in lo..hi {
            let Some(new) = new.next() else { return };
            match out.last_mut() {
                Some(a)
                    if a.row == row && a.block == block && a.slot + a.len == slot && a.new + a.len as usize == new =>
                {
                    a.len += 1;
                }
                _ => out.push(Append { row, new, block, slot, len: 1 }),
            }
        }
    }
}
