//! A row's residents as a step leaves them, for a selection over all of them.

use crate::ids::Run;
use crate::plan::{Append, Frame, Part, Placing, Span, Spans, Step};
use crate::{Error, Result};

/// At which distance the last of a row's queries sees a run of its residents, as [`Span::shift`](crate::plan::Span) and
/// [`Span::rotate_keys`](crate::plan::Span) say it. A query that many residents before it sees rotated keys so much nearer, and others
/// where that one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    pub shift: i64,
    pub rotate_keys: bool,
}

/// A row's residents after the step, in text order, and where its last query sees them.
#[derive(Debug, Default)]
pub struct Residents {
    pub runs: Vec<Run>,
    /// Empty where all keys are read as they lie.
    pub shown: Vec<Shown>,
}

/// Why nothing can be selected from a row.
const SLIDES: Error = Error::Unsupported("a selection needs a memory that shows every query all that stands before it");
const UNORDERED: Error =
    Error::Unsupported("a selection needs one memory, whose tokens stand in the order of the text");

/// Where the step copies `tail` to, which others read too, so that `new` can stand behind it. Parts name the tail as it was before: read
/// there, one block of the text would lie in two.
fn copied(step: &Step, tail: Run, new: &Append) -> Option<Run> {
    let mut mine = step.copies.iter().filter(|m| (m.from, m.from_slot, m.len) == (tail.block, tail.lo, tail.len()));
    let copy = mine.find(|m| m.to == new.block && m.to_slot + m.len == new.slot)?;
    Some(Run { block: copy.to, lo: copy.to_slot, hi: new.slot })
}

/// The runs of `part` with the row's new tokens.
fn with_new(step: &Step, row: usize, part: &Part) -> Vec<Run> {
    let mut whole = part.runs.clone();
    for new in step.appends.iter().filter(|a| a.row == row) {
        if let Some(tail) = whole.last_mut() {
            *tail = copied(step, *tail, new).unwrap_or(*tail);
        }
        match whole.last_mut() {
            Some(tail) if tail.block == new.block && tail.hi == new.slot => tail.hi += new.len,
            _ => whole.push(Run { block: new.block, lo: new.slot, hi: new.slot + new.len }),
        }
    }
    whole
}

impl Residents {
    /// Refuses a row whose queries do not all see everything that stands before them, in the order of the text.
    pub fn of(step: &Step, row: usize) -> Result<Self> {
        if step.new_lens[row] == 0 {
            return Ok(Residents::default());
        }
        match &step.spans {
            Some(spans) => Residents::of_spans(step, spans, row),
            None => Residents::of_part(step, row),
        }
    }

    fn of_spans(step: &Step, spans: &Spans, row: usize) -> Result<Self> {
        let item = |behind: usize| {
            let item = (row + 1) * spans.num_queries - 1 - behind;
            &spans.spans[spans.starts[item] as usize..spans.starts[item + 1] as usize]
        };
        let mine = item(0);
        // Raw keys tell how far they are away, and text order is from far to near.
        let ordered = |pair: &[Span]| {
            let known = pair.iter().all(|span| span.rotate_keys);
            !known || pair[0].shift - i64::from(pair[0].hi) >= pair[1].shift - i64::from(pair[1].lo)
        };
        if !mine.windows(2).all(ordered) {
            return Err(UNORDERED);
        }
        for behind in 1..step.new_lens[row] {
            let (theirs, mut left) = (item(behind), behind as u32);
            // What the last query sees more: as many tokens as it is later.
            let mut num = mine.len();
            while num > 0 && mine[num - 1].hi - mine[num - 1].lo <= left {
                left -= mine[num - 1].hi - mine[num - 1].lo;
                num -= 1;
            }
            let same = |(i, (a, b)): (usize, (&Span, &Span))| {
                let hi = if i + 1 == num { a.hi - left } else { a.hi };
                let shift = if a.rotate_keys { a.shift - behind as i64 } else { a.shift };
                (a.block, a.lo, hi, shift, a.rotate_keys) == (b.block, b.lo, b.hi, b.shift, b.rotate_keys)
            };
            if theirs.len() != num || !mine.iter().zip(theirs).enumerate().all(same) {
                return Err(SLIDES);
            }
        }
        let runs = mine.iter().map(|s| Run { block: s.block, lo: s.lo, hi: s.hi }).collect();
        let shown = mine.iter().map(|s| Shown { shift: s.shift, rotate_keys: s.rotate_keys }).collect();
        Ok(Residents { runs, shown }.plain(step.frame))
    }

    fn of_part(step: &Step, row: usize) -> Result<Self> {
        let mut parts = step.parts.iter().filter(|part| part.row == row);
        let (Some(part), None) = (parts.next(), parts.next()) else { return Err(SLIDES) };
        let near = part.query_true.last().zip(part.key_true.first()).is_some_and(|(q, k)| q - k < part.near);
        if !near || part.far > 0 || part.top_k > 0 {
            return Err(SLIDES);
        }
        let whole = with_new(step, row, part);
        let stored: usize = whole.iter().map(|run| run.len() as usize).sum();
        if stored != part.key_true.len() || part.query_true.len() != step.new_lens[row] {
            return Err(SLIDES);
        }
        let (keys, queries) = (&part.key_positions, &part.query_positions);
        // How much further every key is than where the model put it, and where it put the queries.
        let moved = |i: usize| queries[i] - part.query_true[i];
        let last = queries.len() - 1;
        let even = match (step.frame, part.placing) {
            (Frame::Rotated, _) => (0..last).all(|i| moved(i) == moved(last)),
            (Frame::Raw, Placing::Relative) => queries.windows(2).all(|w| w[1] == w[0] + 1),
            (Frame::Raw, Placing::Fixed(_)) => true,
        };
        if !even {
            return Err(SLIDES);
        }
        let shown = |key: usize, slot: u32| match (step.frame, part.placing) {
            (_, Placing::Fixed(distance)) => Shown { shift: distance, rotate_keys: false },
            (Frame::Rotated, Placing::Relative) => {
                Shown { shift: moved(last) - (keys[key] - part.key_true[key]), rotate_keys: false }
            }
            (Frame::Raw, Placing::Relative) => {
                Shown { shift: queries[last] - keys[key] + i64::from(slot), rotate_keys: true }
            }
        };
        let mut all = Residents::default();
        let mut key = 0;
        for run in whole {
            for slot in run.lo..run.hi {
                let here = shown(key, slot);
                match all.runs.last_mut() {
                    Some(open) if slot > run.lo && all.shown.last() == Some(&here) => open.hi += 1,
                    _ => {
                        all.runs.push(Run { block: run.block, lo: slot, hi: slot + 1 });
                        all.shown.push(here);
                    }
                }
                key += 1;
            }
        }
        Ok(all.plain(step.frame))
    }

    /// Forgets where keys are seen, if all are read as the model rotated them.
    fn plain(mut self, frame: Frame) -> Self {
        if frame == Frame::Rotated && self.shown.iter().all(|shown| shown.shift == 0) {
            self.shown.clear();
        }
        self
    }
}
