//! Rows of residents whose numbers are known, plain and packed, and the rules to try on them.

use std::f64::consts::FRAC_PI_2;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use kvsieve_core::ids::{BlockId, PACKED, Run};
use kvsieve_core::plan::Move;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::{Asked, Chosen, Inputs, Representative, Score, Select};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::packed::{Channels, Chosen as Keep, Packing};
use kvsieve_core::tensor::{Dtype, Elems};

pub struct Noise(pub u64);

impl Noise {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    pub fn eighths(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.below(65) as f32 - 32.0) / 8.0).collect()
    }
}

/// The same numbers in any dtype.
pub struct Data(Vec<f32>, Vec<u16>);

impl Data {
    pub fn of(x: &[f32], dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Data(x.to_vec(), vec![]),
            Dtype::BF16 => Data(vec![], x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()),
            Dtype::F16 => Data(vec![], x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()),
        }
    }

    pub fn elems(&self) -> Elems<'_> {
        if self.1.is_empty() { Elems::F32(&self.0) } else { Elems::Bits(&self.1) }
    }
}

pub struct Known(pub Vec<f32>);

impl Score for Known {
    fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>) {
        let best =
            |s: &Range<u32>| self.0[s.start as usize..s.end as usize].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        out.clear();
        out.extend(stretches.iter().map(best));
    }

    fn bounds(&mut self, _blocks: Range<u32>, _out: &mut Vec<f32>) {
        unreachable!("the bounds have a test of their own");
    }
}

/// A row of residents in an arena, and the numbers behind it.
pub struct Row {
    pub arena: Arena,
    pub runs: Vec<Run>,
    /// `[heads][n][dim]`
    pub keys: Vec<f32>,
    pub n: usize,
}

impl Row {
    /// In whole blocks, or in runs of any length.
    pub fn new(noise: &mut Noise, (heads, n, dim): (usize, usize, usize), dtype: Dtype, even: bool) -> Self {
        let mut arena = Arena::new(heads, dim, dim, dtype).unwrap();
        let keys = noise.eighths(heads * n * dim);
        let (mut runs, mut at, mut block) = (Vec::new(), 0, 0);
        while at < n {
            let lo = if even { 0 } else { noise.below(60) };
            let len = if even { 64 } else { 1 + noise.below(64 - lo) }.min(n - at);
            runs.push(Run { block: BlockId(block), lo: lo as u32, hi: (lo + len) as u32 });
            (at, block) = (at + len, block + 1 + noise.below(3) as u32);
        }
        let data = Data::of(&keys, dtype);
        arena.write(&runs, data.elems(), data.elems()).unwrap();
        Row { arena, runs, keys, n }
    }

    /// The best score of each key for a group's queries at positions `first..`, each seeing keys outside its window.
    pub fn known(&self, head: usize, queries: &[Vec<&[f32]>], first: usize, window: usize) -> Known {
        let dim = queries[0][0].len();
        let dot = |t: usize, q: &[f32]| -> f32 {
            self.keys[(head * self.n + t) * dim..][..dim].iter().zip(q).map(|(a, b)| a * b).sum()
        };
        let score = |t: usize| {
            let seen = queries.iter().enumerate().filter(|(i, _)| t + window <= first + i);
            seen.flat_map(|(_, heads)| heads.iter().map(|q| dot(t, q))).fold(f32::NEG_INFINITY, f32::max)
        };
        Known((0..self.n).map(score).collect())
    }
}

/// What a rule selects from a region by these scores, computed anew.
pub fn chosen(rule: &dyn Select, region: Range<u32>, inputs: &mut Inputs, score: &mut dyn Score) -> Chosen {
    rule.select(Asked { region, start: 0, inputs }, score).unwrap()
}

pub fn rules(noise: &mut Noise) -> (Hip, Infinite) {
    let all = [Representative::Middle, Representative::First, Representative::Last, Representative::Oracle];
    let (budget, block) = (1 + noise.below(60), 1 + noise.below(5));
    let hip = Hip::new(budget, block, all[noise.below(4)]).unwrap();
    let mut chunk = 1 + noise.below(4);
    let mut stages = Vec::new();
    for _ in 0..1 + noise.below(3) {
        stages.insert(0, Stage { chunk, keep: chunk * (1 + noise.below(9)) });
        chunk *= 1 + noise.below(4);
    }
    (hip, Infinite::new(stages, all[noise.below(2)], false).unwrap())
}

/// Rotations by quarter turns, which are exact.
pub fn quarters(noise: &mut Noise, dim: usize) -> Rope {
    let pairs = [dim / 2, dim / 4][noise.below(2)];
    let layout = [Layout::Half, Layout::Interleaved][noise.below(2)];
    let turns = (0..pairs).map(|_| noise.below(6) as f64 * FRAC_PI_2).collect();
    Rope::new(turns, layout, [1.0, 2.0][noise.below(2)]).unwrap()
}

/// Packs the first `n` tokens of a row in whole blocks: some pairs of channels, and maybe one that does not rotate.
pub fn pack(noise: &mut Noise, row: &mut Row, rope: &Rope, (heads, dim): (usize, usize), n: usize) {
    let half = rope.inv_freq().len();
    let of = |i: usize| match rope.layout() {
        Layout::Half => (i, i + half),
        Layout::Interleaved => (2 * i, 2 * i + 1),
    };
    let num = 1 + noise.below(half);
    let single = rope.rotary_dim() < dim && noise.below(2) == 0;
    let mut index = Vec::new();
    for _ in 0..heads {
        let first = noise.below(half - num + 1);
        index.extend((first..first + num).map(|i| of(i).0 as i64));
        index.extend((first..first + num).map(|i| of(i).1 as i64));
        index.extend(single.then_some(dim as i64 - 1));
    }
    let channels = Channels::new(&index, &vec![num; heads], dim).unwrap();
    let moves: Vec<Move> = (row.runs.iter().take(n.div_ceil(64)).enumerate())
        .map(|(i, run)| {
            let len = run.len().min(n as u32 - i as u32 * 64);
            Move { from: run.block, from_slot: 0, to: BlockId(PACKED + i as u32), to_slot: 0, len }
        })
        .collect();
    row.arena
        .set_packing(Packing { key_kept: 2 * num + usize::from(single), key_bits: 0, value_bits: 0, group: 1 })
        .unwrap();
    row.arena.pack(&moves, &Keep::New(Arc::new(channels))).unwrap();
    let mut runs: Vec<Run> = moves.iter().map(|m| Run { block: m.to, lo: 0, hi: m.len }).collect();
    let mut left = n as u32;
    for run in &row.runs {
        let gone = left.min(run.len());
        left -= gone;
        if gone < run.len() {
            runs.push(Run { lo: run.lo + gone, ..*run });
        }
    }
    row.runs = runs;
}
