//! What holds whatever has happened.

use std::collections::{HashMap, HashSet};

use kvsieve_core::evict::Eviction;
use kvsieve_core::ids::{BLOCK, BlockId, PACKED};

use super::world::{Stream, World, tables};

pub fn same(a: &[f32], b: impl Iterator<Item = f32>) -> bool {
    a.iter().map(|s| s.to_bits()).eq(b.map(f32::to_bits))
}

impl World {
    /// Whatever happened since: what is pinned and was seen is held by the first memory.
    pub fn check_pins(&self) {
        for Stream { planner, lists } in &self.streams {
            for (r, row) in lists.rows.iter().enumerate() {
                let pins: Vec<u64> = planner.pins(r).unwrap().ranges().iter().cloned().flatten().collect();
                assert!(pins.iter().eq(&row.pins));
                let held = planner.positions(0, r).unwrap();
                assert!(pins.iter().filter(|&&p| p < row.seen).all(|p| held.contains(p)));
            }
        }
    }

    /// Reading every table through the fake store gives the listed tokens.
    pub fn check_lists(&self) {
        for Stream { planner, lists } in &self.streams {
            assert_eq!(planner.num_rows(), lists.rows.len());
            assert_eq!(planner.columns(), lists.columns);
            for (m, r) in tables(planner) {
                let list = &lists.rows[r].memories[m];
                assert_eq!(planner.seen(r).unwrap(), lists.rows[r].seen);
                let ids: Vec<_> = list.iter().map(|t| t.id).collect();
                assert_eq!(self.store.read(planner.runs(m, r).unwrap()), ids, "memory {m} of row {r}");
                assert!(planner.positions(m, r).unwrap().iter().copied().eq(list.iter().map(|t| t.position)));
                assert!(same(&planner.scores(m, r).unwrap(), list.iter().map(|t| t.score)));
            }
        }
    }

    pub fn check_blocks(&self) {
        let mut owners: HashMap<BlockId, u32> = HashMap::new();
        for Stream { planner, .. } in &self.streams {
            for (m, r) in tables(planner) {
                let runs = planner.runs(m, r).unwrap();
                assert!(runs.iter().all(|run| run.lo < run.hi && run.hi <= BLOCK));
                let blocks: HashSet<BlockId> = runs.iter().map(|run| run.block).collect();
                blocks.into_iter().for_each(|b| *owners.entry(b).or_default() += 1);
            }
        }
        let planner = &self.streams[0].planner;
        let free = planner.free_blocks();
        let distinct: HashSet<_> = free.iter().copied().collect();
        assert_eq!(distinct.len(), free.len());
        assert_eq!(planner.used_blocks(), owners.len());
        let packed = (PACKED..).zip(planner.packed_in_use());
        for (id, used) in (0..).zip(planner.blocks_in_use()).chain(packed) {
            let refs = owners.get(&BlockId(id)).copied().unwrap_or(0);
            assert_eq!(planner.block_refs(BlockId(id)), refs);
            assert_eq!((used, distinct.contains(&BlockId(id))), (refs > 0, refs == 0));
        }
    }

    /// Packed residents come first, so that what is appended never has to be packed on its way in.
    pub fn check_packed(&self) {
        for Stream { planner, .. } in &self.streams {
            for (m, r) in tables(planner) {
                let runs = planner.runs(m, r).unwrap();
                let packed = runs.iter().take_while(|run| run.block.is_packed()).count();
                assert!(runs[packed..].iter().all(|run| !run.block.is_packed()));
            }
        }
    }

    pub fn check_positions(&self) {
        for Stream { planner, .. } in &self.streams {
            for (m, r) in tables(planner) {
                let positions = planner.positions(m, r).unwrap();
                assert!(positions.windows(2).all(|w| w[0] < w[1]));
                assert!(positions.last().is_none_or(|&p| p < planner.seen(r).unwrap()));
            }
        }
    }

    pub fn check_evicted(&self) {
        for Stream { planner, lists } in &self.streams {
            for (m, r) in tables(planner) {
                let gone = &lists.rows[r].gone;
                assert!(planner.positions(m, r).unwrap().iter().all(|p| !gone.contains(p)));
            }
        }
    }

    /// After a forced settle of some stream; `retained` is set by that alone.
    pub fn check_budgets(&self, at: usize) {
        if !self.retained {
            return;
        }
        let planner = &self.streams[at % self.streams.len()].planner;
        for (m, r) in tables(planner) {
            let n = planner.resident(m, r).unwrap();
            match self.specs[m].evict {
                Eviction::Window { sinks, window } => assert!(n <= sinks + window),
                Eviction::Surprisal { budget, .. } => {
                    assert!(n <= budget.total);
                    let runs = planner.runs(m, r).unwrap().len();
                    assert!(runs <= n.div_ceil(BLOCK as usize) + 12, "{runs} runs for {n} tokens");
                }
                Eviction::KeepAll | Eviction::Own { .. } => {}
            }
        }
    }
}
