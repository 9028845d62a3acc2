//! Attention to keys and values in tensors against its definition, on every instruction set.

use super::common::data::{DTYPES, Data, Noise};
use kvsieve_core::Error;
use kvsieve_core::kernels::Level;
use kvsieve_core::kernels::chunk::{Dense, attend_dense};
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::tensor::Dtype;

/// A call's operands.
struct Case {
    /// Query heads, key-value heads, queries, keys, their channels, those of values.
    sizes: [usize; 6],
    data: [Data; 3],
    from: Vec<u32>,
    to: Vec<u32>,
    scale: f32,
    softcap: Option<f32>,
}

impl Case {
    fn new(noise: &mut Noise, dtype: Dtype) -> Self {
        let kv_heads = 1 + noise.below(3);
        let heads = kv_heads * (1 + noise.below(5));
        let (queries, keys) = (1 + noise.below(150), noise.below(400));
        let (dim, value_dim) = (1 + noise.below(70), 1 + noise.below(70));
        let data = [heads * queries * dim, kv_heads * keys * dim, kv_heads * keys * value_dim];
        let data = data.map(|n| noise.data(n, dtype));
        let (mut from, mut to) = (Vec::new(), Vec::new());
        let (kind, window) = (noise.below(4), 1 + noise.below(90));
        for j in 0..keys {
            // All that came before, its own window of that, anything.
            let at = (j + queries).saturating_sub(keys);
            let (first, last) = match kind {
                0 => (0, queries),
                1 => (at, queries),
                2 => (at, (j + queries + window).saturating_sub(keys).min(queries)),
                _ => (noise.below(queries + 1), noise.below(queries + 9)),
            };
            from.push(first as u32);
            to.push(last as u32);
        }
        let softcap = (noise.below(3) == 0).then(|| 0.5 + noise.below(4) as f32);
        let sizes = [heads, kv_heads, queries, keys, dim, value_dim];
        Case { sizes, data, from, to, scale: 0.5 + noise.unit().abs(), softcap }
    }

    fn args(&self, level: Level, threads: usize) -> Dense<'_> {
        let [heads, kv_heads, queries, keys, dim, value_dim] = self.sizes;
        let [q, k, v] = &self.data;
        Dense {
            q: q.view([1, heads, queries, dim]),
            k: k.view([1, kv_heads, keys, dim]),
            v: v.view([1, kv_heads, keys, value_dim]),
            dtype: q.dtype,
            from: &self.from,
            to: &self.to,
            scale: self.scale,
            softcap: self.softcap,
            threads,
            level,
        }
    }

    /// Out and lse, full of what must not be left there.
    fn room(&self) -> (Vec<f32>, Vec<f32>) {
        let [heads, _, queries, _, _, value_dim] = self.sizes;
        (vec![7.0; queries * heads * value_dim], vec![7.0; heads * queries])
    }

    fn run(&self, level: Level, threads: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut out, mut lse) = self.room();
        attend_dense(&self.args(level, threads), &mut out, &mut lse, &|| false).unwrap();
        (out, lse)
    }

    /// By the definition, in `f64`.
    fn exact(&self) -> (Vec<f64>, Vec<f64>) {
        let [heads, kv_heads, queries, keys, dim, value_dim] = self.sizes;
        let [q, k, v] = [0, 1, 2].map(|i| self.data[i].f64s());
        let (mut out, mut lse) = (vec![0.0; queries * heads * value_dim], vec![f64::NEG_INFINITY; heads * queries]);
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            for i in 0..queries {
                let seen: Vec<usize> =
                    (0..keys).filter(|&j| self.from[j] as usize <= i && i < self.to[j] as usize).collect();
                let query = &q[(head * queries + i) * dim..][..dim];
                let logit = |&j: &usize| {
                    let key = &k[(kv * keys + j) * dim..][..dim];
                    let x = f64::from(self.scale) * query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
                    self.softcap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
                };
                let logits: Vec<f64> = seen.iter().map(logit).collect();
                let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                if seen.is_empty() {
                    continue;
                }
                let total: f64 = logits.iter().map(|x| (x - most).exp()).sum();
                lse[head * queries + i] = most + total.ln();
                for (&j, x) in seen.iter().zip(&logits) {
                    let weight = (x - most).exp() / total;
                    for c in 0..value_dim {
                        out[(i * heads + head) * value_dim + c] += weight * v[(kv * keys + j) * value_dim + c];
                    }
                }
            }
        }
        (out, lse)
    }
}

fn off(got: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let far = |(&a, &b): (&f32, &f64)| if f64::from(a) == b { 0.0 } else { (f64::from(a) - b).abs() };
    got.iter().zip(exact).map(far).fold(0.0, |most, x| if x.is_nan() { x } else { most.max(x) })
}

#[test]
fn it_is_attention_to_what_each_query_sees() {
    let mut noise = Noise(0x9e37_79b9);
    for i in 0..60 {
        let dtype = DTYPES[i % 3];
        let case = Case::new(&mut noise, dtype);
        let (out, lse) = case.exact();
        for level in levels() {
            let got = case.run(level, 1);
            // Weights of pairs of `bf16` have eight bits; everything else is of `f32`.
            let narrow = level == Level::Avx512Bf16 && dtype == Dtype::BF16;
            let (of_out, of_lse) = (off(&got.0, &out), off(&got.1, &lse));
            assert!(of_out < if narrow { 8e-3 } else { 2e-5 }, "{i} {level:?} {:?}: {of_out}", case.sizes);
            assert!(of_lse < 2e-5, "{i} {level:?} {:?}: {of_lse}", case.sizes);
            assert_eq!(case.run(level, 3), got, "threads change nothing");
        }
    }
}

#[test]
fn values_that_are_not_finite_reach_those_who_see_them() {
    let mut noise = Noise(77);
    let mut case = Case::new(&mut noise, Dtype::F32);
    case.sizes = [2, 1, 40, 40, 8, 8];
    case.data = [2 * 40 * 8, 40 * 8, 40 * 8].map(|n| noise.data(n, Dtype::F32));
    case.data[2].wide[20 * 8] = f32::INFINITY;
    (case.from, case.to) = ((0..40).collect(), vec![40; 40]);
    for level in levels() {
        let (out, _) = case.run(level, 1);
        for (i, rows) in out.chunks(16).enumerate() {
            for (c, x) in rows.iter().enumerate() {
                assert_eq!(x.is_finite(), i < 20 || c % 8 > 0, "query {i}, number {c}, {level:?}: {x}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused_and_nothing_written() {
    let mut noise = Noise(5);
    let case = Case::new(&mut noise, Dtype::F32);
    let [heads, kv_heads, queries, keys, dim, value_dim] = case.sizes;
    let level = Level::Portable;
    let good = case.args(level, 1);
    let other = Data::of(&vec![0.0; heads * queries * (dim + 1)], Dtype::F32);
    let narrow = Data::of(&vec![0.0; kv_heads * keys * value_dim], Dtype::BF16);
    let wrong = [
        ("dim", Dense { q: other.view([1, heads, queries, dim + 1]), ..good }),
        ("rows", Dense { q: other.view([queries, heads, 1, dim]), ..good }),
        ("dtype", Dense { v: narrow.view([1, kv_heads, keys, value_dim]), ..good }),
        ("from", Dense { from: &case.from[1..], ..good }),
        ("to", Dense { to: &[], ..good }),
        ("cap", Dense { softcap: Some(0.0), ..good }),
        ("threads", Dense { threads: 0, ..good }),
        ("threads", Dense { threads: 1 << 31, ..good }),
    ];
    for (what, args) in wrong {
        let (mut out, mut lse) = case.room();
        assert!(attend_dense(&args, &mut out, &mut lse, &|| false).is_err(), "{what}");
        assert_eq!((out, lse), case.room(), "{what}");
    }
    let (mut out, mut lse) = case.room();
    assert!(attend_dense(&good, &mut out[1..], &mut lse, &|| false).is_err());
    assert!(attend_dense(&good, &mut out, &mut lse[1..], &|| false).is_err());
}

#[test]
fn it_stops_when_told() {
    let mut noise = Noise(6);
    let mut case = Case::new(&mut noise, Dtype::F32);
    case.sizes = [3, 3, 4096, 4096, 2, 2];
    case.data = [3 * 2 * 4096; 3].map(|n| noise.data(n, Dtype::F32));
    (case.from, case.to) = ((0..4096).collect(), vec![4096; 4096]);
    for threads in [1, 2] {
        let (mut out, mut lse) = case.room();
        let args = case.args(*levels().last().unwrap(), threads);
        assert_eq!(attend_dense(&args, &mut out, &mut lse, &|| true), Err(Error::Interrupted));
    }
}
