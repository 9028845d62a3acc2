//! What a table knows of its residents beside where they lie: positions and scores, in as little memory as they need.

use crate::ids::Position;
use std::borrow::Cow;
use std::ops::Range;

/// Positions, ascending: two numbers as long as none is missing between the first and the last.
#[derive(Clone, Debug)]
pub enum Positions {
    Line(Range<Position>),
    List(Vec<Position>),
}

/// Positions to be read.
#[derive(Clone, Copy, Debug)]
pub enum Ascending<'a> {
    Line { first: Position, len: usize },
    List(&'a [Position]),
}

impl Default for Positions {
    fn default() -> Self {
        Positions::Line(0..0)
    }
}

impl Positions {
    pub(in crate::block) fn len(&self) -> usize {
        self.view().len()
    }

    pub fn view(&self) -> Ascending<'_> {
        match self {
            Positions::Line(line) => Ascending::Line { first: line.start, len: (line.end - line.start) as usize },
            Positions::List(list) => Ascending::List(list),
        }
    }

    fn push(&mut self, position: Position) {
        match self {
            Positions::Line(line) if line.is_empty() => *line = position..position + 1,
            Positions::Line(line) if line.end == position => line.end += 1,
            _ => self.list().push(position),
        }
    }

    /// The positions as a list, whatever they are.
    pub fn list(&mut self) -> &mut Vec<Position> {
        if let Positions::Line(line) = self {
            *self = Positions::List(line.clone().collect());
        }
        match self {
            Positions::List(list) => list,
            Positions::Line(_) => unreachable!("just made a list"),
        }
    }

    pub fn truncate(&mut self, len: usize) {
        match self {
            _ if len == 0 => *self = Positions::default(),
            Positions::Line(line) => line.end = line.end.min(line.start + len as Position),
            Positions::List(list) => list.truncate(len),
        }
    }

    /// Drops the positions of residents `range`.
    pub fn drain(&mut self, range: Range<usize>) {
        let len = self.len();
        match self {
            _ if range.is_empty() => {}
            _ if range.end == len => self.truncate(range.start),
            Positions::Line(line) if range.start == 0 => line.start += range.end as Position,
            _ => drop(self.list().drain(range)),
        }
    }
}

impl Extend<Position> for Positions {
    fn extend<I: IntoIterator<Item = Position>>(&mut self, positions: I) {
        let mut positions = positions.into_iter();
        while let Positions::Line(_) = self {
            let Some(position) = positions.next() else { return };
            self.push(position);
        }
        self.list().extend(positions);
    }
}

impl FromIterator<Position> for Positions {
    fn from_iter<I: IntoIterator<Item = Position>>(positions: I) -> Self {
        let mut found = Positions::default();
        found.extend(positions);
        found
    }
}

impl<'a> Ascending<'a> {
    pub fn len(&self) -> usize {
        match self {
            Ascending::Line { len, .. } => *len,
            Ascending::List(list) => list.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `len` of them.
    pub fn first(self, len: usize) -> Self {
        match self {
            Ascending::Line { first, len: held } => Ascending::Line { first, len: len.min(held) },
            Ascending::List(list) => Ascending::List(&list[..len.min(list.len())]),
        }
    }

    /// The position of resident `index`.
    pub fn at(&self, index: usize) -> Position {
        match self {
            Ascending::Line { first, len } => {
                assert!(index < *len, "resident {index} of {len}");
                first + index as Position
            }
            Ascending::List(list) => list[index],
        }
    }

    /// How many are below `position`.
    pub fn below(&self, position: Position) -> usize {
        match self {
            Ascending::Line { first, len } => {
                usize::try_from(position.saturating_sub(*first)).map_or(*len, |below| below.min(*len))
            }
            Ascending::List(list) => list.partition_point(|&p| p < position),
        }
    }

    /// Those of residents `range`.
    pub fn of(self, range: Range<usize>) -> impl Iterator<Item = Position> + 'a {
        range.map(move |index| self.at(index))
    }

    pub fn to_vec(self) -> Vec<Position> {
        self.of(0..self.len()).collect()
    }
}

/// Scores: a number of residents as long as none of their scores is known. One that is not is NaN.
#[derive(Clone, Debug)]
pub enum Scores {
    Unknown(usize),
    Known(Vec<f32>),
}

impl Default for Scores {
    fn default() -> Self {
        Scores::Unknown(0)
    }
}

impl Scores {
    pub fn at(&self, index: usize) -> f32 {
        match self {
            Scores::Unknown(_) => f32::NAN,
            Scores::Known(list) => list[index],
        }
    }

    pub fn list(&self) -> Cow<'_, [f32]> {
        match self {
            Scores::Unknown(len) => Cow::Owned(vec![f32::NAN; *len]),
            Scores::Known(list) => Cow::Borrowed(list),
        }
    }

    /// To be changed, whether they were known or not.
    pub fn known(&mut self) -> &mut Vec<f32> {
        if let Scores::Unknown(len) = self {
            *self = Scores::Known(vec![f32::NAN; *len]);
        }
        match self {
            Scores::Known(list) => list,
            Scores::Unknown(_) => unreachable!("just made known"),
        }
    }

    /// `more` residents, whose scores are not known.
    pub fn grow(&mut self, more: usize) {
        match self {
            Scores::Unknown(len) => *len += more,
            Scores::Known(list) => list.resize(list.len() + more, f32::NAN),
        }
    }

    /// Those of residents `range` are not known any more.
    pub fn forget(&mut self, range: Range<usize>) {
        if let Scores::Known(list) = self {
            list[range].fill(f32::NAN);
        }
    }

    /// Multiplies them; what is not known stays so.
    pub fn scale(&mut self, factor: f32) {
        if let Scores::Known(list) = self {
            list.iter_mut().for_each(|score| *score *= factor);
        }
    }

    /// How many of the last `of` are not known, counted from the end.
    pub fn unknown_tail(&self, of: usize) -> usize {
        match self {
            Scores::Unknown(len) => of.min(*len),
            Scores::Known(list) => list.iter().rev().take(of).take_while(|score| score.is_nan()).count(),
        }
    }

    pub fn truncate(&mut self, len: usize) {
        match self {
            Scores::Unknown(held) => *held = len.min(*held),
            Scores::Known(list) => list.truncate(len),
        }
    }

    pub fn drain(&mut self, range: Range<usize>) {
        match self {
            Scores::Unknown(len) => *len -= range.len(),
            Scores::Known(list) => drop(list.drain(range)),
        }
    }
}

impl Extend<f32> for Scores {
    fn extend<I: IntoIterator<Item = f32>>(&mut self, scores: I) {
        let mut scores = scores.into_iter();
        while let Scores::Unknown(len) = self {
            match scores.next() {
                None => return,
                Some(score) if score.is_nan() => *len += 1,
                Some(score) => self.known().push(score),
            }
        }
        self.known().extend(scores);
    }
}

impl FromIterator<f32> for Scores {
    fn from_iter<I: IntoIterator<Item = f32>>(scores: I) -> Self {
        let mut found = Scores::default();
        found.extend(scores);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(positions: &Positions, list: &[Position]) {
        let view = positions.view();
        assert_eq!(view.to_vec(), list);
        assert_eq!((view.len(), view.is_empty()), (list.len(), list.is_empty()));
        for at in 0..60 {
            assert_eq!(view.below(at), list.partition_point(|&p| p < at));
        }
        let half = list.len() / 2;
        assert_eq!(view.first(half).to_vec(), list[..half]);
        assert_eq!(view.of(half..list.len()).collect::<Vec<_>>(), list[half..]);
    }

    proptest! {
        /// Whatever is added and dropped, they are what a list would be; and scores too.
        #[test]
        fn they_are_lists(ops in prop::collection::vec((0..4u8, 0..9usize, 0..9usize), 0..24)) {
            let (mut positions, mut list) = (Positions::default(), Vec::new());
            let (mut scores, mut plain) = (Scores::default(), Vec::<f32>::new());
            for (op, a, b) in ops {
                let next = list.last().map_or(3, |p| p + 1);
                match op {
                    0 => {
                        let new = next + (a == 8) as u64;
                        positions.extend(new..new + b as u64);
                        list.extend(new..new + b as u64);
                        scores.grow(b);
                        plain.resize(list.len(), f32::NAN);
                    }
                    1 => {
                        positions.truncate(a * 3);
                        list.truncate(a * 3);
                        scores.truncate(a * 3);
                        plain.truncate(a * 3);
                    }
                    2 => {
                        let lo = a.min(list.len());
                        let range = lo..(lo + b).min(list.len());
                        positions.drain(range.clone());
                        list.drain(range.clone());
                        scores.drain(range.clone());
                        plain.drain(range);
                    }
                    _ if a == 0 => {
                        scores.extend([f32::NAN, 1.0]);
                        plain.extend([f32::NAN, 1.0]);
                        positions.extend([next, next + 1]);
                        list.extend([next, next + 1]);
                    }
                    _ => {
                        scores.scale(0.5);
                        plain.iter_mut().for_each(|s| *s *= 0.5);
                        let lo = a.min(plain.len());
                        scores.forget(lo..plain.len());
                        plain[lo..].fill(f32::NAN);
                    }
                }
                check(&positions, &list);
                prop_assert_eq!(scores.list().len(), plain.len());
                // Which NaN a product of one is, is up to the compiler.
                let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                prop_assert!(scores.list().iter().zip(&plain).all(|(&a, &b)| same(a, b)));
                prop_assert_eq!(scores.unknown_tail(5), plain.iter().rev().take(5).take_while(|s| s.is_nan()).count());
                prop_assert!((0..plain.len()).all(|i| same(scores.at(i), plain[i])));
            }
        }
    }

    #[test]
    fn what_is_consecutive_takes_two_numbers() {
        let mut positions: Positions = (0..1000).collect();
        positions.drain(0..10);
        positions.truncate(500);
        assert!(matches!(&positions, Positions::Line(line) if *line == (10..510)));
        positions.extend([600]);
        assert!(matches!(&positions, Positions::List(list) if list.len() == 501));
    }
}
