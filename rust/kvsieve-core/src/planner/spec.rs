//! What a memory is made of, and which combinations can be right.

use crate::error::{Error, Result};
use crate::evict::Eviction;
use crate::plan::Frame;
use crate::position::{PositionRule, Rule};

/// One memory of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    pub evict: Eviction,
    pub position: PositionRule,
    /// A key that is no sink is visible only below this true distance.
    pub visible: Option<u64>,
    /// Read only the best so many keys per head, for the last query of a chunk; 0 reads all.
    pub top_k: usize,
}

/// Distances beyond this would not be exact in the arithmetic of shifts.
const MAX_DISTANCE: u64 = 1 << 53;

impl MemorySpec {
    pub fn rule(&self) -> Rule {
        Rule { position: self.position, sinks: self.evict.sinks() as u64, visible: self.visible, top_k: self.top_k }
    }

    fn check(&self, frame: Frame) -> Result<()> {
        self.evict.check()?;
        if self.visible == Some(0) {
            return Err(Error::OutOfRange { what: "visible", expected: "at least 1, or none", got: "0".into() });
        }
        if let PositionRule::Capped { distance } | PositionRule::Fixed { distance } = self.position
            && distance > MAX_DISTANCE
        {
            return Err(Error::OutOfRange { what: "distance", expected: "at most 2^53", got: distance.to_string() });
        }
        self.check_frame(frame)
    }

    fn check_frame(&self, frame: Frame) -> Result<()> {
        let contiguous = matches!(self.evict, Eviction::KeepAll | Eviction::Window { .. });
        match (frame, self.position) {
            (Frame::Raw, _) | (Frame::Rotated, PositionRule::Original) => Ok(()),
            (Frame::Rotated, PositionRule::InCache) if contiguous => Ok(()),
            (Frame::Rotated, PositionRule::InCache) => Err(Error::Unsupported(
                "in-cache positions among tokens chosen one by one need pre-RoPE keys; store those, or use original positions",
            )),
            (Frame::Rotated, PositionRule::Capped { .. } | PositionRule::Fixed { .. }) => {
                Err(Error::Unsupported("a fixed distance needs pre-RoPE keys; store those"))
            }
        }
    }
}

/// Checks a whole chain.
pub fn check_chain(memories: &[MemorySpec], frame: Frame) -> Result<()> {
    let Some(first) = memories.first() else {
        return Err(Error::OutOfRange { what: "memories", expected: "at least one", got: "none".into() });
    };
    if first.top_k > 0 {
        return Err(Error::Unsupported(
            "the first memory holds the new tokens and is read in full; give top_k to a later memory",
        ));
    }
    memories.iter().try_for_each(|m| m.check(frame))
}
