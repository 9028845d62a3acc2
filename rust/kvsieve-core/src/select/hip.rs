//! HiP: a beam search over an implicit binary tree of blocks (Lee et al., ICLR 2025).

use std::sync::Arc;

use super::asked::{Asked, Chosen};
use super::best::Best;
use super::parameters::Parameters;
use super::representative::Representative;
use super::score::Score;
use super::selector::Select;
use crate::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hip {
    /// Tokens to select, sinks and window not counted.
    budget: usize,
    /// Tokens of a block, which is selected or left as a whole.
    block: usize,
    representative: Representative,
}

/// HiP of the parameters `budget`, `block` and `representative`.
pub(super) fn make(of: &mut Parameters) -> Result<Arc<dyn Select>> {
    let (budget, block) = (of.count("budget")?, of.count("block")?);
    Ok(Arc::new(Hip::new(budget, block, Representative::parse(&of.text("representative")?)?)?))
}

/// Some blocks in a row, and the score of the block that speaks for them.
#[derive(Clone, Copy)]
struct Node {
    lo: u32,
    hi: u32,
    /// The blocks that speak for it.
    by: (u32, u32),
    score: f32,
}

impl Hip {
    pub fn new(budget: usize, block: usize, representative: Representative) -> Result<Self> {
        for (what, n) in [("budget", budget), ("block", block)] {
            if n == 0 || u32::try_from(n).is_err() {
                return Err(Error::OutOfRange { what, expected: "at least 1 and below 2^32", got: n.to_string() });
            }
        }
        Ok(Hip { budget, block, representative })
    }

    /// The blocks that speak for `lo..hi`.
    fn speaks(&self, lo: u32, hi: u32) -> (u32, u32) {
        let at = match self.representative {
            Representative::Oracle => return (lo, hi),
            Representative::Middle => lo + (hi - lo) / 2,
            Representative::First => lo,
            Representative::Last => hi - 1,
        };
        (at, at + 1)
    }
}

impl Select for Hip {
    fn most(&self) -> usize {
        self.budget
    }

    fn select(&self, asked: Asked<'_>, score: &mut dyn Score) -> Result<Chosen> {
        let region = asked.region;
        let (n, block) = (region.len(), self.block as u32);
        let (num, width) = (n.div_ceil(self.block), self.budget.div_ceil(self.block));
        let tokens = |lo: u32, hi: u32| region.start + lo * block..(region.start + hi * block).min(region.end);
        if n <= self.budget || num <= width {
            let blocks = (0..num as u32).map(|b| tokens(b, b + 1)).collect();
            return Ok(Chosen { blocks, ..Chosen::default() });
        }

        let bound = |j: usize| (num as u64 * j as u64 / width as u64) as u32;
        let node = |j: usize| Node { lo: bound(j), hi: bound(j + 1), by: (0, 0), score: f32::NAN };
        let mut nodes: Vec<Node> = (0..width).map(node).collect();
        let mut children: Vec<Node> = Vec::with_capacity(2 * width);
        let (mut asked, mut answers, mut all) = (Vec::new(), Vec::new(), Vec::new());
        let mut best = Best::new();
        let mut chosen = Chosen::default();
        while nodes.iter().any(|node| node.hi - node.lo > 1) {
            children.clear();
            asked.clear();
            for node in &nodes {
                let middle = node.lo + (node.hi - node.lo) / 2;
                for (lo, hi) in [(node.lo, middle), (middle, node.hi)].into_iter().filter(|(lo, hi)| lo < hi) {
                    let by = self.speaks(lo, hi);
                    let keys = tokens(by.0, by.1);
                    chosen.reads += keys.len() as u64;
                    // A block that has spoken for the parent need not be read again.
                    let known = node.by == by && !node.score.is_nan();
                    if !known {
                        asked.push(keys);
                    }
                    children.push(Node { lo, hi, by, score: if known { node.score } else { f32::NAN } });
                }
            }
            score.best(&asked, &mut answers);
            let mut fresh = answers.iter();
            for child in children.iter_mut().filter(|child| child.score.is_nan()) {
                child.score = fresh.next().copied().unwrap_or(f32::NEG_INFINITY);
            }
            all.clear();
            all.extend(children.iter().map(|child| child.score));
            nodes.clear();
            best.each(&all, width, |i| nodes.push(children[i]));
            chosen.rounds += 1;
        }
        let seen = nodes.iter().filter(|node| node.score > f32::NEG_INFINITY);
        chosen.blocks = seen.map(|node| tokens(node.lo, node.lo + 1)).collect();
        Ok(chosen)
    }
}

/// The definition, node by node, over scores that are known.
#[cfg(test)]
mod naive {
    use super::super::known::{peak, top};
    use super::super::representative::Representative;
    use std::ops::Range;

    pub fn hip(scores: &[f32], region: Range<usize>, budget: usize, block: usize, by: Representative) -> Vec<usize> {
        let (lo, n) = (region.start, region.len());
        let (num, width) = (n.div_ceil(block), budget.div_ceil(block));
        if n <= budget || num <= width {
            return region.step_by(block).collect();
        }
        let peak = |b: Range<usize>| peak(scores, lo + b.start * block..(lo + b.end * block).min(region.end));
        let mut nodes: Vec<Range<usize>> = (0..width).map(|j| num * j / width..num * (j + 1) / width).collect();
        let mut found = Vec::new();
        while nodes.iter().any(|node| node.len() > 1) {
            let halves = nodes.iter().flat_map(|node| {
                let middle = node.start + node.len() / 2;
                [node.start..middle, middle..node.end]
            });
            let children: Vec<Range<usize>> = halves.filter(|half| !half.is_empty()).collect();
            let speak = |node: &Range<usize>| match by {
                Representative::Oracle => node.clone(),
                Representative::First => node.start..node.start + 1,
                Representative::Last => node.end - 1..node.end,
                Representative::Middle => node.start + node.len() / 2..node.start + node.len() / 2 + 1,
            };
            let all: Vec<f32> = children.iter().map(|child| peak(speak(child))).collect();
            let best = top(&all, width);
            nodes = best.iter().map(|&i| children[i].clone()).collect();
            found = best.iter().map(|&i| all[i]).collect();
        }
        let chosen = nodes.iter().zip(found).filter(|(_, score)| *score > f32::NEG_INFINITY);
        chosen.map(|(node, _)| lo + node.start * block).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::known::{Known, scores};
    use super::*;
    use proptest::prelude::*;
    use std::ops::Range;

    const ALL: [Representative; 4] =
        [Representative::Middle, Representative::First, Representative::Last, Representative::Oracle];

    fn select(hip: Hip, region: Range<u32>, scores: &[f32]) -> Chosen {
        hip.select(Asked { region, start: 0, inputs: &mut Vec::new() }, &mut Known(scores)).unwrap()
    }

    proptest! {
        #[test]
        fn hip_is_its_naive_twin(
            seed: u64, lo in 0usize..7, n in 0usize..400, budget in 1usize..90, block in 1usize..9, values in 2u64..1000, by in 0usize..4,
        ) {
            let known = scores(seed, lo + n, values);
            let hip = Hip::new(budget, block, ALL[by]).unwrap();
            let region = lo as u32..(lo + n) as u32;
            let got = select(hip, region, &known);
            let starts: Vec<usize> = got.blocks.iter().map(|b| b.start as usize).collect();
            prop_assert_eq!(starts, naive::hip(&known, lo..lo + n, budget, block, ALL[by]));
            for b in &got.blocks {
                prop_assert_eq!(b.end, (b.start + block as u32).min((lo + n) as u32));
            }
        }
    }

    #[test]
    fn the_sixteen_keys_of_the_specification() {
        let s = [1., 2., 3., 2.5, 0.5, 1.5, 5., 9., 4., 3.5, 2.2, 1.2, 6., 7., 1.1, 0.1];
        let run = |budget, block, representative| select(Hip::new(budget, block, representative).unwrap(), 0..16, &s);
        let starts = |c: &Chosen| c.blocks.iter().map(|b| b.start).collect::<Vec<_>>();
        let found = run(2, 1, Representative::Middle);
        assert_eq!((starts(&found), found.reads, found.rounds), (vec![6, 7], 12, 3));
        assert_eq!(starts(&run(2, 1, Representative::First)), [12, 13]);
        assert_eq!(starts(&run(2, 1, Representative::Oracle)), [7, 13]);
        assert_eq!(starts(&run(4, 2, Representative::First)), [8, 12]);
        assert_eq!(run(4, 2, Representative::Middle).reads, 16);
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        assert!(Hip::new(0, 1, Representative::First).is_err());
        assert!(Hip::new(1, 0, Representative::First).is_err());
        assert!(Hip::new(1 << 32, 1, Representative::First).is_err());
        assert!(Representative::parse("nearest").is_err());
    }
}
