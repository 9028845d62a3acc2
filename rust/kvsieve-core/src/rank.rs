//! The best entries of each row.

use crate::{Error, Result, fault};

/// Maps floats to integers of the same order; NaN is below everything, and both zeros are equal.
pub(crate) fn rank(x: f32) -> u32 {
    if x.is_nan() {
        return 0;
    }
    let bits = (x + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// For each row of `scores` (`[rows, columns]`) the columns of its `k` best entries: by value from high to low, equal values by
/// column, NaN last. Selection first and then a sort of `k`, because `k` is small and rows are long.
pub fn top_k(scores: &[f32], columns: usize, k: usize) -> Result<Vec<i64>> {
    fault::may_panic();
    if k > columns || u32::try_from(columns).is_err() {
        return Err(Error::OutOfRange {
            what: "k",
            expected: "at most the number of scores in a row",
            got: k.to_string(),
        });
    }
    if columns == 0 || k == 0 {
        return Ok(Vec::new());
    }
    if !scores.len().is_multiple_of(columns) {
        return Err(Error::Shape {
            what: "scores",
            expected: format!("rows of {columns}"),
            got: format!("{} elements", scores.len()),
        });
    }
    let mut best = Vec::with_capacity(scores.len() / columns * k);
    let mut keys: Vec<u64> = Vec::with_capacity(columns);
    for row in scores.chunks_exact(columns) {
        keys.clear();
        // The complement of the rank above the column: ascending integers are then the wanted order, ties included.
        keys.extend(row.iter().enumerate().map(|(i, &x)| u64::from(!rank(x)) << 32 | i as u64));
        if k < columns {
            keys.select_nth_unstable(k - 1);
        }
        keys[..k].sort_unstable();
        best.extend(keys[..k].iter().map(|key| (key & 0xffff_ffff) as i64));
    }
    Ok(best)
}
