//! Which channels of its keys a packed block keeps.

use std::sync::Arc;

use crate::ids::BlockId;
use crate::rope::{Layout, Rope};
use crate::{Error, Result};

/// Channels whose bit is set are stored as zero: for comparison with libraries that write zeros.
const ZEROED: u16 = 1 << 15;

/// Which channels of its keys a packed block keeps.
///
/// A row holds the first channels of the kept rotary pairs, then their second ones, then the others.
#[derive(Debug, PartialEq, Eq)]
pub struct Channels {
    kept: usize,
    /// `[heads][kept]`.
    index: Vec<u16>,
    zeroed: Vec<bool>,
    /// For each head how many rotary pairs; 0 when channels were chosen one by one.
    pairs: Vec<usize>,
}

impl Channels {
    /// `index` is `[heads][kept]`, negative numbers `-1 - c` for channel `c` stored as zero; `pairs` is `[heads]`.
    pub fn new(index: &[i64], pairs: &[usize], key_dim: usize) -> Result<Self> {
        let heads = pairs.len();
        let kept = index.len().checked_div(heads).unwrap_or(0);
        let bad =
            |got: String| Err(Error::OutOfRange { what: "channels", expected: "distinct channels of a key", got });
        if heads == 0 || kept == 0 || kept * heads != index.len() {
            return bad(format!("{} channels for {heads} heads", index.len()));
        }
        let mut out = Vec::with_capacity(index.len());
        for (mine, &pairs) in index.chunks_exact(kept).zip(pairs) {
            let mut seen = vec![false; key_dim];
            for &i in mine {
                let channel = if i < 0 { -1 - i } else { i };
                match usize::try_from(channel).ok().and_then(|c| seen.get_mut(c)) {
                    Some(seen) if !*seen => *seen = true,
                    _ => return bad(i.to_string()),
                }
                out.push(channel as u16 | if i < 0 { ZEROED } else { 0 });
            }
            if 2 * pairs > kept {
                return bad(format!("{pairs} pairs in {kept} channels"));
            }
        }
        let zeroed = out.iter().map(|c| c & ZEROED != 0).collect();
        Ok(Channels { kept, index: out.iter().map(|c| c & !ZEROED).collect(), zeroed, pairs: pairs.to_vec() })
    }

    pub fn kept(&self) -> usize {
        self.kept
    }

    pub fn heads(&self) -> usize {
        self.pairs.len()
    }

    pub(in crate::storage) fn highest(&self) -> usize {
        self.index.iter().copied().max().unwrap_or(0).into()
    }

    /// The channels of a head.
    pub fn of(&self, head: usize) -> &[u16] {
        &self.index[head * self.kept..][..self.kept]
    }

    pub(super) fn zeroed(&self, head: usize) -> &[bool] {
        &self.zeroed[head * self.kept..][..self.kept]
    }

    /// What [`Channels::new`] was given.
    pub fn signed(&self) -> Vec<i64> {
        let signed = |(&c, &zeroed): (&u16, &bool)| if zeroed { -1 - i64::from(c) } else { i64::from(c) };
        self.index.iter().zip(&self.zeroed).map(signed).collect()
    }

    /// Rotary pairs of a head.
    pub fn pairs(&self, head: usize) -> usize {
        self.pairs[head]
    }

    /// Whether the first channels are whole pairs of `rope`, and the others are none of its channels.
    pub(crate) fn keeps_pairs_of(&self, rope: &Rope) -> bool {
        (0..self.heads()).all(|head| {
            let (mine, pairs) = (self.of(head), self.pairs[head]);
            let is_pair = |(&a, &b): (&u16, &u16)| match rope.layout() {
                Layout::Half => {
                    usize::from(a) < rope.rotary_dim() / 2 && usize::from(b) == usize::from(a) + rope.rotary_dim() / 2
                }
                Layout::Interleaved => usize::from(b) < rope.rotary_dim() && a % 2 == 0 && b == a + 1,
            };
            let (first, rest) = mine.split_at(pairs);
            let (second, others) = rest.split_at(pairs);
            first.iter().zip(second).all(is_pair) && others.iter().all(|&c| usize::from(c) >= rope.rotary_dim())
        })
    }

    /// Bytes of the numbers of the channels.
    pub(super) fn bytes(&self) -> usize {
        self.index.len() * size_of::<u16>()
    }
}

/// The channels of the tokens that are packed next.
#[derive(Clone, Debug)]
pub enum Chosen {
    /// These.
    New(Arc<Channels>),
    /// Those of this packed block.
    Like(BlockId),
}
