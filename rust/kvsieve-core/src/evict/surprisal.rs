//! Keeping the tokens with the highest scores.

use crate::budget::Budget;
use crate::error::{Error, Result};
use std::cmp::Ordering;
use std::ops::Range;

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

/// The sinks, the recent tokens, those that are `pinned` (ranges that ascend and do not overlap) and the best of the rest. The last
/// `protected_tail` tokens, whose scores are not known yet, stay like recent ones as long as the budget allows.
pub fn keep(scores: &[f32], budget: Budget, protected_tail: usize, pinned: &[Range<usize>]) -> Result<Vec<usize>> {
    let budget = budget.check()?;
    let n = scores.len();
    if n <= budget.total {
        return Ok((0..n).collect());
    }
    let mut kept: Vec<usize> = (0..budget.sinks).collect();
    let pinned = check_pinned(pinned, n, budget)?;
    let room = budget.total - budget.sinks;
    // Pinned tokens among the sinks and the newest ones stay anyway, and leave a place to the best.
    let tail = budget.recent.max(protected_tail).min(room - pinned.clone().count());
    kept.extend(pinned.clone().take_while(|&i| i < n - tail));
    let open = budget.total - tail - kept.len();
    let mut pinned = pinned.peekable();
    let middle = (budget.sinks..n - tail).filter(|i| pinned.next_if_eq(i).is_none()).collect();
    kept.extend(best(scores, middle, open));
    kept.sort_unstable();
    kept.extend(n - tail..n);
    Ok(kept)
}

/// The rule of the published code: room is made for `incoming` tokens out of the places for high scores; sinks take part in the
/// ranking although they stay anyway; places that this leaves open go to the newest tokens. Tokens that are `pinned` take places for
/// high scores, and take part in the ranking as sinks do.
pub fn keep_published(
    scores: &[f32],
    sinks: usize,
    entropy_slots: usize,
    recent: usize,
    incoming: usize,
    pinned: &[Range<usize>],
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
    let pinned = check_pinned(pinned, n, Budget { total: room, sinks, recent: 0 })?;
    let mut taken = 0;
    for i in pinned {
        kept[i] = true;
        taken += 1;
    }
    for i in best(scores, (0..n).collect(), entropy_slots.saturating_sub(incoming).saturating_sub(taken)) {
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

/// The pinned tokens that are no sinks, checked against what there is and what fits.
fn check_pinned(pinned: &[Range<usize>], n: usize, budget: Budget) -> Result<impl Iterator<Item = usize> + Clone> {
    let ascend = pinned.windows(2).all(|w| w[0].end <= w[1].start);
    if !ascend || pinned.last().is_some_and(|r| r.end > n) {
        let got = format!("{pinned:?} of {n}");
        return Err(Error::OutOfRange { what: "pinned", expected: "ascending ranges of the tokens", got });
    }
    let found = pinned.iter().cloned().flatten().skip_while(move |&i| i < budget.sinks);
    let count = found.clone().count();
    if count + budget.recent > budget.total - budget.sinks {
        let got = format!("{count} beside {} sinks and {} recent ones", budget.sinks, budget.recent);
        return Err(Error::OutOfRange { what: "pinned", expected: "no more tokens than the budget holds", got });
    }
    Ok(found)
}
