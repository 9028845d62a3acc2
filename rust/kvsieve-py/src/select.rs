//! Attention to what a search chooses, and the choices that stand between refreshes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvsieve_core::ids::Run;
use kvsieve_core::kernels::chunk::attend_chunk;
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::search::Shown;
use kvsieve_core::kernels::sparse::{Scoring, Sparse as Args, SparseRow, attend_sparse};
use kvsieve_core::plan::{self, Frame, Placing};
use kvsieve_core::select::Representative;
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::kept::{Choice, Choices, Rule, Search};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::{Error, Result};
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, Rope};
use crate::plan::Step;
use crate::store::Store;

/// One layer's searching attention: the rule, and what each row has chosen. See `kvsieve_core::select`.
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
    fn made(
        search: Search,
        (sinks, window): (usize, usize),
        refresh: Vec<usize>,
        (query_block, query_stride): (usize, usize),
    ) -> Result<Self> {
        let rule = Rule::new(search, sinks, window, refresh)?;
        for (what, n) in [("query_block", query_block), ("query_stride", query_stride)] {
            if n == 0 {
                return Err(Error::OutOfRange { what, expected: "at least 1", got: "0".to_string() });
            }
        }
        Ok(Sparse { rule: Arc::new(rule), query_block, query_stride, choices: Mutex::default() })
    }

    fn choices(&self) -> MutexGuard<'_, Choices> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what a search will ask of blocks that were written since the last one.
    fn make_bounds(&self, py: Python<'_>, store: &Store, residents: &[Residents]) -> PyResult<()> {
        let within = self.rule.sinks + self.rule.window + self.rule.most();
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

    /// Without the GIL, which a search in progress asks for while it holds the lock.
    fn with<R: Send>(&self, py: Python<'_>, run: impl FnOnce(&mut Choices) -> R + Send) -> R {
        py.detach(|| run(&mut self.choices()))
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

/// A row's residents after the step, in text order, and where its last query sees them.
#[derive(Default)]
struct Residents {
    runs: Vec<Run>,
    /// Empty where all keys are read as they lie.
    shown: Vec<Shown>,
}

/// Why a row cannot be searched.
const SLIDES: Error = Error::Unsupported("a search needs a memory that shows every query all that stands before it");
const UNORDERED: Error = Error::Unsupported("a search needs one memory, whose tokens stand in the order of the text");

/// Where the step copies `tail` to, which others read too, so that `new` can stand behind it. Parts name the tail as it was before: read
/// there, one block of the text would lie in two.
fn copied(step: &plan::Step, tail: Run, new: &plan::Append) -> Option<Run> {
    let mut mine = step.copies.iter().filter(|m| (m.from, m.from_slot, m.len) == (tail.block, tail.lo, tail.len()));
    let copy = mine.find(|m| m.to == new.block && m.to_slot + m.len == new.slot)?;
    Some(Run { block: copy.to, lo: copy.to_slot, hi: new.slot })
}

impl Residents {
    fn of(step: &plan::Step, row: usize) -> Result<Self> {
        if step.new_lens[row] == 0 {
            return Ok(Residents::default());
        }
        match &step.spans {
            Some(spans) => Residents::of_spans(step, spans, row),
            None => Residents::of_part(step, row),
        }
    }

    fn of_spans(step: &plan::Step, spans: &plan::Spans, row: usize) -> Result<Self> {
        let item = |behind: usize| {
            let item = (row + 1) * spans.num_queries - 1 - behind;
            &spans.spans[spans.starts[item] as usize..spans.starts[item + 1] as usize]
        };
        let mine = item(0);
        // Raw keys tell how far they are away, and text order is from far to near.
        let ordered = |pair: &[plan::Span]| {
            let known = pair.iter().all(|span| span.rotate_keys);
            !known || pair[0].shift - i64::from(pair[0].hi) >= pair[1].shift - i64::from(pair[1].lo)
        };
        if !mine.windows(2).all(ordered) {
            return Err(UNORDERED);
        }
        for behind in 1..step.new_lens[row] {
            let (theirs, mut left) = (item(behind), behind as u32);
            // What the last query sees more: as many tokens as it is later.
            let mut num = mine.len();
            while num > 0 && mine[num - 1].hi - mine[num - 1].lo <= left {
                left -= mine[num - 1].hi - mine[num - 1].lo;
                num -= 1;
            }
            let same = |(i, (a, b)): (usize, (&plan::Span, &plan::Span))| {
                let hi = if i + 1 == num { a.hi - left } else { a.hi };
                let shift = if a.rotate_keys { a.shift - behind as i64 } else { a.shift };
                (a.block, a.lo, hi, shift, a.rotate_keys) == (b.block, b.lo, b.hi, b.shift, b.rotate_keys)
            };
            if theirs.len() != num || !mine.iter().zip(theirs).enumerate().all(same) {
                return Err(SLIDES);
            }
        }
        let runs = mine.iter().map(|s| Run { block: s.block, lo: s.lo, hi: s.hi }).collect();
        let shown = mine.iter().map(|s| Shown { shift: s.shift, rotate_keys: s.rotate_keys }).collect();
        Ok(Residents { runs, shown }.plain(step.frame))
    }

    fn of_part(step: &plan::Step, row: usize) -> Result<Self> {
        let mut parts = step.parts.iter().filter(|part| part.row == row);
        let (Some(part), None) = (parts.next(), parts.next()) else { return Err(SLIDES) };
        let near = part.query_true.last().zip(part.key_true.first()).is_some_and(|(q, k)| q - k < part.near);
        if !near || part.far > 0 || part.top_k > 0 {
            return Err(SLIDES);
        }
        let mut whole = part.runs.clone();
        for new in step.appends.iter().filter(|a| a.row == row) {
            if let Some(tail) = whole.last_mut() {
                *tail = copied(step, *tail, new).unwrap_or(*tail);
            }
            match whole.last_mut() {
                Some(tail) if tail.block == new.block && tail.hi == new.slot => tail.hi += new.len,
                _ => whole.push(Run { block: new.block, lo: new.slot, hi: new.slot + new.len }),
            }
        }
        let stored: usize = whole.iter().map(|run| run.len() as usize).sum();
        if stored != part.key_true.len() || part.query_true.len() != step.new_lens[row] {
            return Err(SLIDES);
        }
        let (keys, queries) = (&part.key_positions, &part.query_positions);
        // How much further every key is than where the model put it, and where it put the queries.
        let moved = |i: usize| queries[i] - part.query_true[i];
        let last = queries.len() - 1;
        let even = match (step.frame, part.placing) {
            (Frame::Rotated, _) => (0..last).all(|i| moved(i) == moved(last)),
            (Frame::Raw, Placing::Relative) => queries.windows(2).all(|w| w[1] == w[0] + 1),
            (Frame::Raw, Placing::Fixed(_)) => true,
        };
        if !even {
            return Err(SLIDES);
        }
        let shown = |key: usize, slot: u32| match (step.frame, part.placing) {
            (_, Placing::Fixed(distance)) => Shown { shift: distance, rotate_keys: false },
            (Frame::Rotated, Placing::Relative) => {
                Shown { shift: moved(last) - (keys[key] - part.key_true[key]), rotate_keys: false }
            }
            (Frame::Raw, Placing::Relative) => {
                Shown { shift: queries[last] - keys[key] + i64::from(slot), rotate_keys: true }
            }
        };
        let mut all = Residents::default();
        let mut key = 0;
        for run in whole {
            for slot in run.lo..run.hi {
                let here = shown(key, slot);
                match all.runs.last_mut() {
                    Some(open) if slot > run.lo && all.shown.last() == Some(&here) => open.hi += 1,
                    _ => {
                        all.runs.push(Run { block: run.block, lo: slot, hi: slot + 1 });
                        all.shown.push(here);
                    }
                }
                key += 1;
            }
        }
        Ok(all.plain(step.frame))
    }

    /// Forgets where keys are seen, if all are read as the model rotated them.
    fn plain(mut self, frame: Frame) -> Self {
        if frame == Frame::Rotated && self.shown.iter().all(|shown| shown.shift == 0) {
            self.shown.clear();
        }
        self
    }
}

#[pymethods]
impl Sparse {
    /// HiP: about `budget` tokens in blocks, chosen anew every `refresh` steps.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (budget, block, representative, sinks, window, refresh, query_block, query_stride=1))]
    fn hip(
        budget: usize,
        block: usize,
        representative: &str,
        sinks: usize,
        window: usize,
        refresh: usize,
        query_block: usize,
        query_stride: usize,
    ) -> PyResult<Self> {
        for (what, n) in [("budget", budget), ("block", block)] {
            if n == 0 {
                return Err(to_py(Error::OutOfRange { what, expected: "at least 1", got: n.to_string() }));
            }
        }
        let representative = Representative::parse(representative).map_err(to_py)?;
        let search = Search::Hip(Hip { budget, block, representative });
        Sparse::made(search, (sinks, window), vec![refresh], (query_block, query_stride)).map_err(to_py)
    }

    /// InfiniteHiP: stages of (tokens of a chunk, tokens that stay), each with a pace of its own. If `bounded` the first one judges
    /// blocks of 64 by the bounds of their keys.
    #[staticmethod]
    #[pyo3(signature = (stages, representative, sinks, window, refresh, query_block, query_stride=1, bounded=false))]
    #[allow(clippy::too_many_arguments)]
    fn infinite(
        stages: Vec<(usize, usize)>,
        representative: &str,
        sinks: usize,
        window: usize,
        refresh: Vec<usize>,
        query_block: usize,
        query_stride: usize,
        bounded: bool,
    ) -> PyResult<Self> {
        let stages = stages.into_iter().map(|(chunk, keep)| Stage { chunk, keep }).collect();
        let representative = Representative::parse(representative).map_err(to_py)?;
        let search = Search::Infinite(Infinite::new(stages, representative, bounded).map_err(to_py)?);
        Sparse::made(search, (sinks, window), refresh, (query_block, query_stride)).map_err(to_py)
    }

    /// Attends the queries of a step, whose tokens the store already holds: `q` `[rows, heads, queries, channels]`, `out` `[rows,
    /// queries, heads, channels]`, `lse` `[rows, heads, queries]`. Returns how many representative keys were scored and how many keys
    /// were attended to, over all heads. With `chunk` many queries at a time, which is for prompts: equal but for the order of sums.
    ///
    /// In the raw frame the search scores keys where the step shows them; if `relative`, all at the distance of the window, which costs
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
        let sinks = match &sinks {
            Some(sinks) => Some(sinks.as_slice().map_err(|_| strided("sinks"))?),
            None => None,
        };
        let level = isa().map_err(to_py)?;
        let signals = Signals::default();
        let residents: Result<Vec<Residents>> = py.detach(|| (0..rows).map(|row| Residents::of(step, row)).collect());
        let residents = residents.map_err(to_py)?;
        if self.rule.is_bounded() {
            self.make_bounds(py, store, &residents)?;
        }
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
            let run =
                |choices: &mut [Choice]| attend(arena, &self.rule, choices, &args, out, lse, &|| signals.arrived());
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
        Sparse {
            rule: Arc::clone(&self.rule),
            query_block: self.query_block,
            query_stride: self.query_stride,
            choices: Mutex::new(choices),
        }
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
