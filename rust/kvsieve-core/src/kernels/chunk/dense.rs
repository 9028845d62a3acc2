//! Attention of a chunk's queries to keys and values that lie together in tensors: causal, within a window, or to all of them.
//!
//! A unit of work is some queries and a key-value head, as in the searching attention; so neither threads nor their order change a bit.

use std::cell::RefCell;
use std::ops::Range;

use super::attend::{Block, Place, Scratch};
use super::compiled::{Kernels, kernels};
use super::shape::{Shape, TILE, Words, padded_rows};
use super::tile::{Tile, Tiles};
use crate::kernels::isa::Level;
use crate::kernels::queries::check_softcap;
use crate::kernels::threads;
use crate::tensor::{Dtype, View, check_dtype, check_len};
use crate::{Error, Result, fault};

/// Rows, one a query and head, that go through the keys together: what is added up of them stays in the second-level cache.
const UNIT: usize = 288;

/// Products of a query and a key, over all heads, between two questions whether to stop: some tens of milliseconds.
const BREATH: usize = 16 << 20;

/// Everything about the attention.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    /// `[1, heads, queries, key_dim]`, as the keys are rotated.
    pub q: View<'a>,
    /// `[1, kv_heads, keys, key_dim]`
    pub k: View<'a>,
    /// `[1, kv_heads, keys, value_dim]`
    pub v: View<'a>,
    /// Of all three. Products are of this dtype where the level has them (pairs of `bf16`), else of `f32`; sums are `f32`.
    pub dtype: Dtype,
    /// Of each key the first query that sees it, and the first after that one that does not.
    pub from: &'a [u32],
    pub to: &'a [u32],
    pub scale: f32,
    pub softcap: Option<f32>,
    pub threads: usize,
    pub level: Level,
}

impl Dense<'_> {
    /// Refuses what does not fit together; returns the number of query heads of a group.
    fn check(&self, out: &[f32], lse: &[f32]) -> Result<usize> {
        self.level.check()?;
        threads::check(self.threads)?;
        for (what, view) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            check_dtype(what, view.elems(), self.dtype)?;
        }
        let [rows, heads, queries, dim] = self.q.shape();
        let [k_rows, kv_heads, keys, _] = self.k.shape();
        let [v_rows, v_heads, values, value_dim] = self.v.shape();
        let wrong =
            |what, expected: String, got: [usize; 4]| Err(Error::Shape { what, expected, got: format!("{got:?}") });
        if rows != 1 || heads == 0 || dim == 0 {
            return wrong("q", "[1, heads, queries, channels]".to_string(), self.q.shape());
        }
        if k_rows != 1 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || self.k.shape()[3] != dim {
            return wrong("k", format!("[1, a divisor of {heads}, keys, {dim}]"), self.k.shape());
        }
        if (v_rows, v_heads, values) != (1, kv_heads, keys) || value_dim == 0 {
            return wrong("v", format!("[1, {kv_heads}, {keys}, channels]"), self.v.shape());
        }
        for (what, edges) in [("from", self.from), ("to", self.to)] {
            check_len(what, edges.len(), keys)?;
        }
        check_len("out", out.len(), queries * heads * value_dim)?;
        check_len("lse", lse.len(), heads * queries)?;
        check_softcap(self.softcap)?;
        Ok(heads / kv_heads)
    }

    /// From the first to the last key that some of the queries may see.
    fn keys_of(&self, queries: &Range<usize>) -> Range<usize> {
        let first = self.to.iter().position(|&to| to as usize > queries.start).unwrap_or(self.to.len());
        let end = self.from.iter().rposition(|&from| (from as usize) < queries.end).map_or(0, |last| last + 1);
        first.min(end)..end
    }
}

/// The keys and values of a head, tile by tile.
struct Keys<'a> {
    args: &'a Dense<'a>,
    head: usize,
    queries: Range<usize>,
    left: Range<usize>,
}

impl Tiles for Keys<'_> {
    fn next(&mut self, tile: &mut Tile) {
        (tile.len, tile.ragged) = (0, false);
        let Keys { args, head, queries, left } = self;
        let (first, count) = (queries.start as u32, queries.len() as u32);
        let mine = left.start..left.end.min(left.start + TILE);
        left.start = mine.end;
        for j in mine {
            let (from, to) =
                (args.from[j].saturating_sub(first).min(count), args.to[j].saturating_sub(first).min(count));
            tile.keys[tile.len] = args.k.row(0, *head, j).as_bytes_ptr();
            tile.values[tile.len] = args.v.row(0, *head, j).as_bytes_ptr();
            (tile.from[tile.len], tile.to[tile.len]) = (from, to.max(from));
            tile.ragged |= from > 0 || to < count;
            tile.len += 1;
        }
    }
}

/// Where the rows of a unit go.
#[derive(Clone, Copy)]
struct Out {
    out: *mut f32,
    lse: *mut f32,
    heads: usize,
    queries: usize,
    value_dim: usize,
    group: usize,
    /// The unit's own.
    head: usize,
    first: usize,
}

// SAFETY: the pointers are into memory that is borrowed for the call; a unit writes the rows of its own queries and heads alone.
unsafe impl Sync for Out {}

impl Out {
    fn query_and_head(&self, row: usize) -> (usize, usize) {
        (self.first + row / self.group, self.head * self.group + row % self.group)
    }
}

impl Place for Out {
    fn is_wide(&self) -> bool {
        true
    }

    unsafe fn out(&self, row: usize) -> *mut u8 {
        let (query, head) = self.query_and_head(row);
        self.out.wrapping_add((query * self.heads + head) * self.value_dim).cast()
    }

    unsafe fn lse(&self, row: usize, lse: f32) {
        let (query, head) = self.query_and_head(row);
        // SAFETY: `check` has seen that there is a place for every query and head.
        unsafe { *self.lse.add(head * self.queries + query) = lse };
    }
}

thread_local! {
    static KEPT: RefCell<(Words, Scratch)> = const { RefCell::new((Words::new(), Scratch::new())) };
}

/// What all units have in common.
struct Call<'a> {
    args: &'a Dense<'a>,
    kernels: Kernels,
    shape: Shape,
    place: Out,
}

impl Call<'_> {
    fn run(&self, head: usize, queries: Range<usize>) {
        let Call { args, kernels, shape, place } = self;
        let group = place.group;
        let mut rows = Vec::with_capacity(queries.len() * group);
        for query in queries.clone() {
            rows.extend((0..group).map(|g| args.q.row(0, head * group + g, query).as_bytes_ptr()));
        }
        KEPT.with_borrow_mut(|(words, scratch)| {
            let room = padded_rows(rows.len()) * shape.padded();
            let words = &mut words.of(room)[..room];
            words[rows.len() * shape.padded()..].fill(0);
            // SAFETY: the level is available, and the kernel is of the view's dtype; rows of the view, and room for them.
            unsafe { (kernels.queries)(&rows, shape, words) };
            let Dense { scale, softcap, .. } = **args;
            let block =
                Block { shape: *shape, queries: words, num_rows: rows.len(), group, scale, softcap, sinks: None };
            let place = Out { head, first: queries.start, ..*place };
            let mut keys = Keys { args, head, left: args.keys_of(&queries), queries };
            // SAFETY: as above; `Keys` hands out rows of the views; no other unit has these queries and heads.
            unsafe { (kernels.attend)(&block, &mut keys, &place, scratch) };
        });
    }
}

/// Attends every query to the keys that it sees.
///
/// * `out`: `[queries, heads, value_dim]`; zero for a query that sees nothing.
/// * `lse`: `[heads, queries]`; `-inf` there.
///
/// `stop` is asked now and then; after [`Error::Interrupted`] what was written is of no use.
pub fn attend_dense(
    args: &Dense<'_>,
    out: &mut [f32],
    lse: &mut [f32],
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let group = args.check(out, lse)?;
    let [_, heads, queries, dim] = args.q.shape();
    let [_, kv_heads, keys, value_dim] = args.v.shape();
    let dots = args.level == Level::Avx512Bf16 && args.dtype == Dtype::BF16;
    let (out, lse) = (out.as_mut_ptr(), lse.as_mut_ptr());
    let call = Call {
        args,
        kernels: kernels(args.level, args.dtype, dots),
        shape: Shape { dim, value_dim, dots },
        place: Out { out, lse, heads, queries, value_dim, group, head: 0, first: 0 },
    };
    // As many as make units of about the wanted rows, all of a size.
    let parts = (queries * group).div_ceil(UNIT).max(1);
    let size = queries.div_ceil(parts).max(1);
    // Head by head, because neighbouring queries read much the same keys; the last queries first, because they see most.
    let mut units: Vec<(usize, Range<usize>)> = (0..kv_heads)
        .flat_map(|head| (0..queries).step_by(size).rev().map(move |first| (head, first..queries.min(first + size))))
        .collect();
    let breath = (BREATH / (size * group * keys.max(1))).clamp(1, 64) * args.threads;
    for (i, units) in units.chunks_mut(breath).enumerate() {
        if i > 0 && stop() {
            return Err(Error::Interrupted);
        }
        threads::for_each(args.threads, units, |(head, queries)| {
            fault::may_panic();
            call.run(*head, queries.clone());
        })?;
    }
    Ok(())
}
