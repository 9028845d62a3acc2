//! Attention to what a selection rule chooses, and the choices that stand between refreshes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvsieve_core::error::at_least_one;
use kvsieve_core::fault;
use kvsieve_core::ids::Run;
use kvsieve_core::kernels::chunk::attend_chunk;
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::sparse::{Scoring, Sparse as Args, SparseRow, attend_sparse};
use kvsieve_core::plan::{self, Frame};
use kvsieve_core::select::{self, Choice, Choices, Parameter, Parameters, Residents, Rule};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::{Error, Result};
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, Rope};
use crate::plan::Step;
use crate::store::{Store, sink_logits};

/// One layer's attention to what is selected: the rule, and what each row has chosen. See `kvsieve_core::select`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Sparse {
    rule: Arc<Rule>,
    query_block: usize,
    query_stride: usize,
    choices: Mutex<Choices>,
}

/// What the rows of a [`Sparse`] have chosen at some time. Nothing large is copied to make one.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct SparseState {
    rule: Arc<Rule>,
    rows: Vec<Choice>,
}

impl Sparse {
    fn choices(&self) -> MutexGuard<'_, Choices> {
        let choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        fault::may_panic();
        choices
    }

    /// The rows' residents, with what the rule will ask of them.
    fn residents(&self, py: Python<'_>, store: &Store, step: &plan::Step) -> PyResult<Vec<Residents>> {
        let found: Result<Vec<Residents>> =
            py.detach(|| (0..step.num_rows).map(|row| Residents::of(step, row)).collect());
        let found = found.map_err(to_py)?;
        if self.rule.select.page_bounds() {
            self.make_bounds(py, store, &found)?;
        }
        Ok(found)
    }

    /// Makes the minimum and the maximum of blocks that were written since the last selection.
    fn make_bounds(&self, py: Python<'_>, store: &Store, residents: &[Residents]) -> PyResult<()> {
        let within = self.rule.sinks + self.rule.window + self.rule.select.most();
        let searched: Vec<&[Run]> = residents
            .iter()
            .map(|row| &row.runs[..])
            .filter(|runs| runs.iter().map(|run| run.len() as usize).sum::<usize>() > within)
            .collect();
        if store.read(py, usize::MAX, |arena| searched.iter().any(|runs| arena.lacks_bounds(runs))) {
            let made = |arena: &mut Arena| searched.iter().try_for_each(|runs| arena.make_bounds(runs));
            return store.write_with(py, usize::MAX, made).map_err(to_py);
        }
        Ok(())
    }

    /// With the GIL, and for as long as it takes to copy some pointers: a process that forks has the GIL too, so that its child never finds
    /// the lock held by a thread which it has not got.
    fn with<R>(&self, _py: Python<'_>, run: impl FnOnce(&mut Choices) -> R) -> R {
        run(&mut self.choices())
    }
}

/// A parameter of a rule, as Python writes it.
#[derive(FromPyObject)]
enum Value {
    Flag(bool),
    Count(usize),
    Number(f64),
    Text(String),
    Pairs(Vec<(usize, usize)>),
}

impl From<Value> for Parameter {
    fn from(value: Value) -> Self {
        match value {
            Value::Flag(x) => Parameter::Flag(x),
            Value::Count(x) => Parameter::Count(x),
            Value::Number(x) => Parameter::Number(x),
            Value::Text(x) => Parameter::Text(x),
            Value::Pairs(x) => Parameter::Pairs(x),
        }
    }
}

fn scoring(frame: Frame, relative: bool, consecutive: bool) -> Result<Scoring> {
    match frame {
        Frame::Rotated if relative || consecutive => {
            Err(Error::Unsupported("keys that the model has rotated are scored and read where it put them"))
        }
        Frame::Rotated => Ok(Scoring::Stored),
        Frame::Raw if consecutive && !relative => Err(Error::Unsupported(
            "what is shown consecutively stands nowhere before it is chosen; score it as relative",
        )),
        Frame::Raw => Ok(if relative { Scoring::Relative } else { Scoring::Placed }),
    }
}

#[pymethods]
impl Sparse {
    /// The core's rule of this name, with its own parameters. Sinks and window are read besides; each stage of the rule is computed
    /// anew every so many steps (`refresh`); of every `query_block` queries, one in `query_stride` selects for all.
    #[new]
    #[pyo3(signature = (rule, *, sinks, window, refresh, query_block, query_stride=1, **parameters))]
    fn new(
        rule: &str,
        sinks: usize,
        window: usize,
        refresh: Vec<usize>,
        query_block: usize,
        query_stride: usize,
        parameters: Option<BTreeMap<String, Value>>,
    ) -> PyResult<Self> {
        let parameters = parameters.unwrap_or_default().into_iter().map(|(name, value)| (name, value.into()));
        let rule = select::make(rule, Parameters::of(parameters));
        let rule = rule.and_then(|rule| Rule::new(rule, sinks, window, refresh)).map_err(to_py)?;
        let zero = at_least_one("query_block", query_block).and_then(|()| at_least_one("query_stride", query_stride));
        zero.map_err(to_py)?;
        Ok(Sparse { rule: Arc::new(rule), query_block, query_stride, choices: Mutex::default() })
    }

    /// Attends the queries of a step, whose tokens the store already holds: `q` `[rows, heads, queries, channels]`, `out` `[rows,
    /// queries, heads, channels]`, `lse` `[rows, heads, queries]`. Returns how many representative keys were scored and how many keys
    /// were attended to, over all heads. With `chunk` many queries at a time, which is for prompts: equal but for the order of sums.
    ///
    /// In the raw frame the selection scores keys where the step shows them; if `relative`, all at the distance of the window, which costs
    /// no rotation of keys. With `consecutive` what a head keeps is shown without gaps, ending at the query; that needs `relative`.
    #[pyo3(signature = (
        store, q, step, scale, softcap, sinks, out, lse=None, threads=1, rope=None, apply_factor=false, relative=false,
        consecutive=false, chunk=false
    ))]
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
        rope: Option<&Rope>,
        apply_factor: bool,
        relative: bool,
        consecutive: bool,
        chunk: bool,
    ) -> PyResult<(u64, u64)> {
        let step = &step.inner;
        let scoring = scoring(step.frame, relative, consecutive).map_err(to_py)?;
        let rope = rope.map(|rope| &rope.inner);
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
        let sinks = sink_logits(&sinks)?;
        let level = isa().map_err(to_py)?;
        let signals = Signals::default();
        let residents = self.residents(py, store, step)?;
        let mut next = self.with(py, |choices| choices.next(rows));
        // Never small: the choice alone reads thousands of keys.
        let done = store.read(py, usize::MAX, |arena| {
            let mut row_list = Vec::with_capacity(rows);
            for (Residents { runs, shown }, &new_len) in residents.iter().zip(&step.new_lens) {
                row_list.push(SparseRow { runs, shown, new_len });
            }
            let (q, query_block) = (view, self.query_block);
            let args = Args {
                q,
                rope,
                apply_factor,
                scoring,
                consecutive,
                rows: &row_list,
                query_block,
                query_stride: self.query_stride,
                scale,
                softcap,
                sinks,
                threads,
                level,
            };
            let attend = if chunk { attend_chunk } else { attend_sparse };
            attend(arena, &self.rule, &mut next, &args, out, lse, &|| signals.arrived())
        });
        let work = done.map_err(|err| signals.error(err))?;
        self.with(py, |choices| choices.chosen(next));
        Ok((work.searched, work.read))
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
            return Err(to_py(Error::Unsupported("the state is of a selection by another rule")));
        }
        self.with(py, |choices| choices.return_to(state.rows.clone()));
        Ok(())
    }

    /// Another one of the same rule that has chosen the same.
    fn fork(&self, py: Python<'_>) -> Sparse {
        let mut choices = Choices::default();
        choices.return_to(self.with(py, |mine| mine.rows().to_vec()));
        Sparse {
            rule: Arc::clone(&self.rule),
            query_block: self.query_block,
            query_stride: self.query_stride,
            choices: Mutex::new(choices),
        }
    }

    /// What a row last chose, for each key-value head: ranges `[n, 2]`, the end of what was selected from, keys scored, and rounds. Empty
    /// before it chose.
    #[allow(clippy::type_complexity)]
    fn choice<'py>(&self, py: Python<'py>, row: usize) -> PyResult<Vec<(Bound<'py, PyArray2<i64>>, u32, u64, u32)>> {
        let found = self
            .with(py, |choices| choices.rows().get(row).map(|choice| (Arc::clone(&choice.chosen), choice.region.end)));
        let Some((chosen, end)) = found else { return Ok(Vec::new()) };
        let heads = chosen.iter().map(|chosen| {
            let flat: Vec<i64> = chosen.blocks.iter().flat_map(|b| [i64::from(b.start), i64::from(b.end)]).collect();
            let ranges: Bound<'py, PyArray1<i64>> = flat.into_pyarray(py);
            Ok((ranges.reshape([chosen.blocks.len(), 2])?, end, chosen.reads, chosen.rounds))
        });
        heads.collect()
    }
}

/// The names of the core's selection rules.
#[pyfunction]
fn selection_rules() -> Vec<&'static str> {
    select::RULES.iter().map(|(name, _)| *name).collect()
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Sparse>()?;
    m.add_class::<SparseState>()?;
    m.add_function(wrap_pyfunction!(selection_rules, m)?)
}
