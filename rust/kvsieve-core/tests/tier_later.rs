//! Blocks that are written and read by the file's thread: nothing is seen too early, lost, or read as it was before.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::common::data::*;
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::tier::{Medium, Order, TierFile};
use kvsieve_core::tensor::Dtype;

const DIM: usize = 8;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    stopped: bool,
    fails: Option<io::ErrorKind>,
    /// What was said to be needed soon: where it begins, and its bytes.
    hints: Vec<(u64, u64)>,
}

/// Bytes in memory, behind a gate at which the thread waits while it is shut.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<State>, Condvar)>);

impl Gate {
    fn set(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
    }

    fn pass<R>(&self, f: impl FnOnce(&mut State) -> io::Result<R>) -> io::Result<R> {
        let mut state = self.0.1.wait_while(self.0.0.lock().unwrap(), |state| state.stopped).unwrap();
        state.fails.map_or_else(|| f(&mut state), |kind| Err(kind.into()))
    }
}

impl Medium for Gate {
    fn grow(&self, len: u64) -> io::Result<()> {
        let mut state = self.0.0.lock().unwrap();
        let len = state.bytes.len().max(len as usize);
        state.bytes.resize(len, 0);
        Ok(())
    }

    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<usize> {
        self.pass(|state| {
            let n = to.len().min(3000);
            to[..n].copy_from_slice(&state.bytes[at as usize..][..n]);
            Ok(n)
        })
    }

    fn will_need(&self, at: u64, len: u64) {
        self.set(|state| state.hints.push((at, len)));
    }

    fn write_at(&self, from: &[u8], at: u64) -> io::Result<usize> {
        self.pass(|state| {
            let n = from.len().min(2000);
            state.bytes[at as usize..][..n].copy_from_slice(&from[..n]);
            Ok(n)
        })
    }
}

/// Full blocks over a gate, and the same ones without a file.
struct Pair {
    gate: Gate,
    file: Arc<TierFile>,
    tiered: Arena,
    twin: Arena,
    noise: Noise,
}

impl Pair {
    fn new(seed: u64, blocks: u32, capacity: usize) -> Self {
        let gate = Gate::default();
        let file = TierFile::of(Box::new(gate.clone()));
        let arena = || Arena::new(1, DIM, DIM, Dtype::BF16).unwrap();
        let mut pair = Pair { gate, file, tiered: arena(), twin: arena(), noise: Noise(seed) };
        pair.tiered.set_tier(Arc::clone(&pair.file), capacity, Order::Recency, false).unwrap();
        (0..blocks).for_each(|block| pair.write(whole(block)));
        pair
    }

    fn write(&mut self, run: Run) {
        let data = self.noise.data(run.len() as usize * DIM, Dtype::BF16);
        for arena in [&mut self.tiered, &mut self.twin] {
            arena.write(&[run], data.elems(), data.elems()).unwrap();
        }
    }

    /// Without a look at what the thread does.
    fn check(&self, blocks: u32) {
        let runs: Vec<Run> = (0..blocks).map(whole).collect();
        let n = blocks as usize * 64;
        let [mine, theirs] = [&self.tiered, &self.twin].map(|arena| {
            let (mut k, mut v) =
                (Data::of(&vec![0.0; n * DIM], Dtype::BF16), Data::of(&vec![0.0; n * DIM], Dtype::BF16));
            arena.gather_any(&runs, k.elems_mut(), v.elems_mut(), 0, n).unwrap();
            (k, v)
        });
        assert_eq!(mine, theirs);
    }

    fn in_memory(&self, block: u32) -> bool {
        !self.tiered.is_spilled(BlockId(block))
    }
}

fn whole(block: u32) -> Run {
    Run { block: BlockId(block), lo: 0, hi: 64 }
}

fn ids(blocks: &[u32]) -> Vec<BlockId> {
    blocks.iter().map(|&block| BlockId(block)).collect()
}

#[test]
fn memory_is_given_back_once_a_block_is_written() {
    let mut pair = Pair::new(3, 4, 1);
    pair.gate.set(|state| state.stopped = true);
    pair.tiered.spill_later(&ids(&[0, 1, 2])).unwrap();
    pair.tiered.spill_later(&ids(&[0])).unwrap();
    assert!((0..4).all(|block| pair.in_memory(block)) && pair.tiered.is_under_way(BlockId(0)));
    // One is read meanwhile, one is written.
    pair.tiered.fetch(&[whole(0)]).unwrap();
    pair.write(Run { block: BlockId(1), lo: 3, hi: 5 });
    assert!(!pair.tiered.is_under_way(BlockId(1)));
    pair.gate.set(|state| state.stopped = false);
    pair.tiered.finish().unwrap();
    assert_eq!([0, 1, 2, 3].map(|block| pair.in_memory(block)), [true, true, false, true]);
    assert_eq!([0, 1, 2, 3].map(|block| pair.tiered.is_copied(BlockId(block))), [true, false, true, false]);
    pair.check(4);
    assert_eq!(pair.tiered.tier_counts().spills, 2);
    // What was fetched has a copy and leaves without the thread.
    pair.tiered.fetch(&[]).unwrap();
    pair.tiered.spill_later(&ids(&[0])).unwrap();
    assert!(!pair.in_memory(0));
    pair.tiered.trim_later(&ids(&[3])).unwrap();
    pair.tiered.finish().unwrap();
    assert_eq!([1, 3].map(|block| pair.in_memory(block)), [false, true]);
    pair.check(4);
    assert_eq!(pair.file.bytes().0, 3 * 4096);
}

#[test]
fn what_could_not_be_written_is_said_by_the_next_call() {
    let mut pair = Pair::new(4, 3, 1);
    pair.gate.set(|state| state.fails = Some(io::ErrorKind::StorageFull));
    pair.tiered.spill_later(&ids(&[0, 1])).unwrap();
    assert!(matches!(pair.tiered.finish(), Err(Error::TierFull { .. })));
    assert!(pair.in_memory(0) && pair.in_memory(1));
    pair.tiered.finish().unwrap();
    pair.tiered.spill_later(&ids(&[0])).unwrap();
    while pair.tiered.is_under_way(BlockId(0)) {
        // A fetch is not concerned.
        pair.tiered.fetch(&[whole(2)]).unwrap();
    }
    assert!(matches!(pair.tiered.trim(&[]), Err(Error::TierFull { .. })));
    pair.gate.set(|state| state.fails = None);
    pair.tiered.trim(&[]).unwrap();
    pair.check(3);
    assert_eq!(pair.file.bytes().0, 2 * 4096);
}

/// The file is told of all blocks of a fetch before the first of them is read, neighbours in the file as one; of a block alone it is not.
#[test]
fn reads_of_a_fetch_begin_together() {
    let mut pair = Pair::new(5, 6, 4);
    let hints = |pair: &Pair| std::mem::take(&mut pair.gate.0.0.lock().unwrap().hints);
    for block in [3, 0, 1, 5] {
        pair.tiered.spill(&ids(&[block])).unwrap();
    }
    // Extents lie in the order in which they were written, 4,096 bytes each: those of 3, 0 and 1, then that of 5.
    pair.tiered.fetch(&[whole(5), whole(3), whole(0), whole(2)]).unwrap();
    assert_eq!(hints(&pair), [(0, 2 * 4096), (3 * 4096, 4096)]);
    pair.tiered.fetch(&[whole(1)]).unwrap();
    assert_eq!(hints(&pair), []);
    let counts = pair.tiered.tier_counts();
    assert_eq!((counts.hits, counts.loads, counts.bytes_read), (1, 4, 4 * 64 * 2 * 2 * DIM as u64));
    pair.check(6);
}

/// To read ahead moves no block and counts nothing, and what is wrong with a block is said by the fetch that needs it.
#[test]
fn what_is_read_ahead_is_a_hint() {
    let mut pair = Pair::new(5, 6, 4);
    pair.tiered.spill(&ids(&[0, 1, 4])).unwrap();
    let before = pair.tiered.tier_counts();
    pair.tiered.prefetch(&[whole(1), whole(4), whole(5), whole(1)]).unwrap();
    assert_eq!(pair.gate.0.0.lock().unwrap().hints, [(4096, 2 * 4096)]);
    assert_eq!(pair.tiered.tier_counts(), before);
    assert_eq!([0, 1, 4, 5].map(|block| pair.in_memory(block)), [false, false, false, true]);
    pair.gate.set(|state| state.bytes[4096] ^= 1);
    pair.tiered.prefetch(&[whole(1)]).unwrap();
    assert_eq!(pair.tiered.fetch(&[whole(1)]), Err(Error::TierDamaged { block: 1 }));
    pair.gate.set(|state| state.bytes[4096] ^= 1);
    pair.tiered.fetch(&[whole(1)]).unwrap();
    pair.check(6);
}

/// What leaves for a fetch hands its memory to what comes, and nothing is kept beside.
#[test]
fn memory_of_what_leaves_goes_to_what_comes() {
    let mut pair = Pair::new(6, 12, 3);
    let all: Vec<u32> = (0..12).collect();
    pair.tiered.spill(&ids(&all)).unwrap();
    assert_eq!(pair.tiered.bytes(), 0);
    let block = 64 * 2 * 2 * DIM;
    for round in 0..40 {
        let some = [round % 12, (round * 5 + 1) % 12, (round * 7 + 2) % 12].map(whole);
        pair.tiered.fetch(&some).unwrap();
        assert!(pair.tiered.bytes() <= 6 * block, "three of this fetch, and three that were there");
        pair.check(12);
        pair.tiered.trim(&[]).unwrap();
        assert!(pair.tiered.bytes() <= 3 * block);
    }
    // A block whose memory was another's is written, moved and freed like any other one.
    pair.tiered.fetch(&[whole(7)]).unwrap();
    pair.write(Run { block: BlockId(7), lo: 3, hi: 64 });
    let in_use: Vec<bool> = (0..12).map(|block| block == 7).collect();
    [&mut pair.tiered, &mut pair.twin].into_iter().for_each(|arena| arena.free_unused(&in_use, &[]));
    assert_eq!(pair.tiered.bytes(), block);
}

#[test]
fn no_schedule_with_the_thread_changes_what_is_read() {
    for seed in 40..46 {
        let mut pair = Pair::new(seed, 10, 3);
        for _ in 0..200 {
            let block = pair.noise.below(10) as u32;
            let some = ids(&[block, pair.noise.below(10) as u32, pair.noise.below(10) as u32]);
            let runs: Vec<Run> = some.iter().map(|&block| Run { block, lo: 0, hi: 64 }).collect();
            match pair.noise.below(9) {
                0 | 1 => {
                    let lo = pair.noise.below(64) as u32;
                    pair.write(Run { block: BlockId(block), lo, hi: lo + 1 });
                }
                2 => pair.tiered.spill(&some).unwrap(),
                3 => pair.tiered.spill_later(&some).unwrap(),
                4 => pair.tiered.trim_later(&some).unwrap(),
                5 => pair.tiered.prefetch(&runs).unwrap(),
                6 => pair.tiered.hold(&some).unwrap(),
                7 => {
                    let in_use: Vec<bool> = (0..10).map(|i| i != block).collect();
                    [&mut pair.tiered, &mut pair.twin].into_iter().for_each(|arena| arena.free_unused(&in_use, &[]));
                    pair.write(whole(block));
                }
                _ => {
                    pair.tiered.fetch(&runs).unwrap();
                    assert!(some.iter().all(|&block| !pair.tiered.is_spilled(block)));
                }
            }
            pair.check(10);
        }
        pair.tiered.finish().unwrap();
        let copies = (0..10).filter(|&block| pair.tiered.is_copied(BlockId(block))).count() as u64;
        let counts = pair.tiered.tier_counts();
        assert!(counts.spills > 20 && counts.loads > 20, "{counts:?}");
        // Extents of answers that nobody waits for any more are given back when they come.
        pair.tiered.spill_later(&ids(&[0, 1, 2])).unwrap();
        pair.tiered.finish().unwrap();
        assert!(pair.file.bytes().0 >= copies * 4096);
        pair.tiered.spill_later(&ids(&[3, 4, 5])).unwrap();
        let Pair { tiered, file, .. } = pair;
        drop(tiered);
        let patience = Instant::now() + Duration::from_secs(60);
        while file.bytes().0 > 0 {
            assert!(Instant::now() < patience, "extents are lost: {:?}", file.bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
