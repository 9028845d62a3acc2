//! The naive twin of placing: the definition, key by key. Tests compare spans and parts against it.

use super::{Place, Rule};
use crate::ids::Position;

/// What a query at `query` sees of a chain of memories, as (memory, position, distance). `residents[m]` are the positions that
/// memory `m` holds; the first memory's include every new token up to and including the query.
pub fn distances(rules: &[Rule], residents: &[Vec<Position>], query: Position) -> Vec<(usize, Position, i64)> {
    let mut out = Vec::new();
    let mut earlier = 0;
    for (m, (rule, held)) in rules.iter().zip(residents).enumerate() {
        let near = |p: Position| rule.visible.is_none_or(|v| query - p < v);
        let seen: Vec<Position> = held.iter().copied().filter(|&p| p <= query && (near(p) || p < rule.sinks)).collect();
        let slot = earlier + seen.iter().filter(|&&p| p < query).count();
        let beyond = seen.iter().filter(|&&p| !near(p)).count();
        earlier = slot - beyond;
        // The sinks beyond a window stand before everything that later memories hold.
        let counted = |l: usize| rules[l].place == Place::Slots && rules[l].top_k == 0;
        let later: usize = (m + 1..rules.len()).filter(|&l| counted(l)).map(|l| residents[l].len()).sum();
        for (rank, &p) in seen.iter().enumerate() {
            let distance = match rule.place {
                Place::True => (query - p) as i64,
                Place::Slots => (slot + if near(p) { 0 } else { later }) as i64 - rank as i64,
                Place::Ceiling { distance } if !near(p) => distance as i64,
                Place::Ceiling { .. } => (query - p) as i64,
                Place::Fixed { distance } => distance as i64,
            };
            out.push((m, p, distance));
        }
    }
    out
}
