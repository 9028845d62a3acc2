//! The trait of the rules.

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;

use super::asked::{Asked, Chosen};
use super::score::Score;
use crate::{Error, Result};

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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::asked::Inputs;
    use super::super::known::Known;
    use super::*;

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
        let answer = |blocks: &[(u32, u32)]| {
            let rule: Arc<dyn Select> = Arc::new(Parrot(blocks.iter().map(|&(lo, hi)| lo..hi).collect()));
            rule.choose(Asked { region: 4..20, start: 0, inputs: &mut Inputs::new() }, &mut Known(&[]))
        };
        assert_eq!(answer(&[(4, 6), (6, 7), (19, 20)]).unwrap().blocks, [4..6, 6..7, 19..20]);
        for bad in [&[(3, 5)][..], &[(19, 21)], &[(8, 9), (4, 6)], &[(4, 6), (5, 7)], &[(5, 5)]] {
            assert!(matches!(answer(bad), Err(Error::OutOfRange { .. })), "{bad:?}");
        }
    }
}
