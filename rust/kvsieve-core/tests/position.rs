//! Spans and parts say the same as the definition of each rule, key by key.

use super::common::{cases, chains, memory, planner, slots, window};
use kvsieve_core::plan::{Frame, NOWHERE, Part, Placing, Step};
use kvsieve_core::planner::{MemorySpec, Planner};
use kvsieve_core::position::{PositionRule, Rule, naive};
use proptest::prelude::*;
use std::collections::HashMap;
use std::ops::Range;

type Read = Vec<(usize, u64, i64)>;
type Held = HashMap<(u32, u32), (usize, u64)>;

/// Where each resident of a row sits: (block, slot) to (memory, position).
fn held(planner: &Planner, row: usize) -> Held {
    let mut out = Held::new();
    for m in 0..planner.num_memories() {
        let positions = planner.positions(m, row).unwrap();
        for ((block, slot), p) in slots(planner.runs(m, row).unwrap()).zip(positions) {
            out.insert((block.0, slot), (m, p));
        }
    }
    out
}

fn residents(planner: &Planner) -> Vec<Vec<Vec<u64>>> {
    let memories = 0..planner.num_memories();
    let row = |r| memories.clone().map(|m| planner.positions(m, r).unwrap().to_vec()).collect();
    (0..planner.num_rows()).map(row).collect()
}

type Pins = Vec<Range<u64>>;

fn expected(rules: &[Rule], pins: &Pins, residents: &[Vec<u64>], first_new: u64, i: usize) -> Read {
    let mut residents = residents.to_vec();
    residents[0].extend(first_new..=first_new + i as u64);
    let mut out = naive::distances(rules, pins, &residents, first_new + i as u64);
    out.sort_unstable();
    out
}

/// A middle (chosen from, at one distance, by a chunk's last query) is offered what the first memory no longer shows that query.
fn is_middle(rules: &[Rule], m: usize) -> bool {
    m > 0 && rules[m].top_k > 0 && matches!(rules[m].position, PositionRule::Fixed { .. })
}

fn offered(rules: &[Rule], pins: &Pins, residents: &[Vec<u64>], first_new: u64, i: usize) -> Read {
    let mut near = residents[0].clone();
    near.extend(first_new..=first_new + i as u64);
    let query = first_new + i as u64;
    let pinned = |p: &u64| pins.iter().any(|r| r.contains(p));
    let taken = pins.iter().cloned().flatten().filter(|&p| p >= rules[0].sinks).count() as u64;
    let far = |p: &u64| rules[0].visible.is_some_and(|v| query - p >= v.saturating_sub(taken).max(1));
    let hidden = |p: &u64| *p >= rules[0].sinks && !pinned(p) && far(p);
    let hidden: Vec<u64> = near.into_iter().filter(hidden).collect();
    let mut out = Read::new();
    for (m, rule) in rules.iter().enumerate().filter(|(m, _)| is_middle(rules, *m)) {
        let PositionRule::Fixed { distance } = rule.position else { continue };
        out.extend(hidden.iter().map(|&p| (m, p, distance as i64)));
    }
    out
}

fn by_spans(step: &Step, item: usize, query: u64, held: &Held) -> Read {
    let spans = step.spans.as_ref().unwrap();
    let mut out = Read::new();
    for span in &spans.spans[spans.starts[item] as usize..spans.starts[item + 1] as usize] {
        assert!(span.lo < span.hi);
        for slot in span.lo..span.hi {
            let (m, p) = held[&(span.block.0, slot)];
            let distance = match (span.rotate_keys, step.frame) {
                (true, _) => span.shift - i64::from(slot),
                (false, Frame::Rotated) => query as i64 - p as i64 + span.shift,
                (false, Frame::Raw) => span.shift,
            };
            out.push((m, p, distance));
        }
    }
    out.sort_unstable();
    out
}

fn check_shape(part: &Part, held: &Held, first_new: u64) {
    let stored = slots(&part.runs).map(|(b, s)| held[&(b.0, s)]);
    let new = (part.new_lo..part.new_hi).map(|i| (part.memory, first_new + i as u64));
    let (memories, positions): (Vec<_>, Vec<_>) = stored.chain(new).unzip();
    assert!(memories.iter().all(|&m| m == part.memory || (m == 0 && part.top_k > 0)));
    assert_eq!(positions.len(), part.key_true.len());
    let named = positions.iter().zip(&part.key_true).filter(|&(_, &key)| key != NOWHERE);
    assert!(named.clone().all(|(&p, &key)| p as i64 == key));
    assert!(part.top_k > 0 || named.count() == positions.len());
    assert_eq!(part.key_positions.len(), part.key_true.len());
    assert_eq!(part.query_positions.len(), part.query_true.len());
}

fn by_parts(parts: &[&Part], i: usize) -> Read {
    let mut out = Read::new();
    for part in parts {
        for (j, &key) in part.key_true.iter().enumerate() {
            let d = part.query_true[i] - key;
            if d >= 0 && d < part.near && d >= part.far {
                let distance = match part.placing {
                    Placing::Fixed(distance) => distance,
                    Placing::Relative => part.query_positions[i] - part.key_positions[j],
                };
                out.push((part.memory, key as u64, distance));
            }
        }
    }
    out.sort_unstable();
    out
}

/// Runs one step and compares every query of it.
fn step(planner: &mut Planner, rules: &[Rule], lens: &[usize], pads: usize, store_all: bool) {
    let fresh = planner.num_rows() == 0;
    let before = if fresh { vec![vec![Vec::new(); rules.len()]; lens.len()] } else { residents(planner) };
    let pins = |row| if fresh { Pins::new() } else { planner.pins(row).unwrap().ranges().to_vec() };
    let pins: Vec<Pins> = (0..lens.len()).map(pins).collect();
    let held_before: Vec<_> = (0..planner.num_rows()).map(|r| held(planner, r)).collect();
    let num_queries = lens.iter().max().unwrap() + pads;
    let step = planner.begin(lens, num_queries, store_all, true).unwrap();
    for (row, &len) in lens.iter().enumerate() {
        let first = step.first_new[row];
        let parts: Vec<_> = step.parts.iter().filter(|p| p.row == row).collect();
        let empty = Held::new();
        parts.iter().for_each(|p| check_shape(p, held_before.get(row).unwrap_or(&empty), first));
        assert!(len > 0 || parts.is_empty());
        let held_now = held(planner, row);
        for i in 0..len {
            let mut want = expected(rules, &pins[row], &before[row], first, i);
            let (mut read, mut all) = (by_parts(&parts, i), want.clone());
            if i + 1 == len {
                all.extend(offered(rules, &pins[row], &before[row], first, i));
                all.sort_unstable();
            } else {
                read.retain(|(m, _, _)| !is_middle(rules, *m));
                all.retain(|(m, _, _)| !is_middle(rules, *m));
            }
            assert_eq!(read, all, "parts of row {row}, query {i}");
            if step.spans.is_some() {
                want.retain(|(m, _, _)| rules[*m].top_k == 0);
                let item = row * num_queries + num_queries - len + i;
                assert_eq!(by_spans(&step, item, first + i as u64, &held_now), want, "spans of row {row}, query {i}");
            }
        }
        if let Some(spans) = &step.spans {
            let item = row * num_queries;
            assert_eq!(spans.starts[item], spans.starts[item + num_queries - len], "pads read nothing");
        }
    }
    planner.commit().unwrap();
}

fn spec(m: MemorySpec, near: u64) -> MemorySpec {
    MemorySpec { visible: Some(near), ..m }
}

fn score_and_settle(planner: &mut Planner, lens: &[usize], seed: u64) {
    for (row, &len) in lens.iter().enumerate() {
        let n = len.min(planner.resident(0, row).unwrap());
        let scores: Vec<f32> = (0..n).map(|i| ((i as u64 * 37 + seed * 11 + row as u64) % 23) as f32).collect();
        planner.set_scores(row, &scores).unwrap();
    }
    planner.settle(!seed.is_multiple_of(3)).unwrap();
}

/// Pins, unpins or evicts some tokens of a row. What cannot be pinned is refused and changes nothing.
fn change(planner: &mut Planner, row: usize, kind: u8, back: u64, len: u64) {
    let seen = planner.seen(row).unwrap();
    let range = match kind {
        0 => seen + back..seen + back + len,
        1 => 0..len,
        _ => seen.saturating_sub(back)..seen.saturating_sub(back) + len,
    };
    match kind {
        0..3 => drop(planner.pin(Some(&[row]), &range, false)),
        3 => planner.unpin(Some(&[row]), &range).unwrap(),
        _ => drop(planner.evict(Some(&[row]), &range).unwrap()),
    }
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn spans_and_parts_agree_with_the_definition(
        chain in 0usize..12,
        chunks in prop::collection::vec((prop::collection::vec(0usize..20, 2), 0usize..3, any::<bool>()), 1..14),
        prompt in 1usize..150,
        changes in prop::collection::vec((0usize..14, 0usize..2, 0u8..5, 0u64..60, 1u64..9), 0..8),
    ) {
        let chain = chains().swap_remove(chain);
        let rules: Vec<_> = chain.1.iter().map(MemorySpec::rule).collect();
        let mut planner = planner(chain);
        step(&mut planner, &rules, &[prompt, prompt / 2], 1, false);
        score_and_settle(&mut planner, &[prompt, prompt / 2], 1);
        for (seed, (lens, pads, store_all)) in (0..).zip(chunks) {
            for &(_, row, kind, back, len) in changes.iter().filter(|change| change.0 == seed as usize) {
                change(&mut planner, row, kind, back, len);
            }
            step(&mut planner, &rules, &lens, pads, store_all);
            score_and_settle(&mut planner, &lens, seed);
        }
    }
}

#[test]
fn streaming_window_runs_at_its_slots() {
    let chain = vec![spec(memory(window(2, 3), PositionRule::InCache), 4)];
    let mut planner = planner((Frame::Rotated, chain));
    for token in 0..10 {
        let step = planner.begin(&[1], 1, true, true).unwrap();
        let read = by_spans(&step, 0, token, &held(&planner, 0));
        if token == 9 {
            let slots: Vec<_> = read.iter().map(|&(_, p, d)| (p, d)).collect();
            assert_eq!(slots, [(0, 5), (1, 4), (6, 3), (7, 2), (8, 1), (9, 0)]);
            let sinks = step.parts.iter().find(|p| p.far == 4).unwrap();
            assert_eq!(sinks.query_positions, [5]);
        }
        planner.commit().unwrap();
        assert!(planner.settle(false).unwrap().is_empty());
    }
    assert_eq!(planner.positions(0, 0).unwrap(), [0, 1, 7, 8, 9]);
}

#[test]
fn ceiling_sees_sinks_and_window() {
    let position = PositionRule::Capped { distance: 4 };
    let mut planner = planner((Frame::Raw, vec![spec(memory(window(2, 4), position), 4)]));
    let step = planner.begin(&[10], 10, true, true).unwrap();
    let held = held(&planner, 0);
    let counts: Vec<_> = (0..10).map(|i| by_spans(&step, i, i as u64, &held).len()).collect();
    assert_eq!(counts, [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]);
    let last: Vec<_> = by_spans(&step, 9, 9, &held).into_iter().map(|(_, p, d)| (p, d)).collect();
    assert_eq!(last, [(0, 4), (1, 4), (6, 3), (7, 2), (8, 1), (9, 0)]);
}

#[test]
fn decode_needs_few_spans() {
    let mut window_planner = planner((Frame::Rotated, vec![spec(memory(window(4, 200), PositionRule::InCache), 201)]));
    let mut all =
        planner((Frame::Rotated, vec![memory(kvsieve_core::evict::Eviction::KeepAll, PositionRule::Original)]));
    for (planner, most) in [(&mut window_planner, 5), (&mut all, 8)] {
        for n in [400, 1] {
            let step = planner.begin(&[n], n, false, false).unwrap();
            if n == 1 {
                let spans = step.spans.unwrap();
                assert!(spans.spans.len() <= most, "{} spans", spans.spans.len());
                assert!(step.parts.is_empty());
            } else {
                assert!(step.spans.is_none() && !step.parts.is_empty());
            }
            planner.commit().unwrap();
            planner.settle(false).unwrap();
        }
    }
}
