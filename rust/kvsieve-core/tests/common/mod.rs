//! Shared by the control-plane tests: chains to try, and a fake store that only knows which token sits where.
#![allow(dead_code)]

pub mod data;

use kvsieve_core::budget::Budget;
use kvsieve_core::evict::Eviction;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::plan::{Frame, Move, Step};
use kvsieve_core::planner::{MemorySpec, Planner};
use kvsieve_core::position::PositionRule;
use proptest::test_runner::{Config, FileFailurePersistence};
use std::collections::HashMap;

/// So many random cases; those that failed once lie beside the file of the test.
pub fn cases(count: u32) -> Config {
    let kept = FileFailurePersistence::WithSource("proptest-regressions");
    Config { failure_persistence: Some(Box::new(kept)), ..Config::with_cases(count) }
}

pub type Token = u64;

#[derive(Default)]
pub struct Store {
    slots: HashMap<(BlockId, u32), Token>,
}

impl Store {
    pub fn run(&mut self, moves: &[Move]) {
        for m in moves {
            let read: Vec<_> = (0..m.len).map(|i| self.slots[&(m.from, m.from_slot + i)]).collect();
            for (i, token) in (0..).zip(read) {
                self.slots.insert((m.to, m.to_slot + i), token);
            }
        }
    }

    /// Runs the writes of a step; `token(row, new)` names the tokens.
    pub fn append(&mut self, step: &Step, token: impl Fn(usize, usize) -> Token) {
        self.run(&step.copies);
        for a in &step.appends {
            for i in 0..a.len {
                self.slots.insert((a.block, a.slot + i), token(a.row, a.new + i as usize));
            }
        }
    }

    pub fn read(&self, runs: &[Run]) -> Vec<Token> {
        slots(runs).map(|at| self.slots[&at]).collect()
    }
}

pub fn slots(runs: &[Run]) -> impl Iterator<Item = (BlockId, u32)> + '_ {
    runs.iter().flat_map(|r| (r.lo..r.hi).map(|s| (r.block, s)))
}

pub fn memory(evict: Eviction, position: PositionRule) -> MemorySpec {
    MemorySpec { evict, position, visible: None, top_k: 0 }
}

pub fn window(sinks: usize, window: usize) -> Eviction {
    Eviction::Window { sinks, window }
}

pub fn surprisal(total: usize, sinks: usize, recent: usize, published: bool) -> Eviction {
    Eviction::Surprisal { budget: Budget { total, sinks, recent }, published }
}

pub fn manual(total: usize, sinks: usize, recent: usize) -> Eviction {
    Eviction::Own { budget: Budget { total, sinks, recent } }
}

/// Chains that between them use every rule.
pub fn chains() -> Vec<(Frame, Vec<MemorySpec>)> {
    let slots = PositionRule::InCache;
    let far = PositionRule::Fixed { distance: 40 };
    let seen = |m: MemorySpec, near| MemorySpec { visible: Some(near), ..m };
    let picked = |m: MemorySpec| MemorySpec { top_k: 4, ..m };
    vec![
        (Frame::Rotated, vec![memory(Eviction::KeepAll, PositionRule::Original)]),
        (Frame::Rotated, vec![seen(memory(window(2, 3), slots), 4)]),
        (Frame::Rotated, vec![seen(memory(window(4, 70), slots), 71)]),
        (Frame::Raw, vec![seen(memory(window(4, 90), PositionRule::Capped { distance: 90 }), 90)]),
        (Frame::Raw, vec![memory(surprisal(70, 3, 10, false), slots)]),
        (
            Frame::Raw,
            vec![memory(surprisal(20, 2, 0, false), PositionRule::Original), memory(surprisal(90, 0, 4, false), slots)],
        ),
        (
            Frame::Raw,
            vec![
                memory(surprisal(33, 3, 5, true), slots),
                memory(surprisal(40, 1, 1, false), far),
                memory(window(1, 20), slots),
            ],
        ),
        (
            Frame::Raw,
            vec![seen(memory(window(3, 30), PositionRule::Original), 31), picked(memory(Eviction::KeepAll, far))],
        ),
        (Frame::Raw, vec![memory(manual(80, 2, 3), slots), memory(surprisal(50, 2, 2, false), slots)]),
        (Frame::Rotated, vec![seen(memory(window(2, 9), slots), 30), memory(window(0, 80), slots)]),
        (
            Frame::Raw,
            vec![seen(memory(surprisal(30, 3, 8, false), slots), 12), seen(memory(Eviction::KeepAll, slots), 60)],
        ),
        (Frame::Rotated, vec![memory(manual(40, 2, 3), PositionRule::Original), memory(Eviction::KeepAll, slots)]),
    ]
}

pub fn planner((frame, memories): (Frame, Vec<MemorySpec>)) -> Planner {
    Planner::new(memories, frame).expect("the chain is valid")
}
