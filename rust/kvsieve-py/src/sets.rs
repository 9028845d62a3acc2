//! Attention to tokens that every key-value head chose for itself, and the probabilities by which it chooses.

use std::ops::Range;

use kvsieve_core::Error;
use kvsieve_core::kernels::attend::mass_len;
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::sets::{self, AttendSets, Sets};
use kvsieve_core::kernels::{Attend, attend_highest as highest};
use kvsieve_core::plan::{self, Spans};
use kvsieve_core::select::Residents;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output};
use crate::plan::Step;
use crate::store::{Store, check_rows, sink_logits, spans, strided};

/// A row's sets as Python writes them: tokens and ranks `[kv_heads, count]`, the lowest rank that is read, and where the rest begins.
type Given<'py> = (PyReadonlyArray2<'py, i64>, PyReadonlyArray2<'py, i64>, i64, u32);

fn shape(what: &'static str, expected: String, got: String) -> PyErr {
    to_py(Error::Shape { what, expected, got })
}

/// Attends the last query of each row that has sets, to what these name and to all that is newer. The store holds the step's tokens
/// already. `q` `[rows, heads, 1, channels]`, `out` `[rows, 1, heads, channels]`; a row of `None` gets zeros. Keys are read as they lie.
#[pyfunction]
#[pyo3(signature = (store, q, step, rows, scale, softcap, sinks, out, threads=1))]
#[allow(clippy::too_many_arguments)]
fn attend_sets(
    py: Python<'_>,
    store: &Store,
    q: &Bound<'_, PyAny>,
    step: &Step,
    rows: Vec<Option<Given<'_>>>,
    scale: f32,
    softcap: Option<f32>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let step = &step.inner;
    check_rows(rows.len(), step)?;
    let q = Input::new("q", q)?;
    let view = q.view("q")?;
    let mut out = Output::new("out", out)?;
    out.expect("out", &[view.shape()[0], 1, view.shape()[1], store.value_dim()])?;
    let out = out.elems("out")?;
    let mut residents = Vec::with_capacity(rows.len());
    for (row, given) in rows.iter().enumerate() {
        residents.push(if given.is_some() { Residents::of(step, row).map_err(to_py)? } else { Residents::default() });
    }
    let mut all = Vec::with_capacity(rows.len());
    for (given, residents) in rows.iter().zip(&residents) {
        let Some((tokens, ranks, skip, rest)) = given else {
            all.push(Sets::default());
            continue;
        };
        if !residents.shown.is_empty() {
            let why = "sets are read where the model put their keys, and this memory moves them";
            return Err(to_py(Error::Unsupported(why)));
        }
        let heads = tokens.shape()[0];
        if heads != store.num_kv_heads() || tokens.shape() != ranks.shape() {
            let expected = format!("tokens and ranks of {} heads, of one shape", store.num_kv_heads());
            return Err(shape("rows", expected, format!("{:?} and {:?}", tokens.shape(), ranks.shape())));
        }
        let tokens = tokens.as_slice().map_err(|_| strided("tokens"))?;
        let ranks = ranks.as_slice().map_err(|_| strided("ranks"))?;
        all.push(Sets { runs: &residents.runs, tokens, ranks, skip: *skip, rest: *rest });
    }
    let sinks = sink_logits(&sinks)?;
    let level = isa().map_err(to_py)?;
    let signals = Signals::default();
    let args = AttendSets { q: view, rows: &all, scale, softcap, sinks, threads, level };
    let done = store.read(py, usize::MAX, |arena| sets::attend_sets(arena, &args, out, &|| signals.arrived()));
    done.map_err(|err| signals.error(err))
}

/// The items of a row that hold tokens.
fn items(step: &plan::Step, spans: &Spans, row: usize) -> Range<usize> {
    let end = (row + 1) * spans.num_queries;
    end - step.new_lens[row]..end
}

/// What `rows` read, and nothing of the others.
pub fn of_rows(step: &plan::Step, spans: &Spans, rows: &[bool]) -> Spans {
    let mut mine = Spans { num_rows: spans.num_rows, num_queries: spans.num_queries, starts: vec![0], spans: vec![] };
    for item in 0..spans.starts.len() - 1 {
        let row = item / spans.num_queries.max(1);
        if rows[row] && items(step, spans, row).contains(&item) {
            mine.spans.extend_from_slice(&spans.spans[spans.starts[item] as usize..spans.starts[item + 1] as usize]);
        }
        mine.starts.push(mine.spans.len() as u32);
    }
    mine
}

/// Attends the queries of the rows that are told to, others get zeros: `q` `[rows, heads, queries, channels]`, `out` `[rows, queries,
/// heads, channels]`. Returns for each of these rows that has new tokens `[kv_heads, keys]`, in text order: the highest probability
/// that its last query gives to each key, among the query heads of the group. Keys are read as they lie.
#[pyfunction]
#[pyo3(signature = (store, q, step, rows, scale, softcap, sinks, out, threads=1))]
#[allow(clippy::too_many_arguments)]
fn attend_highest<'py>(
    py: Python<'py>,
    store: &Store,
    q: &Bound<'_, PyAny>,
    step: &Step,
    rows: Vec<bool>,
    scale: f32,
    softcap: Option<f32>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<Vec<Option<Bound<'py, PyArray2<f32>>>>> {
    let spans = spans(step)?;
    let step = &step.inner;
    check_rows(rows.len(), step)?;
    let q = Input::new("q", q)?;
    let view = q.view("q")?;
    let [num_rows, heads, queries, _] = view.shape();
    let mut out = Output::new("out", out)?;
    out.expect("out", &[num_rows, queries, heads, store.value_dim()])?;
    let out = out.elems("out")?;
    let sinks = sink_logits(&sinks)?;
    let mine = of_rows(step, spans, &rows);
    let kv_heads = store.num_kv_heads();
    let level = isa().map_err(to_py)?;
    let (trig, apply_factor) = (None, false);
    let args = Attend { q: view, spans: &mine, trig, scale, softcap, sinks, apply_factor, threads, level };
    let mut mass = vec![0f32; mass_len(&mine, kv_heads)];
    let signals = Signals::default();
    let done = store.read(py, usize::MAX, |arena| highest(arena, &args, out, &mut mass, &|| signals.arrived()));
    done.map_err(|err| signals.error(err))?;
    let keys = |item: usize| {
        let spans = &mine.spans[mine.starts[item] as usize..mine.starts[item + 1] as usize];
        spans.iter().map(|s| (s.hi - s.lo) as usize).sum::<usize>()
    };
    let mut rest = &mass[..];
    let mut found = Vec::with_capacity(num_rows);
    for (row, &wanted) in rows.iter().enumerate() {
        let mut last = None;
        for item in row * queries..(row + 1) * queries {
            let keys = keys(item);
            let (this, others) = rest.split_at(keys * kv_heads);
            rest = others;
            last = (wanted && step.new_lens[row] > 0).then_some((this, keys));
        }
        found.push(match last {
            Some((mass, keys)) => Some(PyArray1::from_slice(py, mass).reshape([kv_heads, keys])?),
            None => None,
        });
    }
    Ok(found)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(attend_sets, m)?)?;
    m.add_function(wrap_pyfunction!(attend_highest, m)?)
}
