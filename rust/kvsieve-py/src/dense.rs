//! Attention of a prompt's queries to keys and values in tensors.

use kvsieve_core::Error;
use kvsieve_core::kernels::chunk::{self, Dense};
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::tensor::ElemsMut;
use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, dtype_of, shape_error};
use crate::store::strided;

fn edges(what: &'static str, given: &PyReadonlyArray1<'_, i64>) -> PyResult<Vec<u32>> {
    let given = given.as_slice().map_err(|_| strided(what))?;
    let number = |&x: &i64| u32::try_from(x).map_err(|_| (what, x));
    given
        .iter()
        .map(number)
        .collect::<Result<_, _>>()
        .map_err(|(what, x)| to_py(Error::OutOfRange { what, expected: "numbers of queries", got: x.to_string() }))
}

/// Attends `q` `[heads, queries, channels]` to `k` `[kv_heads, keys, channels]` and `v` `[kv_heads, keys, value channels]`, all of one
/// dtype and rotated already. A key is seen by queries `first` to before `last`. Fills in, of float32, `out`
/// `[queries, heads, value channels]` and `lse` `[heads, queries]`: zero and -inf for a query that sees nothing.
#[pyfunction]
#[pyo3(signature = (q, k, v, first, last, scale, softcap, *, out, lse, dtype=None, threads=1))]
#[allow(clippy::too_many_arguments)]
fn attend_dense(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    first: PyReadonlyArray1<'_, i64>,
    last: PyReadonlyArray1<'_, i64>,
    scale: f32,
    softcap: Option<f32>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    dtype: Option<&str>,
    threads: usize,
) -> PyResult<()> {
    let (q, k, v) = (Input::new("q", q)?, Input::new("k", k)?, Input::new("v", v)?);
    let dtype = dtype_of(&q, dtype)?;
    let (from, to) = (edges("first", &first)?, edges("last", &last)?);
    let (q, k, v) = (q.view("q")?, k.view("k")?, v.view("v")?);
    let [_, heads, queries, _] = q.shape();
    let (mut out, mut lse) = (Output::new("out", out)?, Output::new("lse", lse)?);
    out.expect("out", &[queries, heads, v.shape()[3]])?;
    lse.expect("lse", &[heads, queries])?;
    let (ElemsMut::F32(out), ElemsMut::F32(lse)) = (out.elems("out")?, lse.elems("lse")?) else {
        return Err(shape_error("out", "float32 for out and lse", "16-bit elements".to_string()));
    };
    let level = isa().map_err(to_py)?;
    let signals = Signals::default();
    let args = Dense { q, k, v, dtype, from: &from, to: &to, scale, softcap, threads, level };
    let done = py.detach(|| chunk::attend_dense(&args, out, lse, &|| signals.arrived()));
    done.map_err(|err| signals.error(err))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(attend_dense, m)?)
}
