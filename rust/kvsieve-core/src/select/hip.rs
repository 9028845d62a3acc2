//! HiP: a beam search over an implicit binary tree of blocks (Lee et al., ICLR 2025).

use std::ops::Range;

use super::{Best, Chosen, Representative, Score};
use crate::{Error, Result};

/// What is searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hip {
    /// Tokens to choose, sinks and window not counted.
    pub budget: usize,
    /// Tokens of a block, which is chosen or left as a whole.
    pub block: usize,
    pub representative: Representative,
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
    /// Chooses blocks of the region.
    pub fn search(&self, region: Range<u32>, score: &mut impl Score) -> Result<Chosen> {
        for (what, n) in [("budget", self.budget), ("block", self.block)] {
            if n == 0 || u32::try_from(n).is_err() {
                return Err(Error::OutOfRange { what, expected: "at least 1 and below 2^32", got: n.to_string() });
            }
        }
        let (n, block) = (region.len(), self.block as u32);
        let (num, width) = (n.div_ceil(self.block), self.budget.div_ceil(self.block));
        let stretch = |lo: u32, hi: u32| region.start + lo * block..(region.start + hi * block).min(region.end);
        if n <= self.budget || num <= width {
            let blocks = (0..num as u32).map(|b| stretch(b, b + 1)).collect();
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
                    let keys = stretch(by.0, by.1);
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
        chosen.blocks = seen.map(|node| stretch(node.lo, node.lo + 1)).collect();
        Ok(chosen)
    }

    /// The blocks that speak for `lo..hi`.
    fn speaks(&self, lo: u32, hi: u32) -> (u32, u32) {
        let at = match self.representative {
            Representative::Oracle => return (lo, hi),
            Representative::Centre => lo + (hi - lo) / 2,
            Representative::First => lo,
            Representative::Last => hi - 1,
        };
        (at, at + 1)
    }
}
