//! Renders what the rows hold as spans and parts.

use super::row::Row;
use crate::ids::Position;
use crate::place::Rule;
use crate::place::parts::Source;
use crate::place::spans::Reader;
use crate::place::view::{Keys, View};
use crate::plan::{Frame, Part, Spans};

/// The keys of memory `m`, of which the last `appended` are new already (first memory only).
fn keys(row: &Row, m: usize, num_new: usize, appended: usize) -> Keys<'_> {
    let positions = row.tables[m].positions();
    let (residents, num_new) = if m == 0 {
        (&positions[..positions.len() - appended], num_new)
    } else {
        (positions, 0)
    };
    Keys {
        residents,
        first_new: row.seen,
        num_new,
    }
}

/// The parts of one row, before its new tokens are appended. With `only_top_k`, only of memories read by selection.
pub(super) fn parts(index: usize, row: &Row, rules: &[Rule], num_new: usize, only_top_k: bool, out: &mut Vec<Part>) {
    if only_top_k && rules.iter().all(|r| r.top_k == 0) {
        return;
    }
    let mut earlier = vec![0; num_new];
    for (m, rule) in rules.iter().enumerate() {
        let keys = keys(row, m, num_new, 0);
        if !only_top_k || rule.top_k > 0 {
            let table = &row.tables[m];
            Source {
                row: index,
                memory: m,
                table,
                keys,
                rule,
                num_queries: num_new,
                earlier: &earlier,
            }
            .parts(out);
        }
        for (i, slot) in earlier.iter_mut().enumerate() {
            *slot += View::new(&keys, rule, i).visible_before();
        }
    }
}

/// The spans of all queries, after all new tokens are appended.
pub(super) fn spans(rows: &[Row], rules: &[Rule], frame: Frame, new_lens: &[usize], num_queries: usize) -> Spans {
    let mut out = Spans {
        num_rows: rows.len(),
        num_queries,
        starts: vec![0],
        spans: Vec::new(),
    };
    for (row, &num_new) in rows.iter().zip(new_lens) {
        let pads = num_queries - num_new;
        out.starts.extend(std::iter::repeat_n(out.spans.len() as u32, pads));
        for i in 0..num_new {
            query_spans(row, rules, frame, num_new, i, &mut out);
            out.starts.push(out.spans.len() as u32);
        }
    }
    out
}

fn query_spans(row: &Row, rules: &[Rule], frame: Frame, num_new: usize, i: usize, out: &mut Spans) {
    let start = out.spans.len();
    let query: Position = row.seen + i as u64;
    let mut slot = 0;
    for (m, rule) in rules.iter().enumerate() {
        let view = View::new(&keys(row, m, num_new, num_new), rule, i);
        slot += view.visible_before();
        if rule.top_k > 0 {
            continue;
        }
        let table = &row.tables[m];
        out.spans.reserve(table.runs().len());
        Reader {
            frame,
            rule,
            view,
            query,
            slot,
            positions: table.positions(),
        }
        .read(table.runs(), start, &mut out.spans);
    }
}
