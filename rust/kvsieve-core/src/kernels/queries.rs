//! Queries must fit the arena whose keys they meet, and logits be capped by something above nothing.

use crate::storage::arena::Arena;
use crate::tensor::{View, check_dtype};
use crate::{Error, Result};

/// Refuses queries `[rows, heads, columns, channels]` of another dtype, of other channels, or of heads that do not share the
/// arena's evenly; returns the number of query heads of a group.
pub(super) fn check_queries(q: &View<'_>, arena: &Arena) -> Result<usize> {
    check_dtype("q", q.elems(), arena.dtype())?;
    let shape = q.shape();
    let [_, heads, _, dim] = shape;
    let kv_heads = arena.num_kv_heads();
    if dim != arena.key_dim() || heads == 0 || !heads.is_multiple_of(kv_heads) {
        let expected = format!("[rows, multiple of {kv_heads}, columns, {}]", arena.key_dim());
        return Err(Error::Shape { what: "q", expected, got: format!("{shape:?}") });
    }
    Ok(heads / kv_heads)
}

/// Refuses a cap of logits that is not above 0.
pub(super) fn check_softcap(softcap: Option<f32>) -> Result<()> {
    if softcap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(Error::OutOfRange { what: "softcap", expected: "above 0", got: format!("{softcap:?}") });
    }
    Ok(())
}
