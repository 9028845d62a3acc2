//! Blocks of a store that lie in a file.

use std::path::PathBuf;
use std::sync::Arc;

use kvsieve_core::Result;
use kvsieve_core::ids::{BLOCK, BlockId, Run};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::tier::{self, Order};
use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use crate::error::to_py;
use crate::store::{SMALL, Store, strided};

/// The blocks of all layers of a stream that were written out; see `kvsieve_core::storage::tier`.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct TierFile {
    inner: Arc<tier::TierFile>,
}

#[pymethods]
impl TierFile {
    /// A file without a name in `folder`.
    #[new]
    fn new(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        let inner = py.detach(|| tier::TierFile::create(&folder)).map_err(to_py)?;
        Ok(TierFile { inner })
    }

    /// Bytes of the blocks in it, and of the file.
    fn bytes(&self, py: Python<'_>) -> (u64, u64) {
        py.detach(|| self.inner.bytes())
    }
}

/// The blocks of one store that may lie in a file.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Tier {
    store: Py<Store>,
}

impl Tier {
    /// Files are slow, so the GIL is always released.
    fn run(
        &self,
        py: Python<'_>,
        blocks: &PyReadonlyArray1<'_, i64>,
        f: impl FnOnce(&mut Arena, &[BlockId]) -> Result<()> + Send,
    ) -> PyResult<()> {
        let blocks = blocks.as_slice().map_err(|_| strided("blocks"))?;
        // A number that is no block's is in no store.
        let blocks: Vec<_> = blocks.iter().map(|&block| BlockId(u32::try_from(block).unwrap_or(u32::MAX))).collect();
        self.store.get().write_with(py, SMALL, |arena| f(arena, &blocks)).map_err(to_py)
    }
}

pub(crate) fn whole(blocks: &[BlockId]) -> Vec<Run> {
    blocks.iter().map(|&block| Run { block, lo: 0, hi: BLOCK }).collect()
}

#[pymethods]
impl Tier {
    /// About `capacity` full blocks of `store` are in memory; with `decay` those of the lowest scores leave it first; with
    /// `values_alone` keys stay, and values alone come and go.
    #[new]
    #[pyo3(signature = (store, file, capacity, decay=None, values_alone=false))]
    fn new(
        py: Python<'_>,
        store: Py<Store>,
        file: PyRef<'_, TierFile>,
        capacity: usize,
        decay: Option<f64>,
        values_alone: bool,
    ) -> PyResult<Self> {
        let (file, order) = (Arc::clone(&file.inner), decay.map_or(Order::Recency, |decay| Order::Scores { decay }));
        store.get().write_with(py, 0, |arena| arena.set_tier(file, capacity, order, values_alone)).map_err(to_py)?;
        Ok(Tier { store })
    }

    /// Writes full blocks to the file and gives their memory back; `later`: by the file's thread.
    #[pyo3(signature = (blocks, later=false))]
    fn spill(&self, py: Python<'_>, blocks: PyReadonlyArray1<'_, i64>, later: bool) -> PyResult<()> {
        self.run(py, &blocks, if later { Arena::spill_later } else { Arena::spill })
    }

    /// Has the system read blocks that are not in memory into its cache, and waits for nothing.
    fn prefetch(&self, py: Python<'_>, blocks: PyReadonlyArray1<'_, i64>) -> PyResult<()> {
        self.run(py, &blocks, |arena, blocks| arena.prefetch(&whole(blocks)))
    }

    /// Waits for the file's thread.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.store.get().write_with(py, SMALL, Arena::finish).map_err(to_py)
    }

    /// Makes blocks stay in memory until this thread fetches or trims again.
    fn fetch(&self, py: Python<'_>, blocks: PyReadonlyArray1<'_, i64>) -> PyResult<()> {
        self.run(py, &blocks, |arena, blocks| arena.fetch(&whole(blocks)))
    }

    /// Blocks stay in memory, whatever is fetched, until the next `trim`.
    fn hold(&self, py: Python<'_>, blocks: PyReadonlyArray1<'_, i64>) -> PyResult<()> {
        self.run(py, &blocks, Arena::hold)
    }

    /// A step is over: full blocks leave memory, as many as are too many, but never those of `keep`; `later` as for `spill`.
    #[pyo3(signature = (keep, later=false))]
    fn trim(&self, py: Python<'_>, keep: PyReadonlyArray1<'_, i64>, later: bool) -> PyResult<()> {
        self.run(py, &keep, if later { Arena::trim_later } else { Arena::trim })
    }

    /// A step is over in which blocks got so much attention.
    fn score(
        &self,
        py: Python<'_>,
        blocks: PyReadonlyArray1<'_, i64>,
        mass: PyReadonlyArray1<'_, f64>,
    ) -> PyResult<()> {
        let mass = mass.as_slice().map_err(|_| strided("mass"))?;
        self.run(py, &blocks, |arena, blocks| arena.score(blocks, mass))
    }

    /// Whether a block lies in the file and not in memory.
    fn is_spilled(&self, py: Python<'_>, block: u32) -> bool {
        self.store.get().read(py, 0, |arena| arena.is_spilled(BlockId(block)))
    }

    /// Blocks that were fetched and were in memory, blocks loaded, blocks written; bytes read, bytes written, bytes in the file.
    fn counts(&self, py: Python<'_>) -> (u64, u64, u64, u64, u64, u64) {
        self.store.get().read(py, 0, |arena| {
            let counts = arena.tier_counts();
            let moved = (counts.bytes_read, counts.bytes_written);
            (counts.hits, counts.loads, counts.spills, moved.0, moved.1, arena.tier_bytes())
        })
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<TierFile>()?;
    m.add_class::<Tier>()
}
