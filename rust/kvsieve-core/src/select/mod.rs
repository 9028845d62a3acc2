//! Which residents a block of queries reads when everything is kept: the searches of HiP and InfiniteHiP, without their keys.
//!
//! Residents are numbered in text order. A search is over the *region* between sinks and window, for one key-value head; what it must
//! know about keys it asks of a [`Score`]. The Python specification (`kvsieve.backends.reference`) has the algorithms and lists what was
//! decided; both choose the same blocks wherever their scores are equal.

pub mod hip;
pub mod infinite;
pub mod kept;

use std::ops::Range;

use crate::rank::rank;
use crate::{Error, Result};

/// The best score of each stretch of residents.
pub trait Score {
    /// Writes to `out` the greatest score of each stretch, `-inf` when none of its keys can be seen. Stretches are not empty.
    fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>);

    /// Writes to `out` what the keys of each of these whole blocks (of [`BLOCK`](crate::ids::BLOCK) residents, counted from the first)
    /// can score at most, `-inf` where no query sees the first of them: `sum over channels of max(q * greatest, q * least)`.
    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>);
}

/// Which part of a node speaks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Representative {
    Centre,
    First,
    Last,
    /// The best of all: reads everything. For tests.
    Oracle,
}

impl Representative {
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "centre" => Ok(Representative::Centre),
            "first" => Ok(Representative::First),
            "last" => Ok(Representative::Last),
            "oracle" => Ok(Representative::Oracle),
            other => Err(Error::OutOfRange {
                what: "representative",
                expected: "centre, first, last or oracle",
                got: other.to_string(),
            }),
        }
    }
}

/// What one query block reads of one key-value head, between sinks and window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Chosen stretches of residents, ascending.
    pub blocks: Vec<Range<u32>>,
    /// Representative keys scored; one that is met twice counts twice, though it may have been read once.
    pub reads: u64,
    /// Levels of the tree, or stages, that were scored.
    pub rounds: u32,
}

/// The best `count` of `scores` as flags: by value, equal ones by index, NaN last.
pub(crate) struct Best {
    keys: Vec<u64>,
    order: Vec<u64>,
}

impl Best {
    pub fn new() -> Self {
        Best { keys: Vec::new(), order: Vec::new() }
    }

    /// Calls `keep` with the indices of the best, ascending.
    pub fn each(&mut self, scores: &[f32], count: usize, mut keep: impl FnMut(usize)) {
        if count >= scores.len() {
            return (0..scores.len()).for_each(keep);
        }
        let Some(last) = count.checked_sub(1) else { return };
        self.keys.clear();
        // The complement of the rank above the index: smaller is better, and no two are equal.
        self.keys.extend(scores.iter().enumerate().map(|(i, &x)| u64::from(!rank(x)) << 32 | i as u64));
        self.order.clone_from(&self.keys);
        let (_, &mut worst, _) = self.order.select_nth_unstable(last);
        for (i, _) in self.keys.iter().enumerate().filter(|(_, key)| **key <= worst) {
            keep(i);
        }
    }
}

/// The specification of [`hip`] and [`infinite`]: the definitions, node by node, over scores that are known.
#[cfg(test)]
mod naive {
    use super::Representative;
    use std::ops::Range;

    fn top(scores: &[f32], count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(count);
        order.sort_unstable();
        order
    }

    fn peak(scores: &[f32], of: Range<usize>) -> f32 {
        scores[of].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

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
                Representative::Centre => node.start + node.len() / 2..node.start + node.len() / 2 + 1,
            };
            let all: Vec<f32> = children.iter().map(|child| peak(speak(child))).collect();
            let best = top(&all, width);
            nodes = best.iter().map(|&i| children[i].clone()).collect();
            found = best.iter().map(|&i| all[i]).collect();
        }
        let chosen = nodes.iter().zip(found).filter(|(_, score)| *score > f32::NEG_INFINITY);
        chosen.map(|(node, _)| lo + node.start * block).collect()
    }

    /// One chunk's score: the best key on the way down.
    fn way(scores: &[f32], chunk: Range<usize>, centre: bool) -> f32 {
        let Range { start: mut lo, end: mut hi } = chunk;
        let mut best = if hi - lo == 1 { scores[lo] } else { f32::NEG_INFINITY };
        while hi - lo > 1 {
            let mid = (lo + hi) / 2;
            let (a, b) =
                if centre { (scores[(lo + mid) / 2], scores[(mid + hi) / 2]) } else { (scores[lo], scores[mid]) };
            best = best.max(a.max(b));
            if b > a { lo = mid } else { hi = mid }
        }
        best
    }

    pub fn infinite(
        scores: &[f32],
        region: Range<usize>,
        stages: &[(usize, usize)],
        centre: bool,
    ) -> Vec<Range<usize>> {
        let dense = stages.last().is_some_and(|&(_, keep)| region.len() <= keep);
        let mut chunks = if region.is_empty() { vec![] } else { vec![region] };
        for &(length, keep) in stages {
            let cut = |c: Range<usize>| c.clone().step_by(length).map(move |at| at..(at + length).min(c.end));
            let pieces: Vec<Range<usize>> = chunks.into_iter().flat_map(cut).collect();
            if dense || pieces.len() <= keep / length {
                chunks = pieces;
                continue;
            }
            let found: Vec<f32> = pieces.iter().map(|p| way(scores, p.clone(), centre)).collect();
            let best = top(&found, keep / length).into_iter().filter(|&i| found[i] > f32::NEG_INFINITY);
            chunks = best.map(|i| pieces[i].clone()).collect();
        }
        chunks
    }
}

#[cfg(test)]
mod tests {
    use super::hip::Hip;
    use super::infinite::{Infinite, Stage};
    use super::*;
    use crate::ids::BLOCK;
    use proptest::prelude::*;

    /// Scores that are known.
    struct Known<'a>(&'a [f32]);

    impl Score for Known<'_> {
        fn best(&mut self, stretches: &[Range<u32>], out: &mut Vec<f32>) {
            let best = |s: &Range<u32>| &self.0[s.start as usize..s.end as usize];
            out.clear();
            out.extend(stretches.iter().map(|s| best(s).iter().copied().fold(f32::NEG_INFINITY, f32::max)));
        }

        /// As good as bounds can be.
        fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>) {
            let whole = blocks.map(|b| b * BLOCK..((b + 1) * BLOCK).min(self.0.len() as u32));
            self.best(&whole.collect::<Vec<_>>(), out);
        }
    }

    const ALL: [Representative; 4] =
        [Representative::Centre, Representative::First, Representative::Last, Representative::Oracle];

    /// Few distinct values, so that ties are met, and some that nobody sees.
    fn scores(seed: u64, n: usize, values: u64) -> Vec<f32> {
        let mut state = seed | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let x = (state >> 33) % values;
                if x == 0 { f32::NEG_INFINITY } else { x as f32 - values as f32 / 2.0 }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn hip_is_its_naive_twin(
            seed: u64, lo in 0usize..7, n in 0usize..400, budget in 1usize..90, block in 1usize..9, values in 2u64..1000, by in 0usize..4,
        ) {
            let known = scores(seed, lo + n, values);
            let hip = Hip { budget, block, representative: ALL[by] };
            let region = lo as u32..(lo + n) as u32;
            let got = hip.search(region, &mut Known(&known)).unwrap();
            let starts: Vec<usize> = got.blocks.iter().map(|b| b.start as usize).collect();
            prop_assert_eq!(starts, naive::hip(&known, lo..lo + n, budget, block, ALL[by]));
            for b in &got.blocks {
                prop_assert_eq!(b.end, (b.start + block as u32).min((lo + n) as u32));
            }
        }

        #[test]
        fn infinite_is_its_naive_twin(
            seed: u64, lo in 0usize..7, n in 0usize..600, values in 2u64..1000, centre: bool,
            factors in prop::collection::vec(1usize..5, 1..4), counts in prop::collection::vec(1usize..9, 3),
        ) {
            let mut chunk = 1;
            let mut stages = Vec::new();
            for (factor, count) in factors.iter().zip(&counts) {
                chunk *= factor;
                stages.insert(0, Stage { chunk, keep: chunk * count });
            }
            let known = scores(seed, lo + n, values);
            let representative = if centre { Representative::Centre } else { Representative::First };
            let infinite = Infinite::new(stages.clone(), representative, false).unwrap();
            let region = lo as u32..(lo + n) as u32;
            let mut cache = Vec::new();
            let got = infinite.search(region.clone(), 0, &mut cache, &mut Known(&known)).unwrap();
            let pairs: Vec<(usize, usize)> = stages.iter().map(|s| (s.chunk, s.keep)).collect();
            let want = naive::infinite(&known, lo..lo + n, &pairs, centre);
            let blocks: Vec<Range<usize>> = got.blocks.iter().map(|b| b.start as usize..b.end as usize).collect();
            prop_assert_eq!(&blocks, &want);
            for start in 1..stages.len() {
                let again = infinite.search(region.clone(), start, &mut cache, &mut Known(&known)).unwrap();
                prop_assert_eq!(&again.blocks, &got.blocks);
            }
        }
    }

    #[test]
    fn the_sixteen_keys_of_the_specification() {
        let s = [1., 2., 3., 2.5, 0.5, 1.5, 5., 9., 4., 3.5, 2.2, 1.2, 6., 7., 1.1, 0.1];
        let run = |budget, block, representative| {
            Hip { budget, block, representative }.search(0..16, &mut Known(&s)).unwrap()
        };
        let starts = |c: &Chosen| c.blocks.iter().map(|b| b.start).collect::<Vec<_>>();
        let found = run(2, 1, Representative::Centre);
        assert_eq!((starts(&found), found.reads, found.rounds), (vec![6, 7], 12, 3));
        assert_eq!(starts(&run(2, 1, Representative::First)), [12, 13]);
        assert_eq!(starts(&run(2, 1, Representative::Oracle)), [7, 13]);
        assert_eq!(starts(&run(4, 2, Representative::First)), [8, 12]);
        assert_eq!(run(4, 2, Representative::Centre).reads, 16);
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let refused = |hip: Hip| hip.search(0..9, &mut Known(&[0.0; 9])).is_err();
        assert!(refused(Hip { budget: 0, block: 1, representative: Representative::First }));
        assert!(refused(Hip { budget: 1, block: 0, representative: Representative::First }));
        let stage = |chunk, keep| Stage { chunk, keep };
        for stages in [vec![], vec![stage(8, 8), stage(3, 3)], vec![stage(8, 12)], vec![stage(0, 8)], vec![stage(8, 0)]]
        {
            assert!(Infinite::new(stages, Representative::First, false).is_err());
        }
        assert!(Infinite::new(vec![stage(8, 8)], Representative::Last, false).is_err());
        let one = Infinite::new(vec![stage(4, 4)], Representative::First, false).unwrap();
        assert!(one.search(0..9, 1, &mut Vec::new(), &mut Known(&[0.0; 9])).is_err());
        assert!(Representative::parse("middle").is_err());
    }
}
