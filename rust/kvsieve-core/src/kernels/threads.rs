//! Thread pools of a given size, kept for the life of the process.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::at_least_one;
use crate::{Error, Result, fork};

/// Bytes that a thread reads between two questions whether to stop: a few milliseconds, on the slowest level a tenth of a second.
pub(crate) const BREATH: usize = 32 << 20;

/// Waking another thread costs as long as reading about this many bytes.
pub(crate) const INLINE: usize = 256 << 10;

/// Refuses a number of threads that nothing can run on.
pub(crate) fn check(threads: usize) -> Result<()> {
    at_least_one("threads", threads)
}

/// Keyed by process too: after a fork the child has the parent's memory but none of its threads, and would wait for ever.
static POOLS: Mutex<Vec<(u32, usize, Arc<ThreadPool>)>> = Mutex::new(Vec::new());

/// The pool of `threads` threads, started when first asked for. Idle threads park; they do not spin beside the caller's own.
pub fn pool(threads: usize) -> Result<Arc<ThreadPool>> {
    let pid = std::process::id();
    // Or a fork might leave the child a list that is locked for ever.
    let _hold = fork::hold();
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, _, pool)) = pools.iter().find(|(p, n, _)| (*p, *n) == (pid, threads)) {
        return Ok(Arc::clone(pool));
    }
    let built = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kvsieve-{i}")).build();
    let pool = Arc::new(built.map_err(|_| Error::Unsupported("could not start the worker threads; ask for fewer"))?);
    // Pools of a former process stay in the list: dropping one would signal threads that do not exist here.
    pools.push((pid, threads, Arc::clone(&pool)));
    Ok(pool)
}
