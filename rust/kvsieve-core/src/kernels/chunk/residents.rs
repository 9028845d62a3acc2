//! Where the residents of a row lie.

use std::ops::Range;

use crate::Result;
use crate::ids::{BLOCK, Run};
use crate::kernels::select::bounds_of;
use crate::storage::arena::Arena;

/// A run of residents that lie together.
struct Together {
    /// Key and value of head 0.
    key: *const u8,
    value: *const u8,
    /// Bytes from head to head.
    next_key: usize,
    next_value: usize,
}

/// Where the residents of a row lie.
pub(super) struct Residents {
    /// The first resident of each run.
    starts: Vec<u32>,
    runs: Vec<Together>,
    pub len: u32,
    /// Whether all runs but the last are whole blocks.
    pub even: bool,
    /// Of every whole 64 residents their bounds for head 0, and the bytes from head to head; null where they have none. Empty where that is
    /// not asked.
    pub bounds: Vec<(*const u8, usize)>,
}

// SAFETY: the pointers are into an arena that is borrowed, shared, for as long as a `Residents` lives, and are only read through.
unsafe impl Sync for Residents {}

impl Residents {
    pub fn new(arena: &Arena, runs: &[Run], bounded: bool) -> Result<Self> {
        let mut found = Residents { starts: Vec::new(), runs: Vec::new(), len: 0, even: true, bounds: Vec::new() };
        for run in runs.iter().filter(|run| run.lo < run.hi) {
            arena.check_span(run.block, run.lo, run.hi)?;
            found.even &= found.len as usize == found.runs.len() * BLOCK as usize;
            found.starts.push(found.len);
            let (key, value) = arena.rows(run.block, 0, run.lo);
            let next = if arena.num_kv_heads() > 1 { arena.rows(run.block, 1, run.lo) } else { (key, value) };
            let (next_key, next_value) = (next.0 as usize - key as usize, next.1 as usize - value as usize);
            found.runs.push(Together { key, value, next_key, next_value });
            found.len += run.len();
        }
        if bounded {
            found.bounds = bounds_of(arena, runs);
        }
        Ok(found)
    }

    /// Calls `each` with the address of every key and value of a stretch.
    #[inline]
    pub fn each(
        &self,
        stretch: Range<u32>,
        head: usize,
        bytes: (usize, usize),
        mut each: impl FnMut(*const u8, *const u8),
    ) {
        let mut i = stretch.start;
        while i < stretch.end {
            let at = if self.even { (i / BLOCK) as usize } else { self.starts.partition_point(|&s| s <= i) - 1 };
            let (run, start) = (&self.runs[at], self.starts[at]);
            let end = self.starts.get(at + 1).copied().unwrap_or(self.len).min(stretch.end);
            let skip = (i - start) as usize;
            let mut key = run.key.wrapping_add(head * run.next_key + skip * bytes.0);
            let mut value = run.value.wrapping_add(head * run.next_value + skip * bytes.1);
            for _ in i..end {
                each(key, value);
                (key, value) = (key.wrapping_add(bytes.0), value.wrapping_add(bytes.1));
            }
            i = end;
        }
    }
}
