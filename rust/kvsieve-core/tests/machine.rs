//! Random histories against plain lists, with a fake store on which every append and move is carried out.

use super::common::{Store, Token, cases, chains, planner, slots};
use kvsieve_core::Error;
use kvsieve_core::budget::Budget;
use kvsieve_core::ids::{BLOCK, BlockId, PACKED};
use kvsieve_core::planner::{MemorySpec, Planner};
use kvsieve_core::retain::{Retain, naive};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

#[derive(Clone, Copy, Debug)]
struct Tok {
    id: Token,
    position: u64,
    score: f32,
    step: u64,
}

#[derive(Clone, Debug, Default)]
struct ListRow {
    seen: u64,
    memories: Vec<Vec<Tok>>,
    /// Positions that no memory holds any more, though they were seen.
    gone: HashSet<u64>,
    pins: BTreeSet<u64>,
}

#[derive(Clone, Debug, Default)]
struct Lists {
    rows: Vec<ListRow>,
    columns: u64,
    step: u64,
}

struct Stream {
    planner: Planner,
    lists: Lists,
}

struct World {
    specs: Vec<MemorySpec>,
    streams: Vec<Stream>,
    store: Store,
    next: Token,
    retained: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Append {
        lens: [usize; 3],
        pads: usize,
        store_all: bool,
        scored: bool,
    },
    Die {
        lens: [usize; 3],
        explicit: bool,
    },
    Settle {
        force: bool,
    },
    Tidy,
    Pack {
        row: usize,
        share: u64,
        align: u32,
    },
    Keep {
        memory: usize,
        row: usize,
        mask: u64,
    },
    Crop {
        n: u64,
    },
    CropRows {
        n: [u64; 3],
    },
    Select {
        index: Vec<usize>,
    },
    Decay {
        factor: f32,
    },
    /// The ends count from the tokens that the row has seen.
    Pin {
        row: usize,
        back: u64,
        len: u64,
    },
    Unpin {
        row: usize,
        back: u64,
        len: u64,
    },
    Evict {
        row: usize,
        back: u64,
        len: u64,
    },
    Fork,
    Leave,
    Reset,
}

fn op() -> impl Strategy<Value = (usize, Op)> {
    let lens = || prop_oneof![3 => prop::array::uniform3(0usize..4), 2 => prop::array::uniform3(0usize..130)];
    let op = prop_oneof![
        12 => (lens(), 0usize..3, any::<bool>(), any::<bool>())
            .prop_map(|(lens, pads, store_all, scored)| Op::Append { lens, pads, store_all, scored }),
        2 => (lens(), any::<bool>()).prop_map(|(lens, explicit)| Op::Die { lens, explicit }),
        6 => any::<bool>().prop_map(|force| Op::Settle { force }),
        3 => Just(Op::Tidy),
        4 => (0usize..3, 0u64..5, prop_oneof![Just(1u32), Just(32)])
            .prop_map(|(row, share, align)| Op::Pack { row, share, align }),
        3 => (0usize..3, 0usize..3, any::<u64>()).prop_map(|(memory, row, mask)| Op::Keep { memory, row, mask }),
        2 => (0u64..70).prop_map(|n| Op::Crop { n }),
        1 => prop::array::uniform3(0u64..70).prop_map(|n| Op::CropRows { n }),
        3 => prop::collection::vec(0usize..3, 1..4).prop_map(|index| Op::Select { index }),
        1 => (0.25f32..1.0).prop_map(|factor| Op::Decay { factor }),
        4 => (0usize..3, 0u64..40, 1u64..14).prop_map(|(row, back, len)| Op::Pin { row, back, len }),
        2 => (0usize..3, 0u64..200, 1u64..6).prop_map(|(row, back, len)| Op::Pin { row, back, len }),
        1 => (0usize..3, 0u64..90, 1u64..40).prop_map(|(row, back, len)| Op::Unpin { row, back, len }),
        4 => (0usize..3, 0u64..150, 1u64..60).prop_map(|(row, back, len)| Op::Evict { row, back, len }),
        2 => Just(Op::Fork),
        1 => Just(Op::Leave),
        1 => Just(Op::Reset),
    ];
    (0usize..4, op)
}

fn same(a: &[f32], b: impl Iterator<Item = f32>) -> bool {
    a.iter().map(|s| s.to_bits()).eq(b.map(f32::to_bits))
}

/// Sinks of the first memory are its first positions, those of a later one its first residents.
fn num_sinks(list: &[Tok], m: usize, sinks: usize) -> usize {
    if m > 0 { sinks } else { list.iter().filter(|t| t.position < sinks as u64).count() }
}

/// How many places `pins` take from a window or from high scores.
fn taken(pins: &BTreeSet<u64>, sinks: usize) -> usize {
    pins.range(sinks as u64..).count()
}

/// The list that memory `m` should keep, or none when nothing is due.
fn due(retain: &Retain, row: &ListRow, m: usize, step: u64, force: bool) -> Option<Vec<usize>> {
    let list = &row.memories[m];
    let n = list.len();
    let none = BTreeSet::new();
    let pins = if m == 0 { &row.pins } else { &none };
    let pinned: Vec<usize> = (0..n).filter(|&i| pins.contains(&list[i].position)).collect();
    match *retain {
        Retain::All | Retain::Manual { .. } => None,
        Retain::Window { sinks, window } if m == 0 => {
            let edge = row.seen.saturating_sub((window - taken(pins, sinks)) as u64);
            let stays = |t: &Tok| t.position < sinks as u64 || pins.contains(&t.position) || t.position >= edge;
            let keep: Vec<usize> = (0..n).filter(|&i| stays(&list[i])).collect();
            (keep.len() < n).then_some(keep)
        }
        Retain::Window { sinks, window } => {
            (n > sinks + window).then(|| (0..n).filter(|&i| i < sinks || i >= n - window).collect())
        }
        Retain::Surprisal { budget, published } => {
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
    fn apply(&mut self, memory: usize, keep: &[usize]) {
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

    fn settle(&mut self, specs: &[MemorySpec], first: usize, step: u64, force: bool) {
        for (m, spec) in specs.iter().enumerate().skip(first) {
            if let Some(keep) = due(&spec.retain, self, m, step, force) {
                self.apply(m, &keep);
            }
        }
    }

    fn crop(&mut self, n: u64) {
        self.seen -= n;
        let seen = self.seen;
        self.memories.iter_mut().for_each(|m| m.retain(|t| t.position < seen));
        self.gone.retain(|&p| p < seen);
        self.pins.retain(|&p| p < seen);
    }

    /// What of `range` was seen and is held by none.
    fn missing(&self, range: &Range<u64>) -> usize {
        let held = |p: &u64| self.memories.iter().flatten().any(|t| t.position == *p);
        (range.start..range.end.min(self.seen)).filter(|p| !held(p)).count()
    }

    fn fits(&self, specs: &[MemorySpec], range: &Range<u64>) -> bool {
        let Some(budget) = specs[0].retain.budget() else { return true };
        let pins: BTreeSet<u64> = self.pins.iter().copied().chain(range.clone()).collect();
        let pinned = taken(&pins, budget.sinks);
        pinned == 0 || budget.sinks + pinned + budget.recent < budget.total
    }

    fn pin(&mut self, range: &Range<u64>) {
        self.pins.extend(range.clone());
        let (first, later) = self.memories.split_at_mut(1);
        for list in later {
            first[0].extend(list.iter().filter(|t| range.contains(&t.position)).map(|t| Tok { step: 0, ..*t }));
            list.retain(|t| !range.contains(&t.position));
        }
        first[0].sort_by_key(|t| t.position);
    }

    fn evict(&mut self, range: &Range<u64>) {
        self.pins.retain(|p| !range.contains(p));
        for list in &mut self.memories {
            self.gone.extend(list.iter().map(|t| t.position).filter(|p| range.contains(p)));
            list.retain(|t| !range.contains(&t.position));
        }
    }
}

impl World {
    fn new(chain: usize) -> Self {
        let chain = chains().swap_remove(chain);
        let specs = chain.1.clone();
        let streams = vec![Stream { planner: planner(chain), lists: Lists::default() }];
        World { specs, streams, store: Store::default(), next: 0, retained: false }
    }

    fn act(&mut self, at: usize, op: &Op) {
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
                let stored = match self.specs[0].retain {
                    Retain::Window { sinks, window } if !store_all && self.specs.len() == 1 => {
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

    fn rearrange(&mut self, at: usize, op: &Op) {
        let Stream { planner, lists } = &mut self.streams[at];
        let rows = lists.rows.len();
        match op {
            Op::Settle { force } => {
                let moves = planner.settle(*force).unwrap();
                assert!(moves.iter().all(|m| exists(planner, m.to)));
                self.store.run(&moves);
                for row in &mut lists.rows {
                    row.settle(&self.specs, 0, lists.step, *force);
                }
                self.retained = *force;
            }
            Op::Tidy => {
                // What a block was left with when its first tokens were packed goes to the beginning of one, wherever that is.
                let starts = |m: &kvsieve_core::plan::Move| m.to_slot == 0 && m.from_slot > 0 && !m.to.is_packed();
                let moves = planner.tidy().unwrap();
                assert!(moves.iter().all(|m| m.to.0 < m.from.0 && exists(planner, m.from) || starts(m)));
                assert!(moves.iter().all(|m| m.to.is_packed() == m.from.is_packed()));
                self.store.run(&moves);
                let again = planner.tidy().unwrap();
                assert!(again.is_empty() || moves.iter().any(starts), "a second time only what has just been moved");
                assert!(again.iter().all(|m| m.to.0 < m.from.0));
                self.store.run(&again);
                assert!(planner.tidy().unwrap().is_empty(), "a third time nothing");
            }
            Op::Pack { row, share, align } if *row < rows => {
                let n = lists.rows[*row].memories[0].len();
                let (before, upto) = (planner.num_packed(*row).unwrap(), n * *share as usize / 4);
                let done = planner.pack(*row, upto, *align, 0);
                assert_eq!(done.is_ok(), self.specs.len() == 1 && upto <= n);
                let Ok(moves) = done else { return };
                assert!(moves.iter().all(|m| m.to.is_packed() && !m.from.is_packed() && exists(planner, m.to)));
                let moved: u32 = moves.iter().map(|m| m.len).sum();
                assert_eq!(moved as usize, upto.saturating_sub(before));
                self.store.run(&moves);
                assert_eq!(planner.num_packed(*row).unwrap(), before.max(upto));
            }
            Op::Keep { memory, row, mask } if *memory < self.specs.len() && *row < rows => {
                let n = lists.rows[*row].memories[*memory].len();
                let list = &lists.rows[*row].memories[*memory];
                let pins = if *memory == 0 { lists.rows[*row].pins.clone() } else { BTreeSet::new() };
                let pinned = |i: &usize| pins.contains(&list[*i].position);
                let mut keep: Vec<usize> = (0..n).filter(|&i| mask >> (i * i % 61) & 1 == 1).collect();
                if (0..n).any(|i| pinned(&i) && !keep.contains(&i)) {
                    let refused = planner.keep(*memory, *row, &keep);
                    assert!(matches!(refused, Err(Error::OutOfRange { what: "keep", .. })), "{refused:?}");
                    keep = (0..n).filter(|i| pinned(i) || keep.contains(i)).collect();
                }
                if let Retain::Manual { budget } = self.specs[*memory].retain {
                    let sinks = num_sinks(list, *memory, budget.sinks);
                    let edge = |i: &usize| *i < sinks || *i + budget.recent >= n || pinned(i);
                    let room = budget.total - (0..n).filter(edge).count();
                    let middle: Vec<usize> = keep.into_iter().filter(|i| !edge(i)).take(room).collect();
                    keep = (0..n).filter(|i| edge(i) || middle.contains(i)).collect();
                }
                let moves = planner.keep(*memory, *row, &keep).unwrap();
                assert!(moves.iter().all(|m| exists(planner, m.to) && m.to.is_packed() == m.from.is_packed()));
                self.store.run(&moves);
                lists.rows[*row].apply(*memory, &keep);
                lists.rows[*row].settle(&self.specs, memory + 1, lists.step, false);
            }
            Op::Crop { n } => {
                let fits = lists.rows.iter().all(|r| r.seen >= *n) && (rows > 0 || *n == 0);
                assert_eq!(planner.crop(*n).is_ok(), fits);
                if fits {
                    lists.columns -= n;
                    lists.rows.iter_mut().for_each(|r| r.crop(*n));
                }
            }
            Op::CropRows { n } => {
                let fits = lists.rows.iter().zip(n).all(|(r, n)| r.seen >= *n);
                assert_eq!(planner.crop_rows(&n[..rows]).is_ok(), fits);
                if fits {
                    lists.rows.iter_mut().zip(n).for_each(|(r, n)| r.crop(*n));
                }
            }
            Op::Select { index } => {
                let fits = index.iter().all(|&i| i < rows);
                assert_eq!(planner.select_rows(index).is_ok(), fits);
                if fits {
                    lists.rows = index.iter().map(|&i| lists.rows[i].clone()).collect();
                }
            }
            Op::Decay { factor } => {
                planner.decay(&vec![*factor; self.specs.len()]).unwrap();
                let all = lists.rows.iter_mut().flat_map(|r| &mut r.memories).flatten();
                all.for_each(|t| t.score *= factor);
            }
            Op::Pin { row, back, len } if *row < rows => {
                let range = span(lists.rows[*row].seen, *back, *len);
                let list = &mut lists.rows[*row];
                let (fits, missing) = (list.fits(&self.specs, &range), list.missing(&range));
                match planner.pin(Some(&[*row]), &range, false) {
                    Ok(moves) => {
                        assert!(fits && missing == 0);
                        self.store.run(&moves);
                        list.pin(&range);
                    }
                    Err(Error::PinsTooMany { .. }) => assert!(!fits),
                    Err(Error::PinsGone { what, .. }) => {
                        assert!(missing > 0 && what.starts_with(&format!("{missing} (")), "{what}");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            Op::Unpin { row, back, len } if *row < rows => {
                let range = span(lists.rows[*row].seen, *back, *len);
                planner.unpin(Some(&[*row]), &range).unwrap();
                lists.rows[*row].pins.retain(|p| !range.contains(p));
            }
            Op::Evict { row, back, len } if *row < rows => {
                let range = span(lists.rows[*row].seen, *back, *len);
                let moves = planner.evict(Some(&[*row]), &range).unwrap();
                assert!(moves.iter().all(|m| exists(planner, m.to) && m.to.is_packed() == m.from.is_packed()));
                self.store.run(&moves);
                lists.rows[*row].evict(&range);
                assert!(planner.evict(Some(&[*row]), &range).unwrap().is_empty(), "evicting twice does nothing");
            }
            _ => {}
        }
    }

    /// Whatever happened since: what is pinned and was seen is held by the first memory.
    fn check_pins(&self) {
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
    fn check_lists(&self) {
        for Stream { planner, lists } in &self.streams {
            assert_eq!(planner.num_rows(), lists.rows.len());
            assert_eq!(planner.columns(), lists.columns);
            for (m, r) in tables(planner) {
                let list = &lists.rows[r].memories[m];
                assert_eq!(planner.seen(r).unwrap(), lists.rows[r].seen);
                let ids: Vec<_> = list.iter().map(|t| t.id).collect();
                assert_eq!(self.store.read(planner.runs(m, r).unwrap()), ids, "memory {m} of row {r}");
                assert!(planner.positions(m, r).unwrap().iter().copied().eq(list.iter().map(|t| t.position)));
                assert!(same(planner.scores(m, r).unwrap(), list.iter().map(|t| t.score)));
            }
        }
    }

    fn check_blocks(&self) {
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
    fn check_packed(&self) {
        for Stream { planner, .. } in &self.streams {
            for (m, r) in tables(planner) {
                let runs = planner.runs(m, r).unwrap();
                let packed = runs.iter().take_while(|run| run.block.is_packed()).count();
                assert!(runs[packed..].iter().all(|run| !run.block.is_packed()));
            }
        }
    }

    fn check_positions(&self) {
        for Stream { planner, .. } in &self.streams {
            for (m, r) in tables(planner) {
                let positions = planner.positions(m, r).unwrap();
                assert!(positions.windows(2).all(|w| w[0] < w[1]));
                assert!(positions.last().is_none_or(|&p| p < planner.seen(r).unwrap()));
            }
        }
    }

    fn check_evicted(&self) {
        for Stream { planner, lists } in &self.streams {
            for (m, r) in tables(planner) {
                let gone = &lists.rows[r].gone;
                assert!(planner.positions(m, r).unwrap().iter().all(|p| !gone.contains(p)));
            }
        }
    }

    /// After a forced settle of some stream; `retained` is set by that alone.
    fn check_budgets(&self, at: usize) {
        if !self.retained {
            return;
        }
        let planner = &self.streams[at % self.streams.len()].planner;
        for (m, r) in tables(planner) {
            let n = planner.resident(m, r).unwrap();
            match self.specs[m].retain {
                Retain::Window { sinks, window } => assert!(n <= sinks + window),
                Retain::Surprisal { budget, .. } => {
                    assert!(n <= budget.total);
                    let runs = planner.runs(m, r).unwrap().len();
                    assert!(runs <= n.div_ceil(BLOCK as usize) + 12, "{runs} runs for {n} tokens");
                }
                Retain::All | Retain::Manual { .. } => {}
            }
        }
    }
}

/// `len` positions from `back` before `seen` on; less than `back` ahead of it where that many were not seen.
fn span(seen: u64, back: u64, len: u64) -> Range<u64> {
    let start = back.abs_diff(seen);
    start..start + len
}

fn exists(planner: &Planner, block: BlockId) -> bool {
    match block.is_packed() {
        true => block.0 - PACKED < planner.num_packed_blocks(),
        false => block.0 < planner.num_blocks(),
    }
}

fn tables(planner: &Planner) -> impl Iterator<Item = (usize, usize)> + '_ {
    (0..planner.num_rows()).flat_map(|r| (0..planner.num_memories()).map(move |m| (m, r)))
}

fn play(chain: usize, ops: &[(usize, Op)], check: impl Fn(&World, usize)) {
    let mut world = World::new(chain);
    for (at, op) in ops {
        world.act(*at, op);
        check(&world, *at);
    }
    while world.streams.len() > 1 {
        world.streams.pop();
    }
    let mut last = world.streams.swap_remove(0).planner;
    last.reset();
    assert_eq!((last.used_blocks(), last.num_blocks()), (0, 0), "blocks leak");
}

fn history() -> impl Strategy<Value = (usize, Vec<(usize, Op)>)> {
    (0usize..12, prop::collection::vec(op(), 1..60))
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn tables_read_as_lists((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_lists());
    }

    #[test]
    fn block_is_free_or_owned((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_blocks());
    }

    #[test]
    fn packed_residents_come_first((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_packed());
    }

    #[test]
    fn positions_strictly_increase((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_positions());
    }

    #[test]
    fn evicted_never_returns((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_evicted());
    }

    #[test]
    fn budget_holds_after_retain((chain, ops) in history()) {
        play(chain, &ops, World::check_budgets);
    }

    #[test]
    fn pinned_tokens_stay((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_pins());
    }

    // Every append checks its slots against all slots in use; reading back shows that nothing else wrote to them.
    #[test]
    fn slot_is_written_once((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_lists());
    }
}
