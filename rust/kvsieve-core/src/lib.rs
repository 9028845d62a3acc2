//! kvsieve's core: positions, blocks, budgets, plans and kernels. No Python in here, and no tensor library.
//!
//! # Map
//! From the ground up; a module imports from those above it in this list only (`tests/layout.rs` holds them to it).
//! * [`error`], [`fault`], [`ids`], [`budget`], [`pins`], [`fork`]: the one error enum, places where tests make the core fail, newtypes,
//!   counts (never ratios), positions that stay, locks that a forked process finds open.
//! * [`tensor`], [`rope`], [`rank`], [`plan`]: borrowed tensors, rotary angles, order of scores, the plain structs that cross from the
//!   control plane to the kernels.
//! * [`block`]: block pool and tables: which token sits where. Integers only.
//! * [`storage`]: the bytes of the blocks.
//! * [`evict`], [`position`], [`select`]: which residents stay; at which distance a query sees them; which of them it reads.
//! * [`planner`]: the control plane of one stream; makes a [`plan::Step`] once per forward.
//! * [`kernels`]: one operation a file; everything that touches keys, values and queries.
//! * [`mod@reference`]: the naive twin of the kernels; tests compare against it.
//!
//! # Glossary
//! *position*: number of a token in its sequence. *slot*: place of a token in a block. *resident*: a token whose key and value are
//! held. *seen*: a token that was ever fed. *sink*: one of the first tokens, never evicted. *pinned*: a token that the caller said is
//! never evicted. *lse*: log-sum-exp of the logits.
//!
//! # Invariants (each has a test of the same name)
//! 1. `block_is_free_or_owned`: a block is free, or owned with a reference count of at least one; never both.
//! 2. `positions_strictly_increase`: resident positions of a sequence strictly increase and are below `seen`.
//! 3. `evicted_never_returns`: `seen` only grows, except by `crop`; an evicted position never comes back.
//! 4. `budget_holds_after_retain`: after retain ran, residents <= budget; sinks, recent and pinned tokens are in every keep.
//! 5. `slot_is_written_once`: a slot is written once by append; after that it is only moved, or packed whole.

pub mod block;
pub mod budget;
pub mod error;
pub mod evict;
pub mod fault;
pub mod fork;
pub mod ids;
pub mod kernels;
pub mod pins;
pub mod plan;
pub mod planner;
pub mod position;
pub mod rank;
pub mod reference;
pub mod rope;
pub mod select;
pub mod storage;
pub mod tensor;

pub use error::{Error, Result};

#[cfg(test)]
extern crate self as kvsieve_core;

#[cfg(test)]
#[path = "../tests/all.rs"]
mod all;
