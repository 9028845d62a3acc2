//! Blocks that are judged by the minimum and the maximum of their keys.

use std::ops::Range;

use kvsieve_core::kernels::Level;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::select::{QueryBlock, Selection, Turn, select};
use kvsieve_core::rope::Rope;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::{Chosen, Representative, Score, Select};
use kvsieve_core::tensor::{Dtype, View};
use kvsieve_core::{Error, reference};

use super::rows::{Data, Known, Noise, Row, chosen, pack, quarters};

/// Scores of keys, and bounds of blocks.
struct Bounded(Known, Vec<f32>);

impl Score for Bounded {
    fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>) {
        self.0.best(stretches, out);
    }

    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        out.extend(blocks.map(|b| self.1[b as usize]));
    }
}

/// Blocks whose keys differ in scale, so that bounds tell them apart.
fn scaled(noise: &mut Noise, (heads, n, dim): (usize, usize, usize), dtype: Dtype, even: bool) -> Row {
    let mut row = Row::new(noise, (heads, n, dim), dtype, even);
    for (i, x) in row.keys.iter_mut().enumerate() {
        *x *= [1.0, 0.5, 0.25, 2.0][i / dim / 64 % 4];
    }
    let data = Data::of(&row.keys, dtype);
    row.arena.write(&row.runs, data.elems(), data.elems()).unwrap();
    row
}

/// What queries at these positions score, key by key and block by block.
fn bounded(row: &Row, head: usize, queries: &[(usize, Vec<f32>)], window: usize) -> Bounded {
    let (n, dim) = (row.n, queries[0].1.len());
    let key = |t: usize| &row.keys[(head * n + t) * dim..][..dim];
    let best = |from: usize, product: &dyn Fn(&[f32]) -> f32| {
        let seen = queries.iter().filter(|(p, _)| from + window <= *p);
        seen.map(|(_, q)| product(q)).fold(f32::NEG_INFINITY, f32::max)
    };
    let scores = (0..n).map(|t| best(t, &|q| key(t).iter().zip(q).map(|(a, b)| a * b).sum())).collect();
    let bound = |b: usize| {
        let channel = |c: usize| (64 * b..64 * b + 64).map(move |t| key(t)[c]);
        let most: Vec<f32> = (0..dim).map(|c| channel(c).fold(f32::MIN, f32::max)).collect();
        let least: Vec<f32> = (0..dim).map(|c| channel(c).fold(f32::MAX, f32::min)).collect();
        best(64 * b, &|q| (0..dim).map(|c| (q[c] * most[c]).max(q[c] * least[c])).sum())
    };
    Bounded(Known(scores), (0..n / 64).map(bound).collect())
}

/// Drops channels of the first keys of a row, which lies in whole blocks.
fn thinned(noise: &mut Noise, row: &mut Row, rope: Option<&Rope>, (heads, dim): (usize, usize)) {
    let (other, n) = (quarters(noise, dim), 1 + noise.below(row.n));
    pack(noise, row, rope.unwrap_or(&other), (heads, dim), n);
    let slots = row.runs.iter().flat_map(|run| (run.lo..run.hi).map(|slot| (run.block, slot)));
    let slots: Vec<_> = slots.collect();
    let at = (0..heads).flat_map(|head| slots.iter().map(move |&(block, slot)| (block, head, slot)));
    let keys = at.flat_map(|(block, head, slot)| row.arena.token(block, head, slot).unwrap().0);
    row.keys = keys.map(|x| x as f32).collect();
}

/// A first stage that judges blocks by bounds, on every instruction set, with keys as they lie and raw ones at one distance; in whole
/// blocks, in runs of any length, and where the first keys have lost channels.
#[test]
fn bounds_of_blocks_are_a_first_stage() {
    let mut noise = Noise(23);
    let mut fewer = 0;
    for round in 0..90 {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let dim = [4, 8, 33, 64, 96, 128][noise.below(6)];
        let (kv_heads, group) = (1 + noise.below(3), 1 + noise.below(6));
        let n = 200 + noise.below(900);
        let even = noise.below(2) == 0;
        let mut row = scaled(&mut noise, (kv_heads, n, dim), dtype, even);
        let (columns, stride) = (1 + noise.below(100), 1 + noise.below(9));
        let heads = kv_heads * group;
        let q = noise.eighths(heads * columns * dim);
        let data = Data::of(&q, dtype);
        let view = View::contiguous("q", data.elems(), [1, heads, columns, dim]).unwrap();
        let (sinks, window, first) = (64 * noise.below(2) as u32, 64 + noise.below(60), n - columns);
        let hi = (n - window) as u32;
        let region = hi.min(sinks)..hi;
        let (keep, last) = (64 * (1 + noise.below(4)), [1, 2, 4, 16][noise.below(4)]);
        let stages = vec![Stage { chunk: 64, keep }, Stage { chunk: last, keep: last * (1 + noise.below(9)) }];
        let infinite = Infinite::new(stages, Representative::First, true).unwrap();

        let rope = if dim % 4 == 0 && noise.below(2) == 0 { Some(quarters(&mut noise, dim)) } else { None };
        let factor = rope.as_ref().map_or(1.0, Rope::factor);
        if even && dim % 4 == 0 && noise.below(2) == 0 {
            thinned(&mut noise, &mut row, rope.as_ref(), (kv_heads, dim));
        }
        let blocks =
            [QueryBlock { row: 0, columns: 0..columns, runs: &row.runs, shown: &[], first, region: region.clone() }];
        let turned = |x: &[f32]| -> Vec<f32> {
            let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let Some(rope) = &rope else { return x.to_vec() };
            // A key at position 0 is scaled only.
            let turned = reference::rotated(&wide, window as i64, rope, factor * factor);
            turned.iter().map(|x| (x * 8.0).round() as f32 / 8.0).collect()
        };
        let asked: Vec<usize> = (0..columns).rev().step_by(stride).collect();
        let score = |head: usize| {
            let queries: Vec<(usize, Vec<f32>)> = asked
                .iter()
                .flat_map(|&c| (0..group).map(move |g| (c, g)))
                .map(|(c, g)| (first + c, turned(&q[((head * group + g) * columns + c) * dim..][..dim])))
                .collect();
            bounded(&row, head, &queries, window)
        };
        let mut cache = vec![Vec::new(); kv_heads];
        let want: Vec<Chosen> = (0..kv_heads)
            .zip(&mut cache)
            .map(|(h, cache)| chosen(&infinite, region.clone(), cache, &mut score(h)))
            .collect();
        fewer += usize::from(cache.iter().any(|stages| stages[1].len() * 64 < region.len()));
        let turn = rope.as_ref().map(|rope| Turn { rope, apply_factor: true, relative: true });
        let (q, blocks, rule, query_stride, level) = (view, &blocks, &infinite, stride, Level::Portable);
        let args = Selection { q, turn, blocks, query_stride, window, rule, start: 0, threads: 1, level };
        if infinite.judges_pages(&region) {
            let refused = select(&row.arena, &args, &mut []);
            assert!(matches!(refused, Err(Error::Unsupported(_))), "no bounds yet: {refused:?}");
        }
        row.arena.make_bounds(&row.runs).unwrap();
        for level in levels() {
            for threads in [1, 2] {
                let mut inputs = vec![Vec::new(); kv_heads];
                let found = select(&row.arena, &Selection { threads, level, ..args }, &mut inputs).unwrap();
                assert_eq!(found, want, "round {round} {level:?} {dtype:?} {dim} {infinite:?}");
                assert_eq!(inputs, cache);
            }
        }
    }
    assert!(fewer > 60, "{fewer} rounds chose among blocks");
}
