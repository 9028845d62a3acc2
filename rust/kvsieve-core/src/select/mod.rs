//! Which residents a block of queries reads when everything is kept: selection rules, one a file, without their keys.
//!
//! Residents are numbered in text order. A rule selects from the *region* between sinks and window, for one key-value head; what it
//! must know about keys it asks of a [`Score`]. The Python specification (`kvsieve.backends.reference`) has the algorithms and lists
//! what was decided; both select the same blocks wherever their scores are equal.
//!
//! To add a rule: a file with a type that implements [`Select`] and a function that makes it of [`Parameters`], and its row in
//! [`RULES`]. Nothing else knows a rule by its name.

mod best;
pub mod choices;
pub mod hip;
pub mod infinite;
pub mod parameters;
pub mod representative;
pub mod residents;
pub mod rule;

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::{Error, Result};
pub use choices::{Choice, Choices};
pub use parameters::{Parameter, Parameters};
pub use representative::Representative;
pub use residents::Residents;
pub use rule::Rule;

/// A selection rule.
pub trait Select: Same + Any + Debug + Send + Sync {
    /// Stages that it narrows the region in; each is computed anew at a pace of its own, and brings all later ones with it.
    fn num_stages(&self) -> usize {
        1
    }

    /// Tokens that it selects at most; a region of no more is read whole.
    fn most(&self) -> usize;

    /// Whether it asks for [`Score::bounds`]: then every whole block has its minimum and maximum made before a selection.
    fn page_bounds(&self) -> bool {
        false
    }

    /// Whether it asks for [`Score::bounds`] of this very region: it need not where all blocks stay anyway.
    fn judges_pages(&self, _region: &Range<u32>) -> bool {
        self.page_bounds()
    }

    /// Selects from a region, for one key-value head.
    fn select(&self, asked: Asked<'_>, score: &mut dyn Score) -> Result<Chosen>;
}

/// Every rule, by the name that a caller asks for it.
pub const RULES: &[(&str, Make)] = &[("hip", hip::make), ("infinite", infinite::make)];

/// Makes a rule of the parameters that it takes; all that are left over are refused.
pub type Make = fn(&mut Parameters) -> Result<Arc<dyn Select>>;

/// The rule `name`.
pub fn make(name: &str, mut parameters: Parameters) -> Result<Arc<dyn Select>> {
    let Some((_, make)) = RULES.iter().find(|(known, _)| *known == name) else {
        let (what, expected) = ("selection", "the name of one of the core's rules");
        return Err(Error::OutOfRange { what, expected, got: format!("{name:?}") });
    };
    let rule = make(&mut parameters)?;
    parameters.finish()?;
    Ok(rule)
}

/// What a rule is asked for.
#[derive(Debug)]
pub struct Asked<'a> {
    /// The residents to select from.
    pub region: Range<u32>,
    /// The first stage to compute.
    pub start: usize,
    /// What went into each stage the last time: read for `start`, and written for the later ones. Of no use to a rule of one stage.
    pub inputs: &'a mut Inputs,
}

/// For each stage, the ranges of residents that went into it.
pub type Inputs = Vec<Vec<Range<u32>>>;

/// What one query block reads of one key-value head, between sinks and window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Selected ranges of residents, ascending.
    pub blocks: Vec<Range<u32>>,
    /// Representative keys scored; one that is met twice counts twice, though it may have been read once.
    pub reads: u64,
    /// Levels of the tree, or stages, that were scored.
    pub rounds: u32,
}

/// At which distance the last of a row's queries sees a run of its residents, as [`Span::shift`](crate::plan::Span) and
/// [`Span::rotate_keys`](crate::plan::Span) say it. A query that many residents before it sees rotated keys so much nearer, and others
/// where that one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    pub shift: i64,
    pub rotate_keys: bool,
}

/// The best score of each range of residents.
pub trait Score {
    /// Writes to `out` the best score of each range, `-inf` when none of its keys can be seen. Ranges are not empty, and inside of the
    /// region.
    fn best(&mut self, ranges: &[Range<u32>], out: &mut Vec<f32>);

    /// Writes to `out` what the keys of each of these whole blocks (of [`BLOCK`](crate::ids::BLOCK) residents, counted from the first)
    /// can score at most, `-inf` where no query sees the first of them: `sum over channels of max(q * maximum, q * minimum)`.
    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>);
}

/// Whether two rules of any type are the same; every comparable type can tell.
pub trait Same {
    fn same(&self, other: &dyn Any) -> bool;
}

impl<T: Any + PartialEq> Same for T {
    fn same(&self, other: &dyn Any) -> bool {
        other.downcast_ref::<T>().is_some_and(|other| self == other)
    }
}

impl dyn Select {
    /// [`Select::select`], and refuses what no rule may answer: the kernels go by it.
    pub fn choose(&self, asked: Asked<'_>, score: &mut dyn Score) -> Result<Chosen> {
        let region = asked.region.clone();
        let chosen = self.select(asked, score)?;
        let mut from = region.start;
        for block in &chosen.blocks {
            if block.start < from || block.end <= block.start || block.end > region.end {
                let (what, expected) = ("what a rule selects", "ranges inside the region, ascending, none empty");
                return Err(Error::OutOfRange { what, expected, got: format!("{block:?} of {region:?}") });
            }
            from = block.end;
        }
        Ok(chosen)
    }
}

impl PartialEq for dyn Select {
    fn eq(&self, other: &Self) -> bool {
        self.same(other)
    }
}

/// Scores that are known, for the tests of rules, and what is common to their naive twins.
#[cfg(test)]
pub(crate) mod known {
    use super::Score;
    use crate::ids::BLOCK;
    use std::ops::Range;

    pub struct Known<'a>(pub &'a [f32]);

    impl Score for Known<'_> {
        fn best(&mut self, ranges: &[Range<u32>], out: &mut Vec<f32>) {
            out.clear();
            out.extend(ranges.iter().map(|r| peak(self.0, r.start as usize..r.end as usize)));
        }

        /// As good as bounds can be.
        fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
            let whole = blocks.map(|b| b * BLOCK..((b + 1) * BLOCK).min(self.0.len() as u32));
            self.best(&whole.collect::<Vec<_>>(), out);
        }
    }

    /// Few distinct values, so that ties are met, and some that nobody sees.
    pub fn scores(seed: u64, n: usize, values: u64) -> Vec<f32> {
        let mut state = seed | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let x = (state >> 33) % values;
                if x == 0 { f32::NEG_INFINITY } else { x as f32 - values as f32 / 2.0 }
            })
            .collect()
    }

    pub fn top(scores: &[f32], count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(count);
        order.sort_unstable();
        order
    }

    pub fn peak(scores: &[f32], of: Range<usize>) -> f32 {
        scores[of].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BLOCK;

    #[test]
    fn a_rule_is_made_by_its_name() {
        let hip = || Parameters::of([("budget", 64.into()), ("block", 2.into()), ("representative", "first".into())]);
        let made = make("hip", hip()).unwrap();
        assert_eq!((made.most(), made.num_stages(), made.page_bounds()), (64, 1, false));
        assert!(*made == *make("hip", hip()).unwrap(), "of equal parameters");
        let stages = vec![(BLOCK as usize, 256), (2, 32)];
        let other = [("stages", stages.into()), ("representative", "first".into()), ("page_bounds", true.into())];
        let other = make("infinite", Parameters::of(other)).unwrap();
        assert!(*made != *other);
        assert_eq!((other.most(), other.num_stages(), other.page_bounds()), (32, 2, true));
    }

    /// A rule that answers whatever it was told to.
    #[derive(Debug, PartialEq)]
    struct Parrot(Vec<Range<u32>>);

    impl Select for Parrot {
        fn most(&self) -> usize {
            0
        }

        fn select(&self, _: Asked<'_>, _: &mut dyn Score) -> Result<Chosen> {
            Ok(Chosen { blocks: self.0.clone(), ..Chosen::default() })
        }
    }

    #[test]
    fn a_rule_that_answers_what_it_may_not_is_refused() {
        let answer = |blocks: &[Range<u32>]| {
            let rule: Arc<dyn Select> = Arc::new(Parrot(blocks.to_vec()));
            rule.choose(Asked { region: 4..20, start: 0, inputs: &mut Inputs::new() }, &mut known::Known(&[]))
        };
        assert_eq!(answer(&[4..6, 6..7, 19..20]).unwrap().blocks, [4..6, 6..7, 19..20]);
        for bad in [&[3..5][..], &[19..21], &[8..9, 4..6], &[4..6, 5..7], &[5..5]] {
            assert!(matches!(answer(bad), Err(Error::OutOfRange { .. })), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_in_words() {
        let said = |name, parameters| make(name, parameters).unwrap_err().to_string();
        assert_eq!(
            said("best", Parameters::default()),
            "selection must be the name of one of the core's rules, got \"best\""
        );
        assert_eq!(said("hip", Parameters::default()), "budget must be given, got nothing");
        let hip = |more: &[(&'static str, Parameter)]| {
            let all = [("budget", 64.into()), ("block", 2.into()), ("representative", "first".into())];
            Parameters::of(all.into_iter().chain(more.iter().cloned()))
        };
        assert_eq!(said("hip", hip(&[("pages", 1.into())])), "parameters must be those of the rule, got pages");
        assert_eq!(said("hip", hip(&[("block", "two".into())])), "block must be a count, got \"two\"");
        assert_eq!(said("hip", hip(&[("block", 0.into())])), "block must be at least 1 and below 2^32, got 0");
    }
}
