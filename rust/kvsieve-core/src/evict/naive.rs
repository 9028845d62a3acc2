//! The naive twins of the retain rules: a full sort, a set, no shortcuts. Tests compare against them.

use crate::budget::Budget;
use std::collections::BTreeSet;

fn ranked(scores: &[f32], mut candidates: Vec<usize>) -> Vec<usize> {
    let key = |i: usize| if scores[i].is_nan() { (0, 0.0) } else { (1, scores[i]) };
    candidates.sort_by(|&a, &b| key(b).partial_cmp(&key(a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b)));
    candidates
}

/// Twin of [`super::surprisal::keep`]; `pinned` are tokens.
pub fn keep(scores: &[f32], budget: Budget, protected_tail: usize, pinned: &[usize]) -> Vec<usize> {
    let n = scores.len();
    if n <= budget.total {
        return (0..n).collect();
    }
    let taken = pinned.iter().filter(|&&i| i >= budget.sinks).count();
    let tail = budget.recent.max(protected_tail).min(budget.total - budget.sinks - taken);
    let mut kept: BTreeSet<usize> =
        (0..n).filter(|&i| i < budget.sinks || i + tail >= n || pinned.contains(&i)).collect();
    for i in ranked(scores, (0..n).collect()) {
        if kept.len() >= budget.total {
            break;
        }
        kept.insert(i);
    }
    kept.into_iter().collect()
}

/// Twin of [`super::surprisal::keep_published`]; the caller makes sure that sinks and pinned tokens fit.
pub fn keep_published(
    scores: &[f32],
    sinks: usize,
    slots: usize,
    recent: usize,
    incoming: usize,
    pinned: &[usize],
) -> Vec<usize> {
    let n = scores.len();
    let budget = sinks + slots + recent;
    if n + incoming <= budget {
        return (0..n).collect();
    }
    let taken = pinned.iter().filter(|&&i| i >= sinks).count();
    let top = ranked(scores, (0..n).collect()).into_iter().take(slots.saturating_sub(incoming).saturating_sub(taken));
    let mut kept: BTreeSet<usize> = (0..sinks).chain(top).chain(pinned.iter().copied()).collect();
    for j in (0..n).rev() {
        if kept.len() < budget - incoming {
            kept.insert(j);
        }
    }
    kept.into_iter().collect()
}
