//! Linear layers of a few rows.

use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::linear as products;
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut};
use numpy::{PyArrayDyn, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, shape_error};
use crate::lent::Lent;
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

/// `linear` of tensors that are lent: `x` `[rows, inputs]` to `out` `[rows, outputs]`, where both may have further axes of length 1 in
/// front. Returns False, and has done nothing, where one of them cannot be lent or is not of float32.
#[pyfunction]
#[pyo3(signature = (x, weights, bias, out, threads=1))]
fn linear_lent(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<bool> {
    let (Some(x), Some(weights), Some(mut out)) = (Lent::new(x), Lent::new(weights), Lent::new(out)) else {
        return Ok(false);
    };
    let bias = match bias.map(Lent::new) {
        None => None,
        Some(None) => return Ok(false),
        some => some.flatten(),
    };
    if [Some(&x), Some(&weights), Some(&out), bias.as_ref()].iter().flatten().any(|t| t.dtype() != Dtype::F32) {
        return Ok(false);
    }
    let read = [x.addresses(), weights.addresses(), bias.as_ref().map_or(0..0, Lent::addresses)];
    let mut shape = out.shape();
    shape[3] = weights.shape()[2];
    let ElemsMut::F32(out) = out.elems_mut("out", shape, &read)? else { return Ok(false) };
    let bias = match bias.as_ref().map(|bias| bias.view("bias")).transpose()?.map(|bias| bias.elems()) {
        Some(Elems::F32(bias)) => Some(bias),
        _ => None,
    };
    let (x, weights) = (x.view("x")?, weights.view("weights")?);
    let level = isa().map_err(to_py)?;
    let signals = Signals::default();
    let done = py.detach(|| products::linear(&x, &weights, bias, out, (level, threads), &|| signals.arrived()));
    done.map_err(|err| signals.error(err))?;
    Ok(true)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(linear, m)?)?;
    m.add_function(wrap_pyfunction!(linear_lent, m)?)
}
