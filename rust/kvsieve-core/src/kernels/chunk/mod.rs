//! Searching attention for a chunk of a prompt: what [`attend_sparse`] does query by query, for whole query blocks at once.
//!
//! A unit of work is a query block and a key-value head: its search, then attention of its queries (those of the whole group) to the
//! union of what they read. Most of that all of them see; keys at the window's edges carry the stretch of queries that see them.
//! Units depend on nothing but the residents, so threads take them in any order and neither their number nor the cuts between
//! chunks (at query blocks) change a bit. Memory: scratch for each thread, and the last choice of each row.

mod attend;
mod check;
mod compiled;
mod dense;
mod job;
mod product;
mod reads;
mod residents;
mod score;
mod scorer;
mod shape;
mod tile;
mod unit;
mod weights;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::isa::Level;
use super::sparse::{Scoring, Sparse, SparseRow, Work, attend_sparse, fill_zero};
use super::threads;
use crate::select::{Choice, Chosen, Inputs, Rule};
use crate::storage::arena::Arena;
use crate::tensor::{Dtype, ElemsMut};
use crate::{Error, Result, fault};
use check::check;
use compiled::kernels;
pub use dense::{Dense, attend_dense};
use job::{Common, Queries};
use residents::Residents;
use shape::Shape;
use unit::{Found, run_unit};

/// As [`attend_sparse`], many queries at a time: the same choices wherever scores are equal, the same result but for the order of sums.
///
/// Packed keys, keys that are shown elsewhere, and queries on their own take the other way.
pub fn attend_chunk(
    arena: &Arena,
    rule: &Rule,
    choices: &mut [Choice],
    args: &Sparse<'_>,
    mut out: ElemsMut<'_>,
    mut lse: Option<&mut [f32]>,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Work> {
    let group = check(arena, choices, args, &out, lse.as_deref())?;
    let moves = args.scoring != Scoring::Stored || args.rows.iter().any(|row| !row.shown.is_empty());
    let packed = args.rows.iter().flat_map(|row| row.runs).any(|run| run.block.is_packed());
    if args.query_block == 1 || moves || packed {
        return attend_sparse(arena, rule, choices, args, out, lse, stop);
    }
    let residents = residents_of(arena, rule, args)?;
    fill_zero(&mut out);
    if let Some(lse) = &mut lse {
        lse.fill(f32::NEG_INFINITY);
    }
    let blocks = Blocks::new(args, &residents);
    let mut call = Call { arena, rule, args, stop, out, lse, next: choices.to_vec(), work: Work::default() };
    blocks.alone_before.iter().try_for_each(|queries| call.alone(queries))?;
    call.together(&residents, &blocks.together, group)?;
    blocks.alone_after.iter().try_for_each(|queries| call.alone(queries))?;
    choices.clone_from_slice(&call.next);
    Ok(call.work)
}

fn residents_of(arena: &Arena, rule: &Rule, args: &Sparse<'_>) -> Result<Vec<Residents>> {
    let [_, _, columns, _] = args.q.shape();
    let mut residents = Vec::with_capacity(args.rows.len());
    for row in args.rows {
        let found = Residents::new(arena, row.runs, rule.select.page_bounds())?;
        if row.new_len > columns || row.new_len > found.len as usize {
            let expected = format!("at most {columns} new tokens, all of them among {} residents", found.len);
            return Err(Error::Shape { what: "new_len", expected, got: row.new_len.to_string() });
        }
        residents.push(found);
    }
    Ok(residents)
}

/// The query blocks of a call. Those of one query may take over an older choice, and so must wait for it: those that a chunk begins or
/// ends with.
#[derive(Default)]
struct Blocks {
    alone_before: Vec<Queries>,
    together: Vec<Queries>,
    alone_after: Vec<Queries>,
}

impl Blocks {
    fn new(args: &Sparse<'_>, residents: &[Residents]) -> Self {
        let [_, _, columns, _] = args.q.shape();
        let mut blocks = Blocks::default();
        for (row, residents) in residents.iter().enumerate() {
            let mut left = args.rows[row].new_len;
            let mut is_first = true;
            while left > 0 {
                let first = residents.len as usize - left;
                let count = left.min(args.query_block - first % args.query_block);
                let queries = Queries { row, first, columns: columns - left..columns - left + count };
                left -= count;
                match (count, is_first) {
                    (1, true) => blocks.alone_before.push(queries),
                    (1, false) => blocks.alone_after.push(queries),
                    _ => blocks.together.push(queries),
                }
                is_first = false;
            }
        }
        blocks
    }
}

/// A call, and what it has done so far.
struct Call<'a, 'o> {
    arena: &'a Arena,
    rule: &'a Rule,
    args: &'a Sparse<'a>,
    stop: &'a (dyn Fn() -> bool + Sync),
    out: ElemsMut<'o>,
    lse: Option<&'o mut [f32]>,
    /// The choices as they will be.
    next: Vec<Choice>,
    work: Work,
}

impl Call<'_, '_> {
    /// Blocks of several queries each.
    fn together(&mut self, residents: &[Residents], blocks: &[Queries], group: usize) -> Result<()> {
        let Call { arena, rule, args, stop, .. } = *self;
        let [_, heads, _, dim] = args.q.shape();
        let dots = args.level == Level::Avx512Bf16 && arena.dtype() == Dtype::BF16;
        let es = arena.dtype().size();
        let common = Common {
            rule,
            args,
            residents,
            kernels: kernels(args.level, arena.dtype(), dots),
            shape: Shape { dim, value_dim: arena.value_dim(), dots },
            bytes: (dim * es, arena.value_dim() * es),
            group,
            out: self.out.as_bytes_mut_ptr(),
            lse: self.lse.as_mut().map(|lse| lse.as_mut_ptr()),
        };
        // Head by head, because neighbouring query blocks read much the same keys of a head.
        let kv_heads = heads / group;
        let is_last = |i: usize| blocks.get(i + 1).is_none_or(|next| next.row != blocks[i].row);
        let units: Vec<(usize, usize)> =
            (0..kv_heads).flat_map(|head| (0..blocks.len()).map(move |i| (i, head))).collect();
        let stopped = AtomicBool::new(false);
        let one = |(i, head): (usize, usize)| -> Result<Found> {
            if stopped.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            fault::may_panic();
            run_unit(&common, &blocks[i], head, is_last(i))
        };
        // A unit takes some milliseconds, on the slowest level a tenth of a second.
        let breath = if args.level >= Level::Avx2 { 8 * args.threads } else { args.threads };
        for (_, last) in blocks.iter().enumerate().filter(|(i, _)| is_last(*i)) {
            self.expect(last, kv_heads)?;
        }
        for (i, units) in units.chunks(breath).enumerate() {
            if i > 0 && stop() {
                stopped.store(true, Ordering::Relaxed);
            }
            let found = threads::map(args.threads, units.iter().copied(), one)?;
            for (found, &(i, head)) in found.into_iter().zip(units) {
                self.remember(found?, blocks[i].row, head);
            }
        }
        Ok(())
    }

    /// Makes room for what the last queries of a row will choose.
    fn expect(&mut self, last: &Queries, kv_heads: usize) -> Result<()> {
        let choice = &mut self.next[last.row];
        choice.region = self.rule.region(last.first, last.columns.len())?;
        choice.chosen = Arc::new(vec![Chosen::default(); kv_heads]);
        choice.inputs = Arc::new(vec![Inputs::new(); kv_heads]);
        choice.next = last.first + last.columns.len();
        choice.step = 1;
        Ok(())
    }

    fn remember(&mut self, found: Found, row: usize, head: usize) {
        self.work.read += found.read;
        self.work.searched += found.searched;
        if let Some((chosen, inputs)) = found.choice {
            let choice = &mut self.next[row];
            Arc::make_mut(&mut choice.chosen)[head] = chosen;
            Arc::make_mut(&mut choice.inputs)[head] = inputs;
        }
    }

    /// One query on its own, by the other way.
    fn alone(&mut self, queries: &Queries) -> Result<()> {
        let Call { arena, rule, args, stop, .. } = *self;
        let [_, heads, columns, _] = args.q.shape();
        let Queries { row, first, columns: at } = queries.clone();
        // Residents up to the query itself.
        let mut left = first as u32 + 1;
        let mut runs = args.rows[row].runs.to_vec();
        for run in &mut runs {
            run.hi = run.hi.min(run.lo + left);
            left -= run.len();
        }
        let rows = [SparseRow { runs: &runs, shown: &[], new_len: 1 }];
        let mine = Sparse { q: args.q.block("q", row, at.clone())?, rows: &rows, ..*args };
        let stride = heads * arena.value_dim();
        let place = (row * columns + at.start) * stride..(row * columns + at.end) * stride;
        let to = match &mut self.out {
            ElemsMut::F32(x) => ElemsMut::F32(&mut x[place]),
            ElemsMut::Bits(x) => ElemsMut::Bits(&mut x[place]),
        };
        let mut found = vec![0f32; heads];
        let done = attend_sparse(arena, rule, &mut self.next[row..=row], &mine, to, Some(&mut found), stop)?;
        if let Some(lse) = &mut self.lse {
            for (head, &x) in found.iter().enumerate() {
                lse[(row * heads + head) * columns + at.start] = x;
            }
        }
        self.work.read += done.read;
        self.work.searched += done.searched;
        Ok(())
    }
}
