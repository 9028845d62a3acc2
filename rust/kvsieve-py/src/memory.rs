//! What a memory of a planner is made of. Every rule has a constructor with its own arguments, so that no others can be given.

use kvsieve_core::budget::Budget;
use kvsieve_core::evict;
use kvsieve_core::planner::MemorySpec;
use kvsieve_core::position;
use pyo3::prelude::*;

/// An eviction rule, in tokens.
#[pyclass(frozen, module = "kvsieve._core")]
#[derive(Clone, Copy)]
pub struct Eviction {
    rule: evict::Eviction,
}

#[pymethods]
impl Eviction {
    /// Evicts nothing.
    #[staticmethod]
    fn keep_all() -> Self {
        Self { rule: evict::Eviction::KeepAll }
    }

    /// Keeps the first `sinks` and the last `window` tokens.
    #[staticmethod]
    fn window(sinks: usize, window: usize) -> Self {
        Self { rule: evict::Eviction::Window { sinks, window } }
    }

    /// Keeps sinks, recent tokens and those with the highest scores; `published`: by the rule of the published code.
    #[staticmethod]
    #[pyo3(signature = (budget, sinks, recent, published = false))]
    fn surprisal(budget: usize, sinks: usize, recent: usize, published: bool) -> Self {
        Self { rule: evict::Eviction::Surprisal { budget: Budget { total: budget, sinks, recent }, published } }
    }

    /// Keeps what `Planner.keep` is told.
    #[staticmethod]
    fn own(budget: usize, sinks: usize, recent: usize) -> Self {
        Self { rule: evict::Eviction::Own { budget: Budget { total: budget, sinks, recent } } }
    }
}

/// At which distance a query sees a key.
#[pyclass(frozen, module = "kvsieve._core")]
#[derive(Clone, Copy)]
pub struct PositionRule {
    rule: position::PositionRule,
}

#[pymethods]
impl PositionRule {
    /// The true distance.
    #[staticmethod]
    fn original() -> Self {
        Self { rule: position::PositionRule::Original }
    }

    /// Visible keys are numbered without gaps.
    #[staticmethod]
    fn in_cache() -> Self {
        Self { rule: position::PositionRule::InCache }
    }

    /// The true distance, but `distance` for sinks that are further away than what is visible.
    #[staticmethod]
    fn capped(distance: u64) -> Self {
        Self { rule: position::PositionRule::Capped { distance } }
    }

    /// This one distance for every key.
    #[staticmethod]
    fn fixed(distance: u64) -> Self {
        Self { rule: position::PositionRule::Fixed { distance } }
    }
}

/// One memory of a chain.
#[pyclass(frozen, module = "kvsieve._core")]
pub struct Memory {
    pub spec: MemorySpec,
}

#[pymethods]
impl Memory {
    /// `visible`: keys that are no sinks are seen only below this true distance; `top_k`: only so many keys a head are read, for the last
    /// query; 0 for all.
    #[new]
    #[pyo3(signature = (evict, position, visible = None, top_k = 0))]
    fn new(evict: PyRef<'_, Eviction>, position: PyRef<'_, PositionRule>, visible: Option<u64>, top_k: usize) -> Self {
        Self { spec: MemorySpec { evict: evict.rule, position: position.rule, visible, top_k } }
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Eviction>()?;
    m.add_class::<PositionRule>()?;
    m.add_class::<Memory>()
}
