//! What does not fit together, and a search that is to stop.

use std::sync::Arc;

use kvsieve_core::Error;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::Level;
use kvsieve_core::kernels::select::{QueryBlock, Selection, select, select_unless};
use kvsieve_core::kernels::sparse::{Scoring, Sparse, SparseRow, attend_sparse};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::{Choice, Chosen, Representative, Rule, Select};
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

use super::rows::{Noise, Row};

#[test]
fn what_does_not_fit_is_refused() {
    let mut noise = Noise(1);
    let row = Row::new(&mut noise, (2, 100, 8), Dtype::F32, true);
    let q = noise.eighths(4 * 2 * 8);
    let good = QueryBlock { row: 0, columns: 0..2, runs: &row.runs, shown: &[], first: 98, region: 0..90 };
    let hip = Hip::new(4, 1, Representative::First).unwrap();
    let infinite =
        Infinite::new(vec![Stage { chunk: 2, keep: 4 }, Stage { chunk: 1, keep: 2 }], Representative::First, false)
            .unwrap();
    let run = |block: QueryBlock<'_>,
               shape: [usize; 4],
               (rule, start): (&dyn Select, usize),
               inputs: usize,
               threads: usize| {
        let q = View::contiguous("q", Elems::F32(&q), shape).unwrap();
        let args = Selection {
            q,
            turn: None,
            blocks: &[block],
            query_stride: 1,
            window: 4,
            rule,
            start,
            threads,
            level: Level::Portable,
        };
        select(&row.arena, &args, &mut vec![Vec::new(); inputs])
    };
    let (by, shape): ((&dyn Select, usize), _) = ((&hip, 0), [1, 4, 2, 8]);
    assert!(run(good.clone(), shape, by, 0, 1).is_ok());
    let shape_error =
        |found: Result<Vec<Chosen>, Error>| assert!(matches!(found, Err(Error::Shape { .. })), "{found:?}");
    shape_error(run(good.clone(), [1, 2, 2, 16], by, 0, 1));
    shape_error(run(good.clone(), [1, 1, 8, 8], by, 0, 1));
    shape_error(run(QueryBlock { row: 1, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(QueryBlock { columns: 1..3, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(QueryBlock { columns: 1..1, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(QueryBlock { region: 0..101, ..good.clone() }, shape, by, 0, 1));
    shape_error(run(good.clone(), shape, by, 1, 1));
    shape_error(run(good.clone(), shape, (&infinite, 1), 0, 1));
    assert!(matches!(run(good.clone(), shape, (&infinite, 1), 2, 1), Err(Error::OutOfRange { .. })));
    assert!(matches!(run(good.clone(), shape, by, 0, 0), Err(Error::OutOfRange { .. })));
    let elsewhere = [Run { block: BlockId(900), lo: 0, hi: 9 }];
    let missing = QueryBlock { runs: &elsewhere, region: 0..3, ..good.clone() };
    assert!(matches!(run(missing, shape, by, 0, 1), Err(Error::BadBlock { .. })));
}

#[test]
fn a_signal_stops_it() {
    let mut noise = Noise(1);
    let row = Row::new(&mut noise, (1, 100, 8), Dtype::F32, true);
    let q = noise.eighths(40 * 8);
    let q = View::contiguous("q", Elems::F32(&q), [1, 1, 40, 8]).unwrap();
    let hip = Hip::new(4, 1, Representative::First).unwrap();
    let block =
        |i: usize| QueryBlock { row: 0, columns: i..i + 1, runs: &row.runs, shown: &[], first: 60 + i, region: 0..40 };
    let blocks: Vec<QueryBlock<'_>> = (0..40).map(block).collect();
    let args = Selection {
        q,
        turn: None,
        blocks: &blocks,
        query_stride: 1,
        window: 4,
        rule: &hip,
        start: 0,
        threads: 1,
        level: Level::Portable,
    };
    assert_eq!(select_unless(&row.arena, &args, &mut [], &|| true), Err(Error::Interrupted));

    let rule = Rule::new(Arc::new(hip), 2, 4, vec![8]).unwrap();
    let args = Sparse {
        q,
        rope: None,
        apply_factor: false,
        scoring: Scoring::Stored,
        consecutive: false,
        rows: &[SparseRow { runs: &row.runs, shown: &[], new_len: 40 }],
        query_block: 16,
        query_stride: 1,
        scale: 1.0,
        softcap: None,
        sinks: None,
        threads: 1,
        level: Level::Portable,
    };
    let mut out = vec![0f32; 40 * 8];
    let mut run = |stops: bool, choices: &mut [Choice]| {
        attend_sparse(&row.arena, &rule, choices, &args, ElemsMut::F32(&mut out), None, &|| stops)
    };
    let mut choices = [Choice::default()];
    assert_eq!(run(true, &mut choices), Err(Error::Interrupted));
    assert_eq!(choices, [Choice::default()], "what was chosen before the signal does not stand");
    assert!(run(false, &mut choices).is_ok());
    assert_eq!(choices[0].next, 100);
}
