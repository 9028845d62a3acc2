//! The step protocol, and every mistake a caller can make.

use super::common::{Store, chains, manual, memory, planner, surprisal, window};
use kvsieve_core::Error;
use kvsieve_core::evict::Eviction;
use kvsieve_core::ids::Run;
use kvsieve_core::plan::Frame;
use kvsieve_core::planner::{MemorySpec, Planner, RowState};
use kvsieve_core::position::PositionRule;

fn feed(planner: &mut Planner, lens: &[usize]) {
    planner.begin(lens, *lens.iter().max().unwrap(), true, false).unwrap();
    planner.commit().unwrap();
}

fn all() -> Planner {
    planner((Frame::Rotated, vec![memory(Eviction::KeepAll, PositionRule::Original)]))
}

type Snapshot = (usize, u64, u32, Vec<bool>, Vec<(Vec<Run>, Vec<u64>)>);

fn snapshot(p: &Planner) -> Snapshot {
    let rows = (0..p.num_rows()).map(|r| (p.runs(0, r).unwrap().to_vec(), p.positions(0, r).unwrap().to_vec()));
    let mut in_use = p.blocks_in_use();
    in_use.truncate(p.num_blocks() as usize);
    (p.num_rows(), p.columns(), p.num_blocks(), in_use, rows.collect())
}

#[test]
fn an_interrupted_step_leaves_everything_as_before() {
    let mut planner = all();
    let empty = snapshot(&planner);
    planner.begin(&[5, 3], 5, true, true).unwrap();
    planner.rollback().unwrap();
    assert_eq!(snapshot(&planner), empty);
    feed(&mut planner, &[100, 10]);
    planner.select_rows(&[0, 0, 1]).unwrap();
    let before = snapshot(&planner);
    planner.begin(&[70, 1, 300], 300, true, true).unwrap();
    planner.rollback().unwrap();
    assert_eq!(snapshot(&planner), before);
    planner.begin(&[70, 1, 300], 300, true, true).unwrap();
    let step = planner.begin(&[1, 1, 1], 1, true, true).unwrap();
    assert_eq!(step.first_new, [100, 100, 10]);
    planner.rollback().unwrap();
    assert_eq!(snapshot(&planner), before);
}

#[test]
fn a_fork_that_leaves_meanwhile_does_not_break_the_way_back() {
    let mut planner = all();
    let mut store = Store::default();
    let step = planner.begin(&[70], 70, true, false).unwrap();
    store.append(&step, |_, new| new as u64);
    planner.commit().unwrap();
    let fork = planner.fork().unwrap();
    let step = planner.begin(&[60], 60, true, false).unwrap();
    assert_eq!(step.copies.len(), 1);
    store.append(&step, |_, _| u64::MAX);
    drop(fork);
    planner.rollback().unwrap();
    assert_eq!(planner.used_blocks(), 2);
    assert!(store.read(planner.runs(0, 0).unwrap()).into_iter().eq(0..70));
}

#[test]
fn a_lone_window_stores_only_what_survives() {
    let mut planner = planner((Frame::Rotated, vec![memory(window(4, 10), PositionRule::Original)]));
    let step = planner.begin(&[1000, 12], 1000, false, false).unwrap();
    assert!(step.spans.is_none() && !step.parts.is_empty());
    planner.commit().unwrap();
    assert!(planner.settle(false).unwrap().is_empty());
    assert_eq!(planner.positions(0, 0).unwrap(), [0, 1, 2, 3, 990, 991, 992, 993, 994, 995, 996, 997, 998, 999]);
    assert_eq!(planner.resident(0, 1).unwrap(), 12);
    assert_eq!(planner.used_blocks(), 2);
}

#[test]
fn lowest_block_comes_first_and_crop_frees() {
    let mut planner = all();
    feed(&mut planner, &[200]);
    assert_eq!((planner.used_blocks(), planner.num_blocks()), (4, 4));
    planner.crop(150).unwrap();
    assert_eq!((planner.used_blocks(), planner.num_blocks(), planner.columns()), (1, 1, 50));
    let step = planner.begin(&[20], 20, true, false).unwrap();
    let places: Vec<_> = step.appends.iter().map(|a| (a.new, a.block.0, a.slot, a.len)).collect();
    assert_eq!(places, [(0, 0, 50, 14), (14, 1, 0, 6)]);
}

#[test]
fn crop_checks_all_rows_first() {
    let mut planner = all();
    feed(&mut planner, &[20, 5]);
    assert_eq!(planner.crop(6), Err(Error::CropTooLong { row: 1, asked: 6, seen: 5 }));
    assert_eq!(planner.resident(0, 0).unwrap(), 20);
    planner.crop_rows(&[7, 5]).unwrap();
    assert_eq!((planner.seen(0).unwrap(), planner.seen(1).unwrap(), planner.columns()), (13, 0, 20));
    assert_eq!(all().crop(1), Err(Error::CropTooLong { row: 0, asked: 1, seen: 0 }));
}

#[test]
fn restore_takes_up_where_a_stream_was() {
    let (frame, memories) = chains().swap_remove(5);
    let mut planner = Planner::new(memories, frame).unwrap();
    let row = RowState { seen: 90, memories: vec![(vec![0, 1, 80, 89], vec![1.; 4]), (vec![7], vec![f32::NAN])] };
    let twisted = RowState { memories: vec![(vec![3, 1], vec![0.; 2]), (vec![], vec![])], ..row.clone() };
    assert!(matches!(planner.restore(90, &[twisted]), Err(Error::OutOfRange { what: "positions", .. })));
    assert!(planner.restore(80, std::slice::from_ref(&row)).is_err());
    planner.restore(90, std::slice::from_ref(&row)).unwrap();
    assert_eq!(planner.positions(0, 0).unwrap(), [0, 1, 80, 89]);
    assert_eq!(planner.begin(&[1], 1, true, false).unwrap().first_new, [90]);
    planner.commit().unwrap();
    assert!(matches!(planner.restore(90, &[row]), Err(Error::Unsupported(_))));
}

#[test]
fn pending_tokens_outlive_a_settle() {
    let mut planner = planner((Frame::Raw, vec![memory(surprisal(4, 1, 0, false), PositionRule::InCache)]));
    feed(&mut planner, &[6]);
    planner.set_scores(0, &[5., 4., 3., 2., 1., f32::NAN]).unwrap();
    planner.settle(true).unwrap();
    assert_eq!(planner.positions(0, 0).unwrap(), [0, 1, 2, 5]);
    feed(&mut planner, &[1]);
    planner.settle(true).unwrap();
    assert_eq!(planner.positions(0, 0).unwrap(), [0, 1, 2, 6]);
}

#[test]
fn mistakes_are_errors() {
    let mut planner = planner((Frame::Raw, vec![memory(manual(6, 1, 2), PositionRule::InCache)]));
    assert!(planner.begin(&[], 1, true, false).is_err());
    assert!(planner.begin(&[3], 2, true, false).is_err());
    assert_eq!(planner.commit(), Err(Error::NoStep { what: "commit" }));
    assert_eq!(planner.rollback(), Err(Error::NoStep { what: "rollback" }));
    feed(&mut planner, &[8]);
    assert_eq!(planner.begin(&[1, 1], 1, true, false).err(), Some(Error::RowMismatch { have: 1, got: 2 }));
    for bad in [&[0, 2, 1, 6, 7][..], &[0, 6, 8], &[1, 6, 7], &[0, 7], &[0, 1, 2, 3, 4, 6, 7], &[]] {
        assert!(matches!(planner.keep(0, 0, bad), Err(Error::OutOfRange { what: "keep", .. })), "{bad:?}");
    }
    assert!(planner.keep(1, 0, &[]).is_err() && planner.keep(0, 1, &[]).is_err());
    assert!(planner.set_scores(0, &[0.; 9]).is_err() && planner.set_scores(1, &[]).is_err());
    assert!(planner.decay(&[1., 1.]).is_err() && planner.decay(&[f32::NAN]).is_err());
    assert!(planner.select_rows(&[1]).is_err() && planner.select_rows(&[]).is_err());
    planner.begin(&[1], 1, true, false).unwrap();
    assert_eq!(planner.select_rows(&[0]), Err(Error::StepOpen { what: "select_rows" }));
    planner.rollback().unwrap();
    planner.keep(0, 0, &[0, 3, 6, 7]).unwrap();
    assert_eq!(planner.positions(0, 0).unwrap(), [0, 3, 6, 7]);
}

#[test]
fn chains_that_cannot_be_right() {
    let new = |frame, memories: Vec<MemorySpec>| Planner::new(memories, frame).err();
    let unsupported = |e: Option<Error>| matches!(e, Some(Error::Unsupported(_)));
    let all = |place| memory(Eviction::KeepAll, place);
    assert!(matches!(new(Frame::Raw, vec![]), Some(Error::OutOfRange { what: "memories", .. })));
    assert!(unsupported(new(Frame::Rotated, vec![all(PositionRule::Fixed { distance: 4 })])));
    assert!(unsupported(new(Frame::Rotated, vec![all(PositionRule::Capped { distance: 4 })])));
    assert!(unsupported(new(Frame::Rotated, vec![memory(surprisal(9, 1, 1, false), PositionRule::InCache)])));
    assert!(unsupported(new(Frame::Raw, vec![MemorySpec { top_k: 3, ..all(PositionRule::Original) }])));
    assert!(matches!(
        new(Frame::Raw, vec![memory(window(1, 0), PositionRule::Original)]),
        Some(Error::OutOfRange { .. })
    ));
    assert!(new(Frame::Raw, vec![MemorySpec { visible: Some(0), ..all(PositionRule::Original) }]).is_some());
    assert!(new(Frame::Raw, vec![all(PositionRule::Fixed { distance: u64::MAX })]).is_some());
    let small = new(Frame::Raw, vec![memory(surprisal(3, 2, 2, false), PositionRule::Original)]);
    assert_eq!(small, Some(Error::BudgetTooSmall { budget: 3, sinks: 2, recent: 2 }));
    assert!(new(Frame::Rotated, vec![memory(surprisal(9, 1, 1, false), PositionRule::Original)]).is_none());
}

#[test]
fn pins_of_a_far_row_are_refused_by_an_input_without_it() {
    let far = usize::MAX;
    let mut planner = planner((Frame::Rotated, vec![memory(surprisal(20, 2, 4, false), PositionRule::Original)]));
    planner.pin(Some(&[far, 1]), &(3..5), false).unwrap();
    assert!(matches!(planner.pin(Some(&[far - 1]), &(0..20), false), Err(Error::PinsTooMany { .. })));
    let refused = planner.begin(&[4, 4], 4, true, false);
    assert!(matches!(refused, Err(Error::OutOfRange { what: "a row with pins of its own", .. })), "{refused:?}");
    assert_eq!(planner.num_rows(), 0);
    planner.unpin(Some(&[far]), &(3..5)).unwrap();
    planner.begin(&[4, 4], 4, true, false).unwrap();
    assert_eq!(
        (planner.pins(0).unwrap().ranges(), planner.pins(1).unwrap().ranges()),
        (&[][..], std::slice::from_ref(&(3..5)))
    );
}

#[test]
fn a_forward_beyond_all_reason_is_refused_before_it_is_planned() {
    let mut planner = all();
    for (lens, columns) in [(&[usize::MAX][..], usize::MAX), (&[1 << 25, 1], 1 << 25), (&[1], 1 << 26)] {
        let refused = planner.begin(lens, columns, true, true);
        assert!(matches!(refused, Err(Error::OutOfRange { what: "a forward", .. })), "{refused:?}");
    }
    feed(&mut planner, &[3]);
}
