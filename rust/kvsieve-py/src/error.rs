//! Maps each core error to one Python class of `kvsieve.errors`; every class also inherits the builtin a user would catch.

use kvsieve_core::Error;
use pyo3::exceptions::PyMemoryError;
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

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(error_samples, m)?)
}
