//! Extents that are written while others compute, by the thread of their file.
//!
//! It never sees an arena. What it writes was copied before, and what it has done lies in a [`Mailbox`] until whoever asked looks. So a
//! block may change, or go, while the thread is at work: its answer is then of no use.
//!
//! A process that was forked has no such thread, and may find anything of this locked for ever. It touches nothing here: see
//! [`TierFile::at_home`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::file::{Extent, TierFile};
use crate::{Error, Result, fault};

/// A disk that takes longer does not answer any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the thread shall write of a block. The ticket is what its answer is known by.
pub(in crate::storage) struct Job {
    pub block: usize,
    pub ticket: u64,
    pub extent: Extent,
    pub bytes: Vec<u8>,
    pub to: Arc<Mailbox>,
}

/// What became of a job.
pub(in crate::storage) struct Answer {
    pub block: usize,
    pub ticket: u64,
    pub extent: Extent,
    /// The checksum, and the bytes written.
    pub written: Result<(u64, usize)>,
}

#[derive(Default)]
struct Answers {
    answers: Vec<Answer>,
    /// Nobody looks any more.
    closed: bool,
}

/// Where one layer finds its answers.
#[derive(Default)]
pub(in crate::storage) struct Mailbox {
    answers: Mutex<Answers>,
    came: Condvar,
}

impl Mailbox {
    fn open(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has come.
    pub fn take(&self) -> Vec<Answer> {
        std::mem::take(&mut self.open().answers)
    }

    /// What has come, and at least one answer if a job is under way; nothing after [`PATIENCE`].
    pub fn wait(&self) -> Vec<Answer> {
        let mut open = self.open();
        while open.answers.is_empty() {
            let waited = self.came.wait_timeout(open, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            open = waited.0;
            if waited.1.timed_out() {
                break;
            }
        }
        std::mem::take(&mut open.answers)
    }

    /// Nobody looks any more: extents that are still being written are given back by the thread.
    pub fn close(&self) -> Vec<Answer> {
        let mut open = self.open();
        open.closed = true;
        std::mem::take(&mut open.answers)
    }

    fn put(&self, file: &TierFile, answer: Answer) {
        let mut open = self.open();
        if !open.closed {
            open.answers.push(answer);
            self.came.notify_all();
        } else {
            file.free(answer.extent);
        }
    }
}

/// Has a job done by the thread of the file.
///
/// # Errors
/// [`Error::TierFailed`] where there can be no thread.
pub(super) fn send(file: &Arc<TierFile>, job: Job) -> Result<()> {
    let mine = Arc::clone(file);
    file.run(Box::new(move || do_one(&mine, job)))
}

fn do_one(file: &TierFile, Job { block, ticket, extent, bytes, to }: Job) {
    // A thread that is gone would leave whoever waits for the answer waiting.
    let written = answered(|| file.write(extent, &bytes).map(|sum| (sum, bytes.len())));
    to.put(file, Answer { block, ticket, extent, written });
}

/// What came of it, if only that it panicked.
fn answered<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    let run = || {
        fault::may_panic();
        run()
    };
    let gone = |_| Err(Error::TierFailed { what: "write to", reason: "its thread panicked".to_string() });
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(gone)
}
