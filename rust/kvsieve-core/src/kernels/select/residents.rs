//! Where the residents of a row lie, for looking up a key here and a key there.

use std::marker::PhantomData;
use std::ops::Range;

use crate::Result;
use crate::ids::{BLOCK, Run};
use crate::kernels::rows::Source;
use crate::select::Shown;
use crate::storage::arena::Arena;

/// Runs of residents, for looking up where one lies.
pub(super) struct Residents<'a> {
    pub runs: Vec<Run>,
    /// Where each run is seen; empty where that is not asked.
    pub shown: Vec<Shown>,
    /// The first resident of each run.
    starts: Vec<u32>,
    /// Its key for head 0, and the bytes from head to head. Null where keys are packed.
    keys: Vec<(*const u8, usize)>,
    pub len: u32,
    /// Whether all runs but the last are whole blocks.
    pub even: bool,
    pub packed: bool,
    /// Of every whole 64 residents their bounds for head 0, and the bytes from head to head; null where they have none. Empty where that is
    /// not asked.
    pub bounds: Vec<(*const u8, usize)>,
    _arena: PhantomData<&'a Arena>,
}

// SAFETY: the pointers are into an arena that is borrowed, shared, for as long as a `Residents` lives, and are only read through.
unsafe impl Sync for Residents<'_> {}

impl<'a> Residents<'a> {
    pub fn new(arena: &'a Arena, runs: &[Run], shown: &[Shown], page_bounds: bool) -> Result<Self> {
        let mut residents = Residents {
            runs: Vec::with_capacity(runs.len()),
            shown: Vec::with_capacity(shown.len()),
            starts: Vec::with_capacity(runs.len()),
            keys: Vec::with_capacity(runs.len()),
            len: 0,
            even: true,
            packed: false,
            bounds: Vec::new(),
            _arena: PhantomData,
        };
        for (i, run) in runs.iter().enumerate().filter(|(_, run)| run.lo < run.hi) {
            arena.check_span(run.block, run.lo, run.hi)?;
            let (key, stride) = if run.block.is_packed() {
                (std::ptr::null(), 0)
            } else {
                let (key, _) = arena.rows(run.block, 0, run.lo);
                let next = if arena.num_kv_heads() > 1 { arena.rows(run.block, 1, run.lo).0 } else { key };
                (key, next as usize - key as usize)
            };
            residents.even &= residents.len as usize == residents.runs.len() * BLOCK as usize;
            residents.packed |= run.block.is_packed();
            residents.starts.push(residents.len);
            residents.keys.push((key, stride));
            residents.runs.push(*run);
            residents.shown.extend(shown.get(i));
            residents.len += run.len();
        }
        if page_bounds {
            residents.bounds = bounds_of(arena, &residents.runs);
        }
        Ok(residents)
    }

    fn run_of(&self, i: u32) -> usize {
        if self.even { (i / BLOCK) as usize } else { self.starts.partition_point(|&s| s <= i) - 1 }
    }

    /// The key of resident `i` for `head`, and how many residents from it on lie in a row.
    #[inline]
    pub fn key(&self, i: u32, head: usize, row_bytes: usize) -> (*const u8, u32) {
        let run = self.run_of(i);
        let (base, stride) = self.keys[run];
        let end = self.starts.get(run + 1).copied().unwrap_or(self.len);
        (base.wrapping_add(head * stride + (i - self.starts[run]) as usize * row_bytes), end - i)
    }

    /// The run of resident `i`, its slot there, and how many residents from it on lie in the run.
    pub fn place(&self, i: u32) -> (Run, u32, u32) {
        let at = self.run_of(i);
        let (run, offset) = (self.runs[at], i - self.starts[at]);
        (run, run.lo + offset, run.len() - offset)
    }

    /// Pushes what to make the keys of `range` from.
    pub fn sources(&self, range: Range<u32>, head: usize, row_bytes: usize, to: &mut Vec<Source>) {
        let mut i = range.start;
        while i < range.end {
            let at = self.run_of(i);
            let (run, (base, stride)) = (self.runs[at], self.keys[at]);
            let offset = i - self.starts[at];
            let n = (run.len() - offset).min(range.end - i);
            for offset in offset..offset + n {
                let slot = run.lo + offset;
                let key =
                    if base.is_null() { base } else { base.wrapping_add(head * stride + offset as usize * row_bytes) };
                let distance = self.shown.get(at).map_or(0, |shown| match shown.rotate_keys {
                    true => shown.shift - i64::from(slot),
                    false => shown.shift,
                });
                to.push(Source { key, block: run.block, slot, distance });
            }
            i += n;
        }
    }

    /// The greatest distance of any key.
    pub fn most(&self) -> i64 {
        self.shown.iter().map(|shown| shown.shift).max().unwrap_or(0)
    }
}

/// Of every whole 64 residents their bounds for head 0, and the bytes from head to head; null where they have none.
pub(in crate::kernels) fn bounds_of(arena: &Arena, runs: &[Run]) -> Vec<(*const u8, usize)> {
    let mut found = Vec::with_capacity(runs.len());
    arena.each_bound(runs, |row, stride| found.push((row, stride)));
    found
}
