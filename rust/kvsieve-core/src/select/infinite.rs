//! InfiniteHiP: the region is narrowed in stages, each judging chunks on their own (Lee et al., 2025).
//!
//! The first stage may judge whole blocks by the minimum and the maximum of their keys instead (after Quest, Tang et al., ICML 2024):
//! it then reads two rows of each, side by side in memory, where a walk reads a dozen keys that lie anywhere.

use std::ops::Range;
use std::sync::Arc;

use super::asked::{Asked, Chosen};
use super::best::Best;
use super::parameters::Parameters;
use super::representative::Representative;
use super::score::Score;
use super::selector::Select;
use crate::ids::BLOCK;
use crate::{Error, Result};

/// One narrowing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Tokens that stay.
    pub keep: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Infinite {
    stages: Vec<Stage>,
    representative: Representative,
    page_bounds: bool,
}

/// InfiniteHiP of the parameters `stages`, `representative` and `page_bounds`.
pub(super) fn make(of: &mut Parameters) -> Result<Arc<dyn Select>> {
    let stages = of.pairs("stages")?.into_iter().map(|(chunk, keep)| Stage { chunk, keep }).collect();
    let representative = Representative::parse(&of.text("representative")?)?;
    Ok(Arc::new(Infinite::new(stages, representative, of.flag("page_bounds")?)?))
}

/// A chunk on the way down to one of its keys.
#[derive(Clone, Copy)]
struct Walk {
    lo: u32,
    hi: u32,
    /// The score of `lo`, if it is known: with `First` it always is after the first level.
    left: f32,
    best: f32,
}

impl Infinite {
    /// Each chunk is a multiple of the next one, and what is kept of its chunk. Where the first stage judges by page bounds, its chunks are
    /// blocks.
    pub fn new(stages: Vec<Stage>, representative: Representative, page_bounds: bool) -> Result<Self> {
        let whole = |s: &Stage| s.chunk > 0 && s.keep > 0 && s.keep.is_multiple_of(s.chunk) && s.keep < 1 << 31;
        let nested = |w: &[Stage]| w[0].chunk.is_multiple_of(w[1].chunk);
        if stages.is_empty() || !stages.iter().all(whole) || !stages.windows(2).all(nested) {
            let expected = "at least one; each chunk a multiple of the next, what is kept a multiple of its chunk";
            return Err(Error::OutOfRange { what: "stages", expected, got: format!("{stages:?}") });
        }
        if !matches!(representative, Representative::First | Representative::Middle) {
            let got = format!("{representative:?}");
            return Err(Error::OutOfRange { what: "representative", expected: "first or middle", got });
        }
        if page_bounds && stages[0].chunk != BLOCK as usize {
            let (what, expected) =
                ("stages", "a first stage of whole blocks, 64 tokens, where it judges by page bounds");
            return Err(Error::OutOfRange { what, expected, got: format!("{stages:?}") });
        }
        Ok(Infinite { stages, representative, page_bounds })
    }

    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The score of each chunk of a stage, and how many keys, or rows of bounds, were read for it.
    fn scores(
        &self,
        stage: usize,
        chunks: &[Range<u32>],
        region: &Range<u32>,
        score: &mut dyn Score,
    ) -> (Vec<f32>, u64) {
        if stage > 0 || !self.page_bounds {
            return self.judge(chunks, score);
        }
        let mut found = Vec::new();
        score.bounds(region.start / BLOCK..region.end.div_ceil(BLOCK), &mut found);
        let reads = 2 * found.len() as u64;
        (found, reads)
    }

    /// For each chunk the best score met on the way down, always to the half whose representative is better; and how many keys were
    /// scored.
    fn judge(&self, chunks: &[Range<u32>], score: &mut dyn Score) -> (Vec<f32>, u64) {
        let walk = |c: &Range<u32>| Walk { lo: c.start, hi: c.end, left: f32::NAN, best: f32::NEG_INFINITY };
        let mut walks: Vec<Walk> = chunks.iter().map(walk).collect();
        let (mut asked, mut answers) = (Vec::new(), Vec::new());
        let first = self.representative == Representative::First;
        // Chunks of one token have no halves, and of two a walk would meet both: they speak for themselves.
        asked.extend(chunks.iter().filter(|c| c.len() <= 2).cloned());
        score.best(&asked, &mut answers);
        let mut reads = asked.iter().map(|c| c.len() as u64).sum::<u64>();
        for (walk, &x) in walks.iter_mut().filter(|w| w.hi - w.lo <= 2).zip(&answers) {
            (walk.hi, walk.best) = (walk.lo + 1, x);
        }
        loop {
            asked.clear();
            for walk in walks.iter().filter(|w| w.hi - w.lo > 1) {
                let middle = walk.lo + (walk.hi - walk.lo) / 2;
                let (a, b) = if first {
                    (walk.lo, middle)
                } else {
                    (walk.lo + (middle - walk.lo) / 2, middle + (walk.hi - middle) / 2)
                };
                if !first || walk.left.is_nan() {
                    asked.push(a..a + 1);
                }
                asked.push(b..b + 1);
                reads += 2;
            }
            if asked.is_empty() {
                return (walks.iter().map(|walk| walk.best).collect(), reads);
            }
            score.best(&asked, &mut answers);
            let mut fresh = answers.iter().copied();
            let mut next = || fresh.next().unwrap_or(f32::NEG_INFINITY);
            for walk in walks.iter_mut().filter(|w| w.hi - w.lo > 1) {
                let middle = walk.lo + (walk.hi - walk.lo) / 2;
                let a = if first && !walk.left.is_nan() { walk.left } else { next() };
                let b = next();
                walk.best = walk.best.max(a).max(b);
                (walk.lo, walk.hi, walk.left) = if b > a { (middle, walk.hi, b) } else { (walk.lo, middle, a) };
            }
        }
    }
}

impl Select for Infinite {
    fn num_stages(&self) -> usize {
        self.stages.len()
    }

    fn most(&self) -> usize {
        self.stages.last().map_or(0, |last| last.keep)
    }

    fn page_bounds(&self) -> bool {
        self.page_bounds
    }

    fn judges_pages(&self, region: &Range<u32>) -> bool {
        let first = self.stages[0];
        self.page_bounds && region.len() > self.most() && region.len().div_ceil(first.chunk) > first.keep / first.chunk
    }

    fn select(&self, asked: Asked<'_>, score: &mut dyn Score) -> Result<Chosen> {
        let Asked { region, start, inputs } = asked;
        if start >= self.stages.len() || (start > 0 && inputs.len() != self.stages.len()) {
            let expected = "a stage, from a selection that kept what went into it";
            return Err(Error::OutOfRange { what: "start", expected, got: start.to_string() });
        }
        if start == 0 {
            inputs.clear();
            inputs.push(if region.is_empty() { Vec::new() } else { vec![region.clone()] });
        } else {
            inputs.truncate(start + 1);
        }
        // A region within the budget stays whole, whatever the earlier stages would keep.
        let dense = region.len() <= self.most();
        let mut chosen = Chosen::default();
        let mut best = Best::new();
        for (i, stage) in self.stages.iter().enumerate().skip(start) {
            let pieces = cut(&inputs[i], stage.chunk as u32);
            let most = stage.keep / stage.chunk;
            let kept = if dense || pieces.len() <= most {
                pieces
            } else {
                let (found, reads) = self.scores(i, &pieces, &region, score);
                (chosen.reads, chosen.rounds) = (chosen.reads + reads, chosen.rounds + 1);
                let mut kept = Vec::with_capacity(most);
                best.each(&found, most, |i| {
                    if found[i] > f32::NEG_INFINITY {
                        kept.push(pieces[i].clone());
                    }
                });
                kept
            };
            if i + 1 < self.stages.len() {
                inputs.push(kept);
            } else {
                chosen.blocks = kept;
            }
        }
        Ok(chosen)
    }
}

/// Ranges cut into pieces of at most `length`.
fn cut(ranges: &[Range<u32>], length: u32) -> Vec<Range<u32>> {
    let pieces = |of: &Range<u32>| {
        let (lo, hi) = (of.start, of.end);
        (0..(hi - lo).div_ceil(length)).map(move |i| lo + i * length..hi.min(lo + (i + 1) * length))
    };
    ranges.iter().flat_map(pieces).collect()
}

/// The definition, chunk by chunk, over scores that are known.
#[cfg(test)]
mod naive {
    use super::super::known::top;
    use std::ops::Range;

    /// One chunk's score: the best key on the way down.
    fn way(scores: &[f32], chunk: Range<usize>, middle: bool) -> f32 {
        let Range { start: mut lo, end: mut hi } = chunk;
        let mut best = if hi - lo == 1 { scores[lo] } else { f32::NEG_INFINITY };
        while hi - lo > 1 {
            let mid = (lo + hi) / 2;
            let (a, b) =
                if middle { (scores[(lo + mid) / 2], scores[(mid + hi) / 2]) } else { (scores[lo], scores[mid]) };
            best = best.max(a.max(b));
            if b > a { lo = mid } else { hi = mid }
        }
        best
    }

    pub fn infinite(
        scores: &[f32],
        region: Range<usize>,
        stages: &[(usize, usize)],
        middle: bool,
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
            let found: Vec<f32> = pieces.iter().map(|p| way(scores, p.clone(), middle)).collect();
            let best = top(&found, keep / length).into_iter().filter(|&i| found[i] > f32::NEG_INFINITY);
            chunks = best.map(|i| pieces[i].clone()).collect();
        }
        chunks
    }
}

#[cfg(test)]
mod tests {
    use super::super::asked::Inputs;
    use super::super::known::{Known, scores};
    use super::*;
    use proptest::prelude::*;

    fn select(
        rule: &Infinite,
        region: Range<u32>,
        start: usize,
        inputs: &mut Inputs,
        scores: &[f32],
    ) -> Result<Chosen> {
        rule.select(Asked { region, start, inputs }, &mut Known(scores))
    }

    proptest! {
        #[test]
        fn infinite_is_its_naive_twin(
            seed: u64, lo in 0usize..7, n in 0usize..600, values in 2u64..1000, middle: bool,
            factors in prop::collection::vec(1usize..5, 1..4), counts in prop::collection::vec(1usize..9, 3),
        ) {
            let mut chunk = 1;
            let mut stages = Vec::new();
            for (factor, count) in factors.iter().zip(&counts) {
                chunk *= factor;
                stages.insert(0, Stage { chunk, keep: chunk * count });
            }
            let known = scores(seed, lo + n, values);
            let representative = if middle { Representative::Middle } else { Representative::First };
            let infinite = Infinite::new(stages.clone(), representative, false).unwrap();
            let region = lo as u32..(lo + n) as u32;
            let mut cache = Vec::new();
            let got = select(&infinite, region.clone(), 0, &mut cache, &known).unwrap();
            let pairs: Vec<(usize, usize)> = stages.iter().map(|s| (s.chunk, s.keep)).collect();
            let want = naive::infinite(&known, lo..lo + n, &pairs, middle);
            let blocks: Vec<Range<usize>> = got.blocks.iter().map(|b| b.start as usize..b.end as usize).collect();
            prop_assert_eq!(&blocks, &want);
            for start in 1..stages.len() {
                let again = select(&infinite, region.clone(), start, &mut cache, &known).unwrap();
                prop_assert_eq!(&again.blocks, &got.blocks);
            }
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let stage = |chunk, keep| Stage { chunk, keep };
        for stages in [vec![], vec![stage(8, 8), stage(3, 3)], vec![stage(8, 12)], vec![stage(0, 8)], vec![stage(8, 0)]]
        {
            assert!(Infinite::new(stages, Representative::First, false).is_err());
        }
        assert!(Infinite::new(vec![stage(8, 8)], Representative::Last, false).is_err());
        assert!(Infinite::new(vec![stage(8, 8)], Representative::First, true).is_err());
        let one = Infinite::new(vec![stage(4, 4)], Representative::First, false).unwrap();
        assert!(select(&one, 0..9, 1, &mut Vec::new(), &[0.0; 9]).is_err());
    }
}
