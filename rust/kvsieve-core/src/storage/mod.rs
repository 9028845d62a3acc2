//! The memory behind the blocks: keys and values of a layer, plain and packed.

pub mod arena;
mod bounds;
mod buf;
pub mod packed;
mod reservation;
mod slabs;
pub mod tier;
