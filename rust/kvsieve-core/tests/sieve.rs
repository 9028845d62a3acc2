//! Residents chosen per head: random histories of streams and forks, head by head against plain lists.

use super::common::{cases, manual, memory, slots, window};
use kvsieve_core::error::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::plan::{Frame, Move, Step};
use kvsieve_core::planner::Planner;
use kvsieve_core::position::PositionRule;
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::{Dtype, Elems, View};
use proptest::prelude::*;
use std::collections::HashMap;

const HEADS: usize = 3;
const BUDGET: usize = 90;
type Token = u64;

fn sieving(total: usize) -> Planner {
    Planner::new(vec![memory(manual(total, 0, 0), PositionRule::Original)], Frame::Rotated).unwrap()
}

/// Which token each head has in each slot.
#[derive(Default)]
struct Heads {
    slots: HashMap<(usize, BlockId, u32), Token>,
}

impl Heads {
    fn run(&mut self, moves: &[Move]) {
        for m in moves {
            for head in 0..HEADS {
                let read: Vec<_> = (0..m.len).map(|i| self.slots[&(head, m.from, m.from_slot + i)]).collect();
                self.slots.extend((0..).zip(read).map(|(i, t)| ((head, m.to, m.to_slot + i), t)));
            }
        }
    }

    fn append(&mut self, step: &Step, first: Token) {
        self.run(&step.copies);
        for a in &step.appends {
            for (i, head) in (0..a.len).flat_map(|i| (0..HEADS).map(move |head| (i, head))) {
                let token = first + (a.row * 1000 + a.new) as u64 + u64::from(i);
                self.slots.insert((head, a.block, a.slot + i), token);
            }
        }
    }

    fn read(&self, head: usize, runs: &[Run]) -> Vec<Token> {
        slots(runs).map(|(block, slot)| self.slots[&(head, block, slot)]).collect()
    }

    fn permute(&mut self, from: &[Run], keep: &[Vec<usize>], to: &[Run]) {
        for (head, keep) in keep.iter().enumerate() {
            let old = self.read(head, from);
            assert_eq!(slots(to).count(), keep.len());
            for ((block, slot), &i) in slots(to).zip(keep) {
                self.slots.insert((head, block, slot), old[i]);
            }
        }
    }
}

struct Stream {
    planner: Planner,
    /// Of each row and head.
    lists: Vec<Vec<Vec<Token>>>,
}

#[derive(Clone, Debug)]
enum Op {
    Append([usize; 3]),
    Die([usize; 3]),
    Sieve { row: usize, count: usize, recent: usize, seed: u64 },
    CropRecent(usize),
    Select(Vec<usize>),
    Tidy,
    Fork,
    Leave,
}

fn op() -> impl Strategy<Value = (usize, Op)> {
    let lens = || prop_oneof![prop::array::uniform3(0usize..4), prop::array::uniform3(0usize..130)];
    let op = prop_oneof![
        6 => lens().prop_map(Op::Append),
        1 => lens().prop_map(Op::Die),
        6 => (0usize..3, 0usize..=BUDGET, 0usize..=BUDGET, any::<u64>())
            .prop_map(|(row, count, recent, seed)| Op::Sieve { row, count, recent: recent.min(BUDGET - count), seed }),
        1 => (0usize..20).prop_map(Op::CropRecent),
        2 => prop::collection::vec(0usize..3, 1..4).prop_map(Op::Select),
        2 => Just(Op::Tidy),
        2 => Just(Op::Fork),
        1 => Just(Op::Leave),
    ];
    (0usize..3, op)
}

/// `count` ascending numbers below `n`, others for each head.
fn choose(n: usize, count: usize, mut seed: u64) -> Vec<Vec<usize>> {
    let mut next = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        seed >> 33
    };
    let one = |_| {
        let mut order: Vec<(u64, usize)> = (0..n).map(|i| (next(), i)).collect();
        order.sort_unstable();
        let mut keep: Vec<usize> = order[..count].iter().map(|&(_, i)| i).collect();
        keep.sort_unstable();
        keep
    };
    (0..HEADS).map(one).collect()
}

#[derive(Default)]
struct World {
    streams: Vec<Stream>,
    store: Heads,
    next: Token,
}

impl World {
    fn act(&mut self, at: usize, op: &Op) {
        let num_streams = self.streams.len();
        let at = at % num_streams;
        let Stream { planner, lists } = &mut self.streams[at];
        match op {
            Op::Append(lens) => {
                let lens = &lens[..if lists.is_empty() { 3 } else { lists.len() }];
                let step = planner.begin(lens, *lens.iter().max().unwrap(), true, false).unwrap();
                self.store.append(&step, self.next);
                planner.commit().unwrap();
                lists.resize(lens.len(), vec![Vec::new(); HEADS]);
                for (row, &n) in lens.iter().enumerate() {
                    let new = (0..n).map(|i| self.next + (row * 1000 + i) as u64);
                    lists[row].iter_mut().for_each(|head| head.extend(new.clone()));
                }
                self.next += 3000;
            }
            Op::Die(lens) => {
                let lens = &lens[..if lists.is_empty() { 3 } else { lists.len() }];
                let step = planner.begin(lens, *lens.iter().max().unwrap(), true, false).unwrap();
                self.store.append(&step, Token::MAX / 2);
                assert!(planner.sieve(0, 0, 0, 0).is_err(), "a step is open");
                planner.rollback().unwrap();
            }
            Op::Sieve { row, count, recent, seed } if *row < lists.len() => {
                let (n, list) = (lists[*row][0].len(), &mut lists[*row]);
                let recent = (*recent).min(n);
                let count = (*count).min(n - recent);
                let keep = choose(n - recent, count, *seed);
                let sieve = planner.sieve(0, *row, count, recent).unwrap();
                assert!(slots(&sieve.to).all(|(block, _)| block.0 < planner.num_blocks()));
                assert_eq!(slots(&sieve.from).count(), n - recent);
                self.store.permute(&sieve.from, &keep, &sieve.to);
                for (head, keep) in list.iter_mut().zip(&keep) {
                    *head = keep.iter().map(|&i| head[i]).chain(head[n - recent..].iter().copied()).collect();
                }
            }
            Op::CropRecent(n) if !lists.is_empty() => {
                // As many as every row holds at its true positions.
                let own = |row: usize| {
                    let (seen, positions) = (planner.seen(row).unwrap(), planner.positions(0, row).unwrap());
                    (0..).zip(positions.iter().rev()).take_while(|&(i, &p)| p + i + 1 == seen).count()
                };
                let n = (0..lists.len()).map(own).min().unwrap().min(*n);
                planner.crop(n as u64).unwrap();
                lists.iter_mut().flatten().for_each(|head| head.truncate(head.len() - n));
            }
            Op::Select(index) if index.iter().all(|&i| i < lists.len()) => {
                planner.select_rows(index).unwrap();
                *lists = index.iter().map(|&i| lists[i].clone()).collect();
            }
            Op::Tidy => self.store.run(&planner.tidy().unwrap()),
            Op::Fork if num_streams < 3 => {
                let stream = Stream { planner: planner.fork().unwrap(), lists: lists.clone() };
                self.streams.push(stream);
            }
            Op::Leave if num_streams > 1 => drop(self.streams.swap_remove(at)),
            _ => {}
        }
    }

    fn check(&self) {
        let mut owners: HashMap<BlockId, u32> = HashMap::new();
        for Stream { planner, lists } in &self.streams {
            for (row, heads) in lists.iter().enumerate() {
                let runs = planner.runs(0, row).unwrap();
                for (head, list) in heads.iter().enumerate() {
                    assert_eq!(&self.store.read(head, runs), list, "head {head} of row {row}");
                }
                let positions = planner.positions(0, row).unwrap();
                assert!(positions.windows(2).all(|w| w[0] < w[1]));
                assert!(positions.last().is_none_or(|&p| p < planner.seen(row).unwrap()));
                let mut blocks: Vec<BlockId> = runs.iter().map(|run| run.block).collect();
                blocks.dedup();
                blocks.into_iter().for_each(|b| *owners.entry(b).or_default() += 1);
            }
        }
        let planner = &self.streams[0].planner;
        assert_eq!(planner.used_blocks(), owners.len());
        owners.into_iter().for_each(|(block, refs)| assert_eq!(planner.block_refs(block), refs));
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn each_head_reads_its_own_list(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World { streams: vec![Stream { planner: sieving(BUDGET), lists: Vec::new() }], ..World::default() };
        for (at, op) in &ops {
            world.act(*at, op);
            world.check();
        }
        world.streams.truncate(1);
        world.streams[0].planner.reset();
        prop_assert_eq!(world.streams[0].planner.used_blocks(), 0, "blocks leak");
    }
}

#[test]
fn what_cannot_be_chosen_per_head_is_refused() {
    let position = PositionRule::Original;
    let chains = [
        vec![memory(manual(40, 0, 0), position), memory(window(0, 20), position)],
        vec![memory(window(0, 20), position)],
        vec![memory(manual(40, 0, 0), PositionRule::Capped { distance: 9 })],
    ];
    for memories in chains {
        let mut planner = Planner::new(memories, Frame::Raw).unwrap();
        planner.begin(&[10], 10, true, false).unwrap();
        planner.commit().unwrap();
        assert!(matches!(planner.sieve(0, 0, 2, 2), Err(Error::Unsupported(_))));
        assert_eq!(planner.resident(0, 0).unwrap(), 10);
    }
    let mut planner = sieving(40);
    planner.begin(&[60], 60, true, false).unwrap();
    planner.commit().unwrap();
    for (memory, row, count, recent) in [(1, 0, 2, 2), (0, 1, 2, 2), (0, 0, 39, 2), (0, 0, usize::MAX, 1)] {
        assert!(matches!(planner.sieve(memory, row, count, recent), Err(Error::OutOfRange { .. })));
    }
    assert_eq!(planner.resident(0, 0).unwrap(), 60);
}

const DIMS: (usize, usize) = (5, 3);

/// What head `head` has of token `token`: no two numbers are alike.
fn number(token: usize, head: usize, channel: usize) -> f32 {
    (token * 100 + head * 10 + channel) as f32
}

fn filled(dtype: Dtype, tokens: usize) -> (Arena, Planner) {
    let mut planner = sieving(1 << 20);
    let step = planner.begin(&[tokens], tokens, true, false).unwrap();
    let data = |dim: usize| -> Vec<f32> {
        let heads = (0..HEADS).flat_map(|h| (0..tokens).map(move |t| (h, t)));
        heads.flat_map(|(h, t)| (0..dim).map(move |c| number(t, h, c))).collect()
    };
    let (k, v) = (data(DIMS.0), data(DIMS.1));
    let bits = |x: &[f32]| -> Vec<u16> { x.iter().map(|&x| (x as u32 % 65536) as u16).collect() };
    let (kb, vb) = (bits(&k), bits(&v));
    let (k, v) = match dtype {
        Dtype::F32 => (Elems::F32(&k), Elems::F32(&v)),
        Dtype::BF16 | Dtype::F16 => (Elems::Bits(&kb), Elems::Bits(&vb)),
    };
    let mut arena = Arena::new(HEADS, DIMS.0, DIMS.1, dtype).unwrap();
    let k = View::contiguous("k", k, [1, HEADS, tokens, DIMS.0]).unwrap();
    let v = View::contiguous("v", v, [1, HEADS, tokens, DIMS.1]).unwrap();
    arena.append(&k, &v, &step).unwrap();
    planner.commit().unwrap();
    (arena, planner)
}

#[test]
fn an_arena_gives_each_head_its_own_tokens() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        for (tokens, count, recent) in [(10, 4, 3), (200, 70, 30), (130, 0, 5), (150, 150, 0)] {
            let (mut arena, mut planner) = filled(dtype, tokens);
            let keep = choose(tokens - recent, count, 7 + tokens as u64);
            let flat: Vec<i64> = keep.iter().flatten().map(|&i| i as i64).collect();
            let sieve = planner.sieve(0, 0, count, recent).unwrap();
            arena.permute(&sieve.from, &flat, &sieve.to).unwrap();
            let held: Vec<_> = slots(planner.runs(0, 0).unwrap()).collect();
            assert_eq!(held.len(), count + recent);
            for (head, keep) in keep.iter().enumerate() {
                let tokens = keep.iter().copied().chain(tokens - recent..tokens);
                for (&(block, slot), token) in held.iter().zip(tokens) {
                    for (row, dim) in [
                        (arena.key(block, head, slot).unwrap(), DIMS.0),
                        (arena.value(block, head, slot).unwrap(), DIMS.1),
                    ] {
                        let want: Vec<f32> = (0..dim).map(|c| number(token, head, c)).collect();
                        match row {
                            Elems::F32(row) => assert_eq!(row, want),
                            Elems::Bits(row) => {
                                assert!(row.iter().zip(want).all(|(&x, y)| x == (y as u32 % 65536) as u16))
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn an_arena_refuses_what_it_cannot_permute_and_changes_nothing() {
    let (mut arena, planner) = filled(Dtype::F32, 100);
    let runs = planner.runs(0, 0).unwrap().to_vec();
    let to = [Run { block: BlockId(0), lo: 0, hi: 2 }];
    let missing = [Run { block: BlockId(900), lo: 0, hi: 2 }];
    let beyond = [Run { block: BlockId(0), lo: 60, hi: 70 }];
    assert!(matches!(arena.permute(&runs, &[5, 6], &to), Err(Error::Shape { what: "keep", .. })));
    for bad in [-1, 100, i64::MAX] {
        assert!(matches!(
            arena.permute(&runs, &[0, 1, 2, 3, 4, bad], &to),
            Err(Error::OutOfRange { what: "keep", .. })
        ));
    }
    assert!(matches!(arena.permute(&missing, &[0; 6], &to), Err(Error::BadBlock { block: 900, .. })));
    assert!(matches!(arena.permute(&beyond, &[0; 6], &to), Err(Error::OutOfRange { .. })));
    assert!(matches!(arena.permute(&runs, &[0; 30], &beyond), Err(Error::OutOfRange { .. })));
    for (at, (block, slot)) in slots(&runs).enumerate() {
        let Elems::F32(row) = arena.key(block, 1, slot).unwrap() else { panic!("float32") };
        assert_eq!(row[0], number(at, 1, 0));
    }
}
