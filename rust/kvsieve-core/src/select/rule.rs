//! What a query reads, and when it must be selected again.
//!
//! Between refreshes a choice stands and the window's *start* is frozen, so the window grows by the tokens since: no key falls between
//! them. A query that does not follow the last one (a crop, another row, a forward that is run again) makes the row choose anew.

use std::ops::Range;
use std::sync::Arc;

use super::asked::Chosen;
use super::choices::Choice;
use super::selector::Select;
use crate::ids::BLOCK;
use crate::{Error, Result};

/// What a query reads: sinks, window, and what is chosen between them.
#[derive(Clone, Debug)]
pub struct Rule {
    pub select: Arc<dyn Select>,
    pub sinks: usize,
    pub window: usize,
    /// For each stage: compute it every so many steps.
    refresh: Vec<usize>,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        let rest = |rule: &Rule| (rule.sinks, rule.window, rule.refresh.clone());
        *self.select == *other.select && rest(self) == rest(other)
    }
}

impl Rule {
    pub fn new(select: Arc<dyn Select>, sinks: usize, window: usize, refresh: Vec<usize>) -> Result<Self> {
        if refresh.len() != select.num_stages() || refresh.contains(&0) {
            let expected = "at least 1, once for each stage of the selection";
            return Err(Error::OutOfRange { what: "refresh", expected, got: format!("{refresh:?}") });
        }
        let rule = Rule { select, sinks, window, refresh };
        // The first and the last page of every region are then whole.
        let fits = sinks.is_multiple_of(BLOCK as usize) && window >= BLOCK as usize;
        if rule.select.page_bounds() && !fits {
            let expected =
                "whole blocks of sinks and a window of at least one, 64 tokens, where pages are judged by their bounds";
            return Err(Error::OutOfRange { what: "sinks", expected, got: format!("{sinks}, window {window}") });
        }
        Ok(rule)
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
        // A region that was read whole was not selected from, and that is no choice to stand by.
        if !follows || choice.region.len() <= self.select.most() {
            return Some(0);
        }
        self.refresh.iter().position(|&every| choice.step.is_multiple_of(every))
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
    use super::super::hip::Hip;
    use super::super::infinite::{Infinite, Stage};
    use super::super::representative::Representative;
    use super::*;
    use proptest::prelude::*;

    fn hip(sinks: usize, window: usize, every: usize) -> Rule {
        let hip = Hip::new(4, 2, Representative::Middle).unwrap();
        Rule::new(Arc::new(hip), sinks, window, vec![every]).unwrap()
    }

    fn one() -> Arc<Vec<Chosen>> {
        Arc::new(vec![Chosen::default()])
    }

    #[test]
    fn stages_are_refreshed_each_at_its_pace() {
        let stages = [(8, 64), (4, 32), (2, 8)].map(|(chunk, keep)| Stage { chunk, keep }).to_vec();
        let select: Arc<dyn Select> = Arc::new(Infinite::new(stages, Representative::First, false).unwrap());
        assert!(Rule::new(select.clone(), 0, 1, vec![16, 8]).is_err());
        assert!(Rule::new(select.clone(), 0, 1, vec![16, 8, 0]).is_err());
        let rule = Rule::new(select, 0, 1, vec![16, 8, 4]).unwrap();
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
        assert_eq!(rule.due(&whole, 10, 1), Some(0), "what was read whole was not selected from");
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
                rule.read(&region, &chosen, position, &mut |range: Range<u32>| {
                    joined &= got.last().is_none_or(|&last| last + 1 < range.start) && !range.is_empty();
                    got.extend(range);
                });
                let near = |t: u32| (t as usize) < sinks || position - (t as usize) < window + wider;
                let want: Vec<u32> = (0..=position as u32).filter(|&t| near(t) || blocks.iter().any(|b| b.contains(&t))).collect();
                // A window of 0 shows not even the query; `read` then ends with an empty range.
                prop_assert_eq!(&got, &want);
                prop_assert!(joined || want.is_empty() || window + wider == 0);
            }
        }
    }
}
