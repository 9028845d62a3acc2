//! Attention that adds up the heaviest values alone, against the probabilities of the kernel that adds up all.

use std::sync::Arc;

use super::common::data::{DTYPES, Data, Noise, call, filled, off, span, tolerance};
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::{Attend, Heaviest, SpanTrig, add_heaviest, attend_heaviest, choose_heaviest};
use kvsieve_core::plan::Spans;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::tier::{Order, TierFile};
use kvsieve_core::tensor::Dtype;

/// What [`Heaviest`] means, by the probabilities of one head: kept keys with their weights, and their mass.
fn kept(p: &[f32], keep: &Heaviest) -> (Vec<(usize, f64)>, f64) {
    let total: f64 = p.iter().map(|&p| f64::from(p)).sum();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    let mut mass = 0.0;
    let mut chosen = Vec::new();
    for key in order.into_iter().take(keep.top) {
        chosen.push((key, f64::from(p[key])));
        mass += f64::from(p[key]) / total;
        if keep.mass < 1.0 && mass >= f64::from(keep.mass) {
            break;
        }
    }
    if keep.renormalise {
        chosen.iter_mut().for_each(|(_, weight)| *weight /= mass);
    }
    (chosen, mass)
}

/// Everything but the queries, which are `[1, heads, queries, dim]`, and what they share.
struct Case<'a> {
    arena: &'a Arena,
    args: Attend<'a>,
    heads: usize,
    group: usize,
}

impl Case<'_> {
    /// What `head` adds up of each query, and its mass.
    fn head(&self, q: &[f32], head: usize, keep: &Heaviest) -> Vec<(Vec<f64>, f64)> {
        let (Case { arena, args, heads, group }, dim) = (self, self.arena.key_dim());
        let queries = args.spans.num_queries;
        // Every head asks what this one does, so that a key's mass is its probability times the group.
        let mine = &q[head * queries * dim..][..queries * dim];
        let alike = Data::of(&mine.repeat(*heads), arena.dtype());
        let sink = args.sinks.map(|sinks| vec![sinks[head]; *heads]);
        let args = Attend { q: alike.view([1, *heads, queries, dim]), sinks: sink.as_deref(), ..*args };
        let found = call(arena, &args);
        let mut at = 0;
        let each = |query: usize| {
            let mine = &args.spans.spans[args.spans.starts[query] as usize..args.spans.starts[query + 1] as usize];
            let slots: Vec<_> = mine.iter().flat_map(|s| (s.lo..s.hi).map(|slot| (s.block, slot))).collect();
            let p = &found.mass[at + head / group * slots.len()..][..slots.len()];
            at += arena.num_kv_heads() * slots.len();
            let p: Vec<f32> = p.iter().map(|p| p / *group as f32).collect();
            let (chosen, mass) = kept(&p, keep);
            let mut sum = vec![0.0; arena.value_dim()];
            for (key, weight) in chosen {
                let (_, value) = arena.token(slots[key].0, head / group, slots[key].1).unwrap();
                sum.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
            }
            (sum, mass)
        };
        (0..queries).map(each).collect()
    }
}

/// Spans of so many queries: now and then enough for several units; all but the first query may read nothing.
fn lists(noise: &mut Noise, queries: usize, turns: bool) -> Spans {
    let (mut starts, mut spans) = (vec![0], Vec::new());
    for query in 0..queries {
        let blocks = [0, 3, 78][if query == 0 { 1 + noise.below(2) } else { noise.below(3) }];
        for block in 0..blocks {
            let shift = if turns { noise.below(5) as i64 * 64 } else { 0 };
            spans.push(span(block, noise.below(9) as u32, 64 - noise.below(9) as u32, shift, turns));
        }
        starts.push(spans.len() as u32);
    }
    Spans { num_rows: 1, num_queries: queries, starts, spans }
}

#[test]
fn each_head_adds_up_its_heaviest_values() {
    let mut noise = Noise(31);
    for round in 0..24 {
        let dtype = DTYPES[round % 3];
        let (kv_heads, group, queries) = (1 + noise.below(3), 1 + noise.below(4), 1 + noise.below(2));
        let (heads, dim) = (kv_heads * group, [32, 64][noise.below(2)]);
        let arena = filled(&mut noise, kv_heads, (dim, dim), dtype, 80);
        let factor = [1.0, 1.1][noise.below(2)];
        let rope = Arc::new(Rope::new(vec![1.0, 0.3, 0.01, 0.002], Layout::Half, factor).unwrap());
        let turns = noise.below(2) == 1;
        let spans = lists(&mut noise, queries, turns);
        let trig = SpanTrig::new(&spans, &rope);
        let sinks: Vec<f32> = (0..heads).map(|_| noise.unit()).collect();
        let (sinks, softcap) = ([None, Some(&sinks[..])][noise.below(2)], [None, Some(2.0)][noise.below(2)]);
        let keep = Heaviest {
            top: [1, 7, 100, usize::MAX][noise.below(4)],
            mass: [1.0, 0.3, 0.9][noise.below(3)],
            renormalise: noise.below(2) == 1,
        };
        let q: Vec<f32> = (0..heads * queries * dim).map(|_| 2.0 * noise.unit()).collect();
        let data = Data::of(&q, dtype);
        for level in levels() {
            let (q_view, trig, scale) = (data.view([1, heads, queries, dim]), turns.then_some(&trig), 0.4);
            let (apply_factor, threads) = (turns, 1);
            let args = Attend { q: q_view, spans: &spans, trig, scale, softcap, sinks, apply_factor, threads, level };
            let mut out = Data::of(&vec![7.0; heads * queries * dim], dtype);
            let mut mass = vec![7.0; heads * queries];
            attend_heaviest(&arena, &args, &keep, out.elems_mut(), &mut mass, &|| false).unwrap();
            let case = Case { arena: &arena, args, heads, group };
            let (mut want, mut masses) = (vec![0.0; heads * queries * dim], Vec::new());
            for head in 0..heads {
                for (query, (sum, mass)) in case.head(&q, head, &keep).into_iter().enumerate() {
                    want[(query * heads + head) * dim..][..dim].copy_from_slice(&sum);
                    masses.push(mass);
                }
            }
            let wrong = off(&out.f64s(), &want);
            assert!(wrong <= tolerance(dtype), "round {round} {level:?} {dtype:?} {keep:?}: {wrong}");
            let wrong = mass.iter().zip(&masses).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(wrong <= 1e-5, "round {round} {level:?} {keep:?}: mass {wrong}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let mut noise = Noise(37);
    let arena = filled(&mut noise, 2, (64, 64), Dtype::F32, 80);
    let q = noise.data(8 * 64, Dtype::F32);
    let list = (0..80).map(|block| span(block, 0, 64, 0, false)).collect::<Vec<_>>();
    let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, 80], spans: list };
    let keep = Heaviest { top: 50, mass: 1.0, renormalise: false };
    let run = |threads| {
        let (level, trig, softcap, sinks) = (*levels().last().unwrap(), None, None, None);
        let q = q.view([1, 8, 1, 64]);
        let args = Attend { q, spans: &spans, trig, scale: 0.2, softcap, sinks, apply_factor: false, threads, level };
        let mut out = Data::of(&[7.0; 8 * 64], Dtype::F32);
        let mut mass = vec![0.0; 8];
        attend_heaviest(&arena, &args, &keep, out.elems_mut(), &mut mass, &|| false).unwrap();
        (out, mass)
    };
    assert!(run(1) == run(2));
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let mut noise = Noise(41);
    let arena = filled(&mut noise, 1, (32, 32), Dtype::F32, 1);
    let q = noise.data(32, Dtype::F32);
    let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, 1], spans: vec![span(0, 0, 64, 0, false)] };
    let run = |keep: Heaviest, masses: usize| {
        let (level, trig, softcap, sinks) = (levels()[0], None, None, None);
        let q = q.view([1, 1, 1, 32]);
        let args =
            Attend { q, spans: &spans, trig, scale: 0.2, softcap, sinks, apply_factor: false, threads: 1, level };
        let mut out = Data::of(&[7.0; 32], Dtype::F32);
        attend_heaviest(&arena, &args, &keep, out.elems_mut(), &mut vec![0.0; masses], &|| false)
    };
    let keep = Heaviest { top: 5, mass: 1.0, renormalise: false };
    run(keep, 1).unwrap();
    assert!(matches!(run(Heaviest { top: 0, ..keep }, 1), Err(Error::OutOfRange { what: "top", .. })));
    for mass in [0.0, -1.0, f32::NAN] {
        assert!(matches!(run(Heaviest { mass, ..keep }, 1), Err(Error::OutOfRange { what: "mass", .. })));
    }
    assert!(run(keep, 2).is_err());
}

/// Keys stay in memory and values leave it: the choice is the same, and it is added up once its blocks are there.
#[test]
fn values_that_left_memory_are_fetched_once_they_are_chosen() {
    let (heads, dim, blocks) = (4, 32, 80);
    for (seed, dtype) in (50..56).zip(DTYPES.into_iter().cycle()) {
        let mut noise = Noise(seed);
        let twin = filled(&mut Noise(seed), 2, (dim, dim), dtype, blocks);
        let mut arena = filled(&mut Noise(seed), 2, (dim, dim), dtype, blocks);
        let file = TierFile::create(&std::env::temp_dir()).unwrap();
        arena.set_tier(file, 0, Order::Recency, true).unwrap();
        arena.trim(&[]).unwrap();
        let queries = 1 + noise.below(2);
        let spans = lists(&mut noise, queries, false);
        let q: Vec<f32> = (0..heads * queries * dim).map(|_| 2.0 * noise.unit()).collect();
        let data = Data::of(&q, dtype);
        let view = data.view([1, heads, queries, dim]);
        let (trig, scale, softcap, sinks, apply_factor, threads) = (None, 0.4, None, None, false, 1);
        let level = isa().unwrap();
        let args = Attend { q: view, spans: &spans, trig, scale, softcap, sinks, apply_factor, threads, level };
        let keep = Heaviest { top: 3, mass: 1.0, renormalise: false };
        let answer = |arena: &Arena| {
            let mut out = Data::of(&vec![7.0; heads * queries * dim], dtype);
            let mut mass = vec![7.0; heads * queries];
            let choice = choose_heaviest(arena, &args, &keep, &|| false).unwrap();
            add_heaviest(arena, &args, &choice, out.elems_mut(), &mut mass).map(|()| (choice.blocks(&spans), out, mass))
        };
        assert!(matches!(answer(&arena), Err(Error::NotInMemory { .. })));
        let want = answer(&twin).unwrap();
        assert!((1..=3 * heads * queries).contains(&want.0.len()));
        let runs: Vec<Run> = want.0.iter().map(|&block| Run { block, lo: 0, hi: 64 }).collect();
        arena.fetch(&runs).unwrap();
        assert_eq!(answer(&arena).unwrap(), want);
        let away = (0..blocks).filter(|&block| arena.is_spilled(BlockId(block))).count();
        assert_eq!(away + want.0.len(), blocks as usize, "no other block was loaded");
    }
}
