//! Packed tokens of one layer: fewer key channels, fewer bits a number, in blocks of their own.
//!
//! A block of 64 tokens of one head holds
//!
//! * keys: `[64][key_kept]` numbers of the kept channels, as they came or as codes of `key_bits`;
//! * scales of keys, with codes: for each `group` of tokens `[2][key_kept]` halves: the steps, then the least values (KIVI: per channel);
//! * values: `[64][value_dim]`, as they came or as codes of `value_bits`;
//! * scales of values, with codes: `[2][value_dim / group][64]` halves (KIVI: per token).
//!
//! A number is `least + step * code`. A token's codes take whole bytes. All lies as decode attention reads it, see `places::thin_place`,
//! `places::key_place` and `places::value_place`: keys with the tokens side by side, so that a vector of scores needs no sum over its lanes and any
//! number of channels will do; coded values with the channels side by side, two tokens to a word, so that a vector of channels needs no
//! shuffle.

mod blocks;
mod channels;
mod moves;
mod packing;
mod places;
mod tokens;

pub(crate) use blocks::Rows;
pub use blocks::{Packed, PackedBytes};
pub use channels::{Channels, Chosen};
pub use packing::Packing;
pub(crate) use places::{Chunk, PAIRED};
