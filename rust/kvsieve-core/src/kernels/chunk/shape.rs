//! How numbers become words, and the sizes that work is cut to.

use std::slice;

/// Keys of one tile.
pub(super) const TILE: usize = 128;
/// Keys that are scored at once.
pub(super) const STRIP: usize = 64;
/// Rows of queries that one register block takes.
pub(super) const ROWS: usize = 4;
/// Rows that go through a tile together: their scores stay in the first-level cache until they are weights.
pub(super) const PANEL: usize = 16;

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
