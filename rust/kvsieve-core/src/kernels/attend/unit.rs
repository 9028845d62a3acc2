//! One unit of work: the queries of one group over a stretch of spans, tile by tile.

use half::bf16;

use super::codes::{Codes, Keys, Values, code_passes, of_bits};
use super::inner::{Ahead, LINE, Rows, passes, score, score_dots, score_turned, softmax, weigh_all};
use super::thin::{Columns, SLOTS, asks, score_columns, score_columns_turned};
use super::{Common, TILE, Unit};
use crate::ids::{BLOCK, BlockId};
use crate::kernels::rotate::{Layout, Rope, load_row, rotate_row};
use crate::kernels::select::{Queries, four};
use crate::kernels::simd::{Elem, Simd, tanh};
use crate::plan::Span;
use crate::store::packed::{Channels, PAIRED, Packed, Packing};

/// A cache line, to align the scratch memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Memory that a thread keeps from unit to unit.
pub(super) struct Scratch {
    lines: Vec<Line>,
}

/// Bytes as `f32`s, cut into the parts that a unit needs.
struct Parts<'a> {
    /// The queries of the group, `[group][width]`, zero beyond the channels.
    base: &'a mut [f32],
    /// The same in `bf16`, two to a float, where the kernel can make use of them.
    dots: &'a mut [f32],
    /// The same, rotated for the spans at hand.
    turned: &'a mut [f32],
    /// Keys of one span, rotated: `[TILE][width]`. For keys that lie as codes, queries times their steps.
    keys: &'a mut [f32],
    /// Scores and then weights, `[group][TILE]`.
    scores: &'a mut [f32],
    /// Sums, `[group][value_width]`.
    sums: &'a mut [f32],
    max: &'a mut [f32],
    total: &'a mut [f32],
    /// Queries of the kept channels, as `base` and as `dots`.
    thin: &'a mut [f32],
    thin_dots: &'a mut [f32],
    /// The rotations of the slots of a block, for the kept pairs of a head: `[pairs][2][BLOCK]`.
    thin_trig: &'a mut [f32],
    /// Values of one tile, from their codes, or weights times their steps: `[TILE][value_width]`.
    values: &'a mut [f32],
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

impl Scratch {
    pub(super) const fn new() -> Self {
        Scratch { lines: Vec::new() }
    }

    fn cut(&mut self, group: usize, width: usize, value_width: usize, packed: bool) -> Parts<'_> {
        let (queries, tile) = (group * width, TILE * width);
        let thin = |n: usize| if packed { n } else { 0 };
        let sizes = [
            queries,
            queries,
            queries,
            tile,
            group * TILE,
            group * value_width,
            padded(group),
            padded(group),
            thin(queries),
            thin(queries),
            thin(tile),
            thin(TILE * value_width),
        ];
        let need = sizes.iter().sum::<usize>();
        if self.lines.len() * 16 < need {
            self.lines.resize(need.div_ceil(16), Line([0.0; 16]));
        }
        let lines: &mut [[f32; 16]] = {
            // SAFETY: a `Line` is 16 floats in 64 bytes, without padding; the borrow is passed on whole.
            unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len()) }
        };
        let mut rest = lines.as_flattened_mut();
        let [base, dots, turned, keys, scores, sums, max, total, thin, thin_dots, thin_trig, values] = sizes.map(|n| {
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(n);
            rest = others;
            mine
        });
        Parts { base, dots, turned, keys, scores, sums, max, total, thin, thin_dots, thin_trig, values }
    }
}

/// A span with its addresses.
#[derive(Clone, Copy)]
pub(super) struct Piece<E> {
    /// Codes, where keys are packed as codes.
    keys: *const E,
    /// Codes, where values are packed as codes.
    pub values: *const E,
    pub len: usize,
    block: BlockId,
    slot: u32,
    /// Of a packed block, those that have memory.
    slots: u32,
    variant: u32,
    rotate: bool,
}

impl<E> Piece<E> {
    /// Rows of values that lie together.
    fn of_values(values: *const E, len: usize) -> Self {
        Piece { keys: std::ptr::null(), values, len, block: BlockId(0), slot: 0, slots: 0, variant: 0, rotate: false }
    }
}

/// Consecutive spans of at most [`TILE`] keys in all, all plain or all packed with the same channels.
struct Tile<'a, E> {
    pieces: [Piece<E>; TILE],
    num_pieces: usize,
    len: usize,
    channels: Option<&'a Channels>,
    /// Bytes of a key and of a value.
    bytes: (usize, usize),
}

impl<'a, E: Elem> Tile<'a, E> {
    fn new() -> Self {
        let none = Piece::of_values(std::ptr::null(), 0);
        Tile { pieces: [none; TILE], num_pieces: 0, len: 0, channels: None, bytes: (0, 0) }
    }

    /// Takes as many of the spans from `*next` on as fit; spans are never cut.
    #[inline(always)]
    fn fill<const D: usize>(&mut self, common: &Common<'a>, kv_head: usize, next: &mut usize, end: usize) {
        (self.num_pieces, self.len) = (0, 0);
        let arena = common.arena;
        while *next < end {
            let span: Span = common.args.spans.spans[*next];
            let len = (span.hi - span.lo) as usize;
            if self.len + len > TILE {
                break;
            }
            if len > 0 {
                let (keys, values, channels, bytes, slots) = match arena.packed() {
                    Some(packed) if D == 0 && span.block.is_packed() => {
                        let rows = packed.rows(span.block, kv_head, span.lo);
                        let bytes = (packed.key_bytes(), packed.value_bytes());
                        (rows.keys, rows.values, Some(rows.channels), bytes, rows.slots as u32)
                    }
                    _ => {
                        let (keys, values) = arena.rows(span.block, kv_head, span.lo);
                        let bytes = (arena.key_dim() * size_of::<E>(), arena.value_dim() * size_of::<E>());
                        (keys, values, None, bytes, 0)
                    }
                };
                if self.num_pieces == 0 {
                    (self.channels, self.bytes) = (channels, bytes);
                } else if D == 0 && self.channels.map(std::ptr::from_ref) != channels.map(std::ptr::from_ref) {
                    break;
                }
                let variant = common.args.trig.map_or(0, |trig| trig.variant[*next]);
                let rotate = span.rotate_keys && common.args.trig.is_some();
                let (keys, values, block) = (keys.cast(), values.cast(), span.block);
                self.pieces[self.num_pieces] =
                    Piece { keys, values, len, block, slot: span.lo, slots, variant, rotate };
                self.num_pieces += 1;
                self.len += len;
            }
            *next += 1;
        }
    }

    /// Whether its keys lie here and there, so that going through them piece by piece would not pay.
    fn is_scattered(&self) -> bool {
        self.num_pieces * SHORT > self.len
            && self.channels.is_none()
            && self.pieces[..self.num_pieces].iter().all(|piece| piece.variant == 0 && !piece.rotate)
    }

    /// Where its keys or its values lie, for [`Ahead`].
    #[inline(always)]
    fn stretches<'b>(&self, values: bool, to: &'b mut [(*const u8, usize); TILE]) -> &'b [(*const u8, usize)] {
        for (to, piece) in to.iter_mut().zip(&self.pieces[..self.num_pieces]) {
            let (at, bytes) = if values { (piece.values, self.bytes.1) } else { (piece.keys, self.bytes.0) };
            *to = (at.cast(), (piece.len * bytes).div_ceil(LINE));
        }
        &to[..self.num_pieces]
    }
}

/// Spans of fewer slots than this, on average, are scored four keys at a time wherever they lie.
const SHORT: usize = 16;

/// Copies the group's queries, with the rope's factor where it is still missing.
///
/// # Safety
/// As for [`Simd`]; `E` is the dtype of the queries.
#[inline(always)]
unsafe fn load_queries<S: Simd, E: Elem>(common: &Common<'_>, unit: &Unit<'_>, width: usize, base: &mut [f32]) {
    let [_, _, queries, dim] = common.args.q.shape();
    for (g, to) in base.chunks_exact_mut(width).enumerate() {
        let from = common.args.q.row(unit.item / queries, unit.kv_head * common.group + g, unit.item % queries);
        // SAFETY: a checked row of `dim` elements of the dtype that the caller vouches for.
        unsafe { load_row::<S, E>(from.as_bytes_ptr().cast(), &mut to[..dim]) };
        to[dim..].fill(0.0);
        if common.factor != 1.0 {
            let rotary = common.args.trig.map_or(0, |trig| trig.rope.rotary_dim());
            to[..rotary].iter_mut().for_each(|x| *x *= common.factor);
        }
    }
}

/// Rotates the keys of a piece by their slots, into `[TILE][dim]`: for layouts of pairs that [`score_turned`] does not take.
///
/// # Safety
/// As for [`Simd`]; the piece holds `len` rows of `dim` elements.
#[inline(always)]
unsafe fn rotate_keys<S: Simd, E: Elem>(piece: &Piece<E>, rope: &Rope, dim: usize, to: &mut [f32]) {
    let pairs = rope.inv_freq().len();
    let table = rope.in_block();
    for (i, to) in to.chunks_exact_mut(dim).enumerate().take(piece.len) {
        let trig = &table[(piece.slot as usize + i) * 2 * pairs..][..2 * pairs];
        // SAFETY: row `i` of the piece has `dim` elements.
        unsafe { load_row::<S, E>(piece.keys.add(i * dim), to) };
        rotate_row(to, &trig[..pairs], &trig[pairs..], rope.layout());
    }
}

/// Calls `$run` with as many queries at a time as the instruction set has registers for.
macro_rules! by_heads {
    ($group:expr, |$h:ident, $HB:ident| $run:expr) => {{
        let mut $h = 0;
        while $h < $group {
            match ($group - $h).min(S::HEADS) {
                4 => {
                    const $HB: usize = 4;
                    $run
                }
                3 => {
                    const $HB: usize = 3;
                    $run
                }
                2 => {
                    const $HB: usize = 2;
                    $run
                }
                _ => {
                    const $HB: usize = 1;
                    $run
                }
            }
            $h += S::HEADS.min($group - $h);
        }
    }};
}

/// # Safety
/// As for [`Simd`]; all spans lie in blocks with memory; `E` is the dtype of arena and queries; `D` is 0 or both dims, and 0 where
/// there are packed blocks.
#[inline(always)]
pub(super) unsafe fn run_unit<S: Codes, E: Elem, const D: usize>(
    common: &Common<'_>,
    unit: &mut Unit<'_>,
    scratch: &mut Scratch,
) {
    let (dim, value_dim) = if D > 0 { (D, D) } else { (common.arena.key_dim(), common.arena.value_dim()) };
    let (width, value_width) = (padded(dim), padded(value_dim));
    let group = common.group;
    let packed = common.arena.packed().filter(|_| D == 0);
    let Parts { base, dots, turned, keys, scores, sums, max, total, thin, thin_dots, thin_trig, values } =
        scratch.cut(group, width, value_width, packed.is_some());
    // SAFETY: the caller's promise.
    unsafe { load_queries::<S, E>(common, unit, width, base) };
    // Queries as they came and keys as they lie need no conversion where the machine multiplies `bf16`.
    let use_dots = S::DOTS && E::IS_BF16 && dim.is_multiple_of(2 * S::LANES) && common.factor == 1.0;
    if use_dots {
        // SAFETY: as many halves as floats fit into the `dots`, twice.
        let to = unsafe { std::slice::from_raw_parts_mut(dots.as_mut_ptr().cast::<bf16>(), base.len()) };
        // The queries were `bf16`, so nothing is rounded.
        to.iter_mut().zip(base.iter()).for_each(|(to, &x)| *to = bf16::of_f32(x));
    }
    sums.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    total.fill(0.0);

    // Two, by turns: while one is worked on, the other is already on its way from memory.
    let mut tiles = [Tile::<E>::new(), Tile::<E>::new()];
    let mut turn = 0;
    let (mut next, end) = (unit.spans.start, unit.spans.end);
    let unit_keys = unit.logits.len() / group;
    let mut done = 0;
    let mut variant = 0;
    let mut known = Thin::default();
    tiles[0].fill::<D>(common, unit.kv_head, &mut next, end);
    while tiles[turn].len > 0 {
        tiles[1 - turn].fill::<D>(common, unit.kv_head, &mut next, end);
        let (tile, following) = (&tiles[turn], &tiles[1 - turn]);

        // Of the next tile, its keys while this one is scored, and its values while this one is weighed: memory is read at one pace.
        let heads = group.div_ceil(S::HEADS);
        let step =
            if use_dots && tile.pieces[0].variant == 0 && !tile.pieces[0].rotate { 2 * S::LANES } else { S::LANES };
        let calls = match packed {
            Some(packed) if tile.channels.is_some() => packed_calls::<S, E>(packed, &tile.pieces[0], tile.len),
            _ => tile.len * dim / (4 * step),
        };
        let calls = calls * heads + group * tile.len / S::LANES;
        let mut stretches = [(std::ptr::null(), 0); TILE];
        let mut ahead = Ahead::new(following.stretches(false, &mut stretches), calls);
        let upcoming = &following.pieces[0];

        if let Some(packed) = packed
            && following.num_pieces > 0
            && following.channels.is_some()
        {
            let rows = packed.rows(upcoming.block, unit.kv_head, 0);
            for (scales, bytes) in [rows.key_scales, rows.value_scales].into_iter().zip(packed.scale_bytes()) {
                for line in (0..bytes).step_by(64) {
                    // SAFETY: prefetching reads nothing; any address will do.
                    unsafe { S::prefetch(scales.cast::<u8>().wrapping_add(line)) };
                }
            }
        }

        let mut at = 0;
        let scattered = tile.is_scattered();
        if scattered {
            let queries = Queries { wide: base.as_ptr(), dots: dots.as_ptr().cast(), width };
            // SAFETY: the caller's promise: every piece has `len` rows of `dim` elements.
            unsafe { score_scattered::<S, E>(tile, dim, (queries, use_dots), group, scores, &mut ahead) };
        }
        for piece in &tile.pieces[..if scattered { 0 } else { tile.num_pieces }] {
            if let (Some(packed), Some(channels)) = (packed, tile.channels) {
                let to = scores[at..].as_mut_ptr();
                let parts = (&*base, &mut *thin, &mut *thin_dots, &mut *thin_trig, &mut *keys);
                // SAFETY: the caller's promise; scores for all heads, from where the piece begins.
                unsafe {
                    score_packed::<S, E>(
                        common,
                        packed,
                        channels,
                        unit.kv_head,
                        piece,
                        width,
                        parts,
                        to,
                        &mut known,
                        &mut ahead,
                    )
                };
                at += piece.len;
                continue;
            }
            if let Some(trig) = common.args.trig
                && piece.variant != 0
                && piece.variant != variant
            {
                variant = piece.variant;
                let pairs = trig.rope.inv_freq().len();
                let (cos, sin) = trig.table[(variant as usize - 1) * 2 * pairs..][..2 * pairs].split_at(pairs);
                for (from, to) in base.chunks_exact(width).zip(turned.chunks_exact_mut(width)) {
                    to.copy_from_slice(from);
                    rotate_row(to, cos, sin, trig.rope.layout());
                }
            }
            let q: &[f32] = if piece.variant == 0 { base } else { turned };
            let rope = common.args.trig.filter(|_| piece.rotate).map(|trig| &trig.rope);
            let rows = |h: usize| {
                let queries = q[h * width..].as_ptr();
                Rows { keys: piece.keys, n: piece.len, dim, queries, width }
            };
            let to = scores.as_mut_ptr();
            // SAFETY: `piece.len` rows of `dim` elements at all places; queries and scores for the heads from `h` on, of which there
            // are at least `HB`; the table of the rope has `BLOCK` rows, and the piece lies inside one block.
            unsafe {
                match rope {
                    None if use_dots && piece.variant == 0 => by_heads!(group, |h, HB| {
                        let queries = dots.as_ptr().cast::<bf16>().add(h * width).cast();
                        let rows = Rows { queries, ..rows(h).of_bf16() };
                        score_dots::<S, HB>(&rows, to.add(h * TILE + at), &mut ahead);
                    }),
                    None => by_heads!(group, |h, HB| score::<S, E, HB>(&rows(h), to.add(h * TILE + at), &mut ahead)),
                    Some(rope) if turns_by_vectors::<S>(rope, dim) => {
                        let pairs = rope.inv_freq().len();
                        let trig = (rope.in_block()[piece.slot as usize * 2 * pairs..].as_ptr(), pairs);
                        by_heads!(group, |h, HB| score_turned::<S, E, HB>(
                            &rows(h),
                            trig,
                            to.add(h * TILE + at),
                            &mut ahead
                        ));
                    }
                    Some(rope) => {
                        rotate_keys::<S, E>(piece, rope, dim, keys);
                        let keys = keys.as_ptr();
                        by_heads!(group, |h, HB| {
                            let Rows { n, dim, queries, width, .. } = rows(h);
                            let rows = Rows { keys, n, dim, queries, width };
                            score::<S, f32, HB>(&rows, to.add(h * TILE + at), &mut ahead);
                        });
                    }
                }
            }
            at += piece.len;
        }

        for g in 0..group {
            let scores = &mut scores[g * TILE..(g + 1) * TILE];
            // SAFETY: a whole tile of scores, in whole vectors.
            unsafe {
                scale_logits::<S>(
                    &mut scores[..tile.len.next_multiple_of(S::LANES)],
                    common.args.scale,
                    common.args.softcap,
                )
            };
            if unit_keys > 0 {
                unit.logits[g * unit_keys + done..][..tile.len].copy_from_slice(&scores[..tile.len]);
            }
            let sums = &mut sums[g * value_width..(g + 1) * value_width];
            // SAFETY: a whole tile of scores; sums are padded to whole vectors.
            unsafe { softmax::<S>(scores, tile.len, (&mut max[g], &mut total[g]), sums, &mut ahead) };
        }

        let code_bits =
            packed.map_or(0, |packed| if tile.channels.is_some() { packed.packing().value_bits } else { 0 });
        let in_pairs = code_bits > 0 && packed.is_some_and(|packed| packed.packing().group >= PAIRED);
        let calls = match in_pairs {
            true => tile.len / 2 * heads * code_passes::<S>(value_dim, code_bits),
            false => tile.len * heads * passes::<S>(value_dim),
        };
        let mut stretches = [(std::ptr::null(), 0); TILE];
        let mut ahead = Ahead::new(following.stretches(true, &mut stretches), calls);
        if let Some(packed) = packed
            && in_pairs
        {
            let mut at = 0;
            for piece in &tile.pieces[..tile.num_pieces] {
                let scales = packed.rows(piece.block, unit.kv_head, 0).value_scales;
                let (codes, slot, len) = (piece.values.cast(), piece.slot as usize, piece.len);
                let mine = Values { codes, scales, dim: value_dim, group: packed.packing().group, slot, len };
                let (scores, scratch) = (scores[at..].as_ptr(), values.as_mut_ptr());
                let to = sums.as_mut_ptr();
                // SAFETY: the piece lies in its block; weights and sums for the heads from `h` on, of which there are at least `HB`, at
                // most four; the scratch memory has `value_dim` numbers for each slot.
                unsafe {
                    for h in (0..group).step_by(S::HEADS) {
                        let to = (to.add(h * value_width), value_width);
                        let weigh = S::WEIGH[of_bits(code_bits)][S::HEADS.min(group - h) - 1];
                        weigh(&mine, scores.add(h * TILE), scratch, to, &mut ahead);
                    }
                }
                at += len;
            }
            done += tile.len;
            turn = 1 - turn;
            continue;
        }
        if let Some(packed) = packed
            && code_bits > 0
        {
            let mut at = 0;
            for piece in &tile.pieces[..tile.num_pieces] {
                let to = &mut values[at * value_dim..(at + piece.len) * value_dim];
                // SAFETY: the piece lies in its block; the tile has room for all its pieces.
                unsafe { packed.values_f32(piece.block, unit.kv_head, piece.slot, to) };
                at += piece.len;
            }
            let pieces = [Piece::of_values(values.as_ptr(), tile.len)];
            by_heads!(group, |h, HB| {
                let (weights, to) = (scores[h * TILE..].as_ptr(), (sums[h * value_width..].as_mut_ptr(), value_width));
                // SAFETY: weights and sums for the heads from `h` on, of which there are at least `HB`.
                unsafe { weigh_all::<S, f32, HB>(&pieces, value_dim, weights, to, &mut ahead) };
            });
            done += tile.len;
            turn = 1 - turn;
            continue;
        }
        by_heads!(group, |h, HB| {
            let (weights, to) = (scores[h * TILE..].as_ptr(), (sums[h * value_width..].as_mut_ptr(), value_width));
            // SAFETY: weights and sums for the heads from `h` on, of which there are at least `HB`.
            unsafe { weigh_all::<S, E, HB>(&tile.pieces[..tile.num_pieces], value_dim, weights, to, &mut ahead) };
        });
        done += tile.len;
        turn = 1 - turn;
    }

    for g in 0..group {
        unit.partial[g * value_dim..(g + 1) * value_dim]
            .copy_from_slice(&sums[g * value_width..g * value_width + value_dim]);
    }
    unit.partial[group * value_dim..group * (value_dim + 1)].copy_from_slice(&max[..group]);
    unit.partial[group * (value_dim + 1)..].copy_from_slice(&total[..group]);
}

/// Scores of a tile of short pieces, four keys at a time.
///
/// # Safety
/// As for [`run_unit`]; queries of the group, as `bf16` too if `use_dots`; a tile of scores for each.
#[inline(always)]
unsafe fn score_scattered<S: Simd, E: Elem>(
    tile: &Tile<'_, E>,
    dim: usize,
    (queries, use_dots): (Queries, bool),
    group: usize,
    scores: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let mut rows = [std::ptr::null(); TILE];
    let mut n = 0;
    for piece in &tile.pieces[..tile.num_pieces] {
        for i in 0..piece.len {
            rows[n] = piece.keys.wrapping_add(i * dim);
            n += 1;
        }
    }
    // A tile is whole fours; the last key stands in for those that are missing.
    let end = n.next_multiple_of(4);
    for i in n..end {
        rows[i] = rows[n - 1];
    }
    let calls = dim.div_ceil(if use_dots { 2 * S::LANES } else { S::LANES });
    for i in (0..end).step_by(4) {
        let keys = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
        let to = scores.as_mut_ptr();
        by_heads!(group, |h, HB| {
            // SAFETY: four rows of `dim` elements; `HB` queries and rows of scores from `h` on.
            unsafe {
                let to = to.add(h * TILE + i);
                if use_dots {
                    four::<S, E, HB, true>(keys, &queries.from(h), dim, to, TILE);
                } else {
                    four::<S, E, HB, false>(keys, &queries.from(h), dim, to, TILE);
                }
                for _ in 0..calls {
                    ahead.ask::<S>();
                }
            }
        });
    }
}

/// For which channels and rotation the thin queries were made, and for which channels the rotations of slots.
#[derive(Default)]
struct Thin<'a> {
    queries: Option<(&'a Channels, u32)>,
    trig: Option<&'a Channels>,
}

/// Which pair of `rope` the first of two kept channels belongs to.
#[inline(always)]
fn pair_of(channel: u16, layout: Layout) -> usize {
    match layout {
        Layout::Half => channel.into(),
        Layout::Interleaved => channel as usize / 2,
    }
}

/// Scores a piece of packed keys: queries meet the kept channels only.
///
/// # Safety
/// As for [`run_unit`]; `parts` are the queries, and scratch for those of the kept channels, their `bf16`, the rotations of the slots
/// and keys; room for the scores of the piece for each head, `TILE` apart.
#[inline(always)]
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
unsafe fn score_packed<'a, S: Codes, E: Elem>(
    common: &Common<'_>,
    packed: &Packed,
    channels: &'a Channels,
    kv_head: usize,
    piece: &Piece<E>,
    width: usize,
    (base, thin, dots, slots, scratch): (&[f32], &mut [f32], &mut [f32], &mut [f32], &mut [f32]),
    to: *mut f32,
    known: &mut Thin<'a>,
    ahead: &mut Ahead<'_>,
) {
    let (group, kept) = (common.group, channels.kept());
    let (index, pairs) = (channels.of(kv_head), channels.pairs(kv_head));
    let same = |of: Option<&Channels>| of.is_some_and(|of| std::ptr::eq(of, channels));
    let bits = packed.packing().key_bits;
    let use_dots = takes_dots::<S, E>(common, bits);
    if !same(known.queries.map(|q| q.0)) || known.queries.is_none_or(|q| q.1 != piece.variant) {
        for (from, to) in base.chunks_exact(width).zip(thin.chunks_exact_mut(width)) {
            for (x, &c) in to.iter_mut().zip(index) {
                *x = from[c as usize];
            }
            to[kept..].fill(0.0);
        }
        if let Some(trig) = common.args.trig
            && piece.variant != 0
        {
            let all = trig.rope.inv_freq().len();
            let (cos, sin) = trig.table[(piece.variant as usize - 1) * 2 * all..][..2 * all].split_at(all);
            for row in thin.chunks_exact_mut(width) {
                let (a, b) = row[..2 * pairs].split_at_mut(pairs);
                for ((a, b), &c) in a.iter_mut().zip(b).zip(index) {
                    let (cos, sin) = (cos[pair_of(c, trig.rope.layout())], sin[pair_of(c, trig.rope.layout())]);
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
        if use_dots {
            // SAFETY: as many halves as floats fit into the `dots`, twice.
            let to = unsafe { std::slice::from_raw_parts_mut(dots.as_mut_ptr().cast::<bf16>(), thin.len()) };
            to.iter_mut().zip(thin.iter()).for_each(|(to, &x)| *to = bf16::of_f32(x));
        }
        known.queries = Some((channels, piece.variant));
    }
    let rope = common.args.trig.filter(|_| piece.rotate).map(|trig| &trig.rope);
    if let Some(rope) = rope
        && !same(known.trig)
    {
        let all = rope.inv_freq().len();
        // The slots lie side by side, and so do their rotations.
        for (slot, from) in rope.in_block().chunks_exact(2 * all).enumerate() {
            for (i, &c) in index[..pairs].iter().enumerate() {
                let (pair, to) = (pair_of(c, rope.layout()), i * 2 * BLOCK as usize + slot);
                (slots[to], slots[to + BLOCK as usize]) = (from[pair], from[all + pair]);
            }
        }
        known.trig = Some(channels);
    }
    let queries = |h: usize| thin[h * width..].as_ptr();
    if bits > 0 {
        let Packing { group: tokens, .. } = packed.packing();
        let (scales, bytes) = (packed.rows(piece.block, kv_head, 0).key_scales, packed.key_bytes());
        let (codes, slot, len) = (piece.keys.cast(), piece.slot as usize, piece.len);
        let keys = Keys { codes, scales, bytes, kept, group: tokens, slot, len };
        let scratch = scratch.as_mut_ptr();
        // SAFETY: the piece lies in its block; queries and scores for the heads from `h` on, of which there are at least `HB`, at most
        // four; the scratch memory has a whole query for each slot; `pairs` rotations for each slot.
        unsafe {
            for h in (0..group).step_by(S::HEADS) {
                let (heads, queries, to) = (S::HEADS.min(group - h), (queries(h), width), to.add(h * TILE));
                if rope.is_some() {
                    let trig = (slots.as_ptr(), pairs);
                    S::SCORE_TURNED[heads - 1](&keys, bits, trig, queries, scratch, to, ahead);
                } else {
                    S::SCORE[of_bits(bits)][heads - 1](&keys, queries, scratch, to, ahead);
                }
            }
        }
        return;
    }
    let have = piece.slots as usize;
    let columns = Columns { keys: piece.keys, kept, slots: have, slot: piece.slot as usize, len: piece.len };
    let dots = (use_dots && piece.variant == 0).then_some(dots.as_ptr().cast::<bf16>());
    // SAFETY: the piece lies in its block; queries and scores for the heads from `h` on, of which there are at least `HB`; `pairs`
    // rotations for each slot.
    unsafe {
        if rope.is_some() {
            let trig = (slots.as_ptr(), pairs);
            by_heads!(group, |h, HB| {
                let (queries, to) = ((queries(h), width), to.add(h * TILE));
                if have == SLOTS {
                    score_columns_turned::<S, E, HB, SLOTS>(&columns, trig, queries, to, ahead);
                } else {
                    score_columns_turned::<S, E, HB, 0>(&columns, trig, queries, to, ahead);
                }
            });
        } else {
            by_heads!(group, |h, HB| {
                let (queries, dots) = ((queries(h), width), dots.map(|dots| dots.wrapping_add(h * width)));
                let to = to.add(h * TILE);
                if have == SLOTS {
                    score_columns::<S, E, HB, SLOTS>(&columns, queries, dots, to, ahead);
                } else {
                    score_columns::<S, E, HB, 0>(&columns, queries, dots, to, ahead);
                }
            });
        }
    }
}

/// Whether packed keys, as numbers, meet queries in `bf16`.
#[inline(always)]
fn takes_dots<S: Simd, E: Elem>(common: &Common<'_>, bits: u32) -> bool {
    S::DOTS && E::IS_BF16 && bits == 0 && common.factor == 1.0
}

/// How often scoring packed keys asks for memory, for each number of heads that it takes at a time.
#[inline(always)]
fn packed_calls<S: Simd, E: Elem>(packed: &Packed, piece: &Piece<E>, len: usize) -> usize {
    let Packing { key_kept: kept, key_bits: bits, .. } = packed.packing();
    match bits {
        _ if piece.rotate => len.div_ceil(2 * S::LANES) * kept / if bits > 0 { 1 } else { 2 },
        0 => asks::<S, E>(kept, len),
        _ => len.div_ceil(2 * S::LANES) * packed.key_bytes().div_ceil(4),
    }
}

/// Whether [`score_turned`] can do it.
#[inline(always)]
fn turns_by_vectors<S: Simd>(rope: &Rope, dim: usize) -> bool {
    rope.layout() == Layout::Half && rope.inv_freq().len().is_multiple_of(S::LANES) && dim.is_multiple_of(S::LANES)
}

/// Scores to logits.
///
/// # Safety
/// As for [`Simd`]; whole vectors.
#[inline(always)]
unsafe fn scale_logits<S: Simd>(scores: &mut [f32], scale: f32, softcap: Option<f32>) {
    for x in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: a vector of scores.
        unsafe {
            let y = S::mul(S::load(x.as_ptr()), S::splat(scale));
            let y = match softcap {
                Some(cap) => S::mul(S::splat(cap), tanh::<S>(S::mul(y, S::splat(1.0 / cap)))),
                None => y,
            };
            S::store(x.as_mut_ptr(), y);
        }
    }
}
