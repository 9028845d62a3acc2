//! Selection over the keys where they lie: what the rules of [`crate::select`] ask for, for many query blocks and heads.
//!
//! A rule reads a key here and a key there, and which ones it reads next depends on what it found: no stream that the hardware could
//! foresee. But one level of a tree asks for hundreds of keys at once, so those ahead are asked for in the second-level cache while
//! the ones at hand are scored. All queries that share a choice meet a key while it is in registers.
//!
//! Keys that lie as the queries meet them are scored in place, and so are stretches of codes. Other packed keys, and raw ones that are
//! rotated to their distances, are made into rows of `f32` first ([`super::rows`]), some dozens at a time.

mod batch;
mod check;
mod residents;
mod scorer;
pub mod selection;

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use super::attend::CodeScorer;
use super::rotate::{load_row, rotate_row};
use super::rows::Making;
use super::simd::{Elem, Portable};
use super::threads;
use crate::select::{Asked, Chosen, Inputs};
use crate::storage::arena::Arena;
use crate::tensor::{Dtype, Elems};
use crate::{Error, Result, fault};
use check::{check, check_shown};
use residents::Residents;
use scorer::{Scorer, Scratch};

pub(super) use check::check_bounds;
pub(super) use residents::bounds_of;
pub(super) use selection::sampled;
pub use selection::{QueryBlock, Selection, Turn};

/// Selects for each query block and key-value head (`block * kv_heads + head`).
///
/// `inputs` is for rules of several stages, as many as results: read where a selection starts in the middle, and written.
pub fn select(arena: &Arena, args: &Selection<'_>, inputs: &mut [Inputs]) -> Result<Vec<Chosen>> {
    select_unless(arena, args, inputs, &|| false)
}

/// [`select`], unless `stop` says so: asked between query blocks, and then [`Error::Interrupted`]; `inputs` are then of no use.
pub fn select_unless(
    arena: &Arena,
    args: &Selection<'_>,
    inputs: &mut [Inputs],
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Chosen>> {
    let group = check(arena, args, inputs.len())?;
    let kv_heads = arena.num_kv_heads();
    let rows = Rows::new(arena, args)?;
    let units = args.blocks.len() * kv_heads;
    let mut none = vec![Inputs::new(); if inputs.is_empty() { units } else { 0 }];
    let inputs = if inputs.is_empty() { &mut none[..] } else { inputs };
    let stopped = AtomicBool::new(false);
    let each = |(unit, inputs): (usize, &mut Inputs)| {
        if stopped.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        fault::may_panic();
        let (block, head) = (unit / kv_heads, unit % kv_heads);
        run_unit(arena, args, (&args.blocks[block], rows.of(block)), (head, group), inputs)
    };
    // A breath is a round of query blocks: the longest takes some milliseconds.
    let breath = 4 * kv_heads * args.threads;
    let mut done = Vec::with_capacity(units);
    for (i, inputs) in inputs.chunks_mut(breath).enumerate() {
        if i > 0 && stop() {
            stopped.store(true, Ordering::Relaxed);
        }
        let first = i * breath;
        for found in threads::map(args.threads, (first..).zip(inputs), each)? {
            done.push(found?);
        }
    }
    Ok(done)
}

/// The residents of every query block; blocks of one row share them.
struct Rows<'a> {
    all: Vec<Residents<'a>>,
    of_block: Vec<usize>,
}

impl<'a> Rows<'a> {
    fn new(arena: &'a Arena, args: &Selection<'_>) -> Result<Self> {
        let mut rows = Rows { all: Vec::new(), of_block: Vec::with_capacity(args.blocks.len()) };
        for (i, block) in args.blocks.iter().enumerate() {
            let same =
                |other: &QueryBlock<'_>| std::ptr::eq(other.runs, block.runs) && std::ptr::eq(other.shown, block.shown);
            let known = args.blocks[..i].iter().position(same).map(|j| rows.of_block[j]);
            let at = known.unwrap_or(rows.all.len());
            if known.is_none() {
                rows.all.push(Residents::new(arena, block.runs, block.shown, args.asks_pages())?);
            }
            rows.of_block.push(at);
            let residents = &rows.all[at];
            let have = residents.len;
            if block.region.start > block.region.end || block.region.end > have {
                let expected = format!("a region of the {have} residents");
                return Err(Error::Shape { what: "region", expected, got: format!("{:?}", block.region) });
            }
            check_shown(args, block, residents)?;
            if args.start == 0 && args.rule.judges_pages(&block.region) {
                check_bounds(&residents.bounds, &block.region)?;
            }
        }
        Ok(rows)
    }

    fn of(&self, block: usize) -> &Residents<'a> {
        &self.all[self.of_block[block]]
    }
}

fn run_unit(
    arena: &Arena,
    args: &Selection<'_>,
    (block, residents): (&QueryBlock<'_>, &Residents<'_>),
    (head, group): (usize, usize),
    inputs: &mut Inputs,
) -> Result<Chosen> {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    let dim = arena.key_dim();
    let width = dim.next_multiple_of(32);
    SCRATCH.with_borrow_mut(|scratch| {
        let scored = sampled(block.columns.len(), args.query_stride);
        let offset = scored.start;
        let num_queries = scored.len().div_ceil(args.query_stride) * group;
        let at = |i: usize| block.columns.start + offset + i * args.query_stride;
        scratch.queries.clear();
        scratch.queries.resize(num_queries * width, 0.0);
        for (i, to) in scratch.queries.chunks_exact_mut(width).enumerate() {
            let from = args.q.row(block.row, head * group + i % group, at(i / group));
            widen(from, arena.dtype(), &mut to[..dim]);
        }
        scratch.by_content.clear();
        if let Some(turn) = &args.turn {
            let sampled = (block.first + offset, args.query_stride);
            // Bounds are of keys as they lie: raw ones are judged by content, wherever they are shown.
            if !turn.relative && args.asks_pages() {
                scratch.by_content.clone_from(&scratch.queries);
                let turn = Turn { relative: true, ..*turn };
                turn_queries(&turn, args.window, sampled, residents, &mut scratch.by_content, (width, group));
            }
            turn_queries(turn, args.window, sampled, residents, &mut scratch.queries, (width, group));
        }
        let rotates = args.turn.filter(|turn| !turn.relative).map(|turn| turn.rope.distances(residents.most()));
        let making = Making { arena, head, distances: rotates, level: args.level };
        let makes = residents.packed || making.distances.is_some();
        let kernel = batch::kernel(args.level, if makes { Dtype::F32 } else { arena.dtype() }, dim);
        scratch.dots.clear();
        let bounds_dots = arena.dtype() == Dtype::BF16 && args.turn.is_none();
        if bounds_dots && !makes {
            // They were `bf16`, so nothing is rounded.
            scratch.dots.extend(scratch.queries.iter().map(|&x| bf16::of_f32(x)));
        }
        let codes = arena.packed().filter(|_| residents.packed && making.distances.is_none());
        let codes = codes.and_then(|packed| CodeScorer::new(args.level, packed));
        let mut scorer = Scorer {
            residents,
            making: makes.then_some(&making),
            codes: codes.as_ref(),
            thin_of: None,
            head,
            row_bytes: dim * arena.dtype().size(),
            dim,
            width,
            num_queries,
            group,
            edge: (block.first + offset) as i64 + 1 - args.window as i64,
            stride: args.query_stride,
            kernel,
            bounds_kernel: batch::kernel(args.level, arena.dtype(), 2 * dim),
            bounds_dots,
            scratch,
        };
        args.rule.choose(Asked { region: block.region.clone(), start: args.start, inputs }, &mut scorer)
    })
}

/// Rotates the queries of a block, so that keys need to be rotated by no more than what [`Turn`] says.
fn turn_queries(
    turn: &Turn<'_>,
    window: usize,
    (first, stride): (usize, usize),
    residents: &Residents<'_>,
    queries: &mut [f32],
    (width, group): (usize, usize),
) {
    let factor = if turn.apply_factor { (turn.rope.factor() * turn.rope.factor()) as f32 } else { 1.0 };
    let pairs = turn.rope.inv_freq().len();
    let mut trig = Vec::with_capacity(2 * pairs);
    for (i, queries) in queries.chunks_exact_mut(group * width).enumerate() {
        // Keys are rotated to where the row's last query is, from which this one is so many residents away.
        let behind = (first + i * stride) as i64 + 1 - i64::from(residents.len);
        let by = if turn.relative { window as i64 } else { behind };
        if trig.is_empty() || !turn.relative {
            trig.clear();
            turn.rope.push_trig(by, &mut trig);
        }
        for query in queries.chunks_exact_mut(width) {
            rotate_row(query, &trig[..pairs], &trig[pairs..], turn.rope.layout());
            query[..2 * pairs].iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// Widens a row of queries.
fn widen(from: Elems<'_>, dtype: Dtype, to: &mut [f32]) {
    match dtype {
        // SAFETY: the portable level needs nothing; the view's row has as many elements as `to`, of this dtype.
        Dtype::F32 => unsafe { load_row::<Portable, f32>(from.as_bytes_ptr().cast(), to) },
        // SAFETY: as above.
        Dtype::BF16 => unsafe { load_row::<Portable, bf16>(from.as_bytes_ptr().cast(), to) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { load_row::<Portable, f16>(from.as_bytes_ptr().cast(), to) },
    }
}
