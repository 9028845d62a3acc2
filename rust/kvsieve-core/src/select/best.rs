//! The best of some scores.

use crate::rank::rank;

/// The best `count` of `scores`: by value, equal ones by index, NaN last.
pub(super) struct Best {
    keys: Vec<u64>,
    order: Vec<u64>,
}

impl Best {
    pub fn new() -> Self {
        Best { keys: Vec::new(), order: Vec::new() }
    }

    /// Calls `keep` with the indices of the best, ascending.
    pub fn each(&mut self, scores: &[f32], count: usize, mut keep: impl FnMut(usize)) {
        if count >= scores.len() {
            return (0..scores.len()).for_each(keep);
        }
        let Some(last) = count.checked_sub(1) else { return };
        self.keys.clear();
        // The complement of the rank above the index: smaller is better, and no two are equal.
        self.keys.extend(scores.iter().enumerate().map(|(i, &x)| u64::from(!rank(x)) << 32 | i as u64));
        self.order.clone_from(&self.keys);
        let (_, &mut worst, _) = self.order.select_nth_unstable(last);
        for (i, _) in self.keys.iter().enumerate().filter(|(_, key)| **key <= worst) {
            keep(i);
        }
    }
}
