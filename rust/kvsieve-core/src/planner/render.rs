//! Renders what the rows hold as spans and parts.

use super::row::Row;
use crate::ids::Position;
use crate::plan::{Frame, NOWHERE, Part, Placing, Spans};
use crate::position::parts::Source;
use crate::position::spans::Reader;
use crate::position::view::{Keys, View};
use crate::position::{PositionRule, Rule};

/// The keys of memory `m`, of which the last `appended` are new already (first memory only).
fn keys(row: &Row, m: usize, num_new: usize, appended: usize) -> Keys<'_> {
    let positions = row.tables[m].positions();
    let (residents, num_new) =
        if m == 0 { (positions.first(positions.len() - appended), num_new) } else { (positions, 0) };
    Keys { residents, first_new: row.seen, num_new }
}

/// Keys in the memories after `m` that are counted as slots.
fn later(row: &Row, rules: &[Rule], m: usize) -> usize {
    let counted = |&(_, rule): &(usize, &Rule)| rule.position == PositionRule::InCache && rule.top_k == 0;
    rules.iter().enumerate().skip(m + 1).filter(counted).map(|(l, _)| row.tables[l].len()).sum()
}

/// The parts of one row, before its new tokens are appended. With `only_top_k`, only of memories read by selection.
pub(super) fn parts(index: usize, row: &Row, rules: &[Rule], num_new: usize, only_top_k: bool, out: &mut Vec<Part>) {
    if only_top_k && rules.iter().all(|r| r.top_k == 0) {
        return;
    }
    let mut earlier = vec![0; num_new];
    for m in 0..rules.len() {
        let (keys, (rule, pins)) = (keys(row, m, num_new, 0), row.rule(rules, m));
        if m > 0 && rule.top_k > 0 && matches!(rule.position, PositionRule::Fixed { .. }) {
            out.extend(middle(index, row, rules, m, num_new));
        } else if !only_top_k || rule.top_k > 0 {
            let table = &row.tables[m];
            let later = later(row, rules, m);
            let (rule, earlier) = (&rule, &earlier);
            Source { row: index, memory: m, table, keys, rule, pins, num_queries: num_new, earlier, later }.parts(out);
        }
        for (i, slot) in earlier.iter_mut().enumerate() {
            let view = View::new(&keys, &rule, pins, i);
            *slot += view.visible_before() - view.beyond;
        }
    }
}

/// A memory read by selection, by the last query. Whatever the first memory no longer shows that query will flow here after this
/// step, so it is offered now: otherwise a chunk's last token would miss what the chunk pushed out of the window.
fn middle(index: usize, row: &Row, rules: &[Rule], m: usize, num_new: usize) -> Option<Part> {
    let (rule, near) = (&rules[m], keys(row, 0, num_new, 0));
    let placing = match rule.position {
        PositionRule::Fixed { distance } | PositionRule::Capped { distance } => Placing::Fixed(distance as i64),
        PositionRule::Original | PositionRule::InCache => Placing::Relative,
    };
    let (own, last) = (keys(row, m, num_new, 0), num_new.checked_sub(1)?);
    let (first, pins) = row.rule(rules, 0);
    let view = View::new(&near, &first, pins, last);
    let (held, mut hidden) = (near.residents.len(), view.hidden());
    let mut runs = row.tables[m].runs().to_vec();
    let mut key_true: Vec<i64> = own.positions(0, own.len()).map(|p| p as i64).collect();
    for range in &hidden {
        let range = range.start.min(held)..range.end.min(held);
        key_true.extend(near.positions(range.start, range.end).map(|p| p as i64));
        runs.extend(row.tables[0].runs_of(range));
    }
    hidden.retain(|range| range.end > held);
    let new = hidden.first().map_or(held, |r| r.start.max(held))..hidden.last().map_or(held, |r| r.end);
    let shown = |i: usize| hidden.iter().any(|range| range.contains(&i));
    key_true.extend(
        new.clone().zip(near.positions(new.start, new.end)).map(|(i, p)| if shown(i) { p as i64 } else { NOWHERE }),
    );
    if key_true.is_empty() {
        return None;
    }
    let query_true: Vec<i64> = (0..num_new).map(|i| row.seen as i64 + i as i64).collect();
    Some(Part {
        row: index,
        memory: m,
        runs,
        new_lo: new.start - held,
        new_hi: new.end - held,
        key_positions: key_true.clone(),
        query_positions: query_true.clone(),
        key_true,
        query_true,
        near: i64::MAX,
        far: 0,
        placing,
        top_k: rule.top_k,
    })
}

/// The spans of all queries, after all new tokens are appended.
pub(super) fn spans(rows: &[Row], rules: &[Rule], frame: Frame, new_lens: &[usize], num_queries: usize) -> Spans {
    let mut out = Spans { num_rows: rows.len(), num_queries, starts: vec![0], spans: Vec::new() };
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
    let mut earlier = 0;
    for m in 0..rules.len() {
        let (rule, pins) = row.rule(rules, m);
        let view = View::new(&keys(row, m, num_new, num_new), &rule, pins, i);
        let slot = earlier + view.visible_before();
        earlier = slot - view.beyond;
        if rule.top_k > 0 {
            continue;
        }
        let table = &row.tables[m];
        out.spans.reserve(table.runs().len());
        Reader { frame, rule: &rule, view, query, slot, later: later(row, rules, m), positions: table.positions() }
            .read(table.runs(), start, &mut out.spans);
    }
}
