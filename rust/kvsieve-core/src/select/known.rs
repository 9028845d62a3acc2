//! Scores that are known, for the tests of rules, and what is common to their naive twins.

use std::ops::Range;

use super::score::Score;
use crate::ids::BLOCK;

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
