//! The two kernels of a chunk: scores of keys for many queries at once, and attention of many queries to one list of keys.
//!
//! Both are products of small matrices. Keys are brought together in tiles and turned, so that neighbouring lanes are neighbouring
//! keys: a product then needs no sums across lanes, and the greatest score over queries is the greater of two registers. Everything
//! is in words of 32 bits: a number, or two `bf16` where the machine multiplies pairs of them.

use std::slice;

use half::bf16;

use crate::kernels::rotate::load_row;
use crate::kernels::simd::{Elem, Simd, tanh};

/// Keys of one tile.
pub(super) const TILE: usize = 128;
/// Keys that are scored at once.
pub(super) const STRIP: usize = 64;
/// Rows of queries that one register block takes.
const ROWS: usize = 4;
/// Rows that go through a tile together: their scores stay in the first-level cache until they are weights.
const PANEL: usize = 16;

/// A cache line, to align memory: a vector across two of them takes twice as long.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Aligned words that are kept from unit to unit.
pub(super) struct Words(Vec<Line>);

impl Words {
    pub const fn new() -> Self {
        Words(Vec::new())
    }

    /// At least `n` words; what is in them is of no use.
    pub fn of(&mut self, n: usize) -> &mut [u32] {
        let lines = n.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 16]));
        }
        // SAFETY: a `Line` is 16 words in 64 bytes, without padding; the borrow is passed on whole.
        unsafe { slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }
}

/// How numbers become words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub dim: usize,
    pub value_dim: usize,
    /// Whether a word holds two `bf16`.
    pub dots: bool,
}

impl Shape {
    /// Words of a key.
    pub fn words(self) -> usize {
        if self.dots { self.dim.div_ceil(2) } else { self.dim }
    }

    /// The same in whole lines.
    pub fn padded(self) -> usize {
        self.words().next_multiple_of(16)
    }

    /// Numbers of a value, in whole lines.
    pub fn value_padded(self) -> usize {
        self.value_dim.next_multiple_of(16)
    }
}

/// Rows of words that are filled up to a multiple of [`ROWS`].
pub(super) fn padded_rows(n: usize) -> usize {
    n.next_multiple_of(ROWS)
}

/// Keys to score, for [`Kernels::score`].
pub(super) struct Batch<'a> {
    /// Addresses of the keys.
    pub keys: &'a [*const u8],
    /// For each key the first query that may see it; empty when all may.
    pub seen_from: &'a [u32],
    pub shape: Shape,
    /// `[padded_rows(num_queries)][padded]`, by [`Kernels::queries`].
    pub queries: &'a [u32],
    pub num_queries: usize,
    pub turned: &'a mut Words,
    pub spare: &'a mut Words,
    /// For each key its greatest product with a query that may see it.
    pub out: &'a mut [f32],
}

/// Keys and values that many queries read.
pub(super) struct Tile {
    pub keys: [*const u8; TILE],
    pub values: [*const u8; TILE],
    /// A key is seen by queries `from..to` of the block.
    pub from: [u32; TILE],
    pub to: [u32; TILE],
    pub len: usize,
    /// Whether some query does not see some key.
    pub ragged: bool,
}

impl Tile {
    pub const fn new() -> Self {
        let none = std::ptr::null();
        Tile { keys: [none; TILE], values: [none; TILE], from: [0; TILE], to: [0; TILE], len: 0, ragged: false }
    }
}

/// Hands out the tiles of a unit.
pub(super) trait Tiles {
    fn next(&mut self, tile: &mut Tile);
}

/// The queries of a block and a group, for [`Kernels::attend`].
pub(super) struct Block<'a> {
    pub shape: Shape,
    /// `[padded_rows(num_rows)][padded]`, by [`Kernels::queries`]: query by query, in each the heads of the group.
    pub queries: &'a [u32],
    pub num_rows: usize,
    pub group: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
    /// Of the group's heads.
    pub sinks: Option<&'a [f32]>,
}

/// Where a row of the result goes.
pub(super) trait Place {
    /// # Safety
    /// Where [`Place`]s are made: nobody else writes the `value_dim` elements.
    unsafe fn out(&self, row: usize) -> *mut u8;
    /// # Safety
    /// As for `out`.
    unsafe fn lse(&self, row: usize, lse: f32);
}

/// Memory that a thread keeps.
pub(super) struct Scratch {
    tiles: [Tile; 2],
    keys: Words,
    values: Words,
    spare: Words,
    scores: Words,
    weights: Words,
    sums: Words,
    /// Maxima, sums of weights, and what older sums are worth.
    max: Vec<f32>,
    total: Vec<f32>,
    decay: Vec<f32>,
    /// Keys of a ragged tile whose values are not all finite.
    odd: Vec<usize>,
}

impl Scratch {
    pub const fn new() -> Self {
        Scratch {
            tiles: [Tile::new(), Tile::new()],
            keys: Words::new(),
            values: Words::new(),
            spare: Words::new(),
            scores: Words::new(),
            weights: Words::new(),
            sums: Words::new(),
            max: Vec::new(),
            total: Vec::new(),
            decay: Vec::new(),
            odd: Vec::new(),
        }
    }
}

/// `acc += A B` for [`ROWS`] rows of `A` and `N` vectors of `B`'s columns, over `steps` words of a row.
///
/// # Safety
/// As for [`Simd`]; `steps` words at `a` and the rows below it, `steps` rows of `N` vectors at `b`.
#[inline(always)]
unsafe fn product<S: Simd, const DOTS: bool, const N: usize>(
    (a, a_stride): (*const u32, usize),
    (b, b_stride): (*const u32, usize),
    steps: usize,
    mut acc: [[S::V; N]; ROWS],
) -> [[S::V; N]; ROWS] {
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..steps {
            let row = b.add(i * b_stride);
            if DOTS {
                let mut x = [S::words(row); N];
                for (n, x) in x.iter_mut().enumerate().skip(1) {
                    *x = S::words(row.add(n * S::LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = a.add(r * a_stride + i).cast::<bf16>();
                    for n in 0..N {
                        acc[n] = S::dot_pair(acc[n], x[n], q);
                    }
                }
            } else {
                let mut x = [S::load(row.cast()); N];
                for (n, x) in x.iter_mut().enumerate().skip(1) {
                    *x = S::load(row.add(n * S::LANES).cast());
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = S::splat(*a.add(r * a_stride + i).cast::<f32>());
                    for n in 0..N {
                        acc[n] = S::fma(x[n], q, acc[n]);
                    }
                }
            }
        }
    }
    acc
}

/// Turns keys into columns: `to[word * stride + key]`, for up to the next multiple of 16 keys.
///
/// # Safety
/// As for [`Simd`]; all keys are rows of `dim` elements of `E`; room for `padded` rows of `stride` words at `to`, and for 16 keys in
/// `spare`.
#[inline(always)]
unsafe fn turn_keys<S: Simd, E: Elem, const DOTS: bool>(
    keys: &[*const u8],
    shape: &Shape,
    (to, stride): (*mut u32, usize),
    spare: &mut Words,
) {
    let padded = shape.padded();
    let spare = spare.of(16 * padded).as_mut_ptr();
    let as_they_lie = shape.words() == padded && (size_of::<E>() == 4 || (DOTS && shape.dim == 2 * padded));
    for (i, keys) in keys.chunks(16).enumerate() {
        let mut rows = [keys[keys.len() - 1].cast::<u32>(); 16];
        for (row, &key) in rows.iter_mut().zip(keys) {
            *row = key.cast();
        }
        if !as_they_lie {
            for (j, row) in rows.iter_mut().enumerate() {
                // SAFETY: one of the 16 keys that there is room for.
                unsafe {
                    let to = spare.add(j * padded);
                    bring::<S, E, DOTS>(row.cast(), shape.dim, slice::from_raw_parts_mut(to, padded));
                    *row = to;
                }
            }
        }
        for word in (0..padded).step_by(16) {
            for row in &mut rows {
                if word > 0 {
                    *row = row.wrapping_add(16);
                }
            }
            // SAFETY: every row has `padded` words; there is room for as many rows of `stride` words.
            unsafe { S::turn(&rows, to.add(word * stride + i * 16), stride) };
        }
    }
}

/// One row as words, zero beyond its channels.
///
/// # Safety
/// As for [`Simd`]; `dim` elements of `E`, which is `bf16` if `DOTS`.
#[inline(always)]
unsafe fn bring<S: Simd, E: Elem, const DOTS: bool>(from: *const E, dim: usize, to: &mut [u32]) {
    // SAFETY: `to` holds the whole row: `dim` numbers, or half as many words.
    unsafe {
        to.fill(0);
        if DOTS {
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr().cast::<E>(), dim);
        } else {
            load_row::<S, E>(from, slice::from_raw_parts_mut(to.as_mut_ptr().cast(), dim));
        }
    }
}

/// # Safety
/// As for [`Simd`]; rows of the shape's channels, and room for as many.
#[inline(always)]
pub(super) unsafe fn queries<S: Simd, E: Elem, const DOTS: bool>(from: &[*const u8], shape: &Shape, to: &mut [u32]) {
    for (&from, to) in from.iter().zip(to.chunks_exact_mut(shape.padded())) {
        // SAFETY: the caller's promise.
        unsafe { bring::<S, E, DOTS>(from.cast(), shape.dim, to) };
    }
}

/// Scores a batch.
///
/// # Safety
/// As for [`Simd`]; all keys are rows of the shape's channels.
#[inline(always)]
pub(super) unsafe fn score<S: Simd, E: Elem, const DOTS: bool>(batch: &mut Batch<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::HEADS >= 4 {
            score_by::<S, E, DOTS, 4>(batch);
        } else {
            score_by::<S, E, DOTS, 2>(batch);
        }
    }
}

#[inline(always)]
unsafe fn score_by<S: Simd, E: Elem, const DOTS: bool, const N: usize>(batch: &mut Batch<'_>) {
    let Batch { keys, seen_from, shape, queries, num_queries, turned, spare, out } = batch;
    let (words, padded) = (shape.words(), shape.padded());
    let turned = turned.of(padded * STRIP).as_mut_ptr();
    let lines = (shape.dim * size_of::<E>()).div_ceil(64);
    let width = N * S::LANES;
    for (i, (mine, out)) in keys.chunks(STRIP).zip(out.chunks_mut(STRIP)).enumerate() {
        for key in keys.iter().skip((i + 1) * STRIP).take(STRIP) {
            for line in 0..lines {
                // SAFETY: any address may be asked for.
                unsafe { S::prefetch(key.wrapping_add(line * 64)) };
            }
        }
        // SAFETY: `mine` are at most a strip of keys.
        unsafe { turn_keys::<S, E, DOTS>(mine, shape, (turned, STRIP), spare) };
        let from = if seen_from.is_empty() { &[][..] } else { &seen_from[i * STRIP..][..mine.len()] };
        let ragged = from.iter().any(|&f| f > 0);
        let mut found = [f32::NEG_INFINITY; STRIP];
        for column in (0..mine.len()).step_by(width) {
            // SAFETY: a strip is a multiple of every width; queries are filled up to whole rows of blocks.
            unsafe {
                let mut best = [S::splat(f32::NEG_INFINITY); N];
                for row in (0..*num_queries).step_by(ROWS) {
                    let a = (queries.as_ptr().add(row * padded), padded);
                    let b = (turned.add(column).cast_const(), STRIP);
                    let acc = product::<S, DOTS, N>(a, b, words, [[S::splat(0.0); N]; ROWS]);
                    let real = ROWS.min(*num_queries - row);
                    if ragged {
                        let mut scores = [[0f32; 64]; ROWS];
                        for (scores, acc) in scores.iter_mut().zip(acc) {
                            for (n, acc) in acc.into_iter().enumerate() {
                                S::store(scores.as_mut_ptr().add(n * S::LANES), acc);
                            }
                        }
                        for (r, scores) in scores.iter().enumerate().take(real) {
                            for (j, &x) in scores.iter().enumerate().take(width.min(mine.len() - column)) {
                                let at = column + j;
                                if (row + r) as u32 >= from[at] && x > found[at] {
                                    found[at] = x;
                                }
                            }
                        }
                    } else {
                        // Rows that fill up a block would score 0.
                        for (r, acc) in acc.iter().enumerate() {
                            if r < real {
                                for n in 0..N {
                                    // In this order NaN is less than everything.
                                    best[n] = S::max(acc[n], best[n]);
                                }
                            }
                        }
                    }
                }
                if !ragged {
                    for (n, best) in best.into_iter().enumerate() {
                        S::store(found.as_mut_ptr().add(column + n * S::LANES), best);
                    }
                }
            }
        }
        out.copy_from_slice(&found[..out.len()]);
    }
}

/// Attends the rows of a block to the keys of all tiles.
///
/// # Safety
/// As for [`Simd`]; all keys and values are rows of the shape's channels; `place` is sound for the block's rows.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Elem, const DOTS: bool>(
    block: &Block<'_>,
    tiles: &mut dyn Tiles,
    place: &dyn Place,
    scratch: &mut Scratch,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::HEADS >= 4 {
            attend_by::<S, E, DOTS, 4>(block, tiles, place, scratch);
        } else {
            attend_by::<S, E, DOTS, 2>(block, tiles, place, scratch);
        }
    }
}

#[inline(always)]
unsafe fn attend_by<S: Simd, E: Elem, const DOTS: bool, const N: usize>(
    block: &Block<'_>,
    source: &mut dyn Tiles,
    place: &dyn Place,
    scratch: &mut Scratch,
) {
    let Block { shape, queries, num_rows, group, .. } = *block;
    let (words, padded, value_width) = (shape.words(), shape.padded(), shape.value_padded());
    let rows = padded_rows(num_rows);
    let Scratch { tiles, keys, values, spare, scores, weights, sums, max, total, decay, odd } = scratch;
    let keys = keys.of(padded * TILE).as_mut_ptr();
    let values = values.of(TILE * value_width).as_mut_ptr();
    let scores = scores.of(PANEL * TILE).as_mut_ptr().cast::<f32>();
    // Numbers are weighed where they were scores.
    let weights = if DOTS { weights.of(PANEL * TILE / 2).as_mut_ptr() } else { scores.cast() };
    let weight_stride = if DOTS { TILE / 2 } else { TILE };
    let sums = sums.of(rows * value_width);
    sums.fill(0);
    let sums = sums.as_mut_ptr().cast::<f32>();
    max.clear();
    max.resize(rows, f32::NEG_INFINITY);
    total.clear();
    total.resize(rows, 0.0);
    decay.clear();
    decay.resize(rows, 0.0);

    let key_lines = (shape.dim * size_of::<E>()).div_ceil(64);
    let value_lines = (shape.value_dim * size_of::<E>()).div_ceil(64);
    let mut turn = 0;
    source.next(&mut tiles[0]);
    while tiles[turn].len > 0 {
        source.next(&mut tiles[1 - turn]);
        let (tile, following) = (&tiles[turn], &tiles[1 - turn]);
        for i in 0..following.len {
            // SAFETY: any address may be asked for.
            unsafe {
                for line in 0..key_lines {
                    S::prefetch(following.keys[i].wrapping_add(line * 64));
                }
                for line in 0..value_lines {
                    S::prefetch(following.values[i].wrapping_add(line * 64));
                }
            }
        }
        let count = tile.len;
        let filled = count.next_multiple_of(S::LANES);
        let hides = tile.ragged || filled > count;
        let mut from = [f32::MAX; TILE];
        let mut to = [0f32; TILE];
        if hides {
            for i in 0..count {
                // Half a query off, so that `<` does for `<=`.
                (from[i], to[i]) = (tile.from[i] as f32 - 0.5, tile.to[i] as f32);
            }
        }
        // SAFETY: a tile of keys and values, and room for as many.
        unsafe {
            turn_keys::<S, E, DOTS>(&tile.keys[..count], &shape, (keys, TILE), spare);
            bring_values::<S, E, DOTS>(tile, &shape, num_rows / group, (values, value_width), odd);
        }

        for top in (0..rows).step_by(PANEL) {
            let height = PANEL.min(rows - top);
            // SAFETY: whole blocks of rows; a tile is a multiple of every width, and so are the lines that keys were brought to.
            unsafe {
                for column in (0..count).step_by(N * S::LANES) {
                    for row in (0..height).step_by(ROWS) {
                        let a = (queries.as_ptr().add((top + row) * padded), padded);
                        let b = (keys.add(column).cast_const(), TILE);
                        let acc = product::<S, DOTS, N>(a, b, words, [[S::splat(0.0); N]; ROWS]);
                        for (r, acc) in acc.into_iter().enumerate() {
                            for (n, acc) in acc.into_iter().enumerate() {
                                S::store(scores.add((row + r) * TILE + column + n * S::LANES), acc);
                            }
                        }
                    }
                }
                for row in 0..height {
                    let query = ((top + row) / group) as f32;
                    let see = if hides { Some((query, &from, &to)) } else { None };
                    let state = (&mut max[top + row], &mut total[top + row], &mut decay[top + row]);
                    let into = weights.add(row * weight_stride);
                    softmax::<S, DOTS>(scores.add(row * TILE), filled, (block.scale, block.softcap), see, state, into);
                }
                let steps = if DOTS { count.div_ceil(2) } else { count };
                let mut column = 0;
                while column + N * S::LANES <= value_width {
                    for row in (0..height).step_by(ROWS) {
                        let a = (weights.add(row * weight_stride).cast_const(), weight_stride);
                        let b = (values.add(column).cast_const(), value_width);
                        let to = sums.add((top + row) * value_width + column);
                        weigh::<S, DOTS, N>(a, b, steps, &decay[top + row..], (to, value_width));
                    }
                    column += N * S::LANES;
                }
                while column < value_width {
                    for row in (0..height).step_by(ROWS) {
                        let a = (weights.add(row * weight_stride).cast_const(), weight_stride);
                        let b = (values.add(column).cast_const(), value_width);
                        let to = sums.add((top + row) * value_width + column);
                        weigh::<S, DOTS, 1>(a, b, steps, &decay[top + row..], (to, value_width));
                    }
                    column += S::LANES;
                }
                // Values that are not finite, only for who sees them: for others 0 times infinity would be NaN.
                for &i in odd.iter() {
                    let value = tile.values[i].cast::<E>();
                    for row in 0..height.min(num_rows.saturating_sub(top)) {
                        let query = ((top + row) / group) as u32;
                        if query < tile.from[i] || query >= tile.to[i] {
                            continue;
                        }
                        let weight = if DOTS {
                            (*weights.add(row * weight_stride).cast::<bf16>().add(i)).to_f32()
                        } else {
                            *weights.add(row * weight_stride).cast::<f32>().add(i)
                        };
                        for c in 0..shape.value_dim {
                            *sums.add((top + row) * value_width + c) += weight * (*value.add(c)).to_f32();
                        }
                    }
                }
            }
        }
        turn = 1 - turn;
    }

    for row in 0..num_rows {
        let (max, weights) = (max[row], total[row]);
        let sink = block.sinks.map_or(0.0, |sinks| (sinks[row % group] - max).exp());
        // Who reads nothing has sums of zero.
        let norm = if weights == 0.0 { 0.0 } else { 1.0 / (weights + sink) };
        // SAFETY: the caller's promise.
        unsafe {
            place.lse(row, if weights == 0.0 { f32::NEG_INFINITY } else { max + weights.ln() });
            let (from, to) = (sums.add(row * value_width), place.out(row).cast::<E>());
            let whole = shape.value_dim / S::LANES * S::LANES;
            let by = S::splat(norm);
            for c in (0..whole).step_by(S::LANES) {
                E::store::<S>(to.add(c), S::mul(S::load(from.add(c)), by));
            }
            for c in whole..shape.value_dim {
                *to.add(c) = E::of_f32(*from.add(c) * norm);
            }
        }
    }
}

/// Brings the values of a tile together: as they are, or of two keys each in one word.
///
/// # Safety
/// As for [`Simd`]; room for a tile.
#[inline(always)]
unsafe fn bring_values<S: Simd, E: Elem, const DOTS: bool>(
    tile: &Tile,
    shape: &Shape,
    num_queries: usize,
    (to, width): (*mut u32, usize),
    odd: &mut Vec<usize>,
) {
    let dim = shape.value_dim;
    odd.clear();
    if tile.ragged {
        for i in 0..tile.len {
            if tile.from[i] > 0 || (tile.to[i] as usize) < num_queries {
                let value = tile.values[i].cast::<E>();
                let mut sum = 0f32;
                for c in 0..dim {
                    // SAFETY: a row of `dim` elements. Zero times what is not finite is NaN.
                    sum += unsafe { (*value.add(c)).to_f32() } * 0.0;
                }
                if sum.is_nan() {
                    odd.push(i);
                }
            }
        }
    }
    // SAFETY: rows of `dim` elements, and room for a tile of them.
    unsafe {
        if DOTS {
            for i in (0..tile.len).step_by(2) {
                let (a, b) = (tile.values[i].cast::<u16>(), tile.values[(i + 1).min(tile.len - 1)].cast::<u16>());
                let to = slice::from_raw_parts_mut(to.add(i / 2 * width), width);
                let (a, b) = (slice::from_raw_parts(a, dim), slice::from_raw_parts(b, dim));
                let a_mask = if odd.contains(&i) { 0 } else { u32::MAX };
                let b_mask = if i + 1 == tile.len || odd.contains(&(i + 1)) { 0 } else { u32::MAX };
                for c in 0..dim {
                    to[c] = (u32::from(a[c]) & a_mask) | (u32::from(b[c]) << 16 & b_mask);
                }
                to[dim..].fill(0);
            }
        } else {
            for i in 0..tile.len {
                let to = slice::from_raw_parts_mut(to.add(i * width).cast::<f32>(), width);
                if odd.contains(&i) {
                    to.fill(0.0);
                } else {
                    load_row::<S, E>(tile.values[i].cast(), &mut to[..dim]);
                    to[dim..].fill(0.0);
                }
            }
        }
    }
}

/// Makes a row of scores weights: scaled, capped, hidden, against the greatest so far. What older sums are worth is in `decay`.
///
/// # Safety
/// As for [`Simd`]; `count` scores in whole vectors, room for as many weights.
#[inline(always)]
unsafe fn softmax<S: Simd, const DOTS: bool>(
    scores: *mut f32,
    count: usize,
    (scale, softcap): (f32, Option<f32>),
    see: Option<(f32, &[f32; TILE], &[f32; TILE])>,
    (max, total, decay): (&mut f32, &mut f32, &mut f32),
    weights: *mut u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let none = S::splat(f32::NEG_INFINITY);
        let scale = S::splat(scale);
        let mut best = none;
        for i in (0..count).step_by(S::LANES) {
            let mut x = S::mul(S::load(scores.add(i)), scale);
            if let Some(cap) = softcap {
                x = S::mul(tanh::<S>(S::div(x, S::splat(cap))), S::splat(cap));
            }
            if let Some((query, from, to)) = see {
                let query = S::splat(query);
                x = S::pick_less(S::load(from.as_ptr().add(i)), query, x, none);
                x = S::pick_less(query, S::load(to.as_ptr().add(i)), x, none);
            }
            // In this order NaN is no maximum.
            best = S::max(x, best);
            S::store(scores.add(i), x);
        }
        let old = *max;
        let new = old.max(S::top(best));
        *max = new;
        *decay = if old == new {
            1.0
        } else if old == f32::NEG_INFINITY {
            0.0
        } else {
            (old - new).exp()
        };
        let shift = S::splat(if new == f32::NEG_INFINITY { 0.0 } else { new });
        let (zero, least) = (S::splat(0.0), S::splat(f32::MIN));
        let mut sum = zero;
        for i in (0..count).step_by(S::LANES) {
            let x = S::load(scores.add(i));
            // Not NaN, and exactly nothing for what is hidden.
            let w = S::pick_less(x, least, zero, S::exp_any(S::sub(x, shift)));
            sum = S::add(sum, w);
            if DOTS {
                S::narrow(weights.add(i / 2).cast(), w);
            } else {
                S::store(weights.add(i).cast(), w);
            }
        }
        *total = *total * *decay + S::sum(sum);
    }
}

/// `to = decay * to + weights @ values`, for [`ROWS`] rows.
///
/// # Safety
/// As for [`product`]; `decay` and `to` for as many rows.
#[inline(always)]
unsafe fn weigh<S: Simd, const DOTS: bool, const N: usize>(
    a: (*const u32, usize),
    b: (*const u32, usize),
    steps: usize,
    decay: &[f32],
    (to, stride): (*mut f32, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; ROWS];
        for (r, acc) in acc.iter_mut().enumerate() {
            let by = S::splat(decay[r]);
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::mul(S::load(to.add(r * stride + n * S::LANES)), by);
            }
        }
        let acc = product::<S, DOTS, N>(a, b, steps, acc);
        for (r, acc) in acc.into_iter().enumerate() {
            for (n, acc) in acc.into_iter().enumerate() {
                S::store(to.add(r * stride + n * S::LANES), acc);
            }
        }
    }
}

/// What is compiled for a level and a dtype.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub queries: unsafe fn(&[*const u8], &Shape, &mut [u32]),
    pub score: unsafe fn(&mut Batch<'_>),
    pub attend: unsafe fn(&Block<'_>, &mut dyn Tiles, &dyn Place, &mut Scratch),
}

macro_rules! compiled {
    ($name:ident, $simd:ty, [$($arch:literal, $features:literal)?]) => {
        $(#[cfg(target_arch = $arch)])?
        pub(super) mod $name {
            use super::*;
            $(#[target_feature(enable = $features)])?
            unsafe fn queries<E: Elem, const DOTS: bool>(from: &[*const u8], shape: &Shape, to: &mut [u32]) {
                // SAFETY: passed on to the caller.
                unsafe { super::queries::<$simd, E, DOTS>(from, shape, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn score<E: Elem, const DOTS: bool>(batch: &mut Batch<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { super::score::<$simd, E, DOTS>(batch) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend<E: Elem, const DOTS: bool>(
                block: &Block<'_>,
                tiles: &mut dyn Tiles,
                place: &dyn Place,
                scratch: &mut Scratch,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { super::attend::<$simd, E, DOTS>(block, tiles, place, scratch) }
            }
            pub fn kernels<E: Elem, const DOTS: bool>() -> Kernels {
                Kernels { queries: queries::<E, DOTS>, score: score::<E, DOTS>, attend: attend::<E, DOTS> }
            }
        }
    };
}
compiled!(avx2, crate::kernels::simd::Avx2, ["x86_64", "avx2,fma,f16c"]);
compiled!(avx512, crate::kernels::simd::Avx512<false>, ["x86_64", "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"]);
compiled!(
    avx512_bf16,
    crate::kernels::simd::Avx512<true>,
    ["x86_64", "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"]
);
compiled!(neon, crate::kernels::simd::Neon, ["aarch64", "neon"]);
compiled!(portable, crate::kernels::simd::Portable, []);
