//! The kernels against their naive twin, on every instruction set of the machine.

use std::sync::Arc;

use super::common::data::*;
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::merge::{Partial, merge};
use kvsieve_core::kernels::read::read;
use kvsieve_core::kernels::rotate::rotate;
use kvsieve_core::kernels::surprisal::surprisal;
use kvsieve_core::kernels::{Attend, Level, SpanTrig, attend, attend_unless};
use kvsieve_core::plan::{Span, Spans};
use kvsieve_core::rank::top_k;
use kvsieve_core::reference;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

#[test]
fn attend_equals_the_reference() {
    let mut noise = Noise(0x9e37_79b9);
    let shapes = [(64, 64), (128, 128), (96, 96), (16, 16), (80, 80), (256, 256), (2, 1), (22, 38), (192, 128)];
    for round in 0..120 {
        let dims = shapes[noise.below(shapes.len())];
        let dtype = DTYPES[round % 3];
        let kv_heads = 1 + noise.below(3);
        let group = [1, 2, 3, 4, 5, 7, 8, 16][noise.below(8)];
        let heads = kv_heads * group;
        let (rows, queries) = (1 + noise.below(2), 1 + noise.below(3));
        let arena = filled(&mut noise, kv_heads, dims, dtype, 40);
        let pairs = (1 + noise.below(dims.0 / 2)).max(if noise.below(2) == 0 { dims.0 / 2 } else { 1 });
        let layout = if noise.below(2) == 0 { Layout::Half } else { Layout::Interleaved };
        let inv_freq = (0..pairs).map(|i| 1e4f64.powf(-(i as f64) / pairs as f64)).collect();
        let rope = Arc::new(Rope::new(inv_freq, layout, [1.0, 1.1][noise.below(2)]).unwrap());

        let mut spans = Spans { num_rows: rows, num_queries: queries, starts: vec![0], spans: Vec::new() };
        for item in 0..rows * queries {
            // Pads first, then few or many, whole blocks or scraps.
            let many = if item == 0 && queries > 1 { 0 } else { noise.below(40) };
            for _ in 0..many {
                let (a, b) = if noise.below(2) == 0 { (0, 64) } else { (noise.below(65), noise.below(65)) };
                let shift = [0, 5, 1000, 123_456, -3][noise.below(5)];
                let rotate = noise.below(2) == 0;
                spans.spans.push(span(noise.below(40) as u32, a.min(b) as u32, a.max(b) as u32, shift, rotate));
            }
            spans.starts.push(spans.spans.len() as u32);
        }
        // Queries as torch has them: [rows, queries, heads, dim], transposed, inside something larger.
        let stride = heads * dims.0 + 3;
        let q = noise.data(rows * queries * stride + 5, dtype);
        let strides = [queries * stride, dims.0, stride];
        let q = View::new("q", q.elems(), [rows, heads, queries, dims.0], strides).unwrap();
        let sinks: Vec<f32> = (0..heads).map(|_| noise.unit() * 3.0).collect();
        let with_rope = noise.below(4) > 0;
        let trig = SpanTrig::new(&spans, &rope);
        let mut args = Attend {
            q,
            spans: &spans,
            trig: with_rope.then_some(&trig),
            scale: 1.0 / (dims.0 as f32).sqrt(),
            softcap: [None, Some(2.0), Some(50.0)][noise.below(3)],
            sinks: (noise.below(2) == 0).then_some(&sinks[..]),
            apply_factor: noise.below(2) == 0,
            threads: 1,
            level: Level::Portable,
        };
        let exact = reference::attend(
            &arena,
            &reference::Params {
                q: &q,
                spans: &spans,
                rope: with_rope.then_some(&*rope),
                scale: f64::from(args.scale),
                softcap: args.softcap.map(f64::from),
                sinks: args.sinks,
                apply_factor: args.apply_factor,
            },
        )
        .unwrap();
        for level in levels() {
            (args.level, args.threads) = (level, 1);
            let one = call(&arena, &args);
            let what = format!("round {round} {level:?} {dtype:?} {dims:?} group {group}");
            let bound = tolerance(dtype);
            assert!(off(&one.out.f64s(), &exact.out) <= bound, "out, {what}: {}", off(&one.out.f64s(), &exact.out));
            assert!(off(&widen(&one.lse), &exact.lse) <= 1e-5, "lse, {what}: {}", off(&widen(&one.lse), &exact.lse));
            assert!(
                off(&widen(&one.mass), &exact.mass) <= 1e-5,
                "mass, {what}: {}",
                off(&widen(&one.mass), &exact.mass)
            );
            args.threads = 2;
            let two = call(&arena, &args);
            assert_eq!(one.out, two.out, "threads must not matter, {what}");
            assert_eq!((one.lse, one.mass), (two.lse, two.mass), "threads must not matter, {what}");
        }
    }
}

#[test]
fn long_contexts_are_split_and_merged() {
    let mut noise = Noise(77);
    for dtype in DTYPES {
        let arena = filled(&mut noise, 3, (64, 64), dtype, 160);
        let spans: Vec<Span> = (0..160).map(|b| span(b, 0, 64, 0, false)).collect();
        let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, 160], spans };
        let q = noise.data(9 * 64, dtype);
        let q = q.view([1, 9, 1, 64]);
        let args = |threads, level| Attend {
            q,
            spans: &spans,
            trig: None,
            scale: 1.0,
            softcap: None,
            sinks: None,
            apply_factor: false,
            threads,
            level,
        };
        let (rope, softcap, sinks, apply_factor) = (None, None, None, false);
        let params = reference::Params { q: &q, spans: &spans, rope, scale: 1.0, softcap, sinks, apply_factor };
        let exact = reference::attend(&arena, &params).unwrap();
        for level in levels() {
            let one = call(&arena, &args(1, level));
            assert!(off(&one.out.f64s(), &exact.out) <= tolerance(dtype));
            assert!(off(&widen(&one.mass), &exact.mass) <= 1e-5);
            for threads in [2, 3] {
                assert_eq!(one.out, call(&arena, &args(threads, level)).out);
            }
        }
    }
}

#[test]
fn the_three_ways_to_place_give_their_numbers() {
    let kept = [0.0, 1.0, 6.0, 7.0, 8.0, 9.0];
    let mut arena = Arena::new(1, 2, 1, Dtype::F32).unwrap();
    let keys = [1.0, 0.0].repeat(6);
    let run = [Run { block: BlockId(0), lo: 0, hi: 6 }];
    arena.write(&run, Elems::F32(&keys), Elems::F32(&kept)).unwrap();
    let rope = Arc::new(Rope::new(vec![1.0], Layout::Half, 1.0).unwrap());
    let slots = vec![span(0, 0, 6, 5, true)];
    let ceiling = vec![span(0, 0, 2, 4, false), span(0, 2, 6, 5, true)];
    let truth = vec![span(0, 0, 2, 9, true), span(0, 2, 6, 5, true)];
    for (spans, expected) in [(slots, 5.890367), (ceiling, 6.472257), (truth, 6.340546)] {
        let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, spans.len() as u32], spans };
        let trig = SpanTrig::new(&spans, &rope);
        for level in levels() {
            let args = Attend {
                q: View::contiguous("q", Elems::F32(&[1.0, 0.0]), [1, 1, 1, 2]).unwrap(),
                spans: &spans,
                trig: Some(&trig),
                scale: 0.5f32.sqrt(),
                softcap: None,
                sinks: None,
                apply_factor: false,
                threads: 1,
                level,
            };
            let got = call(&arena, &args).out.wide[0];
            assert!((got - expected).abs() < 2e-6, "{got} {expected}");
        }
    }
}

#[test]
fn nan_in_a_key_reaches_the_output() {
    let mut noise = Noise(5);
    let mut arena = filled(&mut noise, 1, (64, 64), Dtype::F32, 3);
    let run = [Run { block: BlockId(1), lo: 7, hi: 8 }];
    arena.write(&run, Elems::F32(&[f32::NAN; 64]), Elems::F32(&[0.0; 64])).unwrap();
    let spans = (0..3).map(|b| span(b, 0, 64, 0, false)).collect();
    let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, 3], spans };
    let q = noise.data(64, Dtype::F32);
    for level in levels() {
        let args = Attend {
            q: q.view([1, 1, 1, 64]),
            spans: &spans,
            trig: None,
            scale: 0.1,
            softcap: None,
            sinks: None,
            apply_factor: false,
            threads: 1,
            level,
        };
        let mut out = [0f32; 64];
        attend(&arena, &args, ElemsMut::F32(&mut out), None, None).unwrap();
        assert!(out.iter().all(|x| x.is_nan()));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut noise = Noise(6);
    let arena = filled(&mut noise, 2, (16, 16), Dtype::F32, 1);
    let q = noise.data(4 * 16, Dtype::F32);
    let mut out = vec![0f32; 4 * 16];
    let mut attempt = |spans: Vec<Span>, shape: [usize; 4], threads: usize, starts: Vec<u32>| {
        let spans = Spans { num_rows: 1, num_queries: 1, starts, spans };
        let args = Attend {
            q: View::contiguous("q", q.elems(), shape).unwrap(),
            spans: &spans,
            trig: None,
            scale: 0.1,
            softcap: None,
            sinks: None,
            apply_factor: false,
            threads,
            level: Level::Portable,
        };
        attend(&arena, &args, ElemsMut::F32(&mut out), None, None)
    };
    let good = || vec![span(0, 0, 64, 0, false)];
    let shape = [1, 4, 1, 16];
    assert_eq!(attempt(good(), shape, 1, vec![0, 1]), Ok(()));
    assert!(matches!(attempt(good(), shape, 0, vec![0, 1]), Err(Error::OutOfRange { what: "threads", .. })));
    assert!(matches!(attempt(good(), [1, 3, 1, 16], 1, vec![0, 1]), Err(Error::Shape { what: "q", .. })));
    assert!(matches!(attempt(good(), [1, 4, 1, 8], 1, vec![0, 1]), Err(Error::Shape { what: "q", .. })));
    assert!(matches!(attempt(good(), shape, 1, vec![0, 2]), Err(Error::Shape { .. })));
    assert!(matches!(attempt(good(), shape, 1, vec![1, 1]), Err(Error::Shape { .. })));
    assert!(matches!(attempt(vec![span(9, 0, 1, 0, false)], shape, 1, vec![0, 1]), Err(Error::BadBlock { .. })));
    assert!(matches!(attempt(vec![span(0, 3, 2, 0, false)], shape, 1, vec![0, 1]), Err(Error::OutOfRange { .. })));
    assert!(matches!(attempt(vec![span(0, 0, 65, 0, false)], shape, 1, vec![0, 1]), Err(Error::OutOfRange { .. })));
    assert!(View::new("q", q.elems(), [1, 4, 1, 16], [0, 17, 0]).is_err());
    assert!(View::new("q", q.elems(), [2, 4, 2, 16], [usize::MAX, 16, 16]).is_err());
}

#[test]
fn rotate_gives_the_worked_numbers() {
    let k = [1.0f32, 2.0, 3.0, 4.0];
    let at = |x: &[f32], position: i64, layout, inverse| {
        let rope = Rope::new(vec![1.0, 0.01], layout, 1.0).unwrap();
        let mut all = Vec::new();
        for level in levels() {
            let mut out = vec![0f32; 4];
            let view = View::contiguous("x", Elems::F32(x), [1, 1, 1, 4]).unwrap();
            rotate(&view, Dtype::F32, &[position], &rope, inverse, ElemsMut::F32(&mut out), level).unwrap();
            all.push(out);
        }
        all
    };
    let near = |got: Vec<Vec<f32>>, expected: [f32; 4]| {
        for got in got {
            assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 2e-6), "{got:?} {expected:?}");
        }
    };
    let six = [1.798417, 1.756545, 2.601095, 4.11273];
    let four = [1.616764, 1.838443, -2.717733, 4.076779];
    near(at(&k, 6, Layout::Half, false), six);
    near(at(&k, 4, Layout::Half, false), four);
    near(at(&six, -2, Layout::Half, false), four);
    near(at(&six, 2, Layout::Half, true), four);
    near(at(&k, 4, Layout::Interleaved, false), [0.859961, -2.06409, 2.837643, 4.116768]);
}

#[test]
fn rotate_equals_the_reference_and_undoes_itself() {
    let mut noise = Noise(11);
    for round in 0..60 {
        let dtype = DTYPES[round % 3];
        let layout = if noise.below(2) == 0 { Layout::Half } else { Layout::Interleaved };
        let dim = 2 * (1 + noise.below(64));
        let pairs = 1 + noise.below(dim / 2);
        let shape = [1 + noise.below(2), 1 + noise.below(3), noise.below(5), dim];
        let n: usize = shape.iter().product();
        let inv_freq = (0..pairs).map(|i| 1e4f64.powf(-(i as f64) / pairs as f64)).collect();
        let rope = Rope::new(inv_freq, layout, 1.25).unwrap();
        let x = noise.data(n, dtype);
        let positions: Vec<i64> = (0..shape[2]).map(|_| noise.below(1_000_000) as i64).collect();
        let wide = x.f64s();
        let exact: Vec<f64> = wide
            .chunks(dim)
            .enumerate()
            .flat_map(|(row, x)| reference::rotated(x, positions[row % shape[2]], &rope, 1.25))
            .collect();
        for level in levels() {
            let (mut out, mut back) = (x.clone(), x.clone());
            rotate(&x.view(shape), dtype, &positions, &rope, false, out.elems_mut(), level).unwrap();
            assert!(off(&out.f64s(), &exact) <= tolerance(dtype));
            rotate(&out.view(shape), dtype, &positions, &rope, true, back.elems_mut(), level).unwrap();
            assert!(off(&back.f64s(), &wide) <= tolerance(dtype));
        }
    }
}

#[test]
fn surprisal_equals_the_reference() {
    let mut noise = Noise(12);
    for round in 0..60 {
        let dtype = DTYPES[round % 3];
        let (rows, vocabulary) = (1 + noise.below(3), 1 + noise.below(9000));
        let values: Vec<f32> = (0..rows * vocabulary).map(|_| noise.unit() * 30.0).collect();
        let logits = Data::of(&values, dtype);
        let ids: Vec<i64> = (0..rows).map(|_| noise.below(vocabulary) as i64).collect();
        let wide = logits.f64s();
        for level in levels() {
            let mut out = vec![0f32; rows];
            for threads in [1, 3] {
                let view = logits.view([1, 1, rows, vocabulary]);
                surprisal(&view, dtype, &ids, &mut out, (level, threads), &|| false).unwrap();
            }
            for (i, got) in out.iter().enumerate() {
                let exact = reference::surprisal(&wide[i * vocabulary..(i + 1) * vocabulary], ids[i] as usize);
                assert!((f64::from(*got) - exact).abs() <= 2e-6 * exact.max(1.0), "{got} {exact}");
            }
        }
    }
}

/// Sums are taken relative to the greatest logit of an early chunk, which later ones may exceed by any amount.
#[test]
fn surprisal_of_rows_that_rise_fall_and_break() {
    let (inf, nan, n) = (f32::INFINITY, f32::NAN, 11_000usize);
    let ramp = |slope: f32| (0..n).map(|i| slope * i as f32).collect::<Vec<_>>();
    let with = |at: usize, x: f32| {
        let mut row = vec![1.0; n];
        row[at] = x;
        row
    };
    let late = |first: f32, rest: f32| (0..n).map(|i| if i < 5000 { first } else { rest }).collect::<Vec<_>>();
    let mut rows = vec![ramp(1e-3), ramp(-1e-3), ramp(0.02), ramp(0.5), ramp(-0.5), with(3, 60.0), with(7000, 9.0)];
    rows.extend([with(7000, 12.0), with(7000, 60.0), with(7000, 1e30), with(3, 1e30), with(10_999, 60.0)]);
    rows.extend([late(-inf, 2.0), late(2.0, -inf), late(-30_000.0, 0.0), late(0.0, -30_000.0), vec![3.0; n]]);
    let ids = [0usize, 3, 6999, 7000, 10_999];
    for (i, row) in rows.iter().enumerate() {
        for dtype in DTYPES.into_iter().filter(|&dtype| dtype != Dtype::F16 || !row.contains(&1e30)) {
            let logits = Data::of(row, dtype);
            let wide = logits.f64s();
            for (level, &id) in levels().into_iter().flat_map(|level| ids.iter().map(move |id| (level, id))) {
                let mut out = [0f32];
                let view = logits.view([1, 1, 1, n]);
                surprisal(&view, dtype, &[id as i64], &mut out, (level, 1), &|| false).unwrap();
                let exact = reference::surprisal(&wide, id).min(f64::from(f32::MAX));
                let got = f64::from(out[0]);
                assert!((got - exact).abs() <= 2e-6 * exact.max(1.0), "row {i}, {dtype:?}, {level:?}: {got} {exact}");
            }
        }
    }
    for (row, want) in [
        (with(7000, nan), f32::NAN),
        (with(3, nan), f32::NAN),
        (with(7000, inf), f32::MAX),
        ([with(3, nan), vec![inf]].concat(), f32::MAX),
    ] {
        for dtype in DTYPES {
            let logits = Data::of(&row, dtype);
            for level in levels() {
                let mut out = [0f32];
                let view = logits.view([1, 1, 1, row.len()]);
                surprisal(&view, dtype, &[5], &mut out, (level, 1), &|| false).unwrap();
                assert!(out[0] == want || out[0].is_nan() && want.is_nan(), "{dtype:?}, {level:?}: {} {want}", out[0]);
            }
        }
    }
}

#[test]
fn long_calls_stop_when_asked_and_threads_change_no_bit() {
    let (rows, vocabulary) = (300, 40_000);
    let mut noise = Noise(13);
    let logits: Vec<f32> = (0..rows * vocabulary).map(|_| noise.unit() * 30.0).collect();
    let view = View::contiguous("logits", Elems::F32(&logits), [1, 1, rows, vocabulary]).unwrap();
    let ids: Vec<i64> = (0..rows).map(|i| i as i64).collect();
    let level = *levels().last().unwrap();
    let of = |threads, stop: &dyn Fn() -> bool| {
        let mut out = vec![-1f32; rows];
        surprisal(&view, Dtype::F32, &ids, &mut out, (level, threads), stop).map(|()| out)
    };
    let alone = of(1, &|| false).unwrap();
    assert_eq!(of(2, &|| false).unwrap(), alone);
    assert_eq!(of(1, &|| true), Err(Error::Interrupted));
    assert!(of(0, &|| false).is_err());

    // 48 MB of keys and values: more than one breath.
    let (heads, dim, tokens) = (4, 64, 96 * 1024);
    let mut arena = Arena::new(heads, dim, dim, Dtype::F16).unwrap();
    arena.ensure(tokens / 64).unwrap();
    let span = |block| Span { block: BlockId(block), lo: 0, hi: 64, shift: 0, rotate_keys: false };
    let all: Vec<Span> = (0..tokens / 64).map(span).collect();
    let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, all.len() as u32], spans: all };
    let q = vec![0u16; heads * dim];
    let q = View::contiguous("q", Elems::Bits(&q), [1, heads, 1, dim]).unwrap();
    let args = Attend {
        q,
        spans: &spans,
        trig: None,
        scale: 1.0,
        softcap: None,
        sinks: None,
        apply_factor: false,
        threads: 1,
        level,
    };
    let mut out = vec![7u16; heads * dim];
    let stopped = attend_unless(&arena, &args, ElemsMut::Bits(&mut out), None, None, &|| true);
    assert_eq!(stopped, Err(Error::Interrupted));
    assert!(out.iter().all(|&x| x == 7));
    attend_unless(&arena, &args, ElemsMut::Bits(&mut out), None, None, &|| false).unwrap();
    assert!(out.iter().all(|&x| x == 0));
}

#[test]
fn surprisal_stays_finite() {
    let inf = f32::INFINITY;
    let of = |row: &[f32], id: i64, level| {
        let mut out = [0f32];
        let view = View::contiguous("logits", Elems::F32(row), [1, 1, 1, row.len()]).unwrap();
        surprisal(&view, Dtype::F32, &[id], &mut out, (level, 1), &|| false).map(|()| out[0])
    };
    for level in levels() {
        assert!((of(&[0.0, -120.0, -1.0], 1, level).unwrap() - 120.3133).abs() < 1e-4);
        assert_eq!(of(&[0.0, -inf], 1, level), Ok(f32::MAX));
        assert_eq!(of(&[0.0, -inf], 0, level), Ok(0.0));
        assert_eq!(of(&[-inf, -inf], 0, level), Ok(f32::MAX));
        assert_eq!(of(&[inf, 0.0], 0, level), Ok(0.0));
        for at in [0, 17, 600, 1000] {
            let mut row = vec![-inf; 1001];
            row[at] = f32::NAN;
            row[3] = 1.0;
            assert!(of(&row, 3, level).unwrap().is_nan());
        }
        let mut late = vec![-inf; 2000];
        late[1999] = 3.0;
        assert!(of(&late, 1999, level).unwrap().abs() < 1e-6);
        assert!(matches!(of(&[0.0], 1, level), Err(Error::OutOfRange { .. })));
        assert!(matches!(of(&[0.0], -1, level), Err(Error::OutOfRange { .. })));
    }
}

#[test]
fn top_k_equals_the_reference() {
    let mut noise = Noise(13);
    for _ in 0..200 {
        let (columns, rows) = (1 + noise.below(40), 1 + noise.below(3));
        let k = noise.below(columns + 1);
        let pool = [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5];
        let scores: Vec<f32> = (0..rows * columns).map(|_| pool[noise.below(pool.len())]).collect();
        let exact: Vec<i64> = scores.chunks(columns).flat_map(|row| reference::top_k(row, k)).collect();
        assert_eq!(top_k(&scores, columns, k).unwrap(), exact, "{scores:?}");
    }
    assert!(top_k(&[1.0], 1, 2).is_err());
}

#[test]
fn reading_reads_everything() {
    for n in [0, 1, 15, 127, 128, 129, 1000] {
        // Small integers: sums are exact in any order.
        let x: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
        for level in levels() {
            assert_eq!(read(&x, level), Ok(x.iter().sum::<f32>()), "{n} {level:?}");
        }
    }
}

#[test]
fn merge_equals_the_reference() {
    let mut noise = Noise(14);
    for _ in 0..50 {
        let (dim, parts) = (1 + noise.below(9), 1 + noise.below(4));
        let outs: Vec<Vec<f32>> = (0..parts).map(|_| (0..dim).map(|_| noise.unit()).collect()).collect();
        let lses: Vec<[f32; 1]> =
            (0..parts).map(|_| [if noise.below(3) == 0 { f32::NEG_INFINITY } else { noise.unit() * 20.0 }]).collect();
        let given: Vec<Partial<'_>> = outs.iter().zip(&lses).map(|(out, lse)| Partial { out, lse }).collect();
        let (mut out, mut lse) = (vec![1f32; dim], [1f32]);
        merge(&given, dim, &mut out, &mut lse).unwrap();
        let exact: Vec<(Vec<f64>, f64)> = outs.iter().zip(&lses).map(|(o, l)| (widen(o), f64::from(l[0]))).collect();
        let (exact, exact_lse) = reference::merge(&exact, dim);
        assert!(off(&widen(&out), &exact) < 1e-5);
        assert!(off(&[f64::from(lse[0])], &[exact_lse]) < 1e-5);
    }
}
