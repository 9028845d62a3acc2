//! What a planner holds, as plain lists.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use kvsieve_core::budget::Budget;
use kvsieve_core::evict::{Eviction, naive};
use kvsieve_core::ids::BLOCK;
use kvsieve_core::planner::MemorySpec;

use super::super::common::Token;

#[derive(Clone, Copy, Debug)]
pub struct Tok {
    pub id: Token,
    pub position: u64,
    pub score: f32,
    pub step: u64,
}

#[derive(Clone, Debug, Default)]
pub struct ListRow {
    pub seen: u64,
    pub memories: Vec<Vec<Tok>>,
    /// Positions that no memory holds any more, though they were seen.
    pub gone: HashSet<u64>,
    pub pins: BTreeSet<u64>,
}

#[derive(Clone, Debug, Default)]
pub struct Lists {
    pub rows: Vec<ListRow>,
    pub columns: u64,
    pub step: u64,
}

/// Sinks of the first memory are its first positions, those of a later one its first residents.
pub fn num_sinks(list: &[Tok], m: usize, sinks: usize) -> usize {
    if m > 0 { sinks } else { list.iter().filter(|t| t.position < sinks as u64).count() }
}

/// How many places `pins` take from a window or from high scores.
pub fn taken(pins: &BTreeSet<u64>, sinks: usize) -> usize {
    pins.range(sinks as u64..).count()
}

/// The list that memory `m` should keep, or none when nothing is due.
pub fn due(evict: &Eviction, row: &ListRow, m: usize, step: u64, force: bool) -> Option<Vec<usize>> {
    let list = &row.memories[m];
    let n = list.len();
    let none = BTreeSet::new();
    let pins = if m == 0 { &row.pins } else { &none };
    let pinned: Vec<usize> = (0..n).filter(|&i| pins.contains(&list[i].position)).collect();
    match *evict {
        Eviction::KeepAll | Eviction::Own { .. } => None,
        Eviction::Window { sinks, window } if m == 0 => {
            let edge = row.seen.saturating_sub((window - taken(pins, sinks)) as u64);
            let stays = |t: &Tok| t.position < sinks as u64 || pins.contains(&t.position) || t.position >= edge;
            let keep: Vec<usize> = (0..n).filter(|&i| stays(&list[i])).collect();
            (keep.len() < n).then_some(keep)
        }
        Eviction::Window { sinks, window } => {
            (n > sinks + window).then(|| (0..n).filter(|&i| i < sinks || i >= n - window).collect())
        }
        Eviction::Surprisal { budget, published } => {
            let budget = Budget { sinks: num_sinks(list, m, budget.sinks), ..budget };
            if n <= budget.total || (!force && n < budget.total + BLOCK as usize) {
                return None;
            }
            let scores: Vec<f32> = list.iter().map(|t| t.score).collect();
            let pending = list.iter().rev().take_while(|t| t.step == step && t.score.is_nan()).count();
            let slots = budget.total - budget.sinks - budget.recent;
            Some(match published {
                true => naive::keep_published(&scores, budget.sinks, slots, budget.recent, 0, &pinned),
                false => naive::keep(&scores, budget, pending, &pinned),
            })
        }
    }
}

impl ListRow {
    pub fn apply(&mut self, memory: usize, keep: &[usize]) {
        let list = std::mem::take(&mut self.memories[memory]);
        for (i, token) in list.into_iter().enumerate() {
            if keep.contains(&i) {
                self.memories[memory].push(token);
            } else if memory + 1 < self.memories.len() {
                self.memories[memory + 1].push(Tok { step: 0, ..token });
            } else {
                self.gone.insert(token.position);
            }
        }
        if let Some(next) = self.memories.get_mut(memory + 1) {
            next.sort_by_key(|t| t.position);
        }
    }

    pub fn settle(&mut self, specs: &[MemorySpec], first: usize, step: u64, force: bool) {
        for (m, spec) in specs.iter().enumerate().skip(first) {
            if let Some(keep) = due(&spec.evict, self, m, step, force) {
                self.apply(m, &keep);
            }
        }
    }

    pub fn crop(&mut self, n: u64) {
        self.seen -= n;
        let seen = self.seen;
        self.memories.iter_mut().for_each(|m| m.retain(|t| t.position < seen));
        self.gone.retain(|&p| p < seen);
        self.pins.retain(|&p| p < seen);
    }

    /// What of `range` was seen and is held by none.
    pub fn missing(&self, range: &Range<u64>) -> usize {
        let held = |p: &u64| self.memories.iter().flatten().any(|t| t.position == *p);
        (range.start..range.end.min(self.seen)).filter(|p| !held(p)).count()
    }

    pub fn fits(&self, specs: &[MemorySpec], range: &Range<u64>) -> bool {
        let Some(budget) = specs[0].evict.budget() else { return true };
        let pins: BTreeSet<u64> = self.pins.iter().copied().chain(range.clone()).collect();
        let pinned = taken(&pins, budget.sinks);
        pinned == 0 || budget.sinks + pinned + budget.recent < budget.total
    }

    pub fn pin(&mut self, range: &Range<u64>) {
        self.pins.extend(range.clone());
        let (first, later) = self.memories.split_at_mut(1);
        for list in later {
            first[0].extend(list.iter().filter(|t| range.contains(&t.position)).map(|t| Tok { step: 0, ..*t }));
            list.retain(|t| !range.contains(&t.position));
        }
        first[0].sort_by_key(|t| t.position);
    }

    pub fn evict(&mut self, range: &Range<u64>) {
        self.pins.retain(|p| !range.contains(p));
        for list in &mut self.memories {
            self.gone.extend(list.iter().map(|t| t.position).filter(|p| range.contains(p)));
            list.retain(|t| !range.contains(&t.position));
        }
    }
}
