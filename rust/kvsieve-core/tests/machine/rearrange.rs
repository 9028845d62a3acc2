//! Whatever rearranges the residents of a stream between forwards.

use std::collections::BTreeSet;
use std::ops::Range;

use kvsieve_core::Error;
use kvsieve_core::evict::Eviction;
use kvsieve_core::plan::Move;

use super::lists::num_sinks;
use super::ops::Op;
use super::world::{Stream, World, exists};

impl World {
    pub fn rearrange(&mut self, at: usize, op: &Op) {
        let rows = self.streams[at].lists.rows.len();
        match op {
            Op::Settle { force } => self.settle(at, *force),
            Op::Tidy => self.tidy(at),
            Op::Pack { row, share, align } if *row < rows => self.pack(at, *row, *share, *align),
            Op::Keep { memory, row, mask } if *memory < self.specs.len() && *row < rows => {
                self.keep(at, *memory, *row, *mask);
            }
            Op::Pin { row, back, len } if *row < rows => self.pin(at, *row, *back, *len),
            Op::Unpin { row, back, len } if *row < rows => self.unpin(at, *row, *back, *len),
            Op::Evict { row, back, len } if *row < rows => self.evict(at, *row, *back, *len),
            _ => self.rows(at, op),
        }
    }

    fn settle(&mut self, at: usize, force: bool) {
        let Stream { planner, lists } = &mut self.streams[at];
        let moves = planner.settle(force).unwrap();
        assert!(moves.iter().all(|m| exists(planner, m.to)));
        self.store.run(&moves);
        for row in &mut lists.rows {
            row.settle(&self.specs, 0, lists.step, force);
        }
        self.retained = force;
    }

    fn tidy(&mut self, at: usize) {
        let Stream { planner, .. } = &mut self.streams[at];
        // What a block was left with when its first tokens were packed goes to the beginning of one, wherever that is.
        let starts = |m: &Move| m.to_slot == 0 && m.from_slot > 0 && !m.to.is_packed();
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

    fn pack(&mut self, at: usize, row: usize, share: u64, align: u32) {
        let Stream { planner, lists } = &mut self.streams[at];
        let n = lists.rows[row].memories[0].len();
        let (before, upto) = (planner.num_packed(row).unwrap(), n * share as usize / 4);
        let done = planner.pack(row, upto, align, 0);
        assert_eq!(done.is_ok(), self.specs.len() == 1 && upto <= n);
        let Ok(moves) = done else { return };
        assert!(moves.iter().all(|m| m.to.is_packed() && !m.from.is_packed() && exists(planner, m.to)));
        let moved: u32 = moves.iter().map(|m| m.len).sum();
        assert_eq!(moved as usize, upto.saturating_sub(before));
        self.store.run(&moves);
        assert_eq!(planner.num_packed(row).unwrap(), before.max(upto));
    }

    fn keep(&mut self, at: usize, memory: usize, row: usize, mask: u64) {
        let Stream { planner, lists } = &mut self.streams[at];
        let n = lists.rows[row].memories[memory].len();
        let list = &lists.rows[row].memories[memory];
        let pins = if memory == 0 { lists.rows[row].pins.clone() } else { BTreeSet::new() };
        let pinned = |i: &usize| pins.contains(&list[*i].position);
        let mut keep: Vec<usize> = (0..n).filter(|&i| mask >> (i * i % 61) & 1 == 1).collect();
        if (0..n).any(|i| pinned(&i) && !keep.contains(&i)) {
            let refused = planner.keep(memory, row, &keep);
            assert!(matches!(refused, Err(Error::OutOfRange { what: "keep", .. })), "{refused:?}");
            keep = (0..n).filter(|i| pinned(i) || keep.contains(i)).collect();
        }
        if let Eviction::Own { budget } = self.specs[memory].evict {
            let sinks = num_sinks(list, memory, budget.sinks);
            let edge = |i: &usize| *i < sinks || *i + budget.recent >= n || pinned(i);
            let room = budget.total - (0..n).filter(edge).count();
            let middle: Vec<usize> = keep.into_iter().filter(|i| !edge(i)).take(room).collect();
            keep = (0..n).filter(|i| edge(i) || middle.contains(i)).collect();
        }
        let moves = planner.keep(memory, row, &keep).unwrap();
        assert!(moves.iter().all(|m| exists(planner, m.to) && m.to.is_packed() == m.from.is_packed()));
        self.store.run(&moves);
        lists.rows[row].apply(memory, &keep);
        lists.rows[row].settle(&self.specs, memory + 1, lists.step, false);
    }

    fn pin(&mut self, at: usize, row: usize, back: u64, len: u64) {
        let Stream { planner, lists } = &mut self.streams[at];
        let range = span(lists.rows[row].seen, back, len);
        let list = &mut lists.rows[row];
        let (fits, missing) = (list.fits(&self.specs, &range), list.missing(&range));
        match planner.pin(Some(&[row]), &range, false) {
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

    fn unpin(&mut self, at: usize, row: usize, back: u64, len: u64) {
        let Stream { planner, lists } = &mut self.streams[at];
        let range = span(lists.rows[row].seen, back, len);
        planner.unpin(Some(&[row]), &range).unwrap();
        lists.rows[row].pins.retain(|p| !range.contains(p));
    }

    fn evict(&mut self, at: usize, row: usize, back: u64, len: u64) {
        let Stream { planner, lists } = &mut self.streams[at];
        let range = span(lists.rows[row].seen, back, len);
        let moves = planner.evict(Some(&[row]), &range).unwrap();
        assert!(moves.iter().all(|m| exists(planner, m.to) && m.to.is_packed() == m.from.is_packed()));
        self.store.run(&moves);
        lists.rows[row].evict(&range);
        assert!(planner.evict(Some(&[row]), &range).unwrap().is_empty(), "evicting twice does nothing");
    }

    /// What changes whole rows.
    fn rows(&mut self, at: usize, op: &Op) {
        let Stream { planner, lists } = &mut self.streams[at];
        let rows = lists.rows.len();
        match op {
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
            _ => {}
        }
    }
}

/// `len` positions from `back` before `seen` on; less than `back` ahead of it where that many were not seen.
fn span(seen: u64, back: u64, len: u64) -> Range<u64> {
    let start = back.abs_diff(seen);
    start..start + len
}
