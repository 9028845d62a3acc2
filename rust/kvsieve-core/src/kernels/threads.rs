//! Threads that work is handed to: torch's own where they can be asked, else pools of a given size, kept for the life of the process.
//!
//! Torch computes by the threads of an OpenMP library, and these spin for some milliseconds after each of its operations, in wait for
//! the next. Other threads would have to share the processors with them: attention of 512 queries to 1,536 keys took twice as long.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::at_least_one;
use crate::{Error, Result, fork};

/// Bytes that a thread reads between two questions whether to stop: a few milliseconds, on the slowest level a tenth of a second.
pub(crate) const BREATH: usize = 32 << 20;

/// Waking another thread costs as long as reading about this many bytes.
pub(crate) const INLINE: usize = 256 << 10;

/// More threads than any machine has processors are a mistake, and would take a system's last ones.
const MOST: usize = 4096;

/// Refuses a number of threads that nothing can run on.
pub(crate) fn check(threads: usize) -> Result<()> {
    at_least_one("threads", threads)?;
    if threads > MOST {
        return Err(Error::OutOfRange { what: "threads", expected: "at most 4096", got: threads.to_string() });
    }
    Ok(())
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

/// Runs `each` once for every item, in any order, on so many threads. A panic of one comes out of this call once all threads are done.
pub(crate) fn for_each<T: Send>(threads: usize, items: &mut [T], each: impl Fn(&mut T) + Sync) -> Result<()> {
    if threads == 1 || items.len() <= 1 {
        items.iter_mut().for_each(each);
        return Ok(());
    }
    // No more than there is work for; of few sizes, so that pools are few.
    let threads = threads.min(items.len().next_power_of_two());
    let (next, count, first) = (AtomicUsize::new(0), items.len(), Items(items.as_mut_ptr()));
    let panicked: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    let work = || {
        let one = || loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                break;
            }
            // SAFETY: an item of the slice, which is borrowed for the call; no other thread gets the number.
            each(unsafe { &mut *first.at(i) });
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(one)) {
            next.store(count, Ordering::Relaxed);
            panicked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    };
    if !team::run(threads, &work) {
        pool(threads)?.broadcast(|_| work());
    }
    match panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(panic) => resume_unwind(panic),
        None => Ok(()),
    }
}

/// What `each` makes of every item, in their order; as [`for_each`].
pub(crate) fn map<T: Send, R: Send>(
    threads: usize,
    items: impl Iterator<Item = T>,
    each: impl Fn(T) -> R + Sync,
) -> Result<Vec<R>> {
    let mut slots: Vec<(Option<T>, Option<R>)> = items.map(|item| (Some(item), None)).collect();
    for_each(threads, &mut slots, |(item, made)| *made = item.take().map(&each))?;
    Ok(slots.into_iter().filter_map(|(_, made)| made).collect())
}

/// Where the items of a call lie.
struct Items<T>(*mut T);

// SAFETY: items may go to other threads, and each goes to one.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

/// The threads of the OpenMP library that torch has loaded.
#[cfg(target_os = "linux")]
mod team {
    use std::ffi::{c_int, c_uint, c_void};
    use std::sync::OnceLock;

    use crate::fork::generation;

    type Body = unsafe extern "C" fn(*mut c_void);
    /// What compilers call for a parallel region: GNU's library has it, and LLVM's and Intel's have it for GNU's sake.
    type Parallel = unsafe extern "C" fn(Body, *mut c_void, c_uint, c_uint);
    /// How many threads the next region of this thread may have: as many as torch was told.
    type MostThreads = unsafe extern "C" fn() -> c_int;

    fn library() -> Option<(Parallel, MostThreads)> {
        static FOUND: OnceLock<Option<(Parallel, MostThreads)>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // SAFETY: names that end with zero; whatever library has functions of these names has them for this purpose.
            unsafe {
                let parallel = libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr());
                let most = libc::dlsym(libc::RTLD_DEFAULT, c"omp_get_max_threads".as_ptr());
                let parallel = std::mem::transmute::<*mut c_void, Option<Parallel>>(parallel)?;
                Some((parallel, std::mem::transmute::<*mut c_void, Option<MostThreads>>(most)?))
            }
        })
    }

    unsafe extern "C" fn body<F: Fn() + Sync>(work: *mut c_void) {
        // SAFETY: `run` passes a closure of this type, which outlives the region.
        unsafe { (*work.cast_const().cast::<F>())() };
    }

    /// Runs `work`, which must not panic, on each of at most so many threads, if there is such a library and torch told it of as many:
    /// where the system gives no more threads, it ends the process.
    pub fn run<F: Fn() + Sync>(threads: usize, work: &F) -> bool {
        // The child of a fork has none of the library's threads, which the library does not know.
        let (Some((parallel, most)), Ok(threads), 0) = (library(), c_uint::try_from(threads), generation()) else {
            return false;
        };
        // SAFETY: a function that takes nothing and answers a number.
        if c_uint::try_from(unsafe { most() }).map_or(true, |most| threads > most) {
            return false;
        }
        // SAFETY: the region ends before the call does, and its threads share no more than a reference to `work`.
        unsafe { parallel(body::<F>, std::ptr::from_ref(work).cast_mut().cast(), threads, 0) };
        true
    }
}

#[cfg(not(target_os = "linux"))]
mod team {
    pub fn run<F: Fn() + Sync>(_: usize, _: &F) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_met_once_and_a_panic_comes_out() {
        for threads in [1, 2, 5] {
            let mut items: Vec<usize> = (0..1000).collect();
            for_each(threads, &mut items, |item| *item += 1000).unwrap();
            assert!(items.iter().enumerate().all(|(i, &item)| item == i + 1000));
            let fell = catch_unwind(AssertUnwindSafe(|| {
                for_each(threads, &mut items, |item| assert_ne!(*item, 1500, "this one")).unwrap();
            }));
            assert!(fell.is_err());
            for_each(threads, &mut items, |item| *item = 0).unwrap();
            assert!(items.iter().all(|&item| item == 0));
            assert_eq!(map(threads, 0..99, |x| 2 * x).unwrap(), (0..99).map(|x| 2 * x).collect::<Vec<_>>());
        }
    }

    #[test]
    fn no_more_threads_are_started_than_there_is_work_for() {
        assert!(check(0).is_err() && check(MOST + 1).is_err() && check(usize::MAX).is_err());
        check(MOST).unwrap();
        let mut items = [1, 2, 3];
        for_each(MOST, &mut items, |item| *item *= 2).unwrap();
        assert_eq!(items, [2, 4, 6]);
        assert!(POOLS.lock().unwrap().iter().all(|(_, threads, _)| *threads < MOST));
    }
}
