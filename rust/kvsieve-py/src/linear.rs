//! Linear layers of a few rows.

use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::linear as products;
use kvsieve_core::tensor::ElemsMut;
use numpy::{PyArrayDyn, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, shape_error};
use crate::store::strided;

/// `x` (`[rows, inputs]`) times the transposed `weights` (`[outputs, inputs]`), plus `bias` (`[outputs]`), into `out`
/// (`[rows, outputs]`), all float32. A row's result depends on no other, and every weight is read once.
#[pyfunction]
#[pyo3(signature = (x, weights, bias, out, threads=1))]
fn linear(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    bias: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyArrayDyn<f32>>,
    threads: usize,
) -> PyResult<()> {
    let (x, weights) = (Input::new("x", x)?, Input::new("weights", weights)?);
    for (what, given) in [("x", &x), ("weights", &weights)] {
        if given.shape().len() != 2 {
            return Err(shape_error(what, "a matrix", format!("{:?}", given.shape())));
        }
    }
    let bias = bias.as_ref().map(|bias| bias.as_slice().map_err(|_| strided("bias"))).transpose()?;
    let mut out = Output::new("out", out)?;
    out.expect("out", &[x.shape()[0], weights.shape()[0]])?;
    let (x, weights) = (x.view("x")?, weights.view("weights")?);
    let ElemsMut::F32(out) = out.elems("out")? else {
        return Err(shape_error("out", "float32", "16-bit elements".to_string()));
    };
    let level = isa().map_err(to_py)?;
    let signals = Signals::default();
    let done = py.detach(|| products::linear(&x, &weights, bias, out, (level, threads), &|| signals.arrived()));
    done.map_err(|err| signals.error(err))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(linear, m)?)
}
