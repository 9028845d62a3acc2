//! InfiniteHiP: the region is narrowed in stages, each judging chunks on their own (Lee et al., 2025).
//!
//! The first stage may judge whole blocks by the bounds of their keys instead (after Quest, Tang et al., ICML 2024): it then reads two
//! rows of each, side by side in memory, where a walk reads a dozen keys that lie anywhere.

use std::ops::Range;

use super::{Best, Chosen, Representative, Score};
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

/// What is searched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Infinite {
    stages: Vec<Stage>,
    representative: Representative,
    bounded: bool,
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
    /// Each chunk is a multiple of the next one, and what is kept of its chunk. Where the first stage judges by bounds, its chunks are
    /// blocks.
    pub fn new(stages: Vec<Stage>, representative: Representative, bounded: bool) -> Result<Self> {
        let whole = |s: &Stage| s.chunk > 0 && s.keep > 0 && s.keep.is_multiple_of(s.chunk) && s.keep < 1 << 31;
        let nested = |w: &[Stage]| w[0].chunk.is_multiple_of(w[1].chunk);
        if stages.is_empty() || !stages.iter().all(whole) || !stages.windows(2).all(nested) {
            let expected = "at least one; each chunk a multiple of the next, what is kept a multiple of its chunk";
            return Err(Error::OutOfRange { what: "stages", expected, got: format!("{stages:?}") });
        }
        if !matches!(representative, Representative::First | Representative::Centre) {
            let got = format!("{representative:?}");
            return Err(Error::OutOfRange { what: "representative", expected: "first or centre", got });
        }
        if bounded && stages[0].chunk != BLOCK as usize {
            let (what, expected) = ("stages", "a first stage of whole blocks, 64 tokens, where it judges by bounds");
            return Err(Error::OutOfRange { what, expected, got: format!("{stages:?}") });
        }
        Ok(Infinite { stages, representative, bounded })
    }

    /// Whether the first stage judges blocks by bounds.
    pub fn is_bounded(&self) -> bool {
        self.bounded
    }

    /// Whether a search of this region begins with bounds: it need not where all its blocks stay anyway.
    pub fn judges_bounds(&self, region: &Range<u32>) -> bool {
        let [first, .., last] = [self.stages[0], self.stages[self.stages.len() - 1]];
        self.bounded && region.len() > last.keep && region.len().div_ceil(first.chunk) > first.keep / first.chunk
    }

    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Chooses chunks of the region, computing the stages from `start` on. `inputs` holds what went into each stage the last time: it
    /// is read for `start`, and written for the later ones.
    pub fn search(
        &self,
        region: Range<u32>,
        start: usize,
        inputs: &mut Vec<Vec<Range<u32>>>,
        score: &mut impl Score,
    ) -> Result<Chosen> {
        if start >= self.stages.len() || (start > 0 && inputs.len() != self.stages.len()) {
            let expected = "a stage, from a search that kept what went into it";
            return Err(Error::OutOfRange { what: "start", expected, got: start.to_string() });
        }
        if start == 0 {
            inputs.clear();
            inputs.push(if region.is_empty() { Vec::new() } else { vec![region.clone()] });
        } else {
            inputs.truncate(start + 1);
        }
        // A region within the budget stays whole, whatever the earlier stages would keep.
        let dense = self.stages.last().is_some_and(|last| region.len() <= last.keep);
        let mut chosen = Chosen::default();
        let mut best = Best::new();
        for (i, stage) in self.stages.iter().enumerate().skip(start) {
            let pieces = cut(&inputs[i], stage.chunk as u32);
            let most = stage.keep / stage.chunk;
            let kept = if dense || pieces.len() <= most {
                pieces
            } else {
                let found = if i == 0 && self.bounded {
                    let mut found = Vec::new();
                    score.bounds(region.start / BLOCK..region.end.div_ceil(BLOCK), &mut found);
                    chosen.reads += 2 * found.len() as u64;
                    found
                } else {
                    self.judge(&pieces, score, &mut chosen.reads)
                };
                chosen.rounds += 1;
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

    /// For each chunk the best score met on the way down, always to the half whose representative is better.
    fn judge(&self, chunks: &[Range<u32>], score: &mut impl Score, reads: &mut u64) -> Vec<f32> {
        let walk = |c: &Range<u32>| Walk { lo: c.start, hi: c.end, left: f32::NAN, best: f32::NEG_INFINITY };
        let mut walks: Vec<Walk> = chunks.iter().map(walk).collect();
        let (mut asked, mut answers) = (Vec::new(), Vec::new());
        let first = self.representative == Representative::First;
        // Chunks of one token have no halves, and of two a walk would meet both: they speak for themselves.
        asked.extend(chunks.iter().filter(|c| c.len() <= 2).cloned());
        score.best(&asked, &mut answers);
        *reads += asked.iter().map(|c| c.len() as u64).sum::<u64>();
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
                *reads += 2;
            }
            if asked.is_empty() {
                return walks.iter().map(|walk| walk.best).collect();
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

/// Stretches cut into pieces of at most `length`.
fn cut(stretches: &[Range<u32>], length: u32) -> Vec<Range<u32>> {
    let pieces = |s: &Range<u32>| {
        let (lo, hi) = (s.start, s.end);
        (0..(hi - lo).div_ceil(length)).map(move |i| lo + i * length..hi.min(lo + (i + 1) * length))
    };
    stretches.iter().flat_map(pieces).collect()
}
