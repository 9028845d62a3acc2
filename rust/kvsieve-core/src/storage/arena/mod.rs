//! The keys and values of one layer, block by block, in memory that grows without ever moving.

mod bounds;
mod copy;
mod memory;
mod moves;
mod permute;

pub use memory::Arena;
