//! One error enum whose variants carry the numbers. Each maps to one Python class.

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("a budget of {budget} tokens cannot hold {sinks} sinks and {recent} recent tokens; give it at least {}", sinks + recent)]
    BudgetTooSmall { budget: u64, sinks: u64, recent: u64 },
    #[error("{what} must be {expected}, got {got}")]
    OutOfRange { what: &'static str, expected: &'static str, got: String },
    #[error("the cache holds {have} rows, the input has {got}; use a fresh stream or select rows first")]
    RowMismatch { have: usize, got: usize },
    #[error(
        "row {row}: a budget of {budget} tokens cannot hold {sinks} sinks, {pinned} pinned and {recent} recent tokens and one more; pin \
         fewer, or give it at least {}",
        sinks.saturating_add(*pinned).saturating_add(*recent).saturating_add(1)
    )]
    PinsTooMany { row: usize, budget: u64, sinks: u64, recent: u64, pinned: u64 },
    #[error("row {row}: {what} of the tokens to pin are no longer held; pin tokens before they are evicted")]
    PinsGone { row: usize, what: String },
    #[error("cannot crop {asked} tokens: row {row} has seen only {seen}")]
    CropTooLong { row: usize, asked: u64, seen: u64 },
    #[error("{what}: no step is open")]
    NoStep { what: &'static str },
    #[error("{what}: a step is open; commit it or roll it back first")]
    StepOpen { what: &'static str },
    #[error("expected {what} of shape {expected}, got {got}")]
    Shape { what: &'static str, expected: String, got: String },
    #[error("out of memory: could not reserve {bytes} bytes for the cache; nothing was changed")]
    OutOfMemory { bytes: usize },
    #[error("block {block} is not in the store, which holds {have} blocks")]
    BadBlock { block: u32, have: u32 },
    /// The caller asked to stop; it knows why.
    #[error("interrupted; nothing was changed")]
    Interrupted,
    #[error("{0}")]
    Unsupported(&'static str),
}

pub type Result<T> = std::result::Result<T, Error>;
