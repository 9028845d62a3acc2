//! The search kernel against the searches over scores that are known, on every instruction set: the very same blocks.
//!
//! Keys and queries are multiples of 1/8, so that every product sum is exact in whatever order: a choice cannot hang on rounding.

use std::f64::consts::FRAC_PI_2;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, PACKED, Run};
use kvsieve_core::kernels::Level;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::select::{QueryBlock, Selection, Turn, select, select_unless};
use kvsieve_core::kernels::sparse::{Scoring, Sparse, SparseRow, attend_sparse};
use kvsieve_core::plan::{Move, Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::{Asked, Choice, Chosen, Inputs, Representative, Rule, Score, Select, Shown};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::packed::{Channels, Chosen as Keep, Packing};
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

struct Noise(u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn eighths(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.below(65) as f32 - 32.0) / 8.0).collect()
    }
}

/// The same numbers in any dtype.
struct Data(Vec<f32>, Vec<u16>);

impl Data {
    fn of(x: &[f32], dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Data(x.to_vec(), vec![]),
            Dtype::BF16 => Data(vec![], x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()),
            Dtype::F16 => Data(vec![], x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()),
        }
    }

    fn elems(&self) -> Elems<'_> {
        if self.1.is_empty() { Elems::F32(&self.0) } else { Elems::Bits(&self.1) }
    }
}

struct Known(Vec<f32>);

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
struct Row {
    arena: Arena,
    runs: Vec<Run>,
    /// `[heads][n][dim]`
    keys: Vec<f32>,
    n: usize,
}

impl Row {
    /// In whole blocks, or in runs of any length.
    fn new(noise: &mut Noise, (heads, n, dim): (usize, usize, usize), dtype: Dtype, even: bool) -> Self {
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
    fn known(&self, head: usize, queries: &[Vec<&[f32]>], first: usize, window: usize) -> Known {
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
fn chosen(rule: &dyn Select, region: Range<u32>, inputs: &mut Inputs, score: &mut dyn Score) -> Chosen {
    rule.select(Asked { region, start: 0, inputs }, score).unwrap()
}

fn rules(noise: &mut Noise) -> (Hip, Infinite) {
    let all = [Representative::Centre, Representative::First, Representative::Last, Representative::Oracle];
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

#[test]
fn the_kernel_chooses_what_the_scores_say() {
    let mut noise = Noise(7);
    for round in 0..120 {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let dim = [1, 5, 16, 33, 64, 96, 128][noise.below(7)];
        let (kv_heads, group) = (1 + noise.below(3), 1 + noise.below(8));
        let n = 1 + noise.below(500);
        let row = Row::new(&mut noise, (kv_heads, n, dim), dtype, round % 2 == 0);
        let columns = (1 + noise.below(20)).min(n);
        let heads = kv_heads * group;
        let q = noise.eighths(heads * columns * dim);
        let data = Data::of(&q, dtype);
        let view = View::contiguous("q", data.elems(), [1, heads, columns, dim]).unwrap();
        let window = noise.below(n + 5);
        // Query blocks of a few columns each, the last of which may be shorter.
        let size = 1 + noise.below(columns);
        let blocks: Vec<QueryBlock<'_>> = (0..columns)
            .step_by(size)
            .map(|at| {
                let columns_here = at..(at + size).min(columns);
                let first = n - columns + at;
                let hi = (first + columns_here.len()).saturating_sub(window) as u32;
                let region = hi.min(noise.below(6) as u32)..hi;
                QueryBlock { row: 0, columns: columns_here, runs: &row.runs, shown: &[], first, region }
            })
            .collect();
        let (hip, infinite) = rules(&mut noise);
        let known = |block: &QueryBlock<'_>, head: usize| {
            let queries: Vec<Vec<&[f32]>> = block
                .columns
                .clone()
                .map(|c| (0..group).map(|g| &q[((head * group + g) * columns + c) * dim..][..dim]).collect())
                .collect();
            row.known(head, &queries, block.first, window)
        };
        let each = || blocks.iter().flat_map(|b| (0..kv_heads).map(move |h| (b, h)));
        let want: Vec<Chosen> =
            each().map(|(b, h)| chosen(&hip, b.region.clone(), &mut Vec::new(), &mut known(b, h))).collect();
        let mut cache = vec![Vec::new(); blocks.len() * kv_heads];
        let staged: Vec<Chosen> = each()
            .zip(&mut cache)
            .map(|((b, h), cache)| chosen(&infinite, b.region.clone(), cache, &mut known(b, h)))
            .collect();
        for level in levels() {
            for threads in [1, 2] {
                let (q, blocks, turn) = (view, &blocks, None);
                let args = Selection { q, turn, blocks, query_stride: 1, window, rule: &hip, start: 0, threads, level };
                assert_eq!(select(&row.arena, &args, &mut []).unwrap(), want, "{level:?} {dtype:?} {dim} {hip:?}");
                let args = Selection { rule: &infinite, ..args };
                let mut inputs = vec![Vec::new(); cache.len()];
                assert_eq!(select(&row.arena, &args, &mut inputs).unwrap(), staged, "{level:?} {dtype:?} {infinite:?}");
                assert_eq!(inputs, cache);
                for start in 1..infinite.stages().len() {
                    let args = Selection { rule: &infinite, start, ..args };
                    let again = select(&row.arena, &args, &mut inputs).unwrap();
                    let blocks = |all: &[Chosen]| all.iter().map(|c| c.blocks.clone()).collect::<Vec<_>>();
                    assert_eq!(blocks(&again), blocks(&staged));
                    assert_eq!(inputs, cache);
                }
            }
        }
    }
}

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

/// A first stage that judges blocks by bounds, on every instruction set, with keys as they lie and raw ones at one distance.
#[test]
fn bounds_of_blocks_are_a_first_stage() {
    let mut noise = Noise(23);
    let mut fewer = 0;
    for round in 0..90 {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let dim = [4, 8, 33, 64, 96, 128][noise.below(6)];
        let (kv_heads, group) = (1 + noise.below(3), 1 + noise.below(6));
        let n = 200 + noise.below(900);
        let mut row = Row::new(&mut noise, (kv_heads, n, dim), dtype, true);
        // Scales that differ, so that bounds tell blocks apart.
        for (i, x) in row.keys.iter_mut().enumerate() {
            *x *= [1.0, 0.5, 0.25, 2.0][i / dim / 64 % 4];
        }
        let data = Data::of(&row.keys, dtype);
        row.arena.write(&row.runs, data.elems(), data.elems()).unwrap();
        let (columns, stride) = (1 + noise.below(100), 1 + noise.below(9));
        let heads = kv_heads * group;
        let q = noise.eighths(heads * columns * dim);
        let data = Data::of(&q, dtype);
        let view = View::contiguous("q", data.elems(), [1, heads, columns, dim]).unwrap();
        let (sinks, window, first) = (64 * noise.below(2) as u32, 64 + noise.below(60), n - columns);
        let hi = (n - window) as u32;
        let region = hi.min(sinks)..hi;
        let blocks =
            [QueryBlock { row: 0, columns: 0..columns, runs: &row.runs, shown: &[], first, region: region.clone() }];
        let (keep, last) = (64 * (1 + noise.below(4)), [1, 2, 4, 16][noise.below(4)]);
        let stages = vec![Stage { chunk: 64, keep }, Stage { chunk: last, keep: last * (1 + noise.below(9)) }];
        let infinite = Infinite::new(stages, Representative::First, true).unwrap();

        let rope = if dim % 4 == 0 && noise.below(2) == 0 { Some(quarters(&mut noise, dim)) } else { None };
        let factor = rope.as_ref().map_or(1.0, Rope::factor);
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
        };
        let mut cache = vec![Vec::new(); kv_heads];
        let want: Vec<Chosen> = (0..kv_heads)
            .zip(&mut cache)
            .map(|(h, cache)| chosen(&infinite, region.clone(), cache, &mut score(h)))
            .collect();
        fewer += usize::from(cache.iter().any(|stages| stages[1].len() * 64 < region.len()));
        let turn = rope.as_ref().map(|rope| Turn { rope, apply_factor: true, relative: true });
        let args = Selection {
            q: view,
            turn,
            blocks: &blocks,
            query_stride: stride,
            window,
            rule: &infinite,
            start: 0,
            threads: 1,
            level: Level::Portable,
        };
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

/// Rotations by quarter turns, which are exact.
fn quarters(noise: &mut Noise, dim: usize) -> Rope {
    let pairs = [dim / 2, dim / 4][noise.below(2)];
    let layout = [Layout::Half, Layout::Interleaved][noise.below(2)];
    let turns = (0..pairs).map(|_| noise.below(6) as f64 * FRAC_PI_2).collect();
    Rope::new(turns, layout, [1.0, 2.0][noise.below(2)]).unwrap()
}

/// Packs the first `n` tokens of a row in whole blocks: some pairs of channels, and maybe one that does not rotate.
fn pack(noise: &mut Noise, row: &mut Row, rope: &Rope, (heads, dim): (usize, usize), n: usize) {
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

/// Raw keys, scored where they are shown or all at one distance, some of them thin; on every instruction set.
#[test]
fn keys_are_made_and_turned_for_scoring() {
    let mut noise = Noise(11);
    for round in 0..90 {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let dim = [4, 8, 16, 48, 64, 96, 128][noise.below(7)];
        let (kv_heads, group) = (1 + noise.below(2), 1 + noise.below(5));
        let n = 1 + noise.below(400);
        let even = noise.below(2) == 0;
        let mut row = Row::new(&mut noise, (kv_heads, n, dim), dtype, even);
        let rope = quarters(&mut noise, dim);
        if even && noise.below(3) > 0 {
            let packed = 1 + noise.below(n);
            pack(&mut noise, &mut row, &rope, (kv_heads, dim), packed);
        }
        // Where the residents stand: some gaps between runs.
        let mut at: Vec<i64> = Vec::new();
        for run in &row.runs {
            let first = at.last().map_or(0, |&p| p + 1) + noise.below(3) as i64 * 50;
            at.extend((0..i64::from(run.len())).map(|i| first + i));
        }
        let columns = (1 + noise.below(9)).min(n);
        // The queries are the last tokens, and stand behind each other.
        for i in n - columns..n {
            at[i] = if i == 0 { 0 } else { at[i - 1] + 1 };
        }
        let (mut shown, mut cut, mut next) = (Vec::new(), Vec::new(), 0);
        for run in &row.runs {
            for slot in run.lo..run.hi {
                let here = Shown { shift: at[n - 1] - at[next] + i64::from(slot), rotate_keys: true };
                if shown.last() == Some(&here) && slot > run.lo {
                    let open: &mut Run = cut.last_mut().unwrap();
                    open.hi += 1;
                } else {
                    cut.push(Run { block: run.block, lo: slot, hi: slot + 1 });
                    shown.push(here);
                }
                next += 1;
            }
        }
        let heads = kv_heads * group;
        let q = noise.eighths(heads * columns * dim);
        let data = Data::of(&q, dtype);
        let view = View::contiguous("q", data.elems(), [1, heads, columns, dim]).unwrap();
        let window = noise.below(n + 5);
        let (apply_factor, relative) = (noise.below(2) == 0, noise.below(2) == 0);
        let first = n - columns;
        let hi = (first + columns).saturating_sub(window) as u32;
        let region = hi.min(noise.below(6) as u32)..hi;
        let runs = &cut;
        let blocks = [QueryBlock { row: 0, columns: 0..columns, runs, shown: &shown, first, region: region.clone() }];
        let factor = if apply_factor { rope.factor() } else { 1.0 };
        let turned = |x: &[f64], position: i64| -> Vec<f64> {
            reference::rotated(x, position, &rope, factor).iter().map(|x| (x * 8.0).round() / 8.0).collect()
        };
        let known = |head: usize| {
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let queries: Vec<Vec<Vec<f64>>> = (0..columns)
                .map(|c| {
                    let position = if relative { window as i64 } else { at[first + c] };
                    let query = |g| turned(&wide(&q[((head * group + g) * columns + c) * dim..][..dim]), position);
                    (0..group).map(query).collect()
                })
                .collect();
            let slots: Vec<(BlockId, u32)> = cut.iter().flat_map(|r| (r.lo..r.hi).map(|s| (r.block, s))).collect();
            let score = |t: usize| {
                let key = row.arena.token(slots[t].0, head, slots[t].1).unwrap().0;
                let key = turned(&key, if relative { 0 } else { at[t] });
                let seen = queries.iter().enumerate().filter(|(i, _)| t + window <= first + i);
                let dot = |q: &Vec<f64>| q.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() as f32;
                seen.flat_map(|(_, heads)| heads.iter().map(dot)).fold(f32::NEG_INFINITY, f32::max)
            };
            Known((0..n).map(score).collect())
        };
        let (hip, infinite) = rules(&mut noise);
        let want: Vec<Chosen> =
            (0..kv_heads).map(|h| chosen(&hip, region.clone(), &mut Vec::new(), &mut known(h))).collect();
        let staged: Vec<Chosen> =
            (0..kv_heads).map(|h| chosen(&infinite, region.clone(), &mut Vec::new(), &mut known(h))).collect();
        let turn = Some(Turn { rope: &rope, apply_factor, relative });
        for level in levels() {
            for threads in [1, 2] {
                let args = Selection {
                    q: view,
                    turn,
                    blocks: &blocks,
                    query_stride: 1,
                    window,
                    rule: &hip,
                    start: 0,
                    threads,
                    level,
                };
                let what = format!("round {round} {level:?} {dtype:?} {dim} {turn:?}");
                assert_eq!(select(&row.arena, &args, &mut []).unwrap(), want, "{what}");
                let args = Selection { rule: &infinite, ..args };
                assert_eq!(select(&row.arena, &args, &mut []).unwrap(), staged, "{what}");
            }
        }
    }
}

/// What is chosen is read where it stands, or one after another; plain and thin keys in one row; on every instruction set.
#[test]
fn what_is_chosen_is_attended_where_it_is_shown() {
    let mut noise = Noise(5);
    for round in 0..30 {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let dim = [16, 48, 64, 128][noise.below(4)];
        let (kv_heads, group, n) = (1 + noise.below(2), 1 + noise.below(4), 70 + noise.below(250));
        let mut row = Row::new(&mut noise, (kv_heads, n, dim), dtype, true);
        let inv_freq = (0..dim / 2).map(|i| 1e3f64.powf(-(i as f64) / (dim / 2) as f64)).collect();
        let rope = Arc::new(Rope::new(inv_freq, [Layout::Half, Layout::Interleaved][round % 2], 1.1).unwrap());
        if round % 4 > 0 {
            let packed = 1 + noise.below(n - 20);
            pack(&mut noise, &mut row, &rope, (kv_heads, dim), packed);
        }
        let mut shown = Vec::new();
        let mut next = 0;
        for run in &row.runs {
            shown.push(Shown { shift: (n - 1 - next) as i64 + i64::from(run.lo), rotate_keys: true });
            next += run.len() as usize;
        }
        let (heads, columns) = (kv_heads * group, [1, 7][noise.below(2)]);
        let q: Vec<f32> = noise.eighths(heads * columns * dim).iter().map(|x| x / 8.0).collect();
        let data = Data::of(&q, dtype);
        let view = View::contiguous("q", data.elems(), [1, heads, columns, dim]).unwrap();
        let (hip, _) = rules(&mut noise);
        let (sinks, window) = (noise.below(4), noise.below(30));
        let rule = Rule::new(Arc::new(hip), sinks, window, vec![4]).unwrap();
        let consecutive = noise.below(2) == 0;
        let scoring = if consecutive || noise.below(2) == 0 { Scoring::Relative } else { Scoring::Placed };
        let slots: Vec<(BlockId, u32)> = row.runs.iter().flat_map(|r| (r.lo..r.hi).map(|s| (r.block, s))).collect();
        for level in levels() {
            let args = Sparse {
                q: view,
                rope: Some(&rope),
                apply_factor: true,
                scoring,
                consecutive,
                rows: &[SparseRow { runs: &row.runs, shown: &shown, new_len: columns }],
                query_block: 512,
                query_stride: 1,
                scale: 0.3,
                softcap: None,
                sinks: None,
                threads: 1,
                level,
            };
            let mut choices = [Choice::default()];
            let count = columns * heads * dim;
            let (mut wide, mut bits) = (vec![7f32; count], vec![7u16; count]);
            let to = if dtype == Dtype::F32 { ElemsMut::F32(&mut wide) } else { ElemsMut::Bits(&mut bits) };
            attend_sparse(&row.arena, &rule, &mut choices, &args, to, None, &|| false).unwrap();
            let got = |i: usize| match dtype {
                Dtype::F32 => f64::from(wide[i]),
                Dtype::BF16 => bf16::from_bits(bits[i]).to_f64(),
                Dtype::F16 => f16::from_bits(bits[i]).to_f64(),
            };
            for (head, chosen) in choices[0].chosen.iter().enumerate() {
                let mut spans = Spans { num_rows: 1, num_queries: columns, starts: vec![0], spans: Vec::new() };
                for position in n - columns..n {
                    let mut tokens: Vec<usize> = Vec::new();
                    rule.read(&choices[0].region, chosen, position, &mut |s: Range<u32>| {
                        tokens.extend(s.map(|t| t as usize));
                    });
                    let before = tokens.iter().filter(|&&t| t < position).count();
                    for (i, &t) in tokens.iter().enumerate() {
                        let away = if consecutive { before as i64 - i as i64 } else { position as i64 - t as i64 };
                        let (block, lo) = slots[t];
                        let shift = away + i64::from(lo);
                        spans.spans.push(Span { block, lo, hi: lo + 1, shift, rotate_keys: true });
                    }
                    spans.starts.push(spans.spans.len() as u32);
                }
                let (scale, softcap, sinks) = (f64::from(0.3f32), None, None);
                let params = reference::Params {
                    q: &view,
                    spans: &spans,
                    rope: Some(&rope),
                    scale,
                    softcap,
                    sinks,
                    apply_factor: true,
                };
                let exact = reference::attend(&row.arena, &params).unwrap().out;
                for item in 0..columns {
                    let mine = (item * heads + head * group) * dim..(item * heads + (head + 1) * group) * dim;
                    let norm = exact[mine.clone()].iter().map(|x| x * x).sum::<f64>().sqrt();
                    let off = mine.map(|i| (exact[i] - got(i)).powi(2)).sum::<f64>().sqrt();
                    let most = if dtype == Dtype::F32 { 1e-5 } else { 1e-2 };
                    assert!(off <= most * norm.max(1e-9), "round {round} {level:?} {dtype:?} {dim}: {off} of {norm}");
                }
            }
        }
    }
}

#[test]
fn a_key_of_nan_is_never_chosen() {
    let mut noise = Noise(1);
    let mut arena = Arena::new(1, 64, 64, Dtype::F32).unwrap();
    let mut keys = noise.eighths(64 * 64);
    keys[..40 * 64].fill(f32::NAN);
    let run = [Run { block: BlockId(0), lo: 0, hi: 64 }];
    arena.write(&run, Elems::F32(&keys), Elems::F32(&keys)).unwrap();
    let q = noise.eighths(64);
    let hip = Hip::new(16, 1, Representative::Oracle).unwrap();
    for level in levels() {
        let blocks = [QueryBlock { row: 0, columns: 0..1, runs: &run, shown: &[], first: 63, region: 0..64 }];
        let q = View::contiguous("q", Elems::F32(&q), [1, 1, 1, 64]).unwrap();
        let args = Selection {
            q,
            turn: None,
            blocks: &blocks,
            query_stride: 1,
            window: 0,
            rule: &hip,
            start: 0,
            threads: 1,
            level,
        };
        let found = select(&arena, &args, &mut []).unwrap();
        assert_eq!(found[0].blocks.len(), 16);
        assert!(found[0].blocks.iter().all(|b| b.start >= 40));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut noise = Noise(1);
    let row = Row::new(&mut noise, (2, 100, 8), Dtype::F32, true);
    let q = noise.eighths(4 * 2 * 8);
    let good = QueryBlock { row: 0, columns: 0..2, runs: &row.runs, shown: &[], first: 98, region: 0..90 };
    let hip = Hip::new(4, 1, Representative::First).unwrap();
    let infinite =
        Infinite::new(vec![Stage { chunk: 2, keep: 4 }, Stage { chunk: 1, keep: 2 }], Representative::First, false)
            .unwrap();
    let run = |block: QueryBlock<'_>,
               shape: [usize; 4],
               (rule, start): (&dyn Select, usize),
               inputs: usize,
               threads: usize| {
        let q = View::contiguous("q", Elems::F32(&q), shape).unwrap();
        let args = Selection {
            q,
            turn: None,
            blocks: &[block],
            query_stride: 1,
            window: 4,
            rule,
            start,
            threads,
            level: Level::Portable,
        };
        select(&row.arena, &args, &mut vec![Vec::new(); inputs])
    };
    let (by, shape): ((&dyn Select, usize), _) = ((&hip, 0), [1, 4, 2, 8]);
    assert!(run(good.clone(), shape, by, 0, 1).is_ok());
    let shape_error =
        |found: Result<Vec<Chosen>, Error>| assert!(matches!(found, Err(Error::Shape { .. })), "{found:?}");
    shape_error(run(good.clone(), [1, 2, 2, 16], by, 0, 1));
    shape_error(run(good.clone(), [1, 1, 8, 8], by, 0, 1));
    shape_error(run(QueryBlock { row: 1, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(QueryBlock { columns: 1..3, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(QueryBlock { columns: 1..1, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(QueryBlock { region: 0..101, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(good.clone(), shape, by, 1, 1));
    shape_error(run(good.clone(), shape, (&infinite, 1), 0, 1));
    assert!(matches!(run(good.clone(), shape, (&infinite, 1), 2, 1), Err(Error::OutOfRange { .. })));
    assert!(matches!(run(good.clone(), shape, by, 0, 0), Err(Error::OutOfRange { .. })));
    let elsewhere = [Run { block: BlockId(900), lo: 0, hi: 9 }];
    let missing = QueryBlock { runs: &elsewhere, region: 0..3, ..good.clone() };
    assert!(matches!(run(missing, shape, by, 0, 1), Err(Error::BadBlock { .. })));
}

#[test]
fn a_signal_stops_it() {
    let mut noise = Noise(1);
    let row = Row::new(&mut noise, (1, 100, 8), Dtype::F32, true);
    let q = noise.eighths(40 * 8);
    let q = View::contiguous("q", Elems::F32(&q), [1, 1, 40, 8]).unwrap();
    let hip = Hip::new(4, 1, Representative::First).unwrap();
    let block =
        |i: usize| QueryBlock { row: 0, columns: i..i + 1, runs: &row.runs, shown: &[], first: 60 + i, region: 0..40 };
    let blocks: Vec<QueryBlock<'_>> = (0..40).map(block).collect();
    let args = Selection {
        q,
        turn: None,
        blocks: &blocks,
        query_stride: 1,
        window: 4,
        rule: &hip,
        start: 0,
        threads: 1,
        level: Level::Portable,
    };
    assert_eq!(select_unless(&row.arena, &args, &mut [], &|| true), Err(Error::Interrupted));

    let rule = Rule::new(Arc::new(hip), 2, 4, vec![8]).unwrap();
    let args = Sparse {
        q,
        rope: None,
        apply_factor: false,
        scoring: Scoring::Stored,
        consecutive: false,
        rows: &[SparseRow { runs: &row.runs, shown: &[], new_len: 40 }],
        query_block: 16,
        query_stride: 1,
        scale: 1.0,
        softcap: None,
        sinks: None,
        threads: 1,
        level: Level::Portable,
    };
    let mut out = vec![0f32; 40 * 8];
    let mut run = |stops: bool, choices: &mut [Choice]| {
        attend_sparse(&row.arena, &rule, choices, &args, ElemsMut::F32(&mut out), None, &|| stops)
    };
    let mut choices = [Choice::default()];
    assert_eq!(run(true, &mut choices), Err(Error::Interrupted));
    assert_eq!(choices, [Choice::default()], "what was chosen before the signal does not stand");
    assert!(run(false, &mut choices).is_ok());
    assert_eq!(choices[0].next, 100);
}
