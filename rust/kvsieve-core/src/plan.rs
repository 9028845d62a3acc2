//! What the control plane hands to the kernels: plain integers, made once per step, read by every layer.
//!
//! There are two renderings of the same decision, and tests hold them against each other:
//! [`Spans`] (per query, ready for the decode kernel, new tokens already stored) and [`Part`] (per row and memory, for a chunk of
//! queries at once, new tokens still outside the store).

use crate::ids::{BlockId, Position, Run};
use std::sync::Arc;

/// Which form of the keys a stream stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// As the model rotated them, at their true position. A shift is applied to the query.
    Rotated,
    /// Before rotation. The kernel rotates on read.
    Raw,
}

/// Slots `[lo, hi)` of `block`, seen by one query.
///
/// The query is rotated by `shift` positions (in frame `Rotated`: relative to where the model already put it). If `rotate_keys`,
/// the key in slot `s` is rotated by `s` positions, `s` counted from the start of the block, so that its distance from the query is
/// `shift - s`. Otherwise the keys are read as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub block: BlockId,
    pub lo: u32,
    pub hi: u32,
    pub shift: i64,
    pub rotate_keys: bool,
}

/// Everything that `num_rows * num_queries` queries read, when the new tokens have been stored first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    pub num_rows: usize,
    pub num_queries: usize,
    /// Item `row * num_queries + query` reads `spans[starts[item]..starts[item + 1]]`. A pad query reads nothing.
    pub starts: Vec<u32>,
    pub spans: Vec<Span>,
}

/// How the keys of a [`Part`] are placed relative to the queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// By `query_positions - key_positions` (frame `Raw`), or by the difference of both from the true positions (frame `Rotated`).
    Relative,
    /// Every key at this one distance from every query (frame `Raw` only; keys are not rotated).
    Fixed(i64),
}

/// The true position of a key that lies among those of a part and that none of its queries sees.
pub const NOWHERE: i64 = 1 << 60;

/// One memory's share of what one row's new queries read.
///
/// Keys are the residents of `runs`, in text order, then the row's new tokens `new_lo..new_hi` (counted among its valid new tokens).
/// Query `i` sees key `j` iff `0 <= d`, `d < near` and `d >= far`, with `d = query_true[i] - key_true[j]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub row: usize,
    pub memory: usize,
    pub runs: Vec<Run>,
    pub new_lo: usize,
    pub new_hi: usize,
    /// Ascending, but for keys that are [`NOWHERE`] and those of memories read by selection.
    pub key_true: Vec<i64>,
    pub key_positions: Vec<i64>,
    pub query_true: Vec<i64>,
    pub query_positions: Vec<i64>,
    /// Visible only below this true distance; `i64::MAX` when unlimited.
    pub near: i64,
    /// Visible only at or beyond this true distance; 0 when unlimited.
    pub far: i64,
    pub placing: Placing,
    /// Only the best `top_k` keys per head, and only for the last query; 0 means all keys, all queries.
    pub top_k: usize,
}

/// `len` of the row's new tokens, from the `new`-th valid one on, go to `slot..slot + len` of `block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Append {
    pub row: usize,
    pub new: usize,
    pub block: BlockId,
    pub slot: u32,
    pub len: u32,
}

/// `len` tokens move from one place to another. A list of moves is applied in order, each a memmove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    pub from: BlockId,
    pub from_slot: u32,
    pub to: BlockId,
    pub to_slot: u32,
    pub len: u32,
}

/// The plan of one forward: made once, run by every layer.
#[derive(Clone, Debug)]
pub struct Step {
    pub frame: Frame,
    pub num_rows: usize,
    /// Columns of the chunk, pads included.
    pub num_queries: usize,
    /// Valid new tokens per row; they are the last columns of the row (left padding).
    pub new_lens: Vec<usize>,
    /// Blocks that the stores must hold before anything is written.
    pub num_blocks: u32,
    /// Copies to make before appending (a shared tail block is copied before it is written).
    pub copies: Vec<Move>,
    pub appends: Vec<Append>,
    /// Present when every new token is stored and the chunk is small: the fast path.
    pub spans: Option<Spans>,
    /// Always those of memories read by selection; all of them when asked for, and when there are no spans.
    pub parts: Vec<Part>,
    /// Instead of both, where the layers are told elsewhere what they read: where the residents of each row lie, in text order.
    pub residents: Option<Vec<Arc<[Run]>>>,
    /// The true position of the first new token of each row.
    pub first_new: Vec<Position>,
}
