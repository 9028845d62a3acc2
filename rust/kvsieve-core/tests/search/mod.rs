//! The search kernel against the searches over scores that are known, on every instruction set: the very same blocks.
//!
//! Keys and queries are multiples of 1/8, so that every product sum is exact in whatever order: a choice cannot hang on rounding.

mod bounds;
mod refused;
mod rows;
mod shown;
mod stored;
