//! Attention to sets of tokens that every head chose for itself, and the probabilities by which it chooses, against the kernels that
//! are tested against the naive twin.

use super::common::data::{DTYPES, Data, Noise, filled, span};
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::attend::mass_len;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::sets::{AttendSets, Sets, attend_sets};
use kvsieve_core::kernels::{Attend, Level, attend, attend_apart, attend_highest};
use kvsieve_core::plan::Spans;
use kvsieve_core::tensor::{Dtype, View};

/// Runs of blocks in any order, the last ones not full, with holes as evictions leave them.
fn runs(noise: &mut Noise, blocks: usize) -> Vec<Run> {
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, noise.below(i + 1));
    }
    let one = |block: &u32| {
        let lo = noise.below(3) as u32 * noise.below(20) as u32;
        Run { block: BlockId(*block), lo, hi: 64 - noise.below(2) as u32 * noise.below(20) as u32 }
    };
    order.iter().map(one).collect()
}

/// The slots of all residents.
fn slots(runs: &[Run]) -> Vec<(u32, u32)> {
    runs.iter().flat_map(|run| (run.lo..run.hi).map(|slot| (run.block.0, slot))).collect()
}

#[test]
fn every_head_reads_its_set_and_the_rest() {
    let mut noise = Noise(5);
    for round in 0..40 {
        let dtype = DTYPES[round % 3];
        let (rows, kv_heads, group) = (1 + noise.below(3), 1 + noise.below(3), 1 + noise.below(4));
        let heads = kv_heads * group;
        let arena = filled(&mut noise, kv_heads, (32, 32), dtype, 12);
        let q = noise.data(rows * heads * 32, dtype);
        let (mut all, mut starts, mut wanted) = (Vec::new(), vec![0], Vec::new());
        for _ in 0..rows {
            let blocks = noise.below(6);
            let runs = runs(&mut noise, blocks);
            let slots = slots(&runs);
            let rest = noise.below(slots.len() + 1);
            let count = noise.below(rest + 1);
            let (mut tokens, mut ranks) = (Vec::new(), Vec::new());
            let skip = noise.below(count + 2) as i64;
            for _ in 0..kv_heads {
                let mut pool: Vec<i64> = (0..rest as i64).collect();
                while pool.len() > count {
                    pool.remove(noise.below(pool.len()));
                }
                let mut order: Vec<i64> = (0..count as i64).collect();
                for i in (1..count).rev() {
                    order.swap(i, noise.below(i + 1));
                }
                let kept = pool.iter().zip(&order).filter(|(_, rank)| **rank >= skip).map(|(token, _)| *token as usize);
                let read =
                    kept.chain(rest..slots.len()).map(|i| span(slots[i].0, slots[i].1, slots[i].1 + 1, 0, false));
                wanted.extend(read);
                starts.push(wanted.len() as u32);
                tokens.extend(pool);
                ranks.extend(order);
            }
            all.push((runs, tokens, ranks, skip, rest as u32));
        }
        let sets: Vec<Sets<'_>> = all
            .iter()
            .map(|(runs, tokens, ranks, skip, rest)| Sets { runs, tokens, ranks, skip: *skip, rest: *rest })
            .collect();
        let sinks: Vec<f32> = (0..heads).map(|_| noise.unit()).collect();
        let (q, sinks) = (q.view([rows, heads, 1, 32]), [None, Some(&sinks[..])][noise.below(2)]);
        let (scale, softcap) = (0.3, [None, Some(2.0)][noise.below(2)]);
        let spans = Spans { num_rows: rows, num_queries: 1, starts, spans: wanted };
        for level in levels() {
            let mut out = Data::of(&vec![7.0; rows * heads * 32], dtype);
            let args = AttendSets { q, rows: &sets, scale, softcap, sinks, threads: 1, level };
            attend_sets(&arena, &args, out.elems_mut(), &|| false).unwrap();
            let mut exact = Data::of(&vec![8.0; rows * heads * 32], dtype);
            let (trig, apply_factor, threads) = (None, false, 1);
            let args = Attend { q, spans: &spans, trig, scale, softcap, sinks, apply_factor, threads, level };
            attend_apart(&arena, &args, exact.elems_mut(), None, &|| false).unwrap();
            let off = super::common::data::off(&out.f64s(), &exact.f64s());
            assert!(off <= super::common::data::tolerance(dtype), "round {round} {level:?} {dtype:?}: {off}");
        }
    }
}

#[test]
fn sets_that_name_what_is_not_there_are_refused() {
    let mut noise = Noise(7);
    let arena = filled(&mut noise, 2, (16, 16), Dtype::F32, 2);
    let q = noise.data(2 * 16, Dtype::F32);
    let runs = [Run { block: BlockId(1), lo: 0, hi: 64 }, Run { block: BlockId(0), lo: 0, hi: 6 }];
    let attended = |tokens: &[i64], ranks: &[i64], rest| {
        let rows = [Sets { runs: &runs, tokens, ranks, skip: 0, rest }];
        let (scale, softcap, sinks, threads, level) = (1.0, None, None, 1, levels()[0]);
        let args = AttendSets { q: q.view([1, 2, 1, 16]), rows: &rows, scale, softcap, sinks, threads, level };
        let mut out = Data::of(&[7.0; 32], Dtype::F32);
        let done = attend_sets(&arena, &args, out.elems_mut(), &|| false);
        assert_eq!(done.is_err(), out == Data::of(&[7.0; 32], Dtype::F32), "a refused call writes nothing");
        done
    };
    attended(&[1, 2, 3, 69], &[0, 1, 0, 1], 70).unwrap();
    attended(&[], &[], 0).unwrap();
    for (tokens, rest) in [(&[1i64, 2, 3, 3][..], 70), (&[2, 1, 0, 1], 70), (&[0, 1, -1, 1], 70), (&[0, 1, 2, 9], 9)] {
        assert!(matches!(attended(tokens, &[0, 0, 0, 0], rest), Err(Error::OutOfRange { .. })), "{tokens:?} {rest}");
    }
    assert!(matches!(attended(&[], &[], 71), Err(Error::OutOfRange { .. })));
    assert!(attended(&[1, 2, 3], &[0, 0, 0], 9).is_err());
    assert!(attended(&[1, 2], &[0, 0, 0], 9).is_err());
}

fn asked<'a>(q: View<'a>, spans: &'a Spans, sinks: Option<&'a [f32]>, level: Level) -> Attend<'a> {
    let (trig, scale, softcap, apply_factor, threads) = (None, 0.4, None, false, 1);
    Attend { q, spans, trig, scale, softcap, sinks, apply_factor, threads, level }
}

#[test]
fn the_highest_probability_of_a_group() {
    let mut noise = Noise(11);
    for round in 0..20 {
        let dtype = DTYPES[round % 3];
        let (kv_heads, group, queries) = (1 + noise.below(3), 1 + noise.below(5), 1 + noise.below(2));
        let heads = kv_heads * group;
        let arena = filled(&mut noise, kv_heads, (32, 32), dtype, 90);
        let q = noise.data(heads * queries * 32, dtype);
        let (mut starts, mut list) = (vec![0], Vec::new());
        for _ in 0..queries {
            // Now and then enough for several units.
            for block in 0..[3, 80][noise.below(2)] {
                list.push(span(block, noise.below(9) as u32, 64 - noise.below(9) as u32, 0, false));
            }
            starts.push(list.len() as u32);
        }
        let spans = Spans { num_rows: 1, num_queries: queries, starts, spans: list };
        let sinks: Vec<f32> = (0..heads).map(|_| noise.unit()).collect();
        let sinks = [None, Some(&sinks[..])][noise.below(2)];
        let keys = mass_len(&spans, kv_heads);
        for level in levels() {
            let mut out = Data::of(&vec![7.0; heads * queries * 32], dtype);
            let mut mass = vec![7.0; keys];
            let all = asked(q.view([1, heads, queries, 32]), &spans, sinks, level);
            attend_highest(&arena, &all, out.elems_mut(), &mut mass, &|| false).unwrap();
            let mut plain = Data::of(&vec![8.0; heads * queries * 32], dtype);
            attend(&arena, &all, plain.elems_mut(), None, None).unwrap();
            assert_eq!(out, plain, "asking for more must not change the output");
            // One head of each group at a time: its probabilities alone.
            let mut highest = vec![0f32; keys];
            for g in 0..group {
                let pick = |x: &[f32]| {
                    let of_head = x.len() / heads;
                    (0..kv_heads).flat_map(|h| x[(h * group + g) * of_head..][..of_head].to_vec()).collect::<Vec<f32>>()
                };
                let wide: Vec<f32> = q.f64s().iter().map(|&x| x as f32).collect();
                let (mine, sinks) = (Data::of(&pick(&wide), dtype), sinks.map(pick));
                let mut out = Data::of(&vec![7.0; kv_heads * queries * 32], dtype);
                let mut mass = vec![7.0; keys];
                let one = asked(mine.view([1, kv_heads, queries, 32]), &spans, sinks.as_deref(), level);
                attend(&arena, &one, out.elems_mut(), None, Some(&mut mass)).unwrap();
                highest.iter_mut().zip(&mass).for_each(|(h, m)| *h = h.max(*m));
            }
            let off = mass.iter().zip(&highest).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= 1e-5, "round {round} {level:?} {dtype:?}: {off}");
        }
    }
}
