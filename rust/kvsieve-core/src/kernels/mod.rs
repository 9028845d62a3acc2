//! One operation a file; everything that touches keys, values and queries.
//!
//! Every kernel is written once over `simd::Simd` and compiled for each instruction set; [`isa`] says which one runs. Inputs are
//! checked before anything is written, so a refused call leaves everything as it was.

pub mod attend;
pub mod chunk;
mod four;
pub mod isa;
pub mod linear;
pub mod merge;
pub mod pieces;
mod queries;
pub mod read;
pub mod rotate;
mod rows;
pub mod select;
pub mod sets;
mod simd;
pub mod sparse;
pub mod surprisal;
pub mod threads;

pub use attend::{
    Attend, Choice, Heaviest, SpanTrig, add_heaviest, attend, attend_apart, attend_apart_mass, attend_heaviest,
    attend_highest, attend_unless, choose_heaviest,
};
pub use isa::Level;
