//! The naive twin of the kernels, in `f64`, one key after another. Slow and obvious: tests hold the kernels against it.

use crate::plan::Spans;
use crate::rope::{Layout, Rope};
use crate::storage::arena::Arena;
use crate::tensor::{Dtype, View, widen};
use crate::{Error, Result};

/// What [`attend`] returns.
#[derive(Clone, Debug, Default)]
pub struct Attended {
    /// `[rows, queries, heads, value_dim]`
    pub out: Vec<f64>,
    /// `[rows, heads, queries]`, without the learned sink.
    pub lse: Vec<f64>,
    /// For each item `[kv_heads][keys]`, one after another.
    pub mass: Vec<f64>,
}

/// Everything about the attention but the keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    pub q: &'a View<'a>,
    pub spans: &'a Spans,
    pub rope: Option<&'a Rope>,
    pub scale: f64,
    pub softcap: Option<f64>,
    pub sinks: Option<&'a [f32]>,
    pub apply_factor: bool,
}

/// `x` rotated by `position`, times `factor` on the rotated channels.
pub fn rotated(x: &[f64], position: i64, rope: &Rope, factor: f64) -> Vec<f64> {
    let mut y = x.to_vec();
    let half = rope.inv_freq().len();
    for (i, f) in rope.inv_freq().iter().enumerate() {
        let (sin, cos) = (position as f64 * f).sin_cos();
        let (a, b) = match rope.layout() {
            Layout::Half => (i, i + half),
            Layout::Interleaved => (2 * i, 2 * i + 1),
        };
        y[a] = factor * (x[a] * cos - x[b] * sin);
        y[b] = factor * (x[b] * cos + x[a] * sin);
    }
    y
}

/// See [`crate::kernels::attend()`].
pub fn attend(arena: &Arena, p: &Params<'_>) -> Result<Attended> {
    let [rows, heads, queries, dim] = p.q.shape();
    let (kv_heads, value_dim) = (arena.num_kv_heads(), arena.value_dim());
    if dim != arena.key_dim() || !heads.is_multiple_of(kv_heads) {
        let expected = format!("heads of {}", arena.key_dim());
        return Err(Error::Shape { what: "q", expected, got: format!("{:?}", p.q.shape()) });
    }
    let group = heads / kv_heads;
    let mut done = Attended {
        out: vec![0.0; rows * queries * heads * value_dim],
        lse: vec![f64::NEG_INFINITY; rows * heads * queries],
        mass: Vec::new(),
    };
    for item in 0..rows * queries {
        let (row, query) = (item / queries, item % queries);
        let spans = &p.spans.spans[p.spans.starts[item] as usize..p.spans.starts[item + 1] as usize];
        let keys: usize = spans.iter().map(|s| (s.hi - s.lo) as usize).sum();
        for kv_head in 0..kv_heads {
            let mut mass = vec![0.0; keys];
            for head in kv_head * group..(kv_head + 1) * group {
                let elems = p.q.row(row, head, query);
                let q: Vec<f64> = (0..dim).map(|i| widen(elems, arena.dtype(), i)).collect();
                let (mut logits, mut values) = (Vec::new(), Vec::new());
                for span in spans {
                    for slot in span.lo..span.hi {
                        let (key, value) = arena.token(span.block, kv_head, slot)?;
                        let (q, key) = match p.rope {
                            None => (q.clone(), key),
                            Some(rope) => {
                                let factor = if p.apply_factor { rope.factor() } else { 1.0 };
                                let at = if span.rotate_keys { i64::from(slot) } else { 0 };
                                (rotated(&q, span.shift, rope, factor), rotated(&key, at, rope, factor))
                            }
                        };
                        let logit = p.scale * q.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>();
                        logits.push(p.softcap.map_or(logit, |cap| cap * (logit / cap).tanh()));
                        values.push(value);
                    }
                }
                if keys == 0 {
                    continue;
                }
                let lse = log_sum_exp(&logits);
                let total = p.sinks.map_or(lse, |sinks| log_sum_exp(&[lse, f64::from(sinks[head])]));
                done.lse[(row * heads + head) * queries + query] = lse;
                let out = &mut done.out[(item * heads + head) * value_dim..][..value_dim];
                for (j, value) in values.iter().enumerate() {
                    let weight = (logits[j] - total).exp();
                    mass[j] += weight;
                    out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
                }
            }
            done.mass.extend(mass);
        }
    }
    Ok(done)
}

/// `ln sum e^x`; `-inf` for nothing.
pub fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln() }
}

/// See [`crate::kernels::surprisal`].
pub fn surprisal(logits: &[f64], id: usize) -> f64 {
    log_sum_exp(logits) - logits[id]
}

/// See [`crate::rank`].
pub fn top_k(scores: &[f32], k: usize) -> Vec<i64> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let value = |i: usize| {
        if scores[i].is_nan() { None } else { Some(scores[i]) }
    };
    order.sort_by(|&a, &b| value(b).partial_cmp(&value(a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b)));
    order.into_iter().take(k).map(|i| i as i64).collect()
}

/// See [`crate::kernels::merge`].
pub fn merge(parts: &[(Vec<f64>, f64)], dim: usize) -> (Vec<f64>, f64) {
    let lse = log_sum_exp(&parts.iter().map(|p| p.1).collect::<Vec<_>>());
    let mut out = vec![0.0; dim];
    for (part, part_lse) in parts.iter().filter(|p| p.1 != f64::NEG_INFINITY) {
        out.iter_mut().zip(part).for_each(|(o, x)| *o += (part_lse - lse).exp() * x);
    }
    (out, lse)
}

/// The elements of a contiguous tensor in `f64`.
pub fn widened(view: &View<'_>, dtype: Dtype) -> Vec<f64> {
    let [b, h, n, d] = view.shape();
    let rows = (0..b).flat_map(|b| (0..h).flat_map(move |h| (0..n).map(move |i| (b, h, i))));
    rows.flat_map(|(b, h, i)| (0..d).map(move |c| widen(view.row(b, h, i), dtype, c))).collect()
}
