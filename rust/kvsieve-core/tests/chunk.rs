//! A chunk's searching attention against the same query by query, on every instruction set: the very same choices and counts, and the
//! same results but for the order of sums.
//!
//! Keys and queries are multiples of 1/8, so that every product sum is exact in whatever order: a choice cannot hang on rounding.

use std::sync::Arc;

use half::{bf16, f16};
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::Level;
use kvsieve_core::kernels::chunk::attend_chunk;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::sparse::{Scoring, Sparse, SparseRow, attend_sparse};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::{Choice, Representative, Rule};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

struct Noise(u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn eighths(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.below(33) as f32 - 16.0) / 8.0).collect()
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// The same numbers in any dtype.
enum Data {
    Wide(Vec<f32>),
    Bits(Vec<u16>),
}

impl Data {
    fn of(x: &[f32], dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Data::Wide(x.to_vec()),
            Dtype::BF16 => Data::Bits(x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()),
            Dtype::F16 => Data::Bits(x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()),
        }
    }

    fn elems(&self) -> Elems<'_> {
        match self {
            Data::Wide(x) => Elems::F32(x),
            Data::Bits(x) => Elems::Bits(x),
        }
    }

    fn elems_mut(&mut self) -> ElemsMut<'_> {
        match self {
            Data::Wide(x) => ElemsMut::F32(x),
            Data::Bits(x) => ElemsMut::Bits(x),
        }
    }

    fn numbers(&self, dtype: Dtype) -> Vec<f32> {
        match self {
            Data::Wide(x) => x.clone(),
            Data::Bits(x) if dtype == Dtype::BF16 => x.iter().map(|&x| bf16::from_bits(x).to_f32()).collect(),
            Data::Bits(x) => x.iter().map(|&x| f16::from_bits(x).to_f32()).collect(),
        }
    }
}

/// Whole blocks, or runs of any length, in blocks of a row's own.
fn runs(noise: &mut Noise, n: usize, block: &mut u32, even: bool) -> Vec<Run> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < n {
        let lo = if even { 0 } else { noise.below(60) };
        let len = if even { 64 } else { 1 + noise.below(64 - lo) }.min(n - at);
        runs.push(Run { block: BlockId(*block), lo: lo as u32, hi: (lo + len) as u32 });
        (at, *block) = (at + len, *block + 1 + noise.below(3) as u32);
    }
    runs
}

fn rule(noise: &mut Noise) -> Rule {
    let all = [Representative::Middle, Representative::First, Representative::Last, Representative::Oracle];
    let (sinks, window) = (noise.below(6), noise.one_of(&[0, 1, 9, 40, 400]));
    if noise.below(2) == 0 {
        let (budget, block) = (1 + noise.below(90), 1 + noise.below(9));
        let hip = Hip::new(budget, block, noise.one_of(&all)).unwrap();
        return Rule::new(Arc::new(hip), sinks, window, vec![1 + noise.below(4)]).unwrap();
    }
    let stages = [(16, 96), (4, 32), (2, 12)].map(|(chunk, keep)| Stage { chunk, keep }).to_vec();
    let infinite = Infinite::new(stages, all[noise.below(2)], false).unwrap();
    Rule::new(Arc::new(infinite), sinks, window, vec![4, 2, 1]).unwrap()
}

/// A first stage of blocks, by the bounds of their keys.
fn bounded_rule(noise: &mut Noise) -> Rule {
    let (blocks, last) = (1 + noise.below(5), noise.one_of(&[1, 2, 8, 64]));
    let mut stages = vec![Stage { chunk: 64, keep: 64 * blocks }];
    if noise.below(4) > 0 {
        stages.push(Stage { chunk: last, keep: last * (1 + noise.below(64 * blocks / last)) });
    }
    let refresh = vec![1; stages.len()];
    let infinite = Infinite::new(stages, Representative::First, true).unwrap();
    let (sinks, window) = (64 * noise.below(3), noise.one_of(&[64, 71, 200]));
    assert!(Rule::new(Arc::new(infinite.clone()), sinks + 1, window, refresh.clone()).is_err());
    assert!(Rule::new(Arc::new(infinite.clone()), sinks, 63, refresh.clone()).is_err());
    Rule::new(Arc::new(infinite), sinks, window, refresh).unwrap()
}

fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    a.iter()
        .zip(b)
        .all(|(&a, &b)| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= tolerance * b.abs().max(1.0))
}

#[test]
fn a_chunk_is_its_queries_one_by_one() {
    let mut noise = Noise(11);
    let mut judged = 0;
    for round in 0..75 {
        // Of five rounds two begin with bounds.
        let bounded = round % 5 >= 3;
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let (dim, value_dim) = (noise.one_of(&[1, 5, 16, 33, 64, 96, 128]), noise.one_of(&[1, 8, 33, 64, 80, 128]));
        let (rows, kv_heads, group) = (1 + noise.below(2), 1 + noise.below(2), 1 + noise.below(5));
        let (columns, heads) = (1 + noise.below(150), kv_heads * group);
        let mut arena = Arena::new(kv_heads, dim, value_dim, dtype).unwrap();
        let mut block = 0;
        let mut all = Vec::new();
        for _ in 0..rows {
            let n = if bounded { 300 + noise.below(700) } else { 1 + noise.below(500) };
            let even = bounded || noise.below(2) == 0;
            let runs = runs(&mut noise, n, &mut block, even);
            let k = Data::of(&noise.eighths(kv_heads * n * dim), dtype);
            let v = Data::of(&noise.eighths(kv_heads * n * value_dim), dtype);
            arena.write(&runs, k.elems(), v.elems()).unwrap();
            if bounded {
                arena.make_bounds(&runs).unwrap();
            }
            all.push((runs, 1 + noise.below(columns.min(n))));
        }
        let q = Data::of(&noise.eighths(rows * heads * columns * dim), dtype);
        let q = View::contiguous("q", q.elems(), [rows, heads, columns, dim]).unwrap();
        let rule = if bounded { bounded_rule(&mut noise) } else { rule(&mut noise) };
        let sinks = noise.eighths(heads);
        let list: Vec<SparseRow<'_>> =
            all.iter().map(|(runs, new_len)| SparseRow { runs, shown: &[], new_len: *new_len }).collect();
        let args = Sparse {
            q,
            rope: None,
            apply_factor: false,
            scoring: Scoring::Stored,
            consecutive: false,
            rows: &list,
            query_block: noise.one_of(&[1, 2, 8, 16, 64]),
            query_stride: noise.one_of(&[1, 2, 3, 8]),
            scale: 0.3,
            softcap: noise.one_of(&[None, Some(2.0)]),
            sinks: noise.one_of(&[None, Some(&sinks[..])]),
            threads: 1,
            level: Level::Portable,
        };
        let size = rows * columns * heads;
        let run = |chunk: bool, level: Level, threads: usize| {
            let mut out = Data::of(&vec![7.0; size * value_dim], dtype);
            let mut lse = vec![7f32; size];
            let mut choices = vec![Choice::default(); rows];
            let attend = if chunk { attend_chunk } else { attend_sparse };
            let args = Sparse { level, threads, ..args };
            let work = attend(&arena, &rule, &mut choices, &args, out.elems_mut(), Some(&mut lse), &|| false).unwrap();
            (out.numbers(dtype), lse, choices, work)
        };
        let (out, lse, choices, work) = run(false, Level::Portable, 1);
        judged += usize::from(bounded && work.searched > 0);
        for level in levels() {
            let got = run(true, level, 1);
            assert_eq!((&got.2, got.3), (&choices, work), "round {round} on {level:?}");
            let tolerance = match dtype {
                Dtype::F32 => 1e-5,
                Dtype::F16 => 4e-3,
                Dtype::BF16 => 3e-2,
            };
            assert!(close(&got.0, &out, tolerance), "round {round} on {level:?}");
            assert!(close(&got.1, &lse, 1e-5), "round {round} on {level:?}");
            let two = run(true, level, 2);
            assert!(two.0.iter().zip(&got.0).all(|(a, b)| a.to_bits() == b.to_bits()), "threads change bits");
            assert_eq!((two.1, two.2, two.3), (got.1, got.2, got.3));
        }
    }
    assert!(judged > 10, "{judged} rounds judged bounds");
}

#[test]
fn a_signal_leaves_the_choices_as_they_were() {
    let mut noise = Noise(3);
    let mut arena = Arena::new(2, 8, 8, Dtype::F32).unwrap();
    let runs = runs(&mut noise, 1000, &mut 0, false);
    let data = Data::of(&noise.eighths(2 * 1000 * 8), Dtype::F32);
    arena.write(&runs, data.elems(), data.elems()).unwrap();
    let q = noise.eighths(2 * 900 * 8);
    let hip = Hip::new(8, 2, Representative::Middle).unwrap();
    let rule = Rule::new(Arc::new(hip), 2, 4, vec![8]).unwrap();
    for threads in [1, 2] {
        let args = Sparse {
            q: View::contiguous("q", Elems::F32(&q), [1, 2, 900, 8]).unwrap(),
            rope: None,
            apply_factor: false,
            scoring: Scoring::Stored,
            consecutive: false,
            rows: &[SparseRow { runs: &runs, shown: &[], new_len: 900 }],
            query_block: 16,
            query_stride: 1,
            scale: 1.0,
            softcap: None,
            sinks: None,
            threads,
            level: Level::Portable,
        };
        let mut out = vec![0f32; 2 * 900 * 8];
        let mut run = |stops: bool, choices: &mut [Choice]| {
            attend_chunk(&arena, &rule, choices, &args, ElemsMut::F32(&mut out), None, &|| stops)
        };
        let mut choices = [Choice::default()];
        assert_eq!(run(true, &mut choices), Err(Error::Interrupted));
        assert_eq!(choices, [Choice::default()], "what was chosen before the signal does not stand");
        assert!(run(false, &mut choices).is_ok());
        assert_eq!(choices[0].next, 1000);
        let args = Sparse { query_stride: 0, ..args };
        let refused = attend_chunk(&arena, &rule, &mut choices, &args, ElemsMut::F32(&mut out), None, &|| false);
        assert!(matches!(refused, Err(Error::OutOfRange { what: "query_stride", .. })));
    }
}
