//! The memory of one layer: what is appended, moved, gathered and written lies where it should.

use super::common::data::*;
use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::plan::{Append, Frame, Move, Step};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::Dtype;

fn step(rows: usize, queries: usize, new_lens: &[usize], copies: Vec<Move>, appends: Vec<Append>, blocks: u32) -> Step {
    Step {
        frame: Frame::Raw,
        num_rows: rows,
        num_queries: queries,
        new_lens: new_lens.to_vec(),
        num_blocks: blocks,
        copies,
        appends,
        spans: None,
        parts: Vec::new(),
        residents: None,
        first_new: vec![0; rows],
    }
}

fn moved(from: u32, from_slot: u32, to: u32, to_slot: u32, len: u32) -> Move {
    Move { from: BlockId(from), from_slot, to: BlockId(to), to_slot, len }
}

#[test]
fn append_puts_tokens_where_the_step_says() {
    let mut noise = Noise(15);
    for dtype in DTYPES {
        let mut arena = Arena::new(2, 6, 4, dtype).unwrap();
        let (k, v) = (noise.data(2 * 2 * 5 * 6, dtype), noise.data(2 * 2 * 5 * 4, dtype));
        let (k, v) = (k.view([2, 2, 5, 6]), v.view([2, 2, 5, 4]));
        let append = |row, new, block, slot, len| Append { row, new, block: BlockId(block), slot, len };
        let appends = vec![append(0, 0, 7, 62, 2), append(0, 2, 40, 0, 3), append(1, 0, 1, 10, 2)];
        arena.append(&k, &v, &step(2, 5, &[5, 2], vec![], appends, 41)).unwrap();
        let same = |arena: &Arena, block, slot, row, column| {
            for head in 0..2 {
                let key = format!("{:?}", arena.key(BlockId(block), head, slot).unwrap());
                assert_eq!(key, format!("{:?}", k.row(row, head, column)));
                let value = format!("{:?}", arena.value(BlockId(block), head, slot).unwrap());
                assert_eq!(value, format!("{:?}", v.row(row, head, column)));
            }
        };
        same(&arena, 7, 63, 0, 1);
        same(&arena, 40, 2, 0, 4);
        same(&arena, 1, 11, 1, 4);
        // A copy comes before the append that would overwrite its source.
        let again = step(2, 5, &[0, 2], vec![moved(1, 10, 2, 0, 2)], vec![append(1, 0, 1, 11, 1)], 41);
        arena.append(&k, &v, &again).unwrap();
        same(&arena, 2, 1, 1, 4);
        same(&arena, 1, 11, 1, 3);
        // Refused, and nothing written.
        let before = arena.bytes();
        let far = step(2, 5, &[5, 2], vec![], vec![append(0, 0, 90, 0, 1)], 41);
        assert_eq!(arena.append(&k, &v, &far), Err(Error::BadBlock { block: 90, have: 41 }));
        let long = step(2, 5, &[5, 2], vec![], vec![append(1, 1, 7, 0, 2)], 41);
        assert!(matches!(arena.append(&k, &v, &long), Err(Error::OutOfRange { .. })));
        let wide = step(2, 5, &[5, 2], vec![], vec![append(0, 0, 7, 63, 2)], 41);
        assert!(matches!(arena.append(&k, &v, &wide), Err(Error::OutOfRange { .. })));
        assert!(matches!(arena.append(&v, &k, &again), Err(Error::Shape { .. })));
        assert_eq!(arena.bytes(), before);
    }
}

#[test]
fn memory_is_what_was_asked_for() {
    let mut arena = Arena::new(2, 8, 4, Dtype::F32).unwrap();
    let block = 2 * 64 * (8 + 4) * 4;
    assert_eq!(arena.bytes(), 0);
    arena.ensure(5).unwrap();
    assert_eq!((arena.bytes(), arena.num_blocks()), (5 * block, 5));
    arena.ensure(33).unwrap();
    assert_eq!((arena.bytes(), arena.num_blocks()), (33 * block, 33));
    let mut in_use = vec![false; 33];
    in_use[5] = true;
    arena.free_unused(&in_use, &[]);
    assert_eq!((arena.bytes(), arena.num_blocks()), (block, 1));
    assert!(arena.holds(BlockId(5)) && !arena.holds(BlockId(0)) && !arena.holds(BlockId(34)));
    assert!(matches!(arena.apply(&[moved(0, 0, 4, 0, 1)]), Err(Error::BadBlock { block: 0, .. })));
    // A hole is filled again when something is written there.
    arena.apply(&[moved(5, 0, 0, 0, 1), moved(0, 0, 1, 0, 1)]).unwrap();
    assert_eq!(arena.bytes(), block + 2 * block / 8, "of eight slots each");
    // Slots without memory are as good as a block without.
    assert!(matches!(arena.apply(&[moved(0, 7, 1, 0, 2)]), Err(Error::BadBlock { block: 0, .. })));
    assert!(arena.key(BlockId(0), 0, 7).is_ok() && arena.key(BlockId(0), 0, 8).is_err());
    arena.apply(&[moved(5, 9, 0, 8, 56)]).unwrap_err();
    arena.apply(&[moved(5, 8, 0, 8, 56)]).unwrap();
    assert_eq!(arena.bytes(), 2 * block + block / 8);
    assert!(matches!(arena.ensure(u32::MAX), Err(Error::BadBlock { .. })));
    assert!(matches!(Arena::new(0, 8, 4, Dtype::F32), Err(Error::OutOfRange { .. })));
}

#[test]
fn moves_carry_bits_over() {
    let mut noise = Noise(16);
    let mut arena = filled(&mut noise, 2, (8, 8), Dtype::BF16, 6);
    let bits = |arena: &Arena, block: u32, slot: u32| {
        (0..2)
            .map(|h| {
                let at = BlockId(block);
                format!("{:?} {:?}", arena.key(at, h, slot).unwrap(), arena.value(at, h, slot).unwrap())
            })
            .collect::<String>()
    };
    let mut model: Vec<Vec<String>> = (0..6).map(|b| (0..64).map(|s| bits(&arena, b, s)).collect()).collect();
    for _ in 0..1000 {
        let len = noise.below(20) as u32;
        let slot = |noise: &mut Noise| noise.below(65 - len as usize) as u32;
        let m = moved(noise.below(6) as u32, slot(&mut noise), noise.below(6) as u32, slot(&mut noise), len);
        arena.apply(&[m]).unwrap();
        let taken = model[m.from.0 as usize][m.from_slot as usize..][..len as usize].to_vec();
        model[m.to.0 as usize][m.to_slot as usize..][..len as usize].clone_from_slice(&taken);
    }
    for (b, block) in model.iter().enumerate() {
        for (s, token) in block.iter().enumerate() {
            assert_eq!(&bits(&arena, b as u32, s as u32), token);
        }
    }
}

#[test]
fn gather_and_write_are_inverse() {
    let mut noise = Noise(17);
    for dtype in DTYPES {
        let arena = filled(&mut noise, 3, (6, 4), dtype, 5);
        let run = |block, lo, hi| Run { block: BlockId(block), lo, hi };
        let runs = [run(4, 3, 64), run(0, 0, 1), run(2, 5, 5), run(1, 10, 20)];
        let n = 61 + 1 + 10;
        let (mut k, mut v) = (noise.data(3 * n * 6, dtype), noise.data(3 * n * 4, dtype));
        arena.gather(&runs, k.elems_mut(), v.elems_mut(), 0, n).unwrap();
        let mut other = Arena::new(3, 6, 4, dtype).unwrap();
        other.write(&runs, k.elems(), v.elems()).unwrap();
        let (mut k2, mut v2) = (noise.data(3 * (n + 5) * 6, dtype), noise.data(3 * (n + 5) * 4, dtype));
        let untouched = k2.f64s();
        other.gather(&runs, k2.elems_mut(), v2.elems_mut(), 2, n + 5).unwrap();
        let (k, k2) = (k.f64s(), k2.f64s());
        for head in 0..3 {
            let there = &k2[head * (n + 5) * 6..(head + 1) * (n + 5) * 6];
            assert_eq!(there[2 * 6..(2 + n) * 6], k[head * n * 6..(head + 1) * n * 6]);
            assert_eq!(there[..2 * 6], untouched[head * (n + 5) * 6..][..2 * 6]);
            assert_eq!(there[(2 + n) * 6..], untouched[head * (n + 5) * 6..][(2 + n) * 6..(n + 5) * 6]);
        }
        let mut short = noise.data(3 * n * 6, dtype);
        assert!(arena.gather(&runs, short.elems_mut(), v2.elems_mut(), 1, n).is_err());
        assert!(matches!(
            arena.gather(&[run(77, 0, 1)], short.elems_mut(), v2.elems_mut(), 0, n),
            Err(Error::Shape { .. } | Error::BadBlock { .. })
        ));
    }
}
