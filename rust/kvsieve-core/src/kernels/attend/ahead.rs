//! Asks for memory that is needed soon.

use crate::kernels::simd::Simd;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// What the next tile will need, asked for bit by bit while this one is computed with: a burst would fill the queue of misses and
/// stall, a pause would leave the memory idle.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a> {
    at: *const u8,
    /// Cache lines still to be asked for, of this stretch of memory and of all.
    here: usize,
    left: usize,
    /// The stretches after this one, each with its lines.
    rest: &'a [(*const u8, usize)],
    /// Lines and calls over which to spread them, and what the calls so far have saved up.
    lines: usize,
    calls: usize,
    saved: usize,
}

impl<'a> Ahead<'a> {
    /// Stretches of memory, each with its number of lines (not 0), spread over so many calls of [`Ahead::ask`].
    #[inline(always)]
    pub fn new(stretches: &'a [(*const u8, usize)], calls: usize) -> Self {
        let lines = stretches.iter().map(|s| s.1).sum();
        let (&(at, here), rest) = stretches.split_first().unwrap_or((&(std::ptr::null(), 0), &[]));
        Ahead { at, here, left: lines, rest, lines, calls: calls.max(1), saved: 0 }
    }

    #[inline(always)]
    pub unsafe fn ask<S: Simd>(&mut self) {
        self.saved += self.lines;
        while self.saved >= self.calls && self.left > 0 {
            // SAFETY: prefetching reads nothing; any address will do.
            unsafe { S::prefetch(self.at) };
            self.at = self.at.wrapping_add(LINE);
            self.left -= 1;
            self.here -= 1;
            self.saved -= self.calls;
            if self.here == 0
                && let Some((next, others)) = self.rest.split_first()
            {
                ((self.at, self.here), self.rest) = (*next, others);
            }
        }
    }
}
