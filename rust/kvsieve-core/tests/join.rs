//! Streams that are joined: random histories of a family of forks against plain lists, and every mistake a caller can make.

use super::common::{Store, Token, cases, chains, memory, planner};
use kvsieve_core::Error;
use kvsieve_core::evict::Eviction;
use kvsieve_core::ids::Position;
use kvsieve_core::plan::Frame;
use kvsieve_core::planner::Planner;
use kvsieve_core::position::PositionRule;
use proptest::prelude::*;

const ROWS: usize = 2;

fn all() -> Planner {
    planner((Frame::Rotated, vec![memory(Eviction::KeepAll, PositionRule::Original)]))
}

/// A planner, and for each row the position and the name of every token that it must hold.
struct Stream {
    planner: Planner,
    rows: Vec<Vec<(Position, Token)>>,
}

#[derive(Default)]
struct Family {
    streams: Vec<Stream>,
    store: Store,
    next: Token,
}

impl Family {
    fn feed(&mut self, at: usize, lens: &[usize]) {
        let Stream { planner, rows } = &mut self.streams[at];
        if lens.iter().all(|&n| n == 0) {
            return;
        }
        let first = self.next;
        let name = |row: usize, new: usize| first + (row * 1000 + new) as u64;
        let step = planner.begin(lens, *lens.iter().max().unwrap(), true, false).unwrap();
        self.store.append(&step, name);
        planner.commit().unwrap();
        self.next += 10_000;
        rows.resize(ROWS, Vec::new());
        for (row, &n) in lens.iter().enumerate() {
            let seen = planner.seen(row).unwrap() - n as u64;
            rows[row].extend((0..n).map(|new| (seen + new as u64, name(row, new))));
        }
    }

    fn fork(&mut self, at: usize) -> usize {
        let Stream { planner, rows } = &self.streams[at];
        self.streams.push(Stream { planner: planner.fork().unwrap(), rows: rows.clone() });
        self.streams.len() - 1
    }

    fn seen(&self, at: usize, row: usize) -> Position {
        self.streams[at].planner.seen(row).unwrap_or(0)
    }

    /// Joins `forks` to stream `at`, row 1 in the opposite order. The forks are given up.
    fn join(&mut self, at: usize, forks: &[usize]) {
        let orders: Vec<Vec<usize>> = vec![(0..forks.len()).collect(), (0..forks.len()).rev().collect()];
        let planners: Vec<Planner> = forks.iter().map(|&f| self.streams[f].planner.fork().unwrap()).collect();
        let num_rows =
            planners.iter().map(Planner::num_rows).max().unwrap_or(0).max(self.streams[at].planner.num_rows());
        let joined = self.streams[at].planner.join(&planners, &orders[..num_rows]).unwrap();
        let mut rows = self.streams[at].rows.clone();
        rows.resize(num_rows, Vec::new());
        for (row, list) in rows.iter_mut().enumerate() {
            let past = self.seen(at, row);
            let mut to = past;
            for &fork in &orders[row] {
                let from = forks[fork];
                let new = self.streams[from].rows.get(row).into_iter().flatten().filter(|t| t.0 >= past);
                list.extend(new.map(|&(position, token)| (position - past + to, token)));
                to += self.seen(from, row).max(past) - past;
            }
            assert_eq!(joined.seen(row).unwrap(), to);
        }
        self.streams.push(Stream { planner: joined, rows });
    }

    fn check(&self) {
        for Stream { planner, rows } in &self.streams {
            for (row, list) in rows.iter().enumerate() {
                let runs = planner.runs(0, row).unwrap();
                assert!(self.store.read(runs).into_iter().eq(list.iter().map(|t| t.1)));
                assert!(planner.positions(0, row).unwrap().iter().copied().eq(list.iter().map(|t| t.0)));
                assert!(runs.iter().all(|run| planner.block_refs(run.block) > 0));
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Feed(usize, [usize; ROWS]),
    Fork(usize),
    /// Documents of so many tokens; the last one goes on from the first one where `nested`, and all are joined so many times over.
    Join(usize, Vec<[usize; ROWS]>, bool, usize),
    Crop(usize, u64),
    Evict(usize, u64, u64),
    Tidy(usize),
    Drop(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let lens = || prop_oneof![[0..5usize, 0..5usize], [0..150usize, 0..150usize], Just([64, 64])];
    let which = || any::<usize>();
    prop_oneof![
        3 => (which(), lens()).prop_map(|(at, lens)| Op::Feed(at, lens)),
        1 => which().prop_map(Op::Fork),
        3 => (which(), prop::collection::vec(lens(), 0..4), any::<bool>(), prop_oneof![Just(1usize), Just(2)])
            .prop_map(|(at, lens, nested, times)| Op::Join(at, lens, nested, times)),
        1 => (which(), prop_oneof![0..4u64, 0..90u64]).prop_map(|(at, n)| Op::Crop(at, n)),
        2 => (which(), 0..300u64, 1..90u64).prop_map(|(at, start, n)| Op::Evict(at, start, start + n)),
        1 => which().prop_map(Op::Tidy),
        1 => which().prop_map(Op::Drop),
    ]
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn every_stream_holds_its_tokens(ops in prop::collection::vec(op(), 1..30)) {
        let root = all();
        let mut family = Family::default();
        family.streams.push(Stream { planner: root.fork().unwrap(), rows: Vec::new() });
        for op in ops {
            let n = family.streams.len();
            match op {
                Op::Feed(at, lens) => family.feed(at % n, &lens),
                Op::Fork(at) => drop(family.fork(at % n)),
                Op::Join(at, lens, nested, times) => {
                    let at = at % n;
                    let mut forks: Vec<usize> = Vec::new();
                    for (i, lens) in lens.iter().enumerate() {
                        let from = if nested && i == 2 { forks[0] } else { at };
                        forks.push(family.fork(from));
                        family.feed(forks[i], lens);
                    }
                    family.join(at, &forks.repeat(times));
                    family.check();
                    let joined = family.streams.pop().unwrap();
                    family.streams.truncate(n);
                    family.streams.push(joined);
                }
                Op::Crop(at, n_tokens) => {
                    let stream = &mut family.streams[at % n];
                    let counts: Vec<u64> =
                        (0..stream.rows.len()).map(|row| n_tokens.min(stream.planner.seen(row).unwrap())).collect();
                    if !counts.is_empty() {
                        stream.planner.crop_rows(&counts).unwrap();
                        for (row, list) in stream.rows.iter_mut().enumerate() {
                            list.retain(|t| t.0 < stream.planner.seen(row).unwrap());
                        }
                    }
                }
                Op::Evict(at, start, stop) => {
                    let stream = &mut family.streams[at % n];
                    if !stream.rows.is_empty() {
                        let moves = stream.planner.evict(None, &(start..stop)).unwrap();
                        family.store.run(&moves);
                        stream.rows.iter_mut().for_each(|list| list.retain(|t| t.0 < start || t.0 >= stop));
                    }
                }
                Op::Tidy(at) => {
                    let moves = family.streams[at % n].planner.tidy().unwrap();
                    family.store.run(&moves);
                }
                Op::Drop(at) if n > 1 => drop(family.streams.swap_remove(at % n)),
                Op::Drop(_) => {}
            }
            family.check();
        }
        family.streams.clear();
        prop_assert_eq!(root.used_blocks(), 0);
    }
}

fn feed(planner: &mut Planner, n: usize) {
    planner.begin(&[n], n, true, false).unwrap();
    planner.commit().unwrap();
}

fn of_one(forks: usize) -> Vec<Vec<usize>> {
    vec![(0..forks).collect()]
}

#[test]
fn blocks_are_shared_and_not_copied() {
    let mut base = all();
    feed(&mut base, 100);
    let mut forks: Vec<_> = (0..3).map(|_| base.fork().unwrap()).collect();
    forks.iter_mut().for_each(|fork| feed(fork, 50));
    let before = base.used_blocks();
    let mut joined = base.join(&forks, &of_one(3)).unwrap();
    assert_eq!((base.used_blocks(), joined.seen(0).unwrap(), joined.columns()), (before, 250, 250));
    forks.clear();
    assert_eq!(base.used_blocks(), before);
    // The last document's tail is the joined stream's alone now, and is filled where it is.
    let step = joined.begin(&[10], 10, true, false).unwrap();
    assert!(step.copies.is_empty());
}

#[test]
fn a_document_that_is_joined_twice_is_not_written_to() {
    let mut store = Store::default();
    let base = all();
    let mut document = base.fork().unwrap();
    let step = document.begin(&[50], 50, true, false).unwrap();
    store.append(&step, |_, new| new as u64);
    document.commit().unwrap();
    let twice = [document.fork().unwrap(), document];
    let mut joined = base.join(&twice, &of_one(2)).unwrap();
    drop(twice);
    joined.crop(1).unwrap();
    let step = joined.begin(&[1], 1, true, false).unwrap();
    store.append(&step, |_, _| 99);
    joined.commit().unwrap();
    assert!(store.read(joined.runs(0, 0).unwrap()).into_iter().eq((0..50).chain(0..49).chain([99])));
    // Many holes: what is left is moved together, the second reading apart from the first.
    for start in (0..50u32).rev().map(|i| u64::from(2 * i)) {
        store.run(&joined.evict(None, &(start..start + 1)).unwrap());
    }
    let odd = |n: u64| (1..n).step_by(2);
    assert!(store.read(joined.runs(0, 0).unwrap()).into_iter().eq(odd(50).chain(odd(49)).chain([99])));
    drop(joined);
    assert_eq!(base.used_blocks(), 0);
}

#[test]
fn pins_move_with_their_tokens() {
    let mut base = all();
    feed(&mut base, 10);
    base.pin(None, &(2..30), false).unwrap();
    let mut forks: Vec<_> = (0..2).map(|_| base.fork().unwrap()).collect();
    feed(&mut forks[0], 5);
    feed(&mut forks[1], 40);
    let joined = base.join(&forks, &[vec![1, 0]]).unwrap();
    // 2..10 of the past, 10..30 of the first in order, and all five of the other, which follow its forty.
    assert_eq!(joined.pins(0).unwrap().ranges(), [2..30, 50..55]);
}

#[test]
fn mistakes_are_refused_and_change_nothing() {
    let mut base = all();
    feed(&mut base, 70);
    let used = base.used_blocks();
    let mut other = all();
    feed(&mut other, 80);
    assert!(matches!(base.join(&[other], &of_one(1)), Err(Error::Unsupported(_))));
    let mut short = base.fork().unwrap();
    short.crop(1).unwrap();
    assert!(matches!(base.join(&[short], &of_one(1)), Err(Error::CropTooLong { .. })));
    let mut wide = base.fork().unwrap();
    wide.select_rows(&[0, 0]).unwrap();
    assert!(matches!(base.join(&[wide], &of_one(1)), Err(Error::RowMismatch { have: 1, got: 2 })));
    for orders in [vec![], vec![vec![0, 0]], vec![vec![1]], vec![vec![0], vec![0]]] {
        assert!(matches!(base.join(&[base.fork().unwrap()], &orders), Err(Error::OutOfRange { .. })));
    }
    let mut packed = base.fork().unwrap();
    feed(&mut packed, 10);
    packed.pack(0, 72, 8, 0).unwrap();
    assert!(matches!(base.join(&[packed], &of_one(1)), Err(Error::Unsupported(_))));
    let mut open = base.fork().unwrap();
    open.begin(&[1], 1, true, false).unwrap();
    assert!(matches!(base.join(&[open], &of_one(1)), Err(Error::StepOpen { .. })));
    let mut chain = planner(chains().swap_remove(5));
    feed(&mut chain, 3);
    assert!(matches!(chain.join(&[], &of_one(0)), Err(Error::Unsupported(_))));
    assert_eq!(base.used_blocks(), used);
    // The past may be packed.
    base.pack(0, 64, 8, 0).unwrap();
    let mut fork = base.fork().unwrap();
    feed(&mut fork, 10);
    assert_eq!(base.join(&[fork], &of_one(1)).unwrap().num_packed(0).unwrap(), 64);
}
