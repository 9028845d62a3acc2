//! Keys that are scored as they lie.

use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::select::{QueryBlock, Selection, select};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::{Chosen, Representative};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::{Dtype, Elems, View};

use super::rows::{Data, Noise, Row, chosen, rules};

#[test]
fn the_kernel_chooses_what_the_scores_say() {
    let mut noise = Noise(7);
    for round in 0..120 {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][round % 3];
        let dim = [1, 5, 16, 33, 64, 96, 128][noise.below(7)];
        let (kv_heads, group) = (1 + noise.below(3), 1 + noise.below(8));
        let n = 1 + noise.below(500);
        let row = Row::new(&mut noise, (kv_heads, n, dim), dtype, round % 2 == 0);
        let columns = (1 + noise.below(20)).min(n);
        let heads = kv_heads * group;
        let q = noise.eighths(heads * columns * dim);
        let data = Data::of(&q, dtype);
        let view = View::contiguous("q", data.elems(), [1, heads, columns, dim]).unwrap();
        let window = noise.below(n + 5);
        // Query blocks of a few columns each, the last of which may be shorter.
        let size = 1 + noise.below(columns);
        let blocks: Vec<QueryBlock<'_>> = (0..columns)
            .step_by(size)
            .map(|at| {
                let columns_here = at..(at + size).min(columns);
                let first = n - columns + at;
                let hi = (first + columns_here.len()).saturating_sub(window) as u32;
                let region = hi.min(noise.below(6) as u32)..hi;
                QueryBlock { row: 0, columns: columns_here, runs: &row.runs, shown: &[], first, region }
            })
            .collect();
        let (hip, infinite) = rules(&mut noise);
        let known = |block: &QueryBlock<'_>, head: usize| {
            let queries: Vec<Vec<&[f32]>> = block
                .columns
                .clone()
                .map(|c| (0..group).map(|g| &q[((head * group + g) * columns + c) * dim..][..dim]).collect())
                .collect();
            row.known(head, &queries, block.first, window)
        };
        let each = || blocks.iter().flat_map(|b| (0..kv_heads).map(move |h| (b, h)));
        let want: Vec<Chosen> =
            each().map(|(b, h)| chosen(&hip, b.region.clone(), &mut Vec::new(), &mut known(b, h))).collect();
        let mut cache = vec![Vec::new(); blocks.len() * kv_heads];
        let staged: Vec<Chosen> = each()
            .zip(&mut cache)
            .map(|((b, h), cache)| chosen(&infinite, b.region.clone(), cache, &mut known(b, h)))
            .collect();
        for level in levels() {
            for threads in [1, 2] {
                let (q, blocks, turn) = (view, &blocks, None);
                let args = Selection { q, turn, blocks, query_stride: 1, window, rule: &hip, start: 0, threads, level };
                assert_eq!(select(&row.arena, &args, &mut []).unwrap(), want, "{level:?} {dtype:?} {dim} {hip:?}");
                let args = Selection { rule: &infinite, ..args };
                let mut inputs = vec![Vec::new(); cache.len()];
                assert_eq!(select(&row.arena, &args, &mut inputs).unwrap(), staged, "{level:?} {dtype:?} {infinite:?}");
                assert_eq!(inputs, cache);
                for start in 1..infinite.stages().len() {
                    let args = Selection { rule: &infinite, start, ..args };
                    let again = select(&row.arena, &args, &mut inputs).unwrap();
                    let blocks = |all: &[Chosen]| all.iter().map(|c| c.blocks.clone()).collect::<Vec<_>>();
                    assert_eq!(blocks(&again), blocks(&staged));
                    assert_eq!(inputs, cache);
                }
            }
        }
    }
}

#[test]
fn a_key_of_nan_is_never_chosen() {
    let mut noise = Noise(1);
    let mut arena = Arena::new(1, 64, 64, Dtype::F32).unwrap();
    let mut keys = noise.eighths(64 * 64);
    keys[..40 * 64].fill(f32::NAN);
    let run = [Run { block: BlockId(0), lo: 0, hi: 64 }];
    arena.write(&run, Elems::F32(&keys), Elems::F32(&keys)).unwrap();
    let q = noise.eighths(64);
    let hip = Hip::new(16, 1, Representative::Oracle).unwrap();
    for level in levels() {
        let blocks = [QueryBlock { row: 0, columns: 0..1, runs: &run, shown: &[], first: 63, region: 0..64 }];
        let q = View::contiguous("q", Elems::F32(&q), [1, 1, 1, 64]).unwrap();
        let args = Selection {
            q,
            turn: None,
            blocks: &blocks,
            query_stride: 1,
            window: 0,
            rule: &hip,
            start: 0,
            threads: 1,
            level,
        };
        let found = select(&arena, &args, &mut []).unwrap();
        assert_eq!(found[0].blocks.len(), 16);
        assert!(found[0].blocks.iter().all(|b| b.start >= 40));
    }
}
