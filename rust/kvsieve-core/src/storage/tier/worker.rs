//! A thread that does one task after the other.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};

use crate::{Error, Result};

pub(super) type Task = Box<dyn FnOnce() + Send>;

/// The thread, from its first task on, until this is gone.
#[derive(Default)]
pub(super) struct Worker(Mutex<Option<Sender<Task>>>);

impl Worker {
    /// # Errors
    /// [`Error::TierFailed`] where there can be no thread.
    pub fn run(&self, task: Task) -> Result<()> {
        let mut sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.is_none() {
            let (send, tasks) = channel::<Task>();
            let made = std::thread::Builder::new().name("kvsieve-tier".to_string());
            let made = made.spawn(move || tasks.into_iter().for_each(|task| task()));
            made.map_err(|err| failed(&err.to_string()))?;
            *sender = Some(send);
        }
        let sent = sender.as_ref().map(|sender| sender.send(task));
        if matches!(sent, Some(Ok(()))) { Ok(()) } else { Err(failed("its thread is gone")) }
    }
}

fn failed(reason: &str) -> Error {
    Error::TierFailed { what: "begin to write or read", reason: reason.to_string() }
}
