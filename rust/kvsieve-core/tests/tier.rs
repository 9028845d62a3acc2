//! Blocks that lie in a file: what is read is what was written, whatever comes and goes, and whatever fails.

use std::io;
use std::sync::{Arc, Mutex};

use super::common::data::*;
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::plan::Move;
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::tier::{Medium, Order, TierFile};
use kvsieve_core::tensor::Dtype;

pub(super) const HEADS: usize = 2;
pub(super) const DIMS: (usize, usize) = (6, 4);

/// Bytes in memory that take and give few at a time, and fail when told to.
#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Bytes that there is space for.
    space: u64,
    /// Writes until one fails, and with what.
    failing: Option<(u32, io::ErrorKind)>,
    fails_to_read: Option<io::ErrorKind>,
    calls: u32,
    written: usize,
}

#[derive(Clone, Default)]
pub(super) struct Flaky(Arc<Mutex<State>>);

impl Flaky {
    pub(super) fn written(&self) -> usize {
        self.0.lock().unwrap().written
    }

    fn with_space(space: u64) -> Self {
        let flaky = Flaky::default();
        flaky.0.lock().unwrap().space = space;
        flaky
    }

    fn set(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.0.lock().unwrap());
    }

    fn file(&self) -> Arc<TierFile> {
        TierFile::of(Box::new(self.clone()))
    }
}

impl Medium for Flaky {
    fn grow(&self, len: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if len > state.space {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = state.bytes.len().max(len as usize);
        state.bytes.resize(len, 0);
        Ok(())
    }

    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        state.calls += 1;
        if state.calls.is_multiple_of(5) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if let Some(kind) = state.fails_to_read {
            return Err(kind.into());
        }
        let from = state.bytes.get(at as usize..).unwrap_or(&[]);
        let n = from.len().min(to.len()).min(1000);
        to[..n].copy_from_slice(&from[..n]);
        Ok(n)
    }

    fn write_at(&self, from: &[u8], at: u64) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        state.calls += 1;
        if state.calls.is_multiple_of(7) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if let Some((left, kind)) = &mut state.failing {
            if *left == 0 {
                return Err((*kind).into());
            }
            *left -= 1;
        }
        let n = from.len().min(700);
        state.bytes[at as usize..][..n].copy_from_slice(&from[..n]);
        state.written += n;
        Ok(n)
    }
}

fn tiered(file: Arc<TierFile>, capacity: usize, dtype: Dtype, values_alone: bool) -> Arena {
    let mut arena = Arena::new(HEADS, DIMS.0, DIMS.1, dtype).unwrap();
    arena.set_tier(file, capacity, Order::Recency, values_alone).unwrap();
    arena
}

pub(super) fn run(block: u32, lo: u32, hi: u32) -> Run {
    Run { block: BlockId(block), lo, hi }
}

pub(super) fn whole(block: u32) -> Run {
    run(block, 0, 64)
}

pub(super) fn ids(blocks: &[u32]) -> Vec<BlockId> {
    blocks.iter().map(|&block| BlockId(block)).collect()
}

/// Writes random tokens; the same ones to both.
pub(super) fn write(noise: &mut Noise, runs: &[Run], arenas: [&mut Arena; 2]) {
    let n: usize = runs.iter().map(|run| run.len() as usize).sum();
    let dtype = arenas[0].dtype();
    let (k, v) = (noise.data(HEADS * n * DIMS.0, dtype), noise.data(HEADS * n * DIMS.1, dtype));
    arenas.into_iter().for_each(|arena| arena.write(runs, k.elems(), v.elems()).unwrap());
}

fn zeros(runs: &[Run], dtype: Dtype) -> (usize, Data, Data) {
    let n: usize = runs.iter().map(|run| run.len() as usize).sum();
    let zeros = |dim| Data::of(&vec![0.0; HEADS * n * dim], dtype);
    (n, zeros(DIMS.0), zeros(DIMS.1))
}

pub(super) fn gathered(arena: &Arena, runs: &[Run]) -> Result<(Data, Data), Error> {
    let (n, mut k, mut v) = zeros(runs, arena.dtype());
    arena.gather(runs, k.elems_mut(), v.elems_mut(), 0, n).map(|()| (k, v))
}

pub(super) fn read(arena: &Arena, runs: &[Run]) -> Result<(Data, Data), Error> {
    let (n, mut k, mut v) = zeros(runs, arena.dtype());
    arena.gather_any(runs, k.elems_mut(), v.elems_mut(), 0, n).map(|()| (k, v))
}

/// An arena of `blocks` full blocks over a flaky medium, and its twin without a file.
fn pair(noise: &mut Noise, blocks: u32, space: u64) -> (Flaky, Arena, Arena) {
    pair_of(noise, blocks, space, false)
}

pub(super) fn pair_of(noise: &mut Noise, blocks: u32, space: u64, values_alone: bool) -> (Flaky, Arena, Arena) {
    let flaky = Flaky::with_space(space);
    let mut arena = tiered(flaky.file(), 4, Dtype::F16, values_alone);
    let mut twin = Arena::new(HEADS, DIMS.0, DIMS.1, Dtype::F16).unwrap();
    let runs: Vec<Run> = (0..blocks).map(whole).collect();
    write(noise, &runs, [&mut arena, &mut twin]);
    (flaky, arena, twin)
}

#[test]
fn a_block_leaves_memory_and_comes_back() {
    let mut noise = Noise(3);
    let (flaky, mut arena, twin) = pair(&mut noise, 3, 1 << 20);
    let before = arena.bytes();
    arena.spill(&ids(&[0, 2])).unwrap();
    assert_eq!((arena.bytes(), arena.is_spilled(BlockId(0)), arena.is_spilled(BlockId(1))), (before / 3, true, false));
    let written = flaky.0.lock().unwrap().written;
    assert_eq!(written, before / 3 * 2);
    // Every way to read it is refused, and says why.
    let gone = Error::NotInMemory { block: 0 };
    assert_eq!(arena.key(BlockId(0), 0, 5).unwrap_err(), gone);
    assert_eq!(arena.value(BlockId(0), 0, 5).unwrap_err(), gone);
    assert_eq!(arena.token(BlockId(0), 0, 5).unwrap_err(), gone);
    assert_eq!(arena.make_bounds(&[whole(0)]).unwrap_err(), gone);
    assert_eq!(gathered(&arena, &[whole(1), whole(0)]).unwrap_err(), gone);
    // But it can be read from the file, wherever its run stands.
    let runs = [run(1, 3, 9), run(0, 60, 64), run(2, 0, 64), whole(1), run(0, 1, 1)];
    assert_eq!(read(&arena, &runs).unwrap(), gathered(&twin, &runs).unwrap());
    assert!(arena.is_spilled(BlockId(0)));
    arena.fetch(&[run(0, 3, 5), whole(1)]).unwrap();
    assert_eq!(gathered(&arena, &[whole(0), whole(1)]).unwrap(), gathered(&twin, &[whole(0), whole(1)]).unwrap());
    // It is in the file still: to leave again costs nothing. To be written costs a new copy.
    arena.spill(&ids(&[0])).unwrap();
    assert_eq!(flaky.0.lock().unwrap().written, written);
    let counts = arena.tier_counts();
    assert_eq!((counts.hits, counts.loads, counts.spills), (1, 1, 2));
    assert_eq!(counts.bytes_written as usize, written);
    assert_eq!(counts.bytes_read as usize, before / 3 * 3, "one block was loaded, two were read in passing");
}

/// Whatever is written, moved, freed, spilled, fetched and trimmed: what is read is what an arena without a file holds.
#[test]
fn no_schedule_changes_what_is_read() {
    for (seed, dtype) in (20..38).zip(DTYPES.into_iter().cycle()) {
        let mut noise = Noise(seed);
        let flaky = Flaky::with_space(1 << 22);
        let file = flaky.file();
        let mut arena = tiered(Arc::clone(&file), 3, dtype, seed >= 32);
        let mut twin = Arena::new(HEADS, DIMS.0, DIMS.1, dtype).unwrap();
        let mut filled = [0u32; 12];
        for _ in 0..300 {
            let block = noise.below(12);
            let some: Vec<u32> = (0..1 + noise.below(4)).map(|_| noise.below(12) as u32).collect();
            let held: Vec<u32> = some.iter().copied().filter(|&block| filled[block as usize] > 0).collect();
            match noise.below(9) {
                0..3 => {
                    let lo = noise.below(filled[block] as usize + 1) as u32;
                    let hi = (lo + 1 + noise.below(64) as u32).min(64);
                    write(&mut noise, &[run(block as u32, lo.min(hi), hi)], [&mut arena, &mut twin]);
                    filled[block] = filled[block].max(hi);
                }
                3 if held.len() > 1 && filled[held[0] as usize] > 9 => {
                    let m = Move { from: BlockId(held[0]), from_slot: 2, to: BlockId(held[1]), to_slot: 1, len: 7 };
                    [&mut arena, &mut twin].into_iter().for_each(|arena| arena.apply(&[m]).unwrap());
                    filled[held[1] as usize] = filled[held[1] as usize].max(8);
                }
                4 => {
                    let in_use: Vec<bool> = (0..12).map(|i| i != block).collect();
                    [&mut arena, &mut twin].into_iter().for_each(|arena| arena.free_unused(&in_use, &[]));
                    filled[block] = 0;
                }
                5 => arena.spill(&ids(&held)).unwrap(),
                6 => arena.hold(&ids(&held)).unwrap(),
                7 => arena.trim(&ids(&held)).unwrap(),
                _ => {
                    let runs: Vec<Run> = held.iter().map(|&b| run(b, 0, filled[b as usize])).collect();
                    arena.fetch(&runs).unwrap();
                    assert_eq!(gathered(&arena, &runs).unwrap(), gathered(&twin, &runs).unwrap());
                }
            }
            let all: Vec<Run> = (0..12u32).map(|b| run(b, 0, filled[b as usize])).filter(|r| !r.is_empty()).collect();
            assert_eq!(read(&arena, &all).unwrap(), gathered(&twin, &all).unwrap());
        }
        assert!(arena.tier_counts().loads > 10 && arena.tier_counts().spills > 10, "{:?}", arena.tier_counts());
        let copies = (0..12).filter(|&block| arena.is_copied(BlockId(block))).count() as u64;
        let moves = if arena.values_alone() { HEADS * DIMS.1 * dtype.size() } else { arena.token_bytes() };
        let extent = (64 * moves).next_multiple_of(4096) as u64;
        assert_eq!((file.bytes().0, arena.tier_bytes()), (copies * extent, copies * extent));
        drop(arena);
        assert_eq!(file.bytes().0, 0, "an arena that is gone leaves its extents to others");
    }
}

#[test]
fn no_more_than_the_capacity_stays() {
    let mut noise = Noise(5);
    let (_, mut arena, twin) = pair(&mut noise, 12, 1 << 22);
    let full = |arena: &Arena| arena.num_blocks();
    arena.trim(&ids(&[10, 11])).unwrap();
    assert_eq!(full(&arena), 4);
    assert!((8..12).all(|block| !arena.is_spilled(BlockId(block))), "the oldest went");
    // What one fetch names is there, even if it is more than the capacity; the next one makes it smaller.
    let runs: Vec<Run> = (0..5).map(whole).collect();
    arena.fetch(&runs).unwrap();
    assert_eq!(gathered(&arena, &runs).unwrap(), gathered(&twin, &runs).unwrap());
    assert_eq!(full(&arena), 9, "those that have no copy cannot go before the step is over");
    arena.fetch(&[whole(5)]).unwrap();
    assert_eq!(full(&arena), 5, "blocks 8 to 11, and the one that was asked for");
    arena.trim(&ids(&[10, 11])).unwrap();
    assert_eq!(full(&arena), 4);
    assert!([5, 10, 11].iter().all(|&block| !arena.is_spilled(BlockId(block))));
    // Of blocks that have a copy, those go first that were fetched longest ago.
    arena.spill(&ids(&[5, 8, 9])).unwrap();
    arena.fetch(&[whole(0), whole(1)]).unwrap();
    arena.fetch(&[whole(2)]).unwrap();
    assert_eq!((arena.is_spilled(BlockId(0)), arena.is_spilled(BlockId(1))), (true, false));
    // Another thread's blocks are left alone.
    arena.fetch(&[whole(1), whole(2)]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| arena.fetch(&[whole(3), whole(4)]).unwrap());
    });
    assert!([1, 2, 3, 4].iter().all(|&block| !arena.is_spilled(BlockId(block))));
    assert!(matches!(arena.fetch(&[whole(77)]), Err(Error::BadBlock { block: 77, .. })));
}

/// A step is over; what the file's thread does for it, too.
fn end_step(arena: &mut Arena, later: bool) {
    if later { arena.trim_later(&[]) } else { arena.trim(&[]) }.unwrap();
    arena.finish().unwrap();
}

/// Blocks that are read again and again, fewer than the capacity, are all in memory after a while: those that nobody reads leave for them,
/// though they had no copy at first.
#[test]
fn what_fits_the_capacity_stays() {
    for later in [false, true] {
        let mut noise = Noise(9);
        let (_, mut arena, twin) = pair(&mut noise, 12, 1 << 22);
        end_step(&mut arena, later);
        let mut loads = Vec::new();
        for step in 0..24 {
            let runs = [whole(step % 3)];
            arena.fetch(&runs).unwrap();
            assert_eq!(gathered(&arena, &runs).unwrap(), gathered(&twin, &runs).unwrap());
            end_step(&mut arena, later);
            assert!(arena.num_blocks() <= 4);
            loads.push(arena.tier_counts().loads);
        }
        assert_eq!(loads[11], loads[23], "three blocks of a capacity of four: {loads:?}");
        assert!(loads[11] <= 6, "each was loaded once, and once more at most: {loads:?}");
    }
}

/// For every block that left memory in the place of one without a copy, one copy is written, and no block leaves that need not.
#[test]
fn no_more_copies_are_written_than_blocks_were_loaded() {
    for (later, fetches) in [(false, 1), (false, 2), (false, 4), (true, 1), (true, 4)] {
        let mut noise = Noise(13);
        let (_, mut arena, _) = pair(&mut noise, 24, 1 << 23);
        let full = arena.num_blocks();
        end_step(&mut arena, later);
        assert!(full == 24 && arena.num_blocks() == 4);
        arena.fetch(&[whole(0)]).unwrap();
        end_step(&mut arena, later);
        let before = arena.tier_counts();
        (1..=fetches).for_each(|block| arena.fetch(&[whole(block)]).unwrap());
        end_step(&mut arena, later);
        let after = arena.tier_counts();
        assert_eq!(after.loads - before.loads, u64::from(fetches));
        assert!((1..=u64::from(fetches)).contains(&(after.spills - before.spills)), "{later} {fetches}: {after:?}");
        assert_eq!(arena.num_blocks(), 4, "{later} {fetches}");
    }
}

/// Copies ahead only save work: without space for them a step that needs none is no error.
#[test]
fn a_full_disk_is_no_error_where_nothing_must_leave() {
    for later in [false, true] {
        let mut noise = Noise(17);
        let (media, mut arena, twin) = pair(&mut noise, 12, 1 << 22);
        end_step(&mut arena, later);
        arena.fetch(&[whole(0)]).unwrap();
        end_step(&mut arena, later);
        media.set(|state| state.space = 0);
        for block in 1..6 {
            arena.fetch(&[whole(block)]).unwrap();
            assert_eq!(gathered(&arena, &[whole(block)]).unwrap(), gathered(&twin, &[whole(block)]).unwrap());
            end_step(&mut arena, later);
            assert_eq!(arena.num_blocks(), 4);
        }
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    let mut noise = Noise(6);
    // Space for two extents: 64 tokens are 2,560 bytes, so an extent is a page.
    let (flaky, mut arena, twin) = pair(&mut noise, 5, 8192);
    let all: Vec<Run> = (0..5).map(whole).collect();
    let err = arena.spill(&ids(&[0, 1, 2, 3])).unwrap_err();
    assert!(matches!(err, Error::TierFull { bytes: 4096, .. }), "{err}");
    assert_eq!((0..5).filter(|&block| arena.is_spilled(BlockId(block))).count(), 2);
    assert_eq!(read(&arena, &all).unwrap(), gathered(&twin, &all).unwrap());
    assert!(matches!(arena.trim(&[]), Ok(())), "three are within the capacity");
    // Space of a freed block is used again.
    arena.free_unused(&[false, true, true, true, true], &[]);
    arena.spill(&ids(&[2])).unwrap();
    assert!(matches!(arena.spill(&ids(&[3])), Err(Error::TierFull { .. })));
    // With space it goes on.
    flaky.set(|state| state.space = 1 << 30);
    arena.spill(&ids(&[3, 4])).unwrap();
    assert_eq!(read(&arena, &all[1..]).unwrap(), gathered(&twin, &all[1..]).unwrap());
}

#[test]
fn a_write_that_fails_leaves_the_block_in_memory() {
    let mut noise = Noise(7);
    let kinds =
        [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::Other, io::ErrorKind::WriteZero];
    for (kind, writes) in kinds.into_iter().zip([0, 1, 3, 5]) {
        let (flaky, mut arena, twin) = pair(&mut noise, 3, 1 << 20);
        let all: Vec<Run> = (0..3).map(whole).collect();
        flaky.set(|state| state.failing = Some((writes, kind)));
        let err = arena.spill(&ids(&[0, 1, 2])).unwrap_err();
        let full = matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        assert!(matches!((&err, full), (Error::TierFull { .. }, true) | (Error::TierFailed { .. }, false)), "{err}");
        assert_eq!(read(&arena, &all).unwrap(), gathered(&twin, &all).unwrap());
        flaky.set(|state| state.failing = None);
        arena.spill(&ids(&[0, 1, 2])).unwrap();
        assert_eq!((arena.num_blocks(), read(&arena, &all).unwrap()), (0, gathered(&twin, &all).unwrap()));
    }
}

#[test]
fn damage_is_an_error_and_never_an_answer() {
    let mut noise = Noise(8);
    let (flaky, mut arena, twin) = pair(&mut noise, 3, 1 << 20);
    let all: Vec<Run> = (0..3).map(whole).collect();
    arena.spill(&ids(&[0, 1, 2])).unwrap();
    // Any bit of a block; the padding behind it means nothing.
    for at in [0usize, 1, 1000, 2559] {
        flaky.set(|state| state.bytes[4096 + at] ^= 4);
        let damaged = Error::TierDamaged { block: 1 };
        assert_eq!(read(&arena, &all).unwrap_err(), damaged);
        assert_eq!(arena.fetch(&all).unwrap_err(), damaged);
        assert_eq!(arena.hold(&ids(&[1])).unwrap_err(), damaged);
        let (k, v) = (noise.data(HEADS * DIMS.0, Dtype::F16), noise.data(HEADS * DIMS.1, Dtype::F16));
        assert_eq!(arena.write(&[run(1, 5, 6)], k.elems(), v.elems()).unwrap_err(), damaged);
        assert!(arena.is_spilled(BlockId(1)));
        flaky.set(|state| state.bytes[4096 + at] ^= 4);
        arena.spill(&ids(&[0])).unwrap();
    }
    // Extents that have changed places.
    flaky.set(|state| (0..4096).for_each(|i| state.bytes.swap(i, 4096 + i)));
    assert!(matches!(read(&arena, &all), Err(Error::TierDamaged { .. })));
    flaky.set(|state| (0..4096).for_each(|i| state.bytes.swap(i, 4096 + i)));
    assert_eq!(read(&arena, &all).unwrap(), gathered(&twin, &all).unwrap());
    // A file that was truncated, and one that cannot be read.
    flaky.set(|state| state.fails_to_read = Some(io::ErrorKind::Other));
    assert!(matches!(arena.fetch(&all), Err(Error::TierFailed { what: "read", .. })));
    flaky.set(|state| state.fails_to_read = None);
    flaky.set(|state| state.bytes.truncate(8192 + 100));
    assert!(matches!(arena.fetch(&[whole(2)]), Err(Error::TierFailed { what: "read", .. })));
    arena.fetch(&all[..2]).unwrap();
    assert_eq!(gathered(&arena, &all[..2]).unwrap(), gathered(&twin, &all[..2]).unwrap());
}

#[cfg(unix)]
#[test]
fn a_file_of_the_system() {
    let mut noise = Noise(9);
    let folder = std::env::temp_dir();
    let file = TierFile::create(&folder).unwrap();
    let mut arena = tiered(Arc::clone(&file), 2, Dtype::F32, false);
    let mut twin = Arena::new(HEADS, DIMS.0, DIMS.1, Dtype::F32).unwrap();
    let all: Vec<Run> = (0..40).map(whole).collect();
    write(&mut noise, &all, [&mut arena, &mut twin]);
    arena.trim(&[]).unwrap();
    assert_eq!(arena.num_blocks(), 2);
    assert_eq!(read(&arena, &all).unwrap(), gathered(&twin, &all).unwrap());
    for runs in all.chunks(3) {
        arena.fetch(runs).unwrap();
        assert_eq!(gathered(&arena, runs).unwrap(), gathered(&twin, runs).unwrap());
    }
    assert!(file.bytes().1 >= 38 * 64 * arena.token_bytes() as u64);
    let mine = format!(".kvsieve-{}-", std::process::id());
    let left =
        std::fs::read_dir(&folder).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with(&mine));
    assert_eq!(left.count(), 0, "the file has no name");
    assert!(matches!(TierFile::create(&folder.join("not there")), Err(Error::TierFailed { what: "create", .. })));
}

#[test]
fn an_arena_without_a_file_says_so() {
    let mut noise = Noise(10);
    let mut arena = filled(&mut noise, HEADS, DIMS, Dtype::F32, 2);
    arena.fetch(&[whole(0), whole(1)]).unwrap();
    assert!(matches!(arena.spill(&ids(&[0])), Err(Error::Unsupported(_))));
    assert!(matches!(arena.trim(&[]), Err(Error::Unsupported(_))));
    let all = [whole(1), run(0, 3, 7)];
    assert_eq!(read(&arena, &all).unwrap(), gathered(&arena, &all).unwrap());
    // One that gets it later knows the blocks that are there.
    let flaky = Flaky::with_space(1 << 20);
    arena.set_tier(flaky.file(), 1, Order::Scores { decay: 0.1 }, false).unwrap();
    assert!(arena.set_tier(flaky.file(), 1, Order::Recency, false).is_err());
    arena.score(&ids(&[0, 1]), &[2.0, 1.0]).unwrap();
    assert!(arena.score(&ids(&[0, 1]), &[2.0]).is_err());
    arena.trim(&[]).unwrap();
    assert_eq!((arena.is_spilled(BlockId(0)), arena.is_spilled(BlockId(1))), (false, true));
}
