//! `Step` and `Moves`: opaque to Python but for the arrays that the reference backend reads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use kvsieve_core::kernels::SpanTrig;
use kvsieve_core::plan;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

/// The plan of one forward. See `kvsieve_core::plan::Step`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Step {
    pub inner: plan::Step,
    /// By the id of a rope: what every layer of the step shares. See `SpanTrig`.
    pub trig: Mutex<Vec<(u64, Arc<SpanTrig>)>>,
}

impl Step {
    pub fn new(inner: plan::Step) -> Self {
        Step { inner, trig: Mutex::default() }
    }
}

/// A list of token moves, applied in order. Each row of `array()` is (from, from_slot, to, to_slot, len).
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Moves {
    pub inner: Vec<plan::Move>,
}

/// One memory's share of what one row's new queries read. See `kvsieve_core::plan::Part`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Part {
    pub inner: plan::Part,
}

#[allow(clippy::type_complexity)]
fn runs(py: Python<'_>, runs: &[kvsieve_core::ids::Run]) -> (Py<PyArray1<i64>>, Py<PyArray1<i64>>, Py<PyArray1<i64>>) {
    let column =
        |f: fn(&kvsieve_core::ids::Run) -> i64| runs.iter().map(f).collect::<Vec<_>>().into_pyarray(py).unbind();
    (column(|r| i64::from(r.block.0)), column(|r| i64::from(r.lo)), column(|r| i64::from(r.hi)))
}

fn moves(list: &[plan::Move]) -> Vec<(u32, u32, u32, u32, u32)> {
    list.iter().map(|m| (m.from.0, m.from_slot, m.to.0, m.to_slot, m.len)).collect()
}

/// Rows of four, as the CUDA kernels read them.
fn table(py: Python<'_>, rows: Vec<[i32; 4]>) -> PyResult<Py<PyArray2<i32>>> {
    let len = rows.len();
    Ok(rows.into_flattened().into_pyarray(py).reshape([len, 4])?.unbind())
}

/// (from, to, from_slot | to_slot << 16, len).
fn move_table(py: Python<'_>, list: &[plan::Move]) -> PyResult<Py<PyArray2<i32>>> {
    table(
        py,
        list.iter().map(|m| [m.from.0, m.to.0, m.from_slot | m.to_slot << 16, m.len].map(u32::cast_signed)).collect(),
    )
}

#[pymethods]
impl Moves {
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Tuples (from, from_slot, to, to_slot, len).
    fn tuples(&self) -> Vec<(u32, u32, u32, u32, u32)> {
        moves(&self.inner)
    }

    /// int32 `[n, 4]`: (from, to, from_slot | to_slot << 16, len).
    fn table(&self, py: Python<'_>) -> PyResult<Py<PyArray2<i32>>> {
        move_table(py, &self.inner)
    }
}

fn stored_keys(frame: plan::Frame) -> &'static str {
    match frame {
        plan::Frame::Rotated => "post_rope",
        plan::Frame::Raw => "pre_rope",
    }
}

/// The inverse of [`stored_keys`].
pub fn stored_keys_of(name: &str) -> kvsieve_core::Result<plan::Frame> {
    [plan::Frame::Rotated, plan::Frame::Raw].into_iter().find(|&frame| stored_keys(frame) == name).ok_or_else(|| {
        let (what, expected) = ("stored_keys", "\"post_rope\" or \"pre_rope\"");
        kvsieve_core::Error::OutOfRange { what, expected, got: format!("{name:?}") }
    })
}

#[pymethods]
impl Step {
    /// "post_rope" or "pre_rope".
    #[getter]
    fn stored_keys(&self) -> &'static str {
        stored_keys(self.inner.frame)
    }

    #[getter]
    fn num_rows(&self) -> usize {
        self.inner.num_rows
    }

    #[getter]
    fn num_queries(&self) -> usize {
        self.inner.num_queries
    }

    #[getter]
    fn new_lens(&self) -> Vec<usize> {
        self.inner.new_lens.clone()
    }

    #[getter]
    fn num_blocks(&self) -> u32 {
        self.inner.num_blocks
    }

    #[getter]
    fn first_new(&self) -> Vec<u64> {
        self.inner.first_new.clone()
    }

    /// Whether the fast path applies: every new token stored, few queries.
    #[getter]
    fn has_spans(&self) -> bool {
        self.inner.spans.is_some()
    }

    /// Tuples (from, from_slot, to, to_slot, len) to copy before appending.
    fn copies(&self) -> Vec<(u32, u32, u32, u32, u32)> {
        moves(&self.inner.copies)
    }

    /// Tuples (row, new, block, slot, len).
    fn appends(&self) -> Vec<(usize, usize, u32, u32, u32)> {
        self.inner.appends.iter().map(|a| (a.row, a.new, a.block.0, a.slot, a.len)).collect()
    }

    /// For each item (row-major over rows and queries) a list of (block, lo, hi, shift, rotate_keys); None without a fast path.
    #[allow(clippy::type_complexity)]
    fn spans(&self) -> Option<Vec<Vec<(u32, u32, u32, i64, bool)>>> {
        self.inner.spans.as_ref().map(|s| {
            s.starts
                .windows(2)
                .map(|w| {
                    s.spans[w[0] as usize..w[1] as usize]
                        .iter()
                        .map(|p| (p.block.0, p.lo, p.hi, p.shift, p.rotate_keys))
                        .collect()
                })
                .collect()
        })
    }

    /// The copies as int32 `[n, 4]`: (from, to, from_slot | to_slot << 16, len).
    fn copy_table(&self, py: Python<'_>) -> PyResult<Py<PyArray2<i32>>> {
        move_table(py, &self.inner.copies)
    }

    /// One row per stored new token, int32 `[n, 4]`: (row, column, block, slot).
    fn append_table(&self, py: Python<'_>) -> PyResult<Py<PyArray2<i32>>> {
        let step = &self.inner;
        let tokens = step.appends.iter().flat_map(|a| {
            let column = step.num_queries - step.new_lens[a.row] + a.new;
            (0..a.len).map(move |i| {
                [a.row as i32, (column + i as usize) as i32, a.block.0.cast_signed(), (a.slot + i).cast_signed()]
            })
        });
        table(py, tokens.collect())
    }

    /// The spans as the CUDA kernels read them: starts int32 `[items + 1]`; spans int32 `[n, 4]` of (block, lo | hi << 8 |
    /// rotate_keys << 16, keys of the item before the span, number of the shift below plus one or 0 for none); shifts int64, each
    /// once. None without a fast path.
    #[allow(clippy::type_complexity)]
    fn span_table(
        &self,
        py: Python<'_>,
    ) -> PyResult<Option<(Py<PyArray1<i32>>, Py<PyArray2<i32>>, Py<PyArray1<i64>>)>> {
        let Some(spans) = &self.inner.spans else { return Ok(None) };
        let (mut shifts, mut known) = (Vec::new(), HashMap::from([(0i64, 0i32)]));
        let mut rows = Vec::with_capacity(spans.spans.len());
        for item in spans.starts.windows(2) {
            let mut before = 0;
            for span in &spans.spans[item[0] as usize..item[1] as usize] {
                let turn = *known.entry(span.shift).or_insert_with(|| {
                    shifts.push(span.shift);
                    shifts.len() as i32
                });
                let slots = span.lo | span.hi << 8 | u32::from(span.rotate_keys) << 16;
                rows.push([span.block.0.cast_signed(), slots.cast_signed(), before, turn]);
                before += (span.hi - span.lo).cast_signed();
            }
        }
        let starts: Vec<i32> = spans.starts.iter().map(|&s| s.cast_signed()).collect();
        Ok(Some((starts.into_pyarray(py).unbind(), table(py, rows)?, shifts.into_pyarray(py).unbind())))
    }

    fn parts(&self) -> Vec<Part> {
        self.inner.parts.iter().map(|p| Part { inner: p.clone() }).collect()
    }
}

#[pymethods]
impl Part {
    #[getter]
    fn row(&self) -> usize {
        self.inner.row
    }

    #[getter]
    fn memory(&self) -> usize {
        self.inner.memory
    }

    /// (block, lo, hi) of the resident runs, three int64 arrays.
    #[allow(clippy::type_complexity)]
    fn runs(&self, py: Python<'_>) -> (Py<PyArray1<i64>>, Py<PyArray1<i64>>, Py<PyArray1<i64>>) {
        runs(py, &self.inner.runs)
    }

    /// Half-open range among the row's valid new tokens whose keys belong to this part.
    #[getter]
    fn new_range(&self) -> (usize, usize) {
        (self.inner.new_lo, self.inner.new_hi)
    }

    fn key_true(&self, py: Python<'_>) -> Py<PyArray1<i64>> {
        self.inner.key_true.clone().into_pyarray(py).unbind()
    }

    fn key_positions(&self, py: Python<'_>) -> Py<PyArray1<i64>> {
        self.inner.key_positions.clone().into_pyarray(py).unbind()
    }

    fn query_true(&self, py: Python<'_>) -> Py<PyArray1<i64>> {
        self.inner.query_true.clone().into_pyarray(py).unbind()
    }

    fn query_positions(&self, py: Python<'_>) -> Py<PyArray1<i64>> {
        self.inner.query_positions.clone().into_pyarray(py).unbind()
    }

    /// Visible only below this true distance; None when unlimited.
    #[getter]
    fn near(&self) -> Option<i64> {
        (self.inner.near != i64::MAX).then_some(self.inner.near)
    }

    /// Visible only at or beyond this true distance.
    #[getter]
    fn far(&self) -> i64 {
        self.inner.far
    }

    /// The one distance of every key, or None when placed by positions.
    #[getter]
    fn fixed(&self) -> Option<i64> {
        match self.inner.placing {
            plan::Placing::Fixed(d) => Some(d),
            plan::Placing::Relative => None,
        }
    }

    #[getter]
    fn top_k(&self) -> usize {
        self.inner.top_k
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Step>()?;
    m.add_class::<Moves>()?;
    m.add_class::<Part>()?;
    Ok(())
}
