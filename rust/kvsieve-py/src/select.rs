//! Attention to what a search chooses, and the choices that stand between refreshes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvsieve_core::ids::Run;
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::sparse::{Sparse as Args, SparseRow, attend_sparse};
use kvsieve_core::plan;
use kvsieve_core::select::Representative;
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::kept::{Choice, Choices, Rule, Search};
use kvsieve_core::{Error, Result};
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output};
use crate::plan::Step;
use crate::store::Store;

/// One layer's searching attention: the rule, and what each row has chosen. See `kvsieve_core::select`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Sparse {
    rule: Arc<Rule>,
    query_block: usize,
    choices: Mutex<Choices>,
}

/// What the rows of a [`Sparse`] have chosen at some time. Nothing large is copied to make one.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct SparseState {
    rule: Arc<Rule>,
    rows: Vec<Choice>,
}

impl Sparse {
    fn made(search: Search, (sinks, window): (usize, usize), refresh: Vec<usize>, query_block: usize) -> Result<Self> {
        let rule = Rule::new(search, sinks, window, refresh)?;
        if query_block == 0 {
            return Err(Error::OutOfRange { what: "query_block", expected: "at least 1", got: "0".to_string() });
        }
        Ok(Sparse { rule: Arc::new(rule), query_block, choices: Mutex::default() })
    }

    fn choices(&self) -> MutexGuard<'_, Choices> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without the GIL, which a search in progress asks for while it holds the lock.
    fn with<R: Send>(&self, py: Python<'_>, run: impl FnOnce(&mut Choices) -> R + Send) -> R {
        py.detach(|| run(&mut self.choices()))
    }
}

/// A row's residents after the step, in text order.
fn residents(step: &plan::Step, row: usize) -> Result<Vec<Run>> {
    if step.new_lens[row] == 0 {
        return Ok(Vec::new());
    }
    let moved = Error::Unsupported("a search needs a memory that keeps every token where the model put it");
    if let Some(spans) = &step.spans {
        let item = (row + 1) * spans.num_queries - 1;
        let mine = &spans.spans[spans.starts[item] as usize..spans.starts[item + 1] as usize];
        if mine.iter().any(|span| span.shift != 0 || span.rotate_keys) {
            return Err(moved);
        }
        return Ok(mine.iter().map(|s| Run { block: s.block, lo: s.lo, hi: s.hi }).collect());
    }
    let mut parts = step.parts.iter().filter(|part| part.row == row);
    let (Some(part), None) = (parts.next(), parts.next()) else { return Err(moved) };
    if part.key_true != part.key_positions || part.query_true != part.query_positions {
        return Err(moved);
    }
    let mut runs = part.runs.clone();
    for new in step.appends.iter().filter(|a| a.row == row) {
        match runs.last_mut() {
            Some(tail) if tail.block == new.block && tail.hi == new.slot => tail.hi += new.len,
            _ => runs.push(Run { block: new.block, lo: new.slot, hi: new.slot + new.len }),
        }
    }
    Ok(runs)
}

#[pymethods]
impl Sparse {
    /// HiP: about `budget` tokens in blocks, chosen anew every `refresh` steps.
    #[staticmethod]
    #[pyo3(signature = (budget, block, representative, sinks, window, refresh, query_block))]
    fn hip(
        budget: usize,
        block: usize,
        representative: &str,
        sinks: usize,
        window: usize,
        refresh: usize,
        query_block: usize,
    ) -> PyResult<Self> {
        for (what, n) in [("budget", budget), ("block", block)] {
            if n == 0 {
                return Err(to_py(Error::OutOfRange { what, expected: "at least 1", got: n.to_string() }));
            }
        }
        let representative = Representative::parse(representative).map_err(to_py)?;
        let search = Search::Hip(Hip { budget, block, representative });
        Sparse::made(search, (sinks, window), vec![refresh], query_block).map_err(to_py)
    }

    /// InfiniteHiP: stages of (tokens of a chunk, tokens that stay), each with a pace of its own.
    #[staticmethod]
    #[pyo3(signature = (stages, representative, sinks, window, refresh, query_block))]
    fn infinite(
        stages: Vec<(usize, usize)>,
        representative: &str,
        sinks: usize,
        window: usize,
        refresh: Vec<usize>,
        query_block: usize,
    ) -> PyResult<Self> {
        let stages = stages.into_iter().map(|(chunk, keep)| Stage { chunk, keep }).collect();
        let representative = Representative::parse(representative).map_err(to_py)?;
        let search = Search::Infinite(Infinite::new(stages, representative).map_err(to_py)?);
        Sparse::made(search, (sinks, window), refresh, query_block).map_err(to_py)
    }

    /// Attends the queries of a step, whose tokens the store already holds: `q` `[rows, heads, queries, channels]`, `out` `[rows,
    /// queries, heads, channels]`, `lse` `[rows, heads, queries]`. Returns how many representative keys were scored and how many keys
    /// were attended to, over all heads.
    #[pyo3(signature = (store, q, step, scale, softcap, sinks, out, lse=None, threads=1))]
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python<'_>,
        store: &Store,
        q: &Bound<'_, PyAny>,
        step: &Step,
        scale: f32,
        softcap: Option<f32>,
        sinks: Option<PyReadonlyArray1<'_, f32>>,
        out: &Bound<'_, PyAny>,
        mut lse: Option<PyReadwriteArray3<'_, f32>>,
        threads: usize,
    ) -> PyResult<(u64, u64)> {
        let step = &step.inner;
        let q = Input::new("q", q)?;
        let view = q.view("q")?;
        let [rows, heads, queries, _] = view.shape();
        let shape_error = |what, expected: String, got: String| to_py(Error::Shape { what, expected, got });
        if (rows, queries) != (step.num_rows, step.num_queries) {
            let expected = format!("{} rows of {} queries", step.num_rows, step.num_queries);
            return Err(shape_error("q", expected, format!("{rows} rows of {queries}")));
        }
        let mut out = Output::new("out", out)?;
        out.expect("out", &[rows, queries, heads, store.value_dim()])?;
        let out = out.elems("out")?;
        if let Some(lse) = &lse
            && lse.shape() != [rows, heads, queries]
        {
            return Err(shape_error("lse", format!("{:?}", [rows, heads, queries]), format!("{:?}", lse.shape())));
        }
        let strided = |what| shape_error(what, "a C-contiguous array".to_string(), "a strided one".to_string());
        let lse = match &mut lse {
            Some(lse) => Some(lse.as_slice_mut().map_err(|_| strided("lse"))?),
            None => None,
        };
        let sinks = match &sinks {
            Some(sinks) => Some(sinks.as_slice().map_err(|_| strided("sinks"))?),
            None => None,
        };
        let level = isa().map_err(to_py)?;
        let signals = Signals::default();
        // Never small: the choice alone reads thousands of keys.
        let done = store.read(py, usize::MAX, |arena| {
            let runs: Vec<Vec<Run>> = (0..rows).map(|row| residents(step, row)).collect::<Result<_>>()?;
            let news = runs.iter().zip(&step.new_lens).map(|(runs, &new_len)| SparseRow { runs, new_len });
            let row_list: Vec<SparseRow<'_>> = news.collect();
            let (q, query_block) = (view, self.query_block);
            let args = Args { q, rows: &row_list, query_block, scale, softcap, sinks, threads, level };
            let run = |choices: &mut [Choice]| {
                attend_sparse(arena, &self.rule, choices, &args, out, lse, &|| signals.arrived())
            };
            self.choices().forward(rows, run)
        });
        done.map(|work| (work.searched, work.read)).map_err(|err| signals.error(err))
    }

    /// Forgets all choices: the next forward chooses anew.
    fn reset(&self, py: Python<'_>) {
        self.with(py, |choices| choices.return_to(Vec::new()));
    }

    /// The choices as they were before the last `attend`; nothing where that was undone or committed already.
    fn undo(&self, py: Python<'_>) {
        self.with(py, Choices::undo);
    }

    /// The last `attend` counts: `undo` no longer returns to what was before it.
    fn commit(&self, py: Python<'_>) {
        self.with(py, Choices::commit);
    }

    /// Row `i` becomes what row `rows[i]` was. Not undone by `undo`.
    fn select_rows(&self, py: Python<'_>, rows: Vec<usize>) -> PyResult<()> {
        self.with(py, |choices| choices.select_rows(&rows)).map_err(to_py)
    }

    /// What all rows have chosen, to return to; nothing large is copied.
    fn state(&self, py: Python<'_>) -> SparseState {
        let rows = self.with(py, |choices| choices.rows().to_vec());
        SparseState { rule: Arc::clone(&self.rule), rows }
    }

    /// Puts a state in place of what was chosen. It must be of this rule. Not undone by `undo`.
    fn return_to(&self, py: Python<'_>, state: &SparseState) -> PyResult<()> {
        if *state.rule != *self.rule {
            return Err(to_py(Error::Unsupported("the state is of a search by another rule")));
        }
        self.with(py, |choices| choices.return_to(state.rows.clone()));
        Ok(())
    }

    /// Another one of the same rule that has chosen the same.
    fn fork(&self, py: Python<'_>) -> Sparse {
        let mut choices = Choices::default();
        choices.return_to(self.with(py, |mine| mine.rows().to_vec()));
        Sparse { rule: Arc::clone(&self.rule), query_block: self.query_block, choices: Mutex::new(choices) }
    }

    /// What a row last chose, for each key-value head: stretches `[n, 2]`, the end of what was searched, keys scored, and rounds. Empty
    /// before it chose.
    #[allow(clippy::type_complexity)]
    fn choice<'py>(&self, py: Python<'py>, row: usize) -> PyResult<Vec<(Bound<'py, PyArray2<i64>>, u32, u64, u32)>> {
        let found = self
            .with(py, |choices| choices.rows().get(row).map(|choice| (Arc::clone(&choice.chosen), choice.region.end)));
        let Some((chosen, end)) = found else { return Ok(Vec::new()) };
        let heads = chosen.iter().map(|chosen| {
            let flat: Vec<i64> = chosen.blocks.iter().flat_map(|b| [i64::from(b.start), i64::from(b.end)]).collect();
            let stretches: Bound<'py, PyArray1<i64>> = flat.into_pyarray(py);
            Ok((stretches.reshape([chosen.blocks.len(), 2])?, end, chosen.reads, chosen.rounds))
        });
        heads.collect()
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Sparse>()?;
    m.add_class::<SparseState>()
}
