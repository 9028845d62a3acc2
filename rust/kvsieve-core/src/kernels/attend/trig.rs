//! The rotations of a step.

use std::collections::HashMap;
use std::sync::Arc;

use crate::plan::Spans;
use crate::rope::Rope;

/// The rotations that one step's spans need: made once, used by every layer and head that shares the rope.
#[derive(Debug)]
pub struct SpanTrig {
    pub(super) rope: Arc<Rope>,
    /// For each span which of the rotations below, plus one; 0 when the shift is 0.
    pub(super) variant: Vec<u32>,
    /// For each distinct shift cosines, then sines.
    pub(super) table: Vec<f32>,
}

impl SpanTrig {
    pub fn new(spans: &Spans, rope: &Arc<Rope>) -> Self {
        let mut seen: HashMap<i64, u32> = HashMap::from([(0, 0)]);
        let mut table = Vec::new();
        let mut last = (0, 0);
        let variant = spans.spans.iter().map(|span| {
            if span.shift != last.0 {
                let next = seen.len() as u32;
                let number = *seen.entry(span.shift).or_insert_with(|| {
                    rope.push_trig(span.shift, &mut table);
                    next
                });
                last = (span.shift, number);
            }
            last.1
        });
        let variant = variant.collect();
        SpanTrig { rope: Arc::clone(rope), variant, table }
    }

    /// [`SpanTrig::new`] for thousands of shifts, as short spans here and there have them. From tables that all calls share, so a
    /// rotation may be off by a rounding.
    pub(crate) fn of_many(spans: &Spans, rope: &Arc<Rope>) -> Self {
        let most = spans.spans.iter().map(|span| span.shift).max().unwrap_or(0);
        let least = spans.spans.iter().map(|span| span.shift).min().unwrap_or(0);
        if least < 0 || most > MANY {
            return SpanTrig::new(spans, rope);
        }
        let (distances, width) = (rope.distances(most), rope.rotary_dim());
        let mut seen = vec![0u32; most as usize + 1];
        let (mut table, mut num) = (Vec::new(), 0);
        let variant = spans.spans.iter().map(|span| {
            let number = &mut seen[span.shift as usize];
            if *number == 0 && span.shift != 0 {
                num += 1;
                *number = num;
                let at = table.len();
                table.resize(at + width, 0.0);
                distances.trig(span.shift, &mut table[at..]);
            }
            *number
        });
        let variant = variant.collect();
        SpanTrig { rope: Arc::clone(rope), variant, table }
    }

    pub fn rope(&self) -> &Arc<Rope> {
        &self.rope
    }
}

/// Shifts up to here are looked up in a list.
const MANY: i64 = 1 << 22;
