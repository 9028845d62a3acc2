//! Which token sits where: a pool of counted blocks, and a table per memory and row.

pub mod pool;
pub mod table;
