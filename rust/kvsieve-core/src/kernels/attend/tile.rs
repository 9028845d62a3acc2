//! Keys that are worked on together: consecutive spans, with their addresses.

use super::ahead::LINE;
use super::units::Common;
use crate::ids::{BLOCK, BlockId};
use crate::kernels::simd::Elem;
use crate::plan::Span;
use crate::storage::packed::Channels;

/// Keys of one tile: scores of a whole block stay in the first-level cache between their making and their use.
pub(super) const TILE: usize = BLOCK as usize;

/// A span with its addresses.
#[derive(Clone, Copy)]
pub(super) struct Piece<E> {
    /// Codes, where keys are packed as codes.
    pub keys: *const E,
    /// Codes, where values are packed as codes.
    pub values: *const E,
    pub len: usize,
    pub block: BlockId,
    pub slot: u32,
    /// Of a packed block, those that have memory.
    pub slots: u32,
    pub variant: u32,
    pub rotate: bool,
}

impl<E> Piece<E> {
    /// Rows of values that lie together.
    pub fn of_values(values: *const E, len: usize) -> Self {
        Piece { keys: std::ptr::null(), values, len, block: BlockId(0), slot: 0, slots: 0, variant: 0, rotate: false }
    }
}

/// Consecutive spans of at most [`TILE`] keys in all, all plain or all packed with the same channels.
pub(super) struct Tile<'a, E> {
    pub pieces: [Piece<E>; TILE],
    pub num_pieces: usize,
    pub len: usize,
    pub channels: Option<&'a Channels>,
    /// Bytes of a key and of a value.
    pub bytes: (usize, usize),
}

impl<'a, E: Elem> Tile<'a, E> {
    pub fn new() -> Self {
        let none = Piece::of_values(std::ptr::null(), 0);
        Tile { pieces: [none; TILE], num_pieces: 0, len: 0, channels: None, bytes: (0, 0) }
    }

    /// Takes as many of the spans from `*next` on as fit; spans are never cut.
    #[inline(always)]
    pub fn fill<const D: usize>(&mut self, common: &Common<'a>, kv_head: usize, next: &mut usize, end: usize) {
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
                        let (keys, values) = if common.values {
                            arena.rows(span.block, kv_head, span.lo)
                        } else {
                            (arena.key_rows(span.block, kv_head, span.lo), std::ptr::null())
                        };
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

    #[inline(always)]
    pub fn pieces(&self) -> &[Piece<E>] {
        &self.pieces[..self.num_pieces]
    }

    /// Whether its keys lie here and there, so that going through them piece by piece would not pay.
    pub fn is_scattered(&self) -> bool {
        self.num_pieces * SHORT > self.len
            && self.channels.is_none()
            && self.pieces[..self.num_pieces].iter().all(|piece| piece.variant == 0 && !piece.rotate)
    }

    /// Where its keys or its values lie, for [`Ahead`].
    #[inline(always)]
    pub fn stretches<'b>(&self, values: bool, to: &'b mut [(*const u8, usize); TILE]) -> &'b [(*const u8, usize)] {
        for (to, piece) in to.iter_mut().zip(&self.pieces[..self.num_pieces]) {
            let (at, bytes) = if values { (piece.values, self.bytes.1) } else { (piece.keys, self.bytes.0) };
            *to = (at.cast(), (piece.len * bytes).div_ceil(LINE));
        }
        &to[..self.num_pieces]
    }
}

/// Spans of fewer slots than this, on average, are scored four keys at a time wherever they lie.
const SHORT: usize = 16;
