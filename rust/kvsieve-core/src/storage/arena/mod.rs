//! The keys and values of one layer, block by block, in memory that grows without ever moving.

mod background;
mod bounds;
mod copy;
mod memory;
mod moves;
mod permute;
mod tiered;

pub use memory::Arena;
