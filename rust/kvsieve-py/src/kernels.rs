//! Numpy arrays as views, and the kernels that need no store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvsieve_core::kernels::isa::{is_intel as made_by_intel, isa as chosen, levels};
use kvsieve_core::kernels::{read as reading, rotate as rotating, surprisal as surprising};
use kvsieve_core::rank;
use kvsieve_core::rope::Layout;
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};
use kvsieve_core::{Error, fault};
use numpy::{
    Element, IntoPyArray, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods, ndarray::Dimension,
};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};

pub fn shape_error(what: &'static str, expected: &str, got: String) -> PyErr {
    to_py(Error::Shape { what, expected: expected.to_string(), got })
}

fn wrong_type(what: &'static str, got: &Bound<'_, PyAny>) -> PyErr {
    let got = got.getattr("dtype").map_or_else(|_| got.get_type().to_string(), |d| d.to_string());
    shape_error(what, "a numpy array of float32, or of int16 or uint16 with the bits of 16-bit floats", got)
}

/// The numbers of an array, which may be a few that repeat without end: MemoryError where they do not fit.
pub fn copied<T: Element + Copy, D: Dimension>(given: &PyReadonlyArray<'_, T, D>) -> PyResult<Vec<T>> {
    let mut numbers = Vec::new();
    reserve(&mut numbers, given.len())?;
    numbers.extend(given.as_array().iter().copied());
    Ok(numbers)
}

/// Room for `count` more, or MemoryError.
pub fn reserve<T>(to: &mut Vec<T>, count: usize) -> PyResult<()> {
    let bytes = count.saturating_mul(size_of::<T>());
    fault::may_lack(bytes).map_err(to_py)?;
    to.try_reserve_exact(count).map_err(|_| to_py(Error::OutOfMemory { bytes }))
}

/// An array to read: `float32`, or the bits of 16-bit floats, for which numpy has no common type.
pub enum Input<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    I16(PyReadonlyArrayDyn<'py, i16>),
    U16(PyReadonlyArrayDyn<'py, u16>),
}

impl<'py> Input<'py> {
    pub fn new(what: &'static str, any: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = any.cast::<PyArrayDyn<f32>>() {
            return Ok(Input::F32(array.try_readonly()?));
        }
        if let Ok(array) = any.cast::<PyArrayDyn<i16>>() {
            return Ok(Input::I16(array.try_readonly()?));
        }
        match any.cast::<PyArrayDyn<u16>>() {
            Ok(array) => Ok(Input::U16(array.try_readonly()?)),
            Err(_) => Err(wrong_type(what, any)),
        }
    }

    pub fn is_f32(&self) -> bool {
        matches!(self, Input::F32(_))
    }

    pub fn shape(&self) -> &[usize] {
        match self {
            Input::F32(a) => a.shape(),
            Input::I16(a) => a.shape(),
            Input::U16(a) => a.shape(),
        }
    }

    /// The array as `[.., .., .., channels]`; missing axes in front are of length 1. Strides may be anything but negative, the
    /// channels must follow each other.
    pub fn view(&self, what: &'static str) -> PyResult<View<'_>> {
        let (shape, strides, extent) = match self {
            Input::F32(a) => layout(what, a)?,
            Input::I16(a) => layout(what, a)?,
            Input::U16(a) => layout(what, a)?,
        };
        // SAFETY: `layout` has computed the extent from the array's own shape and non-negative strides, so all of it is inside the
        // array's memory; it is aligned. The borrow keeps the array alive, and other borrows of this library from writing to it.
        // The two 16-bit integers have the same layout.
        let elems = unsafe {
            match self {
                Input::F32(a) => Elems::F32(std::slice::from_raw_parts(a.data(), extent)),
                Input::I16(a) => Elems::Bits(std::slice::from_raw_parts(a.data().cast(), extent)),
                Input::U16(a) => Elems::Bits(std::slice::from_raw_parts(a.data(), extent)),
            }
        };
        View::new(what, elems, shape, strides).map_err(to_py)
    }

    /// The elements of a C-contiguous array.
    pub fn elems(&self, what: &'static str) -> PyResult<Elems<'_>> {
        let err = |_| shape_error(what, "a C-contiguous array", format!("{:?}", self.shape()));
        Ok(match self {
            Input::F32(a) => Elems::F32(a.as_slice().map_err(err)?),
            Input::I16(a) => {
                let bits = a.as_slice().map_err(err)?;
                // SAFETY: both 16-bit integers have the same layout.
                Elems::Bits(unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) })
            }
            Input::U16(a) => Elems::Bits(a.as_slice().map_err(err)?),
        })
    }
}

/// Shape, strides and extent in elements, with axes added in front up to four.
fn layout<T: Element>(
    what: &'static str,
    array: &PyReadonlyArrayDyn<'_, T>,
) -> PyResult<([usize; 4], [usize; 3], usize)> {
    let given = array.shape();
    let err = |expected| Err(shape_error(what, expected, format!("shape {given:?}, strides {:?}", array.strides())));
    if given.is_empty() || given.len() > 4 {
        return err("one to four axes");
    }
    if !array.data().is_aligned() {
        return err("aligned elements");
    }
    let (mut shape, mut strides) = ([1; 4], [0; 4]);
    for (axis, (&n, &stride)) in given.iter().zip(array.strides()).enumerate() {
        let at = 4 - given.len() + axis;
        shape[at] = n;
        // The stride of an axis that is never stepped along means nothing.
        if n > 1 {
            let size = size_of::<T>() as isize;
            if stride < 0 || stride % size != 0 {
                return err("strides that are not negative, in whole elements");
            }
            strides[at] = (stride / size) as usize;
        }
    }
    if shape[3] > 1 && strides[3] != 1 {
        return err("a contiguous last axis");
    }
    let extent =
        if shape.contains(&0) { 0 } else { shape[3] + (0..3).map(|a| (shape[a] - 1) * strides[a]).sum::<usize>() };
    Ok((shape, [strides[0], strides[1], strides[2]], extent))
}

/// A C-contiguous array to write.
pub enum Output<'py> {
    F32(PyReadwriteArrayDyn<'py, f32>),
    I16(PyReadwriteArrayDyn<'py, i16>),
    U16(PyReadwriteArrayDyn<'py, u16>),
}

impl<'py> Output<'py> {
    pub fn new(what: &'static str, any: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = any.cast::<PyArrayDyn<f32>>() {
            return Ok(Output::F32(array.try_readwrite()?));
        }
        if let Ok(array) = any.cast::<PyArrayDyn<i16>>() {
            return Ok(Output::I16(array.try_readwrite()?));
        }
        match any.cast::<PyArrayDyn<u16>>() {
            Ok(array) => Ok(Output::U16(array.try_readwrite()?)),
            Err(_) => Err(wrong_type(what, any)),
        }
    }

    pub fn shape(&self) -> &[usize] {
        match self {
            Output::F32(a) => a.shape(),
            Output::I16(a) => a.shape(),
            Output::U16(a) => a.shape(),
        }
    }

    pub fn elems(&mut self, what: &'static str) -> PyResult<ElemsMut<'_>> {
        let shape = self.shape().to_vec();
        let err = |_| shape_error(what, "a C-contiguous array", format!("{shape:?}"));
        Ok(match self {
            Output::F32(a) => ElemsMut::F32(a.as_slice_mut().map_err(err)?),
            Output::I16(a) => {
                let bits = a.as_slice_mut().map_err(err)?;
                // SAFETY: both 16-bit integers have the same layout; the borrow is passed on whole.
                ElemsMut::Bits(unsafe { std::slice::from_raw_parts_mut(bits.as_mut_ptr().cast(), bits.len()) })
            }
            Output::U16(a) => ElemsMut::Bits(a.as_slice_mut().map_err(err)?),
        })
    }

    /// Refuses another shape: a wrong one of the right size would be filled silently in the wrong order.
    pub fn expect(&self, what: &'static str, shape: &[usize]) -> PyResult<()> {
        if self.shape() == shape {
            return Ok(());
        }
        Err(shape_error(what, &format!("{shape:?}"), format!("{:?}", self.shape())))
    }
}

/// The dtype of an array: its own for `float32`, else the one named, for bits do not tell.
pub fn dtype_of(input: &Input<'_>, name: Option<&str>) -> PyResult<Dtype> {
    match name {
        Some(name) => Dtype::parse(name).map_err(to_py),
        None if input.is_f32() => Ok(Dtype::F32),
        None => Err(to_py(Error::Unsupported("16-bit arrays need dtype=\"bfloat16\" or dtype=\"float16\""))),
    }
}

/// A model's rotary encoding. See `kvsieve_core::rope::Rope`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Rope {
    pub inner: Arc<kvsieve_core::rope::Rope>,
    /// Never used twice in a process, unlike an address.
    pub id: u64,
}

#[pymethods]
impl Rope {
    #[new]
    #[pyo3(signature = (inv_freq, layout="half", factor=1.0))]
    fn new(inv_freq: Vec<f64>, layout: &str, factor: f64) -> PyResult<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let layout = match layout {
            "half" => Layout::Half,
            "interleaved" => Layout::Interleaved,
            other => {
                let (what, expected) = ("layout", "\"half\" or \"interleaved\"");
                return Err(to_py(Error::OutOfRange { what, expected, got: other.to_string() }));
            }
        };
        let inner = Arc::new(kvsieve_core::rope::Rope::new(inv_freq, layout, factor).map_err(to_py)?);
        Ok(Rope { inner, id: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    #[getter]
    fn inv_freq(&self) -> Vec<f64> {
        self.inner.inv_freq().to_vec()
    }

    #[getter]
    fn layout(&self) -> &'static str {
        match self.inner.layout() {
            Layout::Half => "half",
            Layout::Interleaved => "interleaved",
        }
    }

    #[getter]
    fn factor(&self) -> f64 {
        self.inner.factor()
    }

    #[getter]
    fn rotary_dim(&self) -> usize {
        self.inner.rotary_dim()
    }
}

/// Rotates each token of `x` (`[.., tokens, channels]`) by its position into `out`; `inverse` undoes that.
#[pyfunction]
#[pyo3(signature = (x, positions, rope, out, inverse=false, dtype=None))]
fn rotate(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    positions: PyReadonlyArray1<'_, i64>,
    rope: &Rope,
    out: &Bound<'_, PyAny>,
    inverse: bool,
    dtype: Option<&str>,
) -> PyResult<()> {
    let x = Input::new("x", x)?;
    let dtype = dtype_of(&x, dtype)?;
    let mut out = Output::new("out", out)?;
    out.expect("out", x.shape())?;
    let (view, out) = (x.view("x")?, out.elems("out")?);
    let positions = positions.as_slice().map_err(|_| shape_error("positions", "contiguous", "strided".to_string()))?;
    let rope = &*rope.inner;
    let level = chosen().map_err(to_py)?;
    py.detach(|| rotating::rotate(&view, dtype, positions, rope, inverse, out, level)).map_err(to_py)
}

/// Negative log-probability of each row's realised token.
#[pyfunction]
#[pyo3(signature = (logits, ids, dtype=None, threads=1))]
fn surprisal<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    ids: PyReadonlyArray1<'_, i64>,
    dtype: Option<&str>,
    threads: usize,
) -> PyResult<Bound<'py, numpy::PyArray1<f32>>> {
    let logits = Input::new("logits", logits)?;
    let dtype = dtype_of(&logits, dtype)?;
    if logits.shape().len() != 2 {
        return Err(shape_error("logits", "[rows, vocabulary]", format!("{:?}", logits.shape())));
    }
    let view = logits.view("logits")?;
    let ids = ids.as_slice().map_err(|_| shape_error("ids", "contiguous", "strided".to_string()))?;
    let level = chosen().map_err(to_py)?;
    let mut out = vec![0f32; ids.len()];
    let signals = Signals::default();
    py.detach(|| surprising::surprisal(&view, dtype, ids, &mut out, (level, threads), &|| signals.arrived()))
        .map_err(|err| signals.error(err))?;
    Ok(out.into_pyarray(py))
}

/// For each row the columns of its `k` best scores: high to low, equal ones by column, NaN last.
#[pyfunction]
fn top_k<'py>(py: Python<'py>, scores: PyReadonlyArray2<'_, f32>, k: usize) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let [rows, columns] = [scores.shape()[0], scores.shape()[1]];
    let scores = scores.as_slice().map_err(|_| shape_error("scores", "C-contiguous", "strided".to_string()))?;
    let best = py.detach(|| rank::top_k(scores, columns, k)).map_err(to_py)?;
    best.into_pyarray(py).reshape([rows, k])
}

/// The sum of a contiguous array, read once by one thread: the yardstick of kernels that are bound by memory.
#[pyfunction]
fn read(py: Python<'_>, x: PyReadonlyArray1<'_, f32>) -> PyResult<f32> {
    let x = x.as_slice().map_err(|_| shape_error("x", "contiguous", "strided".to_string()))?;
    let level = chosen().map_err(to_py)?;
    py.detach(|| reading::read(x, level)).map_err(to_py)
}

/// The instruction set that the kernels run on.
#[pyfunction]
fn isa() -> PyResult<&'static str> {
    chosen().map(|level| level.name()).map_err(to_py)
}

/// Whether the processor is Intel's.
#[pyfunction]
fn is_intel() -> bool {
    made_by_intel()
}

/// Every instruction set of this machine that the kernels are compiled for, the slowest first.
#[pyfunction]
fn isa_levels() -> Vec<&'static str> {
    levels().into_iter().map(|level| level.name()).collect()
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Rope>()?;
    m.add_function(wrap_pyfunction!(read, m)?)?;
    m.add_function(wrap_pyfunction!(rotate, m)?)?;
    m.add_function(wrap_pyfunction!(surprisal, m)?)?;
    m.add_function(wrap_pyfunction!(top_k, m)?)?;
    m.add_function(wrap_pyfunction!(isa, m)?)?;
    m.add_function(wrap_pyfunction!(is_intel, m)?)?;
    m.add_function(wrap_pyfunction!(isa_levels, m)?)?;
    Ok(())
}
