//! Raw keys, which are scored and read where they are shown, some of them thin.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::select::{QueryBlock, Selection, Turn, select};
use kvsieve_core::kernels::sparse::{Scoring, Sparse, SparseRow, attend_sparse};
use kvsieve_core::plan::{Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::select::{Choice, Chosen, Rule, Shown};
use kvsieve_core::tensor::{Dtype, ElemsMut, View};

use super::rows::{Data, Known, Noise, Row, chosen, pack, quarters, rules};

/// Where the residents stand: some gaps between runs, and none between the last ones, which are the queries.
fn positions(noise: &mut Noise, runs: &[Run], queries: usize) -> Vec<i64> {
    let mut at: Vec<i64> = Vec::new();
    for run in runs {
        let first = at.last().map_or(0, |&p| p + 1) + noise.below(3) as i64 * 50;
        at.extend((0..i64::from(run.len())).map(|i| first + i));
    }
    for i in at.len() - queries..at.len() {
        at[i] = if i == 0 { 0 } else { at[i - 1] + 1 };
    }
    at
}

/// Runs that are each seen in one place by the last of the residents, which stand at `at`; and where.
fn cut_where_shown(runs: &[Run], at: &[i64]) -> (Vec<Run>, Vec<Shown>) {
    let (mut shown, mut cut, mut next) = (Vec::new(), Vec::new(), 0);
    for run in runs {
        for slot in run.lo..run.hi {
            let here = Shown { shift: at[at.len() - 1] - at[next] + i64::from(slot), rotate_keys: true };
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
    (cut, shown)
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
        let columns = (1 + noise.below(9)).min(n);
        let at = positions(&mut noise, &row.runs, columns);
        let (cut, shown) = cut_where_shown(&row.runs, &at);
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
                let (q, blocks, rule) = (view, &blocks, &hip);
                let args = Selection { q, turn, blocks, query_stride: 1, window, rule, start: 0, threads, level };
                let what = format!("round {round} {level:?} {dtype:?} {dim} {turn:?}");
                assert_eq!(select(&row.arena, &args, &mut []).unwrap(), want, "{what}");
                let args = Selection { rule: &infinite, ..args };
                assert_eq!(select(&row.arena, &args, &mut []).unwrap(), staged, "{what}");
            }
        }
    }
}

/// What queries at these positions read, token by token: where it stands, or one after another.
fn spans_read(
    rule: &Rule,
    (region, chosen): (&Range<u32>, &Chosen),
    (positions, consecutive): (Range<usize>, bool),
    slots: &[(BlockId, u32)],
) -> Spans {
    let mut spans = Spans { num_rows: 1, num_queries: positions.len(), starts: vec![0], spans: Vec::new() };
    for position in positions {
        let mut tokens: Vec<usize> = Vec::new();
        rule.read(region, chosen, position, &mut |s: Range<u32>| tokens.extend(s.map(|t| t as usize)));
        let before = tokens.iter().filter(|&&t| t < position).count();
        for (i, &t) in tokens.iter().enumerate() {
            let away = if consecutive { before as i64 - i as i64 } else { position as i64 - t as i64 };
            let (block, lo) = slots[t];
            let shift = away + i64::from(lo);
            spans.spans.push(Span { block, lo, hi: lo + 1, shift, rotate_keys: true });
        }
        spans.starts.push(spans.spans.len() as u32);
    }
    spans
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
                let asked = (n - columns..n, consecutive);
                let spans = spans_read(&rule, (&choices[0].region, chosen), asked, &slots);
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
