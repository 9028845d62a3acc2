//! What the rows of a layer have chosen.
//!
//! A choice names residents by number, so it outlives whatever moves them without changing their order: packing, for one.

use std::ops::Range;
use std::sync::Arc;

use super::asked::{Chosen, Inputs};
use crate::{Error, Result};

/// The choice of one row. A clone shares whatever is large.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The position that the next query must have.
    pub next: usize,
    /// Steps since the row chose from all.
    pub step: usize,
    /// What was selected from.
    pub region: Range<u32>,
    /// By key-value head.
    pub chosen: Arc<Vec<Chosen>>,
    /// By key-value head, what went into each stage.
    pub inputs: Arc<Vec<Inputs>>,
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

    /// What a forward of so many rows goes on from. Another number of rows than the last time chooses anew.
    pub fn next(&self, rows: usize) -> Vec<Choice> {
        if self.rows.len() == rows { self.rows.clone() } else { vec![Choice::default(); rows] }
    }

    /// What a forward made of [`Choices::next`]. One that fails says nothing, which leaves all as it was.
    pub fn chosen(&mut self, next: Vec<Choice>) {
        self.before = Some(std::mem::replace(&mut self.rows, next));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Arc<Vec<Chosen>> {
        Arc::new(vec![Chosen::default()])
    }

    /// Rows that chose, told apart by where they stand.
    fn at(positions: &[usize]) -> Vec<Choice> {
        positions.iter().map(|&next| Choice { next, chosen: one(), ..Choice::default() }).collect()
    }

    fn positions(choices: &Choices) -> Vec<usize> {
        choices.rows().iter().map(|choice| choice.next).collect()
    }

    fn advance(choices: &mut Choices, rows: usize) {
        let mut next = choices.next(rows);
        next.iter_mut().for_each(|row| row.next += 1);
        choices.chosen(next);
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
        choices.next(3)[0].next = 99;
        assert_eq!(positions(&choices), [1, 1, 1], "a forward that fails");
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
}
