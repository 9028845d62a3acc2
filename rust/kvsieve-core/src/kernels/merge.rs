//! Exact merge of attention over disjoint sets of keys.

use crate::Result;
use crate::tensor::check_len;

/// Attention of some rows over one set of keys.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a> {
    /// `[rows, dim]`, each row normalised.
    pub out: &'a [f32],
    /// `[rows]`: log-sum-exp of the logits; `-inf` when the set was empty.
    pub lse: &'a [f32],
}

/// Attention over the union of the parts' keys, as if it had been computed at once. Rows without any key become zeros.
pub fn merge(parts: &[Partial<'_>], dim: usize, out: &mut [f32], lse: &mut [f32]) -> Result<()> {
    check_len("out", out.len(), lse.len() * dim)?;
    for part in parts {
        check_len("part.out", part.out.len(), out.len())?;
        check_len("part.lse", part.lse.len(), lse.len())?;
    }
    out.fill(0.0);
    for (row, total) in lse.iter_mut().enumerate() {
        let max = parts.iter().map(|p| p.lse[row]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |x: f32| {
            if x == f32::NEG_INFINITY { 0.0 } else { (x - max).exp() }
        };
        let sum: f32 = parts.iter().map(|p| weight(p.lse[row])).sum();
        *total = if sum == 0.0 { f32::NEG_INFINITY } else { max + sum.ln() };
        if sum == 0.0 {
            continue;
        }
        let span = row * dim..(row + 1) * dim;
        for part in parts {
            let w = weight(part.lse[row]) / sum;
            // A part without keys may hold anything, NaN included.
            if w != 0.0 {
                out[span.clone()].iter_mut().zip(&part.out[span.clone()]).for_each(|(o, x)| *o += w * x);
            }
        }
    }
    Ok(())
}
