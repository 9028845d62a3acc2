//! Attention to what a search has chosen: search, then read keys and values where they lie.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::attend::{Attend, SpanTrig, attend_apart};
use super::isa::Level;
use super::select::{QueryBlock, Selection, Turn, select_unless};
use crate::error::at_least_one;
use crate::ids::{BLOCK, Run};
use crate::plan::{Span, Spans};
use crate::rope::Rope;
use crate::select::{Choice, Inputs, Rule, Shown};
use crate::storage::arena::Arena;
use crate::tensor::{Dtype, ElemsMut, View, check_len};
use crate::{Error, Result};

/// One row's new queries and residents.
#[derive(Clone, Copy, Debug)]
pub struct SparseRow<'a> {
    /// All residents in text order, the new tokens' included.
    pub runs: &'a [Run],
    /// At which distance the last query sees each run; empty where all keys are read as they lie.
    pub shown: &'a [Shown],
    /// The row's valid new tokens: the last columns of `q`, and the last residents.
    pub new_len: usize,
}

/// How keys are scored by the search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scoring {
    /// As they lie, by the queries as they come: the model has rotated both.
    #[default]
    Stored,
    /// Raw keys, where they are shown.
    Placed,
    /// Raw keys, all at one distance, the window's (InfiniteHiP's relative style).
    Relative,
}

/// Everything about the attention but the keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Sparse<'a> {
    /// `[rows, heads, columns, key_dim]`, of the arena's dtype and in the frame of its keys.
    pub q: View<'a>,
    /// `None` for layers without position encoding, and where nothing is turned: shifts and rotations are then ignored.
    pub rope: Option<&'a Arc<Rope>>,
    /// Whether the rope's factor is still to be applied, to query and key.
    pub apply_factor: bool,
    pub scoring: Scoring,
    /// Numbers what each head keeps without gaps, ending at the query, and shows it at those distances (InfiniteHiP's streaming order,
    /// for texts beyond the trained length). Keys must be raw.
    pub consecutive: bool,
    pub rows: &'a [SparseRow<'a>],
    /// Queries that share a choice: those of equal `position / query_block`, so that it does not matter how a text is cut into steps
    /// at multiples of it.
    pub query_block: usize,
    /// Of a query block, every so many queries are scored, counted back from its last one.
    pub query_stride: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
    pub sinks: Option<&'a [f32]>,
    pub threads: usize,
    pub level: Level,
}

impl Sparse<'_> {
    pub(super) fn check_query_blocks(&self) -> Result<()> {
        at_least_one("query_block", self.query_block)?;
        at_least_one("query_stride", self.query_stride)
    }
}

/// What a call has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Representative keys scored, over all query blocks and key-value heads.
    pub searched: u64,
    /// Keys attended to, over all queries and key-value heads.
    pub read: u64,
}

/// Where the residents of a row lie.
pub(super) struct Layout<'a> {
    runs: &'a [Run],
    shown: &'a [Shown],
    /// The first resident of each run.
    starts: Cow<'a, [u32]>,
    pub(super) len: u32,
}

impl<'a> Layout<'a> {
    pub(super) fn new(runs: &'a [Run], shown: &'a [Shown]) -> Result<Self> {
        if !shown.is_empty() {
            check_len("shown", shown.len(), runs.len())?;
        }
        let mut len = 0u32;
        let mut starts = Vec::with_capacity(runs.len());
        for run in runs {
            if run.lo > run.hi || run.hi > BLOCK {
                let (what, expected) = ("run", "a range of slots inside one block");
                return Err(Error::OutOfRange { what, expected, got: format!("{run:?}") });
            }
            starts.push(len);
            len += run.len();
        }
        Ok(Layout { runs, shown, starts: Cow::Owned(starts), len })
    }

    /// All keys as they lie. `starts` are the first resident of each run and how many there are, or nothing: then they are counted.
    pub(super) fn of(runs: &'a [Run], starts: &'a [u32]) -> Result<Self> {
        let [starts @ .., len] = starts else { return Layout::new(runs, &[]) };
        check_len("starts", starts.len(), runs.len())?;
        Ok(Layout { runs, shown: &[], starts: Cow::Borrowed(starts), len: *len })
    }

    /// Appends residents `stretch` as the query at `position` sees them, as spans. `from` is a run at or before the first one; returns
    /// the run of the last.
    pub(super) fn push(&self, stretch: Range<u32>, position: usize, from: usize, out: &mut Vec<Span>) -> usize {
        let behind = i64::from(self.len) - 1 - position as i64;
        let mut at = from;
        // Whole blocks, as they mostly are, are found at once.
        let guess = (stretch.start / BLOCK) as usize;
        if self.starts.get(guess).is_some_and(|&start| start <= stretch.start) {
            at = at.max(guess);
        }
        while at + 1 < self.runs.len() && self.starts[at + 1] <= stretch.start {
            at += 1;
        }
        let mut next = stretch.start;
        while next < stretch.end {
            let (run, start) = (&self.runs[at], self.starts[at]);
            let hi = stretch.end.min(start + run.len());
            if next < hi {
                let (lo, hi) = (run.lo + next - start, run.lo + hi - start);
                let (shift, rotate_keys) = match self.shown.get(at) {
                    Some(&Shown { shift, rotate_keys: true }) => (shift - behind, true),
                    Some(&Shown { shift, rotate_keys: false }) => (shift, false),
                    None => (0, false),
                };
                out.push(Span { block: run.block, lo, hi, shift, rotate_keys });
            }
            next = next.max(hi);
            if next < stretch.end {
                at += 1;
            }
        }
        at
    }
}

/// Shows the keys of `spans` one after another, the last of them `after` before the query.
fn number(spans: &mut [Span], after: i64) {
    let mut distance = after;
    for span in spans.iter_mut().rev() {
        // The last key of the span is `distance` away, and each before it one more.
        (span.shift, span.rotate_keys) = (distance + i64::from(span.hi) - 1, true);
        distance += i64::from(span.hi - span.lo);
    }
}

/// Attends the rows' new queries to sinks, window and what `rule` chooses, and keeps the choice of single queries in `choices`, one for
/// each row. A query block of several tokens always chooses anew.
///
/// * `out`: `[rows, columns, heads, value_dim]`, of the dtype of `q`; zero for pads.
/// * `lse`: `[rows, heads, columns]`; `-inf` for pads.
///
/// `stop` is asked between query blocks and inside long ones; after [`Error::Interrupted`], and after any other error, `choices` are as
/// before.
pub fn attend_sparse(
    arena: &Arena,
    rule: &Rule,
    choices: &mut [Choice],
    args: &Sparse<'_>,
    mut out: ElemsMut<'_>,
    mut lse: Option<&mut [f32]>,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Work> {
    let [rows, heads, columns, _] = args.q.shape();
    let value_dim = arena.value_dim();
    check_len("rows", args.rows.len(), rows)?;
    check_len("choices", choices.len(), rows)?;
    check_len("out", out.len(), rows * columns * heads * value_dim)?;
    if let Some(lse) = lse.as_deref() {
        check_len("lse", lse.len(), rows * heads * columns)?;
    }
    args.check_query_blocks()?;
    let mut layouts = Vec::with_capacity(rows);
    for row in args.rows {
        let layout = Layout::new(row.runs, row.shown)?;
        if row.new_len > columns || row.new_len > layout.len as usize {
            let expected = format!("at most {columns} new tokens, all of them among {} residents", layout.len);
            return Err(Error::Shape { what: "new_len", expected, got: row.new_len.to_string() });
        }
        layouts.push(layout);
    }

    // Rounds: of each row the next query block. One round in decoding.
    let mut work = Work::default();
    let mut next: Vec<Choice> = choices.to_vec();
    let mut done = vec![0; rows];
    fill_zero(&mut out);
    if let Some(lse) = &mut lse {
        lse.fill(f32::NEG_INFINITY);
    }
    loop {
        let mut blocks = Vec::new();
        for (row, layout) in layouts.iter().enumerate() {
            let left = args.rows[row].new_len - done[row];
            if left > 0 {
                let first = layout.len as usize - left;
                let count = left.min(args.query_block - first % args.query_block);
                let at = columns - left;
                blocks.push((row, first, at..at + count));
                done[row] += count;
            }
        }
        if blocks.is_empty() {
            break;
        }
        if work.read > 0 && stop() {
            return Err(Error::Interrupted);
        }
        round(arena, rule, &mut next, args, &layouts, &blocks, &mut work, (&mut out, &mut lse), stop)?;
    }
    choices.clone_from_slice(&next);
    Ok(work)
}

pub(super) fn fill_zero(out: &mut ElemsMut<'_>) {
    match out {
        ElemsMut::F32(x) => x.fill(0.0),
        ElemsMut::Bits(x) => x.fill(0),
    }
}

type Block = (usize, usize, Range<usize>);

/// How the search turns queries and keys.
fn turn<'a>(args: &Sparse<'a>) -> Option<Turn<'a>> {
    let relative = match args.scoring {
        Scoring::Stored => return None,
        Scoring::Placed => false,
        Scoring::Relative => true,
    };
    args.rope.map(|rope| Turn { rope, apply_factor: args.apply_factor, relative })
}

#[allow(clippy::too_many_arguments)]
fn round(
    arena: &Arena,
    rule: &Rule,
    choices: &mut [Choice],
    args: &Sparse<'_>,
    layouts: &[Layout<'_>],
    blocks: &[Block],
    work: &mut Work,
    (out, lse): (&mut ElemsMut<'_>, &mut Option<&mut [f32]>),
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let kv_heads = arena.num_kv_heads();
    // Those that must choose, by the stage they begin with.
    let due: Vec<Option<usize>> =
        blocks.iter().map(|(row, first, columns)| rule.due(&choices[*row], *first, columns.len())).collect();
    for stage in 0..rule.select.num_stages() {
        let mut asked = Vec::new();
        let mut inputs: Vec<Inputs> = Vec::new();
        let mut whose = Vec::new();
        for ((row, first, columns), _) in blocks.iter().zip(&due).filter(|(_, due)| **due == Some(stage)) {
            let choice = &mut choices[*row];
            if stage == 0 {
                choice.region = rule.region(*first, columns.len())?;
                choice.inputs = Arc::new(vec![Inputs::new(); kv_heads]);
                choice.step = 0;
            }
            let (SparseRow { runs, shown, .. }, region) = (args.rows[*row], choice.region.clone());
            asked.push(QueryBlock { row: *row, columns: columns.clone(), runs, shown, first: *first, region });
            inputs.extend(choice.inputs.iter().cloned());
            whose.push(*row);
        }
        if asked.is_empty() {
            continue;
        }
        let Sparse { q, query_stride, threads, level, .. } = *args;
        let (turn, window, rule, start) = (turn(args), rule.window, &*rule.select, stage);
        let selection = Selection { q, turn, blocks: &asked, query_stride, window, rule, start, threads, level };
        let found = select_unless(arena, &selection, &mut inputs, stop)?;
        work.searched += found.iter().map(|chosen| chosen.reads).sum::<u64>();
        let (mut found, mut inputs) = (found.into_iter(), inputs.into_iter());
        for row in whose {
            choices[row].chosen = Arc::new(found.by_ref().take(kv_heads).collect());
            choices[row].inputs = Arc::new(inputs.by_ref().take(kv_heads).collect());
        }
    }

    // One list of spans for each query and head; queries that are not of this round read nothing.
    for (row, first, columns) in blocks {
        let choice = &mut choices[*row];
        let mut spans = Spans { num_rows: 1, num_queries: columns.len(), starts: vec![0], spans: Vec::new() };
        for position in *first..first + columns.len() {
            for chosen in choice.chosen.iter() {
                let (mut at, mut end, first) = (0, 0, spans.spans.len());
                rule.read(&choice.region, chosen, position, &mut |stretch: Range<u32>| {
                    work.read += stretch.len() as u64;
                    end = if stretch.is_empty() { end } else { stretch.end as usize };
                    at = layouts[*row].push(stretch, position, at, &mut spans.spans);
                });
                if args.consecutive && args.rope.is_some() {
                    // The query's own key is 0 away, if it is kept; else the last one is 1 away.
                    number(&mut spans.spans[first..], i64::from(end <= position));
                }
                spans.starts.push(spans.spans.len() as u32);
            }
        }
        choice.next = first + columns.len();
        choice.step += 1;
        attend_block(arena, args, *row, columns.clone(), &spans, (out, lse), stop)?;
    }
    Ok(())
}

/// Attends one query block into its place of `out` and `lse`.
fn attend_block(
    arena: &Arena,
    args: &Sparse<'_>,
    row: usize,
    columns: Range<usize>,
    spans: &Spans,
    (out, lse): (&mut ElemsMut<'_>, &mut Option<&mut [f32]>),
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let [_, heads, all, _] = args.q.shape();
    let (count, stride) = (columns.len(), heads * arena.value_dim());
    let q = args.q.block("q", row, columns.clone())?;
    let Sparse { apply_factor, scale, softcap, sinks, threads, level, .. } = *args;
    let turned = spans.spans.iter().any(|span| span.shift != 0 || span.rotate_keys);
    let trig = args.rope.filter(|_| turned || apply_factor).map(|rope| SpanTrig::of_many(spans, rope));
    let attend = Attend { q, spans, trig: trig.as_ref(), scale, softcap, sinks, apply_factor, threads, level };
    let at = (row * all + columns.start) * stride;
    let to = match (out, arena.dtype()) {
        (ElemsMut::F32(x), Dtype::F32) => ElemsMut::F32(&mut x[at..at + count * stride]),
        (ElemsMut::Bits(x), Dtype::BF16 | Dtype::F16) => ElemsMut::Bits(&mut x[at..at + count * stride]),
        _ => {
            let expected = format!("{} elements", arena.dtype().name());
            return Err(Error::Shape { what: "out", expected, got: "elements of another width".to_string() });
        }
    };
    let mut mine = vec![0f32; if lse.is_some() { heads * count } else { 0 }];
    attend_apart(arena, &attend, to, lse.is_some().then_some(&mut mine[..]), stop)?;
    if let Some(lse) = lse {
        for (head, mine) in mine.chunks_exact(count).enumerate() {
            lse[(row * heads + head) * all + columns.start..][..count].copy_from_slice(mine);
        }
    }
    Ok(())
}
