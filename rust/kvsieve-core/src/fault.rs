//! Places where a test makes the core fail: by a panic, as if by a bug, or for want of memory.
//!
//! Nothing is armed unless a test arms it. A place costs one relaxed load then, and stands where a call begins or a unit of work does,
//! never in a kernel's loops. That the places are compiled into what is shipped is the point: what is tested is what runs.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// How the core may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A bug that is noticed: at the begin of calls, and of the units of work inside.
    Panic,
    /// No memory: wherever memory is asked for whose size depends on the text.
    Memory,
}

/// Of either fault, which place from now on fails; 0 for none.
static LEFT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// From now on the `nth` place of this kind fails, once; 0 for none. Returns what was left before: a test arms with more places than
/// there are, and learns how many were met.
pub fn arm(fault: Fault, nth: u64) -> u64 {
    LEFT[fault as usize].swap(nth, Ordering::Relaxed)
}

#[inline]
fn is_due(fault: Fault) -> bool {
    let left = &LEFT[fault as usize];
    left.load(Ordering::Relaxed) != 0 && count_down(left)
}

#[cold]
fn count_down(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) == Ok(1)
}

/// A place where a bug may show.
///
/// # Panics
/// Where a test has said so.
#[inline]
pub fn may_panic() {
    if is_due(Fault::Panic) {
        panic!("a panic that a test asked for");
    }
}

/// A place where `bytes` are about to be asked for.
///
/// # Errors
/// [`Error::OutOfMemory`] where a test has said so.
#[inline]
pub fn may_lack(bytes: usize) -> Result<()> {
    if is_due(Fault::Memory) { Err(Error::OutOfMemory { bytes }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_of_several_is_due_once() {
        let left = AtomicU64::new(3);
        let due: Vec<bool> = (0..5).map(|_| left.load(Ordering::Relaxed) != 0 && count_down(&left)).collect();
        assert_eq!(due, [false, false, true, false, false]);
    }
}
