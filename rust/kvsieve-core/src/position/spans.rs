//! Per query: runs of slots with one shift each, for the path on which new tokens are stored before they are read.

use super::view::{Seen, View};
use super::{PositionRule, Rule};
use crate::block::table::Ascending;
use crate::ids::{BlockId, Position, Run};
use crate::plan::{Frame, Span};

/// One memory as one query reads it.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    pub frame: Frame,
    pub rule: &'a Rule,
    pub view: View<'a>,
    /// True position of the query.
    pub query: Position,
    /// Visible keys before the query in this memory and, sinks beyond their window left out, in all earlier ones.
    pub slot: usize,
    /// Keys of later memories, which stand between this one's sinks and its window.
    pub later: usize,
    /// Positions of all keys, new tokens included.
    pub positions: Ascending<'a>,
}

/// Residents `lo..hi` of the table, in consecutive slots of one block.
#[derive(Clone, Copy)]
struct Piece {
    block: BlockId,
    slot: u32,
    lo: usize,
    hi: usize,
}

impl Piece {
    fn of(run: &Run, base: usize, lo: usize, hi: usize) -> Option<Self> {
        let (lo, hi) = (lo.max(base), hi.min(base + run.len() as usize));
        (lo < hi).then(|| Piece { block: run.block, slot: run.lo + (lo - base) as u32, lo, hi })
    }

    fn until(self, hi: usize) -> Self {
        Piece { hi, ..self }
    }

    fn after(self, lo: usize) -> Self {
        Piece { lo, slot: self.slot + (lo - self.lo) as u32, ..self }
    }
}

impl Reader<'_> {
    /// Appends the spans of this memory. Spans before `start` belong to other queries.
    pub fn read(&self, runs: &[Run], start: usize, out: &mut Vec<Span>) {
        let mut base = 0;
        let mut runs = runs.iter().peekable();
        for seen in self.view.seen() {
            while let Some(run) = runs.peek() {
                if let Some(piece) = Piece::of(run, base, seen.lo, seen.hi) {
                    self.place(piece, &seen, start, out);
                }
                let end = base + run.len() as usize;
                if end >= seen.hi {
                    // What is seen next may begin in this run too.
                    break;
                }
                base = end;
                runs.next();
            }
        }
    }

    fn place(&self, piece: Piece, seen: &Seen, start: usize, out: &mut Vec<Span>) {
        match (self.rule.position, self.frame) {
            (PositionRule::Fixed { distance }, _) => push(out, start, piece, distance as i64, false),
            (PositionRule::Capped { distance }, _) if seen.beyond => push(out, start, piece, distance as i64, false),
            (PositionRule::Original | PositionRule::Capped { .. }, Frame::Rotated) => push(out, start, piece, 0, false),
            (PositionRule::InCache, Frame::Raw) => {
                push(out, start, piece, self.by_slot(piece.lo, seen) + i64::from(piece.slot), true);
            }
            (PositionRule::InCache, Frame::Rotated) => self.each_contiguous(piece, |p| {
                push(out, start, p, self.by_slot(p.lo, seen) - self.by_position(p.lo), false);
            }),
            (PositionRule::Original | PositionRule::Capped { .. }, Frame::Raw) => self.each_contiguous(piece, |p| {
                push(out, start, p, self.by_position(p.lo) + i64::from(p.slot), true);
            }),
        }
    }

    fn by_slot(&self, index: usize, seen: &Seen) -> i64 {
        let between = if seen.beyond { self.later } else { 0 };
        (self.slot + between) as i64 - (seen.rank + index - seen.lo) as i64
    }

    fn by_position(&self, index: usize) -> i64 {
        self.query as i64 - self.positions.at(index) as i64
    }

    /// Splits where true positions jump.
    fn each_contiguous(&self, mut piece: Piece, mut each: impl FnMut(Piece)) {
        let p = self.positions;
        if p.at(piece.hi - 1) - p.at(piece.lo) == (piece.hi - 1 - piece.lo) as u64 {
            return each(piece);
        }
        for cut in piece.lo + 1..piece.hi {
            if p.at(cut) != p.at(cut - 1) + 1 {
                each(piece.until(cut));
                piece = piece.after(cut);
            }
        }
        each(piece);
    }
}

fn push(out: &mut Vec<Span>, start: usize, piece: Piece, shift: i64, rotate_keys: bool) {
    let hi = piece.slot + (piece.hi - piece.lo) as u32;
    if let Some(last) = out[start..].last_mut()
        && last.block == piece.block
        && last.hi == piece.slot
        && last.shift == shift
        && last.rotate_keys == rotate_keys
    {
        last.hi = hi;
        return;
    }
    out.push(Span { block: piece.block, lo: piece.slot, hi, shift, rotate_keys });
}
