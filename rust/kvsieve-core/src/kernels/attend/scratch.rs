//! Memory that a thread keeps from unit to unit.

use super::tile::TILE;

/// A cache line, to align the scratch memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Memory that a thread keeps from unit to unit.
pub(super) struct Scratch {
    lines: Vec<Line>,
}

/// Bytes as `f32`s, cut into the parts that a unit needs.
pub(super) struct Parts<'a> {
    /// The queries of the group, `[group][width]`, zero beyond the channels.
    pub base: &'a mut [f32],
    /// The same in `bf16`, two to a float, where the kernel can make use of them.
    pub dots: &'a mut [f32],
    /// The same, rotated for the spans at hand.
    pub turned: &'a mut [f32],
    /// Keys of one span, rotated: `[TILE][width]`. For keys that lie as codes, queries times their steps.
    pub keys: &'a mut [f32],
    /// Scores and then weights, `[group][TILE]`.
    pub scores: &'a mut [f32],
    /// Sums, `[group][value_width]`.
    pub sums: &'a mut [f32],
    pub max: &'a mut [f32],
    pub total: &'a mut [f32],
    /// Queries of the kept channels, as `base` and as `dots`.
    pub thin: &'a mut [f32],
    pub thin_dots: &'a mut [f32],
    /// The rotations of the slots of a block, for the kept pairs of a head: `[pairs][2][BLOCK]`.
    pub thin_trig: &'a mut [f32],
    /// Values of one tile, from their codes, or weights times their steps: `[TILE][value_width]`.
    pub values: &'a mut [f32],
}

pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

impl Scratch {
    pub const fn new() -> Self {
        Scratch { lines: Vec::new() }
    }

    pub fn cut(&mut self, group: usize, width: usize, value_width: usize, packed: bool) -> Parts<'_> {
        let (queries, tile) = (group * width, TILE * width);
        let thin = |n: usize| if packed { n } else { 0 };
        let sizes = [
            queries,
            queries,
            queries,
            tile,
            group * TILE,
            group * value_width,
            padded(group),
            padded(group),
            thin(queries),
            thin(queries),
            thin(tile),
            thin(TILE * value_width),
        ];
        let need = sizes.iter().sum::<usize>();
        if self.lines.len() * 16 < need {
            self.lines.resize(need.div_ceil(16), Line([0.0; 16]));
        }
        let lines: &mut [[f32; 16]] = {
            // SAFETY: a `Line` is 16 floats in 64 bytes, without padding; the borrow is passed on whole.
            unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len()) }
        };
        let mut rest = lines.as_flattened_mut();
        let [base, dots, turned, keys, scores, sums, max, total, thin, thin_dots, thin_trig, values] = sizes.map(|n| {
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(n);
            rest = others;
            mine
        });
        Parts { base, dots, turned, keys, scores, sums, max, total, thin, thin_dots, thin_trig, values }
    }
}
