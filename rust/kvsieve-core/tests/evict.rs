//! The retain rules: worked numbers, and agreement with their naive twins.

use super::common::cases;
use kvsieve_core::Error;
use kvsieve_core::budget::Budget;
use kvsieve_core::evict::{keep_window, naive, surprisal};
use proptest::prelude::*;
use std::ops::Range;

const E: [f32; 10] = [9., 1., 2., 0.5, 3., 0.1, 4., 0.2, 5., 0.3];

fn budget(total: usize, sinks: usize, recent: usize) -> Budget {
    Budget { total, sinks, recent }
}

#[test]
fn published_rule_lets_sinks_compete() {
    assert_eq!(surprisal::keep_published(&E, 2, 6, 0, 2, &[]), Ok(vec![0, 1, 4, 6, 8, 9]));
    assert_eq!(surprisal::keep_published(&E, 2, 4, 2, 2, &[]), Ok(vec![0, 1, 6, 7, 8, 9]));
    assert_eq!(surprisal::keep(&E, budget(6, 2, 0), 0, &[]), Ok(vec![0, 1, 2, 4, 6, 8]));
}

#[test]
fn published_rule_needs_room_for_its_sinks() {
    assert!(matches!(surprisal::keep_published(&E, 2, 4, 0, 5, &[]), Err(Error::OutOfRange { .. })));
    assert_eq!(surprisal::keep_published(&E, 2, 4, 0, 4, &[]), Ok(vec![0, 1]));
}

fn decayed(eta: f32, num_chunks: usize) -> Vec<&'static str> {
    let chunks: [&[(&str, f32)]; 4] = [
        &[("t0.0", 9.), ("t0.1", 1.), ("t0.2", 2.), ("t0.3", 0.5)],
        &[("t1.0", 6.), ("t1.1", 0.1), ("t1.2", 3.)],
        &[("t2.0", 2.5), ("t2.1", 2.2), ("t2.2", 0.3)],
        &[("t3.0", 0.4), ("t3.1", 0.2), ("t3.2", 0.1)],
    ];
    let mut held: Vec<(&str, f32)> = Vec::new();
    for (i, chunk) in chunks.iter().enumerate() {
        let scores: Vec<f32> = held.iter().map(|h| h.1).collect();
        let kept = surprisal::keep_published(&scores, 2, 6, 0, chunk.len(), &[]).expect("there is room");
        held = kept.iter().map(|&j| (held[j].0, held[j].1 * eta)).collect();
        if i == num_chunks {
            break;
        }
        held.extend_from_slice(chunk);
    }
    held.iter().map(|h| h.0).collect()
}

#[test]
fn decay_prefers_newer_scores() {
    for eta in [1.0, 0.5] {
        assert_eq!(decayed(eta, 2), ["t0.0", "t0.1", "t1.0", "t1.1", "t1.2"]);
    }
    assert_eq!(decayed(1.0, 3), ["t0.0", "t0.1", "t1.0", "t1.2", "t2.2"]);
    assert_eq!(decayed(0.5, 3), ["t0.0", "t0.1", "t1.0", "t2.0", "t2.2"]);
}

#[test]
fn window_keeps_both_ends() {
    assert_eq!(keep_window(10, 2, 3), [0, 1, 7, 8, 9]);
    assert_eq!(keep_window(5, 2, 3), [0, 1, 2, 3, 4]);
    assert_eq!(keep_window(4, 0, 1), [3]);
    assert_eq!(keep_window(2, usize::MAX, 1), [0, 1]);
}

#[test]
fn unknown_scores_rank_last_and_infinite_ones_first() {
    let scores = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -f32::NAN, 0.0];
    assert_eq!(surprisal::keep(&scores, budget(3, 0, 0), 0, &[]), Ok(vec![1, 2, 4]));
    assert_eq!(surprisal::keep(&scores, budget(4, 0, 0), 0, &[]), Ok(vec![0, 1, 2, 4]));
    assert_eq!(surprisal::keep(&scores, budget(2, 0, 1), 0, &[]), Ok(vec![2, 4]));
}

#[test]
fn protected_tail_never_breaks_the_budget() {
    assert_eq!(surprisal::keep(&[f32::NAN; 9], budget(4, 1, 1), 9, &[]), Ok(vec![0, 6, 7, 8]));
}

#[test]
fn budgets_that_cannot_be_right() {
    assert!(matches!(budget(0, 0, 0).check(), Err(Error::OutOfRange { what: "budget", .. })));
    assert_eq!(budget(4, 3, 2).check(), Err(Error::BudgetTooSmall { budget: 4, sinks: 3, recent: 2 }));
    assert!(matches!(budget(4, 4, 0).check(), Err(Error::OutOfRange { what: "budget", .. })));
    assert!(budget(usize::MAX, usize::MAX, 1).check().is_err());
    assert!(budget(5, 4, 1).check().is_ok());
}

/// Some of `n` tokens, at most `most` of them no sinks.
fn pinned(mask: u64, n: usize, sinks: usize, most: usize) -> Vec<usize> {
    let found: Vec<usize> = (0..n).filter(|&i| mask >> i & 1 == 1 && mask >> (i / 8) & 1 == 1).collect();
    let others = found.iter().copied().filter(|&i| i >= sinks).take(most);
    found.iter().copied().filter(|&i| i < sinks).chain(others).collect()
}

fn ranges(picked: &[usize]) -> Vec<Range<usize>> {
    picked.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[run.len() - 1] + 1).collect()
}

#[test]
fn pinned_tokens_take_the_places_of_high_scores() {
    assert_eq!(surprisal::keep(&E, budget(6, 2, 1), 0, &[3..4, 5..6]), Ok(vec![0, 1, 3, 5, 8, 9]));
    assert_eq!(surprisal::keep_published(&E, 2, 4, 0, 0, &[3..4, 5..6]), Ok(vec![0, 1, 3, 5, 8, 9]));
    for wrong in [[3..7, 8..9], [5..6, 3..4], [1..2, 9..11]] {
        let refused = surprisal::keep(&E, budget(6, 2, 1), 0, &wrong);
        assert!(matches!(refused, Err(Error::OutOfRange { what: "pinned", .. })), "{refused:?}");
    }
}

fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (0u8..12).prop_map(f32::from),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY)
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn keep_agrees_with_its_twin(
        scores in prop::collection::vec(score(), 0..60),
        (sinks, recent, more, tail) in (0usize..6, 0usize..6, 1usize..30, 0usize..20),
        mask in any::<u64>(),
    ) {
        let budget = budget(sinks + recent + more, sinks, recent);
        let pinned = pinned(mask, scores.len(), sinks, more);
        let kept = surprisal::keep(&scores, budget, tail, &ranges(&pinned)).unwrap();
        prop_assert_eq!(&kept, &naive::keep(&scores, budget, tail, &pinned));
        prop_assert!(pinned.iter().all(|i| kept.contains(i)));
        prop_assert_eq!(kept.len(), scores.len().min(budget.total));
        prop_assert!(kept.windows(2).all(|w| w[0] < w[1]));
        prop_assert!((0..sinks.min(scores.len())).all(|i| kept.contains(&i)));
        prop_assert!((scores.len().saturating_sub(recent)..scores.len()).all(|i| kept.contains(&i)));
    }

    #[test]
    fn published_agrees_with_its_twin(
        scores in prop::collection::vec(score(), 0..60),
        (sinks, slots, recent, incoming) in (0usize..6, 0usize..20, 0usize..6, 0usize..26),
        mask in any::<u64>(),
    ) {
        prop_assume!(incoming <= slots + recent);
        let pinned = pinned(mask, scores.len(), sinks, slots.saturating_sub(incoming));
        let kept = surprisal::keep_published(&scores, sinks, slots, recent, incoming, &ranges(&pinned)).unwrap();
        prop_assert_eq!(&kept, &naive::keep_published(&scores, sinks, slots, recent, incoming, &pinned));
        prop_assert!(pinned.iter().all(|i| kept.contains(i)));
        prop_assert_eq!(kept.len(), scores.len().min(sinks + slots + recent - incoming));
        prop_assert!((0..sinks.min(kept.len())).all(|i| kept[i] == i));
    }

    #[test]
    fn scaling_scores_changes_nothing(
        scores in prop::collection::vec(score(), 0..60),
        exponent in -20i32..20,
    ) {
        // An exact power of two: of `powi` no exact result is promised.
        let factor = f32::from_bits(((127 + exponent) as u32) << 23);
        let scaled: Vec<f32> = scores.iter().map(|s| s * factor).collect();
        let budget = budget(12, 2, 3);
        prop_assert_eq!(surprisal::keep(&scores, budget, 0, &[]), surprisal::keep(&scaled, budget, 0, &[]));
        prop_assert_eq!(
            surprisal::keep_published(&scores, 2, 8, 2, 1, &[]),
            surprisal::keep_published(&scaled, 2, 8, 2, 1, &[])
        );
    }
}
