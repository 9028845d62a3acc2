//! Exact attention of a few queries over the blocks of an arena: the decode kernel.
//!
//! A unit of work is one query of one row, one key-value head, and a stretch of its spans. Keys and values are read once: all query
//! heads of the group are scored from the same load. Keys are taken in tiles of at most a block with an online softmax between
//! tiles; units are merged by log-sum-exp. Where a unit ends depends on the spans alone, so the number of threads changes no bit.

mod codes;
mod inner;
mod thin;
mod unit;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::isa::Level;
use super::simd::Elem;
use super::threads::{self, BREATH, INLINE};
use crate::ids::BLOCK;
use crate::plan::Spans;
use crate::rope::Rope;
use crate::storage::arena::Arena;
use crate::storage::packed::Channels;
use crate::tensor::{Dtype, ElemsMut, View, check_dtype, check_len};
use crate::{Error, Result};
use unit::{Scratch, run_unit};

/// Keys of one tile: scores of a whole block stay in the first-level cache between their making and their use.
const TILE: usize = BLOCK as usize;

/// Keys of one unit, at least. A function of nothing else, so that results do not depend on the machine.
const SPLIT: usize = 4096;

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

    /// [`SpanTrig::new`] for thousands of shifts, as short spans here and there have them. From tables that all calls share, so a
    /// rotation may be off by a rounding.
    pub(crate) fn of_many(spans: &Spans, rope: &Arc<Rope>) -> Self {
        let most = spans.spans.iter().map(|span| span.shift).max().unwrap_or(0);
        let least = spans.spans.iter().map(|span| span.shift).min().unwrap_or(0);
        if least < 0 || most > MANY {
            return SpanTrig::new(spans, rope);
        }
        let (distances, width) = (rope.distances(most), rope.rotary_dim());
        let mut seen = vec![0u32; most as usize + 1];
        let (mut table, mut num) = (Vec::new(), 0);
        let variant = spans.spans.iter().map(|span| {
            let number = &mut seen[span.shift as usize];
            if *number == 0 && span.shift != 0 {
                num += 1;
                *number = num;
                let at = table.len();
                table.resize(at + width, 0.0);
                distances.trig(span.shift, &mut table[at..]);
            }
            *number
        });
        let variant = variant.collect();
        SpanTrig { rope: Arc::clone(rope), variant, table }
    }

    pub fn rope(&self) -> &Arc<Rope> {
        &self.rope
    }
}

/// Shifts up to here are looked up in a list.
const MANY: i64 = 1 << 22;

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
    /// Which of the item's stretches.
    stretch: usize,
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
    out: ElemsMut<'_>,
    lse: Option<&mut [f32]>,
    mass: Option<&mut [f32]>,
) -> Result<()> {
    attend_unless(arena, args, out, lse, mass, &|| false)
}

/// [`attend`], unless `stop` says so: asked every few milliseconds, and then [`Error::Interrupted`], with nothing written.
pub fn attend_unless(
    arena: &Arena,
    args: &Attend<'_>,
    out: ElemsMut<'_>,
    lse: Option<&mut [f32]>,
    mass: Option<&mut [f32]>,
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    run_all(arena, args, false, (out, lse, mass), stop)
}

/// [`attend_unless`] where every key-value head reads spans of its own: head `h` of item `i` those from
/// `spans.starts[i * kv_heads + h]` on, so there are `items * kv_heads + 1` starts.
pub fn attend_apart(
    arena: &Arena,
    args: &Attend<'_>,
    out: ElemsMut<'_>,
    lse: Option<&mut [f32]>,
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    run_all(arena, args, true, (out, lse, None), stop)
}

/// `apart`: whether each key-value head has a list of spans of its own.
fn run_all(
    arena: &Arena,
    args: &Attend<'_>,
    apart: bool,
    (mut out, mut lse, mass): (ElemsMut<'_>, Option<&mut [f32]>, Option<&mut [f32]>),
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let group = check(arena, args, apart, &out, lse.as_deref(), mass.as_deref())?;
    let [_, heads, queries, _] = args.q.shape();
    let spans = args.spans;
    let (kv_heads, value_dim) = (arena.num_kv_heads(), arena.value_dim());
    // Lists of spans of an item, and heads that read each.
    let (lists, sharing) = if apart { (kv_heads, 1) } else { (1, kv_heads) };
    let factor = match args.trig {
        Some(trig) if args.apply_factor => (trig.rope.factor() * trig.rope.factor()) as f32,
        _ => 1.0,
    };
    let common = Common { arena, args, group, factor };

    // Where the units begin and how many keys each has; and which of these stretches belong to each list.
    let mut stretches: Vec<(usize, std::ops::Range<usize>, usize)> = Vec::new();
    let mut firsts = Vec::with_capacity(spans.starts.len());
    let mut total_keys = 0;
    for (list, w) in spans.starts.windows(2).enumerate() {
        firsts.push(stretches.len());
        let end = w[1] as usize;
        let (mut first, mut keys) = (w[0] as usize, 0);
        for (at, span) in spans.spans.iter().enumerate().take(end).skip(first) {
            keys += (span.hi - span.lo) as usize;
            if keys >= SPLIT || at + 1 == end {
                stretches.push((list, first..at + 1, keys));
                total_keys += keys;
                (first, keys) = (at + 1, 0);
            }
        }
    }

    firsts.push(stretches.len());

    let stride = group * (value_dim + 2);
    let wants_mass = mass.is_some();
    let mut partials = vec![0f32; stretches.len() * sharing * stride];
    let mut logits = vec![0f32; if wants_mass { total_keys * heads } else { 0 }];
    let mut units: Vec<Unit<'_>> = Vec::with_capacity(stretches.len() * sharing);
    {
        let mut chunks = partials.chunks_exact_mut(stride);
        let mut rest = &mut logits[..];
        let mut stretch = 0;
        for (i, (list, range, keys)) in stretches.iter().enumerate() {
            stretch = if i > 0 && stretches[i - 1].0 == *list { stretch + 1 } else { 0 };
            for head in 0..sharing {
                let (item, kv_head) = (list / lists, list % lists + head);
                let (mine, others) = rest.split_at_mut(if wants_mass { keys * group } else { 0 });
                rest = others;
                let partial = chunks.next().unwrap_or_default();
                units.push(Unit { item, kv_head, stretch, spans: range.clone(), partial, logits: mine });
            }
        }
    }
    // All queries of a row over one stretch after each other: the first finds the keys in memory, the others in a cache.
    units.sort_by_key(|unit| (unit.item / queries, unit.stretch, unit.kv_head));
    let kernel = kernel(args.level, arena);
    let bytes = total_keys * arena.token_bytes() / lists;
    let alone = args.threads == 1 || units.len() <= 1 || bytes < INLINE;
    let pool = if alone { None } else { Some(threads::pool(args.threads)?) };
    let breath = (BREATH / (bytes / units.len().max(1)).max(1)).max(1) * args.threads;
    for (i, units) in units.chunks_mut(breath).enumerate() {
        if i > 0 && stop() {
            return Err(Error::Interrupted);
        }
        match &pool {
            None => units.iter_mut().for_each(|unit| run(kernel, &common, unit)),
            Some(pool) => {
                pool.install(|| units.par_iter_mut().with_max_len(1).for_each(|unit| run(kernel, &common, unit)))
            }
        }
    }
    drop(units);

    // Merge the units of each item and head.
    let mut sums = vec![0f32; value_dim];
    let mut mass_rest = mass.unwrap_or_default();
    let mut logits_at = 0;
    for item in 0..(spans.starts.len() - 1) / lists {
        let (row, query) = (item / queries, item % queries);
        let item_keys: usize = stretches[firsts[item * lists]..firsts[(item + 1) * lists]].iter().map(|s| s.2).sum();
        let (item_mass, others) = mass_rest.split_at_mut(if wants_mass { item_keys * kv_heads } else { 0 });
        mass_rest = others;
        item_mass.fill(0.0);
        for head in 0..heads {
            let (kv_head, g) = (head / group, head % group);
            let list = item * lists + kv_head % lists;
            let first = firsts[list];
            let mine = &stretches[first..firsts[list + 1]];
            let partial = |i: usize| &partials[((first + i) * sharing + kv_head % sharing) * stride..][..stride];
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
    apart: bool,
    out: &ElemsMut<'_>,
    lse: Option<&[f32]>,
    mass: Option<&[f32]>,
) -> Result<usize> {
    args.level.check()?;
    threads::check(args.threads)?;
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
    let lists = if apart { items * arena.num_kv_heads() } else { items };
    check_len("spans.starts", spans.starts.len(), lists + 1)?;
    let ends = (spans.starts[0], spans.starts[lists] as usize);
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
        check_pairs(arena, trig, spans)?;
    }
    if let Some(mass) = mass {
        check_len("mass", mass.len(), mass_len(spans, arena.num_kv_heads()))?;
    }
    Ok(heads / arena.num_kv_heads())
}

/// Refuses to rotate packed keys that have lost one channel of a pair.
fn check_pairs(arena: &Arena, trig: &SpanTrig, spans: &Spans) -> Result<()> {
    let Some(packed) = arena.packed() else { return Ok(()) };
    let mut sound: Option<&Channels> = None;
    for (span, &variant) in spans.spans.iter().zip(&trig.variant) {
        if !span.block.is_packed() || (variant == 0 && !span.rotate_keys) {
            continue;
        }
        let channels = packed.channels_of(span.block)?;
        if !sound.is_some_and(|sound| std::ptr::eq(sound, &**channels)) {
            if !channels.keeps_pairs_of(&trig.rope) {
                return Err(Error::Unsupported(
                    "keys whose channels were dropped one by one cannot be rotated; drop whole rotary pairs",
                ));
            }
            sound = Some(&**channels);
        }
    }
    Ok(())
}

type Kernel = unsafe fn(&Common<'_>, &mut Unit<'_>, &mut Scratch);

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
    unsafe { run_unit::<super::simd::Avx512<false>, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512_bf16<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<super::simd::Avx512<true>, E, D>(common, unit, scratch) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn run_neon<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<super::simd::Neon, E, D>(common, unit, scratch) }
}

unsafe fn run_portable<E: Elem, const D: usize>(common: &Common<'_>, unit: &mut Unit<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on to the caller.
    unsafe { run_unit::<super::simd::Portable, E, D>(common, unit, scratch) }
}

/// The compiled kernel for the level, and for the arena's dtype and head size. Sizes that are common are constants, so that their
/// loops unroll.
fn kernel(level: Level, arena: &Arena) -> Kernel {
    macro_rules! sized {
        ($run:ident, $elem:ty) => {
            match (arena.key_dim(), arena.value_dim()) {
                _ if arena.packed().is_some() => $run::<$elem, 0>,
                (64, 64) => $run::<$elem, 64>,
                (96, 96) => $run::<$elem, 96>,
                (128, 128) => $run::<$elem, 128>,
                _ => $run::<$elem, 0>,
            }
        };
    }
    macro_rules! typed {
        ($run:ident) => {
            match arena.dtype() {
                Dtype::F32 => sized!($run, f32),
                Dtype::BF16 => sized!($run, bf16),
                Dtype::F16 => sized!($run, f16),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if arena.dtype() == Dtype::BF16 => sized!(run_avx512_bf16, bf16),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => typed!(run_avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => typed!(run_avx2),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => typed!(run_neon),
        _ => typed!(run_portable),
    }
}

fn run(kernel: Kernel, common: &Common<'_>, unit: &mut Unit<'_>) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
    }
    // SAFETY: `check` has made sure that the level is available and that all spans lie in blocks with memory; the kernel was chosen
    // for the arena's dtype and dims.
    SCRATCH.with_borrow_mut(|scratch| unsafe { kernel(common, unit, scratch) });
}
