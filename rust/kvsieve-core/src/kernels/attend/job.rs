//! What is fixed for a unit before its first key is read.

use super::scratch::padded;
use super::units::Common;
use crate::kernels::simd::{Elem, Simd};
use crate::storage::packed::Packed;

/// A unit's sizes and circumstances. Constants, after inlining, where the head size is one.
pub(super) struct Job<'a, 'b> {
    pub common: &'b Common<'a>,
    pub kv_head: usize,
    pub dim: usize,
    pub value_dim: usize,
    /// The same, padded.
    pub width: usize,
    pub value_width: usize,
    pub group: usize,
    /// Where some blocks are packed.
    pub packed: Option<&'a Packed>,
    /// Whether queries meet plain keys as `bf16`.
    pub use_dots: bool,
}

impl<'a, 'b> Job<'a, 'b> {
    /// `D` is 0 or both dims, and 0 where there are packed blocks.
    #[inline(always)]
    pub fn new<S: Simd, E: Elem, const D: usize>(common: &'b Common<'a>, kv_head: usize) -> Self {
        let arena = common.arena;
        let (dim, value_dim) = if D > 0 { (D, D) } else { (arena.key_dim(), arena.value_dim()) };
        Job {
            common,
            kv_head,
            dim,
            value_dim,
            width: padded(dim),
            value_width: padded(value_dim),
            group: common.group,
            packed: arena.packed().filter(|_| D == 0),
            // Queries as they came and keys as they lie need no conversion where the machine multiplies `bf16`.
            use_dots: S::DOTS && E::IS_BF16 && dim.is_multiple_of(2 * S::LANES) && common.factor == 1.0,
        }
    }

    /// How often the loops go over a tile for all heads of the group.
    #[inline(always)]
    pub fn passes<S: Simd>(&self) -> usize {
        self.group.div_ceil(S::HEADS)
    }
}
