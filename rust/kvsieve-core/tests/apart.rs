//! Decode attention where heads read spans of their own, and many short ones, against the naive twin.

use super::common::data::{DTYPES, Data, Noise, filled, off, span, tolerance, widen};
use kvsieve_core::Error;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::{Attend, Level, attend_apart, attend_unless};
use kvsieve_core::plan::{Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::tensor::Dtype;

/// Spans of at most `most` slots each, in any order.
fn scattered(noise: &mut Noise, blocks: usize, count: usize, most: usize) -> Vec<Span> {
    let one = |noise: &mut Noise| {
        let len = noise.below(most + 1) as u32;
        let lo = noise.below(65 - len as usize) as u32;
        span(noise.below(blocks) as u32, lo, lo + len, 0, false)
    };
    (0..count).map(|_| one(noise)).collect()
}

#[test]
fn every_head_reads_its_own() {
    let mut noise = Noise(3);
    for round in 0..60 {
        let dtype = DTYPES[round % 3];
        let dims = [(64, 64), (128, 128), (33, 20), (16, 48)][noise.below(4)];
        let (rows, queries, kv_heads, group) =
            (1 + noise.below(2), 1 + noise.below(2), 1 + noise.below(3), 1 + noise.below(6));
        let arena = filled(&mut noise, kv_heads, dims, dtype, 20);
        let heads = kv_heads * group;
        let q = noise.data(rows * heads * queries * dims.0, dtype);
        let q = q.view([rows, heads, queries, dims.0]);
        let (mut starts, mut spans) = (vec![0], Vec::new());
        for _ in 0..rows * queries * kv_heads {
            let (count, most) = (noise.below(90), [1, 2, 8, 64][noise.below(4)]);
            // Now and then enough for several units.
            let count = if noise.below(6) == 0 { 4200 / most.max(8) } else { count };
            spans.extend(scattered(&mut noise, 20, count, most));
            starts.push(spans.len() as u32);
        }
        let spans = Spans { num_rows: rows, num_queries: queries, starts, spans };
        let sinks: Vec<f32> = (0..heads).map(|_| noise.unit()).collect();
        let mut args = Attend {
            q,
            spans: &spans,
            trig: None,
            scale: 0.2,
            softcap: [None, Some(3.0)][noise.below(2)],
            sinks: [None, Some(&sinks[..])][noise.below(2)],
            apply_factor: false,
            threads: 1,
            level: Level::Portable,
        };
        // The twin knows shared spans only: for each head all heads are attended to its list.
        let (mut exact, mut exact_lse) =
            (vec![0.0; rows * queries * heads * dims.1], vec![0.0; rows * heads * queries]);
        for kv_head in 0..kv_heads {
            let lists = (0..rows * queries).map(|item| {
                let list = item * kv_heads + kv_head;
                spans.spans[spans.starts[list] as usize..spans.starts[list + 1] as usize].to_vec()
            });
            let mut mine = Spans { num_rows: rows, num_queries: queries, starts: vec![0], spans: vec![] };
            for list in lists {
                mine.spans.extend(list);
                mine.starts.push(mine.spans.len() as u32);
            }
            let params = reference::Params {
                q: &q,
                spans: &mine,
                rope: None,
                scale: 0.2f32.into(),
                softcap: args.softcap.map(f64::from),
                sinks: args.sinks,
                apply_factor: false,
            };
            let all = reference::attend(&arena, &params).unwrap();
            for head in kv_head * group..(kv_head + 1) * group {
                for item in 0..rows * queries {
                    let at = (item * heads + head) * dims.1;
                    exact[at..at + dims.1].copy_from_slice(&all.out[at..at + dims.1]);
                    let at = (item / queries * heads + head) * queries + item % queries;
                    exact_lse[at] = all.lse[at];
                }
            }
        }
        for level in levels() {
            let mut first = None;
            for threads in [1, 2] {
                (args.level, args.threads) = (level, threads);
                let mut out = Data::of(&vec![7.0; exact.len()], dtype);
                let mut lse = vec![7.0; exact_lse.len()];
                attend_apart(&arena, &args, out.elems_mut(), Some(&mut lse), &|| false).unwrap();
                let what = format!("round {round} {level:?} {dtype:?} {dims:?} group {group}");
                assert!(off(&out.f64s(), &exact) <= tolerance(dtype), "out, {what}: {}", off(&out.f64s(), &exact));
                assert!(off(&widen(&lse), &exact_lse) <= 1e-5, "lse, {what}");
                let first = first.get_or_insert_with(|| (out.clone(), lse.clone()));
                assert_eq!((&first.0, &first.1), (&out, &lse), "threads must not matter, {what}");
            }
        }
    }
}

#[test]
fn equal_lists_are_the_shared_answer() {
    let mut noise = Noise(9);
    for dtype in DTYPES {
        let arena = filled(&mut noise, 3, (64, 64), dtype, 90);
        let list = scattered(&mut noise, 90, 300, 40);
        let q = noise.data(6 * 64, dtype);
        let q = q.view([1, 6, 1, 64]);
        let shared = Spans { num_rows: 1, num_queries: 1, starts: vec![0, list.len() as u32], spans: list.clone() };
        let starts = (0..=3).map(|i| i * list.len() as u32).collect();
        let apart = Spans { num_rows: 1, num_queries: 1, starts, spans: list.repeat(3) };
        for level in levels() {
            let args = |spans| {
                let (trig, scale, softcap, sinks) = (None, 0.3, None, None);
                Attend { q, spans, trig, scale, softcap, sinks, apply_factor: false, threads: 1, level }
            };
            let (mut one, mut two) = (Data::of(&[7.0; 6 * 64], dtype), Data::of(&[8.0; 6 * 64], dtype));
            attend_unless(&arena, &args(&shared), one.elems_mut(), None, None, &|| false).unwrap();
            attend_apart(&arena, &args(&apart), two.elems_mut(), None, &|| false).unwrap();
            assert_eq!(one, two, "{level:?}");
            assert!(attend_apart(&arena, &args(&shared), two.elems_mut(), None, &|| false).is_err());
            assert!(attend_unless(&arena, &args(&apart), two.elems_mut(), None, None, &|| false).is_err());
        }
    }
}

#[test]
fn a_signal_stops_it() {
    let mut noise = Noise(9);
    let arena = filled(&mut noise, 2, (64, 64), Dtype::F32, 40);
    let list: Vec<Span> = (0..2000).map(|i| span(i % 40, 0, 64, 0, false)).collect();
    let q = noise.data(2 * 64, Dtype::F32);
    let starts = vec![0, list.len() as u32, 2 * list.len() as u32];
    let spans = Spans { num_rows: 1, num_queries: 1, starts, spans: list.repeat(2) };
    let (trig, softcap, sinks, level) = (None, None, None, Level::Portable);
    let q = q.view([1, 2, 1, 64]);
    let args = Attend { q, spans: &spans, trig, scale: 1.0, softcap, sinks, apply_factor: false, threads: 1, level };
    let mut out = Data::of(&[7.0; 128], Dtype::F32);
    let stopped = attend_apart(&arena, &args, out.elems_mut(), None, &|| true);
    assert_eq!(stopped, Err(Error::Interrupted));
    assert_eq!(out, Data::of(&[7.0; 128], Dtype::F32));
}
