//! What changes a block that lies in a file, and values that lie there without their keys.

use super::common::data::*;
use super::tier::{DIMS, HEADS, gathered, ids, pair_of, read, run, whole, write};
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::plan::{Append, Frame, Move, Step};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::Dtype;

/// Keys that stay are read, and values that are gone are refused; they come back alone.
#[test]
fn values_leave_memory_alone() {
    let mut noise = Noise(5);
    let (flaky, mut arena, twin) = pair_of(&mut noise, 3, 1 << 20, true);
    let (keys, values) = arena.plain_bytes();
    arena.spill(&ids(&[0, 2])).unwrap();
    assert_eq!((arena.plain_bytes(), arena.is_spilled(BlockId(0))), ((keys, values / 3), true));
    assert_eq!(flaky.written(), values / 3 * 2);
    let gone = Error::NotInMemory { block: 0 };
    assert_eq!(arena.value(BlockId(0), 0, 5).unwrap_err(), gone);
    assert_eq!(gathered(&arena, &[whole(0)]).unwrap_err(), gone);
    let runs = [run(1, 3, 9), run(0, 60, 64), run(2, 0, 64), whole(1), run(0, 1, 1)];
    assert_eq!(read(&arena, &runs).unwrap(), gathered(&twin, &runs).unwrap());
    arena.fetch(&[whole(0)]).unwrap();
    assert_eq!(arena.plain_bytes(), (keys, values / 3 * 2));
    assert_eq!(gathered(&arena, &[whole(0), whole(1)]).unwrap(), gathered(&twin, &[whole(0), whole(1)]).unwrap());
    assert_eq!(
        arena.tier_counts().bytes_read as usize,
        values / 3 * 3,
        "one block was loaded, two were read in passing"
    );
    // A block that nobody holds any more leaves nothing.
    arena.free_unused(&[false, true, false], &[]);
    assert_eq!((arena.plain_bytes(), arena.tier_bytes()), ((keys / 3, values / 3), 0));
}

#[test]
fn what_changes_a_block_loads_it_and_makes_its_copy_void() {
    [false, true].into_iter().for_each(changed_blocks);
}

fn changed_blocks(values_alone: bool) {
    let mut noise = Noise(4);
    let (_, mut arena, mut twin) = pair_of(&mut noise, 5, 1 << 20, values_alone);
    let all: Vec<Run> = (0..5).map(whole).collect();
    let spilled = ids(&[0, 1, 2, 3, 4]);
    let same = |arena: &Arena, twin: &Arena| assert_eq!(read(arena, &all).unwrap(), gathered(twin, &all).unwrap());

    arena.spill(&spilled).unwrap();
    write(&mut noise, &[run(0, 7, 9)], [&mut arena, &mut twin]);
    assert!(!arena.is_copied(BlockId(0)) && !arena.is_spilled(BlockId(0)));
    same(&arena, &twin);

    arena.spill(&spilled).unwrap();
    let moved = |from, to| Move { from: BlockId(from), from_slot: 3, to: BlockId(to), to_slot: 30, len: 20 };
    for arena in [&mut arena, &mut twin] {
        arena.apply(&[moved(1, 2), moved(2, 2), moved(2, 3)]).unwrap();
    }
    assert!(arena.is_copied(BlockId(1)) && !arena.is_copied(BlockId(2)) && !arena.is_copied(BlockId(3)));
    same(&arena, &twin);

    arena.spill(&spilled).unwrap();
    let keep: Vec<i64> = (0..2 * 64).map(|i| (i * 7) % 128).collect();
    for arena in [&mut arena, &mut twin] {
        arena.permute(&[whole(4), whole(0)], &keep, &[whole(1)]).unwrap();
    }
    same(&arena, &twin);

    // After a crop to slot 10 of block 2 a step writes on, in a copy that it makes for itself, and in the block itself.
    arena.spill(&spilled).unwrap();
    let (k, v) = (noise.data(HEADS * 3 * DIMS.0, Dtype::F16), noise.data(HEADS * 3 * DIMS.1, Dtype::F16));
    let append = |block, new| Append { row: 0, new, block: BlockId(block), slot: 10, len: 1 };
    let step = Step {
        frame: Frame::Raw,
        num_rows: 1,
        num_queries: 3,
        new_lens: vec![3],
        num_blocks: 6,
        copies: vec![Move { from: BlockId(2), from_slot: 0, to: BlockId(5), to_slot: 0, len: 10 }],
        appends: vec![append(5, 0), append(2, 1), append(4, 2)],
        spans: None,
        parts: Vec::new(),
        residents: None,
        first_new: vec![0],
    };
    for arena in [&mut arena, &mut twin] {
        arena.append(&k.view([1, HEADS, 3, DIMS.0]), &v.view([1, HEADS, 3, DIMS.1]), &step).unwrap();
    }
    same(&arena, &twin);
    assert_eq!(read(&arena, &[run(5, 0, 11)]).unwrap(), gathered(&twin, &[run(5, 0, 11)]).unwrap());
}
