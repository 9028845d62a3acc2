//! Attention of many queries to one list of keys.

use half::bf16;

use super::product::{product, turn_keys};
use super::shape::{PANEL, ROWS, Shape, TILE, Words, padded_rows};
use super::tile::{Tile, Tiles};
use super::weights::{bring_values, softmax, weigh};
use crate::kernels::simd::{Elem, Simd};

/// The queries of a block and a group, for [`attend`].
pub(super) struct Block<'a> {
    pub shape: Shape,
    /// `[padded_rows(num_rows)][padded]`, by [`super::product::queries`]: query by query, in each the heads of the group.
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
    /// Whether rows are of `f32` whatever the keys are.
    fn is_wide(&self) -> bool {
        false
    }
}

/// Memory that a thread keeps.
pub(super) struct Scratch {
    tiles: [Tile; 2],
    matrices: Matrices,
    state: State,
    spare: Words,
    /// Keys of a ragged tile whose values are not all finite.
    odd: Vec<usize>,
}

/// What tiles and rows are multiplied in.
struct Matrices {
    keys: Words,
    values: Words,
    scores: Words,
    weights: Words,
    sums: Words,
}

/// Of each row its maximum, its sum of weights, and what older sums are worth.
struct State {
    max: Vec<f32>,
    total: Vec<f32>,
    decay: Vec<f32>,
}

impl Scratch {
    pub const fn new() -> Self {
        Scratch {
            tiles: [Tile::new(), Tile::new()],
            matrices: Matrices {
                keys: Words::new(),
                values: Words::new(),
                scores: Words::new(),
                weights: Words::new(),
                sums: Words::new(),
            },
            state: State { max: Vec::new(), total: Vec::new(), decay: Vec::new() },
            spare: Words::new(),
            odd: Vec::new(),
        }
    }
}

impl State {
    fn begin(&mut self, rows: usize) {
        for (of, value) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.total, 0.0), (&mut self.decay, 0.0)] {
            of.clear();
            of.resize(rows, value);
        }
    }
}

/// Where the matrices lie.
#[derive(Clone, Copy)]
struct Places {
    /// `[padded][TILE]`
    keys: *mut u32,
    /// Rows of `value_width`.
    values: *mut u32,
    /// `[PANEL][TILE]`
    scores: *mut f32,
    /// `[PANEL][weight_stride]`
    weights: *mut u32,
    weight_stride: usize,
    /// `[padded_rows][value_width]`
    sums: *mut f32,
    value_width: usize,
}

impl Matrices {
    /// Sums are zero to begin with.
    fn places<const DOTS: bool>(&mut self, shape: Shape, rows: usize) -> Places {
        let value_width = shape.value_padded();
        let scores = self.scores.of(PANEL * TILE).as_mut_ptr().cast::<f32>();
        let sums = self.sums.of(rows * value_width);
        sums.fill(0);
        Places {
            keys: self.keys.of(shape.padded() * TILE).as_mut_ptr(),
            values: self.values.of(TILE * value_width).as_mut_ptr(),
            scores,
            // Numbers are weighed where they were scores.
            weights: if DOTS { self.weights.of(PANEL * TILE / 2).as_mut_ptr() } else { scores.cast() },
            weight_stride: if DOTS { TILE / 2 } else { TILE },
            sums: sums.as_mut_ptr().cast::<f32>(),
            value_width,
        }
    }
}

/// Which queries see which keys of a tile. Half a query off, so that `<` does for `<=`.
struct Seen {
    from: [f32; TILE],
    to: [f32; TILE],
}

impl Seen {
    #[inline(always)]
    fn of(tile: &Tile, hides: bool) -> Self {
        let mut seen = Seen { from: [f32::MAX; TILE], to: [0f32; TILE] };
        if hides {
            for i in 0..tile.len {
                (seen.from[i], seen.to[i]) = (tile.from[i] as f32 - 0.5, tile.to[i] as f32);
            }
        }
        seen
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
    let Block { shape, num_rows, group, .. } = *block;
    let rows = padded_rows(num_rows);
    let Scratch { tiles, matrices, state, spare, odd } = scratch;
    let places = matrices.places::<DOTS>(shape, rows);
    state.begin(rows);
    let mut turn = 0;
    source.next(&mut tiles[0]);
    while tiles[turn].len > 0 {
        source.next(&mut tiles[1 - turn]);
        let (tile, following) = (&tiles[turn], &tiles[1 - turn]);
        let filled = tile.len.next_multiple_of(S::LANES);
        let hides = tile.ragged || filled > tile.len;
        let seen = Seen::of(tile, hides);
        let part = Part { block, places, tile, seen: if hides { Some(&seen) } else { None }, odd: &mut *odd };
        // SAFETY: a tile of keys and values, and room for as many; whole blocks of rows.
        unsafe {
            ask::<S, E>(following, &shape);
            turn_keys::<S, E, DOTS>(&tile.keys[..tile.len], &shape, (places.keys, TILE), spare);
            bring_values::<S, E, DOTS>(tile, &shape, num_rows / group, (places.values, places.value_width), part.odd);
            for top in (0..rows).step_by(PANEL) {
                let rows = (top, PANEL.min(rows - top));
                score_panel::<S, DOTS, N>(&part, rows);
                make_weights::<S, DOTS>(&part, rows, filled, state);
                weigh_panel::<S, DOTS, N>(&part, rows, state);
                weigh_odd::<E, DOTS>(&part, rows);
            }
        }
        turn = 1 - turn;
    }
    // SAFETY: the caller's promise.
    unsafe { finish::<S, E>(block, &places, state, place) };
}

/// A tile that meets a block of queries.
struct Part<'a> {
    block: &'a Block<'a>,
    places: Places,
    tile: &'a Tile,
    /// Unless all queries see all keys.
    seen: Option<&'a Seen>,
    odd: &'a mut Vec<usize>,
}

/// Asks for the keys and values of a tile.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn ask<S: Simd, E: Elem>(tile: &Tile, shape: &Shape) {
    let key_lines = (shape.dim * size_of::<E>()).div_ceil(64);
    let value_lines = (shape.value_dim * size_of::<E>()).div_ceil(64);
    for i in 0..tile.len {
        // SAFETY: any address may be asked for.
        unsafe {
            for line in 0..key_lines {
                S::prefetch(tile.keys[i].wrapping_add(line * 64));
            }
            for line in 0..value_lines {
                S::prefetch(tile.values[i].wrapping_add(line * 64));
            }
        }
    }
}

/// Scores of a panel's rows, `height` from `top` on.
///
/// # Safety
/// As for [`attend`]; the tile's keys were brought together.
#[inline(always)]
unsafe fn score_panel<S: Simd, const DOTS: bool, const N: usize>(part: &Part<'_>, (top, height): (usize, usize)) {
    let Part { block, places, tile, .. } = part;
    let (words, padded) = (block.shape.words(), block.shape.padded());
    // SAFETY: whole blocks of rows; a tile is a multiple of every width, and so are the lines that keys were brought to.
    unsafe {
        for column in (0..tile.len).step_by(N * S::LANES) {
            for row in (0..height).step_by(ROWS) {
                let a = (block.queries.as_ptr().add((top + row) * padded), padded);
                let b = (places.keys.add(column).cast_const(), TILE);
                let acc = product::<S, DOTS, N>(a, b, words, [[S::splat(0.0); N]; ROWS]);
                for (r, acc) in acc.into_iter().enumerate() {
                    for (n, acc) in acc.into_iter().enumerate() {
                        S::store(places.scores.add((row + r) * TILE + column + n * S::LANES), acc);
                    }
                }
            }
        }
    }
}

/// Makes a panel's scores weights; `filled` of each row.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn make_weights<S: Simd, const DOTS: bool>(
    part: &Part<'_>,
    (top, height): (usize, usize),
    filled: usize,
    state: &mut State,
) {
    let Part { block, places, .. } = part;
    let State { max, total, decay } = state;
    for row in 0..height {
        let query = ((top + row) / block.group) as f32;
        let see = part.seen.map(|seen| (query, &seen.from, &seen.to));
        let state = (&mut max[top + row], &mut total[top + row], &mut decay[top + row]);
        // SAFETY: rows of the panel, in whole vectors.
        unsafe {
            let into = places.weights.add(row * places.weight_stride);
            let scores = places.scores.add(row * TILE);
            softmax::<S, DOTS>(scores, filled, (block.scale, block.softcap), see, state, into);
        }
    }
}

/// Adds the weighted values to the sums of a panel.
///
/// # Safety
/// As for [`attend`]; the tile's values were brought together.
#[inline(always)]
unsafe fn weigh_panel<S: Simd, const DOTS: bool, const N: usize>(
    part: &Part<'_>,
    (top, height): (usize, usize),
    state: &State,
) {
    let Places { values, weights, weight_stride, sums, value_width, .. } = part.places;
    let steps = if DOTS { part.tile.len.div_ceil(2) } else { part.tile.len };
    let mut column = 0;
    // SAFETY: whole blocks of rows; columns below `value_width`, which is whole vectors.
    unsafe {
        while column + N * S::LANES <= value_width {
            for row in (0..height).step_by(ROWS) {
                let a = (weights.add(row * weight_stride).cast_const(), weight_stride);
                let b = (values.add(column).cast_const(), value_width);
                let to = sums.add((top + row) * value_width + column);
                weigh::<S, DOTS, N>(a, b, steps, &state.decay[top + row..], (to, value_width));
            }
            column += N * S::LANES;
        }
        while column < value_width {
            for row in (0..height).step_by(ROWS) {
                let a = (weights.add(row * weight_stride).cast_const(), weight_stride);
                let b = (values.add(column).cast_const(), value_width);
                let to = sums.add((top + row) * value_width + column);
                weigh::<S, DOTS, 1>(a, b, steps, &state.decay[top + row..], (to, value_width));
            }
            column += S::LANES;
        }
    }
}

/// Values that are not finite, only for who sees them: for others 0 times infinity would be NaN.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn weigh_odd<E: Elem, const DOTS: bool>(part: &Part<'_>, (top, height): (usize, usize)) {
    let Part { block, tile, .. } = part;
    let Places { weights, weight_stride, sums, value_width, .. } = part.places;
    for &i in part.odd.iter() {
        let value = tile.values[i].cast::<E>();
        for row in 0..height.min(block.num_rows.saturating_sub(top)) {
            let query = ((top + row) / block.group) as u32;
            if query < tile.from[i] || query >= tile.to[i] {
                continue;
            }
            // SAFETY: a weight of the panel; a value and sums of `value_dim` numbers.
            unsafe {
                let weight = if DOTS {
                    (*weights.add(row * weight_stride).cast::<bf16>().add(i)).to_f32()
                } else {
                    *weights.add(row * weight_stride).cast::<f32>().add(i)
                };
                for c in 0..block.shape.value_dim {
                    *sums.add((top + row) * value_width + c) += weight * (*value.add(c)).to_f32();
                }
            }
        }
    }
}

/// Hands over what was found.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn finish<S: Simd, E: Elem>(block: &Block<'_>, places: &Places, state: &State, place: &dyn Place) {
    let Block { shape, num_rows, group, .. } = *block;
    let wide = place.is_wide();
    for row in 0..num_rows {
        let (max, weights) = (state.max[row], state.total[row]);
        let sink = block.sinks.map_or(0.0, |sinks| (sinks[row % group] - max).exp());
        // Who reads nothing has sums of zero.
        let norm = if weights == 0.0 { 0.0 } else { 1.0 / (weights + sink) };
        // SAFETY: the caller's promise.
        unsafe {
            place.lse(row, if weights == 0.0 { f32::NEG_INFINITY } else { max + weights.ln() });
            let (from, to) = (places.sums.add(row * places.value_width), place.out(row));
            if wide {
                hand_over::<S, f32>(from, norm, shape.value_dim, to.cast());
            } else {
                hand_over::<S, E>(from, norm, shape.value_dim, to.cast());
            }
        }
    }
}

/// `count` sums times `norm`.
///
/// # Safety
/// As for [`Simd`]; so many numbers to read and to write.
#[inline(always)]
unsafe fn hand_over<S: Simd, E: Elem>(from: *const f32, norm: f32, count: usize, to: *mut E) {
    let whole = count / S::LANES * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let by = S::splat(norm);
        for c in (0..whole).step_by(S::LANES) {
            E::store::<S>(to.add(c), S::mul(S::load(from.add(c)), by));
        }
        for c in whole..count {
            *to.add(c) = E::of_f32(*from.add(c) * norm);
        }
    }
}
