//! Of each query head the heaviest values, added up by their exact probabilities.

use half::{bf16, f16};

use super::merge::{Found, Head, Norm, write_out};
use super::scratch::padded;
use super::units::Common;
use crate::ids::BlockId;
use crate::kernels::simd::{Elem, Simd, dispatch};
use crate::kernels::threads;
use crate::plan::{Span, Spans};
use crate::tensor::{Dtype, ElemsMut, check_len};
use crate::{Error, Result, fault};

/// Which values are added up: of the heaviest ones `top`, or fewer that have `mass` already. Of equal ones the earlier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heaviest {
    /// At least 1.
    pub top: usize,
    /// Of the probability of all keys, a learned sink not counted; above 0. At 1 and above it is never enough.
    pub mass: f32,
    /// Whether the probabilities of those that are added up are scaled to the sum of all.
    pub renormalise: bool,
}

impl Heaviest {
    pub(super) fn check(&self) -> Result<()> {
        crate::error::at_least_one("top", self.top)?;
        if self.mass.is_nan() || self.mass <= 0.0 {
            return Err(Error::OutOfRange { what: "mass", expected: "above 0", got: format!("{}", self.mass) });
        }
        Ok(())
    }
}

/// Keys that are looked at together: most of them hold nothing that could be chosen.
const LOOK: usize = 128;

const LANES: usize = 16;

/// So many are chosen first where only their mass says how many it takes.
const FIRST: usize = 64;

/// A logit and the number of its key.
type Candidate = (f32, u32);

/// What one head of an item adds up.
struct OfHead {
    /// In the order of the text.
    keys: Vec<Candidate>,
    max: f32,
    /// Of the sums.
    factor: f32,
    mass: f32,
}

/// What every head adds up, chosen before any value is read: of item after item every head.
pub struct Choice {
    heads: Vec<OfHead>,
    num_heads: usize,
}

impl Choice {
    /// The blocks of what is chosen, each once; `spans` are those that it was chosen from.
    pub fn blocks(&self, spans: &Spans) -> Vec<BlockId> {
        let heads = self.heads.iter().enumerate();
        let of_head = |(i, head): (usize, &OfHead)| {
            places(spans, i / self.num_heads, &head.keys).map(|(span, ..)| span.block).collect::<Vec<_>>()
        };
        let mut blocks: Vec<_> = heads.flat_map(of_head).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

/// What every head keeps.
pub(super) fn choose_all(common: &Common<'_>, found: &Found, keep: &Heaviest) -> Result<Choice> {
    let args = common.args;
    let num_heads = args.q.shape()[1];
    let items = args.spans.starts.len() - 1;
    // Where the logits of each item begin.
    let mut starts = vec![0; items];
    let mut at = 0;
    for (item, start) in starts.iter_mut().enumerate() {
        *start = at;
        at += found.stretches.of_list(item).iter().map(|s| s.keys).sum::<usize>() * num_heads;
    }
    let each = |i: usize| {
        fault::may_panic();
        let (item, head) = (i / num_heads, i % num_heads);
        of_head(common, found, keep, (item, head, starts[item]))
    };
    let threads = if found.stretches.total_keys * num_heads < threads::INLINE { 1 } else { args.threads };
    let heads = threads::map(threads, 0..items * num_heads, each)?;
    Ok(Choice { heads, num_heads })
}

/// Adds up what was chosen. What is read must be in memory.
pub(super) fn fill(common: &Common<'_>, choice: &Choice, mut out: ElemsMut<'_>, kept: &mut [f32]) -> Result<()> {
    let args = common.args;
    let [_, heads, queries, _] = args.q.shape();
    let value_dim = common.arena.value_dim();
    check_len("the choice", choice.heads.len(), (args.spans.starts.len() - 1) * heads)?;
    let mut sums = vec![0f32; choice.heads.len() * value_dim];
    let work = choice.heads.iter().map(|head| head.keys.len()).sum::<usize>() * value_dim;
    let each = |(i, (head, sums)): (usize, (&OfHead, &mut [f32]))| add_up(common, (i / heads, i % heads), head, sums);
    let threads = if work < threads::INLINE { 1 } else { args.threads };
    let parts = choice.heads.iter().zip(sums.chunks_exact_mut(value_dim)).enumerate();
    threads::map(threads, parts, each)?.into_iter().collect::<Result<()>>()?;
    for (i, this) in choice.heads.iter().enumerate() {
        let (item, head) = (i / heads, i % heads);
        write_out(&mut out, common.arena.dtype(), i * value_dim, &sums[i * value_dim..][..value_dim], this.factor);
        kept[(item / queries * heads + head) * queries + item % queries] = this.mass;
    }
    Ok(())
}

/// What one head keeps of an item, whose logits begin at `start`.
fn of_head(common: &Common<'_>, found: &Found, keep: &Heaviest, (item, head, start): (usize, usize, usize)) -> OfHead {
    let (arena, group) = (common.arena, common.group);
    let (kv_head, g) = (head / group, head % group);
    let this = Head { found, list: item, sharer: kv_head, g, group, value_dim: arena.value_dim() };
    let norm = this.sum(common.args.sinks.map(|sinks| sinks[head]), &mut []);
    if !norm.lse.is_finite() {
        // Nothing was read, or a logit is no number: then the sums are none either.
        let mass = if norm.lse.is_nan() { f32::NAN } else { 0.0 };
        return OfHead { keys: Vec::new(), max: norm.max, factor: norm.factor, mass };
    }
    let (mut at, mut logits) = (start, Vec::new());
    for keys in found.stretches.of_list(item).iter().map(|s| s.keys) {
        logits.push(&found.logits[at + (kv_head * group + g) * keys..][..keys]);
        at += arena.num_kv_heads() * group * keys;
    }
    let (keys, mass) = choose(&logits, &norm, keep);
    OfHead { keys, max: norm.max, factor: if keep.renormalise { norm.factor / mass } else { norm.factor }, mass }
}

/// The heaviest keys in the order of the text, and their mass.
fn choose(logits: &[&[f32]], norm: &Norm, keep: &Heaviest) -> (Vec<Candidate>, f32) {
    let all: usize = logits.iter().map(|piece| piece.len()).sum();
    let most = keep.top.min(all);
    let by_mass = keep.mass < 1.0;
    let mut count = if by_mass { FIRST.min(most) } else { most };
    loop {
        let mut chosen = best(logits, count);
        let mut mass = 0f64;
        let enough = chosen.iter().position(|&(x, _)| {
            mass += f64::from(x - norm.lse).exp();
            by_mass && mass >= f64::from(keep.mass)
        });
        if enough.is_some() || count == most {
            chosen.truncate(enough.map_or(count, |last| last + 1));
            chosen.sort_unstable_by_key(|&(_, key)| key);
            return (chosen, mass.min(1.0) as f32);
        }
        count = (4 * count).min(most);
    }
}

/// Whether one of these is above the bar. Lanes of their own, so that it is done by vectors.
fn any_above(look: &[f32], bar: f32) -> bool {
    let mut top = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = look.as_chunks::<LANES>();
    for x in whole {
        for (top, &x) in top.iter_mut().zip(x) {
            *top = if x > *top { x } else { *top };
        }
    }
    top.iter().chain(rest).any(|&x| x > bar)
}

/// The `count` greatest logits, the greatest first, of equal ones the earlier.
fn best(logits: &[&[f32]], count: usize) -> Vec<Candidate> {
    let order = |a: &Candidate, b: &Candidate| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let room = (4 * count).max(LOOK);
    let mut held: Vec<Candidate> = Vec::with_capacity(room + LOOK);
    // Whatever comes later must be greater than the least of those that are held already.
    let mut bar = f32::NEG_INFINITY;
    let mut first = 0u32;
    for piece in logits {
        for look in piece.chunks(LOOK) {
            if held.len() < count || any_above(look, bar) {
                let passes = |&(_, x): &(u32, &f32)| *x > bar || held.len() < count;
                let new: Vec<Candidate> = (first..).zip(look).filter(passes).map(|(key, &x)| (x, key)).collect();
                held.extend(new);
                if held.len() >= room {
                    held.select_nth_unstable_by(count - 1, order);
                    held.truncate(count);
                    bar = held.iter().fold(f32::INFINITY, |least, &(x, _)| least.min(x));
                }
            }
            first += look.len() as u32;
        }
    }
    held.sort_unstable_by(order);
    held.truncate(count);
    held
}

/// A value of the arena's dtype, and its weight.
type Weighed = (*const u8, f32);

/// Where the chosen keys of an item lie: a span, the slot in its block, and the logit.
fn places<'a>(spans: &'a Spans, item: usize, chosen: &'a [Candidate]) -> impl Iterator<Item = (&'a Span, u32, f32)> {
    let mut spans = spans.spans[spans.starts[item] as usize..spans.starts[item + 1] as usize].iter();
    let (mut span, mut begins, mut next) = (None, 0u32, 0u32);
    chosen.iter().map_while(move |&(logit, key)| {
        while key >= next {
            let one = spans.next()?;
            (span, begins) = (Some(one), next);
            next += one.hi - one.lo;
        }
        span.map(|span| (span, span.lo + key - begins, logit))
    })
}

/// Adds the values of the chosen keys to the sums, by their weights relative to the greatest logit.
fn add_up(common: &Common<'_>, (item, head): (usize, usize), this: &OfHead, sums: &mut [f32]) -> Result<()> {
    let (arena, kv_head) = (common.arena, head / common.group);
    let mut plain: Vec<Weighed> = Vec::with_capacity(this.keys.len());
    let mut row = vec![0f32; sums.len()];
    for (span, slot, logit) in places(common.args.spans, item, &this.keys) {
        arena.check_span(span.block, slot, slot + 1)?;
        let weight = (logit - this.max).exp();
        match arena.packed() {
            Some(packed) if span.block.is_packed() => {
                // SAFETY: the slot lies in a block with memory; the row takes one value.
                unsafe { packed.values_f32(span.block, kv_head, slot, &mut row) };
                sums.iter_mut().zip(&row).for_each(|(sum, x)| *sum += weight * x);
            }
            _ => plain.push((arena.rows(span.block, kv_head, slot).1, weight)),
        }
    }
    add_plain(common, &plain, sums);
    Ok(())
}

/// Adds values that lie as numbers.
fn add_plain(common: &Common<'_>, rows: &[Weighed], sums: &mut [f32]) {
    let (level, mut wide) = (common.args.level, vec![0f32; padded(sums.len())]);
    wide[..sums.len()].copy_from_slice(sums);
    let (dim, to) = (sums.len(), &mut wide[..]);
    match common.arena.dtype() {
        Dtype::F32 => dispatch!(level, add::<f32>(rows: &[Weighed], dim: usize, to: &mut [f32]) -> ()),
        Dtype::BF16 => dispatch!(level, add::<bf16>(rows: &[Weighed], dim: usize, to: &mut [f32]) -> ()),
        Dtype::F16 => dispatch!(level, add::<f16>(rows: &[Weighed], dim: usize, to: &mut [f32]) -> ()),
    }
    sums.copy_from_slice(&wide[..dim]);
}

/// Rows that are asked for before they are read: they lie here and there.
const AHEAD: usize = 8;

/// # Safety
/// As for [`Simd`]; every row has `dim` elements of `E`; the sums are whole vectors.
#[inline(always)]
unsafe fn add<S: Simd, E: Elem>(rows: &[Weighed], dim: usize, sums: &mut [f32]) {
    let whole = dim / S::LANES * S::LANES;
    let to = sums.as_mut_ptr();
    for (i, &(row, weight)) in rows.iter().enumerate() {
        // SAFETY: any address may be asked for; channels below `dim`, the last ones by a partial load; sums beyond it are there.
        unsafe {
            if let Some(&(next, _)) = rows.get(i + AHEAD) {
                (0..dim * size_of::<E>()).step_by(64).for_each(|at| S::prefetch(next.wrapping_add(at)));
            }
            let (row, weight) = (row.cast::<E>(), S::splat(weight));
            for c in (0..whole).step_by(S::LANES) {
                S::store(to.add(c), S::fma(weight, E::load::<S>(row.add(c)), S::load(to.add(c))));
            }
            if whole < dim {
                let x = E::load_part::<S>(row.add(whole), dim - whole);
                S::store(to.add(whole), S::fma(weight, x, S::load(to.add(whole))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against sorting everything; few different numbers, so that many are equal.
        #[test]
        fn the_best_are_those_of_a_full_sort(
            pieces in prop::collection::vec(prop::collection::vec(-3i8..4, 1..200), 1..4), count in 1usize..90,
        ) {
            let pieces: Vec<Vec<f32>> =
                pieces.iter().map(|piece| piece.iter().map(|&x| f32::from(x)).collect()).collect();
            let views: Vec<&[f32]> = pieces.iter().map(|piece| &piece[..]).collect();
            let mut want: Vec<Candidate> = pieces.concat().into_iter().zip(0..).collect();
            want.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            want.truncate(count);
            prop_assert_eq!(best(&views, count), want);
        }
    }

    #[test]
    fn as_many_are_kept_as_the_mass_takes() {
        // exp: 4, 2, 1, 1 of 8.
        let logits: Vec<f32> = [1f32, 4.0, 1.0, 2.0].iter().map(|x| x.ln()).collect();
        let norm = Norm { max: 4f32.ln(), lse: 8f32.ln(), factor: 0.5 };
        let keys = |top, mass| {
            let (chosen, mass) = choose(&[&logits], &norm, &Heaviest { top, mass, renormalise: false });
            (chosen.iter().map(|&(_, key)| key).collect::<Vec<_>>(), mass)
        };
        let near = |got: (Vec<u32>, f32), want: &[u32], mass: f32| {
            assert_eq!(got.0, want);
            assert!((got.1 - mass).abs() < 1e-6, "{} is not {mass}", got.1);
        };
        near(keys(2, 1.0), &[1, 3], 0.75);
        near(keys(3, 1.0), &[0, 1, 3], 0.875);
        near(keys(9, 0.4), &[1], 0.5);
        near(keys(9, 0.7), &[1, 3], 0.75);
        near(keys(1, 0.7), &[1], 0.5);
        near(keys(9, 1.0), &[0, 1, 2, 3], 1.0);
    }
}
