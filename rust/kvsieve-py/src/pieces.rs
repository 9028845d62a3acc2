//! Attention of one query to pieces of its row's text, and where the residents of a row lie.

use std::sync::Arc;

use kvsieve_core::Error;
use kvsieve_core::ids::Run;
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::pieces::{self, AttendPieces, Piece};
use kvsieve_core::select;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, Rope};
use crate::plan::Step;
use crate::store::{Store, sink_logits, strided};

/// Where the residents of a row lie once a step's tokens are stored, in text order.
#[pyclass(frozen, sequence, module = "kvsieve._core")]
pub struct Residents {
    runs: Arc<[Run]>,
    /// The first resident of each run, and how many there are.
    starts: Vec<u32>,
}

#[pymethods]
impl Residents {
    /// Of one row of a step, whose queries see all that stands before them.
    #[new]
    fn new(step: &Step, row: usize) -> PyResult<Self> {
        if row >= step.inner.num_rows {
            let (what, expected) = ("row", "a row of the step");
            return Err(to_py(Error::OutOfRange { what, expected, got: row.to_string() }));
        }
        let runs: Arc<[Run]> = match &step.inner.residents {
            Some(rows) => Arc::clone(&rows[row]),
            None => select::Residents::of(&step.inner, row).map_err(to_py)?.runs.into(),
        };
        let mut starts = Vec::with_capacity(runs.len() + 1);
        let mut len = 0;
        for run in runs.iter() {
            starts.push(len);
            len += run.len();
        }
        starts.push(len);
        Ok(Residents { runs, starts })
    }

    fn __len__(&self) -> usize {
        self.starts.last().map_or(0, |&len| len as usize)
    }

    /// Runs (block, lo, hi) of the residents `lo..hi`.
    fn runs(&self, lo: u32, hi: u32) -> Vec<(u32, u32, u32)> {
        let first = self.starts.partition_point(|&start| start <= lo).saturating_sub(1);
        let mine = self.runs.iter().zip(&self.starts).skip(first).take_while(|&(_, &start)| start < hi);
        let cut = mine.map(|(run, &start)| {
            (run.block.0, run.lo + lo.saturating_sub(start), run.hi - (start + run.len()).saturating_sub(hi))
        });
        cut.filter(|&(_, lo, hi)| lo < hi).collect()
    }
}

/// A piece as Python writes it: key-value head or -1, residents `lo..hi`, distance of the first, whether all are so far away.
type Given = (i64, u32, u32, i64, bool);

/// What was told of the attention beside its answer: scores, and what each token got.
type Told<'py> = (Option<Bound<'py, PyArray2<f32>>>, Option<Bound<'py, PyArray1<f32>>>);

/// Attends one query to pieces of its row, at the distances that they name: `q` `[1, heads, 1, channels]`, not rotated; `out` `[1, heads,
/// channels]`; `lse` `[heads]`. Returns float32 `[kv_heads, hi - lo]`, the probabilities of the piece `scored`, summed over the query heads
/// of each group; and if `told` float32 `[n]`, what each token of each piece in turn got, all heads together.
#[pyfunction]
#[pyo3(signature = (store, q, residents, given, rope, scale, softcap, sinks, out, lse=None, scored=None, threads=1, told=false))]
#[allow(clippy::too_many_arguments)]
fn attend_pieces<'py>(
    py: Python<'py>,
    store: &Store,
    q: &Bound<'_, PyAny>,
    residents: &Residents,
    given: Vec<Given>,
    rope: Option<&Rope>,
    scale: f32,
    softcap: Option<f32>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyAny>,
    mut lse: Option<PyReadwriteArray1<'_, f32>>,
    scored: Option<usize>,
    threads: usize,
    told: bool,
) -> PyResult<Told<'py>> {
    let q = Input::new("q", q)?;
    let view = q.view("q")?;
    let mut out = Output::new("out", out)?;
    out.expect("out", &[1, view.shape()[1], store.value_dim()])?;
    let out = out.elems("out")?;
    let piece = |&(head, lo, hi, distance, fixed): &Given| Piece {
        head: (head >= 0).then(|| u32::try_from(head).unwrap_or(u32::MAX)),
        lo,
        hi,
        distance,
        fixed,
    };
    let given: Vec<Piece> = given.iter().map(piece).collect();
    let sinks = sink_logits(&sinks)?;
    let lse = match &mut lse {
        Some(lse) => Some(lse.as_slice_mut().map_err(|_| strided("lse"))?),
        None => None,
    };
    let (runs, starts, rope) = (&residents.runs[..], &residents.starts[..], rope.map(|rope| &rope.inner));
    let level = isa().map_err(to_py)?;
    let args = AttendPieces {
        q: view,
        runs,
        starts,
        pieces: &given,
        scored,
        told,
        rope,
        scale,
        softcap,
        sinks,
        threads,
        level,
    };
    let signals = Signals::default();
    let done = store.read(py, usize::MAX, |arena| pieces::attend_pieces(arena, &args, out, lse, &|| signals.arrived()));
    let found = done.map_err(|err| signals.error(err))?;
    let scores = match scored {
        None => None,
        Some(_) => {
            let shape = [store.num_kv_heads(), found.scores.len() / store.num_kv_heads()];
            Some(PyArray1::from_vec(py, found.scores).reshape(shape)?)
        }
    };
    Ok((scores, told.then(|| PyArray1::from_vec(py, found.mass))))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Residents>()?;
    m.add_function(wrap_pyfunction!(attend_pieces, m)?)
}
