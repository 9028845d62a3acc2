//! The naive twin of placing: the definition, key by key. Tests compare spans and parts against it.

use super::{Place, Rule};
use crate::ids::Position;

/// What a query at `query` sees of a chain of memories, as (memory, position, distance). `residents[m]` are the positions that
/// memory `m` holds; the first memory's include every new token up to and including the query.
pub fn distances(rules: &[Rule], residents: &[Vec<Position>], query: Position) -> Vec<(usize, Position, i64)> {
    let mut out = Vec::new();
    let mut slot = 0;
    for (m, (rule, held)) in rules.iter().zip(residents).enumerate() {
        let near = |p: Position| rule.visible.is_none_or(|v| query - p < v);
        let seen: Vec<Position> = held.iter().copied().filter(|&p| p <= query && (near(p) || p < rule.sinks)).collect();
        slot += seen.iter().filter(|&&p| p < query).count();
        for (rank, &p) in seen.iter().enumerate() {
            let distance = match rule.place {
                Place::True => (query - p) as i64,
                Place::Slots => slot as i64 - rank as i64,
                Place::Ceiling { distance } if !near(p) => distance as i64,
                Place::Ceiling { .. } => (query - p) as i64,
                Place::Fixed { distance } => distance as i64,
            };
            out.push((m, p, distance));
        }
    }
    out
}
