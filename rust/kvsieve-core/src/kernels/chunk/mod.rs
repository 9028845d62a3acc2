//! Searching attention for a chunk of a prompt: what [`attend_sparse`] does query by query, for whole query blocks at once.
//!
//! A unit of work is a query block and a key-value head: its search, then attention of its queries (those of the whole group) to the
//! union of what they read. Most of that all of them see; keys at the window's edges carry the stretch of queries that see them.
//! Units depend on nothing but the residents, so threads take them in any order and neither their number nor the cuts between
//! chunks (at query blocks) change a bit. Memory: scratch for each thread, and the last choice of each row.

mod unit;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;

use super::isa::Level;
use super::select::{bounds_of, check_bounds, sampled};
use super::sparse::{Scoring, Sparse, SparseRow, Work, attend_sparse, fill_zero};
use super::threads;
use super::view::{Dtype, ElemsMut, check_dtype, check_len};
use crate::ids::{BLOCK, Run};
use crate::select::{Asked, Choice, Chosen, Inputs, Rule, Score};
use crate::store::arena::Arena;
use crate::{Error, Result};
use unit::{Batch, Block, Kernels, Place, Scratch, Shape, TILE, Tile, Tiles, Words, padded_rows};

/// A run of residents that lie together.
struct Together {
    /// Key and value of head 0.
    key: *const u8,
    value: *const u8,
    /// Bytes from head to head.
    next_key: usize,
    next_value: usize,
}

/// Where the residents of a row lie.
struct Residents {
    /// The first resident of each run.
    starts: Vec<u32>,
    runs: Vec<Together>,
    len: u32,
    /// Whether all runs but the last are whole blocks.
    even: bool,
    /// Of each run its bounds for head 0, and the bytes from head to head; null where it has none. Empty where that is not asked.
    bounds: Vec<(*const u8, usize)>,
}

// SAFETY: the pointers are into an arena that is borrowed, shared, for as long as a `Residents` lives, and are only read through.
unsafe impl Sync for Residents {}

impl Residents {
    fn new(arena: &Arena, runs: &[Run], bounded: bool) -> Result<Self> {
        let mut found = Residents { starts: Vec::new(), runs: Vec::new(), len: 0, even: true, bounds: Vec::new() };
        for run in runs.iter().filter(|run| run.lo < run.hi) {
            arena.check_span(run.block, run.lo, run.hi)?;
            found.even &= found.len as usize == found.runs.len() * BLOCK as usize;
            found.starts.push(found.len);
            let (key, value) = arena.rows(run.block, 0, run.lo);
            let next = if arena.num_kv_heads() > 1 { arena.rows(run.block, 1, run.lo) } else { (key, value) };
            let (next_key, next_value) = (next.0 as usize - key as usize, next.1 as usize - value as usize);
            found.runs.push(Together { key, value, next_key, next_value });
            found.len += run.len();
            if bounded {
                found.bounds.push(bounds_of(arena, run));
            }
        }
        Ok(found)
    }

    /// Calls `each` with the address of every key and value of a stretch.
    #[inline]
    fn each(
        &self,
        stretch: Range<u32>,
        head: usize,
        bytes: (usize, usize),
        mut each: impl FnMut(*const u8, *const u8),
    ) {
        let mut i = stretch.start;
        while i < stretch.end {
            let at = if self.even { (i / BLOCK) as usize } else { self.starts.partition_point(|&s| s <= i) - 1 };
            let (run, start) = (&self.runs[at], self.starts[at]);
            let end = self.starts.get(at + 1).copied().unwrap_or(self.len).min(stretch.end);
            let skip = (i - start) as usize;
            let mut key = run.key.wrapping_add(head * run.next_key + skip * bytes.0);
            let mut value = run.value.wrapping_add(head * run.next_value + skip * bytes.1);
            for _ in i..end {
                each(key, value);
                (key, value) = (key.wrapping_add(bytes.0), value.wrapping_add(bytes.1));
            }
            i = end;
        }
    }
}

/// Consecutive queries of a row that share a choice.
#[derive(Clone)]
struct Queries {
    row: usize,
    /// The position of the first.
    first: usize,
    columns: Range<usize>,
}

/// What all units have in common.
struct Common<'a> {
    rule: &'a Rule,
    args: &'a Sparse<'a>,
    residents: &'a [Residents],
    kernels: Kernels,
    shape: Shape,
    /// Bytes of a key and of a value.
    bytes: (usize, usize),
    group: usize,
    out: *mut u8,
    lse: Option<*mut f32>,
}

// SAFETY: the pointers are into memory that is borrowed for the call; a unit writes the rows of its own queries and heads alone.
unsafe impl Sync for Common<'_> {}

/// Where the rows of a unit go.
struct Rows<'a> {
    common: &'a Common<'a>,
    row: usize,
    column: usize,
    head: usize,
}

impl Rows<'_> {
    fn column_and_head(&self, row: usize) -> (usize, usize) {
        let group = self.common.group;
        (self.column + row / group, self.head * group + row % group)
    }
}

impl Place for Rows<'_> {
    unsafe fn out(&self, row: usize) -> *mut u8 {
        let [_, heads, columns, _] = self.common.args.q.shape();
        let (column, head) = self.column_and_head(row);
        let at = (self.row * columns + column) * heads + head;
        self.common.out.wrapping_add(at * self.common.bytes.1)
    }

    unsafe fn lse(&self, row: usize, lse: f32) {
        let [_, heads, columns, _] = self.common.args.q.shape();
        let (column, head) = self.column_and_head(row);
        if let Some(to) = self.common.lse {
            // SAFETY: `check` has seen that there is a place for every query; this one is the unit's own.
            unsafe { *to.add((self.row * heads + head) * columns + column) = lse };
        }
    }
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

/// Scores for one unit.
struct Scorer<'a> {
    common: &'a Common<'a>,
    residents: &'a Residents,
    head: usize,
    queries: &'a [u32],
    num_queries: usize,
    /// Keys from here on are not seen by the first sampled query, after as many more as the stride not by the second, and so on.
    edge: i64,
    turned: &'a mut Words,
    spare: &'a mut Words,
    keys: &'a mut Vec<*const u8>,
    seen_from: &'a mut Vec<u32>,
    scores: &'a mut Vec<f32>,
    /// The rows of the sampled queries.
    rows: &'a [*const u8],
    split: &'a mut Vec<u32>,
    split_words: &'a mut Words,
}

impl Score for Scorer<'_> {
    fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>) {
        out.clear();
        let Scorer { common, keys, seen_from, scores, .. } = self;
        keys.clear();
        seen_from.clear();
        // A rule may be anybody's; beyond the residents there is no key to read.
        assert!(stretches.iter().all(|s| s.end <= self.residents.len), "a rule asks for keys outside its region");
        for stretch in stretches {
            self.residents.each(stretch.clone(), self.head, common.bytes, |key, _| keys.push(key));
        }
        if keys.is_empty() {
            return;
        }
        if stretches.iter().any(|s| i64::from(s.end) > self.edge) {
            let stride = common.args.query_stride as i64;
            for i in stretches.iter().flat_map(Clone::clone) {
                let hidden = (i64::from(i) + 1 - self.edge).max(0);
                seen_from.push((hidden as u64).div_ceil(stride as u64) as u32 * common.group as u32);
            }
        }
        scores.resize(keys.len(), 0.0);
        let mut batch = Batch {
            keys,
            seen_from,
            shape: common.shape,
            queries: self.queries,
            num_queries: self.num_queries,
            turned: self.turned,
            spare: self.spare,
            out: &mut scores[..keys.len()],
        };
        // SAFETY: the level is available, and the kernel is the arena's; `Residents` hands out rows of the arena.
        unsafe { (common.kernels.score)(&mut batch) };
        let mut at = 0;
        for stretch in stretches {
            let mut best = f32::NEG_INFINITY;
            for &x in &scores[at..at + stretch.len()] {
                best = if x > best { x } else { best };
            }
            at += stretch.len();
            out.push(best);
        }
    }

    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        let Scorer { common, keys, seen_from, rows, split, split_words, .. } = self;
        let shape = Shape { dim: 2 * common.shape.dim, ..common.shape };
        let row_bytes = 2 * common.bytes.0;
        // Words, so that rows of any dtype are aligned in them.
        let row_words = row_bytes.div_ceil(4);
        split.clear();
        split.resize(rows.len() * row_words, 0);
        for (row, to) in rows.iter().zip(split.chunks_exact_mut(row_words)) {
            // SAFETY: rows of the view's channels, of the dtype that the kernels are for; twice as many fit into the words.
            unsafe { split_row(*row, common.shape.dim, common.bytes.0, to.as_mut_ptr().cast()) };
        }
        let made: Vec<*const u8> = split.chunks_exact(row_words).map(|row| row.as_ptr().cast()).collect();
        let size = padded_rows(rows.len()) * shape.padded();
        let words = &mut split_words.of(size)[..size];
        words[rows.len() * shape.padded()..].fill(0);
        // SAFETY: as in `bring`.
        unsafe { (common.kernels.queries)(&made, &shape, words) };

        keys.clear();
        let bounds = &self.residents.bounds[blocks.start as usize..blocks.end as usize];
        keys.extend(bounds.iter().map(|(row, stride)| row.wrapping_add(self.head * stride)));
        seen_from.clear();
        if !blocks.is_empty() && i64::from((blocks.end - 1) * BLOCK) >= self.edge {
            let stride = common.args.query_stride as i64;
            seen_from.extend(blocks.map(|block| {
                let hidden = (i64::from(block * BLOCK) + 1 - self.edge).max(0);
                (hidden as u64).div_ceil(stride as u64) as u32 * common.group as u32
            }));
        }
        out.resize(keys.len(), 0.0);
        let mut batch = Batch {
            keys,
            seen_from,
            shape,
            queries: words,
            num_queries: self.num_queries,
            turned: self.turned,
            spare: self.spare,
            out,
        };
        // SAFETY: as in `best`; `run_unit` has seen that every block of the region has bounds, two rows of the arena's dtype.
        unsafe { (common.kernels.score)(&mut batch) };
    }
}

/// What is above zero of each channel, then what is below: a product with the greatest and the least numbers is then the greatest one.
///
/// # Safety
/// A row of `dim` elements and `bytes` in all, and room for twice as much.
unsafe fn split_row(row: *const u8, dim: usize, bytes: usize, to: *mut u8) {
    // SAFETY: the caller's promise; a sign is the highest bit of the last byte of an element, whatever its dtype.
    unsafe {
        let size = bytes / dim;
        for c in 0..dim {
            let from = row.add(c * size);
            let at = if *from.add(size - 1) >> 7 == 1 { bytes } else { 0 } + c * size;
            std::ptr::copy_nonoverlapping(from, to.add(at), size);
        }
    }
}

/// The keys that a unit reads, tile by tile.
struct Reads<'a> {
    residents: &'a Residents,
    head: usize,
    bytes: (usize, usize),
    /// Ascending; the last one is `near..end`, what came before it is seen by all.
    stretches: Vec<Range<u32>>,
    next: usize,
    first: u32,
    count: u32,
    window: u32,
    near: u32,
    /// Residents from `near` on that are chosen or sinks, so that all queries after them see them.
    kept: Vec<bool>,
    /// Keys read, over all queries.
    read: u64,
}

impl Reads<'_> {
    /// The queries that see resident `t` of the last stretch.
    fn seen_by(&self, t: u32) -> (u32, u32) {
        let from = t.saturating_sub(self.first);
        let kept = self.kept.get((t - self.near) as usize).copied().unwrap_or(false);
        let to = if kept { self.count } else { self.count.min((t + self.window).saturating_sub(self.first)) };
        (from.min(to), to)
    }
}

impl Tiles for Reads<'_> {
    fn next(&mut self, tile: &mut Tile) {
        (tile.len, tile.ragged) = (0, false);
        while tile.len < TILE && self.next < self.stretches.len() {
            let last = self.next + 1 == self.stretches.len();
            let whole = self.stretches[self.next].clone();
            let mine = whole.start..whole.end.min(whole.start + (TILE - tile.len) as u32);
            let from = tile.len;
            self.residents.each(mine.clone(), self.head, self.bytes, |key, value| {
                (tile.keys[tile.len], tile.values[tile.len]) = (key, value);
                tile.len += 1;
            });
            for (i, t) in (from..).zip(mine.clone()) {
                let (lo, hi) = if last { self.seen_by(t) } else { (0, self.count) };
                (tile.from[i], tile.to[i]) = (lo, hi);
                tile.ragged |= lo > 0 || hi < self.count;
                self.read += u64::from(hi - lo);
            }
            self.stretches[self.next].start = mine.end;
            self.next += usize::from(mine.end == whole.end);
        }
    }
}

/// What a unit has found.
struct Found {
    read: u64,
    searched: u64,
    /// Of the last query block of a row.
    choice: Option<(Chosen, Inputs)>,
}

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
    let [_, heads, columns, dim] = args.q.shape();
    let mut residents = Vec::with_capacity(args.rows.len());
    for row in args.rows {
        let found = Residents::new(arena, row.runs, rule.select.page_bounds())?;
        if row.new_len > columns || row.new_len > found.len as usize {
            let expected = format!("at most {columns} new tokens, all of them among {} residents", found.len);
            return Err(Error::Shape { what: "new_len", expected, got: row.new_len.to_string() });
        }
        residents.push(found);
    }
    fill_zero(&mut out);
    if let Some(lse) = &mut lse {
        lse.fill(f32::NEG_INFINITY);
    }

    // Query blocks of one query may take over an older choice, and so must wait for it: those that a chunk begins or ends with.
    let mut next = choices.to_vec();
    let mut work = Work::default();
    let (mut blocks, mut alone_after) = (Vec::new(), Vec::new());
    for (row, residents) in residents.iter().enumerate() {
        let mut left = args.rows[row].new_len;
        let mut is_first = true;
        while left > 0 {
            let first = residents.len as usize - left;
            let count = left.min(args.query_block - first % args.query_block);
            let queries = Queries { row, first, columns: columns - left..columns - left + count };
            left -= count;
            match (count, is_first) {
                (1, true) => alone(arena, rule, &mut next, args, &queries, (&mut out, &mut lse), &mut work, stop)?,
                (1, false) => alone_after.push(queries),
                _ => blocks.push(queries),
            }
            is_first = false;
        }
    }

    let dots = args.level == Level::Avx512Bf16 && arena.dtype() == Dtype::BF16;
    let es = arena.dtype().size();
    let common = Common {
        rule,
        args,
        residents: &residents,
        kernels: kernels(args.level, arena.dtype(), dots),
        shape: Shape { dim, value_dim: arena.value_dim(), dots },
        bytes: (dim * es, arena.value_dim() * es),
        group,
        out: out.as_bytes_mut_ptr(),
        lse: lse.as_mut().map(|lse| lse.as_mut_ptr()),
    };
    // Head by head, because neighbouring query blocks read much the same keys of a head.
    let kv_heads = heads / group;
    let is_last = |i: usize| blocks.get(i + 1).is_none_or(|next| next.row != blocks[i].row);
    let units: Vec<(usize, usize)> = (0..kv_heads).flat_map(|head| (0..blocks.len()).map(move |i| (i, head))).collect();
    let stopped = AtomicBool::new(false);
    let one = |&(i, head): &(usize, usize)| -> Result<Found> {
        if stopped.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        run_unit(&common, &blocks[i], head, is_last(i))
    };
    let pool = if args.threads == 1 || units.len() <= 1 { None } else { Some(threads::pool(args.threads)?) };
    // A unit takes some milliseconds, on the slowest level a tenth of a second.
    let breath = if args.level >= Level::Avx2 { 8 * args.threads } else { args.threads };
    for (i, row) in blocks.iter().enumerate().filter(|(i, _)| is_last(*i)) {
        let choice = &mut next[row.row];
        choice.region = rule.region(blocks[i].first, row.columns.len())?;
        choice.chosen = Arc::new(vec![Chosen::default(); kv_heads]);
        choice.inputs = Arc::new(vec![Inputs::new(); kv_heads]);
        choice.next = row.first + row.columns.len();
        choice.step = 1;
    }
    for (i, units) in units.chunks(breath).enumerate() {
        if i > 0 && stop() {
            stopped.store(true, Ordering::Relaxed);
        }
        let found: Result<Vec<Found>> = match &pool {
            None => units.iter().map(one).collect(),
            Some(pool) => pool.install(|| units.par_iter().with_max_len(1).map(one).collect()),
        };
        for (found, &(i, head)) in found?.into_iter().zip(units) {
            work.read += found.read;
            work.searched += found.searched;
            if let Some((chosen, inputs)) = found.choice {
                let choice = &mut next[blocks[i].row];
                Arc::make_mut(&mut choice.chosen)[head] = chosen;
                Arc::make_mut(&mut choice.inputs)[head] = inputs;
            }
        }
    }
    for queries in &alone_after {
        alone(arena, rule, &mut next, args, queries, (&mut out, &mut lse), &mut work, stop)?;
    }
    choices.clone_from_slice(&next);
    Ok(work)
}

/// One query on its own, by the other way.
#[allow(clippy::too_many_arguments)]
fn alone(
    arena: &Arena,
    rule: &Rule,
    choices: &mut [Choice],
    args: &Sparse<'_>,
    queries: &Queries,
    (out, lse): (&mut ElemsMut<'_>, &mut Option<&mut [f32]>),
    work: &mut Work,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
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
    let to = match out {
        ElemsMut::F32(x) => ElemsMut::F32(&mut x[place]),
        ElemsMut::Bits(x) => ElemsMut::Bits(&mut x[place]),
    };
    let mut found = vec![0f32; heads];
    let done = attend_sparse(arena, rule, &mut choices[row..=row], &mine, to, Some(&mut found), stop)?;
    if let Some(lse) = lse {
        for (head, &x) in found.iter().enumerate() {
            lse[(row * heads + head) * columns + at.start] = x;
        }
    }
    work.read += done.read;
    work.searched += done.searched;
    Ok(())
}

fn run_unit(common: &Common<'_>, queries: &Queries, head: usize, is_last: bool) -> Result<Found> {
    thread_local! {
        static KEPT: RefCell<Kept> = const {
            RefCell::new(Kept {
                queries: Words::new(),
                turned: Words::new(),
                spare: Words::new(),
                keys: Vec::new(),
                seen_from: Vec::new(),
                scores: Vec::new(),
                split: Vec::new(),
                split_words: Words::new(),
                attend: Scratch::new(),
            })
        };
    }
    let Queries { row, first, columns } = queries;
    let Common { rule, args, group, shape, .. } = common;
    let residents = &common.residents[*row];
    let count = columns.len();
    let region = rule.region(*first, count)?;
    if rule.select.judges_pages(&region) {
        check_bounds((&residents.bounds, residents.even), &region)?;
    }
    KEPT.with_borrow_mut(|kept| {
        let Kept { queries: words, turned, spare, keys, seen_from, scores, split, split_words, attend } = kept;

        // The sampled queries first: the search has no use for the others.
        let chosen_by = sampled(count, args.query_stride);
        let offset = chosen_by.start;
        let chosen_by: Vec<usize> = chosen_by.step_by(args.query_stride).collect();
        let mut inputs = Inputs::new();
        let num_queries = chosen_by.len() * group;
        let rows = query_rows(common, queries, head, &chosen_by);
        let mine = bring(common, &rows, words);
        let mut scorer = Scorer {
            common,
            residents,
            head,
            queries: mine,
            num_queries,
            edge: (first + offset) as i64 + 1 - rule.window as i64,
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

        let all: Vec<usize> = (0..count).collect();
        let mine = bring(common, &query_rows(common, queries, head, &all), words);
        // All queries see what the first one sees, but for its window; and from there on it is a matter of who asks.
        let near = region.end.min((first + 1).saturating_sub(rule.window) as u32);
        let mut stretches = Vec::new();
        rule.read(&region, &chosen, *first, &mut |stretch: Range<u32>| {
            let far = stretch.start..stretch.end.min(near);
            if !far.is_empty() {
                stretches.push(far);
            }
        });
        stretches.push(near..(first + count) as u32);
        let mut is_kept = vec![false; (region.end - near) as usize];
        let sinks = near..region.end.min(rule.sinks as u32);
        for stretch in chosen.blocks.iter().rev().take_while(|b| b.end > near).chain([&sinks]) {
            for t in stretch.start.max(near)..stretch.end.min(region.end) {
                is_kept[(t - near) as usize] = true;
            }
        }
        let mut reads = Reads {
            residents,
            head,
            bytes: common.bytes,
            stretches,
            next: 0,
            first: *first as u32,
            count: count as u32,
            window: rule.window.min(u32::MAX as usize / 2) as u32,
            near,
            kept: is_kept,
            read: 0,
        };
        let block = Block {
            shape: *shape,
            queries: mine,
            num_rows: count * group,
            group: *group,
            scale: args.scale,
            softcap: args.softcap,
            sinks: args.sinks.map(|sinks| &sinks[head * group..(head + 1) * group]),
        };
        let place = Rows { common, row: *row, column: columns.start, head };
        // SAFETY: the level is available, and the kernel is the arena's; `Residents` hands out rows of the arena; no other unit has
        // these queries and heads.
        unsafe { (common.kernels.attend)(&block, &mut reads, &place, attend) };
        let (read, searched) = (reads.read, chosen.reads);
        Ok(Found { read, searched, choice: is_last.then_some((chosen, inputs)) })
    })
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

/// Refuses whatever does not fit together; returns the number of query heads of a group.
fn check(
    arena: &Arena,
    choices: &[Choice],
    args: &Sparse<'_>,
    out: &ElemsMut<'_>,
    lse: Option<&[f32]>,
) -> Result<usize> {
    args.level.check()?;
    threads::check(args.threads)?;
    check_dtype("q", args.q.elems(), arena.dtype())?;
    check_dtype("out", out.as_ref(), arena.dtype())?;
    let shape = args.q.shape();
    let [rows, heads, columns, dim] = shape;
    let kv_heads = arena.num_kv_heads();
    if dim != arena.key_dim() || heads == 0 || !heads.is_multiple_of(kv_heads) {
        let expected = format!("[rows, multiple of {kv_heads}, columns, {}]", arena.key_dim());
        return Err(Error::Shape { what: "q", expected, got: format!("{shape:?}") });
    }
    check_len("rows", args.rows.len(), rows)?;
    check_len("choices", choices.len(), rows)?;
    check_len("out", out.len(), rows * columns * heads * arena.value_dim())?;
    if let Some(lse) = lse {
        check_len("lse", lse.len(), rows * heads * columns)?;
    }
    if let Some(sinks) = args.sinks {
        check_len("sinks", sinks.len(), heads)?;
    }
    for (what, n) in [("query_block", args.query_block), ("query_stride", args.query_stride)] {
        if n == 0 {
            return Err(Error::OutOfRange { what, expected: "at least 1", got: "0".to_string() });
        }
    }
    if args.softcap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(Error::OutOfRange { what: "softcap", expected: "above 0", got: format!("{:?}", args.softcap) });
    }
    Ok(heads / kv_heads)
}

fn kernels(level: Level, dtype: Dtype, dots: bool) -> Kernels {
    macro_rules! typed {
        ($level:ident) => {
            match dtype {
                Dtype::F32 => unit::$level::kernels::<f32, false>(),
                Dtype::BF16 => unit::$level::kernels::<bf16, false>(),
                Dtype::F16 => unit::$level::kernels::<f16, false>(),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if dots => unit::avx512_bf16::kernels::<bf16, true>(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => typed!(avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => typed!(avx2),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => typed!(neon),
        _ => typed!(portable),
    }
}
