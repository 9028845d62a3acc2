//! The file of a stream: extents of it are handed out, written and read as wholes, and handed out again.
//!
//! Space is allocated before it is written, so a full disk is an error of [`TierFile::allocate`] where the file system can say so, and
//! never a signal: nothing is mapped. What was written is not synchronised with the disk. It need not outlive the process, and reads
//! come from the system's cache until it has been.
//!
//! On Unix the file has no name: a process that dies leaves nothing, and nobody can delete or truncate it by its name.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::checksum::checksum;
use super::worker::{Task, Worker};
use crate::fork::generation;
use crate::{Error, Result};

/// Extents begin at multiples of this.
const ALIGN: u64 = 4096;

/// The file grows by so many bytes at least, where there is space for them.
const STEP: u64 = 8 << 20;

/// Where the bytes of a file lie: a file, or in tests something that fails.
pub trait Medium: Send + Sync {
    /// Allocates space for the first `len` bytes.
    fn grow(&self, len: u64) -> io::Result<()>;
    /// Reads some bytes at `at`; 0 of them at the end.
    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<usize>;
    /// Writes some bytes at `at`.
    fn write_at(&self, from: &[u8], at: u64) -> io::Result<usize>;
    /// Begins to read `len` bytes at `at`, and waits for nothing: a hint, which changes no answer.
    fn will_need(&self, _at: u64, _len: u64) {}
}

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub bytes: u64,
}

#[derive(Default)]
struct Space {
    /// Everything behind this was never handed out.
    end: u64,
    /// Bytes that were allocated.
    grown: u64,
    /// Bytes of the extents that are in use.
    used: u64,
    /// Where free extents lie, by their size.
    free: BTreeMap<u64, Vec<u64>>,
}

/// The blocks of all layers of a stream that were written out.
pub struct TierFile {
    medium: Box<dyn Medium>,
    space: Mutex<Space>,
    /// The process that made it.
    process: u64,
    worker: Worker,
}

impl TierFile {
    /// A file without a name in `folder`.
    pub fn create(folder: &Path) -> Result<Arc<Self>> {
        Ok(Self::of(system::create(folder)?))
    }

    /// A file over `medium`.
    pub fn of(medium: Box<dyn Medium>) -> Arc<Self> {
        Arc::new(TierFile { medium, space: Mutex::default(), process: generation(), worker: Worker::default() })
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the process that made it. Another one, a fork, may read what was written before, and do nothing else: the file is
    /// shared, and locks may be held by threads that it does not have.
    pub fn at_home(&self) -> bool {
        self.process == generation()
    }

    /// Bytes of the extents in use, and of the file; of a fork's, what it can tell.
    pub fn bytes(&self) -> (u64, u64) {
        let space = if self.at_home() { Some(self.space()) } else { self.space.try_lock().ok() };
        space.map_or((0, 0), |space| (space.used, space.grown))
    }

    /// Has something done by the thread of the file.
    pub(super) fn run(&self, task: Task) -> Result<()> {
        self.worker.run(task)
    }

    /// An extent of at least `bytes`.
    ///
    /// # Errors
    /// [`Error::TierFull`] where there is no space for it; then nothing has changed.
    pub fn allocate(&self, bytes: usize) -> Result<Extent> {
        if !self.at_home() {
            // Both processes would write to the one file.
            return Err(Error::Unsupported(
                "a forked process cannot write blocks to the file of the stream it came with; open a new stream in it",
            ));
        }
        let bytes = (bytes as u64).next_multiple_of(ALIGN);
        let mut space = self.space();
        if let Some(offset) = space.free.get_mut(&bytes).and_then(Vec::pop) {
            space.used += bytes;
            return Ok(Extent { offset, bytes });
        }
        let (offset, end) = (space.end, space.end + bytes);
        if end > space.grown {
            // More than is needed now, or at least that.
            let more = end.next_multiple_of(STEP);
            let grown = self.medium.grow(more).map(|()| more);
            space.grown = grown.or_else(|_| self.medium.grow(end).map(|()| end)).map_err(|err| full(bytes, &err))?;
        }
        space.end = end;
        space.used += bytes;
        Ok(Extent { offset, bytes })
    }

    /// Takes an extent back.
    pub fn free(&self, extent: Extent) {
        if !self.at_home() {
            return;
        }
        let mut space = self.space();
        space.used -= extent.bytes;
        space.free.entry(extent.bytes).or_default().push(extent.offset);
    }

    /// Writes `from` to the beginning of an extent; returns its checksum.
    pub fn write(&self, extent: Extent, from: &[u8]) -> Result<u64> {
        assert!(from.len() as u64 <= extent.bytes, "{} bytes into {extent:?}", from.len());
        let mut done = 0;
        while done < from.len() {
            match self.medium.write_at(&from[done..], extent.offset + done as u64) {
                Ok(0) => return Err(failed("write", "no more bytes were taken")),
                Ok(n) => done += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) if is_full(&err) => return Err(full(extent.bytes, &err)),
                Err(err) => return Err(failed("write", &err.to_string())),
            }
        }
        Ok(checksum(from, extent.offset))
    }

    /// Begins to read some extents, all at once, so that each is there sooner when it is [read](Self::read). A hint: what goes wrong is
    /// said by that read.
    pub(super) fn will_need(&self, mut extents: Vec<Extent>) {
        extents.sort_unstable_by_key(|extent| extent.offset);
        for stretch in extents.chunk_by(|a, b| a.offset + a.bytes == b.offset) {
            if let [first, .., last] | [first @ last] = stretch {
                self.medium.will_need(first.offset, last.offset + last.bytes - first.offset);
            }
        }
    }

    /// Reads what was written to an extent to `to`, which is of no use after an error. `block` is whose it is.
    ///
    /// # Errors
    /// [`Error::TierDamaged`] where it is not what was written.
    pub fn read(&self, extent: Extent, sum: u64, block: u32, to: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < to.len() {
            match self.medium.read_at(&mut to[done..], extent.offset + done as u64) {
                Ok(0) => return Err(failed("read", "the file is shorter than what was written to it")),
                Ok(n) => done += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(failed("read", &err.to_string())),
            }
        }
        if checksum(to, extent.offset) == sum { Ok(()) } else { Err(Error::TierDamaged { block }) }
    }
}

fn failed(what: &'static str, reason: &str) -> Error {
    Error::TierFailed { what, reason: reason.to_string() }
}

fn full(bytes: u64, err: &io::Error) -> Error {
    if is_full(err) { Error::TierFull { bytes, reason: err.to_string() } } else { failed("allocate", &err.to_string()) }
}

fn is_full(err: &io::Error) -> bool {
    matches!(err.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

#[cfg(unix)]
mod system {
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::Result;
    use crate::storage::tier::file::{Medium, failed, full, is_full};

    impl Medium for File {
        fn grow(&self, len: u64) -> io::Result<()> {
            #[cfg(target_os = "linux")]
            if let Some(done) = allocated(self, len) {
                return done;
            }
            self.set_len(len)
        }

        fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<usize> {
            FileExt::read_at(self, to, at)
        }

        fn write_at(&self, from: &[u8], at: u64) -> io::Result<usize> {
            FileExt::write_at(self, from, at)
        }

        #[cfg(target_os = "linux")]
        fn will_need(&self, at: u64, len: u64) {
            use std::os::fd::AsRawFd;
            if let (Ok(at), Ok(len)) = (libc::off_t::try_from(at), libc::off_t::try_from(len)) {
                // SAFETY: an open file, and a range of it; an advice, so what it answers matters to nobody.
                unsafe { libc::posix_fadvise(self.as_raw_fd(), at, len, libc::POSIX_FADV_WILLNEED) };
            }
        }
    }

    /// None where the file system cannot allocate; then writing tells whether there is space.
    #[cfg(target_os = "linux")]
    fn allocated(file: &File, len: u64) -> Option<io::Result<()>> {
        use std::os::fd::AsRawFd;
        let Ok(len) = libc::off_t::try_from(len) else {
            return Some(Err(io::Error::from_raw_os_error(libc::EFBIG)));
        };
        loop {
            // SAFETY: an open file, and a length.
            match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
                0 => return Some(Ok(())),
                libc::EINTR => {}
                libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS => return None,
                err => return Some(Err(io::Error::from_raw_os_error(err))),
            }
        }
    }

    /// A file that is in no folder any more.
    pub fn create(folder: &Path) -> Result<Box<dyn Medium>> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        #[cfg(target_os = "linux")]
        if let Ok(file) = options.clone().custom_flags(libc::O_TMPFILE).open(folder) {
            return Ok(Box::new(file));
        }
        // Another process may have had this one's number, and died between the two calls below.
        for _ in 0..100 {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".kvsieve-{}-{count}.tier", std::process::id()));
            match options.clone().create_new(true).open(&path) {
                Ok(file) => {
                    std::fs::remove_file(&path).map_err(|err| failed("create", &err.to_string()))?;
                    return Ok(Box::new(file));
                }
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
                Err(err) => {
                    let err = io::Error::new(err.kind(), format!("{}: {err}", folder.display()));
                    return Err(if is_full(&err) { full(0, &err) } else { failed("create", &err.to_string()) });
                }
            }
        }
        Err(failed("create", "every name is taken"))
    }
}

#[cfg(not(unix))]
mod system {
    use std::path::Path;

    use crate::storage::tier::file::Medium;
    use crate::{Error, Result};

    pub fn create(_folder: &Path) -> Result<Box<dyn Medium>> {
        Err(Error::Unsupported("blocks are written to a file on Unix only; leave the budget of host memory out"))
    }
}
