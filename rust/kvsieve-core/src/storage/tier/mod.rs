//! Blocks that are not in memory: the file in which they lie, and what is known of each.

mod checksum;
mod file;
mod jobs;
mod table;
mod worker;

pub use file::{Extent, Medium, TierFile};
pub(super) use jobs::Answer;
pub(super) use table::{Copied, Tier};
pub use table::{Counts, Order};
