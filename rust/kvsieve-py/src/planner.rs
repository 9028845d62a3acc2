//! The planner of one stream, and the retain rules as plain functions.

use crate::error::to_py;
use crate::kernels::{copied, reserve};
use crate::memory::Memory;
use crate::plan::{Moves, Step, stored_keys_of};
use kvsieve_core::Result;
use kvsieve_core::budget::Budget;
use kvsieve_core::evict::{self, surprisal};
use kvsieve_core::fault;
use kvsieve_core::ids::Run;
use kvsieve_core::planner::{self, RowState};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is resident where, and the plan of each forward. One per stream; see `kvsieve_core::planner`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Planner {
    inner: Mutex<planner::Planner>,
}

type SavedRow<'py> = (u64, Vec<(Positions<'py>, Scores<'py>)>);

/// Positions of saved tokens: an array, which is copied at once, or a list, over which other Python threads wait.
#[derive(FromPyObject)]
enum Positions<'py> {
    Array(PyReadonlyArray1<'py, i64>),
    List(Vec<u64>),
}

impl Positions<'_> {
    fn numbers(self) -> PyResult<Vec<u64>> {
        match self {
            Self::List(numbers) => Ok(numbers),
            Self::Array(array) => {
                let mut numbers = Vec::new();
                reserve(&mut numbers, array.as_array().len())?;
                for &position in array.as_array() {
                    numbers.push(u64::try_from(position)?);
                }
                Ok(numbers)
            }
        }
    }
}

/// Their scores, in the same two ways.
#[derive(FromPyObject)]
enum Scores<'py> {
    Array(PyReadonlyArray1<'py, f32>),
    List(Vec<f32>),
}

impl Scores<'_> {
    fn numbers(self) -> PyResult<Vec<f32>> {
        match self {
            Self::List(numbers) => Ok(numbers),
            Self::Array(array) => copied(&array),
        }
    }
}

impl Planner {
    fn wrap(inner: planner::Planner) -> Self {
        Self { inner: Mutex::new(inner) }
    }

    /// Calls are planned whole before anything changes, so a panic in an earlier one does not spoil the rest.
    fn get(&self) -> MutexGuard<'_, planner::Planner> {
        let planner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        fault::may_panic();
        planner
    }

    fn run<T: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut planner::Planner) -> Result<T> + Send) -> PyResult<T> {
        py.detach(|| f(&mut self.get())).map_err(to_py)
    }

    fn moves(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&mut planner::Planner) -> Result<Vec<kvsieve_core::plan::Move>> + Send,
    ) -> PyResult<Moves> {
        Ok(Moves { inner: self.run(py, f)? })
    }
}

#[pymethods]
impl Planner {
    /// `stored_keys`: "post_rope", as the model rotated them, or "pre_rope", as they were before.
    #[new]
    fn new(memories: Vec<PyRef<'_, Memory>>, stored_keys: &str) -> PyResult<Self> {
        let memories = memories.iter().map(|memory| memory.spec).collect();
        let frame = stored_keys_of(stored_keys).map_err(to_py)?;
        planner::Planner::new(memories, frame).map(Self::wrap).map_err(to_py)
    }

    fn begin(
        &self,
        py: Python<'_>,
        new_lens: Vec<usize>,
        num_queries: usize,
        store_all: bool,
        with_parts: bool,
    ) -> PyResult<Step> {
        let inner = self.run(py, |p| p.begin(&new_lens, num_queries, store_all, with_parts))?;
        Ok(Step::new(inner))
    }

    /// As `begin`, with neither spans nor parts: what queries read, and where, is said elsewhere.
    fn begin_residents(&self, py: Python<'_>, new_lens: Vec<usize>, num_queries: usize) -> PyResult<Step> {
        let inner = self.run(py, |p| p.begin_residents(&new_lens, num_queries))?;
        Ok(Step::new(inner))
    }

    fn commit(&self) -> PyResult<()> {
        self.get().commit().map_err(to_py)
    }

    fn rollback(&self) -> PyResult<()> {
        self.get().rollback().map_err(to_py)
    }

    /// Scores of the newest residents of the first memory.
    fn set_scores(&self, row: usize, values: PyReadonlyArray1<'_, f32>) -> PyResult<()> {
        let values = copied(&values)?;
        self.get().set_scores(row, &values).map_err(to_py)
    }

    /// Multiplies the scores of memory m's residents by factors[m].
    fn decay(&self, factors: Vec<f32>) -> PyResult<()> {
        self.get().decay(&factors).map_err(to_py)
    }

    /// The moves must be run, in order, before anything else is planned.
    fn settle(&self, py: Python<'_>, force: bool) -> PyResult<Moves> {
        self.moves(py, |p| p.settle(force))
    }

    /// Moves the highest blocks into free lower ones.
    fn tidy(&self, py: Python<'_>) -> PyResult<Moves> {
        self.moves(py, planner::Planner::tidy)
    }

    /// Residents up to number `upto` that are not packed yet go to packed blocks; the moves are for `Store.pack`. `copies` forks of this
    /// planner do not count as readers.
    #[pyo3(signature = (row, upto, align, copies=0))]
    fn pack(&self, py: Python<'_>, row: usize, upto: usize, align: u32, copies: u32) -> PyResult<Moves> {
        self.moves(py, |p| p.pack(row, upto, align, copies))
    }

    /// How many of a row's residents are packed: the first ones.
    fn num_packed(&self, row: usize) -> PyResult<usize> {
        self.get().num_packed(row).map_err(to_py)
    }

    /// By packed block, counted from 0.
    fn packed_in_use(&self, py: Python<'_>) -> Py<PyArray1<bool>> {
        self.get().packed_in_use().into_pyarray(py).unbind()
    }

    /// Packed blocks that the stores must hold before the latest step or moves are run.
    #[getter]
    fn num_packed_blocks(&self) -> u32 {
        self.get().num_packed_blocks()
    }

    /// Keeps only these residents; the rest goes down the chain.
    fn keep(&self, py: Python<'_>, memory: usize, row: usize, keep: Vec<usize>) -> PyResult<Moves> {
        self.moves(py, |p| p.keep(memory, row, &keep))
    }

    /// Leaves `count` slots, whose tokens each head chooses among all residents but the last `recent`, and those. Returns runs
    /// (block, lo, hi): where the residents to choose from lie, and where the chosen ones go; see `Store.permute`.
    #[allow(clippy::type_complexity)]
    fn sieve(
        &self,
        py: Python<'_>,
        memory: usize,
        row: usize,
        count: usize,
        recent: usize,
    ) -> PyResult<(Vec<(u32, u32, u32)>, Vec<(u32, u32, u32)>)> {
        let done = self.run(py, |p| p.sieve(memory, row, count, recent))?;
        let tuples = |runs: &[Run]| runs.iter().map(|r| (r.block.0, r.lo, r.hi)).collect();
        Ok((tuples(&done.from), tuples(&done.to)))
    }

    /// Positions `start..stop` of these rows (None: of all) are not evicted any more. With `per_head` the caller has seen to it that they are held.
    fn pin(&self, py: Python<'_>, rows: Option<Vec<usize>>, start: u64, stop: u64, per_head: bool) -> PyResult<Moves> {
        self.moves(py, |p| p.pin(rows.as_deref(), &(start..stop), per_head))
    }

    /// Exactly these ranges (start, stop) of a row are pinned.
    fn set_pins(&self, py: Python<'_>, row: usize, ranges: Vec<(u64, u64)>, per_head: bool) -> PyResult<Moves> {
        let ranges: Vec<_> = ranges.into_iter().map(|(start, stop)| start..stop).collect();
        self.moves(py, |p| p.set_pins(row, &ranges, per_head))
    }

    fn unpin(&self, rows: Option<Vec<usize>>, start: u64, stop: u64) -> PyResult<()> {
        self.get().unpin(rows.as_deref(), &(start..stop)).map_err(to_py)
    }

    /// Tuples (start, stop), which ascend and do not touch.
    fn pins(&self, row: usize) -> PyResult<Vec<(u64, u64)>> {
        Ok(self.get().pins(row).map_err(to_py)?.ranges().iter().map(|r| (r.start, r.end)).collect())
    }

    /// What was said before the first step: tuples (row or None for all, start, stop, whether pinned), in order.
    fn early(&self) -> Vec<(Option<usize>, u64, u64, bool)> {
        self.get().early().iter().map(|e| (e.row, e.range.start, e.range.end, e.add)).collect()
    }

    /// The residents at positions `start..stop` of these rows go, from every memory.
    fn evict(&self, py: Python<'_>, rows: Option<Vec<usize>>, start: u64, stop: u64) -> PyResult<Moves> {
        self.moves(py, |p| p.evict(rows.as_deref(), &(start..stop)))
    }

    /// As `sieve`, for a row from which positions `start..stop` go; it may be over its budget still.
    #[allow(clippy::type_complexity)]
    fn evict_per_head(
        &self,
        py: Python<'_>,
        row: usize,
        start: u64,
        stop: u64,
        count: usize,
        recent: usize,
    ) -> PyResult<(Vec<(u32, u32, u32)>, Vec<(u32, u32, u32)>)> {
        let done = self.run(py, |p| p.evict_per_head(row, &(start..stop), count, recent))?;
        let tuples = |runs: &[Run]| runs.iter().map(|r| (r.block.0, r.lo, r.hi)).collect();
        Ok((tuples(&done.from), tuples(&done.to)))
    }

    fn crop(&self, n: u64) -> PyResult<()> {
        self.get().crop(n).map_err(to_py)
    }

    fn crop_rows(&self, tokens: Vec<u64>) -> PyResult<()> {
        self.get().crop_rows(&tokens).map_err(to_py)
    }

    fn select_rows(&self, index: Vec<usize>) -> PyResult<()> {
        self.get().select_rows(&index).map_err(to_py)
    }

    fn fork(&self) -> PyResult<Self> {
        self.get().fork().map(Self::wrap).map_err(to_py)
    }

    /// What this planner holds, and then what each of `forks` of it has read since, in row `r` in the order `orders[r]`.
    fn join(&self, forks: Vec<PyRef<'_, Planner>>, orders: Vec<Vec<usize>>) -> PyResult<Self> {
        // One lock at a time.
        let forks = forks.iter().map(|fork| fork.get().fork()).collect::<Result<Vec<_>>>().map_err(to_py)?;
        self.get().join(&forks, &orders).map(Self::wrap).map_err(to_py)
    }

    fn reset(&self) {
        self.get().reset();
    }

    /// Rows are (seen, [(positions, scores) per memory]). Write the tokens to `runs` afterwards.
    fn restore(&self, py: Python<'_>, columns: u64, rows: Vec<SavedRow<'_>>) -> PyResult<()> {
        let mut states = Vec::with_capacity(rows.len());
        for (seen, memories) in rows {
            let numbers = memories.into_iter().map(|(positions, scores)| Ok((positions.numbers()?, scores.numbers()?)));
            states.push(RowState { seen, memories: numbers.collect::<PyResult<_>>()? });
        }
        self.run(py, |p| p.restore(columns, &states))
    }

    #[getter]
    fn num_rows(&self) -> usize {
        self.get().num_rows()
    }

    #[getter]
    fn num_memories(&self) -> usize {
        self.get().num_memories()
    }

    #[getter]
    fn columns(&self) -> u64 {
        self.get().columns()
    }

    #[getter]
    fn step_open(&self) -> bool {
        self.get().step_open()
    }

    /// Blocks that the stores must hold before the latest step or moves are run.
    #[getter]
    fn num_blocks(&self) -> u32 {
        self.get().num_blocks()
    }

    #[getter]
    fn used_blocks(&self) -> usize {
        self.get().used_blocks()
    }

    fn blocks_in_use(&self, py: Python<'_>) -> Py<PyArray1<bool>> {
        self.get().blocks_in_use().into_pyarray(py).unbind()
    }

    fn seen(&self, row: usize) -> PyResult<u64> {
        self.get().seen(row).map_err(to_py)
    }

    fn resident(&self, memory: usize, row: usize) -> PyResult<usize> {
        self.get().resident(memory, row).map_err(to_py)
    }

    fn positions(&self, py: Python<'_>, memory: usize, row: usize) -> PyResult<Py<PyArray1<i64>>> {
        let planner = self.get();
        let positions = planner.positions(memory, row).map_err(to_py)?;
        let positions: Vec<i64> = positions.iter().map(|&p| p as i64).collect();
        Ok(positions.into_pyarray(py).unbind())
    }

    fn scores(&self, py: Python<'_>, memory: usize, row: usize) -> PyResult<Py<PyArray1<f32>>> {
        let scores = self.get().scores(memory, row).map_err(to_py)?;
        Ok(scores.into_pyarray(py).unbind())
    }

    /// Tuples (block, lo, hi) in text order.
    fn runs(&self, memory: usize, row: usize) -> PyResult<Vec<(u32, u32, u32)>> {
        let planner = self.get();
        let runs = planner.runs(memory, row).map_err(to_py)?;
        Ok(runs.iter().map(|r| (r.block.0, r.lo, r.hi)).collect())
    }

    /// The blocks of a row's newest `count` residents, and at least its last one; the newest first.
    fn newest_blocks(&self, memory: usize, row: usize, count: usize) -> PyResult<Vec<u32>> {
        let planner = self.get();
        let (runs, mut left) = (planner.runs(memory, row).map_err(to_py)?, count.max(1));
        let newest = runs.iter().rev().take_while(|run| {
            let wanted = left > 0;
            left = left.saturating_sub(run.len() as usize);
            wanted
        });
        Ok(newest.map(|run| run.block.0).collect())
    }
}

/// Indices kept by the sinks, the recent tokens and the highest scores.
#[pyfunction]
#[pyo3(signature = (scores, sinks, recent, budget, protected_tail = 0))]
fn keep_surprisal(
    py: Python<'_>,
    scores: PyReadonlyArray1<'_, f32>,
    sinks: usize,
    recent: usize,
    budget: usize,
    protected_tail: usize,
) -> PyResult<Vec<usize>> {
    let scores = copied(&scores)?;
    let budget = Budget { total: budget, sinks, recent };
    py.detach(|| surprisal::keep(&scores, budget, protected_tail, &[])).map_err(to_py)
}

/// Indices kept by the rule of the published code, with room for `incoming` tokens.
#[pyfunction]
#[pyo3(signature = (scores, sinks, entropy_slots, recent, incoming = 0))]
fn keep_surprisal_published(
    py: Python<'_>,
    scores: PyReadonlyArray1<'_, f32>,
    sinks: usize,
    entropy_slots: usize,
    recent: usize,
    incoming: usize,
) -> PyResult<Vec<usize>> {
    let scores = copied(&scores)?;
    py.detach(|| surprisal::keep_published(&scores, sinks, entropy_slots, recent, incoming, &[])).map_err(to_py)
}

/// The first `sinks` and the last `window` of `n`.
#[pyfunction]
fn keep_window(n: usize, sinks: usize, window: usize) -> PyResult<Vec<usize>> {
    // A Python int takes some 40 bytes.
    reserve(&mut Vec::<[u8; 48]>::new(), n.min(sinks.saturating_add(window)))?;
    Ok(evict::keep_window(n, sinks, window))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Planner>()?;
    m.add_function(wrap_pyfunction!(keep_surprisal, m)?)?;
    m.add_function(wrap_pyfunction!(keep_surprisal_published, m)?)?;
    m.add_function(wrap_pyfunction!(keep_window, m)?)
}
