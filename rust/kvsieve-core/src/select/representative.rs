//! Which part of a node speaks for it.

use crate::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Representative {
    Middle,
    First,
    Last,
    /// The best of all: reads everything. For tests.
    Oracle,
}

impl Representative {
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "middle" => Ok(Representative::Middle),
            "first" => Ok(Representative::First),
            "last" => Ok(Representative::Last),
            "oracle" => Ok(Representative::Oracle),
            other => Err(Error::OutOfRange {
                what: "representative",
                expected: "middle, first, last or oracle",
                got: other.to_string(),
            }),
        }
    }
}
