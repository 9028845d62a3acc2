//! What one layer does for one token, in one call, of tensors that are lent.

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use crate::kernels::Rope;
use crate::lent::Lent;
use crate::plan::Step;
use crate::store::{Numbers, Store, sink_logits};

/// `store.append(k, v, step)`, then `store.attend(q, step, ...)` into `out`, where all four are tensors of the store's dtype that can be
/// lent. Returns False, and has done nothing, where one is not.
#[pyfunction]
#[pyo3(signature = (store, q, k, v, step, rope, scale, softcap, sinks, out, threads=1, apply_factor=false))]
#[allow(clippy::too_many_arguments)]
fn decode(
    py: Python<'_>,
    store: &Store,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    step: &Step,
    rope: Option<&Rope>,
    scale: f32,
    softcap: Option<f32>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyAny>,
    threads: usize,
    apply_factor: bool,
) -> PyResult<bool> {
    let (Some(q), Some(k), Some(v), Some(mut out)) = (Lent::new(q), Lent::new(k), Lent::new(v), Lent::new(out)) else {
        return Ok(false);
    };
    if [&q, &k, &v, &out].iter().any(|tensor| tensor.dtype() != store.dtype()) {
        return Ok(false);
    }
    let [rows, heads, queries, _] = q.shape();
    let sinks = sink_logits(&sinks)?;
    let of_sinks = sinks.map_or(0..0, |sinks| {
        let within = sinks.as_ptr_range();
        within.start.addr()..within.end.addr()
    });
    let read = [q.addresses(), k.addresses(), v.addresses(), of_sinks];
    let out = out.elems_mut("out", [rows, queries, heads, store.value_dim()], &read)?;
    store.append_views(py, &k.view("k")?, &v.view("v")?, step)?;
    let numbers = Numbers { scale, softcap, sinks, threads, apply_factor };
    store.attend_views(py, q.view("q")?, step, rope, &numbers, out, None, None)?;
    Ok(true)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(decode, m)?)
}
