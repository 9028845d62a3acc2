//! Which token sits where: blocks and who owns them, the tables of residents, and the memory behind them.

pub mod arena;
mod bounds;
mod buf;
pub mod packed;
mod permute;
pub mod pool;
mod reservation;
mod slabs;
pub mod table;
