//! The naive twin of placing: the definition, key by key. Tests compare spans and parts against it.

use super::{PositionRule, Rule};
use crate::ids::Position;
use std::ops::Range;

/// What a query at `query` sees of a chain of memories, as (memory, position, distance). `residents[m]` are the positions that
/// memory `m` holds; the first memory's include every new token up to and including the query. What is in `pins` is seen by the first
/// memory at any distance, and takes as many places from its window as are no sinks.
pub fn distances(
    rules: &[Rule],
    pins: &[Range<Position>],
    residents: &[Vec<Position>],
    query: Position,
) -> Vec<(usize, Position, i64)> {
    let mut out = Vec::new();
    let mut earlier = 0;
    for (m, (rule, held)) in rules.iter().zip(residents).enumerate() {
        let pins = if m == 0 { pins } else { &[] };
        let pinned = |p: Position| pins.iter().any(|r| r.contains(&p));
        let taken = pins.iter().cloned().flatten().filter(|&p| p >= rule.sinks).count() as Position;
        let near = |p: Position| rule.visible.is_none_or(|v| query - p < v.saturating_sub(taken).max(1));
        let always = |p: Position| p < rule.sinks || pinned(p);
        let seen: Vec<Position> = held.iter().copied().filter(|&p| p <= query && (near(p) || always(p))).collect();
        let slot = earlier + seen.iter().filter(|&&p| p < query).count();
        let beyond = seen.iter().filter(|&&p| !near(p)).count();
        earlier = slot - beyond;
        // The sinks beyond a window stand before everything that later memories hold.
        let counted = |l: usize| rules[l].position == PositionRule::InCache && rules[l].top_k == 0;
        let later: usize = (m + 1..rules.len()).filter(|&l| counted(l)).map(|l| residents[l].len()).sum();
        for (rank, &p) in seen.iter().enumerate() {
            let distance = match rule.position {
                PositionRule::Original => (query - p) as i64,
                PositionRule::InCache => (slot + if near(p) { 0 } else { later }) as i64 - rank as i64,
                PositionRule::Capped { distance } if !near(p) => distance as i64,
                PositionRule::Capped { .. } => (query - p) as i64,
                PositionRule::Fixed { distance } => distance as i64,
            };
            out.push((m, p, distance));
        }
    }
    out
}
