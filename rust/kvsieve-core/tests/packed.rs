//! Packed blocks: what they hold, what moving them does, and attention over them in place.

use std::sync::Arc;

use super::common::data::*;
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, PACKED, Run};
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::{Attend, Level, SpanTrig};
use kvsieve_core::plan::{Move, Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::packed::{Channels, Chosen, Packing};
use kvsieve_core::tensor::Dtype;

fn packed(n: u32) -> BlockId {
    BlockId(PACKED + n)
}

fn plain() -> Packing {
    Packing { key_kept: 0, key_bits: 0, value_bits: 0, group: 32 }
}

/// `kept` channels of each head, as whole pairs of `rope` where there is one.
fn choose(noise: &mut Noise, heads: usize, dim: usize, kept: usize, rope: Option<&Rope>) -> Channels {
    let (mut index, mut pairs) = (Vec::new(), Vec::new());
    for _ in 0..heads {
        let mut shuffled = |n: usize| {
            let mut all: Vec<usize> = (0..n).collect();
            (1..n).rev().for_each(|i| all.swap(i, noise.below(i + 1)));
            all
        };
        let Some(rope) = rope else {
            let mut mine = shuffled(dim)[..kept].to_vec();
            mine.sort_unstable();
            index.extend(mine.iter().map(|&c| c as i64));
            pairs.push(0);
            continue;
        };
        let rotary = rope.rotary_dim();
        let rest = dim - rotary;
        // As many others as make the number come out even.
        let most = (kept / 2).min(rotary / 2);
        let least = kept.saturating_sub(rest).div_ceil(2);
        let num_pairs = least + (most - least) / 2;
        let mut mine = shuffled(rotary / 2)[..num_pairs].to_vec();
        mine.sort_unstable();
        let of = |i: &usize| match rope.layout() {
            Layout::Half => (*i, *i + rotary / 2),
            Layout::Interleaved => (2 * i, 2 * i + 1),
        };
        index.extend(mine.iter().map(|i| of(i).0 as i64));
        index.extend(mine.iter().map(|i| of(i).1 as i64));
        let mut others = shuffled(rest)[..kept - 2 * num_pairs].to_vec();
        others.sort_unstable();
        index.extend(others.iter().map(|&c| (rotary + c) as i64));
        pairs.push(num_pairs);
    }
    Channels::new(&index, &pairs, dim).unwrap()
}

/// Packs the first `n` tokens of blocks `0..`, and returns their runs.
fn pack(arena: &mut Arena, n: u32, channels: &Arc<Channels>) -> Vec<Run> {
    let moves: Vec<Move> = (0..n.div_ceil(64))
        .map(|b| Move { from: BlockId(b), from_slot: 0, to: packed(b), to_slot: 0, len: (n - b * 64).min(64) })
        .collect();
    arena.pack(&moves, &Chosen::New(Arc::clone(channels))).unwrap();
    moves.iter().map(|m| Run { block: m.to, lo: 0, hi: m.len }).collect()
}

fn tokens(arena: &Arena, runs: &[Run], head: usize) -> Vec<(Vec<f64>, Vec<f64>)> {
    let slots = runs.iter().flat_map(|r| (r.lo..r.hi).map(|s| (r.block, s)));
    slots.map(|(block, slot)| arena.token(block, head, slot).unwrap()).collect()
}

/// The largest distance within each group of `x`, in the codes' steps of `bits`.
fn step(x: &[f64], bits: u32) -> f64 {
    let (min, max) = x.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    (max - min) / f64::from((1u32 << bits) - 1)
}

#[test]
fn packed_tokens_are_the_tokens_within_half_a_step() {
    let mut noise = Noise(3);
    for round in 0..40 {
        let dtype = DTYPES[round % 3];
        let (heads, dim) = (1 + noise.below(3), [16, 64, 96, 128][noise.below(4)]);
        let kept = 1 + noise.below(dim);
        let bits = || [0, 2, 4, 8];
        let (key_bits, value_bits) = (bits()[noise.below(4)], bits()[noise.below(4)]);
        let group = if dim == 16 { [8, 16][noise.below(2)] } else { 32 };
        let mut arena = filled(&mut noise, heads, (dim, dim), dtype, 4);
        arena.set_packing(Packing { key_kept: kept, key_bits, value_bits, group }).unwrap();
        let channels = Arc::new(choose(&mut noise, heads, dim, kept, None));
        let n = 64 + noise.below(190) as u32;
        let runs = pack(&mut arena, n, &channels);
        for head in 0..heads {
            let whole: Vec<Run> = runs.iter().map(|r| Run { block: BlockId(r.block.0 - PACKED), ..*r }).collect();
            let (exact, got) = (tokens(&arena, &whole, head), tokens(&arena, &runs, head));
            for c in 0..dim {
                let kept = channels.of(head).contains(&(c as u16));
                for (exact, got) in exact.chunks(group).zip(got.chunks(group)) {
                    let column: Vec<f64> = exact.iter().map(|t| t.0[c]).collect();
                    // A half holds eleven bits: of the least value, and of the step.
                    let most = step(&column, key_bits.max(1)) * 0.502 + 1e-3 * f64::from(key_bits.min(1));
                    for (exact, got) in column.iter().zip(got.iter().map(|t| t.0[c])) {
                        match (kept, key_bits) {
                            (false, _) => assert_eq!(got, 0.0),
                            (true, 0) => assert_eq!(got, *exact),
                            _ => assert!((got - exact).abs() <= most, "{got} {exact} {most}"),
                        }
                    }
                }
            }
            for (exact, got) in exact.iter().zip(&got) {
                for (exact, got) in exact.1.chunks(group).zip(got.1.chunks(group)) {
                    let most = step(exact, value_bits.max(1)) * 0.502 + 1e-3 * f64::from(value_bits.min(1));
                    for (exact, got) in exact.iter().zip(got) {
                        let most = if value_bits == 0 { 0.0 } else { most };
                        assert!((got - exact).abs() <= most, "{got} {exact} {most}");
                    }
                }
            }
        }
    }
}

/// Packs two rows of four blocks, each with channels of its own. Returns all blocks to read: plain ones, then these.
fn pack_rows(arena: &mut Arena, mut channels: impl FnMut() -> Channels) -> Vec<u32> {
    let mut blocks: Vec<u32> = (0..12).collect();
    for row in 0..2u32 {
        let moves: Vec<Move> = (0..4)
            .map(|b| {
                let from = BlockId(row * 4 + b);
                Move { from, from_slot: 0, to: packed(row * 4 + b), to_slot: 0, len: 64 }
            })
            .collect();
        arena.pack(&moves, &Chosen::New(Arc::new(channels()))).unwrap();
        blocks.extend(moves.iter().map(|m| m.to.0));
    }
    blocks
}

#[test]
fn attend_reads_packed_blocks_in_place() {
    let mut noise = Noise(0x51ed);
    for round in 0..180 {
        let dtype = DTYPES[round % 3];
        let dim = [32, 64, 96, 128, 80][noise.below(5)];
        let kv_heads = 1 + noise.below(3);
        let group = [1, 2, 3, 4, 5, 8][noise.below(6)];
        let (heads, rows) = (kv_heads * group, 1 + noise.below(2));
        let key_bits = [0, 0, 0, 2, 4, 8][noise.below(6)];
        let value_bits = [0, 0, 2, 4, 8][noise.below(5)];
        let layout = if noise.below(2) == 0 { Layout::Half } else { Layout::Interleaved };
        let pairs = if noise.below(2) == 0 { dim / 2 } else { dim / 4 };
        let inv_freq = (0..pairs).map(|i| 1e4f64.powf(-(i as f64) / pairs as f64)).collect();
        let rope = Arc::new(Rope::new(inv_freq, layout, [1.0, 1.1][noise.below(2)]).unwrap());
        let rotates = noise.below(3) > 0;
        let kept = if rotates { 2 * (1 + noise.below(dim / 2)) } else { 1 + noise.below(dim) };
        // Fewer tokens than lanes, as many as there may be, and what one usually takes.
        let shared: Vec<usize> = [4, 16, 32, 32, 64].into_iter().filter(|&n| dim.is_multiple_of(n)).collect();
        let shared = shared[noise.below(shared.len())];
        let mut arena = filled(&mut noise, kv_heads, (dim, dim), dtype, 12);
        arena.set_packing(Packing { key_kept: kept, key_bits, value_bits, group: shared }).unwrap();
        let chosen = || choose(&mut noise, kv_heads, dim, kept, rotates.then_some(&*rope));
        let blocks = pack_rows(&mut arena, chosen);
        let mut spans = Spans { num_rows: rows, num_queries: 1, starts: vec![0], spans: Vec::new() };
        for _ in 0..rows {
            for _ in 0..noise.below(30) {
                let (a, b) = if noise.below(2) == 0 { (0, 64) } else { (noise.below(65), noise.below(65)) };
                let (block, shift) = (blocks[noise.below(blocks.len())], [0, 5, 123_456][noise.below(3)]);
                let turn = rotates && noise.below(2) == 0;
                let shift = if rotates { shift } else { 0 };
                spans.spans.push(span(block, a.min(b) as u32, a.max(b) as u32, shift, turn));
            }
            spans.starts.push(spans.spans.len() as u32);
        }
        let q = noise.data(rows * heads * dim, dtype);
        let q = q.view([rows, heads, 1, dim]);
        let trig = SpanTrig::new(&spans, &rope);
        let mut args = Attend {
            q,
            spans: &spans,
            trig: (rotates || noise.below(2) == 0).then_some(&trig),
            scale: 1.0 / (dim as f32).sqrt(),
            softcap: [None, Some(30.0)][noise.below(2)],
            sinks: None,
            apply_factor: noise.below(2) == 0,
            threads: 1,
            level: Level::Portable,
        };
        let exact = reference::attend(
            &arena,
            &reference::Params {
                q: &q,
                spans: &spans,
                rope: args.trig.map(|_| &*rope),
                scale: f64::from(args.scale),
                softcap: args.softcap.map(f64::from),
                sinks: None,
                apply_factor: args.apply_factor,
            },
        )
        .unwrap();
        for level in levels() {
            (args.level, args.threads) = (level, 1);
            let one = call(&arena, &args);
            let what =
                format!("round {round} {level:?} {dtype:?} {dim} kept {kept} bits {key_bits} {value_bits} of {shared}");
            let bound = tolerance(dtype);
            assert!(off(&one.out.f64s(), &exact.out) <= bound, "out, {what}: {}", off(&one.out.f64s(), &exact.out));
            assert!(off(&widen(&one.lse), &exact.lse) <= bound, "lse, {what}: {}", off(&widen(&one.lse), &exact.lse));
            assert!(off(&widen(&one.mass), &exact.mass) <= bound, "mass, {what}");
            args.threads = 2;
            assert_eq!(one.out, call(&arena, &args).out, "threads must not matter, {what}");
        }
    }
}

#[test]
fn moved_tokens_stay_what_they_were() {
    let mut noise = Noise(11);
    let cases = [(0, 0), (0, 4), (8, 8), (4, 4), (2, 2)].into_iter().flat_map(|bits| DTYPES.map(|dtype| (bits, dtype)));
    for ((key_bits, value_bits), dtype) in cases {
        let kept = [38, 37][noise.below(2)];
        let mut arena = filled(&mut noise, 2, (64, 64), dtype, 4);
        arena.set_packing(Packing { key_kept: kept, key_bits, value_bits, group: 32 }).unwrap();
        let channels = Arc::new(choose(&mut noise, 2, 64, kept, None));
        let runs = pack(&mut arena, 4 * 64, &channels);
        let before: Vec<_> = (0..2).map(|head| tokens(&arena, &runs, head)).collect();
        // Every fifth token goes; the others move together.
        let keep: Vec<u32> = (0..256).filter(|i| i % 5 != 3).collect();
        let moves: Vec<Move> = (0..)
            .zip(&keep)
            .map(|(to, &from)| Move {
                from: packed(from / 64),
                from_slot: from % 64,
                to: packed(to / 64),
                to_slot: to % 64,
                len: 1,
            })
            .filter(|m| (m.from, m.from_slot) != (m.to, m.to_slot))
            .collect();
        arena.apply(&moves).unwrap();
        let n = keep.len() as u32;
        let left: Vec<Run> =
            (0..n.div_ceil(64)).map(|b| Run { block: packed(b), lo: 0, hi: (n - b * 64).min(64) }).collect();
        for (head, before) in before.iter().enumerate() {
            for (&i, after) in keep.iter().zip(tokens(&arena, &left, head)) {
                let (key, value) = &before[i as usize];
                assert_eq!(*value, after.1);
                // Numbers in (-1, 1), coded again once, or twice where two stretches meet in a group: half a step of at most
                // 2 / (2^bits - 1) each.
                let most = if key_bits == 0 { 0.0 } else { 2.01 / f64::from((1u32 << key_bits) - 1) };
                for (x, y) in key.iter().zip(&after.0) {
                    assert!((x - y).abs() <= most, "{x} {y}, {key_bits} bits");
                }
            }
        }
        // Whole groups keep their codes.
        let whole = [Move { from: packed(1), from_slot: 32, to: packed(9), to_slot: 0, len: 32 }];
        let run = |block, lo| [Run { block: packed(block), lo, hi: lo + 32 }];
        let before = tokens(&arena, &run(1, 32), 0);
        arena.apply(&whole).unwrap();
        assert_eq!(before, tokens(&arena, &run(9, 0), 0));
    }
}

#[test]
fn bytes_are_those_of_the_format() {
    let mut noise = Noise(8);
    let heads = 2;
    let mut arena = filled(&mut noise, heads, (128, 128), Dtype::BF16, 32);
    let full = arena.bytes();
    arena.set_packing(Packing { key_kept: 78, key_bits: 0, value_bits: 0, group: 32 }).unwrap();
    let channels = Arc::new(choose(&mut noise, heads, 128, 78, None));
    pack(&mut arena, 32 * 64, &channels);
    arena.free_unused(&[], &[true; 32]);
    let bytes = arena.packed_bytes();
    assert_eq!(bytes.keys, 2 * 2048 * 78 * heads);
    assert_eq!(bytes.values, 2 * 2048 * 128 * heads);
    assert_eq!((bytes.scales, arena.plain_bytes()), (0, (0, 0)));
    assert_eq!(arena.bytes(), full * (78 + 128) / 256 + bytes.channels);

    // KIVI's two bits: a pair of halves for 32 numbers.
    let mut arena = filled(&mut noise, 1, (128, 128), Dtype::BF16, 32);
    arena.set_packing(Packing { key_kept: 128, key_bits: 2, value_bits: 2, group: 32 }).unwrap();
    let channels = Arc::new(choose(&mut noise, 1, 128, 128, None));
    pack(&mut arena, 32 * 64, &channels);
    let bytes = arena.packed_bytes();
    assert_eq!((bytes.keys + bytes.values + bytes.scales) * 8, 768 * 2048);
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let mut noise = Noise(1);
    let mut arena = filled(&mut noise, 2, (16, 16), Dtype::F32, 1);
    let all = || Arc::new(Channels::new(&(0..8).chain(0..8).collect::<Vec<i64>>(), &[0, 0], 16).unwrap());
    let moves = [Move { from: BlockId(0), from_slot: 0, to: packed(0), to_slot: 0, len: 64 }];
    let new = || Chosen::New(all());
    assert!(matches!(arena.pack(&moves, &new()), Err(Error::Unsupported(_))), "before the packing is known");
    for bad in [
        Packing { key_kept: 0, ..plain() },
        Packing { key_kept: 17, ..plain() },
        Packing { key_kept: 8, key_bits: 3, ..plain() },
        Packing { key_kept: 8, value_bits: 16, ..plain() },
        Packing { key_kept: 8, group: 48, ..plain() },
        Packing { key_kept: 8, value_bits: 4, ..plain() },
    ] {
        assert!(arena.set_packing(bad).is_err(), "{bad:?}");
    }
    let packing = Packing { key_kept: 8, ..plain() };
    arena.set_packing(packing).unwrap();
    assert!(arena.set_packing(packing).is_ok());
    assert!(arena.set_packing(Packing { key_kept: 9, ..packing }).is_err());
    let nine = Arc::new(Channels::new(&(0..9).chain(0..9).collect::<Vec<i64>>(), &[0, 0], 16).unwrap());
    assert!(matches!(arena.pack(&moves, &Chosen::New(nine)), Err(Error::Shape { .. })));
    assert!(matches!(arena.pack(&moves, &Chosen::Like(packed(0))), Err(Error::BadBlock { .. })));
    let backwards = [Move { from: packed(0), to: BlockId(0), ..moves[0] }];
    assert!(arena.pack(&backwards, &new()).is_err());
    assert!(arena.apply(&moves).is_err(), "packing is not a move");
    assert!(arena.pack(&[Move { len: 65, ..moves[0] }], &new()).is_err());
    arena.pack(&moves, &new()).unwrap();

    for bad in [vec![0, 0, 1, 2], vec![0, 16, 1, 2], vec![0, -17, 1, 2], vec![0, 1, 2]] {
        assert!(Channels::new(&bad, &[0, 0], 16).is_err(), "{bad:?}");
    }
    assert!(Channels::new(&[0, 1, 2, 3], &[2, 0], 16).is_err(), "two pairs in two channels");

    // One channel of each pair is gone.
    let rope = Arc::new(Rope::new(vec![1.0; 8], Layout::Half, 1.0).unwrap());
    let spans = vec![Span { block: packed(0), lo: 0, hi: 64, shift: 3, rotate_keys: false }];
    let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, 1], spans };
    let (q, trig) = (noise.data(32, Dtype::F32), SpanTrig::new(&spans, &rope));
    let args = Attend {
        q: q.view([1, 2, 1, 16]),
        spans: &spans,
        trig: Some(&trig),
        scale: 1.0,
        softcap: None,
        sinks: None,
        apply_factor: false,
        threads: 1,
        level: Level::Portable,
    };
    let mut out = noise.data(32, Dtype::F32);
    let done = kvsieve_core::kernels::attend(&arena, &args, out.elems_mut(), None, None);
    assert!(matches!(done, Err(Error::Unsupported(_))));
}

#[test]
fn a_group_that_halves_cannot_hold_is_nan() {
    let mut arena = Arena::new(1, 16, 16, Dtype::F32).unwrap();
    let mut keys = vec![0.5f32; 64 * 16];
    (keys[3], keys[16 * 40 + 5], keys[16 * 41 + 6]) = (f32::NAN, 1e30, f32::INFINITY);
    let run = [Run { block: BlockId(0), lo: 0, hi: 64 }];
    let elems = kvsieve_core::tensor::Elems::F32(&keys);
    arena.write(&run, elems, elems).unwrap();
    arena.set_packing(Packing { key_kept: 16, key_bits: 4, value_bits: 4, group: 16 }).unwrap();
    let channels = Arc::new(Channels::new(&(0..16).collect::<Vec<i64>>(), &[0], 16).unwrap());
    let runs = pack(&mut arena, 64, &channels);
    for (slot, (key, value)) in tokens(&arena, &runs, 0).iter().enumerate() {
        for (c, x) in key.iter().enumerate() {
            let spoilt = matches!((slot / 16, c), (0, 3) | (2, 5 | 6));
            assert_eq!(x.is_nan(), spoilt, "slot {slot}, channel {c}");
        }
        assert_eq!(value.iter().any(|x| x.is_nan()), matches!(slot, 0 | 40 | 41));
    }
}
