//! Four keys, wherever they lie, against a few queries: what a search and the decode kernel have in common.

use half::bf16;

use crate::kernels::simd::{Elem, Simd};

/// Rows of queries, `width` apart.
#[derive(Clone, Copy)]
pub(super) struct Queries {
    /// Zero beyond the channels.
    pub wide: *const f32,
    /// The same as `bf16`, where products of those are asked for.
    pub dots: *const bf16,
    pub width: usize,
}

impl Queries {
    /// Those from the `h`-th on.
    #[inline(always)]
    pub fn from(self, h: usize) -> Self {
        let Queries { wide, dots, width } = self;
        Queries { wide: wide.wrapping_add(h * width), dots: dots.wrapping_add(h * width), width }
    }
}

/// Four keys, wherever they lie, against `HB` queries: four scores for each, `stride` apart.
///
/// # Safety
/// As for [`Simd`]; four keys of `dim` elements, `HB` queries, and room for their scores; `dots` are filled if `DOTS`, and then `dim`
/// is a multiple of `2 * LANES`.
#[inline(always)]
pub(super) unsafe fn four<S: Simd, E: Elem, const HB: usize, const DOTS: bool>(
    keys: [*const E; 4],
    queries: &Queries,
    dim: usize,
    scores: *mut f32,
    stride: usize,
) {
    let Queries { wide, dots, width } = *queries;
    let whole = dim / S::LANES * S::LANES;
    // SAFETY: channels below `dim`, the last few by a partial load; queries are padded with zeros to whole vectors.
    unsafe {
        let mut acc = [[S::splat(0.0); 4]; HB];
        if DOTS {
            let mut c = 0;
            while c < dim {
                for (i, acc) in acc.iter_mut().enumerate() {
                    for j in 0..4 {
                        acc[j] = S::dot_bf16(acc[j], keys[j].cast::<bf16>().add(c), dots.add(i * width + c));
                    }
                }
                c += 2 * S::LANES;
            }
        } else {
            let mut c = 0;
            while c < whole {
                let mut x = [S::splat(0.0); 4];
                for j in 0..4 {
                    x[j] = E::load::<S>(keys[j].add(c));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let q = S::load(wide.add(i * width + c));
                    for j in 0..4 {
                        acc[j] = S::fma(x[j], q, acc[j]);
                    }
                }
                c += S::LANES;
            }
            if whole < dim {
                for j in 0..4 {
                    let x = E::load_part::<S>(keys[j].add(whole), dim - whole);
                    for (i, acc) in acc.iter_mut().enumerate() {
                        acc[j] = S::fma(x, S::load(wide.add(i * width + whole)), acc[j]);
                    }
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            S::sum4(scores.add(i * stride), acc);
        }
    }
}
