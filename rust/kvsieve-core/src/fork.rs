//! Locks that survive `fork`.
//!
//! The child of a fork has the parent's memory, but of its threads only the one that forked. A lock that another thread held stays held
//! there for ever, and what that thread was writing stays half written. So:
//!
//! * a fork waits until nobody is writing under a [`Lock`], or is inside [`hold`]: what the child gets is whole. Writers never wait
//!   for whatever a forking thread may have in hand (Python's own lock), so this ends;
//! * a fork does not wait for readers, who may. The child forgets them: it meets every lock unlocked.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Once, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// Shared by those whom a fork waits for, exclusive to a fork.
static BUSY: RwLock<()> = RwLock::new(());

/// Forks between the first process and this one.
static GENERATION: AtomicU64 = AtomicU64::new(0);

#[cfg(unix)]
mod handlers {
    use super::*;

    struct Forking(UnsafeCell<Option<RwLockWriteGuard<'static, ()>>>);

    // SAFETY: only touched by who has `BUSY` exclusively, or is about to give it up.
    unsafe impl Sync for Forking {}

    static FORKING: Forking = Forking(UnsafeCell::new(None));

    unsafe extern "C" fn prepare() {
        let guard = BUSY.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the guard that is put here is what gives the right to.
        unsafe { *FORKING.0.get() = Some(guard) };
    }

    unsafe extern "C" fn parent() {
        // SAFETY: `prepare` ran on this thread and left its guard.
        let guard = unsafe { (*FORKING.0.get()).take() };
        drop(guard);
    }

    unsafe extern "C" fn child() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the one thread of the child is the one on which `prepare` ran.
        unsafe { parent() };
    }

    pub fn install() {
        // Failure means that there is no memory for a list entry; forks are then as dangerous as without handlers.
        // SAFETY: the handlers are functions of this library, which is never unloaded.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    }
}

fn install() {
    static DONE: Once = Once::new();
    #[cfg(unix)]
    DONE.call_once(handlers::install);
}

/// Keeps forks waiting while it lives: for work that no other process must find half done. Not to be asked for twice by one thread.
pub(crate) fn hold() -> RwLockReadGuard<'static, ()> {
    install();
    BUSY.read().unwrap_or_else(PoisonError::into_inner)
}

/// Counts forks from now on: to be called by whoever loads the library, before there are any.
pub fn watch() {
    install();
}

/// Forks between the first process and this one: what a process made it can tell from what it came with.
pub(crate) fn generation() -> u64 {
    install();
    GENERATION.load(Ordering::Relaxed)
}

/// Who waits for whom, in one process.
struct Gate {
    generation: u64,
    lock: RwLock<()>,
}

impl Gate {
    fn new() -> *mut Gate {
        Box::into_raw(Box::new(Gate { generation: GENERATION.load(Ordering::Relaxed), lock: RwLock::new(()) }))
    }
}

/// Many readers or one writer, also after a fork. A panic while writing poisons nothing.
pub struct Lock<T> {
    gate: AtomicPtr<Gate>,
    value: UnsafeCell<T>,
}

// SAFETY: as for `RwLock`: the value is handed out shared to readers, exclusively to one writer.
unsafe impl<T: Send> Send for Lock<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Lock<T> {}

/// The right to read.
pub struct Reading<'a, T> {
    value: &'a T,
    _gate: RwLockReadGuard<'a, ()>,
}

/// The right to write.
pub struct Writing<'a, T> {
    value: &'a mut T,
    _hold: RwLockReadGuard<'static, ()>,
    _gate: RwLockWriteGuard<'a, ()>,
}

impl<T> Lock<T> {
    pub fn new(value: T) -> Self {
        install();
        Lock { gate: AtomicPtr::new(Gate::new()), value: UnsafeCell::new(value) }
    }

    /// This process's gate: after a fork, a new one.
    fn gate(&self) -> &RwLock<()> {
        let old = self.gate.load(Ordering::Acquire);
        // SAFETY: gates live as long as the lock that leads to them.
        let gate = unsafe { &*old };
        if gate.generation == GENERATION.load(Ordering::Relaxed) {
            return &gate.lock;
        }
        let new = Gate::new();
        match self.gate.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            // The old one is left where it is: another thread of this process may be looking at it just now.
            // SAFETY: as above.
            Ok(_) => unsafe { &(*new).lock },
            Err(other) => {
                // SAFETY: nobody else has seen `new`; `other` is this process's, made by a thread that was faster.
                unsafe {
                    drop(Box::from_raw(new));
                    &(*other).lock
                }
            }
        }
    }

    fn reading<'a>(&'a self, gate: RwLockReadGuard<'a, ()>) -> Reading<'a, T> {
        // SAFETY: this process has no writer while the guard lives, and another process had none when it forked.
        Reading { value: unsafe { &*self.value.get() }, _gate: gate }
    }

    fn writing<'a>(&'a self, gate: RwLockWriteGuard<'a, ()>) -> Writing<'a, T> {
        // In this order: a fork that finds this thread waiting here takes a lock with it under which nothing was touched yet.
        let hold = hold();
        // SAFETY: this process has nobody else inside while the guard lives, and no other ever wrote to this one's memory.
        Writing { value: unsafe { &mut *self.value.get() }, _hold: hold, _gate: gate }
    }

    pub fn read(&self) -> Reading<'_, T> {
        self.reading(self.gate().read().unwrap_or_else(PoisonError::into_inner))
    }

    /// None where a writer is inside.
    pub fn try_read(&self) -> Option<Reading<'_, T>> {
        unblocked(self.gate().try_read()).map(|gate| self.reading(gate))
    }

    pub fn write(&self) -> Writing<'_, T> {
        self.writing(self.gate().write().unwrap_or_else(PoisonError::into_inner))
    }

    /// None where anybody is inside.
    pub fn try_write(&self) -> Option<Writing<'_, T>> {
        unblocked(self.gate().try_write()).map(|gate| self.writing(gate))
    }
}

fn unblocked<G>(tried: Result<G, TryLockError<G>>) -> Option<G> {
    match tried {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(err)) => Some(err.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl<T> Drop for Lock<T> {
    fn drop(&mut self) {
        // SAFETY: made by `Gate::new`, and no guard is left.
        drop(unsafe { Box::from_raw(*self.gate.get_mut()) });
    }
}

impl<T> Deref for Reading<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> Deref for Writing<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> DerefMut for Writing<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let lock = Lock::new(1);
        let one = lock.read();
        assert_eq!((*one, *lock.try_read().unwrap()), (1, 1));
        assert!(lock.try_write().is_none());
        drop(one);
        *lock.write() += 1;
        let writer = lock.try_write().unwrap();
        assert!(lock.try_read().is_none());
        assert_eq!(*writer, 2);
    }

    #[test]
    fn a_new_generation_meets_an_open_lock() {
        let lock = Lock::new(7);
        std::mem::forget(lock.read());
        assert!(lock.try_write().is_none());
        // What a fork leaves: a reader who is not there.
        // SAFETY: the gate is this lock's, and nobody else looks at it.
        unsafe { (*lock.gate.load(Ordering::Relaxed)).generation = u64::MAX };
        assert_eq!(*lock.try_write().unwrap(), 7);
    }
}
