//! What attention is asked for, and what of it does not fit together.

use super::trig::SpanTrig;
use crate::kernels::isa::Level;
use crate::kernels::queries::check_softcap;
use crate::kernels::threads;
use crate::plan::Spans;
use crate::storage::arena::Arena;
use crate::storage::packed::Channels;
use crate::tensor::{ElemsMut, View, check_dtype, check_len};
use crate::{Error, Result};

/// Everything about the attention but the keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// `[rows, heads, queries, key_dim]`, of the arena's dtype.
    pub q: View<'a>,
    pub spans: &'a Spans,
    /// `None` for layers without position encoding: shifts and key rotations are then ignored.
    pub trig: Option<&'a SpanTrig>,
    /// Multiplies the logits, before the soft cap.
    pub scale: f32,
    /// `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// For each query head one more logit that takes part in the normalisation and has no value. Neither scaled nor capped.
    pub sinks: Option<&'a [f32]>,
    /// Whether the rope's factor is still to be applied, to query and key. Not when the model itself has rotated them.
    pub apply_factor: bool,
    pub threads: usize,
    pub level: Level,
}

/// Length of the `mass` of [`attend`].
pub fn mass_len(spans: &Spans, num_kv_heads: usize) -> usize {
    spans.spans.iter().map(|s| s.hi.saturating_sub(s.lo) as usize).sum::<usize>() * num_kv_heads
}

/// Refuses whatever does not fit together; returns the number of query heads of a group. `apart`: whether each key-value head has a list
/// of spans of its own; `values`: whether those of all spans are read.
pub(super) fn check(
    arena: &Arena,
    args: &Attend<'_>,
    (apart, values): (bool, bool),
    out: Option<&ElemsMut<'_>>,
    lse: Option<&[f32]>,
    mass: Option<&[f32]>,
) -> Result<usize> {
    args.level.check()?;
    threads::check(args.threads)?;
    let spans = args.spans;
    let shape = args.q.shape();
    let [rows, heads, queries, dim] = shape;
    check_dtype("q", args.q.elems(), arena.dtype())?;
    if let Some(out) = out {
        check_dtype("out", out.as_ref(), arena.dtype())?;
    }
    let fits = (rows, queries, dim) == (spans.num_rows, spans.num_queries, arena.key_dim());
    if !fits || heads == 0 || !heads.is_multiple_of(arena.num_kv_heads()) {
        let (kv_heads, key_dim) = (arena.num_kv_heads(), arena.key_dim());
        let expected = format!("[{}, multiple of {kv_heads}, {}, {key_dim}]", spans.num_rows, spans.num_queries);
        return Err(Error::Shape { what: "q", expected, got: format!("{shape:?}") });
    }
    let items = rows * queries;
    if let Some(out) = out {
        check_len("out", out.len(), items * heads * arena.value_dim())?;
    }
    if let Some(lse) = lse {
        check_len("lse", lse.len(), items * heads)?;
    }
    if let Some(sinks) = args.sinks {
        check_len("sinks", sinks.len(), heads)?;
    }
    check_softcap(args.softcap)?;
    let lists = if apart { items * arena.num_kv_heads() } else { items };
    check_len("spans.starts", spans.starts.len(), lists + 1)?;
    let ends = (spans.starts[0], spans.starts[lists] as usize);
    if ends != (0, spans.spans.len()) || !spans.starts.is_sorted() {
        let expected = format!("ascending from 0 to {}", spans.spans.len());
        return Err(Error::Shape { what: "spans.starts", expected, got: format!("{:?}", spans.starts) });
    }
    for span in &spans.spans {
        if values {
            arena.check_span(span.block, span.lo, span.hi)?;
        } else {
            arena.check_keys(span.block, span.lo, span.hi)?;
        }
    }
    if let Some(trig) = args.trig {
        check_len("trig", trig.variant.len(), spans.spans.len())?;
        if trig.rope.rotary_dim() > dim {
            let expected = format!("at most {dim} rotated channels");
            return Err(Error::Shape { what: "rope", expected, got: trig.rope.rotary_dim().to_string() });
        }
        check_pairs(arena, trig, spans)?;
    }
    if let Some(mass) = mass {
        check_len("mass", mass.len(), mass_len(spans, if apart { 1 } else { arena.num_kv_heads() }))?;
    }
    Ok(heads / arena.num_kv_heads())
}

/// Refuses to rotate packed keys that have lost one channel of a pair.
fn check_pairs(arena: &Arena, trig: &SpanTrig, spans: &Spans) -> Result<()> {
    let Some(packed) = arena.packed() else { return Ok(()) };
    let mut sound: Option<&Channels> = None;
    for (span, &variant) in spans.spans.iter().zip(&trig.variant) {
        if !span.block.is_packed() || (variant == 0 && !span.rotate_keys) {
            continue;
        }
        let channels = packed.channels_of(span.block)?;
        if !sound.is_some_and(|sound| std::ptr::eq(sound, &**channels)) {
            if !channels.keeps_pairs_of(&trig.rope) {
                return Err(Error::Unsupported(
                    "keys whose channels were dropped one by one cannot be rotated; drop whole rotary pairs",
                ));
            }
            sound = Some(&**channels);
        }
    }
    Ok(())
}
