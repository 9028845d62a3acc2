//! Keys and values that are worked on together.

use super::shape::TILE;

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
