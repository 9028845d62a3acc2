//! Which token sits where: blocks and who owns them, the tables of residents, and the memory behind them.

pub mod arena;
pub mod packed;
pub mod pool;
pub mod table;
