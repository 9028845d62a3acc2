//! One layer's keys and values, behind a lock.

use std::sync::{Arc, PoisonError};

use kvsieve_core::fault;
use kvsieve_core::fork::Lock;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::attend::mass_len;
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::{Attend, SpanTrig, attend_unless};
use kvsieve_core::plan::Spans;
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::packed::{Channels, Chosen, Packing};
use kvsieve_core::tensor::{Dtype, ElemsMut, View};
use kvsieve_core::{Error, Result};
use numpy::{
    PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use crate::error::{Signals, to_py};
use crate::kernels::{Input, Output, Rope, copied};
use crate::plan::{Moves, Step};

/// Work on fewer bytes takes less time than another Python thread may keep the GIL from us, so it is not released.
pub(crate) const SMALL: usize = 256 << 10;

/// One layer's keys and values. See `kvsieve_core::storage::arena::Arena`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Store {
    arena: Lock<Arena>,
    dtype: Dtype,
    token_bytes: usize,
    num_kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
}

/// What attention computes with beside tensors.
pub(crate) struct Numbers<'a> {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub sinks: Option<&'a [f32]>,
    pub threads: usize,
    pub apply_factor: bool,
}

impl Store {
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// A guard never outlives the release of the GIL around it, so waiting for one cannot be waiting for ourselves.
    pub fn read<R: Send>(&self, py: Python<'_>, bytes: usize, f: impl FnOnce(&Arena) -> R + Send) -> R {
        if bytes < SMALL
            && let Some(arena) = self.arena.try_read()
        {
            fault::may_panic();
            return f(&arena);
        }
        // A panic while writing leaves tokens half written but the memory sound.
        py.detach(|| {
            let arena = self.arena.read();
            fault::may_panic();
            f(&arena)
        })
    }

    pub(crate) fn write_with<R: Send>(
        &self,
        py: Python<'_>,
        bytes: usize,
        f: impl FnOnce(&mut Arena) -> R + Send,
    ) -> R {
        if bytes < SMALL
            && let Some(mut arena) = self.arena.try_write()
        {
            fault::may_panic();
            return f(&mut arena);
        }
        py.detach(|| {
            let mut arena = self.arena.write();
            fault::may_panic();
            f(&mut arena)
        })
    }

    pub(crate) fn append_views(&self, py: Python<'_>, k: &View<'_>, v: &View<'_>, step: &Step) -> PyResult<()> {
        let step = &step.inner;
        let tokens: usize = step.new_lens.iter().sum::<usize>() + step.copies.len() * 64;
        self.write_with(py, tokens * self.token_bytes, |arena| arena.append(k, v, step)).map_err(to_py)
    }

    fn runs_bytes(&self, runs: &[Run]) -> usize {
        runs.iter().map(|r| r.hi.saturating_sub(r.lo) as usize).sum::<usize>() * self.token_bytes
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_into(
        &self,
        py: Python<'_>,
        q: &Bound<'_, PyAny>,
        step: &Step,
        rope: Option<&Rope>,
        scale: f32,
        softcap: Option<f32>,
        sinks: Option<PyReadonlyArray1<'_, f32>>,
        out: &Bound<'_, PyAny>,
        mut lse: Option<PyReadwriteArray3<'_, f32>>,
        threads: usize,
        apply_factor: bool,
        mass: Option<&mut [f32]>,
    ) -> PyResult<()> {
        let q = Input::new("q", q)?;
        let view = q.view("q")?;
        let [rows, heads, queries, _] = view.shape();
        let mut out = Output::new("out", out)?;
        out.expect("out", &[rows, queries, heads, self.value_dim])?;
        let out = out.elems("out")?;
        if let Some(lse) = &lse
            && lse.shape() != [rows, heads, queries]
        {
            let expected = format!("{:?}", [rows, heads, queries]);
            return Err(to_py(Error::Shape { what: "lse", expected, got: format!("{:?}", lse.shape()) }));
        }
        let lse = match &mut lse {
            Some(lse) => Some(lse.as_slice_mut().map_err(|_| strided("lse"))?),
            None => None,
        };
        let sinks = sink_logits(&sinks)?;
        let numbers = Numbers { scale, softcap, sinks, threads, apply_factor };
        self.attend_views(py, view, step, rope, &numbers, out, lse, mass)
    }

    /// `q` (`[rows, heads, queries, channels]`) to `out` (`[rows, queries, heads, channels]`).
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend_views(
        &self,
        py: Python<'_>,
        q: View<'_>,
        step: &Step,
        rope: Option<&Rope>,
        numbers: &Numbers<'_>,
        out: ElemsMut<'_>,
        lse: Option<&mut [f32]>,
        mass: Option<&mut [f32]>,
    ) -> PyResult<()> {
        let spans = spans(step)?;
        let trig = rope.map(|rope| py.detach(|| step.trig(rope, spans)));
        let trig: Option<&SpanTrig> = trig.as_deref();
        let level = isa().map_err(to_py)?;
        let Numbers { scale, softcap, sinks, threads, apply_factor } = *numbers;
        let args = Attend { q, spans, trig, scale, softcap, sinks, apply_factor, threads, level };
        let bytes = if spans.spans.len() > 256 { SMALL } else { mass_len(spans, 1) * self.token_bytes };
        let signals = Signals::default();
        let done = self.read(py, bytes, |arena| attend_unless(arena, &args, out, lse, mass, &|| signals.arrived()));
        done.map_err(|err| signals.error(err))
    }
}

pub fn strided(what: &'static str) -> PyErr {
    to_py(Error::Shape { what, expected: "a C-contiguous array".to_string(), got: "a strided one".to_string() })
}

/// Learned logits that take part in the normalisation, as a slice.
pub fn sink_logits<'a>(given: &'a Option<PyReadonlyArray1<'_, f32>>) -> PyResult<Option<&'a [f32]>> {
    given.as_ref().map(|logits| logits.as_slice().map_err(|_| strided("sinks"))).transpose()
}

/// Refuses what is not given for each row of a step.
pub fn check_rows(given: usize, step: &kvsieve_core::plan::Step) -> PyResult<()> {
    if given == step.num_rows {
        return Ok(());
    }
    let expected = format!("{} rows", step.num_rows);
    Err(to_py(Error::Shape { what: "rows", expected, got: given.to_string() }))
}

pub fn spans(step: &Step) -> PyResult<&Spans> {
    let missing = Error::Unsupported("this step is for prefill: it has no spans");
    step.inner.spans.as_ref().ok_or_else(|| to_py(missing))
}

/// Three equally long arrays as runs.
fn runs(
    blocks: &PyReadonlyArray1<'_, i64>,
    lo: &PyReadonlyArray1<'_, i64>,
    hi: &PyReadonlyArray1<'_, i64>,
) -> Result<Vec<Run>> {
    let (blocks, lo, hi) = (blocks.as_array(), lo.as_array(), hi.as_array());
    if blocks.len() != lo.len() || blocks.len() != hi.len() {
        let got = format!("{}, {} and {}", blocks.len(), lo.len(), hi.len());
        return Err(Error::Shape { what: "blocks, lo, hi", expected: "equal lengths".to_string(), got });
    }
    let int = |what, x: i64| {
        u32::try_from(x).map_err(|_| Error::OutOfRange { what, expected: "a 32-bit count", got: x.to_string() })
    };
    blocks
        .iter()
        .zip(lo.iter().zip(hi))
        .map(|(&b, (&lo, &hi))| Ok(Run { block: BlockId(int("block", b)?), lo: int("lo", lo)?, hi: int("hi", hi)? }))
        .collect()
}

/// Rows of (block, lo, hi) as runs.
fn run_rows(what: &'static str, table: &PyReadonlyArray2<'_, i64>) -> Result<Vec<Run>> {
    if table.shape()[1] != 3 {
        return Err(Error::Shape { what, expected: "[n, 3]".to_string(), got: format!("{:?}", table.shape()) });
    }
    let int = |x: i64| {
        u32::try_from(x).map_err(|_| Error::OutOfRange { what, expected: "32-bit counts", got: x.to_string() })
    };
    let rows = table.as_array();
    rows.rows().into_iter().map(|r| Ok(Run { block: BlockId(int(r[0])?), lo: int(r[1])?, hi: int(r[2])? })).collect()
}

#[pymethods]
impl Store {
    #[new]
    fn new(num_kv_heads: usize, key_dim: usize, value_dim: usize, dtype: &str) -> PyResult<Self> {
        let dtype = Dtype::parse(dtype).map_err(to_py)?;
        let arena = Arena::new(num_kv_heads, key_dim, value_dim, dtype).map_err(to_py)?;
        let token_bytes = arena.token_bytes();
        Ok(Store { arena: Lock::new(arena), dtype, token_bytes, num_kv_heads, key_dim, value_dim })
    }

    /// Makes the step's copies, then stores its new tokens from `k` and `v` (`[rows, heads, columns, channels]`).
    fn append(&self, py: Python<'_>, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>, step: &Step) -> PyResult<()> {
        let (k, v) = (Input::new("k", k)?, Input::new("v", v)?);
        self.append_views(py, &k.view("k")?, &v.view("v")?, step)
    }

    /// Applies the moves in order.
    fn apply(&self, py: Python<'_>, moves: &Moves) -> PyResult<()> {
        let moves = &moves.inner;
        let bytes = moves.iter().map(|m| m.len as usize).sum::<usize>() * self.token_bytes;
        self.write_with(py, bytes, |arena| arena.apply(moves)).map_err(to_py)
    }

    /// Attends every query of the step to its spans: `q` `[rows, heads, queries, channels]`, `out` `[rows, queries, heads, channels]`,
    /// `lse` `[rows, heads, queries]`.
    #[pyo3(signature = (q, step, rope, scale, softcap, sinks, out, lse=None, threads=1, apply_factor=false))]
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python<'_>,
        q: &Bound<'_, PyAny>,
        step: &Step,
        rope: Option<&Rope>,
        scale: f32,
        softcap: Option<f32>,
        sinks: Option<PyReadonlyArray1<'_, f32>>,
        out: &Bound<'_, PyAny>,
        lse: Option<PyReadwriteArray3<'_, f32>>,
        threads: usize,
        apply_factor: bool,
    ) -> PyResult<()> {
        self.attend_into(py, q, step, rope, scale, softcap, sinks, out, lse, threads, apply_factor, None)
    }

    /// As `attend`; returns for each item (`row * queries + query`) an array `[kv_heads, keys in the order of the spans]` with the
    /// probability of each key, summed over the query heads of the group.
    #[pyo3(signature = (q, step, rope, scale, softcap, sinks, out, lse=None, threads=1, apply_factor=false))]
    #[allow(clippy::too_many_arguments)]
    fn attend_mass<'py>(
        &self,
        py: Python<'py>,
        q: &Bound<'_, PyAny>,
        step: &Step,
        rope: Option<&Rope>,
        scale: f32,
        softcap: Option<f32>,
        sinks: Option<PyReadonlyArray1<'_, f32>>,
        out: &Bound<'_, PyAny>,
        lse: Option<PyReadwriteArray3<'_, f32>>,
        threads: usize,
        apply_factor: bool,
    ) -> PyResult<Vec<Bound<'py, PyArray2<f32>>>> {
        let spans = spans(step)?;
        let heads = self.num_kv_heads;
        let mut mass = vec![0f32; mass_len(spans, heads)];
        let to = Some(&mut mass[..]);
        self.attend_into(py, q, step, rope, scale, softcap, sinks, out, lse, threads, apply_factor, to)?;
        let mut rest = &mass[..];
        let items = spans.starts.windows(2).map(|w| &spans.spans[w[0] as usize..w[1] as usize]);
        items
            .map(|item| {
                let keys: usize = item.iter().map(|s| (s.hi - s.lo) as usize).sum();
                let (mine, others) = rest.split_at(keys * heads);
                rest = others;
                PyArray1::from_slice(py, mine).reshape([heads, keys])
            })
            .collect()
    }

    /// Copies the tokens of the runs to rows `at..` of `k_out` and `v_out`, each `[heads, tokens, channels]`; with `spilled` also those of
    /// blocks that are in a file only.
    #[pyo3(signature = (blocks, lo, hi, k_out, v_out, at=0, spilled=false))]
    #[allow(clippy::too_many_arguments)]
    fn gather(
        &self,
        py: Python<'_>,
        blocks: PyReadonlyArray1<'_, i64>,
        lo: PyReadonlyArray1<'_, i64>,
        hi: PyReadonlyArray1<'_, i64>,
        k_out: &Bound<'_, PyAny>,
        v_out: &Bound<'_, PyAny>,
        at: usize,
        spilled: bool,
    ) -> PyResult<()> {
        let runs = runs(&blocks, &lo, &hi).map_err(to_py)?;
        let (mut k, mut v) = (Output::new("k_out", k_out)?, Output::new("v_out", v_out)?);
        let total = token_axis("k_out", k.shape(), self.num_kv_heads)?;
        if token_axis("v_out", v.shape(), self.num_kv_heads)? != total {
            let (expected, got) = (format!("{total} tokens"), format!("{:?}", v.shape()));
            return Err(to_py(Error::Shape { what: "v_out", expected, got }));
        }
        let (k, v) = (k.elems("k_out")?, v.elems("v_out")?);
        let bytes = if spilled { SMALL } else { self.runs_bytes(&runs) };
        let gather = |arena: &Arena| {
            if spilled { arena.gather_any(&runs, k, v, at, total) } else { arena.gather(&runs, k, v, at, total) }
        };
        self.read(py, bytes, gather).map_err(to_py)
    }

    /// Stores saved tokens, `[heads, tokens, channels]`, at the slots of the runs: the inverse of `gather`.
    fn write(
        &self,
        py: Python<'_>,
        blocks: PyReadonlyArray1<'_, i64>,
        lo: PyReadonlyArray1<'_, i64>,
        hi: PyReadonlyArray1<'_, i64>,
        k_in: &Bound<'_, PyAny>,
        v_in: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let runs = runs(&blocks, &lo, &hi).map_err(to_py)?;
        let (k, v) = (Input::new("k_in", k_in)?, Input::new("v_in", v_in)?);
        token_axis("k_in", k.shape(), self.num_kv_heads)?;
        token_axis("v_in", v.shape(), self.num_kv_heads)?;
        let (k, v) = (k.elems("k_in")?, v.elems("v_in")?);
        let bytes = self.runs_bytes(&runs);
        self.write_with(py, bytes, |arena| arena.write(&runs, k, v)).map_err(to_py)
    }

    /// Each head keeps residents of its own: resident `keep[head, j]` of the first runs goes to slot `j` of the second ones. Runs are
    /// int64 `[n, 3]` of (block, lo, hi); `keep` is int64 `[heads, tokens of the second runs]`.
    fn permute(
        &self,
        py: Python<'_>,
        source: PyReadonlyArray2<'_, i64>,
        keep: PyReadonlyArray2<'_, i64>,
        to: PyReadonlyArray2<'_, i64>,
    ) -> PyResult<()> {
        let (from, to) = (run_rows("source", &source).map_err(to_py)?, run_rows("to", &to).map_err(to_py)?);
        if keep.shape()[0] != self.num_kv_heads {
            let (expected, got) = (format!("[{}, tokens]", self.num_kv_heads), format!("{:?}", keep.shape()));
            return Err(to_py(Error::Shape { what: "keep", expected, got }));
        }
        let keep = keep.as_slice().map_err(|_| strided("keep"))?;
        self.write_with(py, self.runs_bytes(&to), |arena| arena.permute(&from, keep, &to)).map_err(to_py)
    }

    /// Frees memory that holds no block in use; `in_use` is indexed by block, `packed_in_use` by packed block from 0.
    #[pyo3(signature = (in_use, packed_in_use=None))]
    fn free_unused(
        &self,
        py: Python<'_>,
        in_use: PyReadonlyArray1<'_, bool>,
        packed_in_use: Option<PyReadonlyArray1<'_, bool>>,
    ) -> PyResult<()> {
        let in_use = in_use.as_slice().map_err(|_| strided("in_use"))?;
        let packed = match &packed_in_use {
            Some(packed) => packed.as_slice().map_err(|_| strided("packed_in_use"))?,
            None => &[],
        };
        self.write_with(py, SMALL, |arena| arena.free_unused(in_use, packed));
        Ok(())
    }

    /// How this layer packs: kept channels a key, bits of a key's and a value's code (0 for none), numbers that share a scale.
    fn set_packing(
        &self,
        py: Python<'_>,
        key_kept: usize,
        key_bits: u32,
        value_bits: u32,
        group: usize,
    ) -> PyResult<()> {
        let packing = Packing { key_kept, key_bits, value_bits, group };
        self.write_with(py, 0, |arena| arena.set_packing(packing)).map_err(to_py)
    }

    /// Makes moves from plain to packed blocks. `channels` is `[heads, kept]`, `-1 - c` to store zeros for channel `c`, and `pairs`
    /// `[heads]`, how many rotary pairs come first; or the packed block `like` names the channels.
    #[pyo3(signature = (moves, channels=None, pairs=None, like=None))]
    fn pack(
        &self,
        py: Python<'_>,
        moves: &Moves,
        channels: Option<PyReadonlyArray2<'_, i64>>,
        pairs: Option<Vec<usize>>,
        like: Option<u32>,
    ) -> PyResult<()> {
        let chosen = match (channels, like) {
            (Some(channels), None) => {
                let heads = channels.shape()[0];
                let index = copied(&channels)?;
                let pairs = pairs.unwrap_or_else(|| vec![0; heads]);
                if pairs.len() != heads {
                    let (expected, got) = (format!("{heads} heads"), format!("{}", pairs.len()));
                    return Err(to_py(Error::Shape { what: "pairs", expected, got }));
                }
                Chosen::New(Arc::new(Channels::new(&index, &pairs, self.key_dim).map_err(to_py)?))
            }
            (None, Some(block)) => Chosen::Like(BlockId(block)),
            _ => return Err(to_py(Error::Unsupported("pass either channels, or a block whose channels to take"))),
        };
        let moves = &moves.inner;
        let bytes = moves.iter().map(|m| m.len as usize).sum::<usize>() * self.token_bytes;
        self.write_with(py, bytes, |arena| arena.pack(moves, &chosen)).map_err(to_py)
    }

    /// The channels that a packed block keeps, as `pack` takes them.
    fn channels<'py>(&self, py: Python<'py>, block: u32) -> PyResult<(Bound<'py, PyArray2<i64>>, Vec<usize>)> {
        let found = self.read(py, 0, |arena| match arena.packed() {
            Some(packed) if BlockId(block).is_packed() => packed.channels_of(BlockId(block)).map(Arc::clone),
            _ => Err(Error::BadBlock { block, have: 0 }),
        });
        let channels = found.map_err(to_py)?;
        let index = PyArray1::from_vec(py, channels.signed()).reshape([channels.heads(), channels.kept()])?;
        Ok((index, (0..channels.heads()).map(|head| channels.pairs(head)).collect()))
    }

    /// Bytes held of plain keys, plain values, packed keys, packed values, scales, channel numbers, and bounds of blocks.
    fn bytes_by_part(&self, py: Python<'_>) -> [usize; 7] {
        self.read(py, 0, |arena| {
            let ((keys, values), packed) = (arena.plain_bytes(), arena.packed_bytes());
            [keys, values, packed.keys, packed.values, packed.scales, packed.channels, arena.bounds_bytes()]
        })
    }

    /// Exactly what the allocator was asked for.
    #[getter]
    fn bytes(&self, py: Python<'_>) -> usize {
        self.read(py, 0, Arena::bytes)
    }

    /// Channels of a value.
    #[getter]
    fn get_value_dim(&self) -> usize {
        self.value_dim
    }

    /// Blocks that have memory.
    #[getter]
    fn num_blocks(&self, py: Python<'_>) -> u32 {
        self.read(py, 0, Arena::num_blocks)
    }
}

fn token_axis(what: &'static str, shape: &[usize], heads: usize) -> PyResult<usize> {
    match shape {
        [h, tokens, _] if *h == heads => Ok(*tokens),
        _ => {
            let expected = format!("[{heads}, tokens, channels]");
            Err(to_py(Error::Shape { what, expected, got: format!("{shape:?}") }))
        }
    }
}

impl Step {
    /// The rotations for this step's spans: the first layer that asks makes them, the others find them.
    pub fn trig(&self, rope: &Rope, spans: &Spans) -> Arc<SpanTrig> {
        let mut made = self.trig.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, trig)) = made.iter().find(|(id, _)| *id == rope.id) {
            return Arc::clone(trig);
        }
        let trig = Arc::new(SpanTrig::new(spans, &rope.inner));
        made.push((rope.id, Arc::clone(&trig)));
        trig
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Store>()?;
    m.add("BLOCK", kvsieve_core::ids::BLOCK)?;
    m.add("PACKED", kvsieve_core::ids::PACKED)?;
    Ok(())
}
