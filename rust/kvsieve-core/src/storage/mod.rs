//! The memory behind the blocks: keys and values of a layer, plain and packed.

pub mod arena;
mod bounds;
mod buf;
mod dense;
pub mod packed;
mod reservation;
mod slabs;
pub mod tier;
