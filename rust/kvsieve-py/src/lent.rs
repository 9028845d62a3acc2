//! Tensors of another library, where they lie, for the length of one call.
//!
//! A numpy view of a tensor costs a microsecond, and a layer needs four of them for each token. DLPack has a table of C functions for
//! that (`__dlpack_c_exchange_api__`, version 1.3 of the standard; torch has it since 2.10): one of them fills in the pointer, the
//! device, the dtype, the shape and the strides of a tensor, from the tensor itself. So no address comes from Python, and all that
//! numpy would tell is checked here.
//!
//! It may be asked of objects of exactly the type that the table was found on: subclasses inherit the table, and some have no memory.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyTuple, PyType};

use crate::error::to_py;
use crate::kernels::shape_error;

/// `DLTensor`.
#[repr(C)]
struct Raw {
    data: *mut c_void,
    device: [i32; 2],
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type Borrow = unsafe extern "C" fn(*mut c_void, *mut Raw) -> c_int;

/// `DLPackExchangeAPI`.
#[repr(C)]
struct Table {
    version: [u32; 2],
    older: *const c_void,
    /// Functions that make owners of tensors, which nothing here needs.
    owners: [*const c_void; 3],
    borrow: Option<Borrow>,
    stream: *const c_void,
}

const MAJOR: u32 = 1;
const CPU: i32 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

static LENDERS: PyOnceLock<Vec<(Py<PyType>, Borrow)>> = PyOnceLock::new();

/// The types among `types` whose objects can be lent to calls that take tensors; decided by the first call in a process.
#[pyfunction]
#[pyo3(signature = (*types))]
fn lenders<'py>(types: &Bound<'py, PyTuple>) -> PyResult<Vec<Bound<'py, PyType>>> {
    let py = types.py();
    let known = LENDERS.get_or_try_init(py, || {
        let mut found = Vec::new();
        for one in types {
            let kind = one.cast_into::<PyType>()?;
            if let Some(borrow) = table_of(&kind) {
                found.push((kind.unbind(), borrow));
            }
        }
        PyResult::Ok(found)
    })?;
    Ok(known.iter().map(|(kind, _)| kind.bind(py).clone()).collect())
}

fn table_of(kind: &Bound<'_, PyType>) -> Option<Borrow> {
    let capsule = kind.getattr("__dlpack_c_exchange_api__").ok()?.cast_into::<PyCapsule>().ok()?;
    let table: NonNull<Table> = capsule.pointer_checked(Some(c"dlpack_exchange_api")).ok()?.cast();
    // SAFETY: by the standard a capsule of this name holds such a table, which lives as long as the process; its head is the same in
    // all versions, and the rest in all of a major one.
    let table = unsafe { table.as_ref() };
    if table.version[0] == MAJOR { table.borrow } else { None }
}

/// A tensor in host memory of float32, bfloat16 or float16, whose channels (the last of up to four axes) follow each other.
///
/// As with views of numpy, who takes memory away from a storage that a tensor still means, or resizes a tensor in another thread while
/// the call has released the GIL, takes it away from the call too: neither torch nor DLPack's table would tell.
pub struct Lent<'a> {
    data: *mut c_void,
    dtype: Dtype,
    shape: [usize; 4],
    strides: [usize; 3],
    /// Elements from the first to the last.
    extent: usize,
    of: PhantomData<&'a ()>,
}

impl<'a> Lent<'a> {
    /// `any`, if it is such a tensor.
    pub fn new(any: &'a Bound<'_, PyAny>) -> Option<Self> {
        let py = any.py();
        let kind = any.get_type();
        let (_, borrow) = LENDERS.get(py)?.iter().find(|(known, _)| known.is(&kind))?;
        let mut raw = Raw {
            data: std::ptr::null_mut(),
            device: [0; 2],
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: std::ptr::null(),
            strides: std::ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: the object is of the very type that the table was found on, and the GIL is held.
        if unsafe { borrow(any.as_ptr().cast(), &mut raw) } != 0 {
            // One without memory: sparse, of another device, or wrapped.
            drop(PyErr::take(py));
            return None;
        }
        Lent::of(&raw)
    }

    fn of(raw: &Raw) -> Option<Self> {
        let dtype = match (raw.code, raw.bits) {
            (FLOAT, 32) => Dtype::F32,
            (FLOAT, 16) => Dtype::F16,
            (BFLOAT, 16) => Dtype::BF16,
            _ => return None,
        };
        let ndim = usize::try_from(raw.ndim).ok().filter(|n| (1..=4).contains(n))?;
        if raw.device[0] != CPU || raw.lanes != 1 || raw.shape.is_null() || raw.strides.is_null() {
            return None;
        }
        let (mut shape, mut strides) = ([1; 4], [0; 4]);
        for axis in 0..ndim {
            // SAFETY: by the standard both have `ndim` elements, which live as long as the tensor is not changed: the GIL is held.
            let (n, stride) = unsafe { (*raw.shape.add(axis), *raw.strides.add(axis)) };
            let at = 4 - ndim + axis;
            shape[at] = usize::try_from(n).ok()?;
            // The stride of an axis that is never stepped along means nothing.
            strides[at] = if n > 1 { usize::try_from(stride).ok()? } else { 0 };
        }
        if shape[3] > 1 && strides[3] != 1 {
            return None;
        }
        let empty = shape.contains(&0);
        let last = |axis: usize| (shape[axis] - 1).checked_mul(strides[axis]);
        let extent = if empty { 0 } else { (0..3).try_fold(shape[3], |sum, axis| sum.checked_add(last(axis)?))? };
        let data = if empty {
            NonNull::<f32>::dangling().as_ptr().cast()
        } else {
            raw.data.wrapping_byte_add(raw.byte_offset as usize)
        };
        if raw.data.is_null() && !empty || data.addr() % dtype.size() != 0 {
            return None;
        }
        Some(Lent { data, dtype, shape, strides: [strides[0], strides[1], strides[2]], extent, of: PhantomData })
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// With axes of length 1 added in front up to four.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    fn elems(&self) -> Elems<'_> {
        // SAFETY: the tensor told its own shape and strides, so all of the extent is inside of its memory; it is aligned, and alive:
        // the caller holds a reference to it. What this call writes to is elsewhere: `elems_mut` has seen to it.
        unsafe {
            match self.dtype {
                Dtype::F32 => Elems::F32(std::slice::from_raw_parts(self.data.cast(), self.extent)),
                _ => Elems::Bits(std::slice::from_raw_parts(self.data.cast(), self.extent)),
            }
        }
    }

    pub fn view(&self, what: &'static str) -> PyResult<View<'_>> {
        View::new(what, self.elems(), self.shape, self.strides).map_err(to_py)
    }

    /// The addresses from its first element to behind its last.
    pub fn addresses(&self) -> Range<usize> {
        self.data.addr()..self.data.addr() + self.extent * self.dtype.size()
    }

    /// The elements to write to: C-contiguous, of this shape, and apart from the addresses that are read meanwhile.
    pub fn elems_mut(
        &mut self,
        what: &'static str,
        shape: [usize; 4],
        read: &[Range<usize>],
    ) -> PyResult<ElemsMut<'_>> {
        let got = || format!("{:?} with strides {:?}", self.shape, self.strides);
        if self.shape != shape {
            return Err(shape_error(what, &format!("{shape:?}"), got()));
        }
        let mut follow = shape[3];
        for axis in (0..3).rev() {
            if shape[axis] > 1 && self.strides[axis] != follow {
                return Err(shape_error(what, "a contiguous tensor", got()));
            }
            follow *= shape[axis];
        }
        let own = self.addresses();
        if read.iter().any(|other| own.start < other.end && other.start < own.end) {
            return Err(shape_error(what, "memory of its own", "memory that is read too".to_string()));
        }
        // SAFETY: as in `elems`; contiguous, so that no element is there twice, and what else is read in this call is elsewhere.
        unsafe {
            Ok(match self.dtype {
                Dtype::F32 => ElemsMut::F32(std::slice::from_raw_parts_mut(self.data.cast(), self.extent)),
                _ => ElemsMut::Bits(std::slice::from_raw_parts_mut(self.data.cast(), self.extent)),
            })
        }
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(lenders, m)?)
}
