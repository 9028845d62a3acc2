//! What of a call does not fit together.

use crate::Result;
use crate::kernels::queries::{check_queries, check_softcap};
use crate::kernels::sparse::Sparse;
use crate::kernels::threads;
use crate::select::Choice;
use crate::storage::arena::Arena;
use crate::tensor::{ElemsMut, check_dtype, check_len};

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
    let group = check_queries(&args.q, arena)?;
    check_dtype("out", out.as_ref(), arena.dtype())?;
    let [rows, heads, columns, _] = args.q.shape();
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
    check_softcap(args.softcap)?;
    Ok(group)
}
