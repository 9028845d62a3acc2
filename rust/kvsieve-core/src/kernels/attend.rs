//! Exact attention of a few queries over the blocks of an arena: the decode kernel.
//!
//! A unit of work is one query of one row, one key-value head, and a stretch of its spans. Keys and values are read once: all query
//! heads of the group are scored from the same load. Keys are taken in tiles of at most a block with an online softmax between
//! tiles; units are merged by log-sum-exp. Where a unit ends depends on the spans alone, so the number of threads changes no bit.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::isa::Level;
use super::rotate::{Layout, Rope, load_row, rotate_row};
use super::simd::{Elem, Simd, exp, tanh};
use super::threads;
use super::view::{Dtype, ElemsMut, View, check_dtype, check_len};
use crate::ids::BLOCK;
use crate::plan::{Span, Spans};
use crate::store::arena::Arena;
use crate::{Error, Result};

/// Keys of one tile: scores of a whole block stay in the first-level cache between their making and their use.
const TILE: usize = BLOCK as usize;

/// Keys of one unit, at least. A function of nothing else, so that results do not depend on the machine.
const SPLIT: usize = 4096;

/// Waking another thread costs as long as reading about this many bytes.
const INLINE: usize = 256 << 10;

/// The rotations that one step's spans need: made once, used by every layer and head that shares the rope.
#[derive(Debug)]
pub struct SpanTrig {
    rope: Arc<Rope>,
    /// For each span which of the rotations below, plus one; 0 when the shift is 0.
    variant: Vec<u32>,
    /// For each distinct shift cosines, then sines.
    table: Vec<f32>,
}

impl SpanTrig {
    pub fn new(spans: &Spans, rope: &Arc<Rope>) -> Self {
        let mut seen: HashMap<i64, u32> = HashMap::from([(0, 0)]);
        let mut table = Vec::new();
        let mut last = (0, 0);
        let variant = spans.spans.iter().map(|span| {
            if span.shift != last.0 {
                let next = seen.len() as u32;
                let number = *seen.entry(span.shift).or_insert_with(|| {
                    rope.push_trig(span.shift, &mut table);
                    next
                });
                last = (span.shift, number);
            }
            last.1
        });
        let variant = variant.collect();
        SpanTrig { rope: Arc::clone(rope), variant, table }
    }

    pub fn rope(&self) -> &Arc<Rope> {
        &self.rope
    }
}

/// Everything about the attention but the keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// `[rows, heads, queries, key_dim]`, of the arena's dtype.
    pub q: View<'a>,
    pub spans: &'a Spans,
    /// `None` for layers without position encoding: shifts and key rotations are then ignored.
    pub trig: Option<&'a SpanTrig>,
    /// Multiplies the logits, before the soft cap.
    pub scale: f32,
    /// `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// For each query head one more logit that takes part in the normalisation and has no value. Neither scaled nor capped.
    pub sinks: Option<&'a [f32]>,
    /// Whether the rope's factor is still to be applied, to query and key. Not when the model itself has rotated them.
    pub apply_factor: bool,
    pub threads: usize,
    pub level: Level,
}

/// Length of the `mass` of [`attend`].
pub fn mass_len(spans: &Spans, num_kv_heads: usize) -> usize {
    spans.spans.iter().map(|s| s.hi.saturating_sub(s.lo) as usize).sum::<usize>() * num_kv_heads
}

/// What all units have in common.
struct Common<'a> {
    arena: &'a Arena,
    args: &'a Attend<'a>,
    group: usize,
    /// The square of the rope's factor, applied to the query for both sides.
    factor: f32,
}

/// A stretch of one item's spans for one key-value head.
struct Unit<'a> {
    item: usize,
    kv_head: usize,
    spans: std::ops::Range<usize>,
    /// `[group][value_dim]` unnormalised sums, then `[group]` maxima, then `[group]` sums of weights.
    partial: &'a mut [f32],
    /// `[group][keys of the unit]`; empty when the mass is not wanted.
    logits: &'a mut [f32],
}

/// Attends every query of the step to its spans.
///
/// * `out`: `[rows, queries, heads, value_dim]`, of the dtype of `q`. A query that reads nothing gets zeros.
/// * `lse`: `[rows, heads, queries]`, the log-sum-exp of the logits without the learned sink; `-inf` when nothing was read.
/// * `mass`: for each item (`row * queries + query`) `[kv_heads][keys in the order of the spans]`, one item after another: the
///   probability of each key (learned sink included in the normalisation), summed over the query heads of the group.
pub fn attend(
    arena: &Arena,
    args: &Attend<'_>,
    mut out: ElemsMut<'_>,
    mut lse: Option<&mut [f32]>,
    mass: Option<&mut [f32]>,
) -> Result<()> {
    let group = check(arena, args, &out, lse.as_deref(), mass.as_deref())?;
    let [_, heads, queries, _] = args.q.shape();
    let spans = args.spans;
    let (kv_heads, value_dim) = (arena.num_kv_heads(), arena.value_dim());
    let factor = match args.trig {
        Some(trig) if args.apply_factor => (trig.rope.factor() * trig.rope.factor()) as f32,
        _ => 1.0,
    };
    let common = Common { arena, args, group, factor };

    // Where the units begin and how many keys each has.
    let mut stretches: Vec<(usize, std::ops::Range<usize>, usize)> = Vec::new();
    let mut total_keys = 0;
    for (item, w) in spans.starts.windows(2).enumerate() {
        let end = w[1] as usize;
        let (mut first, mut keys) = (w[0] as usize, 0);
        for (at, span) in spans.spans.iter().enumerate().take(end).skip(first) {
            keys += (span.hi - span.lo) as usize;
            if keys >= SPLIT || at + 1 == end {
                stretches.push((item, first..at + 1, keys));
                total_keys += keys;
                (first, keys) = (at + 1, 0);
            }
        }
    }

    let stride = group * (value_dim + 2);
    let wants_mass = mass.is_some();
    let mut partials = vec![0f32; stretches.len() * kv_heads * stride];
    let mut logits = vec![0f32; if wants_mass { total_keys * heads } else { 0 }];
    let mut units: Vec<Unit<'_>> = Vec::with_capacity(stretches.len() * kv_heads);
    {
        let mut chunks = partials.chunks_exact_mut(stride);
        let mut rest = &mut logits[..];
        for (item, range, keys) in &stretches {
            for kv_head in 0..kv_heads {
                let (mine, others) = rest.split_at_mut(if wants_mass { keys * group } else { 0 });
                rest = others;
                let partial = chunks.next().unwrap_or_default();
                units.push(Unit { item: *item, kv_head, spans: range.clone(), partial, logits: mine });
            }
        }
    }
    let run = kernel(arena);
    let bytes = total_keys * arena.token_bytes();
    if args.threads == 1 || units.len() <= 1 || bytes < INLINE {
        units.iter_mut().for_each(|unit| run(args.level, &common, unit));
    } else {
        let pool = threads::pool(args.threads)?;
        pool.install(|| units.par_iter_mut().with_max_len(1).for_each(|unit| run(args.level, &common, unit)));
    }
    drop(units);

    // Merge the units of each item and head.
    let mut first = 0;
    let mut sums = vec![0f32; value_dim];
    let mut mass_rest = mass.unwrap_or_default();
    let mut logits_at = 0;
    for item in 0..spans.starts.len() - 1 {
        let (row, query) = (item / queries, item % queries);
        let mine = &stretches[first..first + stretches[first..].iter().take_while(|s| s.0 == item).count()];
        let item_keys: usize = mine.iter().map(|s| s.2).sum();
        let (item_mass, others) = mass_rest.split_at_mut(if wants_mass { item_keys * kv_heads } else { 0 });
        mass_rest = others;
        item_mass.fill(0.0);
        for head in 0..heads {
            let (kv_head, g) = (head / group, head % group);
            let partial = |i: usize| &partials[((first + i) * kv_heads + kv_head) * stride..][..stride];
            let max_of = |i: usize| partial(i)[group * value_dim + g];
            let max = (0..mine.len()).map(max_of).fold(f32::NEG_INFINITY, f32::max);
            sums.fill(0.0);
            let mut weights = 0f32;
            for i in 0..mine.len() {
                let c = if max_of(i) == f32::NEG_INFINITY { 0.0 } else { (max_of(i) - max).exp() };
                let part = partial(i);
                weights += c * part[group * (value_dim + 1) + g];
                sums.iter_mut().zip(&part[g * value_dim..]).for_each(|(s, x)| *s += c * x);
            }
            let this_lse = if weights == 0.0 { f32::NEG_INFINITY } else { max + weights.ln() };
            if let Some(lse) = &mut lse {
                lse[(row * heads + head) * queries + query] = this_lse;
            }
            let sink = args.sinks.map_or(0.0, |sinks| (sinks[head] - max).exp());
            let norm = if weights == 0.0 { 0.0 } else { 1.0 / (weights + sink) };
            write_out(&mut out, arena.dtype(), (item * heads + head) * value_dim, &sums, norm);
            if wants_mass && item_keys > 0 {
                let mut at = logits_at;
                let mut to = kv_head * item_keys;
                for (_, _, keys) in mine {
                    let unit = &logits[at + kv_head * group * keys + g * keys..][..*keys];
                    for (m, x) in item_mass[to..to + keys].iter_mut().zip(unit) {
                        *m += (x - max).exp() * norm;
                    }
                    at += kv_heads * group * keys;
                    to += keys;
                }
            }
        }
        logits_at += item_keys * heads;
        first += mine.len();
    }
    Ok(())
}

fn write_out(out: &mut ElemsMut<'_>, dtype: Dtype, at: usize, sums: &[f32], norm: f32) {
    // An empty item has sums of zero and a norm of zero.
    match (out, dtype) {
        (ElemsMut::F32(out), _) => out[at..].iter_mut().zip(sums).for_each(|(o, s)| *o = s * norm),
        (ElemsMut::Bits(out), Dtype::F16) => {
            out[at..].iter_mut().zip(sums).for_each(|(o, s)| *o = f16::of_f32(s * norm).to_bits());
        }
        (ElemsMut::Bits(out), _) => {
            out[at..].iter_mut().zip(sums).for_each(|(o, s)| *o = bf16::of_f32(s * norm).to_bits());
        }
    }
}

/// Refuses whatever does not fit together; returns the number of query heads of a group.
fn check(
    arena: &Arena,
    args: &Attend<'_>,
    out: &ElemsMut<'_>,
    lse: Option<&[f32]>,
    mass: Option<&[f32]>,
) -> Result<usize> {
    args.level.check()?;
    if args.threads == 0 {
        return Err(Error::OutOfRange { what: "threads", expected: "at least 1", got: "0".to_string() });
    }
    let spans = args.spans;
    let shape = args.q.shape();
    let [rows, heads, queries, dim] = shape;
    check_dtype("q", args.q.elems(), arena.dtype())?;
    check_dtype("out", out.as_ref(), arena.dtype())?;
    let fits = (rows, queries, dim) == (spans.num_rows, spans.num_queries, arena.key_dim());
    if !fits || heads == 0 || !heads.is_multiple_of(arena.num_kv_heads()) {
        let (kv_heads, key_dim) = (arena.num_kv_heads(), arena.key_dim());
        let expected = format!("[{}, multiple of {kv_heads}, {}, {key_dim}]", spans.num_rows, spans.num_queries);
        return Err(Error::Shape { what: "q", expected, got: format!("{shape:?}") });
    }
    let items = rows * queries;
    check_len("out", out.len(), items * heads * arena.value_dim())?;
    if let Some(lse) = lse {
        check_len("lse", lse.len(), items * heads)?;
    }
    if let Some(sinks) = args.sinks {
        check_len("sinks", sinks.len(), heads)?;
    }
    if args.softcap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(Error::OutOfRange { what: "softcap", expected: "above 0", got: format!("{:?}", args.softcap) });
    }
    check_len("spans.starts", spans.starts.len(), items + 1)?;
    let ends = (spans.starts[0], spans.starts[items] as usize);
    if ends != (0, spans.spans.len()) || !spans.starts.is_sorted() {
        let expected = format!("ascending from 0 to {}", spans.spans.len());
        return Err(Error::Shape { what: "spans.starts", expected, got: format!("{:?}", spans.starts) });
    }
    for span in &spans.spans {
        arena.check_span(span.block, span.lo, span.hi)?;
    }
    if let Some(trig) = args.trig {
        check_len("trig", trig.variant.len(), spans.spans.len())?;
        if trig.rope.rotary_dim() > dim {
            let expected = format!("at most {dim} rotated channels");
            return Err(Error::Shape { what: "rope", expected, got: trig.rope.rotary_dim().to_string() });
        }
    }
    if let Some(mass) = mass {
        check_len("mass", mass.len(), mass_len(spans, arena.num_kv_heads()))?;
    }
    Ok(heads / arena.num_kv_heads())
}

type Kernel = fn(Level, &Common<'_>, &mut Unit<'_>);

/// The compiled kernel for the arena's dtype and head size. Sizes that are common are constants, so that their loops unroll.
fn kernel(arena: &Arena) -> Kernel {
    match (arena.dtype(), arena.key_dim(), arena.value_dim()) {
        (Dtype::F32, 64, 64) => run_sized::<f32, 64>,
        (Dtype::F32, 128, 128) => run_sized::<f32, 128>,
        (Dtype::F32, ..) => run_sized::<f32, 0>,
        (Dtype::BF16, 64, 64) => run_sized::<bf16, 64>,
        (Dtype::BF16, 128, 128) => run_sized::<bf16, 128>,
        (Dtype::BF16, ..) => run_sized::<bf16, 0>,
        (Dtype::F16, 64, 64) => run_sized::<f16, 64>,
        (Dtype::F16, 128, 128) => run_sized::<f16, 128>,
        (Dtype::F16, ..) => run_sized::<f16, 0>,
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<super::simd::Avx2, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<super::simd::Avx512, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn run_neon<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<super::simd::Neon, E, D>(common, unit, scratch) }
}

fn run_sized<E: Elem, const D: usize>(level: Level, common: &Common<'_>, unit: &mut Unit<'_>) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { lines: Vec::new() }) };
    }
    SCRATCH.with_borrow_mut(|scratch| match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `check` has made sure that the level is available and that all spans lie in blocks with memory; `E` is the
        // arena's dtype and `D`, unless 0, its dims, by `kernel`.
        Level::Avx512 => unsafe { run_avx512::<E, D>(common, unit, scratch) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { run_avx2::<E, D>(common, unit, scratch) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Level::Neon => unsafe { run_neon::<E, D>(common, unit, scratch) },
        // SAFETY: as above.
        _ => unsafe { run_unit::<super::simd::Portable, E, D>(common, unit, scratch) },
    });
}

/// A cache line, to align the scratch memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Memory that a thread keeps from unit to unit.
struct Scratch {
    lines: Vec<Line>,
}

/// Bytes as `f32`s, cut into the parts that a unit needs.
struct Parts<'a> {
    /// The scaled queries of the group, `[group][width]`, zero beyond the channels.
    base: &'a mut [f32],
    /// The same, rotated for the spans at hand.
    turned: &'a mut [f32],
    /// Keys of one span, rotated: `[TILE][width]`.
    keys: &'a mut [f32],
    /// Scores and then weights, `[group][TILE]`.
    scores: &'a mut [f32],
    /// Sums, `[group][value_width]`.
    sums: &'a mut [f32],
    max: &'a mut [f32],
    total: &'a mut [f32],
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

impl Scratch {
    fn cut(&mut self, group: usize, width: usize, value_width: usize) -> Parts<'_> {
        let sizes = [group * width, group * width, TILE * width, group * TILE, group * value_width, padded(group)];
        let need = sizes.iter().sum::<usize>() + sizes[5];
        if self.lines.len() * 16 < need {
            self.lines.resize(need.div_ceil(16), Line([0.0; 16]));
        }
        let lines: &mut [[f32; 16]] = {
            // SAFETY: a `Line` is 16 floats in 64 bytes, without padding; the borrow is passed on whole.
            unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len()) }
        };
        let rest = lines.as_flattened_mut();
        let (base, rest) = rest.split_at_mut(sizes[0]);
        let (turned, rest) = rest.split_at_mut(sizes[1]);
        let (keys, rest) = rest.split_at_mut(sizes[2]);
        let (scores, rest) = rest.split_at_mut(sizes[3]);
        let (sums, rest) = rest.split_at_mut(sizes[4]);
        let (max, rest) = rest.split_at_mut(sizes[5]);
        let total = &mut rest[..sizes[5]];
        Parts { base, turned, keys, scores, sums, max, total }
    }
}

/// A span with its addresses.
#[derive(Clone, Copy)]
struct Piece<E> {
    keys: *const E,
    values: *const E,
    len: usize,
    slot: u32,
    variant: u32,
    rotate: bool,
}

/// Consecutive spans of at most [`TILE`] keys in all.
struct Tile<E> {
    pieces: [Piece<E>; TILE],
    num_pieces: usize,
    len: usize,
}

impl<E: Elem> Tile<E> {
    fn new() -> Self {
        let none =
            Piece { keys: std::ptr::null(), values: std::ptr::null(), len: 0, slot: 0, variant: 0, rotate: false };
        Tile { pieces: [none; TILE], num_pieces: 0, len: 0 }
    }

    /// Takes as many of the spans from `*next` on as fit; spans are never cut.
    #[inline(always)]
    fn fill(&mut self, common: &Common<'_>, kv_head: usize, next: &mut usize, end: usize) {
        (self.num_pieces, self.len) = (0, 0);
        while *next < end {
            let span: Span = common.args.spans.spans[*next];
            let len = (span.hi - span.lo) as usize;
            if self.len + len > TILE {
                break;
            }
            if len > 0 {
                let (keys, values) = common.arena.rows(span.block, kv_head, span.lo);
                let variant = common.args.trig.map_or(0, |trig| trig.variant[*next]);
                let rotate = span.rotate_keys && common.args.trig.is_some();
                let (keys, values) = (keys.cast(), values.cast());
                self.pieces[self.num_pieces] = Piece { keys, values, len, slot: span.lo, variant, rotate };
                self.num_pieces += 1;
                self.len += len;
            }
            *next += 1;
        }
    }
}

/// Copies the group's queries, scaled, and with the rope's factor where it is still missing.
///
/// # Safety
/// As for [`Simd`]; `E` is the dtype of the queries.
#[inline(always)]
unsafe fn load_queries<S: Simd, E: Elem>(common: &Common<'_>, unit: &Unit<'_>, width: usize, base: &mut [f32]) {
    let [_, _, queries, dim] = common.args.q.shape();
    for (g, to) in base.chunks_exact_mut(width).enumerate() {
        let from = common.args.q.row(unit.item / queries, unit.kv_head * common.group + g, unit.item % queries);
        // SAFETY: a checked row of `dim` elements of the dtype that the caller vouches for.
        unsafe { load_row::<S, E>(from.as_bytes_ptr().cast(), &mut to[..dim]) };
        to[..dim].iter_mut().for_each(|x| *x *= common.args.scale);
        to[dim..].fill(0.0);
        if common.factor != 1.0 {
            let rotary = common.args.trig.map_or(0, |trig| trig.rope.rotary_dim());
            to[..rotary].iter_mut().for_each(|x| *x *= common.factor);
        }
    }
}

/// Rotates the keys of a piece by their slots, into `[TILE][width]`.
///
/// # Safety
/// As for [`Simd`]; the piece holds `len` rows of `dim` elements.
#[inline(always)]
unsafe fn rotate_keys<S: Simd, E: Elem>(piece: &Piece<E>, rope: &Rope, dim: usize, width: usize, to: &mut [f32]) {
    let pairs = rope.inv_freq().len();
    let table = rope.in_block();
    let by_vectors = rope.layout() == Layout::Half && pairs.is_multiple_of(S::LANES);
    for i in 0..piece.len {
        let trig = &table[(piece.slot as usize + i) * 2 * pairs..][..2 * pairs];
        let to = &mut to[i * width..][..dim];
        // SAFETY: row `i` of the piece has `dim` elements, of which `2 * pairs` are rotated; `to` has as many; the table has
        // `pairs` cosines and `pairs` sines a slot.
        unsafe {
            let from = piece.keys.add(i * dim);
            if by_vectors {
                for c in (0..pairs).step_by(S::LANES) {
                    let (a, b) = (E::load::<S>(from.add(c)), E::load::<S>(from.add(pairs + c)));
                    let (cos, sin) = (S::load(trig.as_ptr().add(c)), S::load(trig.as_ptr().add(pairs + c)));
                    S::store(to.as_mut_ptr().add(c), S::sub(S::mul(a, cos), S::mul(b, sin)));
                    S::store(to.as_mut_ptr().add(pairs + c), S::fma(b, cos, S::mul(a, sin)));
                }
                load_row::<S, E>(from.add(2 * pairs), &mut to[2 * pairs..]);
            } else {
                load_row::<S, E>(from, to);
                rotate_row(to, &trig[..pairs], &trig[pairs..], rope.layout());
            }
        }
    }
}

/// Cache lines to ask for while computing: row `i` of something is `row` bytes long.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u8,
    row: usize,
}

impl Ahead {
    /// Asks for bytes `lo..hi` of the `n` rows from `i` on.
    #[inline(always)]
    unsafe fn ask<S: Simd>(self, i: usize, lo: usize, hi: usize) {
        let mut at = lo;
        while at < hi {
            // SAFETY: prefetching reads nothing; any address will do.
            unsafe { S::prefetch(self.from.wrapping_add(i * self.row + at)) };
            at += 64;
        }
    }
}

/// Scores `n` keys (rows of `dim` elements, `stride` apart) against `HB` queries: `scores[h * TILE + i]`.
///
/// # Safety
/// As for [`Simd`]; the rows are readable; `HB` queries of `width` floats; `n` scores for each.
#[inline(always)]
unsafe fn score<S: Simd, E: Elem, const HB: usize>(
    (keys, stride, n, dim): (*const E, usize, usize, usize),
    (q, width): (*const f32, usize),
    scores: *mut f32,
    ahead: Option<Ahead>,
) {
    let whole = dim / S::LANES * S::LANES;
    let mut i = 0;
    // SAFETY: rows `i..i + 4` are below `n`; channels below `dim`, the last few by a partial load; the queries are padded with
    // zeros to whole vectors.
    unsafe {
        while i + 4 <= n {
            let k = keys.add(i * stride);
            let mut acc = [[S::splat(0.0); 4]; HB];
            let mut c = 0;
            while c < whole {
                let x: [S::V; 4] = [
                    E::load::<S>(k.add(c)),
                    E::load::<S>(k.add(stride + c)),
                    E::load::<S>(k.add(2 * stride + c)),
                    E::load::<S>(k.add(3 * stride + c)),
                ];
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = S::load(q.add(h * width + c));
                    for j in 0..4 {
                        acc[j] = S::fma(x[j], q, acc[j]);
                    }
                }
                if let Some(ahead) = ahead {
                    // Four rows are one stretch. A few lines at a time: a burst would fill the queue of misses and stall.
                    ahead.ask::<S>(i, 4 * ahead.row * c / whole, 4 * ahead.row * (c + S::LANES) / whole);
                }
                c += S::LANES;
            }
            if whole < dim {
                for j in 0..4 {
                    let x = E::load_part::<S>(k.add(j * stride + whole), dim - whole);
                    for (h, acc) in acc.iter_mut().enumerate() {
                        acc[j] = S::fma(x, S::load(q.add(h * width + whole)), acc[j]);
                    }
                }
            }
            for (h, acc) in acc.iter().enumerate() {
                S::sum4(scores.add(h * TILE + i), *acc);
            }
            i += 4;
        }
        while i < n {
            let k = keys.add(i * stride);
            let mut acc = [S::splat(0.0); HB];
            let mut c = 0;
            while c < whole {
                let x = E::load::<S>(k.add(c));
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x, S::load(q.add(h * width + c)), *acc);
                }
                c += S::LANES;
            }
            if whole < dim {
                let x = E::load_part::<S>(k.add(whole), dim - whole);
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x, S::load(q.add(h * width + whole)), *acc);
                }
            }
            for (h, acc) in acc.iter().enumerate() {
                *scores.add(h * TILE + i) = S::sum(*acc);
            }
            i += 1;
        }
    }
}

/// Adds the weighted values of a tile to `HB` sums, `C` vectors of channels from `c0` on. A partial last vector when `PART`.
///
/// # Safety
/// As for [`Simd`]; the pieces hold rows of `dim` elements; `HB` rows of weights and of sums.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Elem, const HB: usize, const C: usize, const PART: bool>(
    tile: &Tile<E>,
    (dim, c0): (usize, usize),
    weights: *const f32,
    (sums, width): (*mut f32, usize),
    ahead: Option<Ahead>,
) {
    // SAFETY: channels `c0..c0 + C * LANES` are below `dim` (below it by a partial load when `PART`), and below `width`, which is
    // whole vectors; key `t` of the tile has a weight.
    unsafe {
        let mut acc = [[S::splat(0.0); C]; HB];
        for (h, acc) in acc.iter_mut().enumerate() {
            for (j, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(sums.add(h * width + c0 + j * S::LANES));
            }
        }
        let mut t = 0;
        for piece in &tile.pieces[..tile.num_pieces] {
            let mut v = piece.values.add(c0);
            for _ in 0..piece.len {
                let mut x = [S::splat(0.0); C];
                for (j, x) in x.iter_mut().enumerate() {
                    *x = if PART { E::load_part::<S>(v, dim - c0) } else { E::load::<S>(v.add(j * S::LANES)) };
                }
                for (h, acc) in acc.iter_mut().enumerate() {
                    let w = S::splat(*weights.add(h * TILE + t));
                    for j in 0..C {
                        acc[j] = S::fma(w, x[j], acc[j]);
                    }
                }
                if let Some(ahead) = ahead {
                    let (lo, hi) = (c0 * size_of::<E>(), (c0 + C * S::LANES) * size_of::<E>());
                    ahead.ask::<S>(t, lo, hi);
                }
                v = v.wrapping_add(dim);
                t += 1;
            }
        }
        for (h, acc) in acc.iter().enumerate() {
            for (j, acc) in acc.iter().enumerate() {
                S::store(sums.add(h * width + c0 + j * S::LANES), *acc);
            }
        }
    }
}

/// [`weigh`] for all channels.
///
/// # Safety
/// As for [`weigh`].
#[inline(always)]
unsafe fn weigh_all<S: Simd, E: Elem, const HB: usize>(
    tile: &Tile<E>,
    dim: usize,
    weights: *const f32,
    (sums, width): (*mut f32, usize),
    ahead: Option<Ahead>,
) {
    let mut c = 0;
    // SAFETY: each call covers channels that are still below `dim`.
    unsafe {
        while c + 4 * S::LANES <= dim {
            weigh::<S, E, HB, 4, false>(tile, (dim, c), weights, (sums, width), ahead);
            c += 4 * S::LANES;
        }
        while c + S::LANES <= dim {
            weigh::<S, E, HB, 1, false>(tile, (dim, c), weights, (sums, width), ahead);
            c += S::LANES;
        }
        if c < dim {
            weigh::<S, E, HB, 1, true>(tile, (dim, c), weights, (sums, width), ahead);
        }
    }
}

/// Turns the scores of one head into weights relative to the greatest so far, and rescales what was summed up before.
///
/// # Safety
/// As for [`Simd`]; `TILE` scores, of which `n` are set.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], n: usize, max: &mut f32, total: &mut f32, sums: &mut [f32]) {
    let end = n.next_multiple_of(S::LANES);
    scores[n..end].fill(f32::NEG_INFINITY);
    let p = scores.as_mut_ptr();
    // SAFETY: `end <= scores.len()`, for lanes divide a tile; sums are whole vectors.
    unsafe {
        let mut top = S::splat(f32::NEG_INFINITY);
        for i in (0..end).step_by(S::LANES) {
            // NaN is passed over here and comes back through the weights.
            top = S::max(S::load(p.add(i)), top);
        }
        let top = S::top(top).max(*max);
        let base = S::splat(if top == f32::NEG_INFINITY { 0.0 } else { top });
        let mut sum = S::splat(0.0);
        for i in (0..end).step_by(S::LANES) {
            let w = exp::<S>(S::sub(S::load(p.add(i)), base));
            S::store(p.add(i), w);
            sum = S::add(sum, w);
        }
        if top > *max {
            let c = if *max == f32::NEG_INFINITY { 0.0 } else { (*max - top).exp() };
            *total *= c;
            let c = S::splat(c);
            for i in (0..sums.len()).step_by(S::LANES) {
                let at = sums.as_mut_ptr().add(i);
                S::store(at, S::mul(S::load(at), c));
            }
            *max = top;
        }
        *total += S::sum(sum);
    }
}

/// # Safety
/// As for [`Simd`]; all spans lie in blocks with memory; `E` is the dtype of arena and queries; `D` is 0 or both dims.
#[inline(always)]
unsafe fn run_unit<S: Simd, E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    let (dim, value_dim) = if D > 0 { (D, D) } else { (common.arena.key_dim(), common.arena.value_dim()) };
    let (width, value_width) = (padded(dim), padded(value_dim));
    let group = common.group;
    let Parts { base, turned, keys, scores, sums, max, total } = scratch.cut(group, width, value_width);
    // SAFETY: the caller's promise.
    unsafe { load_queries::<S, E>(common, unit, width, base) };
    sums.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    total.fill(0.0);

    // Two, by turns: while one is worked on, the keys of the other are already on their way.
    let mut tiles = [Tile::<E>::new(), Tile::<E>::new()];
    let mut turn = 0;
    let (mut next, end) = (unit.spans.start, unit.spans.end);
    let unit_keys = unit.logits.len() / group;
    let mut done = 0;
    let mut variant = 0;
    tiles[0].fill(common, unit.kv_head, &mut next, end);
    while tiles[turn].len > 0 {
        tiles[1 - turn].fill(common, unit.kv_head, &mut next, end);
        let (tile, following) = (&tiles[turn], &tiles[1 - turn]);

        let mut at = 0;
        for piece in &tile.pieces[..tile.num_pieces] {
            if let Some(trig) = common.args.trig
                && piece.variant != 0
                && piece.variant != variant
            {
                variant = piece.variant;
                let pairs = trig.rope.inv_freq().len();
                let (cos, sin) = trig.table[(variant as usize - 1) * 2 * pairs..][..2 * pairs].split_at(pairs);
                for (from, to) in base.chunks_exact(width).zip(turned.chunks_exact_mut(width)) {
                    to.copy_from_slice(from);
                    rotate_row(to, cos, sin, trig.rope.layout());
                }
            }
            let q: &[f32] = if piece.variant == 0 { base } else { turned };
            let ahead = Ahead { from: piece.values.cast(), row: value_dim * size_of::<E>() };
            let rotated = match common.args.trig {
                // SAFETY: the caller's promise: `piece.len` rows of `dim` elements.
                Some(trig) if piece.rotate => unsafe {
                    rotate_keys::<S, E>(piece, &trig.rope, dim, width, keys);
                    true
                },
                _ => false,
            };
            let mut h = 0;
            while h < group {
                let ahead = (h == 0).then_some(ahead);
                let q = (q[h * width..].as_ptr(), width);
                let to = scores[h * TILE + at..].as_mut_ptr();
                // SAFETY: `piece.len` rows at either place; queries and scores for the heads from `h` on, of which there are at
                // least as many as each arm takes.
                unsafe {
                    if rotated {
                        let rows = (keys.as_ptr(), width, piece.len, dim);
                        match (group - h).min(S::HEADS) {
                            4 => score::<S, f32, 4>(rows, q, to, ahead),
                            3 => score::<S, f32, 3>(rows, q, to, ahead),
                            2 => score::<S, f32, 2>(rows, q, to, ahead),
                            _ => score::<S, f32, 1>(rows, q, to, ahead),
                        }
                    } else {
                        let rows = (piece.keys, dim, piece.len, dim);
                        match (group - h).min(S::HEADS) {
                            4 => score::<S, E, 4>(rows, q, to, ahead),
                            3 => score::<S, E, 3>(rows, q, to, ahead),
                            2 => score::<S, E, 2>(rows, q, to, ahead),
                            _ => score::<S, E, 1>(rows, q, to, ahead),
                        }
                    }
                }
                h += S::HEADS.min(group - h);
            }
            at += piece.len;
        }

        for g in 0..group {
            let scores = &mut scores[g * TILE..(g + 1) * TILE];
            if let Some(cap) = common.args.softcap {
                // SAFETY: lanes divide a tile.
                unsafe {
                    for i in (0..tile.len).step_by(S::LANES) {
                        let p = scores.as_mut_ptr().add(i);
                        S::store(p, S::mul(S::splat(cap), tanh::<S>(S::mul(S::load(p), S::splat(1.0 / cap)))));
                    }
                }
            }
            if unit_keys > 0 {
                unit.logits[g * unit_keys + done..][..tile.len].copy_from_slice(&scores[..tile.len]);
            }
            let sums = &mut sums[g * value_width..(g + 1) * value_width];
            // SAFETY: a whole tile of scores; sums are padded to whole vectors.
            unsafe { softmax::<S>(scores, tile.len, &mut max[g], &mut total[g], sums) };
        }

        let ahead = Ahead { from: following.pieces[0].keys.cast(), row: dim * size_of::<E>() };
        let mut h = 0;
        while h < group {
            let ahead = (h == 0 && following.num_pieces > 0).then_some(ahead);
            let weights = scores[h * TILE..].as_ptr();
            let to = (sums[h * value_width..].as_mut_ptr(), value_width);
            // SAFETY: weights and sums for the heads from `h` on, of which there are at least as many as each arm takes.
            unsafe {
                match (group - h).min(S::HEADS) {
                    4 => weigh_all::<S, E, 4>(tile, value_dim, weights, to, ahead),
                    3 => weigh_all::<S, E, 3>(tile, value_dim, weights, to, ahead),
                    2 => weigh_all::<S, E, 2>(tile, value_dim, weights, to, ahead),
                    _ => weigh_all::<S, E, 1>(tile, value_dim, weights, to, ahead),
                }
            }
            h += S::HEADS.min(group - h);
        }
        done += tile.len;
        turn = 1 - turn;
    }

    for g in 0..group {
        unit.partial[g * value_dim..(g + 1) * value_dim]
            .copy_from_slice(&sums[g * value_width..g * value_width + value_dim]);
    }
    unit.partial[group * value_dim..group * (value_dim + 1)].copy_from_slice(&max[..group]);
    unit.partial[group * (value_dim + 1)..].copy_from_slice(&total[..group]);
}
