//! Scores of scattered keys, in place: what the searches of [`crate::select`] ask for.
//!
//! A search reads a key here and a key there, and which ones it reads next depends on what it found: no stream that the hardware could
//! foresee. But one level of a tree asks for hundreds of keys at once, so those ahead are asked for in the second-level cache while
//! the ones at hand are scored. All queries that share a choice meet a key while it is in registers.
//!
//! Keys that lie as the queries meet them are scored in place. Packed keys, and raw ones that are rotated to their distances, are made
//! into rows of `f32` first ([`super::rows`]), some dozens at a time.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;

use super::isa::Level;
use super::rotate::{load_row, rotate_row};
use super::rows::{Making, Source, make};
use super::simd::{Elem, Simd};
use super::threads;
use crate::ids::{BLOCK, Run};
use crate::rope::Rope;
use crate::select::hip::Hip;
use crate::select::infinite::Infinite;
use crate::select::{Chosen, Score};
use crate::storage::arena::Arena;
use crate::tensor::{Dtype, Elems, View, check_dtype};
use crate::{Error, Result};

/// Keys that are asked for ahead of the one at hand.
const AHEAD: usize = 24;

/// Keys that are made at a time: their rows stay in the first-level cache, or near it.
const MADE: usize = 64;

/// Queries of one row that share a choice: `columns` of `q`, one after another in the text.
#[derive(Clone, Debug)]
pub struct QueryBlock<'a> {
    pub row: usize,
    pub columns: Range<usize>,
    /// The row's residents, in text order. All of them: a resident's number is its position.
    pub runs: &'a [Run],
    /// Where each run is seen. Empty where [`Search::turn`] does not ask.
    pub shown: &'a [Shown],
    /// The position of the first query.
    pub first: usize,
    /// The residents to choose from.
    pub region: Range<u32>,
}

/// At which distance the last of a row's queries sees a run of its residents, as [`Span::shift`](crate::plan::Span) and
/// [`Span::rotate_keys`](crate::plan::Span) say it. A query that many residents before it sees rotated keys so much nearer, and others
/// where that one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    pub shift: i64,
    pub rotate_keys: bool,
}

/// How keys that were stored before their rotation meet the queries.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    pub rope: &'a Rope,
    /// Whether the rope's factor is still to be applied, to query and key.
    pub apply_factor: bool,
    /// All keys at one distance, the window's: the query is rotated by that, and keys stay as they lie. Otherwise keys are scored where
    /// they are shown.
    pub relative: bool,
}

/// Which search, and for InfiniteHiP where it starts.
#[derive(Clone, Copy, Debug)]
pub enum Method<'a> {
    Hip(&'a Hip),
    /// From this stage on, with what went into each stage the last time, by query block and key-value head.
    Infinite(&'a Infinite, usize),
}

/// For each query block and key-value head, what went into each stage of InfiniteHiP.
pub type Inputs = Vec<Vec<Range<u32>>>;

/// Everything about a search but the keys.
#[derive(Clone, Copy, Debug)]
pub struct Search<'a> {
    /// `[rows, heads, columns, key_dim]`, of the arena's dtype and in the frame of its keys.
    pub q: View<'a>,
    /// `None` to score keys as they lie.
    pub turn: Option<Turn<'a>>,
    pub blocks: &'a [QueryBlock<'a>],
    /// Of a query block, every so many queries are scored, counted back from its last one.
    pub query_stride: usize,
    /// A query does not score the keys that its window shows anyway.
    pub window: usize,
    pub method: Method<'a>,
    pub threads: usize,
    pub level: Level,
}

/// Of `count` queries, the first that is scored, and the end; from there by `stride`.
pub(super) fn sampled(count: usize, stride: usize) -> Range<usize> {
    count.saturating_sub(1) % stride..count
}

/// Runs of residents, for looking up where one lies.
struct Places<'a> {
    runs: Vec<Run>,
    /// Where each run is seen; empty where that is not asked.
    shown: Vec<Shown>,
    /// The first resident of each run.
    starts: Vec<u32>,
    /// Its key for head 0, and the bytes from head to head. Null where keys are packed.
    keys: Vec<(*const u8, usize)>,
    len: u32,
    /// Whether all runs but the last are whole blocks.
    even: bool,
    packed: bool,
    /// Of each run its bounds for head 0, and the bytes from head to head; null where it has none. Empty where that is not asked.
    bounds: Vec<(*const u8, usize)>,
    _arena: PhantomData<&'a Arena>,
}

// SAFETY: the pointers are into an arena that is borrowed, shared, for as long as a `Places` lives, and are only read through.
unsafe impl Sync for Places<'_> {}

impl<'a> Places<'a> {
    fn new(arena: &'a Arena, runs: &[Run], shown: &[Shown], bounded: bool) -> Result<Self> {
        let mut places = Places {
            runs: Vec::with_capacity(runs.len()),
            shown: Vec::with_capacity(shown.len()),
            starts: Vec::with_capacity(runs.len()),
            keys: Vec::with_capacity(runs.len()),
            len: 0,
            even: true,
            packed: false,
            bounds: Vec::new(),
            _arena: PhantomData,
        };
        for (i, run) in runs.iter().enumerate().filter(|(_, run)| run.lo < run.hi) {
            arena.check_span(run.block, run.lo, run.hi)?;
            let (key, stride) = if run.block.is_packed() {
                (std::ptr::null(), 0)
            } else {
                let (key, _) = arena.rows(run.block, 0, run.lo);
                let next = if arena.num_kv_heads() > 1 { arena.rows(run.block, 1, run.lo).0 } else { key };
                (key, next as usize - key as usize)
            };
            places.even &= places.len as usize == places.runs.len() * BLOCK as usize;
            places.packed |= run.block.is_packed();
            places.starts.push(places.len);
            places.keys.push((key, stride));
            places.runs.push(*run);
            places.shown.extend(shown.get(i));
            places.len += run.len();
            if bounded {
                places.bounds.push(bounds_of(arena, run));
            }
        }
        Ok(places)
    }

    fn run_of(&self, i: u32) -> usize {
        if self.even { (i / BLOCK) as usize } else { self.starts.partition_point(|&s| s <= i) - 1 }
    }

    /// The key of resident `i` for `head`, and how many residents from it on lie in a row.
    #[inline]
    fn key(&self, i: u32, head: usize, row_bytes: usize) -> (*const u8, u32) {
        let run = self.run_of(i);
        let (base, stride) = self.keys[run];
        let end = self.starts.get(run + 1).copied().unwrap_or(self.len);
        (base.wrapping_add(head * stride + (i - self.starts[run]) as usize * row_bytes), end - i)
    }

    /// Pushes what to make the keys of `stretch` from.
    fn sources(&self, stretch: Range<u32>, head: usize, row_bytes: usize, to: &mut Vec<Source>) {
        let mut i = stretch.start;
        while i < stretch.end {
            let at = self.run_of(i);
            let (run, (base, stride)) = (self.runs[at], self.keys[at]);
            let offset = i - self.starts[at];
            let n = (run.len() - offset).min(stretch.end - i);
            for offset in offset..offset + n {
                let slot = run.lo + offset;
                let key =
                    if base.is_null() { base } else { base.wrapping_add(head * stride + offset as usize * row_bytes) };
                let distance = self.shown.get(at).map_or(0, |shown| match shown.rotate_keys {
                    true => shown.shift - i64::from(slot),
                    false => shown.shift,
                });
                to.push(Source { key, block: run.block, slot, distance });
            }
            i += n;
        }
    }

    /// The greatest distance of any key.
    fn most(&self) -> i64 {
        self.shown.iter().map(|shown| shown.shift).max().unwrap_or(0)
    }
}

/// The bounds of a run's block for head 0, and the bytes from head to head; null where it has none.
pub(super) fn bounds_of(arena: &Arena, run: &Run) -> (*const u8, usize) {
    let whole = run.lo == 0 && run.hi == BLOCK && !run.block.is_packed();
    let Some(row) = arena.bound(run.block, 0).filter(|_| whole) else { return (std::ptr::null(), 0) };
    let next = if arena.num_kv_heads() > 1 { arena.bound(run.block, 1).unwrap_or(row) } else { row };
    (row, next as usize - row as usize)
}

/// Refuses a region that is not made of blocks with bounds; `even` if all runs but the last are whole blocks.
pub(super) fn check_bounds((bounds, even): (&[(*const u8, usize)], bool), region: &Range<u32>) -> Result<()> {
    let blocks = (region.start / BLOCK) as usize..region.end.div_ceil(BLOCK) as usize;
    let all = bounds.get(blocks).is_some_and(|all| all.iter().all(|(row, _)| !row.is_null()));
    if even && all && region.start.is_multiple_of(BLOCK) {
        return Ok(());
    }
    Err(Error::Unsupported(
        "blocks are judged by bounds only where all tokens are kept, in whole blocks that have them",
    ))
}

/// A batch of keys and the queries that score them.
struct Batch<'a> {
    /// Addresses, a multiple of four of them: the last is repeated.
    keys: &'a [*const u8],
    /// For each key the first query that may see it; empty when all may.
    seen_from: &'a [u32],
    dim: usize,
    /// `[queries][width]`, zero beyond `dim`; as `bf16` where they are that, else empty.
    queries: &'a [f32],
    dots: &'a [bf16],
    width: usize,
    num_queries: usize,
    out: &'a mut [f32],
}

type Kernel = unsafe fn(&mut Batch<'_>);

/// Rows of queries, `width` apart.
#[derive(Clone, Copy)]
pub(super) struct Queries {
    /// Zero beyond the channels.
    pub wide: *const f32,
    /// The same as `bf16`, where products of those are asked for.
    pub dots: *const bf16,
    pub width: usize,
}

impl Queries {
    /// Those from the `h`-th on.
    #[inline(always)]
    pub fn from(self, h: usize) -> Self {
        let Queries { wide, dots, width } = self;
        Queries { wide: wide.wrapping_add(h * width), dots: dots.wrapping_add(h * width), width }
    }
}

/// Four keys, wherever they lie, against `HB` queries: four scores for each, `stride` apart.
///
/// # Safety
/// As for [`Simd`]; four keys of `dim` elements, `HB` queries, and room for their scores; `dots` are filled if `DOTS`, and then `dim`
/// is a multiple of `2 * LANES`.
#[inline(always)]
pub(super) unsafe fn four<S: Simd, E: Elem, const HB: usize, const DOTS: bool>(
    keys: [*const E; 4],
    queries: &Queries,
    dim: usize,
    scores: *mut f32,
    stride: usize,
) {
    let Queries { wide, dots, width } = *queries;
    let whole = dim / S::LANES * S::LANES;
    // SAFETY: channels below `dim`, the last few by a partial load; queries are padded with zeros to whole vectors.
    unsafe {
        let mut acc = [[S::splat(0.0); 4]; HB];
        if DOTS {
            let mut c = 0;
            while c < dim {
                for (i, acc) in acc.iter_mut().enumerate() {
                    for j in 0..4 {
                        acc[j] = S::dot_bf16(acc[j], keys[j].cast::<bf16>().add(c), dots.add(i * width + c));
                    }
                }
                c += 2 * S::LANES;
            }
        } else {
            let mut c = 0;
            while c < whole {
                let mut x = [S::splat(0.0); 4];
                for j in 0..4 {
                    x[j] = E::load::<S>(keys[j].add(c));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let q = S::load(wide.add(i * width + c));
                    for j in 0..4 {
                        acc[j] = S::fma(x[j], q, acc[j]);
                    }
                }
                c += S::LANES;
            }
            if whole < dim {
                for j in 0..4 {
                    let x = E::load_part::<S>(keys[j].add(whole), dim - whole);
                    for (i, acc) in acc.iter_mut().enumerate() {
                        acc[j] = S::fma(x, S::load(wide.add(i * width + whole)), acc[j]);
                    }
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            S::sum4(scores.add(i * stride), acc);
        }
    }
}

/// Scores a batch: the greatest product of each key with a query that may see it.
///
/// # Safety
/// As for [`Simd`]; all keys are rows of `dim` elements of `E`; `D` is 0 or `dim`.
#[inline(always)]
unsafe fn run_batch<S: Simd, E: Elem, const D: usize>(batch: &mut Batch<'_>) {
    let dim = if D > 0 { D } else { batch.dim };
    let dots = S::DOTS && E::IS_BF16 && dim.is_multiple_of(2 * S::LANES) && !batch.dots.is_empty();
    let lines = (dim * size_of::<E>()).div_ceil(64);
    let num_keys = batch.keys.len();
    let queries = Queries { wide: batch.queries.as_ptr(), dots: batch.dots.as_ptr(), width: batch.width };
    for i in 0..num_keys.min(AHEAD) {
        for line in 0..lines {
            // SAFETY: any address may be asked for.
            unsafe { S::prefetch(batch.keys[i].wrapping_add(line * 64)) };
        }
    }
    for i in (0..num_keys).step_by(4) {
        for next in i + AHEAD..(i + AHEAD + 4).min(num_keys) {
            for line in 0..lines {
                // SAFETY: as above.
                unsafe { S::prefetch(batch.keys[next].wrapping_add(line * 64)) };
            }
        }
        let keys: [*const E; 4] =
            [batch.keys[i].cast(), batch.keys[i + 1].cast(), batch.keys[i + 2].cast(), batch.keys[i + 3].cast()];
        let mut from = [0; 4];
        if !batch.seen_from.is_empty() {
            from.copy_from_slice(&batch.seen_from[i..i + 4]);
        }
        let mut best = [f32::NEG_INFINITY; 4];
        // Queries that see none of the four come first, then those that see some.
        let mut h = from[0].min(from[1]).min(from[2]).min(from[3]) as usize;
        let latest = from[0].max(from[1]).max(from[2]).max(from[3]) as usize;
        while h < batch.num_queries {
            let count = (batch.num_queries - h).min(S::HEADS);
            let mut scores = [[f32::NEG_INFINITY; 4]; 4];
            let (to, queries) = (scores.as_flattened_mut().as_mut_ptr(), queries.from(h));
            // SAFETY: the caller's promise; `count` queries from `h` on, and room for four scores of each.
            unsafe {
                match (count, dots) {
                    (4, true) => four::<S, E, 4, true>(keys, &queries, dim, to, 4),
                    (4, false) => four::<S, E, 4, false>(keys, &queries, dim, to, 4),
                    (3, true) => four::<S, E, 3, true>(keys, &queries, dim, to, 4),
                    (3, false) => four::<S, E, 3, false>(keys, &queries, dim, to, 4),
                    (2, true) => four::<S, E, 2, true>(keys, &queries, dim, to, 4),
                    (2, false) => four::<S, E, 2, false>(keys, &queries, dim, to, 4),
                    (_, true) => four::<S, E, 1, true>(keys, &queries, dim, to, 4),
                    (_, false) => four::<S, E, 1, false>(keys, &queries, dim, to, 4),
                }
            }
            for (g, scores) in scores.iter_mut().enumerate().take(count) {
                if h + g < latest {
                    for j in 0..4 {
                        scores[j] = if h + g < from[j] as usize { f32::NEG_INFINITY } else { scores[j] };
                    }
                }
                // Without a branch: which is greater cannot be foreseen. NaN is less than everything.
                for j in 0..4 {
                    best[j] = if scores[j] > best[j] { scores[j] } else { best[j] };
                }
            }
            h += count;
        }
        batch.out[i..i + 4].copy_from_slice(&best);
    }
}

macro_rules! compiled {
    ($name:ident, $simd:ty, $arch:literal, $features:literal) => {
        #[cfg(target_arch = $arch)]
        #[target_feature(enable = $features)]
        unsafe fn $name<E: Elem, const D: usize>(batch: &mut Batch<'_>) {
            // SAFETY: passed on to the caller.
            unsafe { run_batch::<$simd, E, D>(batch) }
        }
    };
}
compiled!(run_avx2, super::simd::Avx2, "x86_64", "avx2,fma,f16c");
compiled!(run_avx512, super::simd::Avx512<false>, "x86_64", "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c");
compiled!(
    run_avx512_bf16,
    super::simd::Avx512<true>,
    "x86_64",
    "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
);
compiled!(run_neon, super::simd::Neon, "aarch64", "neon");

unsafe fn run_portable<E: Elem, const D: usize>(batch: &mut Batch<'_>) {
    // SAFETY: passed on to the caller.
    unsafe { run_batch::<super::simd::Portable, E, D>(batch) }
}

fn kernel(level: Level, dtype: Dtype, dim: usize) -> Kernel {
    macro_rules! sized {
        ($run:ident, $elem:ty) => {
            match dim {
                64 => $run::<$elem, 64>,
                128 => $run::<$elem, 128>,
                256 => $run::<$elem, 256>,
                _ => $run::<$elem, 0>,
            }
        };
    }
    macro_rules! typed {
        ($run:ident) => {
            match dtype {
                Dtype::F32 => sized!($run, f32),
                Dtype::BF16 => sized!($run, bf16),
                Dtype::F16 => sized!($run, f16),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if dtype == Dtype::BF16 => sized!(run_avx512_bf16, bf16),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => typed!(run_avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => typed!(run_avx2),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => typed!(run_neon),
        _ => typed!(run_portable),
    }
}

/// Memory that a thread keeps from search to search.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    dots: Vec<bf16>,
    keys: Vec<*const u8>,
    seen_from: Vec<u32>,
    scores: Vec<f32>,
    sources: Vec<Source>,
    /// Keys that were made, `[MADE][width]`.
    rows: Vec<f32>,
    /// Queries at the distance of the window, for the bounds of raw keys; empty where `queries` are that.
    by_content: Vec<f32>,
    /// Queries for bounds, as `queries` and `dots`: what is above zero of each channel, then what is below.
    split: Vec<f32>,
    split_dots: Vec<bf16>,
}

/// Scores for one query block and key-value head.
struct Scorer<'a> {
    places: &'a Places<'a>,
    /// How keys are made, where they do not lie as they are scored.
    making: Option<&'a Making<'a>>,
    head: usize,
    row_bytes: usize,
    dim: usize,
    width: usize,
    num_queries: usize,
    group: usize,
    /// Keys from here on are not seen by the first query, after as many more as the stride not by the second, and so on.
    edge: i64,
    stride: usize,
    kernel: Kernel,
    /// The kernel for bounds, which are twice as wide.
    bounds_kernel: Kernel,
    scratch: &'a mut Scratch,
}

impl Scorer<'_> {
    /// Scores `self.scratch.keys`; `num` of them are no repetition.
    fn run(&mut self, seen_from: Range<usize>, at: usize) {
        let Scratch { queries, dots, keys, seen_from: seen, scores, .. } = &mut *self.scratch;
        let mut batch = Batch {
            keys,
            seen_from: &seen[seen_from],
            dim: self.dim,
            queries,
            dots,
            width: self.width,
            num_queries: self.num_queries,
            out: &mut scores[at..at + keys.len()],
        };
        // SAFETY: `search` has checked the level, the runs and the region, so all keys are rows of the arena's dtype and width, or were
        // made as such of `f32`; the kernel was chosen for those.
        unsafe { (self.kernel)(&mut batch) };
    }

    /// Scores all stretches, key by key, into the scratch memory.
    fn score(&mut self, stretches: &[Range<u32>]) {
        let Scratch { keys, seen_from, scores, sources, rows, .. } = &mut *self.scratch;
        keys.clear();
        seen_from.clear();
        sources.clear();
        let count: usize = stretches.iter().map(ExactSizeIterator::len).sum();
        let whole = count.next_multiple_of(4);
        scores.resize(whole, 0.0);
        if count == 0 {
            return;
        }
        if stretches.iter().any(|s| i64::from(s.end) > self.edge) {
            for i in stretches.iter().flat_map(Clone::clone) {
                let hidden = (i64::from(i) + 1 - self.edge).max(0) as usize;
                seen_from.push((hidden.div_ceil(self.stride) * self.group) as u32);
            }
            seen_from.resize(whole, seen_from[count - 1]);
        }
        let hides = !seen_from.is_empty();
        let Some(making) = self.making else {
            keys.reserve(whole);
            for stretch in stretches {
                let mut i = stretch.start;
                while i < stretch.end {
                    let (key, n) = self.places.key(i, self.head, self.row_bytes);
                    let n = n.min(stretch.end - i);
                    for j in 0..n as usize {
                        keys.push(key.wrapping_add(j * self.row_bytes));
                    }
                    i += n;
                }
            }
            keys.resize(whole, keys[count - 1]);
            return self.run(if hides { 0..whole } else { 0..0 }, 0);
        };
        for stretch in stretches {
            self.places.sources(stretch.clone(), self.head, self.row_bytes, sources);
        }
        sources.resize(whole, sources[count - 1]);
        rows.resize(MADE * self.width, 0.0);
        for at in (0..whole).step_by(MADE) {
            let Scratch { keys, sources, rows, .. } = &mut *self.scratch;
            let mine = &sources[at..whole.min(at + MADE)];
            let ahead = &sources[whole.min(at + MADE)..whole.min(at + 2 * MADE)];
            // SAFETY: `search` has checked the runs, so all sources are keys of this head.
            unsafe { make(making, mine, ahead, self.width, rows) };
            keys.clear();
            keys.extend(rows.chunks_exact(self.width).take(mine.len()).map(|row| row.as_ptr().cast::<u8>()));
            let end = at + mine.len();
            self.run(if hides { at..end } else { 0..0 }, at);
        }
    }
}

impl Score for Scorer<'_> {
    fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>) {
        out.clear();
        self.score(stretches);
        out.reserve(stretches.len());
        let mut at = 0;
        for stretch in stretches {
            let mut best = f32::NEG_INFINITY;
            for &x in &self.scratch.scores[at..at + stretch.len()] {
                best = if x > best { x } else { best };
            }
            at += stretch.len();
            out.push(best);
        }
    }

    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        let (count, dim) = (blocks.len(), 2 * self.dim);
        if count == 0 {
            return;
        }
        let width = dim.next_multiple_of(32);
        let Scratch { queries, dots, keys, seen_from, by_content, split, split_dots, .. } = &mut *self.scratch;
        let queries = if by_content.is_empty() { queries } else { by_content };
        split.clear();
        split.resize(self.num_queries * width, 0.0);
        for (query, to) in queries.chunks_exact(self.width).zip(split.chunks_exact_mut(width)) {
            let (above, below) = to[..dim].split_at_mut(self.dim);
            for ((&x, above), below) in query.iter().zip(above).zip(below) {
                *(if x.is_sign_negative() { below } else { above }) = x;
            }
        }
        split_dots.clear();
        if !dots.is_empty() {
            split_dots.extend(split.iter().map(|&x| bf16::of_f32(x)));
        }
        let whole = count.next_multiple_of(4);
        let bounds = &self.places.bounds[blocks.start as usize..blocks.end as usize];
        keys.clear();
        keys.extend(bounds.iter().map(|(row, stride)| row.wrapping_add(self.head * stride)));
        keys.resize(whole, keys[count - 1]);
        seen_from.clear();
        if i64::from((blocks.end - 1) * BLOCK) >= self.edge {
            seen_from.extend(blocks.map(|block| {
                let hidden = (i64::from(block * BLOCK) + 1 - self.edge).max(0) as usize;
                (hidden.div_ceil(self.stride) * self.group) as u32
            }));
            seen_from.resize(whole, seen_from[count - 1]);
        }
        out.resize(whole, 0.0);
        let num_queries = self.num_queries;
        let mut batch = Batch { keys, seen_from, dim, queries: split, dots: split_dots, width, num_queries, out };
        // SAFETY: as in `run`; `search` has seen that every block of the region has bounds, two rows of the arena's dtype.
        unsafe { (self.bounds_kernel)(&mut batch) };
        out.truncate(count);
    }
}

/// Widens a row of queries.
fn widen(from: Elems<'_>, dtype: Dtype, to: &mut [f32]) {
    match dtype {
        // SAFETY (all): the portable level needs nothing; the view's row has as many elements as `to`, of this dtype.
        Dtype::F32 => unsafe { load_row::<super::simd::Portable, f32>(from.as_bytes_ptr().cast(), to) },
        Dtype::BF16 => unsafe { load_row::<super::simd::Portable, bf16>(from.as_bytes_ptr().cast(), to) },
        Dtype::F16 => unsafe { load_row::<super::simd::Portable, f16>(from.as_bytes_ptr().cast(), to) },
    }
}

/// Chooses for each query block and key-value head (`block * kv_heads + head`).
///
/// `inputs` is for InfiniteHiP, as many as results: read where a search starts in the middle, and written.
pub fn search(arena: &Arena, args: &Search<'_>, inputs: &mut [Inputs]) -> Result<Vec<Chosen>> {
    search_unless(arena, args, inputs, &|| false)
}

/// [`search`], unless `stop` says so: asked between query blocks, and then [`Error::Interrupted`]; `inputs` are then of no use.
pub fn search_unless(
    arena: &Arena,
    args: &Search<'_>,
    inputs: &mut [Inputs],
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Chosen>> {
    let group = check(arena, args, inputs.len())?;
    let kv_heads = arena.num_kv_heads();
    let bounded = matches!(args.method, Method::Infinite(infinite, 0) if infinite.is_bounded());
    let mut places: Vec<Places<'_>> = Vec::new();
    let mut place_of = Vec::with_capacity(args.blocks.len());
    for (i, block) in args.blocks.iter().enumerate() {
        let same =
            |other: &QueryBlock<'_>| std::ptr::eq(other.runs, block.runs) && std::ptr::eq(other.shown, block.shown);
        let known = args.blocks[..i].iter().position(same);
        match known {
            Some(j) => place_of.push(place_of[j]),
            None => {
                place_of.push(places.len());
                places.push(Places::new(arena, block.runs, block.shown, bounded)?);
            }
        }
        let have = places[place_of[i]].len;
        if block.region.start > block.region.end || block.region.end > have {
            let expected = format!("a region of the {have} residents");
            return Err(Error::Shape { what: "region", expected, got: format!("{:?}", block.region) });
        }
        check_shown(args, block, &places[place_of[i]])?;
        if let Method::Infinite(infinite, 0) = args.method
            && infinite.judges_bounds(&block.region)
        {
            let places = &places[place_of[i]];
            check_bounds((&places.bounds, places.even), &block.region)?;
        }
    }
    let one = |unit: usize, inputs: &mut Inputs| -> Result<Chosen> {
        let block = &args.blocks[unit / kv_heads];
        run_unit(arena, args, (block, &places[place_of[unit / kv_heads]]), (unit % kv_heads, group), inputs)
    };
    let units = args.blocks.len() * kv_heads;
    let mut none = vec![Inputs::new(); if inputs.is_empty() { units } else { 0 }];
    let inputs = if inputs.is_empty() { &mut none[..] } else { inputs };
    let stopped = AtomicBool::new(false);
    let alone = args.threads == 1 || units <= 1;
    let each = |(unit, inputs): (usize, &mut Inputs)| {
        if stopped.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        one(unit, inputs)
    };
    let pool = if alone { None } else { Some(threads::pool(args.threads)?) };
    // A breath is a round of query blocks: the longest takes some milliseconds.
    let breath = 4 * kv_heads * args.threads;
    let mut done = Vec::with_capacity(units);
    for (i, inputs) in inputs.chunks_mut(breath).enumerate() {
        if i > 0 && stop() {
            stopped.store(true, Ordering::Relaxed);
        }
        let first = i * breath;
        match &pool {
            None => {
                for (j, inputs) in inputs.iter_mut().enumerate() {
                    done.push(each((first + j, inputs))?);
                }
            }
            Some(pool) => {
                let found: Result<Vec<Chosen>> = pool.install(|| {
                    inputs.par_iter_mut().enumerate().with_max_len(1).map(|(j, x)| each((first + j, x))).collect()
                });
                done.extend(found?);
            }
        }
    }
    Ok(done)
}

fn run_unit(
    arena: &Arena,
    args: &Search<'_>,
    (block, places): (&QueryBlock<'_>, &Places<'_>),
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
            if !turn.relative && matches!(args.method, Method::Infinite(infinite, 0) if infinite.is_bounded()) {
                scratch.by_content.clone_from(&scratch.queries);
                let turn = Turn { relative: true, ..*turn };
                turn_queries(&turn, args.window, sampled, places, &mut scratch.by_content, (width, group));
            }
            turn_queries(turn, args.window, sampled, places, &mut scratch.queries, (width, group));
        }
        let rotates = args.turn.filter(|turn| !turn.relative).map(|turn| turn.rope.distances(places.most()));
        let making = Making { arena, head, distances: rotates, level: args.level };
        let makes = places.packed || making.distances.is_some();
        let kernel = kernel(args.level, if makes { Dtype::F32 } else { arena.dtype() }, dim);
        scratch.dots.clear();
        if arena.dtype() == Dtype::BF16 && args.turn.is_none() && !makes {
            // They were `bf16`, so nothing is rounded.
            scratch.dots.extend(scratch.queries.iter().map(|&x| bf16::of_f32(x)));
        }
        let mut scorer = Scorer {
            places,
            making: makes.then_some(&making),
            head,
            row_bytes: dim * arena.dtype().size(),
            dim,
            width,
            num_queries,
            group,
            edge: (block.first + offset) as i64 + 1 - args.window as i64,
            stride: args.query_stride,
            kernel,
            bounds_kernel: self::kernel(args.level, arena.dtype(), 2 * dim),
            scratch,
        };
        match args.method {
            Method::Hip(hip) => hip.search(block.region.clone(), &mut scorer),
            Method::Infinite(infinite, start) => infinite.search(block.region.clone(), start, inputs, &mut scorer),
        }
    })
}

/// Rotates the queries of a block, so that keys need to be rotated by no more than what [`Turn`] says.
fn turn_queries(
    turn: &Turn<'_>,
    window: usize,
    (first, stride): (usize, usize),
    places: &Places<'_>,
    queries: &mut [f32],
    (width, group): (usize, usize),
) {
    let factor = if turn.apply_factor { (turn.rope.factor() * turn.rope.factor()) as f32 } else { 1.0 };
    let pairs = turn.rope.inv_freq().len();
    let mut trig = Vec::with_capacity(2 * pairs);
    for (i, queries) in queries.chunks_exact_mut(group * width).enumerate() {
        // Keys are rotated to where the row's last query is, from which this one is so many residents away.
        let behind = (first + i * stride) as i64 + 1 - i64::from(places.len);
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

/// Refuses keys that cannot be scored where they are shown.
fn check_shown(args: &Search<'_>, block: &QueryBlock<'_>, places: &Places<'_>) -> Result<()> {
    let Some(turn) = args.turn else { return Ok(()) };
    if turn.rope.rotary_dim() > args.q.shape()[3] {
        let expected = format!("at most {} rotated channels", args.q.shape()[3]);
        return Err(Error::Shape { what: "rope", expected, got: turn.rope.rotary_dim().to_string() });
    }
    if turn.relative {
        return Ok(());
    }
    if places.shown.len() != places.runs.len() {
        let expected = format!("one for each of {} runs", places.runs.len());
        return Err(Error::Shape { what: "shown", expected, got: block.shown.len().to_string() });
    }
    let alone = block.columns.len() == 1 && block.first + 1 == places.len as usize;
    if !alone && places.shown.iter().any(|shown| !shown.rotate_keys) {
        return Err(Error::Unsupported(
            "keys at one distance from every query are scored there for a row's last query only; score by the relative rule",
        ));
    }
    Ok(())
}

/// Refuses whatever does not fit together; returns the number of query heads of a group.
fn check(arena: &Arena, args: &Search<'_>, num_inputs: usize) -> Result<usize> {
    args.level.check()?;
    threads::check(args.threads)?;
    check_dtype("q", args.q.elems(), arena.dtype())?;
    let shape = args.q.shape();
    let [rows, heads, columns, dim] = shape;
    let kv_heads = arena.num_kv_heads();
    if dim != arena.key_dim() || heads == 0 || !heads.is_multiple_of(kv_heads) {
        let expected = format!("[rows, multiple of {kv_heads}, columns, {}]", arena.key_dim());
        return Err(Error::Shape { what: "q", expected, got: format!("{shape:?}") });
    }
    for block in args.blocks {
        if block.row >= rows || block.columns.is_empty() || block.columns.end > columns {
            let expected = format!("queries of {rows} rows and {columns} columns");
            let got = format!("row {}, columns {:?}", block.row, block.columns);
            return Err(Error::Shape { what: "query block", expected, got });
        }
    }
    if args.query_stride == 0 {
        return Err(Error::OutOfRange { what: "query_stride", expected: "at least 1", got: "0".to_string() });
    }
    let starts_late = matches!(args.method, Method::Infinite(_, start) if start > 0);
    if num_inputs != args.blocks.len() * kv_heads && (num_inputs > 0 || starts_late) {
        let expected = format!("{} x {kv_heads}", args.blocks.len());
        return Err(Error::Shape { what: "inputs", expected, got: num_inputs.to_string() });
    }
    Ok(heads / kv_heads)
}
