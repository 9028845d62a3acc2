//! What of a call does not fit together.

use crate::kernels::sparse::Sparse;
use crate::kernels::threads;
use crate::select::Choice;
use crate::storage::arena::Arena;
use crate::tensor::{ElemsMut, check_dtype, check_len};
use crate::{Error, Result};

/// Refuses whatever does not fit together; returns the number of query heads of a group.
pub(super) fn check(
    arena: &Arena,
    choices: &[Choice],
    args: &Sparse<'_>,
    out: &ElemsMut<'_>,
    lse: Option<&[f32]>,
) -> Result<usize> {
    args.level.check()?;
    threads::check(args.threads)?;
    check_dtype("q", args.q.elems(), arena.dtype())?;
    check_dtype("out", out.as_ref(), arena.dtype())?;
    let shape = args.q.shape();
    let [rows, heads, columns, dim] = shape;
    let kv_heads = arena.num_kv_heads();
    if dim != arena.key_dim() || heads == 0 || !heads.is_multiple_of(kv_heads) {
        let expected = format!("[rows, multiple of {kv_heads}, columns, {}]", arena.key_dim());
        return Err(Error::Shape { what: "q", expected, got: format!("{shape:?}") });
    }
    check_len("rows", args.rows.len(), rows)?;
    check_len("choices", choices.len(), rows)?;
    check_len("out", out.len(), rows * columns * heads * arena.value_dim())?;
    if let Some(lse) = lse {
        check_len("lse", lse.len(), rows * heads * columns)?;
    }
    if let Some(sinks) = args.sinks {
        check_len("sinks", sinks.len(), heads)?;
    }
    args.check_query_blocks()?;
    if args.softcap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(Error::OutOfRange { what: "softcap", expected: "above 0", got: format!("{:?}", args.softcap) });
    }
    Ok(heads / kv_heads)
}
