//! Attention of one query to pieces of the text, each of which it sees where it is told: at given distances, or all of it at one.
//!
//! Keys are raw. A piece at one distance is read as it lies, and the query is turned; in any other both are.

use std::sync::Arc;

use super::attend::{Attend, SpanTrig, attend_apart, attend_apart_mass, mass_len};
use super::isa::Level;
use super::sparse::Layout;
use crate::ids::Run;
use crate::plan::Spans;
use crate::rope::Rope;
use crate::storage::arena::Arena;
use crate::tensor::{ElemsMut, View, check_len};
use crate::{Error, Result};

/// Residents `lo..hi` of a row, in text order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The key-value head that reads it; none for all of them.
    pub head: Option<u32>,
    pub lo: u32,
    pub hi: u32,
    /// How far away the first of them is.
    pub distance: i64,
    /// Whether all of them are so far away; otherwise each one is nearer by one than that before it.
    pub fixed: bool,
}

/// Everything about the attention but the keys and values.
#[derive(Clone, Copy, Debug)]
pub struct AttendPieces<'a> {
    /// `[1, heads, 1, key_dim]`, not rotated.
    pub q: View<'a>,
    /// All residents of the row in text order.
    pub runs: &'a [Run],
    /// The first resident of each run, and how many there are, where that is known; else nothing.
    pub starts: &'a [u32],
    pub pieces: &'a [Piece],
    /// Which of them, one for all heads, is wanted the probabilities of.
    pub scored: Option<usize>,
    /// Whether it is wanted how much attention every token of every piece got, all heads together.
    pub told: bool,
    /// `None` for layers without position encoding.
    pub rope: Option<&'a Arc<Rope>>,
    pub scale: f32,
    pub softcap: Option<f32>,
    pub sinks: Option<&'a [f32]>,
    pub threads: usize,
    pub level: Level,
}

/// What was told of the attention beside its answer; each is empty where it was not asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// Of the scored piece, `[kv_heads][hi - lo]`, summed over the query heads of each group.
    pub scores: Vec<f32>,
    /// Of each piece in turn `hi - lo` numbers, summed over all query heads that read it.
    pub mass: Vec<f32>,
}

fn check(piece: &Piece, layout: &Layout<'_>, kv_heads: usize) -> Result<()> {
    let nearest =
        if piece.fixed { piece.distance } else { piece.distance - (i64::from(piece.hi) - 1 - i64::from(piece.lo)) };
    let known = piece.head.is_none_or(|head| (head as usize) < kv_heads);
    if piece.lo < piece.hi && piece.hi <= layout.len && nearest >= 0 && known {
        return Ok(());
    }
    let (what, expected) = ("piece", "residents, none of them behind the query, of one head or of all");
    Err(Error::OutOfRange { what, expected, got: format!("{piece:?} of {} residents, {kv_heads} heads", layout.len) })
}

/// Appends the spans of one piece.
fn push(layout: &Layout<'_>, piece: &Piece, spans: &mut Spans) {
    let first = spans.spans.len();
    layout.push(piece.lo..piece.hi, layout.len.saturating_sub(1) as usize, 0, &mut spans.spans);
    let mut distance = piece.distance;
    for span in &mut spans.spans[first..] {
        span.rotate_keys = !piece.fixed;
        if piece.fixed {
            span.shift = distance;
        } else {
            span.shift = distance + i64::from(span.lo);
            distance -= i64::from(span.hi - span.lo);
        }
    }
}

/// The pieces that a key-value head reads, by their numbers, in the order in which it reads them: what is scored comes first, so that its
/// probabilities are the first ones of each head.
fn read_by<'a>(args: &AttendPieces<'a>, head: usize) -> impl Iterator<Item = usize> + use<'a> {
    let (pieces, scored) = (args.pieces, args.scored);
    let others = (0..pieces.len())
        .filter(move |&at| Some(at) != scored && pieces[at].head.is_none_or(|reader| reader as usize == head));
    scored.into_iter().chain(others)
}

/// Attends the query of a row to its pieces, which must be disjoint for each head: `out` `[heads, value_dim]`, of the dtype of `q`; `lse`
/// `[heads]`. Returns what was asked to be told. Asks `stop` as [`super::attend_unless`] does.
pub fn attend_pieces(
    arena: &Arena,
    args: &AttendPieces<'_>,
    out: ElemsMut<'_>,
    lse: Option<&mut [f32]>,
    stop: &dyn Fn() -> bool,
) -> Result<Told> {
    let kv_heads = arena.num_kv_heads();
    check_len("rows and queries", args.q.shape()[0] * args.q.shape()[2], 1)?;
    let layout = Layout::of(args.runs, args.starts)?;
    for piece in args.pieces {
        check(piece, &layout, kv_heads)?;
    }
    if let Some(at) = args.scored
        && args.pieces.get(at).is_none_or(|piece| piece.head.is_some())
    {
        let (what, expected) = ("scored", "a piece that all heads read");
        return Err(Error::OutOfRange { what, expected, got: format!("{at}, {:?}", args.pieces.get(at)) });
    }
    let mut spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0], spans: Vec::new() };
    for head in 0..kv_heads {
        read_by(args, head).for_each(|at| push(&layout, &args.pieces[at], &mut spans));
        spans.starts.push(spans.spans.len() as u32);
    }
    let trig = args.rope.map(|rope| SpanTrig::of_many(&spans, rope));
    let AttendPieces { q, scale, softcap, sinks, threads, level, .. } = *args;
    let (spans, trig) = (&spans, trig.as_ref());
    let attend = Attend { q, spans, trig, scale, softcap, sinks, apply_factor: true, threads, level };
    if args.scored.is_none() && !args.told {
        attend_apart(arena, &attend, out, lse, stop)?;
        return Ok(Told::default());
    }
    let mut mass = vec![0f32; mass_len(spans, 1)];
    attend_apart_mass(arena, &attend, out, lse, &mut mass, stop)?;
    Ok(told(args, kv_heads, &mass))
}

/// What is wanted of the probabilities of all keys, which lie head by head as they were read.
fn told(args: &AttendPieces<'_>, kv_heads: usize, mass: &[f32]) -> Told {
    let count = |piece: &Piece| (piece.hi - piece.lo) as usize;
    let mut starts = vec![0];
    starts.extend(args.pieces.iter().scan(0, |end, piece| {
        *end += count(piece);
        Some(*end)
    }));
    let total = if args.told { starts[args.pieces.len()] } else { 0 };
    let mut found = Told { scores: Vec::new(), mass: vec![0.0; total] };
    let mut next = 0;
    for head in 0..kv_heads {
        for at in read_by(args, head) {
            let mine = &mass[next..next + count(&args.pieces[at])];
            if Some(at) == args.scored {
                found.scores.extend_from_slice(mine);
            }
            if args.told {
                found.mass[starts[at]..].iter_mut().zip(mine).for_each(|(sum, more)| *sum += more);
            }
            next += mine.len();
        }
    }
    found
}
