//! Borrowed tensors: a slice, a shape and strides. No ownership, no tensor library.

use half::{bf16, f16};

use crate::{Error, Result};

/// Element type of keys, values and queries. Arithmetic is in `f32` whatever is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    BF16,
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
        }
    }

    /// The name that torch and numpy use.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::BF16 => "bfloat16",
            Dtype::F16 => "float16",
        }
    }

    /// The inverse of [`Dtype::name`].
    pub fn parse(name: &str) -> Result<Self> {
        [Dtype::F32, Dtype::BF16, Dtype::F16].into_iter().find(|d| d.name() == name).ok_or_else(|| Error::OutOfRange {
            what: "dtype",
            expected: "float32, bfloat16 or float16",
            got: name.to_string(),
        })
    }
}

/// Elements to read. 16-bit floats travel as their bits, because callers rarely have a type for both.
#[derive(Clone, Copy, Debug)]
pub enum Elems<'a> {
    F32(&'a [f32]),
    Bits(&'a [u16]),
}

/// Elements to write.
#[derive(Debug)]
pub enum ElemsMut<'a> {
    F32(&'a mut [f32]),
    Bits(&'a mut [u16]),
}

impl Elems<'_> {
    pub fn len(&self) -> usize {
        match self {
            Elems::F32(s) => s.len(),
            Elems::Bits(s) => s.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether these are elements of `dtype`, as far as their width tells.
    pub fn fits(&self, dtype: Dtype) -> bool {
        matches!((self, dtype), (Elems::F32(_), Dtype::F32) | (Elems::Bits(_), Dtype::BF16 | Dtype::F16))
    }

    pub(crate) fn as_bytes_ptr(&self) -> *const u8 {
        match self {
            Elems::F32(s) => s.as_ptr().cast(),
            Elems::Bits(s) => s.as_ptr().cast(),
        }
    }

    fn width(&self) -> &'static str {
        match self {
            Elems::F32(_) => "float32",
            Elems::Bits(_) => "16-bit",
        }
    }
}

impl ElemsMut<'_> {
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn as_ref(&self) -> Elems<'_> {
        match self {
            ElemsMut::F32(s) => Elems::F32(s),
            ElemsMut::Bits(s) => Elems::Bits(s),
        }
    }

    /// The same elements for a while.
    pub(crate) fn reborrow(&mut self) -> ElemsMut<'_> {
        match self {
            ElemsMut::F32(s) => ElemsMut::F32(s),
            ElemsMut::Bits(s) => ElemsMut::Bits(s),
        }
    }

    pub(crate) fn as_bytes_mut_ptr(&mut self) -> *mut u8 {
        match self {
            ElemsMut::F32(s) => s.as_mut_ptr().cast(),
            ElemsMut::Bits(s) => s.as_mut_ptr().cast(),
        }
    }
}

/// Refuses elements of another width than `dtype`.
pub(crate) fn check_dtype(what: &'static str, elems: Elems<'_>, dtype: Dtype) -> Result<()> {
    if elems.fits(dtype) {
        return Ok(());
    }
    Err(Error::Shape {
        what,
        expected: format!("{} elements", dtype.name()),
        got: format!("{} elements", elems.width()),
    })
}

/// Refuses a length other than `expected`.
pub(crate) fn check_len(what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { what, expected: format!("{expected} elements"), got: format!("{got} elements") })
}

/// Four axes, the last of them contiguous: `[batch, head, token, channel]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: Elems<'a>,
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<'a> View<'a> {
    /// `strides` are in elements. Refused when any element would lie outside `data`, so that reading needs no further check.
    pub fn new(what: &'static str, data: Elems<'a>, shape: [usize; 4], strides: [usize; 3]) -> Result<Self> {
        let last = if shape.contains(&0) {
            Some(0)
        } else {
            shape[..3]
                .iter()
                .zip(strides)
                .try_fold(shape[3], |sum, (&n, stride)| (n - 1).checked_mul(stride).and_then(|x| sum.checked_add(x)))
        };
        match last {
            Some(extent) if extent <= data.len() => Ok(View { data, shape, strides }),
            _ => Err(Error::Shape {
                what,
                expected: format!("elements for {shape:?} with strides {strides:?}"),
                got: format!("{} elements", data.len()),
            }),
        }
    }

    /// A view of contiguous data.
    pub fn contiguous(what: &'static str, data: Elems<'a>, shape: [usize; 4]) -> Result<Self> {
        let [_, h, n, d] = shape;
        let strides = h.checked_mul(n).and_then(|hn| hn.checked_mul(d)).map(|batch| [batch, n * d, d]);
        let Some(strides) = strides else {
            return Err(Error::Shape { what, expected: format!("{shape:?}"), got: format!("{} elements", data.len()) });
        };
        View::new(what, data, shape, strides)
    }

    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    pub fn strides(&self) -> [usize; 3] {
        self.strides
    }

    pub fn elems(&self) -> Elems<'a> {
        self.data
    }

    /// Tokens `tokens` of batch `b`, as a batch of one.
    pub fn block(&self, what: &'static str, b: usize, tokens: std::ops::Range<usize>) -> Result<View<'a>> {
        let [batch, heads, n, dim] = self.shape;
        if b >= batch || tokens.start > tokens.end || tokens.end > n {
            let expected = format!("tokens of {:?}", self.shape);
            return Err(Error::Shape { what, expected, got: format!("tokens {tokens:?} of batch {b}") });
        }
        let from = self.offset(b, 0, tokens.start).min(self.data.len());
        let data = match self.data {
            Elems::F32(s) => Elems::F32(&s[from..]),
            Elems::Bits(s) => Elems::Bits(&s[from..]),
        };
        View::new(what, data, [1, heads, tokens.len(), dim], self.strides)
    }

    fn offset(&self, b: usize, h: usize, i: usize) -> usize {
        b * self.strides[0] + h * self.strides[1] + i * self.strides[2]
    }

    /// The channels of one token. Panics outside the shape.
    pub fn row(&self, b: usize, h: usize, i: usize) -> Elems<'a> {
        assert!(b < self.shape[0] && h < self.shape[1] && i < self.shape[2], "row outside the view");
        let at = self.offset(b, h, i);
        match self.data {
            Elems::F32(s) => Elems::F32(&s[at..at + self.shape[3]]),
            Elems::Bits(s) => Elems::Bits(&s[at..at + self.shape[3]]),
        }
    }
}

/// One element as `f64`, for the reference and for tests.
pub(crate) fn widen(elems: Elems<'_>, dtype: Dtype, at: usize) -> f64 {
    match (elems, dtype) {
        (Elems::F32(s), _) => f64::from(s[at]),
        (Elems::Bits(s), Dtype::F16) => f16::from_bits(s[at]).to_f64(),
        (Elems::Bits(s), _) => bf16::from_bits(s[at]).to_f64(),
    }
}
