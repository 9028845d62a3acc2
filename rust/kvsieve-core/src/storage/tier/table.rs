//! What is known of the blocks of one layer: which have a copy in the file, and which are the first to leave memory.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{ThreadId, current};

use super::file::{Extent, TierFile};
use super::jobs::{Answer, Job, Mailbox, send};
use crate::{Error, Result};

/// Threads whose last fetch is kept: more do not read one layer at once.
const LEASES: usize = 32;

/// Which blocks leave memory first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// Those that were fetched longest ago.
    Recency,
    /// Those of the lowest score `s`, where each step makes it `s * decay` and adds what attention the block got; of equal ones, those
    /// that were fetched longest ago.
    Scores { decay: f64 },
}

/// What a layer has done since its stream was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks that were fetched and were in memory.
    pub hits: u64,
    /// Blocks that were read from the file to stay in memory.
    pub loads: u64,
    /// Blocks that were written to the file.
    pub spills: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

/// What was written of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::storage) struct Copied {
    pub extent: Extent,
    pub sum: u64,
}

/// What is known of every block of a text, most of which are not in memory: so it is little.
#[derive(Clone)]
struct Entry {
    /// Where the copy begins in the file, or [`NOWHERE`].
    offset: u64,
    sum: u64,
    /// When it was last written or fetched.
    used: u64,
}

/// Where no copy begins.
const NOWHERE: u64 = u64::MAX;

impl Default for Entry {
    fn default() -> Self {
        Entry { offset: NOWHERE, sum: 0, used: 0 }
    }
}

/// Attention that a block got, as of a step.
#[derive(Clone, Copy, Default)]
struct Score {
    score: f64,
    at: u64,
}

/// What is done for a block that has not changed since.
#[derive(Clone, Copy)]
struct Pending {
    ticket: u64,
    /// When the block was last used.
    used: u64,
    /// Whether it leaves memory once it is written.
    leaves: bool,
}

/// The blocks of one layer, by number.
pub(in crate::storage) struct Tier {
    pub file: Arc<TierFile>,
    /// Blocks in memory that a fetch, and the end of a step, go back to.
    pub capacity: usize,
    /// Whether keys stay in memory, and only values leave it.
    pub values_alone: bool,
    /// Blocks that left memory in the place of others that have no copy: the end of the step writes as many copies.
    pub copies_due: usize,
    order: Order,
    entries: Vec<Entry>,
    /// Of every copy.
    extent_bytes: u64,
    /// By block; none before the first one.
    scores: Vec<Score>,
    /// Those that stay in memory.
    protected: Vec<bool>,
    /// What each thread fetched last: it is about to be read.
    leases: VecDeque<(ThreadId, Vec<usize>)>,
    clock: u64,
    steps: u64,
    counts: Counts,
    /// Of reads that left nothing in memory: they may be made under a shared lock.
    passed: AtomicU64,
    /// What the file's thread is doing, by block.
    pending: HashMap<usize, Pending>,
    tickets: u64,
    mailbox: Arc<Mailbox>,
    /// Why a block could not be written meanwhile.
    failure: Option<Error>,
}

impl Tier {
    pub fn new(file: Arc<TierFile>, capacity: usize, order: Order, values_alone: bool) -> Result<Self> {
        if let Order::Scores { decay } = order
            && !(0.0..=1.0).contains(&decay)
        {
            let got = decay.to_string();
            return Err(Error::OutOfRange { what: "decay", expected: "between 0 and 1", got });
        }
        Ok(Tier {
            file,
            capacity,
            values_alone,
            copies_due: 0,
            order,
            entries: Vec::new(),
            extent_bytes: 0,
            scores: Vec::new(),
            protected: Vec::new(),
            leases: VecDeque::new(),
            clock: 0,
            steps: 0,
            counts: Counts::default(),
            passed: AtomicU64::new(0),
            pending: HashMap::new(),
            tickets: 0,
            mailbox: Arc::default(),
            failure: None,
        })
    }

    pub fn counts(&self) -> Counts {
        let passed = self.passed.load(Ordering::Relaxed);
        Counts { bytes_read: self.counts.bytes_read + passed, ..self.counts }
    }

    /// Bytes of the copies of blocks.
    pub fn copied_bytes(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.offset != NOWHERE).count() as u64 * self.extent_bytes
    }

    pub fn copy(&self, block: usize) -> Option<Copied> {
        let entry = self.entries.get(block).filter(|entry| entry.offset != NOWHERE)?;
        Some(Copied { extent: Extent { offset: entry.offset, bytes: self.extent_bytes }, sum: entry.sum })
    }

    /// Begins to read the copies of some blocks from the file.
    pub fn will_need(&self, blocks: &[usize]) {
        let copies = blocks.iter().filter_map(|&block| self.copy(block));
        self.file.will_need(copies.map(|copy| copy.extent).collect());
    }

    fn entry(&mut self, block: usize) -> &mut Entry {
        if self.entries.len() <= block {
            self.entries.resize_with(block + 1, Entry::default);
        }
        &mut self.entries[block]
    }

    /// The block was written to the file. All blocks of a layer are as long as each other.
    pub fn copied(&mut self, block: usize, copy: Copied, bytes: usize) {
        self.counts.spills += 1;
        self.counts.bytes_written += bytes as u64;
        self.extent_bytes = copy.extent.bytes;
        let entry = self.entry(block);
        (entry.offset, entry.sum) = (copy.extent.offset, copy.sum);
    }

    /// The block was read from the file, and is in memory.
    pub fn loaded(&mut self, block: usize, bytes: usize) {
        self.counts.loads += 1;
        self.counts.bytes_read += bytes as u64;
        self.used(block);
    }

    /// A block in memory was fetched.
    pub fn hit(&mut self, block: usize) {
        self.counts.hits += 1;
        self.used(block);
    }

    /// Bytes were read from the file, and no block is in memory that was not before.
    pub fn passed(&self, bytes: usize) {
        self.passed.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn used(&mut self, block: usize) {
        self.clock += 1;
        let clock = self.clock;
        self.entry(block).used = clock;
    }

    /// The block is written in memory: its copy is void.
    pub fn touch(&mut self, block: usize) {
        self.used(block);
        self.void(block);
    }

    /// Nobody holds the block any more.
    pub fn free(&mut self, block: usize) {
        self.void(block);
        if let Some(entry) = self.entries.get_mut(block) {
            *entry = Entry::default();
        }
        if let Some(score) = self.scores.get_mut(block) {
            *score = Score::default();
        }
    }

    fn void(&mut self, block: usize) {
        self.pending.remove(&block);
        if let Some(copy) = self.copy(block) {
            self.entries[block].offset = NOWHERE;
            self.file.free(copy.extent);
        }
    }

    /// What this thread fetched last is about to be read; what it fetched before is not any more.
    pub fn lease(&mut self, blocks: &[usize]) {
        self.end_lease();
        if self.leases.len() >= LEASES {
            self.leases.pop_front();
        }
        self.leases.push_back((current().id(), blocks.to_vec()));
    }

    /// What this thread fetched has been read.
    pub fn end_lease(&mut self) {
        self.leases.retain(|(thread, _)| *thread != current().id());
    }

    /// These blocks stay in memory, and no others need to.
    pub fn protect(&mut self, blocks: impl Iterator<Item = usize>) {
        self.protected.fill(false);
        self.protect_also(blocks);
    }

    /// These blocks stay in memory too.
    pub fn protect_also(&mut self, blocks: impl Iterator<Item = usize>) {
        for block in blocks {
            if self.protected.len() <= block {
                self.protected.resize(block + 1, false);
            }
            self.protected[block] = true;
        }
    }

    /// A step is over in which these blocks got so much attention, all heads and queries together.
    pub fn score(&mut self, scores: &[(usize, f64)]) {
        self.steps += 1;
        let (step, decay) = (self.steps, self.decay());
        for &(block, mass) in scores {
            if self.scores.len() <= block {
                self.scores.resize(block + 1, Score::default());
            }
            let score = &mut self.scores[block];
            *score = Score { score: decayed(*score, step, decay) + mass, at: step };
        }
    }

    fn decay(&self) -> f64 {
        match self.order {
            Order::Recency => 1.0,
            Order::Scores { decay } => decay,
        }
    }

    /// The first `most` of `blocks` that may leave memory, in the order in which they do.
    pub fn leaving(&self, blocks: impl Iterator<Item = usize>, most: usize) -> Vec<usize> {
        if most == 0 {
            return Vec::new();
        }
        let stays = |block: usize| self.protected.get(block).copied().unwrap_or(false);
        let mut leased: Vec<usize> = self.leases.iter().flat_map(|(_, blocks)| blocks.iter().copied()).collect();
        leased.sort_unstable();
        let leased = |block: usize| leased.binary_search(&block).is_ok();
        let ranked = blocks.filter(|&block| !stays(block) && !leased(block)).map(|block| {
            let score = match self.order {
                Order::Recency => 0.0,
                Order::Scores { decay } => {
                    decayed(self.scores.get(block).copied().unwrap_or_default(), self.steps, decay)
                }
            };
            (score, self.entries.get(block).map_or(0, |entry| entry.used), block)
        });
        let mut ranked: Vec<_> = ranked.collect();
        let order =
            |a: &(f64, u64, usize), b: &(f64, u64, usize)| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2)));
        if (1..ranked.len()).contains(&most) {
            ranked.select_nth_unstable_by(most - 1, order);
        }
        ranked.truncate(most);
        ranked.sort_unstable_by(order);
        ranked.into_iter().map(|(_, _, block)| block).collect()
    }
}

/// What the file's thread does.
impl Tier {
    /// Has a job done for a block, which then `leaves` memory, or not.
    pub fn send(&mut self, block: usize, extent: Extent, bytes: Vec<u8>, leaves: bool) -> Result<()> {
        self.tickets += 1;
        let (ticket, used) = (self.tickets, self.entry(block).used);
        send(&self.file, Job { block, ticket, extent, bytes, to: Arc::clone(&self.mailbox) })?;
        self.pending.insert(block, Pending { ticket, used, leaves });
        Ok(())
    }

    /// Whether something is under way for a block; if so, it also `leaves` memory after it.
    pub fn also_leaves(&mut self, block: usize, leaves: bool) -> bool {
        let pending = self.pending.get_mut(&block);
        pending.map(|pending| pending.leaves |= leaves).is_some()
    }

    /// Blocks for which something is under way.
    pub fn num_pending(&self) -> usize {
        self.pending.len()
    }

    pub fn is_pending(&self, block: usize) -> bool {
        self.pending.contains_key(&block)
    }

    /// What the thread has done; with `wait` something at least, if something is under way.
    pub fn answers(&mut self, wait: bool) -> Vec<Answer> {
        if !self.file.at_home() {
            self.pending.clear();
            return Vec::new();
        }
        if !wait || self.pending.is_empty() {
            return self.mailbox.take();
        }
        let answers = self.mailbox.wait();
        if answers.is_empty() {
            self.pending.clear();
        }
        answers
    }

    /// Whether an answer is about the block as it is; if so, whether the block leaves memory: it was to, and nobody has used it since.
    pub fn is_current(&mut self, answer: &Answer) -> Option<bool> {
        let pending = *self.pending.get(&answer.block)?;
        if pending.ticket != answer.ticket {
            return None;
        }
        self.pending.remove(&answer.block);
        Some(pending.leaves && self.entry(answer.block).used == pending.used)
    }

    /// A block could not be written; the next call that writes says so.
    pub fn failed(&mut self, err: Error) {
        self.failure = Some(err);
    }

    pub fn failure(&mut self) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }
}

/// The score at step `now`: history survives for blocks that get no attention, and for those that do.
fn decayed(Score { score, at }: Score, now: u64, decay: f64) -> f64 {
    let steps = i32::try_from(now - at).unwrap_or(i32::MAX);
    if score == 0.0 { 0.0 } else { score * decay.powi(steps) }
}

impl Drop for Tier {
    fn drop(&mut self) {
        (0..self.entries.len()).for_each(|block| self.void(block));
        if self.file.at_home() {
            self.mailbox.close().into_iter().for_each(|answer| self.file.free(answer.extent));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    struct Nothing;

    impl super::super::Medium for Nothing {
        fn grow(&self, _len: u64) -> io::Result<()> {
            Ok(())
        }

        fn read_at(&self, _to: &mut [u8], _at: u64) -> io::Result<usize> {
            Ok(0)
        }

        fn write_at(&self, from: &[u8], _at: u64) -> io::Result<usize> {
            Ok(from.len())
        }
    }

    fn tier(order: Order) -> Tier {
        Tier::new(TierFile::of(Box::new(Nothing)), 4, order, false).unwrap()
    }

    #[test]
    fn those_fetched_longest_ago_leave_first() {
        let mut tier = tier(Order::Recency);
        (0..6).for_each(|block| tier.touch(block));
        tier.hit(1);
        tier.lease(&[3]);
        tier.protect([4].into_iter());
        assert_eq!(tier.leaving(0..6, 6), [0, 2, 5, 1]);
        assert_eq!(tier.leaving(0..6, 2), [0, 2]);
        assert!(tier.leaving(0..6, 0).is_empty());
        tier.end_lease();
        tier.protect([0].into_iter());
        tier.protect_also([2].into_iter());
        assert_eq!(tier.leaving(0..6, 6), [3, 4, 5, 1]);
    }

    /// By hand, with a decay of a half: 8 attention three steps ago is 1, 2 one step ago is 1 as well, and 1.5 now is more.
    #[test]
    fn scores_decay_whether_a_block_is_read_or_not() {
        let mut tier = tier(Order::Scores { decay: 0.5 });
        (0..4).for_each(|block| tier.touch(block));
        tier.score(&[(2, 8.0)]);
        tier.score(&[(2, 0.0)]);
        tier.score(&[(1, 2.0)]);
        tier.score(&[(0, 1.5)]);
        assert_eq!(tier.leaving(0..4, 4), [3, 1, 2, 0]);
        // The history of a block that is read again counts: 1 / 2 + 0.3 is more than 1.5 / 2.
        tier.score(&[(2, 0.3)]);
        assert_eq!(tier.leaving(0..4, 4), [3, 1, 0, 2]);
        assert!(Tier::new(Arc::clone(&tier.file), 1, Order::Scores { decay: 1.5 }, false).is_err());
    }
}
