//! Attention of single queries to sets of tokens that were chosen before, one set for each key-value head.
//!
//! A set loses its lowest-ranked tokens one by one while the text goes on, and all that is newer is read besides: so the same lists
//! serve every step until heads choose again, and only two numbers change.

use super::attend::{Attend, attend_apart};
use super::isa::Level;
use super::sparse::Layout;
use crate::ids::Run;
use crate::plan::Spans;
use crate::storage::arena::Arena;
use crate::tensor::{ElemsMut, View, check_len};
use crate::{Error, Result};

/// What one row's query reads. Tokens are residents, counted in text order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sets<'a> {
    /// All residents in text order; the query's own token is the last. A row without residents reads nothing.
    pub runs: &'a [Run],
    /// `[kv_heads][count]`, ascending for each head.
    pub tokens: &'a [i64],
    /// `[kv_heads][count]`: a token is read if its rank is at least `skip`.
    pub ranks: &'a [i64],
    pub skip: i64,
    /// Every resident from this one on is read.
    pub rest: u32,
}

/// Everything about the attention but the keys and values.
#[derive(Clone, Copy, Debug)]
pub struct AttendSets<'a> {
    /// `[rows, heads, 1, key_dim]`, as the model rotated it, like the keys.
    pub q: View<'a>,
    pub rows: &'a [Sets<'a>],
    pub scale: f32,
    pub softcap: Option<f32>,
    pub sinks: Option<&'a [f32]>,
    pub threads: usize,
    pub level: Level,
}

/// The spans of one head of a row.
fn push_head(layout: &Layout<'_>, row: &Sets<'_>, head: usize, count: usize, spans: &mut Spans) -> Result<()> {
    let (tokens, ranks) = (&row.tokens[head * count..][..count], &row.ranks[head * count..][..count]);
    let position = layout.len.saturating_sub(1) as usize;
    let wrong = |got: String| {
        let (what, expected) = ("tokens", "numbers of residents before the rest, ascending");
        Error::OutOfRange { what, expected, got }
    };
    let (mut at, mut open, mut from) = (0, 0..0, 0);
    for (&token, _) in tokens.iter().zip(ranks).filter(|(_, rank)| **rank >= row.skip) {
        let resident = u32::try_from(token).ok().filter(|&token| token >= from && token < row.rest);
        let got = || wrong(format!("{token} where {from} or more may come, and a rest from {} on", row.rest));
        let token = resident.ok_or_else(got)?;
        from = token + 1;
        if token != open.end {
            at = layout.push(open, position, at, &mut spans.spans);
            open = token..token;
        }
        open.end = from;
    }
    if row.rest != open.end {
        at = layout.push(open, position, at, &mut spans.spans);
        open = row.rest..row.rest;
    }
    open.end = layout.len;
    layout.push(open, position, at, &mut spans.spans);
    Ok(())
}

/// Attends the query of each row to the sets of its heads and all that is newer; `out` is `[rows, heads, value_dim]`, of the dtype of
/// `q`, and zero for a row that reads nothing. Asks `stop` as [`super::attend_unless`] does.
pub fn attend_sets(arena: &Arena, args: &AttendSets<'_>, out: ElemsMut<'_>, stop: &dyn Fn() -> bool) -> Result<()> {
    let kv_heads = arena.num_kv_heads();
    check_len("rows", args.rows.len(), args.q.shape()[0])?;
    let mut spans = Spans { num_rows: args.rows.len(), num_queries: 1, starts: vec![0], spans: Vec::new() };
    for row in args.rows {
        let layout = Layout::new(row.runs, &[])?;
        if row.rest > layout.len {
            let (what, expected) = ("rest", "at most the number of residents");
            return Err(Error::OutOfRange { what, expected, got: format!("{} of {}", row.rest, layout.len) });
        }
        check_len("ranks", row.ranks.len(), row.tokens.len())?;
        let count = row.tokens.len() / kv_heads;
        check_len("tokens", row.tokens.len(), count * kv_heads)?;
        for head in 0..kv_heads {
            push_head(&layout, row, head, count, &mut spans)?;
            spans.starts.push(spans.spans.len() as u32);
        }
    }
    let AttendSets { q, scale, softcap, sinks, threads, level, .. } = *args;
    let (spans, trig, apply_factor) = (&spans, None, false);
    let attend = Attend { q, spans, trig, scale, softcap, sinks, apply_factor, threads, level };
    attend_apart(arena, &attend, out, None, stop)
}
