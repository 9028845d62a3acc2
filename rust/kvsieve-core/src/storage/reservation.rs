//! Addresses first, memory later: neighbours that come and go one by one, and still lie in huge pages while all are there.

#[cfg(target_os = "linux")]
pub(super) use linux::Reservation;
#[cfg(not(target_os = "linux"))]
pub(super) use none::Reservation;

#[cfg(target_os = "linux")]
mod linux {
    use std::ops::Range;
    use std::ptr::NonNull;

    use super::super::buf::HUGE;
    use crate::{Error, Result, fault};

    /// Since Linux 6.1; libc has no name for it on every target.
    const MADV_COLLAPSE: i32 = 25;
    /// Since Linux 5.14.
    const MADV_POPULATE_WRITE: i32 = 23;

    /// A range of addresses, aligned to huge pages, of which parts have memory.
    ///
    /// The kernel is told not to use huge pages where a stretch of [`HUGE`] bytes has memory in part only: they would hold what
    /// nobody asked for. A stretch that is full becomes one.
    pub struct Reservation {
        start: NonNull<u8>,
        bytes: usize,
        page: usize,
        /// Bytes with memory in each stretch.
        filled: Vec<usize>,
    }

    // SAFETY: a reservation owns its addresses alone, and whoever holds it shared or exclusively decides who reads and writes.
    unsafe impl Send for Reservation {}
    // SAFETY: as above; nothing is written through a shared reference.
    unsafe impl Sync for Reservation {}

    impl Reservation {
        /// Whether pieces of `bytes` can come and go: only whole pages do.
        pub fn suits(bytes: usize) -> bool {
            bytes.is_multiple_of(page())
        }

        /// Addresses for `bytes`, or none where there are not enough.
        pub fn new(bytes: usize) -> Option<Self> {
            fault::may_lack(bytes).ok()?;
            let padded = bytes.checked_add(HUGE)?;
            let (prot, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
            // SAFETY: new addresses, chosen by the kernel.
            let raw = unsafe { libc::mmap(std::ptr::null_mut(), padded, prot, flags, -1, 0) };
            if raw == libc::MAP_FAILED {
                return None;
            }
            let raw: *mut u8 = raw.cast();
            let before = raw.align_offset(HUGE);
            // SAFETY: `before` is less than the `HUGE` bytes that were asked for in addition; what is cut off was never used.
            unsafe {
                let start = raw.add(before);
                if before > 0 {
                    libc::munmap(raw.cast(), before);
                }
                let bytes = bytes.next_multiple_of(page());
                libc::munmap(start.add(bytes).cast(), padded - before - bytes);
                libc::madvise(start.cast(), bytes, libc::MADV_NOHUGEPAGE);
                Some(Reservation {
                    start: NonNull::new(start)?,
                    bytes,
                    page: page(),
                    filled: vec![0; bytes.div_ceil(HUGE)],
                })
            }
        }

        /// Gives memory to `range`, whole pages without any, and zeroes it; on failure nothing has changed.
        pub fn commit(&mut self, range: Range<usize>) -> Result<()> {
            fault::may_lack(range.len())?;
            let mut collapse = Vec::new();
            for stretch in self.stretches(&range) {
                let before = self.filled[stretch];
                self.filled[stretch] += overlap(&range, stretch);
                if self.filled[stretch] == HUGE {
                    self.advise(stretch, libc::MADV_HUGEPAGE);
                    if before > 0 {
                        collapse.push(stretch);
                    }
                }
            }
            if !self.populate(&range) {
                self.release(range.clone());
                return Err(Error::OutOfMemory { bytes: range.len() });
            }
            for stretch in collapse {
                // A hint: where it fails the pages stay small, and the kernel may join them later by itself.
                self.advise(stretch, MADV_COLLAPSE);
            }
            Ok(())
        }

        /// Takes the memory of `range` back, which was committed.
        pub fn release(&mut self, range: Range<usize>) {
            for stretch in self.stretches(&range) {
                if self.filled[stretch] == HUGE {
                    self.advise(stretch, libc::MADV_NOHUGEPAGE);
                }
                self.filled[stretch] -= overlap(&range, stretch);
            }
            // SAFETY: inside the reservation, and nobody uses it any more.
            unsafe { libc::madvise(self.at(range.start).as_ptr().cast(), range.len(), libc::MADV_DONTNEED) };
        }

        /// The address of byte `offset`.
        pub fn at(&self, offset: usize) -> NonNull<u8> {
            assert!(offset < self.bytes, "byte {offset} of {}", self.bytes);
            // SAFETY: inside the reservation.
            unsafe { self.start.add(offset) }
        }

        fn stretches(&self, range: &Range<usize>) -> Range<usize> {
            range.start / HUGE..range.end.div_ceil(HUGE)
        }

        fn advise(&self, stretch: usize, advice: i32) {
            // SAFETY: a full stretch lies inside the reservation; these advices change how memory is held, not what it holds.
            unsafe { libc::madvise(self.at(stretch * HUGE).as_ptr().cast(), HUGE, advice) };
        }

        /// Touches every page; false where memory ran out.
        fn populate(&self, range: &Range<usize>) -> bool {
            let start = self.at(range.start).as_ptr();
            // SAFETY: inside the reservation; what is written are zeros over zeros.
            unsafe {
                if libc::madvise(start.cast(), range.len(), MADV_POPULATE_WRITE) == 0 {
                    return true;
                }
                if *libc::__errno_location() != libc::EINVAL {
                    return false;
                }
                (0..range.len()).step_by(self.page).for_each(|at| start.add(at).write_volatile(0));
            }
            true
        }
    }

    impl Drop for Reservation {
        fn drop(&mut self) {
            // SAFETY: mapped in `new`, unmapped only here.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }

    fn overlap(range: &Range<usize>, stretch: usize) -> usize {
        range.end.min((stretch + 1) * HUGE) - range.start.max(stretch * HUGE)
    }

    fn page() -> usize {
        // SAFETY: a question with no side effects.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        impl Reservation {
            /// Bytes that the kernel says are in memory.
            fn resident(&self) -> usize {
                let mut pages = vec![0u8; self.bytes / self.page];
                // SAFETY: the whole reservation, and a byte for each of its pages.
                let done = unsafe { libc::mincore(self.start.as_ptr().cast(), self.bytes, pages.as_mut_ptr()) };
                assert_eq!(done, 0);
                pages.iter().filter(|&&x| x & 1 == 1).count() * self.page
            }

            fn piece(&mut self, range: &Range<usize>) -> &mut [u8] {
                // SAFETY: committed by the test, and borrowed from the reservation.
                unsafe { std::slice::from_raw_parts_mut(self.at(range.start).as_ptr(), range.len()) }
            }
        }

        /// Pieces of a size that divides no huge page come and go in any order, until every stretch was full and was not.
        #[test]
        fn what_is_resident_is_what_was_committed() {
            let size = 3 * page().max(1 << 16);
            let count = 4 * HUGE / size;
            let mut memory = Reservation::new(count * size).expect("addresses");
            assert_eq!(memory.start.as_ptr().align_offset(HUGE), 0);
            let mut held = vec![0u8; count];
            let mut noise = 88_172_645_463_325_252u64;
            let (mut was_full, mut was_opened) = (0, 0);
            for turn in 1..4000 {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                let at = noise as usize % count;
                // Tides: mostly filling, then mostly freeing.
                let fill = noise >> 40 & 7 != 0 || turn / 400 % 2 == 0;
                let full = memory.filled.iter().filter(|&&bytes| bytes == HUGE).count();
                if held[at] == 0 && fill {
                    // Several at once where there is room, so that stretches fill by one call too.
                    let run = held[at..].iter().take(1 + (noise >> 20) as usize % 24).take_while(|&&x| x == 0).count();
                    let range = at * size..(at + run) * size;
                    memory.commit(range.clone()).unwrap();
                    assert!(memory.piece(&range).iter().all(|&x| x == 0), "new memory is zero");
                    memory.piece(&range).fill(turn as u8 | 1);
                    held[at..at + run].fill(turn as u8 | 1);
                } else if held[at] != 0 && (turn / 400 % 2 == 1 || noise >> 40 & 7 == 0) {
                    memory.release(at * size..(at + 1) * size);
                    held[at] = 0;
                }
                let now = memory.filled.iter().filter(|&&bytes| bytes == HUGE).count();
                was_full += usize::from(now > full);
                was_opened += usize::from(now < full);
                let committed = held.iter().filter(|&&x| x != 0).count() * size;
                assert_eq!(memory.filled.iter().sum::<usize>(), committed);
                if turn % 50 == 0 {
                    assert_eq!(memory.resident(), committed, "at turn {turn}");
                    for (at, &want) in held.iter().enumerate().filter(|(_, want)| **want != 0) {
                        assert!(memory.piece(&(at * size..(at + 1) * size)).iter().all(|&x| x == want));
                    }
                }
            }
            assert!(was_full > 10 && was_opened > 10, "{was_full} and {was_opened}");
        }

        #[test]
        fn more_addresses_than_there_are() {
            assert!(Reservation::new(1 << 60).is_none());
            assert!(Reservation::new(usize::MAX).is_none());
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod none {
    use std::ops::Range;
    use std::ptr::NonNull;

    use crate::Result;

    /// Nowhere but on Linux: every slab is memory of its own.
    pub enum Reservation {}

    impl Reservation {
        pub fn suits(_bytes: usize) -> bool {
            false
        }

        pub fn new(_bytes: usize) -> Option<Self> {
            None
        }

        pub fn commit(&mut self, _range: Range<usize>) -> Result<()> {
            match *self {}
        }

        pub fn release(&mut self, _range: Range<usize>) {
            match *self {}
        }

        pub fn at(&self, _offset: usize) -> NonNull<u8> {
            match *self {}
        }
    }
}
