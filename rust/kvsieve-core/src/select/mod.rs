//! Which residents a block of queries reads when everything is kept: selection rules, one a file, without their keys.
//!
//! Residents are numbered in text order. A rule selects from the *region* between sinks and window, for one key-value head; what it
//! must know about keys it asks of a [`Score`]. The Python specification (`kvsieve.backends.reference`) has the algorithms and lists
//! what was decided; both select the same blocks wherever their scores are equal.
//!
//! To add a rule: a file with a type that implements [`Select`] and a function that makes it of [`Parameters`], and its row in
//! [`RULES`]. Nothing else knows a rule by its name.

pub mod asked;
mod best;
pub mod choices;
pub mod hip;
pub mod infinite;
#[cfg(test)]
mod known;
pub mod parameters;
pub mod representative;
pub mod residents;
pub mod rule;
pub mod score;
pub mod selector;

use std::sync::Arc;

use crate::{Error, Result};
pub use asked::{Asked, Chosen, Inputs};
pub use choices::{Choice, Choices};
pub use parameters::{Parameter, Parameters};
pub use representative::Representative;
pub use residents::{Residents, Shown};
pub use rule::Rule;
pub use score::Score;
pub use selector::Select;

/// Every rule, by the name that a caller asks for it.
pub const RULES: &[(&str, Make)] = &[("hip", hip::make), ("infinite", infinite::make)];

/// Makes a rule of the parameters that it takes; all that are left over are refused.
pub type Make = fn(&mut Parameters) -> Result<Arc<dyn Select>>;

/// The rule `name`.
pub fn make(name: &str, mut parameters: Parameters) -> Result<Arc<dyn Select>> {
    let Some((_, make)) = RULES.iter().find(|(known, _)| *known == name) else {
        let (what, expected) = ("selection", "the name of one of the core's rules");
        return Err(Error::OutOfRange { what, expected, got: format!("{name:?}") });
    };
    let rule = make(&mut parameters)?;
    parameters.finish()?;
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BLOCK;

    #[test]
    fn a_rule_is_made_by_its_name() {
        let hip = || Parameters::of([("budget", 64.into()), ("block", 2.into()), ("representative", "first".into())]);
        let made = make("hip", hip()).unwrap();
        assert_eq!((made.most(), made.num_stages(), made.page_bounds()), (64, 1, false));
        assert!(*made == *make("hip", hip()).unwrap(), "of equal parameters");
        let stages = vec![(BLOCK as usize, 256), (2, 32)];
        let other = [("stages", stages.into()), ("representative", "first".into()), ("page_bounds", true.into())];
        let other = make("infinite", Parameters::of(other)).unwrap();
        assert!(*made != *other);
        assert_eq!((other.most(), other.num_stages(), other.page_bounds()), (32, 2, true));
    }

    #[test]
    fn what_is_no_rule_is_refused_in_words() {
        let said = |name, parameters| make(name, parameters).unwrap_err().to_string();
        assert_eq!(
            said("best", Parameters::default()),
            "selection must be the name of one of the core's rules, got \"best\""
        );
        assert_eq!(said("hip", Parameters::default()), "budget must be given, got nothing");
        let hip = |more: &[(&'static str, Parameter)]| {
            let all = [("budget", 64.into()), ("block", 2.into()), ("representative", "first".into())];
            Parameters::of(all.into_iter().chain(more.iter().cloned()))
        };
        assert_eq!(said("hip", hip(&[("pages", 1.into())])), "parameters must be those of the rule, got pages");
        assert_eq!(said("hip", hip(&[("block", "two".into())])), "block must be a count, got \"two\"");
        assert_eq!(said("hip", hip(&[("block", 0.into())])), "block must be at least 1 and below 2^32, got 0");
    }
}
