//! Which token sits where: blocks and who owns them, and the tables of residents. Integers only.

pub mod pool;
pub mod table;
