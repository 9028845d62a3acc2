//! The parameters of a rule as a caller names them; each rule takes its own, and what nobody takes is refused.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    Flag(bool),
    Count(usize),
    Number(f64),
    Text(String),
    /// Pairs of counts, such as stages.
    Pairs(Vec<(usize, usize)>),
}

impl std::fmt::Display for Parameter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Parameter::Flag(x) => write!(f, "{x}"),
            Parameter::Count(x) => write!(f, "{x}"),
            Parameter::Number(x) => write!(f, "{x}"),
            Parameter::Text(x) => write!(f, "{x:?}"),
            Parameter::Pairs(x) => write!(f, "{x:?}"),
        }
    }
}

macro_rules! from {
    ($($of:ty => $variant:ident),*) => {
        $(impl From<$of> for Parameter {
            fn from(value: $of) -> Self {
                Parameter::$variant(value.into())
            }
        })*
    };
}
from!(bool => Flag, usize => Count, f64 => Number, &str => Text, Vec<(usize, usize)> => Pairs);

/// Values by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters(BTreeMap<String, Parameter>);

macro_rules! take {
    ($(#[doc = $doc:literal] $name:ident: $variant:ident, $of:ty, $expected:literal;)*) => {
        $(#[doc = $doc]
        pub fn $name(&mut self, what: &'static str) -> Result<$of> {
            match self.0.remove(what) {
                Some(Parameter::$variant(value)) => Ok(value),
                Some(other) => Err(Error::OutOfRange { what, expected: $expected, got: other.to_string() }),
                None => Err(Error::OutOfRange { what, expected: "given", got: "nothing".to_string() }),
            }
        })*
    };
}

impl Parameters {
    /// Of one name the last value stands.
    pub fn of<S: Into<String>>(values: impl IntoIterator<Item = (S, Parameter)>) -> Self {
        Parameters(values.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }

    take! {
        /// Takes a flag.
        flag: Flag, bool, "true or false";
        /// Takes a count.
        count: Count, usize, "a count";
        /// Takes a number.
        number: Number, f64, "a number with a point";
        /// Takes a text.
        text: Text, String, "a text";
        /// Takes pairs of counts.
        pairs: Pairs, Vec<(usize, usize)>, "a list of pairs of counts";
    }

    /// Refuses what was not taken.
    pub fn finish(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let left: Vec<String> = self.0.into_keys().collect();
        Err(Error::OutOfRange { what: "parameters", expected: "those of the rule", got: left.join(", ") })
    }
}
