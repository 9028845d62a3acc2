//! Keeping the tokens with the highest scores.

use crate::budget::Budget;
use crate::error::{Error, Result};
use std::cmp::Ordering;

/// Highest score first, an unknown score last, and of equal scores the older token first.
pub(crate) fn better(scores: &[f32], a: usize, b: usize) -> Ordering {
    let (x, y) = (scores[a], scores[b]);
    let by_score = y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()));
    by_score.then(a.cmp(&b))
}

/// The best `count` of `candidates`, in no order.
fn best(scores: &[f32], mut candidates: Vec<usize>, count: usize) -> Vec<usize> {
    if count > 0 && count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, |&a, &b| better(scores, a, b));
    }
    candidates.truncate(count);
    candidates
}

/// The sinks, the recent tokens and the best of the rest. The last `protected_tail` tokens, whose scores are not known yet, stay like
/// recent ones as long as the budget allows.
pub fn keep(scores: &[f32], budget: Budget, protected_tail: usize) -> Result<Vec<usize>> {
    let budget = budget.check()?;
    let n = scores.len();
    if n <= budget.total {
        return Ok((0..n).collect());
    }
    let room = budget.total - budget.sinks;
    let tail = budget.recent.max(protected_tail).min(room);
    let middle = (budget.sinks..n - tail).collect();
    let mut kept: Vec<usize> = (0..budget.sinks).collect();
    kept.extend(best(scores, middle, room - tail));
    kept.sort_unstable();
    kept.extend(n - tail..n);
    Ok(kept)
}

/// The rule of the published code: room is made for `incoming` tokens out of the places for high scores; sinks take part in the
/// ranking although they stay anyway; places that this leaves open go to the newest tokens.
pub fn keep_published(
    scores: &[f32],
    sinks: usize,
    entropy_slots: usize,
    recent: usize,
    incoming: usize,
) -> Result<Vec<usize>> {
    let n = scores.len();
    let budget = sinks.saturating_add(entropy_slots).saturating_add(recent);
    if n.saturating_add(incoming) <= budget {
        return Ok((0..n).collect());
    }
    let room = budget.checked_sub(incoming).filter(|&room| room >= sinks);
    let Some(room) = room else {
        return Err(Error::OutOfRange {
            what: "incoming",
            expected: "at most the budget without its sinks",
            got: incoming.to_string(),
        });
    };
    let mut kept = vec![false; n];
    kept[..sinks].fill(true);
    for i in best(scores, (0..n).collect(), entropy_slots.saturating_sub(incoming)) {
        kept[i] = true;
    }
    let mut open = room - kept.iter().filter(|&&k| k).count();
    for slot in kept.iter_mut().rev() {
        if open == 0 {
            break;
        }
        if !*slot {
            *slot = true;
            open -= 1;
        }
    }
    Ok((0..n).filter(|&i| kept[i]).collect())
}
