//! Attention to pieces at given distances, and the probabilities of one of them, against the kernels that are tested against the naive
//! twin.

use std::sync::Arc;

use super::common::data::{DTYPES, Data, Noise, filled, off, span, tolerance};
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::attend::mass_len;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::pieces::{AttendPieces, Piece, attend_pieces};
use kvsieve_core::kernels::{Attend, SpanTrig, attend, attend_apart_mass};
use kvsieve_core::plan::{Span, Spans};
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::tensor::{Dtype, View};

fn rope(dim: usize) -> Arc<Rope> {
    let frequencies: Vec<f64> = (0..dim / 2).map(|i| 10000f64.powf(-2.0 * i as f64 / dim as f64)).collect();
    Arc::new(Rope::new(frequencies, Layout::Half, 1.1).unwrap())
}

/// Blocks 5, 1, 3, ...: some whole, some not.
const RUNS: [Run; 4] = [
    Run { block: BlockId(5), lo: 3, hi: 64 },
    Run { block: BlockId(1), lo: 0, hi: 64 },
    Run { block: BlockId(3), lo: 0, hi: 40 },
    Run { block: BlockId(0), lo: 8, hi: 31 },
];
const LEN: u32 = 188;

/// Spans of a piece, slot by slot.
fn slots(piece: &Piece) -> Vec<Span> {
    let all: Vec<(u32, u32)> = RUNS.iter().flat_map(|run| (run.lo..run.hi).map(|slot| (run.block.0, slot))).collect();
    let place = |(i, &(block, slot)): (usize, &(u32, u32))| {
        let shift = if piece.fixed { piece.distance } else { piece.distance - i as i64 + i64::from(slot) };
        span(block, slot, slot + 1, shift, !piece.fixed)
    };
    all[piece.lo as usize..piece.hi as usize].iter().enumerate().map(place).collect()
}

fn pieces(noise: &mut Noise, kv_heads: usize) -> Vec<Piece> {
    let mut found = vec![Piece { head: None, lo: 120, hi: LEN, distance: 67, fixed: false }];
    let mut lo = 0;
    while lo < 120 {
        let hi = (lo + 1 + noise.below(50) as u32).min(120);
        let head = (noise.below(2) == 0).then(|| noise.below(kv_heads) as u32);
        let fixed = noise.below(2) == 0;
        let nearest = noise.below(900) as i64;
        let distance = if fixed { nearest } else { nearest + i64::from(hi - lo) - 1 };
        if noise.below(4) > 0 {
            found.push(Piece { head, lo, hi, distance, fixed });
        }
        lo = hi;
    }
    found
}

#[test]
fn pieces_are_seen_where_they_are_told() {
    let mut noise = Noise(3);
    for round in 0..30 {
        let dtype = DTYPES[round % 3];
        let (kv_heads, group) = (1 + noise.below(3), 1 + noise.below(4));
        let heads = kv_heads * group;
        let arena = filled(&mut noise, kv_heads, (32, 32), dtype, 6);
        let q = noise.data(heads * 32, dtype);
        let q = q.view([1, heads, 1, 32]);
        let given = pieces(&mut noise, kv_heads);
        let turn = rope(32);
        let rope = (round % 5 > 0).then_some(&turn);
        let sinks: Vec<f32> = (0..heads).map(|_| noise.unit()).collect();
        let sinks = [None, Some(&sinks[..])][noise.below(2)];
        let (scale, softcap) = (0.3, [None, Some(2.0)][noise.below(2)]);
        let mut spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0], spans: vec![] };
        for head in 0..kv_heads as u32 {
            for piece in given.iter().filter(|piece| piece.head.is_none_or(|reader| reader == head)) {
                spans.spans.extend(slots(piece));
            }
            spans.starts.push(spans.spans.len() as u32);
        }
        let trig = rope.map(|rope| SpanTrig::new(&spans, rope));
        for level in levels() {
            let (apply_factor, threads, trig) = (true, 1, trig.as_ref());
            let args = Attend { q, spans: &spans, trig, scale, softcap, sinks, apply_factor, threads, level };
            let mut exact = Data::of(&vec![8.0; heads * 32], dtype);
            let (mut exact_lse, mut exact_mass) = (vec![8.0; heads], vec![8.0; mass_len(&spans, 1)]);
            let to = exact.elems_mut();
            attend_apart_mass(&arena, &args, to, Some(&mut exact_lse), &mut exact_mass, &|| false).unwrap();
            for (scored, told) in [(None, false), (Some(0), false), (None, true), (Some(0), true)] {
                let mut out = Data::of(&vec![7.0; heads * 32], dtype);
                let mut lse = vec![7.0; heads];
                let (runs, pieces) = (&RUNS[..], &given[..]);
                let args = AttendPieces {
                    q,
                    runs,
                    starts: &[],
                    pieces,
                    scored,
                    told,
                    rope,
                    scale,
                    softcap,
                    sinks,
                    threads,
                    level,
                };
                let found = attend_pieces(&arena, &args, out.elems_mut(), Some(&mut lse), &|| false).unwrap();
                let mass = &found.scores;
                let what = format!("round {round} {level:?} {dtype:?}");
                assert!(off(&out.f64s(), &exact.f64s()) <= tolerance(dtype), "{what}");
                assert!(lse.iter().zip(&exact_lse).all(|(a, b)| (a - b).abs() <= 1e-4), "{what}");
                assert_eq!(mass.len(), if scored.is_some() { kv_heads * 68 } else { 0 });
                for (head, mine) in mass.chunks(68).enumerate() {
                    // The scored piece is the first one of each head there, too.
                    let at = spans.starts[head] as usize;
                    let off = mine.iter().zip(&exact_mass[at..at + 68]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(off <= 1e-5, "{what}: {off}");
                }
                let want = if told { by_token(&given, kv_heads, &exact_mass) } else { Vec::new() };
                assert_eq!(found.mass.len(), want.len());
                assert!(found.mass.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5), "{what}: {:?}", found.mass);
            }
        }
    }
}

/// What each token of each piece got, where the probabilities of all keys lie head by head in the order of the pieces.
fn by_token(given: &[Piece], kv_heads: usize, mass: &[f32]) -> Vec<f32> {
    let mut mass = mass.iter();
    let mut sums: Vec<Vec<f32>> = given.iter().map(|piece| vec![0.0; (piece.hi - piece.lo) as usize]).collect();
    for head in 0..kv_heads as u32 {
        for (piece, sums) in given.iter().zip(&mut sums).filter(|(piece, _)| piece.head.is_none_or(|mine| mine == head))
        {
            assert_eq!(sums.len(), (piece.hi - piece.lo) as usize);
            sums.iter_mut().for_each(|sum| *sum += mass.next().unwrap());
        }
    }
    assert!(mass.next().is_none());
    sums.concat()
}

#[test]
fn the_mass_of_equal_lists_is_the_shared_one() {
    let mut noise = Noise(4);
    for dtype in DTYPES {
        let (kv_heads, group) = (3, 2);
        let arena = filled(&mut noise, kv_heads, (32, 32), dtype, 150);
        let q = noise.data(2 * 6 * 32, dtype);
        let q = q.view([1, 6, 2, 32]);
        // Enough for several units, and another list for each query.
        let lists = [(0..150).map(|b| span(b, 0, 64, 0, false)).collect::<Vec<_>>(), vec![span(7, 3, 50, 0, false)]];
        let ends = [150, 151];
        let shared = Spans { num_rows: 1, num_queries: 2, starts: vec![0, ends[0], ends[1]], spans: lists.concat() };
        let (mut starts, mut spans) = (vec![0], vec![]);
        for list in lists.iter().flat_map(|list| std::iter::repeat_n(list, kv_heads)) {
            spans.extend_from_slice(list);
            starts.push(spans.len() as u32);
        }
        let apart = Spans { num_rows: 1, num_queries: 2, starts, spans };
        for level in levels() {
            let args = |spans| {
                let (trig, scale, softcap, sinks) = (None, 0.3, None, None);
                Attend { q, spans, trig, scale, softcap, sinks, apply_factor: false, threads: 1, level }
            };
            let (mut one, mut two) = (Data::of(&[7.0; 384], dtype), Data::of(&[8.0; 384], dtype));
            let mut masses = [vec![7.0; mass_len(&shared, kv_heads)], vec![8.0; mass_len(&apart, 1)]];
            let [first, second] = &mut masses;
            attend(&arena, &args(&shared), one.elems_mut(), None, Some(first)).unwrap();
            attend_apart_mass(&arena, &args(&apart), two.elems_mut(), None, second, &|| false).unwrap();
            assert_eq!((&one, &masses[0]), (&two, &masses[1]), "{level:?}, groups of {group}");
            let total: f32 = masses[1].iter().sum();
            assert!((total - 12.0).abs() < 1e-3, "{total}");
        }
    }
}

#[test]
fn pieces_that_are_none_are_refused() {
    let mut noise = Noise(6);
    let arena = filled(&mut noise, 2, (16, 16), Dtype::F32, 6);
    let q = noise.data(2 * 2 * 16, Dtype::F32);
    let attended = |q: View<'_>, piece: Piece, scored| {
        let (scale, softcap, sinks, threads, level, rope) = (1.0, None, None, 1, levels()[0], None);
        let args = AttendPieces {
            q,
            runs: &RUNS,
            starts: &[],
            pieces: &[piece],
            scored,
            told: false,
            rope,
            scale,
            softcap,
            sinks,
            threads,
            level,
        };
        let mut out = Data::of(&[7.0; 32], Dtype::F32);
        let done = attend_pieces(&arena, &args, out.elems_mut(), None, &|| false);
        assert_eq!(done.is_err(), out == Data::of(&[7.0; 32], Dtype::F32), "a refused call writes nothing");
        done.map(|_| ())
    };
    let one = Data::of(&q.wide[..32], Dtype::F32);
    let one = one.view([1, 2, 1, 16]);
    let good = Piece { head: Some(1), lo: 3, hi: 9, distance: 5, fixed: false };
    attended(one, good, None).unwrap();
    for bad in [
        Piece { hi: 3, ..good },
        Piece { hi: LEN + 1, fixed: true, ..good },
        Piece { distance: 4, ..good },
        Piece { head: Some(2), ..good },
        Piece { distance: -1, fixed: true, ..good },
    ] {
        assert!(matches!(attended(one, bad, None), Err(Error::OutOfRange { .. })), "{bad:?}");
    }
    assert!(attended(one, good, Some(0)).is_err(), "scores are of all heads");
    assert!(attended(one, Piece { head: None, ..good }, Some(1)).is_err());
    assert!(attended(q.view([1, 2, 2, 16]), good, None).is_err());
}
