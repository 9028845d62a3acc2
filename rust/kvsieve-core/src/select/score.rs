//! What a rule may ask about keys.

use std::ops::Range;

/// The best score of each range of residents.
pub trait Score {
    /// Writes to `out` the best score of each range, `-inf` when none of its keys can be seen. Ranges are not empty, and inside of the
    /// region.
    fn best(&mut self, ranges: &[Range<u32>], out: &mut Vec<f32>);

    /// Writes to `out` what the keys of each of these whole blocks (of [`BLOCK`](crate::ids::BLOCK) residents, counted from the first)
    /// can score at most, `-inf` where no query sees the first of them: `sum over channels of max(q * maximum, q * minimum)`.
    fn bounds(&mut self, blocks: Range<u32>, out: &mut Vec<f32>);
}
