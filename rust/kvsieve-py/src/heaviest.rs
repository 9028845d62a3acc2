//! Attention that adds up the heaviest values alone.

use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::{Attend, Heaviest, SpanTrig, add_heaviest, choose_heaviest};
use numpy::{PyArray1, PyArray3, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, Rope};
use crate::plan::Step;
use crate::sets::of_rows;
use crate::store::{Store, check_rows, sink_logits, spans};
use crate::tier::whole;

/// Attends the queries of the rows that are told to, others get zeros: `q` `[rows, heads, queries, channels]`, `out` `[rows, queries,
/// heads, channels]`. Each query head adds up its `top` heaviest values, or fewer that have `mass` of the probability already. Returns
/// `[rows, heads, queries]`, the mass of what was added up. The store holds the step's tokens already; where values alone may lie in a
/// file, the blocks of what is added up are fetched.
#[pyfunction]
#[pyo3(signature = (store, q, step, rows, rope, scale, softcap, sinks, out, *, top, mass, renormalise, threads=1, apply_factor=false))]
#[allow(clippy::too_many_arguments)]
fn attend_heaviest<'py>(
    py: Python<'py>,
    store: &Store,
    q: &Bound<'_, PyAny>,
    step: &Step,
    rows: Vec<bool>,
    rope: Option<&Rope>,
    scale: f32,
    softcap: Option<f32>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyAny>,
    top: usize,
    mass: f32,
    renormalise: bool,
    threads: usize,
    apply_factor: bool,
) -> PyResult<Bound<'py, PyArray3<f32>>> {
    let all = spans(step)?;
    check_rows(rows.len(), &step.inner)?;
    let q = Input::new("q", q)?;
    let view = q.view("q")?;
    let [num_rows, heads, queries, _] = view.shape();
    let mut out = Output::new("out", out)?;
    out.expect("out", &[num_rows, queries, heads, store.value_dim()])?;
    let out = out.elems("out")?;
    let sinks = sink_logits(&sinks)?;
    let some = rows.contains(&false).then(|| of_rows(&step.inner, all, &rows));
    let mine = some.as_ref().unwrap_or(all);
    let made = rope.filter(|_| some.is_some()).map(|rope| SpanTrig::new(mine, &rope.inner));
    let shared = rope.filter(|_| some.is_none()).map(|rope| step.trig(rope, mine));
    let trig = made.as_ref().or(shared.as_deref());
    let level = isa().map_err(to_py)?;
    let args = Attend { q: view, spans: mine, trig, scale, softcap, sinks, apply_factor, threads, level };
    let keep = Heaviest { top, mass, renormalise };
    let mut kept = vec![0f32; num_rows * heads * queries];
    let signals = Signals::default();
    let chosen = store.read(py, usize::MAX, |arena| {
        let choice = choose_heaviest(arena, &args, &keep, &|| signals.arrived())?;
        Ok((arena.values_alone().then(|| choice.blocks(mine)), choice))
    });
    let (blocks, choice) = chosen.map_err(|err| signals.error(err))?;
    if let Some(blocks) = blocks {
        store.write_with(py, usize::MAX, |arena| arena.fetch(&whole(&blocks))).map_err(to_py)?;
    }
    let done = store.read(py, usize::MAX, |arena| add_heaviest(arena, &args, &choice, out, &mut kept));
    done.map_err(to_py)?;
    PyArray1::from_vec(py, kept).reshape([num_rows, heads, queries])
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(attend_heaviest, m)?)
}
