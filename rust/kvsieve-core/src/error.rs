//! One error enum whose variants carry the numbers. Each maps to one Python class.

/// The bindings match all variants, so that a new one does not compile before it has its class.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("a budget of {budget} tokens cannot hold {sinks} sinks and {recent} recent tokens; give it at least {}", sinks.saturating_add(*recent))]
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
    #[error("block {block} is not in memory; fetch it before it is read")]
    NotInMemory { block: u32 },
    #[error("no space for {bytes} bytes of blocks in the stream's file ({reason}); they stay in memory")]
    TierFull { bytes: u64, reason: String },
    #[error("could not {what} the file of the stream's blocks: {reason}")]
    TierFailed { what: &'static str, reason: String },
    #[error("block {block} is damaged: its file no longer holds what was written to it")]
    TierDamaged { block: u32 },
    /// The caller asked to stop; it knows why.
    #[error("interrupted; nothing was changed")]
    Interrupted,
    #[error("{0}")]
    Unsupported(&'static str),
}

pub type Result<T> = std::result::Result<T, Error>;

/// Refuses a count of 0.
pub fn at_least_one(what: &'static str, n: usize) -> Result<()> {
    if n > 0 { Ok(()) } else { Err(Error::OutOfRange { what, expected: "at least 1", got: "0".to_string() }) }
}

impl Error {
    /// One of each variant, with the variant's name: for tests of what is made of them.
    pub fn samples() -> Vec<(&'static str, Error)> {
        macro_rules! samples {
            ($($name:ident $fields:tt),* $(,)?) => {{
                // A variant that is not in the list does not compile.
                let _all = |error: &Error| match error {
                    $(Error::$name { .. } => (),)*
                };
                vec![$((stringify!($name), Error::$name $fields)),*]
            }};
        }
        let (what, got) = ("what", || "got".to_string());
        samples![
            BudgetTooSmall { budget: 1, sinks: 2, recent: 3 },
            OutOfRange { what, expected: "expected", got: got() },
            RowMismatch { have: 1, got: 2 },
            PinsTooMany { row: 0, budget: 1, sinks: 2, recent: 3, pinned: 4 },
            PinsGone { row: 0, what: got() },
            CropTooLong { row: 0, asked: 2, seen: 1 },
            NoStep { what },
            StepOpen { what },
            Shape { what, expected: got(), got: got() },
            OutOfMemory { bytes: 1 },
            BadBlock { block: 1, have: 0 },
            NotInMemory { block: 1 },
            TierFull { bytes: 1, reason: got() },
            TierFailed { what, reason: got() },
            TierDamaged { block: 1 },
            Interrupted {},
            Unsupported { 0: what },
        ]
    }
}
