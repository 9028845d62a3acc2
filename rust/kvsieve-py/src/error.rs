//! Maps each core error to one Python class of `kvsieve.errors`; every class also inherits the builtin a user would catch.

use kvsieve_core::Error;
use kvsieve_core::fault::{Fault, arm};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError};
use pyo3::panic::PanicException;
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};

/// Asks Python, from inside a long call, whether a signal such as Ctrl-C has arrived, and keeps what its handler raised.
#[derive(Default)]
pub struct Signals(Mutex<Option<PyErr>>);

impl Signals {
    pub fn arrived(&self) -> bool {
        let Err(raised) = Python::attach(|py| py.check_signals()) else { return false };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(raised);
        true
    }

    /// What to raise for `err`.
    pub fn error(&self, err: Error) -> PyErr {
        let raised = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        raised.unwrap_or_else(|| to_py(err))
    }
}

/// The Python exception for a core error.
pub fn to_py(err: Error) -> PyErr {
    let class = match &err {
        Error::OutOfMemory { .. } => return PyMemoryError::new_err(err.to_string()),
        Error::BudgetTooSmall { .. } | Error::PinsTooMany { .. } => "BudgetError",
        Error::OutOfRange { .. } => "PolicyError",
        Error::RowMismatch { .. } | Error::CropTooLong { .. } => "CacheMismatchError",
        Error::Shape { .. } => "ShapeError",
        Error::NoStep { .. } | Error::StepOpen { .. } | Error::BadBlock { .. } | Error::PinsGone { .. } => "StateError",
        Error::NotInMemory { .. } => "StateError",
        Error::TierFull { .. } => "TierFullError",
        Error::TierFailed { .. } => "TierError",
        Error::TierDamaged { .. } => "TierDamagedError",
        Error::Unsupported(_) => "UnsupportedError",
        // Where a caller asked to stop, what its signal's handler raised goes before this.
        Error::Interrupted => "KvsieveError",
    };
    let message = err.to_string();
    Python::attach(|py| {
        let made =
            py.import("kvsieve.errors").and_then(|m| m.getattr(class)).and_then(|c| c.call1((message.as_str(),)));
        match made {
            Ok(value) => PyErr::from_value(value),
            Err(err) => err,
        }
    })
}

/// One exception for each of the core's errors, by the name of its variant; for tests.
#[pyfunction]
fn error_samples() -> Vec<(&'static str, PyErr)> {
    Error::samples().into_iter().map(|(name, err)| (name, to_py(err))).collect()
}

/// The `nth` place from now on at which the core may panic, or may lack memory, does so, once; 0 for none. Returns what was left of
/// the number before. For tests; see `kvsieve_core::fault`.
#[pyfunction]
fn fail_at(panic: bool, nth: u64) -> u64 {
    arm(if panic { Fault::Panic } else { Fault::Memory }, nth)
}

/// A panic is a `RuntimeError`. PyO3 raises a class of its own for it, which is made for this library alone, and lets it inherit from
/// `BaseException`, past which callers' `except Exception` would fall.
fn panics_are_runtime_errors(py: Python<'_>) -> PyResult<()> {
    py.get_type::<PanicException>().setattr("__bases__", (py.get_type::<PyRuntimeError>(),))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    panics_are_runtime_errors(m.py())?;
    m.add_function(wrap_pyfunction!(fail_at, m)?)?;
    m.add_function(wrap_pyfunction!(error_samples, m)?)
}
