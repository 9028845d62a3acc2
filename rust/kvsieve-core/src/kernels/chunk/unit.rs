//! One unit of work: the search of a query block and a head, then its attention.

use std::cell::RefCell;
use std::ops::Range;

use super::attend::{Block, Scratch};
use super::job::{Common, Queries, Rows};
use super::reads::Reads;
use super::scorer::Scorer;
use super::shape::{Words, padded_rows};
use crate::Result;
use crate::kernels::select::{check_bounds, sampled};
use crate::select::{Asked, Chosen, Inputs};

/// What a unit has found.
pub(super) struct Found {
    pub read: u64,
    pub searched: u64,
    /// Of the last query block of a row.
    pub choice: Option<(Chosen, Inputs)>,
}

/// Memory that a thread keeps from unit to unit.
struct Kept {
    queries: Words,
    turned: Words,
    spare: Words,
    keys: Vec<*const u8>,
    seen_from: Vec<u32>,
    scores: Vec<f32>,
    /// Queries for bounds: as they are stored, and as the kernels take them.
    split: Vec<u32>,
    split_words: Words,
    attend: Scratch,
}

impl Kept {
    const fn new() -> Self {
        Kept {
            queries: Words::new(),
            turned: Words::new(),
            spare: Words::new(),
            keys: Vec::new(),
            seen_from: Vec::new(),
            scores: Vec::new(),
            split: Vec::new(),
            split_words: Words::new(),
            attend: Scratch::new(),
        }
    }
}

/// `is_last`: whether these are the last queries of a row, whose choice is remembered.
pub(super) fn run_unit(common: &Common<'_>, queries: &Queries, head: usize, is_last: bool) -> Result<Found> {
    thread_local! {
        static KEPT: RefCell<Kept> = const { RefCell::new(Kept::new()) };
    }
    let residents = &common.residents[queries.row];
    let region = common.rule.region(queries.first, queries.columns.len())?;
    if common.rule.select.judges_pages(&region) {
        check_bounds(&residents.bounds, &region)?;
    }
    KEPT.with_borrow_mut(|kept| {
        let (chosen, inputs) = search(common, queries, head, &region, kept)?;
        let mut reads = Reads::new(common, queries, head, &region, &chosen);
        attend(common, queries, head, &mut reads, kept);
        let (read, searched) = (reads.read, chosen.reads);
        Ok(Found { read, searched, choice: is_last.then_some((chosen, inputs)) })
    })
}

/// What the sampled queries choose: the search has no use for the others.
fn search(
    common: &Common<'_>,
    queries: &Queries,
    head: usize,
    region: &Range<u32>,
    kept: &mut Kept,
) -> Result<(Chosen, Inputs)> {
    let Common { rule, args, group, .. } = common;
    let Kept { queries: words, turned, spare, keys, seen_from, scores, split, split_words, .. } = kept;
    let chosen_by = sampled(queries.columns.len(), args.query_stride);
    let offset = chosen_by.start;
    let chosen_by: Vec<usize> = chosen_by.step_by(args.query_stride).collect();
    let mut inputs = Inputs::new();
    let rows = query_rows(common, queries, head, &chosen_by);
    let mut scorer = Scorer {
        common,
        residents: &common.residents[queries.row],
        head,
        queries: bring(common, &rows, words),
        num_queries: chosen_by.len() * group,
        edge: (queries.first + offset) as i64 + 1 - rule.window as i64,
        turned,
        spare,
        keys,
        seen_from,
        scores,
        rows: &rows,
        split,
        split_words,
    };
    let asked = Asked { region: region.clone(), start: 0, inputs: &mut inputs };
    let chosen = rule.select.choose(asked, &mut scorer)?;
    Ok((chosen, inputs))
}

/// Attends all queries to what they read.
fn attend(common: &Common<'_>, queries: &Queries, head: usize, reads: &mut Reads<'_>, kept: &mut Kept) {
    let Common { args, group, shape, .. } = common;
    let count = queries.columns.len();
    let all: Vec<usize> = (0..count).collect();
    let block = Block {
        shape: *shape,
        queries: bring(common, &query_rows(common, queries, head, &all), &mut kept.queries),
        num_rows: count * group,
        group: *group,
        scale: args.scale,
        softcap: args.softcap,
        sinks: args.sinks.map(|sinks| &sinks[head * group..(head + 1) * group]),
    };
    let place = Rows { common, row: queries.row, column: queries.columns.start, head };
    // SAFETY: the level is available, and the kernel is the arena's; `Residents` hands out rows of the arena; no other unit has
    // these queries and heads.
    unsafe { (common.kernels.attend)(&block, reads, &place, &mut kept.attend) };
}

/// The rows of some queries of a block for a head's group.
fn query_rows(common: &Common<'_>, block: &Queries, head: usize, which: &[usize]) -> Vec<*const u8> {
    let Common { args, group, .. } = common;
    let mut rows = Vec::with_capacity(which.len() * group);
    for &query in which {
        for g in 0..*group {
            rows.push(args.q.row(block.row, head * group + g, block.columns.start + query).as_bytes_ptr());
        }
    }
    rows
}

/// Rows of queries as words.
fn bring<'a>(common: &Common<'_>, rows: &[*const u8], words: &'a mut Words) -> &'a [u32] {
    let (shape, num) = (&common.shape, rows.len());
    let words = &mut words.of(padded_rows(num) * shape.padded())[..padded_rows(num) * shape.padded()];
    words[num * shape.padded()..].fill(0);
    // SAFETY: the level is available, and the kernel is of the view's dtype; rows of the view, and room for them.
    unsafe { (common.kernels.queries)(rows, shape, words) };
    words
}
