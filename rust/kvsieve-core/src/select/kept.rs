//! What a layer has chosen, and when it must choose again.
//!
//! Between refreshes a choice stands and the window's *start* is frozen, so the window grows by the tokens since: no key falls between
//! them. A query that does not follow the last one (a crop, another row, a forward that is run again) makes the row choose anew.
//! A choice names residents by number, so it outlives whatever moves them without changing their order: packing, for one.

use std::ops::Range;
use std::sync::Arc;

use super::Chosen;
use super::hip::Hip;
use super::infinite::Infinite;
use crate::ids::BLOCK;
use crate::{Error, Result};

/// Which search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Search {
    Hip(Hip),
    Infinite(Infinite),
}

/// What a query reads: sinks, window, and what is chosen between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub search: Search,
    pub sinks: usize,
    pub window: usize,
    /// HiP: choose every so many steps. InfiniteHiP: the same for each stage; a stage brings all later ones with it.
    refresh: Vec<usize>,
}

/// The choice of one row. A clone shares whatever is large.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The position that the next query must have.
    pub next: usize,
    /// Steps since the row chose from all.
    pub step: usize,
    /// What was searched.
    pub region: Range<u32>,
    /// By key-value head.
    pub chosen: Arc<Vec<Chosen>>,
    /// By key-value head, what went into each stage of InfiniteHiP.
    pub inputs: Arc<Vec<Vec<Vec<Range<u32>>>>>,
}

/// The choices of all rows, and those before the last forward, so that it can be undone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    rows: Vec<Choice>,
    before: Option<Vec<Choice>>,
}

impl Choices {
    /// Empty before the first forward.
    pub fn rows(&self) -> &[Choice] {
        &self.rows
    }

    /// Runs a forward of so many rows over the choices. Another number of rows than the last time chooses anew; a forward that fails
    /// leaves all as it was.
    pub fn forward<R>(&mut self, rows: usize, run: impl FnOnce(&mut [Choice]) -> Result<R>) -> Result<R> {
        let mut next = if self.rows.len() == rows { self.rows.clone() } else { vec![Choice::default(); rows] };
        let done = run(&mut next)?;
        self.before = Some(std::mem::replace(&mut self.rows, next));
        Ok(done)
    }

    /// The choices as they were before the last forward. Nothing happens if that has been undone, or made to count, already.
    pub fn undo(&mut self) {
        if let Some(before) = self.before.take() {
            self.rows = before;
        }
    }

    /// Makes the last forward count: it can no longer be undone.
    pub fn commit(&mut self) {
        self.before = None;
    }

    /// Row `i` becomes what row `index[i]` was. Before the first forward there are no rows, and nothing happens.
    pub fn select_rows(&mut self, index: &[usize]) -> Result<()> {
        let have = self.rows.len();
        if have == 0 {
            return Ok(());
        }
        if let Some(bad) = index.iter().find(|&&i| i >= have) {
            return Err(Error::OutOfRange { what: "row", expected: "a row of the last forward", got: bad.to_string() });
        }
        self.return_to(index.iter().map(|&i| self.rows[i].clone()).collect());
        Ok(())
    }

    /// Puts these in place of what was chosen. That is not undone.
    pub fn return_to(&mut self, rows: Vec<Choice>) {
        *self = Choices { rows, before: None };
    }
}

impl Rule {
    pub fn new(search: Search, sinks: usize, window: usize, refresh: Vec<usize>) -> Result<Self> {
        let stages = match &search {
            Search::Hip(_) => 1,
            Search::Infinite(infinite) => infinite.stages().len(),
        };
        if refresh.len() != stages || refresh.contains(&0) {
            let expected = "at least 1, once for HiP and once for each stage of InfiniteHiP";
            return Err(Error::OutOfRange { what: "refresh", expected, got: format!("{refresh:?}") });
        }
        let rule = Rule { search, sinks, window, refresh };
        // The last block that is searched is then a whole one, and the first one is searched whole.
        let fits = sinks.is_multiple_of(BLOCK as usize) && window >= BLOCK as usize;
        if rule.is_bounded() && !fits {
            let expected =
                "whole blocks of sinks and a window of at least one, 64 tokens, where blocks are judged by bounds";
            return Err(Error::OutOfRange { what: "sinks", expected, got: format!("{sinks}, window {window}") });
        }
        Ok(rule)
    }

    /// Whether the search begins with the bounds of blocks.
    pub fn is_bounded(&self) -> bool {
        matches!(&self.search, Search::Infinite(infinite) if infinite.is_bounded())
    }

    /// What queries at `first..first + count` can choose from.
    pub fn region(&self, first: usize, count: usize) -> Result<Range<u32>> {
        let hi = (first + count).saturating_sub(self.window);
        let int = |x: usize| {
            let refused = |_| Error::OutOfRange { what: "position", expected: "below 2^32", got: x.to_string() };
            u32::try_from(x).map_err(refused)
        };
        Ok(int(hi.min(self.sinks))?..int(hi)?)
    }

    /// The stage from which on `count` queries from position `first` on must choose again, if any.
    pub fn due(&self, choice: &Choice, first: usize, count: usize) -> Option<usize> {
        let follows = count == 1 && first > 0 && choice.next == first && !choice.chosen.is_empty();
        // A region that was read whole was not searched, and that is no choice to stand by.
        if !follows || choice.region.len() <= self.most() {
            return Some(0);
        }
        self.refresh.iter().position(|&every| choice.step.is_multiple_of(every))
    }

    /// Tokens that a search finds at most; a region of no more is read whole.
    pub fn most(&self) -> usize {
        match &self.search {
            Search::Hip(hip) => hip.budget,
            Search::Infinite(infinite) => infinite.stages().last().map_or(0, |stage| stage.keep),
        }
    }

    /// The residents that a query at `position` reads of one head, ascending and disjoint; neighbours are joined.
    pub fn read(&self, region: &Range<u32>, chosen: &Chosen, position: usize, each: &mut impl FnMut(Range<u32>)) {
        // Everything from here to the query is its window.
        let start = region.end.min((position + 1).saturating_sub(self.window) as u32);
        let mut open = 0..start.min(self.sinks as u32);
        let mut push = |next: Range<u32>| {
            if next.start <= open.end {
                open.end = open.end.max(next.end);
            } else {
                if !open.is_empty() {
                    each(open.clone());
                }
                open = next;
            }
        };
        for block in chosen.blocks.iter().take_while(|b| b.start < start) {
            push(block.start..block.end.min(start));
        }
        push(start..position as u32 + 1);
        each(open);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Representative;
    use super::super::infinite::Stage;
    use super::*;
    use proptest::prelude::*;

    fn hip(sinks: usize, window: usize, every: usize) -> Rule {
        let hip = Hip { budget: 4, block: 2, representative: Representative::Centre };
        Rule::new(Search::Hip(hip), sinks, window, vec![every]).unwrap()
    }

    fn one() -> Arc<Vec<Chosen>> {
        Arc::new(vec![Chosen::default()])
    }

    #[test]
    fn stages_are_refreshed_each_at_its_pace() {
        let stages = [(8, 64), (4, 32), (2, 8)].map(|(chunk, keep)| Stage { chunk, keep }).to_vec();
        let search = Search::Infinite(Infinite::new(stages, Representative::First, false).unwrap());
        assert!(Rule::new(search.clone(), 0, 1, vec![16, 8]).is_err());
        assert!(Rule::new(search.clone(), 0, 1, vec![16, 8, 0]).is_err());
        let rule = Rule::new(search, 0, 1, vec![16, 8, 4]).unwrap();
        let due = |step: usize| {
            let choice = Choice { next: 100, step, region: 0..99, chosen: one(), ..Choice::default() };
            rule.due(&choice, 100, 1)
        };
        let none = None;
        let four = |first: Option<usize>| [first, none, none, none];
        let want = [four(Some(0)), four(Some(2)), four(Some(1)), four(Some(2)), four(Some(0))].concat();
        assert_eq!((0..20).map(due).collect::<Vec<_>>(), want);
    }

    #[test]
    fn a_query_that_does_not_follow_chooses_anew() {
        let rule = hip(0, 4, 8);
        let choice = Choice { next: 10, step: 3, region: 0..5, chosen: one(), ..Choice::default() };
        assert_eq!(rule.due(&choice, 10, 1), None);
        assert_eq!(rule.due(&choice, 9, 1), Some(0));
        assert_eq!(rule.due(&choice, 10, 2), Some(0));
        assert_eq!(rule.due(&Choice::default(), 0, 1), Some(0));
        let whole = Choice { region: 0..4, ..choice };
        assert_eq!(rule.due(&whole, 10, 1), Some(0), "what was read whole was not searched");
    }

    /// Rows that chose, told apart by where they stand.
    fn at(positions: &[usize]) -> Vec<Choice> {
        positions.iter().map(|&next| Choice { next, chosen: one(), ..Choice::default() }).collect()
    }

    fn positions(choices: &Choices) -> Vec<usize> {
        choices.rows().iter().map(|choice| choice.next).collect()
    }

    fn advance(choices: &mut Choices, rows: usize) {
        let run = |rows: &mut [Choice]| {
            rows.iter_mut().for_each(|row| row.next += 1);
            Ok(())
        };
        choices.forward(rows, run).unwrap();
    }

    #[test]
    fn a_forward_is_undone_once() {
        let mut choices = Choices::default();
        choices.undo();
        assert!(choices.rows().is_empty());
        advance(&mut choices, 2);
        advance(&mut choices, 2);
        assert_eq!(positions(&choices), [2, 2]);
        choices.undo();
        assert_eq!(positions(&choices), [1, 1]);
        choices.undo();
        assert_eq!(positions(&choices), [1, 1], "undone twice");
        advance(&mut choices, 2);
        choices.commit();
        choices.undo();
        assert_eq!(positions(&choices), [2, 2], "what counts is not undone");
        advance(&mut choices, 3);
        assert_eq!(positions(&choices), [1, 1, 1], "other rows choose anew");
        let failed: Result<()> = choices.forward(3, |rows| {
            rows[0].next = 99;
            Err(Error::Interrupted)
        });
        assert_eq!((failed, positions(&choices)), (Err(Error::Interrupted), vec![1, 1, 1]));
        choices.undo();
        assert_eq!(positions(&choices), [2, 2], "the forward before the one that failed");
    }

    #[test]
    fn rows_are_reordered_and_repeated() {
        let mut choices = Choices::default();
        choices.select_rows(&[4, 0]).unwrap();
        choices.return_to(at(&[5, 6, 7]));
        choices.select_rows(&[2, 0, 2, 1]).unwrap();
        assert_eq!(positions(&choices), [7, 5, 7, 6]);
        assert!(Arc::ptr_eq(&choices.rows()[0].chosen, &choices.rows()[2].chosen), "nothing large is copied");
        assert!(matches!(choices.select_rows(&[0, 4]), Err(Error::OutOfRange { .. })));
        assert_eq!(positions(&choices), [7, 5, 7, 6]);
        choices.undo();
        assert_eq!(positions(&choices), [7, 5, 7, 6], "a choice of rows is not undone");
    }

    proptest! {
        /// Sinks, window and choice, key by key; a frozen window included.
        #[test]
        fn what_is_read_is_the_union(
            sinks in 0usize..9, window in 0usize..20, first in 0usize..80, count in 1usize..6, later in 0usize..9, picks: u64,
        ) {
            let rule = hip(sinks, window, 8);
            let region = rule.region(first, count).unwrap();
            let pieces = region.clone().step_by(2).map(|b| b..(b + 2).min(region.end));
            let blocks: Vec<Range<u32>> = pieces.filter(|b| picks >> (b.start / 2 % 64) & 1 == 1).collect();
            let chosen = Chosen { blocks: blocks.clone(), ..Chosen::default() };
            for i in 0..count {
                // With one query the choice may be older than the query.
                let (position, wider) = if count == 1 { (first + later, later) } else { (first + i, 0) };
                let mut got: Vec<u32> = Vec::new();
                let mut joined = true;
                rule.read(&region, &chosen, position, &mut |stretch: Range<u32>| {
                    joined &= got.last().is_none_or(|&last| last + 1 < stretch.start) && !stretch.is_empty();
                    got.extend(stretch);
                });
                let near = |t: u32| (t as usize) < sinks || position - (t as usize) < window + wider;
                let want: Vec<u32> = (0..=position as u32).filter(|&t| near(t) || blocks.iter().any(|b| b.contains(&t))).collect();
                // A window of 0 shows not even the query; `read` then ends with an empty stretch.
                prop_assert_eq!(&got, &want);
                prop_assert!(joined || want.is_empty() || window + wider == 0);
            }
        }
    }
}
