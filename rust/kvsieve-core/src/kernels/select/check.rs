//! What does not fit together is refused before anything is read.

use std::ops::Range;

use super::residents::Residents;
use super::selection::{QueryBlock, Selection};
use crate::error::at_least_one;
use crate::ids::BLOCK;
use crate::kernels::queries::check_queries;
use crate::kernels::threads;
use crate::storage::arena::Arena;
use crate::{Error, Result};

/// Refuses keys that cannot be scored where they are shown.
pub(super) fn check_shown(args: &Selection<'_>, block: &QueryBlock<'_>, residents: &Residents<'_>) -> Result<()> {
    let Some(turn) = args.turn else { return Ok(()) };
    if turn.rope.rotary_dim() > args.q.shape()[3] {
        let expected = format!("at most {} rotated channels", args.q.shape()[3]);
        return Err(Error::Shape { what: "rope", expected, got: turn.rope.rotary_dim().to_string() });
    }
    if turn.relative {
        return Ok(());
    }
    if residents.shown.len() != residents.runs.len() {
        let expected = format!("one for each of {} runs", residents.runs.len());
        return Err(Error::Shape { what: "shown", expected, got: block.shown.len().to_string() });
    }
    let alone = block.columns.len() == 1 && block.first + 1 == residents.len as usize;
    if !alone && residents.shown.iter().any(|shown| !shown.rotate_keys) {
        return Err(Error::Unsupported(
            "keys at one distance from every query are scored there for a row's last query only; score by the relative rule",
        ));
    }
    Ok(())
}

/// Refuses whatever does not fit together; returns the number of query heads of a group.
pub(super) fn check(arena: &Arena, args: &Selection<'_>, num_inputs: usize) -> Result<usize> {
    args.level.check()?;
    threads::check(args.threads)?;
    let group = check_queries(&args.q, arena)?;
    let [rows, _, columns, _] = args.q.shape();
    let kv_heads = arena.num_kv_heads();
    for block in args.blocks {
        if block.row >= rows || block.columns.is_empty() || block.columns.end > columns {
            let expected = format!("queries of {rows} rows and {columns} columns");
            let got = format!("row {}, columns {:?}", block.row, block.columns);
            return Err(Error::Shape { what: "query block", expected, got });
        }
    }
    at_least_one("query_stride", args.query_stride)?;
    if num_inputs != args.blocks.len() * kv_heads && (num_inputs > 0 || args.start > 0) {
        let expected = format!("{} x {kv_heads}", args.blocks.len());
        return Err(Error::Shape { what: "inputs", expected, got: num_inputs.to_string() });
    }
    Ok(group)
}

/// Refuses a region of which not all bounds are known.
pub(in crate::kernels) fn check_bounds(bounds: &[(*const u8, usize)], region: &Range<u32>) -> Result<()> {
    let blocks = (region.start / BLOCK) as usize..region.end.div_ceil(BLOCK) as usize;
    let all = bounds.get(blocks).is_some_and(|all| all.iter().all(|(row, _)| !row.is_null()));
    if all && region.start.is_multiple_of(BLOCK) {
        return Ok(());
    }
    Err(Error::Unsupported("residents are judged by bounds only in whole blocks that have them"))
}
