//! Maps each core error to one Python class of `kvsieve.errors`; every class also inherits the builtin a user would catch.

use kvsieve_core::Error;
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;

/// The Python exception for a core error.
pub fn to_py(err: Error) -> PyErr {
    let class = match &err {
        Error::OutOfMemory { .. } => return PyMemoryError::new_err(err.to_string()),
        Error::BudgetTooSmall { .. } => "BudgetError",
        Error::OutOfRange { .. } => "PolicyError",
        Error::RowMismatch { .. } | Error::CropTooLong { .. } => "CacheMismatchError",
        Error::Shape { .. } => "ShapeError",
        Error::NoStep { .. } | Error::StepOpen { .. } | Error::BadBlock { .. } => "StateError",
        Error::Unsupported(_) => "UnsupportedError",
        _ => "KvsieveError",
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
