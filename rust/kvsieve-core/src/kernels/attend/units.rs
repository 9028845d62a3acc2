//! Cuts what is to be read into units of work.

use std::ops::Range;

use super::args::Attend;
use crate::plan::Spans;
use crate::storage::arena::Arena;

/// Keys of one unit, at least. A function of nothing else, so that results do not depend on the machine.
const SPLIT: usize = 4096;

/// What all units have in common.
pub(super) struct Common<'a> {
    pub arena: &'a Arena,
    pub args: &'a Attend<'a>,
    pub group: usize,
    /// The square of the rope's factor, applied to the query for both sides.
    pub factor: f32,
    /// Whether values are added up.
    pub values: bool,
}

impl<'a> Common<'a> {
    pub fn new(arena: &'a Arena, args: &'a Attend<'a>, group: usize) -> Self {
        let factor = match args.trig {
            Some(trig) if args.apply_factor => (trig.rope().factor() * trig.rope().factor()) as f32,
            _ => 1.0,
        };
        Common { arena, args, group, factor, values: true }
    }
}

/// A stretch of one item's spans for one key-value head.
pub(super) struct Unit<'a> {
    pub item: usize,
    pub kv_head: usize,
    /// Which of the item's stretches.
    pub stretch: usize,
    pub spans: Range<usize>,
    /// `[group][value_dim]` unnormalised sums, then `[group]` maxima, then `[group]` sums of weights.
    pub partial: &'a mut [f32],
    /// `[group][keys of the unit]`; empty when the mass is not wanted.
    pub logits: &'a mut [f32],
}

/// Consecutive spans of one list.
pub(super) struct Stretch {
    list: usize,
    spans: Range<usize>,
    pub keys: usize,
}

/// Where the units begin and how many keys each has.
pub(super) struct Stretches {
    all: Vec<Stretch>,
    /// Of each list the first stretch, and where they end.
    pub firsts: Vec<usize>,
    pub total_keys: usize,
    /// Lists of spans of an item.
    pub lists: usize,
    /// Key-value heads that read each.
    pub sharing: usize,
}

impl Stretches {
    /// `apart`: whether each key-value head has a list of spans of its own.
    pub fn new(spans: &Spans, kv_heads: usize, apart: bool) -> Self {
        let (lists, sharing) = if apart { (kv_heads, 1) } else { (1, kv_heads) };
        let (mut all, mut total_keys) = (Vec::new(), 0);
        let mut firsts = Vec::with_capacity(spans.starts.len());
        for (list, w) in spans.starts.windows(2).enumerate() {
            firsts.push(all.len());
            let end = w[1] as usize;
            let (mut first, mut keys) = (w[0] as usize, 0);
            for (at, span) in spans.spans.iter().enumerate().take(end).skip(first) {
                keys += (span.hi - span.lo) as usize;
                if keys >= SPLIT || at + 1 == end {
                    all.push(Stretch { list, spans: first..at + 1, keys });
                    total_keys += keys;
                    (first, keys) = (at + 1, 0);
                }
            }
        }
        firsts.push(all.len());
        Stretches { all, firsts, total_keys, lists, sharing }
    }

    /// How many units there are.
    pub fn num_units(&self) -> usize {
        self.all.len() * self.sharing
    }

    /// Those of one list.
    pub fn of_list(&self, list: usize) -> &[Stretch] {
        &self.all[self.firsts[list]..self.firsts[list + 1]]
    }

    /// The units, each with its part of `partials`, `stride` numbers, and of `logits`, if there are any: `group` for each key.
    pub fn units<'a>(
        &self,
        (partials, stride): (&'a mut [f32], usize),
        logits: &'a mut [f32],
        group: usize,
    ) -> Vec<Unit<'a>> {
        let wants_logits = !logits.is_empty();
        let mut units = Vec::with_capacity(self.num_units());
        let mut partials = partials.chunks_exact_mut(stride);
        let mut rest = logits;
        let mut stretch = 0;
        for (i, this) in self.all.iter().enumerate() {
            stretch = if i > 0 && self.all[i - 1].list == this.list { stretch + 1 } else { 0 };
            for head in 0..self.sharing {
                let (item, kv_head) = (this.list / self.lists, this.list % self.lists + head);
                let (mine, others) = rest.split_at_mut(if wants_logits { this.keys * group } else { 0 });
                rest = others;
                let partial = partials.next().unwrap_or_default();
                units.push(Unit { item, kv_head, stretch, spans: this.spans.clone(), partial, logits: mine });
            }
        }
        units
    }
}
