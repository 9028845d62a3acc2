//! Merges the units of each item and head, by log-sum-exp.

use half::{bf16, f16};

use super::units::{Common, Stretches};
use crate::kernels::simd::Elem;
use crate::tensor::{Dtype, ElemsMut};

/// What a call of attention fills.
pub(super) struct Results<'a> {
    pub out: ElemsMut<'a>,
    pub lse: Option<&'a mut [f32]>,
    pub mass: Option<&'a mut [f32]>,
    /// Whether the mass is the highest probability among the heads of a group, and not their sum.
    pub highest: bool,
}

/// What the units have found.
pub(super) struct Found {
    pub stretches: Stretches,
    pub partials: Vec<f32>,
    /// Numbers from one unit's partial result to the next.
    pub stride: usize,
    /// Of each stretch and key-value head `[group][keys]`; empty when they are not wanted.
    pub logits: Vec<f32>,
}

/// The partial results of one head of one item.
pub(super) struct Head<'a> {
    pub found: &'a Found,
    pub list: usize,
    /// Of the heads that share the list.
    pub sharer: usize,
    /// The query head in its group.
    pub g: usize,
    pub group: usize,
    pub value_dim: usize,
}

/// How the weights of a head are normalised.
pub(super) struct Norm {
    pub max: f32,
    pub lse: f32,
    pub factor: f32,
}

impl Head<'_> {
    fn partial(&self, i: usize) -> &[f32] {
        let Found { stretches, partials, stride, .. } = self.found;
        let unit = (stretches.firsts[self.list] + i) * stretches.sharing + self.sharer;
        &partials[unit * stride..][..*stride]
    }

    fn max_of(&self, i: usize) -> f32 {
        self.partial(i)[self.group * self.value_dim + self.g]
    }

    /// Adds the weighted values up in `sums`, which is zero; `sink` is one more logit.
    pub fn sum(&self, sink: Option<f32>, sums: &mut [f32]) -> Norm {
        let num = self.found.stretches.of_list(self.list).len();
        let max = (0..num).map(|i| self.max_of(i)).fold(f32::NEG_INFINITY, f32::max);
        let mut weights = 0f32;
        for i in 0..num {
            let c = if self.max_of(i) == f32::NEG_INFINITY { 0.0 } else { (self.max_of(i) - max).exp() };
            let part = self.partial(i);
            weights += c * part[self.group * (self.value_dim + 1) + self.g];
            sums.iter_mut().zip(&part[self.g * self.value_dim..]).for_each(|(s, x)| *s += c * x);
        }
        let lse = if weights == 0.0 { f32::NEG_INFINITY } else { max + weights.ln() };
        let sink = sink.map_or(0.0, |sink| (sink - max).exp());
        Norm { max, lse, factor: if weights == 0.0 { 0.0 } else { 1.0 / (weights + sink) } }
    }
}

/// Fills the results.
pub(super) fn merge(common: &Common<'_>, found: &Found, results: Results<'_>) {
    let Results { mut out, mut lse, mass, highest } = results;
    let (args, group, stretches) = (common.args, common.group, &found.stretches);
    let [_, heads, queries, _] = args.q.shape();
    let value_dim = common.arena.value_dim();
    let (lists, wants_mass) = (stretches.lists, mass.is_some());
    let mut sums = vec![0f32; value_dim];
    let mut mass_rest = mass.unwrap_or_default();
    let mut logits_at = 0;
    for list in 0..args.spans.starts.len() - 1 {
        let (item, first_head) = (list / lists, list % lists);
        let (row, query) = (item / queries, item % queries);
        let keys: usize = stretches.of_list(list).iter().map(|s| s.keys).sum();
        // Of one list all that share it, `keys` each.
        let (list_mass, others) = mass_rest.split_at_mut(if wants_mass { keys * stretches.sharing } else { 0 });
        mass_rest = others;
        list_mass.fill(0.0);
        for reader in 0..stretches.sharing * group {
            let (sharer, g) = (reader / group, reader % group);
            let head = (first_head + sharer) * group + g;
            let this = Head { found, list, sharer, g, group, value_dim };
            sums.fill(0.0);
            let norm = this.sum(args.sinks.map(|sinks| sinks[head]), &mut sums);
            if let Some(lse) = &mut lse {
                lse[(row * heads + head) * queries + query] = norm.lse;
            }
            write_out(&mut out, common.arena.dtype(), (item * heads + head) * value_dim, &sums, norm.factor);
            if wants_mass && keys > 0 {
                let to = &mut list_mass[sharer * keys..][..keys];
                add_mass(&this, logits_at, (&norm, highest), to);
            }
        }
        logits_at += keys * stretches.sharing * group;
    }
}

/// Adds a head's probabilities to those of its group, or keeps the highest; the list's logits begin `at`.
fn add_mass(head: &Head<'_>, mut at: usize, (norm, highest): (&Norm, bool), mut to: &mut [f32]) {
    let Head { found, list, sharer, g, group, .. } = *head;
    for keys in found.stretches.of_list(list).iter().map(|s| s.keys) {
        let unit = &found.logits[at + sharer * group * keys + g * keys..][..keys];
        let (mine, others) = std::mem::take(&mut to).split_at_mut(keys);
        for (m, x) in mine.iter_mut().zip(unit) {
            let p = (x - norm.max).exp() * norm.factor;
            *m = if highest { m.max(p) } else { *m + p };
        }
        at += found.stretches.sharing * group * keys;
        to = others;
    }
}

pub(super) fn write_out(out: &mut ElemsMut<'_>, dtype: Dtype, at: usize, sums: &[f32], norm: f32) {
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
