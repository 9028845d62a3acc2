//! Exact attention of a few queries over the blocks of an arena: the decode kernel.
//!
//! A unit of work is one query of one row, one key-value head, and a stretch of its spans. Keys and values are read once: all query
//! heads of the group are scored from the same load. Keys are taken in tiles of at most a block with an online softmax between
//! tiles; units are merged by log-sum-exp. Where a unit ends depends on the spans alone, so the number of threads changes no bit.

mod ahead;
mod args;
mod codes;
mod compiled;
mod heads;
mod heaviest;
mod inner;
mod job;
mod merge;
mod packed;
mod scores;
mod scratch;
mod sums;
mod thin;
mod tile;
mod trig;
mod unit;
mod units;

use super::threads::{self, BREATH, INLINE};
use crate::storage::arena::Arena;
use crate::tensor::ElemsMut;
use crate::{Error, Result};
use args::check;
pub use args::{Attend, mass_len};
pub(super) use codes::CodeScorer;
use compiled::{kernel, run};
pub use heaviest::{Choice, Heaviest};
use merge::{Found, Results, merge};
pub use trig::SpanTrig;
use units::{Common, Stretches, Unit};

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
    run_all(arena, args, false, Results { out, lse, mass, highest: false }, stop)
}

/// [`attend_unless`], where `mass` is the highest probability of each key among the query heads of the group, instead of their sum.
pub fn attend_highest(
    arena: &Arena,
    args: &Attend<'_>,
    out: ElemsMut<'_>,
    mass: &mut [f32],
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    run_all(arena, args, false, Results { out, lse: None, mass: Some(mass), highest: true }, stop)
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
    run_all(arena, args, true, Results { out, lse, mass: None, highest: false }, stop)
}

/// [`attend_unless`] that adds up the heaviest values alone, of each query head its own; `kept`, `[rows, heads, queries]`, gets the
/// probability mass of these among the keys, 0 when nothing was read. What is not added up is not read either.
pub fn attend_heaviest(
    arena: &Arena,
    args: &Attend<'_>,
    keep: &Heaviest,
    out: ElemsMut<'_>,
    kept: &mut [f32],
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let choice = choose_heaviest(arena, args, keep, stop)?;
    add_heaviest(arena, args, &choice, out, kept)
}

/// What [`attend_heaviest`] adds up. No value is read, so none need be in memory.
pub fn choose_heaviest(arena: &Arena, args: &Attend<'_>, keep: &Heaviest, stop: &dyn Fn() -> bool) -> Result<Choice> {
    keep.check()?;
    let group = check(arena, args, (false, false), None, None, None)?;
    let common = Common { values: false, ..Common::new(arena, args, group) };
    let found = find(&common, false, true, stop)?;
    heaviest::choose_all(&common, &found, keep)
}

/// Adds up what was chosen with the same arguments, and is in memory by now.
pub fn add_heaviest(
    arena: &Arena,
    args: &Attend<'_>,
    choice: &Choice,
    out: ElemsMut<'_>,
    kept: &mut [f32],
) -> Result<()> {
    let group = check(arena, args, (false, false), Some(&out), Some(kept), None)?;
    heaviest::fill(&Common::new(arena, args, group), choice, out, kept)
}

/// [`attend_apart`]; `mass`, for each list after another, is the probability of each key in the order of its spans, summed over the query
/// heads of the group.
pub fn attend_apart_mass(
    arena: &Arena,
    args: &Attend<'_>,
    out: ElemsMut<'_>,
    lse: Option<&mut [f32]>,
    mass: &mut [f32],
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    run_all(arena, args, true, Results { out, lse, mass: Some(mass), highest: false }, stop)
}

/// `apart`: whether each key-value head has a list of spans of its own.
fn run_all(arena: &Arena, args: &Attend<'_>, apart: bool, results: Results<'_>, stop: &dyn Fn() -> bool) -> Result<()> {
    let group = check(arena, args, (apart, true), Some(&results.out), results.lse.as_deref(), results.mass.as_deref())?;
    let common = Common::new(arena, args, group);
    let found = find(&common, apart, results.mass.is_some(), stop)?;
    merge(&common, &found, results);
    Ok(())
}

/// Runs all units. `logits`: whether those are wanted.
fn find(common: &Common<'_>, apart: bool, logits: bool, stop: &dyn Fn() -> bool) -> Result<Found> {
    let Common { arena, args, group, .. } = *common;
    let stretches = Stretches::new(args.spans, arena.num_kv_heads(), apart);
    let [_, heads, queries, _] = args.q.shape();
    let stride = group * (arena.value_dim() + 2);
    let mut partials = vec![0f32; stretches.num_units() * stride];
    let mut logits = vec![0f32; if logits { stretches.total_keys * heads / stretches.lists } else { 0 }];
    let mut units = stretches.units((&mut partials, stride), &mut logits, group);
    // All queries of a row over one stretch after each other: the first finds the keys in memory, the others in a cache.
    units.sort_by_key(|unit| (unit.item / queries, unit.stretch, unit.kv_head));
    run_units(common, &mut units, stretches.total_keys * arena.token_bytes() / stretches.lists, stop)?;
    drop(units);
    Ok(Found { stretches, partials, stride, logits })
}

/// Runs the units, which read so many bytes in all, a breath at a time.
fn run_units(common: &Common<'_>, units: &mut [Unit<'_>], bytes: usize, stop: &dyn Fn() -> bool) -> Result<()> {
    let threads = common.args.threads;
    let kernel = kernel(common.args.level, common.arena);
    let workers = if bytes < INLINE { 1 } else { threads };
    let breath = (BREATH / (bytes / units.len().max(1)).max(1)).max(1) * threads;
    for (i, units) in units.chunks_mut(breath).enumerate() {
        if i > 0 && stop() {
            return Err(Error::Interrupted);
        }
        threads::for_each(workers, units, |unit| run(kernel, common, unit))?;
    }
    Ok(())
}
