//! The control plane of one stream: what is resident where, and the plan of each forward.
//!
//! A forward is two-phase: [`Planner::begin`] reserves places and plans, [`Planner::commit`] makes it count. Until then
//! [`Planner::rollback`], or simply the next `begin`, undoes it: a forward that died leaves nothing behind.

mod check;
mod early;
mod join;
mod open;
mod pin;
mod queries;
mod render;
mod row;
mod sieve;
pub mod spec;
mod state;
mod step;

pub use early::Early;
pub use row::RowState;
pub use sieve::Sieve;
pub use spec::MemorySpec;
pub use state::Planner;
