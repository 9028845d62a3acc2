//! Memory of one's own that is never moved.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;

use crate::{Error, Result, fault};

/// What the processor translates in one step where the kernel allows it: buffers of this size and more are aligned to it and offered
/// for huge pages.
pub(super) const HUGE: usize = 2 << 20;

/// A buffer begins at a multiple of this.
const ALIGN: usize = 64;

/// What the allocator aligns to whatever is asked of it.
const LEAST: usize = 16;

/// Zeroed memory that is never moved.
pub(super) struct Buf {
    ptr: NonNull<u8>,
    bytes: usize,
    /// What was allocated, and how: a small buffer lies somewhere in it.
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a `Buf` owns its memory alone, and whoever holds it shared or exclusively decides who reads and writes.
unsafe impl Send for Buf {}
// SAFETY: as above; nothing is written through a shared reference.
unsafe impl Sync for Buf {}

impl Buf {
    /// `bytes` of zeros, from huge pages where they are large; `bytes` is not zero.
    pub(super) fn zeroed(bytes: usize) -> Result<Self> {
        fault::may_lack(bytes)?;
        let oom = Error::OutOfMemory { bytes };
        // A small buffer is aligned here. Of glibc (before 2.38), what was asked for as aligned and given back is seldom found again,
        // and a text without end whose last block grows and is freed, and grows and is freed, takes ever more.
        let (align, more) = if bytes >= HUGE { (HUGE, 0) } else { (LEAST, ALIGN - LEAST) };
        let size = bytes.checked_add(more).ok_or(oom.clone())?;
        let layout = Layout::from_size_align(size, align).map_err(|_| oom.clone())?;
        assert!(bytes > 0, "a buffer of nothing");
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc(layout) }).ok_or(oom)?;
        // SAFETY: the next multiple of `ALIGN` is at most `more` bytes away, which were asked for in addition.
        let ptr = unsafe { base.add(base.as_ptr().align_offset(ALIGN)) };
        #[cfg(target_os = "linux")]
        if bytes >= HUGE {
            // SAFETY: the range was just allocated and starts at a page. The call is a hint: its failure changes nothing.
            unsafe { libc::madvise(ptr.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // Only after the hint, so that the first touch already gets huge pages.
        // SAFETY: `bytes` were just allocated.
        unsafe { ptr.as_ptr().write_bytes(0, bytes) };
        Ok(Buf { ptr, bytes, base, layout })
    }

    /// Bytes of it.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    pub(super) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}
