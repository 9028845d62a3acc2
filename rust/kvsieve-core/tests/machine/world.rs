//! Streams that share a store, and what happens to them.

use std::collections::HashSet;

use kvsieve_core::evict::Eviction;
use kvsieve_core::ids::{BlockId, PACKED};
use kvsieve_core::planner::{MemorySpec, Planner};

use super::super::common::{Store, Token, chains, planner, slots};
use super::lists::{ListRow, Lists, Tok, taken};
use super::ops::Op;

pub struct Stream {
    pub planner: Planner,
    pub lists: Lists,
}

pub struct World {
    pub specs: Vec<MemorySpec>,
    pub streams: Vec<Stream>,
    pub store: Store,
    pub next: Token,
    pub retained: bool,
}

impl World {
    pub fn new(chain: usize) -> Self {
        let chain = chains().swap_remove(chain);
        let specs = chain.1.clone();
        let streams = vec![Stream { planner: planner(chain), lists: Lists::default() }];
        World { specs, streams, store: Store::default(), next: 0, retained: false }
    }

    pub fn act(&mut self, at: usize, op: &Op) {
        let at = at % self.streams.len();
        self.retained = false;
        let num_rows = match self.streams[at].planner.num_rows() {
            0 => 3,
            n => n,
        };
        match op {
            Op::Append { lens, pads, store_all, scored } => {
                self.append(at, &lens[..num_rows], *pads, *store_all, *scored);
            }
            Op::Die { lens, explicit } => self.die(at, &lens[..num_rows], *explicit),
            Op::Fork if self.streams.len() < 4 => {
                let Stream { planner, lists } = &self.streams[at];
                let stream = Stream { planner: planner.fork().unwrap(), lists: lists.clone() };
                self.streams.push(stream);
            }
            Op::Leave if self.streams.len() > 1 => {
                self.streams.swap_remove(at);
            }
            Op::Fork | Op::Leave => {}
            Op::Reset => {
                self.streams[at].planner.reset();
                self.streams[at].lists = Lists::default();
            }
            _ => self.rearrange(at, op),
        }
    }

    fn live(&self) -> HashSet<(BlockId, u32)> {
        let mut out = HashSet::new();
        for Stream { planner, .. } in &self.streams {
            for (m, r) in tables(planner) {
                out.extend(slots(planner.runs(m, r).unwrap()));
            }
        }
        out
    }

    fn append(&mut self, at: usize, lens: &[usize], pads: usize, store_all: bool, scored: bool) {
        let live = self.live();
        let first = self.next;
        let token = |row: usize, new: usize| first + (row * 1000 + new) as u64;
        self.next += 3000;
        let Stream { planner, lists } = &mut self.streams[at];
        let num_queries = lens.iter().max().unwrap() + pads;
        let step = planner.begin(lens, num_queries, store_all, false).unwrap();
        assert_eq!(step.num_blocks, planner.num_blocks());
        let mut written = HashSet::new();
        for a in &step.appends {
            for slot in a.slot..a.slot + a.len {
                assert!(a.block.0 < step.num_blocks);
                assert!(written.insert((a.block, slot)), "a slot is written twice");
                assert!(!live.contains(&(a.block, slot)), "a slot in use is written");
            }
        }
        self.store.append(&step, token);
        planner.commit().unwrap();
        if lists.rows.is_empty() {
            lists.rows =
                vec![ListRow { memories: vec![Vec::new(); self.specs.len()], ..Default::default() }; lens.len()];
        }
        lists.step += 1;
        lists.columns += num_queries as u64;
        for (r, (row, &n)) in lists.rows.iter_mut().zip(lens).enumerate() {
            let end = row.seen + n as u64;
            for new in 0..n {
                let position = row.seen + new as u64;
                let stored = match self.specs[0].evict {
                    Eviction::Window { sinks, window } if !store_all && self.specs.len() == 1 => {
                        let window = (window - taken(&row.pins, sinks)) as u64;
                        position < sinks as u64 || row.pins.contains(&position) || position + window >= end
                    }
                    _ => true,
                };
                if stored {
                    let tok = Tok { id: token(r, new), position, score: f32::NAN, step: lists.step };
                    row.memories[0].push(tok);
                } else {
                    row.gone.insert(position);
                }
            }
            row.seen = end;
            if scored {
                let count = n.min(row.memories[0].len());
                let scores: Vec<f32> = (0..count).map(|i| ((i * 31 + n * 7 + r) % 17) as f32).collect();
                planner.set_scores(r, &scores).unwrap();
                let from = row.memories[0].len() - count;
                row.memories[0][from..].iter_mut().zip(scores).for_each(|(t, s)| t.score = s);
            }
        }
    }

    fn die(&mut self, at: usize, lens: &[usize], explicit: bool) {
        let before = self.streams[at].planner.used_blocks();
        let planner = &mut self.streams[at].planner;
        let num_queries = *lens.iter().max().unwrap();
        let step = planner.begin(lens, num_queries, true, false).unwrap();
        self.store.append(&step, |_, _| Token::MAX);
        assert!(planner.settle(true).is_err() && planner.fork().is_err() && planner.crop(0).is_err());
        if !explicit {
            planner.begin(lens, num_queries, true, false).unwrap();
        }
        planner.rollback().unwrap();
        assert!(planner.rollback().is_err() && planner.commit().is_err());
        assert_eq!(planner.used_blocks(), before);
    }
}

pub fn exists(planner: &Planner, block: BlockId) -> bool {
    match block.is_packed() {
        true => block.0 - PACKED < planner.num_packed_blocks(),
        false => block.0 < planner.num_blocks(),
    }
}

pub fn tables(planner: &Planner) -> impl Iterator<Item = (usize, usize)> + '_ {
    (0..planner.num_rows()).flat_map(|r| (0..planner.num_memories()).map(move |m| (m, r)))
}
