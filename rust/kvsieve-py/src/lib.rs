//! The thin binding: converts, releases the GIL, maps errors; nothing else.

use pyo3::prelude::*;

mod decode;
mod dense;
mod error;
mod heaviest;
mod kernels;
mod lent;
mod linear;
mod memory;
mod pieces;
mod plan;
mod planner;
mod select;
mod sets;
mod store;
mod tier;

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    kvsieve_core::fork::watch();
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    error::register(m)?;
    plan::register(m)?;
    memory::register(m)?;
    planner::register(m)?;
    store::register(m)?;
    select::register(m)?;
    sets::register(m)?;
    lent::register(m)?;
    decode::register(m)?;
    dense::register(m)?;
    heaviest::register(m)?;
    pieces::register(m)?;
    tier::register(m)?;
    kernels::register(m)?;
    linear::register(m)?;
    Ok(())
}
