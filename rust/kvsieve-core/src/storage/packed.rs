//! Packed tokens of one layer: fewer key channels, fewer bits a number, in blocks of their own.
//!
//! A block of 64 tokens of one head holds
//!
//! * keys: `[64][key_kept]` numbers of the kept channels, as they came or as codes of `key_bits`;
//! * scales of keys, with codes: for each `group` of tokens `[2][key_kept]` halves: the steps, then the least values (KIVI: per channel);
//! * values: `[64][value_dim]`, as they came or as codes of `value_bits`;
//! * scales of values, with codes: `[2][value_dim / group][64]` halves (KIVI: per token).
//!
//! A number is `least + step * code`. A token's codes take whole bytes. All lies as decode attention reads it, see [`thin_place`],
//! [`key_place`] and [`value_place`]: keys with the tokens side by side, so that a vector of scores needs no sum over its lanes and any
//! number of channels will do; coded values with the channels side by side, two tokens to a word, so that a vector of channels needs no
//! shuffle.

use std::sync::Arc;

use half::{bf16, f16};

use super::slabs::{COLUMN, Held, Slabs, needs, number as number_of, reserve_all};
use crate::ids::{BLOCK, BlockId, PACKED};
use crate::plan::Move;
use crate::rope::{Layout, Rope};
use crate::tensor::Dtype;
use crate::{Error, Result};

/// How a layer packs its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Kept channels of a key, the same number for each head.
    pub key_kept: usize,
    /// Bits of a key's code: 2, 4 or 8; 0 to keep numbers as they came.
    pub key_bits: u32,
    /// Bits of a value's code: 2, 4 or 8; 0 to keep numbers as they came.
    pub value_bits: u32,
    /// How many numbers share a step and a least value: tokens of a key channel, channels of a value.
    pub group: usize,
}

impl Packing {
    pub(super) fn check(&self, key_dim: usize, value_dim: usize) -> Result<()> {
        if self.key_kept == 0 || self.key_kept > key_dim {
            let got = self.key_kept.to_string();
            return Err(Error::OutOfRange { what: "key_kept", expected: "between 1 and the key's channels", got });
        }
        for (what, bits) in [("key_bits", self.key_bits), ("value_bits", self.value_bits)] {
            if ![0, 2, 4, 8].contains(&bits) {
                return Err(Error::OutOfRange { what, expected: "0, 2, 4 or 8", got: bits.to_string() });
            }
        }
        let fits = self.group > 0 && (BLOCK as usize).is_multiple_of(self.group);
        if !fits || (self.value_bits > 0 && !value_dim.is_multiple_of(self.group)) {
            let got = self.group.to_string();
            return Err(Error::OutOfRange {
                what: "group",
                expected: "a divisor of 64 and of the value's channels",
                got,
            });
        }
        Ok(())
    }
}

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

    pub(super) fn highest(&self) -> usize {
        self.index.iter().copied().max().unwrap_or(0).into()
    }

    /// The channels of a head.
    pub fn of(&self, head: usize) -> &[u16] {
        &self.index[head * self.kept..][..self.kept]
    }

    fn zeroed(&self, head: usize) -> &[bool] {
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
    fn bytes(&self) -> usize {
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

/// Bytes by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedBytes {
    pub keys: usize,
    pub values: usize,
    pub scales: usize,
    pub channels: usize,
}

/// The packed blocks of a layer.
pub struct Packed {
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    dtype: Dtype,
    packing: Packing,
    keys: Slabs,
    key_scales: Option<Slabs>,
    values: Slabs,
    value_scales: Option<Slabs>,
    /// The channels of each block.
    channels: Vec<Option<Arc<Channels>>>,
}

/// One head of a block.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Of the whole block.
    pub keys: *const u8,
    /// Keys of a block that have memory: the numbers of a channel.
    pub slots: usize,
    /// Of the whole block.
    pub key_scales: *const u16,
    /// From the slot on, but codes of the whole block.
    pub values: *const u8,
    /// Of the whole block.
    pub value_scales: *const u16,
    pub channels: &'a Channels,
}

/// Where channel `c` of a key of `kept` numbers lies in its head's block, which has memory for `slots` tokens. The numbers of all tokens
/// are neighbours; in `bf16` two channels are, in words of all tokens, but for the last channel of an odd number.
fn thin_place(kept: usize, dtype: Dtype, slots: usize, slot: usize, c: usize) -> usize {
    match dtype {
        Dtype::BF16 if c / 2 < kept / 2 => c / 2 * 4 * slots + slot * 4 + c % 2 * 2,
        _ => (c * slots + slot) * dtype.size(),
    }
}

/// Memory for keys, which lie in columns. Where those are not all of one width, and where they are codes, a block has it as a whole.
fn key_slabs(heads: usize, packing: &Packing, dtype: Dtype) -> Slabs {
    match (packing.key_bits, dtype) {
        (0, Dtype::F32 | Dtype::F16) => Slabs::of_columns(heads, packing.key_kept, dtype.size()),
        (0, Dtype::BF16) if packing.key_kept.is_multiple_of(2) => Slabs::of_columns(heads, packing.key_kept / 2, 4),
        _ => Slabs::of_blocks(heads, BLOCK as usize * row_bytes(packing.key_kept, packing.key_bits, dtype)),
    }
}

/// Where the code of channel `c` of a key lies in its head's block of `bytes` a token: the byte, and the bit in it.
///
/// A word of 32 bits takes the codes of `32 / bits` channels, those of even channels in its low half and those of odd ones in its high
/// half; the words of all tokens for these channels are neighbours. What is left of a row is bytes, in channel order, that are
/// neighbours likewise.
fn key_place(bytes: usize, bits: u32, slot: usize, c: usize) -> (usize, u32) {
    let (block, bits) = (BLOCK as usize, bits as usize);
    let (words, word, at) = (bytes / 4, c * bits / 32, c % (32 / bits));
    if word < words {
        let bit = at / 2 * bits + at % 2 * 16;
        (word * block * 4 + slot * 4 + bit / 8, (bit % 8) as u32)
    } else {
        let bit = at * bits;
        (words * block * 4 + bit / 8 * block + slot, (bit % 8) as u32)
    }
}

/// The fewest numbers to a scale for which values lie in pairs of tokens: then all codes at one place of so many words share theirs.
pub(crate) const PAIRED: usize = 16;

/// A stretch of halves of words that hold the values of two tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    /// The first word, and how many there are: 16, or for the rest of a row 8, 4, 2 or 1.
    pub word: usize,
    pub words: usize,
    /// The first channel.
    pub channel: usize,
}

impl Chunk {
    /// The stretch that begins at `word` of a row of `words`, its first channel being `channel`.
    #[inline(always)]
    fn at(word: usize, words: usize, channel: usize) -> Option<Self> {
        let left = words - word;
        (left > 0).then(|| Chunk { word, words: 1 << left.min(16).ilog2(), channel })
    }

    /// The first stretch of a row.
    #[inline(always)]
    pub fn first(value_dim: usize, bits: u32) -> Option<Self> {
        Chunk::at(0, value_dim * bits as usize / 16, 0)
    }

    /// The stretch behind this one.
    #[inline(always)]
    pub fn next(self, value_dim: usize, bits: u32) -> Option<Self> {
        let channel = self.channel + self.words * (16 / bits as usize);
        Chunk::at(self.word + self.words, value_dim * bits as usize / 16, channel)
    }
}

/// Where the code of channel `c` of a value lies in its head's block of `bytes` a token: the byte, and the bit in it.
///
/// Word `i` of two neighbouring tokens holds codes of the first one in its low half and of the second one in its high half. In a
/// stretch of `n` words ([`Chunk`]) those at the lowest bits are of the first `n` channels, those above them of the next `n`, and so on.
/// With scales for fewer than [`PAIRED`] numbers codes lie in rows, in channel order.
fn value_place(packing: &Packing, value_dim: usize, bytes: usize, slot: usize, c: usize) -> (usize, u32) {
    let bits = packing.value_bits;
    if packing.group < PAIRED {
        let bit = c * bits as usize;
        return (slot * bytes + bit / 8, (bit % 8) as u32);
    }
    let mut chunk = Chunk::first(value_dim, bits);
    while let Some(Chunk { word, words, channel }) = chunk {
        let at = c - channel;
        if at < words * (16 / bits as usize) {
            let bit = at / words * bits as usize;
            let half = 2 * (word + at % words) + slot % 2;
            return (slot / 2 * 2 * bytes + 2 * half + bit / 8, (bit % 8) as u32);
        }
        chunk = chunk.and_then(|chunk| chunk.next(value_dim, bits));
    }
    panic!("channel {c} of {value_dim}");
}

/// Bytes of a row of `n` numbers.
fn row_bytes(n: usize, bits: u32, dtype: Dtype) -> usize {
    if bits == 0 { n * dtype.size() } else { (n * bits as usize).div_ceil(8) }
}

const _: () = assert!(BLOCK.is_multiple_of(COLUMN));

impl Packed {
    pub(super) fn new(heads: usize, key_dim: usize, value_dim: usize, dtype: Dtype, packing: Packing) -> Result<Self> {
        packing.check(key_dim, value_dim)?;
        let slots = BLOCK as usize;
        let key_scales = slots / packing.group * 2 * packing.key_kept * 2;
        let value_scales = slots * 2 * (value_dim / packing.group) * 2;
        let value_bytes = row_bytes(value_dim, packing.value_bits, dtype);
        let values = match packing.value_bits {
            0 => Slabs::of_rows(heads, value_bytes),
            _ => Slabs::of_blocks(heads, slots * value_bytes),
        };
        Ok(Packed {
            heads,
            key_dim,
            value_dim,
            dtype,
            packing,
            keys: key_slabs(heads, &packing, dtype),
            key_scales: (packing.key_bits > 0).then(|| Slabs::of_blocks(heads, key_scales)),
            values,
            value_scales: (packing.value_bits > 0).then(|| Slabs::of_blocks(heads, value_scales)),
            channels: Vec::new(),
        })
    }

    pub fn packing(&self) -> Packing {
        self.packing
    }

    pub(crate) fn key_bytes(&self) -> usize {
        row_bytes(self.packing.key_kept, self.packing.key_bits, self.dtype)
    }

    pub(crate) fn value_bytes(&self) -> usize {
        row_bytes(self.value_dim, self.packing.value_bits, self.dtype)
    }

    /// Halves of the scales of one head of one block of keys; 0 without codes.
    fn key_halves(&self) -> usize {
        if self.packing.key_bits == 0 { 0 } else { BLOCK as usize / self.packing.group * 2 * self.packing.key_kept }
    }

    /// Halves of the scales of one value; 0 without codes.
    fn value_halves(&self) -> usize {
        if self.packing.value_bits == 0 { 0 } else { 2 * self.value_dim / self.packing.group }
    }

    /// Bytes of the scales of one head of one block: of keys, of values.
    pub(crate) fn scale_bytes(&self) -> [usize; 2] {
        [2 * self.key_halves(), 2 * BLOCK as usize * self.value_halves()]
    }

    /// Bytes of one token of all heads, scales included.
    pub fn token_bytes(&self) -> usize {
        let halves = self.key_halves() / BLOCK as usize + self.value_halves();
        self.heads * (self.key_bytes() + self.value_bytes() + 2 * halves)
    }

    /// What was asked for.
    pub fn bytes(&self) -> PackedBytes {
        let size = |slabs: &Option<Slabs>| slabs.as_ref().map_or(0, Slabs::bytes);
        let scales = size(&self.key_scales) + size(&self.value_scales);
        let mut out = PackedBytes { keys: self.keys.bytes(), values: self.values.bytes(), scales, channels: 0 };
        let mut seen: Vec<*const Channels> = self.channels.iter().flatten().map(Arc::as_ptr).collect();
        seen.sort_unstable();
        seen.dedup();
        // SAFETY: each is owned by an `Arc` of this list.
        out.channels = seen.iter().map(|&c| unsafe { (*c).bytes() }).sum();
        out
    }

    pub(super) fn holds(&self, block: BlockId) -> bool {
        let at = number_of(block);
        self.keys.get(at).is_some() && self.channels.get(at).is_some_and(Option::is_some)
    }

    /// Whether the block's slots before `end` have memory.
    pub(super) fn holds_to(&self, block: BlockId, end: u32) -> bool {
        let at = number_of(block);
        self.holds(block) && end <= self.keys.slots(at).min(self.values.slots(at))
    }

    fn bad_block(&self, block: BlockId) -> Error {
        Error::BadBlock { block: block.0, have: self.channels.iter().flatten().count() as u32 }
    }

    /// The channels of a block that has any.
    pub fn channels_of(&self, block: BlockId) -> Result<&Arc<Channels>> {
        let index = (block.0 - PACKED) as usize;
        self.channels.get(index).and_then(Option::as_ref).ok_or_else(|| self.bad_block(block))
    }

    fn sections(&mut self) -> impl Iterator<Item = &mut Slabs> {
        [Some(&mut self.keys), self.key_scales.as_mut(), Some(&mut self.values), self.value_scales.as_mut()]
            .into_iter()
            .flatten()
    }

    /// Gives these blocks memory up to a slot; on failure nothing has changed.
    pub(super) fn reserve(&mut self, wanted: impl Iterator<Item = (BlockId, u32)>) -> Result<()> {
        let needs = needs(wanted);
        let Some(&(last, _)) = needs.last() else { return Ok(()) };
        let more = (last + 1).saturating_sub(self.channels.len());
        let oom = |_| Error::OutOfMemory { bytes: more * size_of::<Option<Arc<Channels>>>() };
        self.channels.try_reserve(more).map_err(oom)?;
        self.channels.resize_with(self.channels.len() + more, || None);
        reserve_all(self.sections(), &needs)
    }

    /// Frees the blocks that are not in use, and forgets their channels.
    pub(super) fn free_unused(&mut self, in_use: &[bool]) {
        for block in 0..self.channels.len() {
            if !in_use.get(block).copied().unwrap_or(false) {
                self.channels[block] = None;
                self.sections().for_each(|section| section.free(block));
            }
        }
    }

    /// One head of a block, from `slot` on. Panics when the block has no memory.
    pub(crate) fn rows(&self, block: BlockId, head: usize, slot: u32) -> Rows<'_> {
        let at = number_of(block);
        let Some((keys, values)) = self.keys.get(at).zip(self.values.get(at)) else {
            panic!("{block:?} has no memory")
        };
        let Some(Some(channels)) = self.channels.get(at) else { panic!("{block:?} was never packed") };
        assert!(head < self.heads && (slot as usize) < values.slots, "head {head} or slot {slot} outside the block");
        // SAFETY: the slab was made for so many heads.
        let of_head = |held: Held| unsafe { held.start.as_ptr().add(head * held.hop).cast_const() };
        let scales = |slabs: &Option<Slabs>| {
            slabs.as_ref().and_then(|slabs| slabs.get(at)).map_or(std::ptr::null(), |held| of_head(held).cast::<u16>())
        };
        let value = if self.packing.value_bits == 0 { slot as usize * self.value_bytes() } else { 0 };
        Rows {
            keys: of_head(keys),
            slots: keys.slots,
            key_scales: scales(&self.key_scales),
            // SAFETY: the slot has memory.
            values: unsafe { of_head(values).add(value) },
            value_scales: scales(&self.value_scales),
            channels,
        }
    }

    /// Stores tokens in slots `slot..` of `block`. `keys` and `values` are rows of the layer's dtype, one token after another.
    ///
    /// Where a group of keys shares a scale, what lies before `slot` in its group is kept and what lies behind is forgotten.
    ///
    /// # Safety
    /// `n` rows of `key_dim` and `value_dim` elements; the slots lie in the block, which has memory and channels.
    pub(super) unsafe fn put(
        &mut self,
        block: BlockId,
        head: usize,
        slot: u32,
        keys: *const u8,
        values: *const u8,
        n: usize,
    ) {
        let Packing { key_kept, key_bits, value_bits, group } = self.packing;
        let (key_dim, value_dim, dtype) = (self.key_dim, self.value_dim, self.dtype);
        let value_bytes = self.value_bytes();
        let to = self.rows(block, head, slot);
        let (index, zeroed) = (to.channels.of(head), to.channels.zeroed(head));
        let es = dtype.size();
        // SAFETY: rows `i < n` at all places, by the caller's promise; `&mut self` gives the right to write to the slabs.
        unsafe {
            if key_bits == 0 {
                for i in 0..n {
                    let from = keys.add(i * key_dim * es);
                    for (j, (&c, &zero)) in index.iter().zip(zeroed).enumerate() {
                        let at = to.keys.cast_mut().add(thin_place(key_kept, dtype, to.slots, slot as usize + i, j));
                        if zero {
                            at.write_bytes(0, es);
                        } else {
                            std::ptr::copy_nonoverlapping(from.add(c as usize * es), at, es);
                        }
                    }
                }
            } else {
                let mut tokens = vec![0f32; n * key_kept];
                for (i, row) in tokens.chunks_exact_mut(key_kept).enumerate() {
                    for (x, (&c, &zero)) in row.iter_mut().zip(index.iter().zip(zeroed)) {
                        *x = if zero { 0.0 } else { element(dtype, keys.add((i * key_dim + c as usize) * es)) };
                    }
                }
                self.put_keys(block, head, slot, &tokens);
            }
            let to = self.rows(block, head, slot);
            if value_bits == 0 {
                std::ptr::copy_nonoverlapping(values, to.values.cast_mut(), n * value_bytes);
            } else {
                let mut row = vec![0f32; value_dim];
                for i in 0..n {
                    for (c, x) in row.iter_mut().enumerate() {
                        *x = element(dtype, values.add((i * value_dim + c) * es));
                    }
                    let slot = slot as usize + i;
                    for (g, x) in row.chunks_exact(group).enumerate() {
                        let scale = Scale::of(x.iter().copied(), value_bits);
                        let (step, least) = scale.halves();
                        let scales = to.value_scales.cast_mut().add(g * BLOCK as usize + slot);
                        *scales = step;
                        *scales.add(value_dim / group * BLOCK as usize) = least;
                        for (i, &x) in x.iter().enumerate() {
                            let place = value_place(&self.packing, value_dim, value_bytes, slot, g * group + i);
                            put_code(to.values.cast_mut(), place, value_bits, scale.code(x));
                        }
                    }
                }
            }
        }
    }

    /// Stores keys, rows of `key_kept` numbers, as codes in slots `slot..`; see [`Packed::put`].
    ///
    /// # Safety
    /// As for [`Packed::put`].
    unsafe fn put_keys(&mut self, block: BlockId, head: usize, slot: u32, tokens: &[f32]) {
        let Packing { key_kept: kept, key_bits: bits, group, .. } = self.packing;
        let (bytes, n) = (self.key_bytes(), tokens.len() / kept);
        let (first, end) = (slot as usize, slot as usize + n);
        let base = self.rows(block, head, 0);
        let mut rows = vec![0f32; group * kept];
        for g in first / group..end.div_ceil(group) {
            let start = g * group;
            let (lo, hi) = (first.max(start) - start, end.min(start + group) - start);
            if lo > 0 {
                // SAFETY: slots `start..start + lo` lie in the block.
                unsafe { self.keys_f32(block, head, start as u32, &mut rows[..lo * kept]) };
            }
            rows[lo * kept..hi * kept].copy_from_slice(&tokens[(start + lo - first) * kept..][..(hi - lo) * kept]);
            // SAFETY: the group's scales and rows lie in the block; `&mut self` gives the right to write to them.
            unsafe {
                let scales = std::slice::from_raw_parts_mut(base.key_scales.cast_mut().add(g * 2 * kept), 2 * kept);
                let (steps, leasts) = scales.split_at_mut(kept);
                for c in 0..kept {
                    let column = || rows[..hi * kept].iter().skip(c).step_by(kept).copied();
                    let scale = Scale::of(column(), bits);
                    (steps[c], leasts[c]) = scale.halves();
                    for (i, x) in column().enumerate() {
                        put_code(base.keys.cast_mut(), key_place(bytes, bits, start + i, c), bits, scale.code(x));
                    }
                }
            }
        }
    }

    /// Keys of the kept channels from `slot` on, as many as `out` has rows for.
    ///
    /// # Safety
    /// The slots lie in the block, which has memory and channels.
    pub(crate) unsafe fn keys_f32(&self, block: BlockId, head: usize, slot: u32, out: &mut [f32]) {
        let Packing { key_kept: kept, key_bits: bits, group, .. } = self.packing;
        let (rows, bytes) = (self.rows(block, head, slot), self.key_bytes());
        for (i, out) in out.chunks_exact_mut(kept).enumerate() {
            // SAFETY: the row and the scales of its group lie in the block.
            unsafe {
                let slot = slot as usize + i;
                if bits == 0 {
                    for (c, x) in out.iter_mut().enumerate() {
                        *x = element(self.dtype, rows.keys.add(thin_place(kept, self.dtype, rows.slots, slot, c)));
                    }
                    continue;
                }
                let scales = rows.key_scales.add(slot / group * 2 * kept);
                for (c, x) in out.iter_mut().enumerate() {
                    let code = code(rows.keys, key_place(bytes, bits, slot, c), bits);
                    *x = number(*scales.add(c), *scales.add(kept + c), code);
                }
            }
        }
    }

    /// Values from `slot` on, as many as `out` has rows for.
    ///
    /// # Safety
    /// As for [`Packed::keys_f32`].
    pub(crate) unsafe fn values_f32(&self, block: BlockId, head: usize, slot: u32, out: &mut [f32]) {
        let Packing { value_bits: bits, group, .. } = self.packing;
        let (rows, bytes, dim) = (self.rows(block, head, slot), self.value_bytes(), self.value_dim);
        for (i, out) in out.chunks_exact_mut(dim).enumerate() {
            // SAFETY: the row and its scales lie in the block.
            unsafe {
                if bits == 0 {
                    let row = rows.values.add(i * bytes);
                    out.iter_mut()
                        .enumerate()
                        .for_each(|(c, x)| *x = element(self.dtype, row.add(c * self.dtype.size())));
                    continue;
                }
                let slot = slot as usize + i;
                for (c, x) in out.iter_mut().enumerate() {
                    let code = code(rows.values, value_place(&self.packing, dim, bytes, slot, c), bits);
                    let scales = rows.value_scales.add(c / group * BLOCK as usize + slot);
                    *x = number(*scales, *scales.add(dim / group * BLOCK as usize), code);
                }
            }
        }
    }

    /// Writes tokens from `slot` on at full width, in the layer's dtype: zero where a channel was dropped.
    ///
    /// # Safety
    /// `n` slots in the block, which has memory and channels; room for `n` rows of `key_dim` and `value_dim` elements.
    pub(super) unsafe fn unpack(
        &self,
        block: BlockId,
        head: usize,
        slot: u32,
        n: usize,
        keys: *mut u8,
        values: *mut u8,
    ) {
        let (kept, es) = (self.packing.key_kept, self.dtype.size());
        let rows = self.rows(block, head, slot);
        let index = rows.channels.of(head);
        // SAFETY: the caller's promise, row by row.
        unsafe {
            keys.write_bytes(0, n * self.key_dim * es);
            if self.packing.key_bits == 0 {
                for i in 0..n {
                    let to = keys.add(i * self.key_dim * es);
                    for (j, &c) in index.iter().enumerate() {
                        let from = rows.keys.add(thin_place(kept, self.dtype, rows.slots, slot as usize + i, j));
                        std::ptr::copy_nonoverlapping(from, to.add(c as usize * es), es);
                    }
                }
            } else {
                let mut tokens = vec![0f32; n * kept];
                self.keys_f32(block, head, slot, &mut tokens);
                for (i, row) in tokens.chunks_exact(kept).enumerate() {
                    for (&x, &c) in row.iter().zip(index) {
                        put_element(self.dtype, keys.add((i * self.key_dim + c as usize) * es), x);
                    }
                }
            }
            if self.packing.value_bits == 0 {
                std::ptr::copy_nonoverlapping(rows.values, values, n * self.value_bytes());
            } else {
                let mut tokens = vec![0f32; n * self.value_dim];
                self.values_f32(block, head, slot, &mut tokens);
                tokens.iter().enumerate().for_each(|(i, &x)| put_element(self.dtype, values.add(i * es), x));
            }
        }
    }

    /// Gives blocks their channels. The blocks have memory.
    pub(super) fn choose(&mut self, blocks: impl Iterator<Item = BlockId>, channels: &Arc<Channels>) {
        for block in blocks {
            self.channels[(block.0 - PACKED) as usize] = Some(Arc::clone(channels));
        }
    }

    /// Makes checked moves between packed blocks. Bits are carried over, but for keys whose group shares a scale: they are packed
    /// again with those they come to stand among, unless they move as a group.
    ///
    /// No token of a list is moved twice.
    pub(super) fn move_tokens(&mut self, moves: &[Move]) -> Result<()> {
        for m in moves {
            let channels = Arc::clone(self.channels_of(m.from)?);
            self.choose(std::iter::once(m.to), &channels);
        }
        for head in 0..self.heads {
            self.move_keys(moves, head);
            for m in moves {
                let (from, to) = (self.rows(m.from, head, m.from_slot), self.rows(m.to, head, m.to_slot));
                // SAFETY: checked moves.
                unsafe { self.move_values(m, from, to) };
            }
        }
        Ok(())
    }

    /// # Safety
    /// A checked move between these two.
    unsafe fn move_values(&self, m: &Move, from: Rows<'_>, to: Rows<'_>) {
        let Packing { value_bits: bits, group, .. } = self.packing;
        let (bytes, len) = (self.value_bytes(), m.len as usize);
        let (first, second) = (m.from_slot as usize, m.to_slot as usize);
        // SAFETY: both ranges lie in their blocks; `copy` allows them to overlap, and so does the order in which words are taken.
        unsafe {
            if bits == 0 {
                return std::ptr::copy(from.values, to.values.cast_mut(), len * bytes);
            }
            for row in 0..2 * self.value_dim / group {
                let at = row * BLOCK as usize;
                let (from, to) = (from.value_scales.add(at + first), to.value_scales.add(at + second));
                std::ptr::copy(from, to.cast_mut(), len);
            }
            if group < PAIRED {
                let (from, to) = (from.values.add(first * bytes), to.values.add(second * bytes));
                return std::ptr::copy(from, to.cast_mut(), len * bytes);
            }
            let half = |slot: usize| slot / 2 * bytes + slot % 2;
            for i in 0..len {
                let i = if first < second { len - 1 - i } else { i };
                let from = from.values.cast::<u16>().add(half(first + i));
                let to = to.values.cast::<u16>().cast_mut().add(half(second + i));
                (0..bytes / 2).for_each(|word| *to.add(2 * word) = *from.add(2 * word));
            }
        }
    }

    /// Copies keys from slots to slots as they lie, without their scales.
    ///
    /// # Safety
    /// A checked move between these two.
    unsafe fn copy_keys(&self, m: &Move, from: Rows<'_>, to: Rows<'_>) {
        let (first, second, len) = (m.from_slot as usize, m.to_slot as usize, m.len as usize);
        let bytes = self.key_bytes();
        // How wide the columns are in which keys lie, and how wide those of what is left.
        let (width, rest) = match (self.packing.key_bits, self.dtype) {
            (0, Dtype::F16) => (2, 2),
            (0, _) => (4, 2),
            _ => (4, 1),
        };
        let (mut here, mut there) = (0, 0);
        for width in std::iter::repeat_n(width, bytes / width).chain(std::iter::repeat_n(rest, bytes % width / rest)) {
            // SAFETY: the columns lie in their blocks; `copy` allows the ranges to overlap.
            unsafe {
                let (from, to) = (from.keys.add(here + first * width), to.keys.add(there + second * width));
                std::ptr::copy(from, to.cast_mut(), len * width);
            }
            here += from.slots * width;
            there += to.slots * width;
        }
    }

    fn move_keys(&mut self, moves: &[Move], head: usize) {
        let (kept, group) = (self.packing.key_kept, self.packing.group as u32);
        if self.packing.key_bits == 0 {
            for m in moves {
                let (from, to) = (self.rows(m.from, head, m.from_slot), self.rows(m.to, head, m.to_slot));
                // SAFETY: a checked move.
                unsafe { self.copy_keys(m, from, to) };
            }
            return;
        }
        let whole = |m: &Move| m.from_slot.is_multiple_of(group) && m.to_slot.is_multiple_of(group);
        let goes_on = |a: &Move, b: &Move| a.to == b.to && a.to_slot + a.len == b.to_slot && !whole(a) && !whole(b);
        // All is read before anything is written: writing one token of a group changes what the others' codes mean.
        let mut tokens = Vec::new();
        for m in moves.iter().filter(|m| !whole(m)) {
            let at = tokens.len();
            tokens.resize(at + m.len as usize * kept, 0f32);
            // SAFETY: checked moves.
            unsafe { self.keys_f32(m.from, head, m.from_slot, &mut tokens[at..]) };
        }
        let mut rest = &tokens[..];
        for run in moves.chunk_by(goes_on) {
            let m = &run[0];
            // SAFETY: checked moves.
            unsafe {
                if whole(m) {
                    let (from, to) = (self.rows(m.from, head, m.from_slot), self.rows(m.to, head, m.to_slot));
                    self.copy_keys(m, from, to);
                    let scales = |slot: u32| (slot / group) as usize * 2 * kept;
                    let (from, to) = (from.key_scales.add(scales(m.from_slot)), to.key_scales.add(scales(m.to_slot)));
                    std::ptr::copy(from, to.cast_mut(), m.len.div_ceil(group) as usize * 2 * kept);
                } else {
                    let n: usize = run.iter().map(|m| m.len as usize).sum();
                    let (mine, others) = rest.split_at(n * kept);
                    rest = others;
                    self.put_keys(m.to, head, m.to_slot, mine);
                }
            }
        }
    }
}

/// The step and least value of a group, as they are stored.
#[derive(Clone, Copy)]
struct Scale {
    step: f16,
    least: f16,
    top: f32,
}

impl Scale {
    /// The scale of a group of numbers. A group with a number that is not finite, or that a half cannot hold, becomes NaN.
    fn of(numbers: impl Iterator<Item = f32>, bits: u32) -> Self {
        let top = ((1u32 << bits) - 1) as f32;
        let (mut min, mut max, mut sound) = (f32::INFINITY, f32::NEG_INFINITY, true);
        for x in numbers {
            (min, max) = (min.min(x), max.max(x));
            sound &= x.is_finite();
        }
        // Downwards, so that no number lies below it.
        let mut least = f16::from_f32(min);
        if least.to_f32() > min {
            least = if least == f16::ZERO { f16::from_bits(0x8001) } else { step_down(least) };
        }
        let step = f16::from_f32((max - least.to_f32()) / top);
        if !sound || !least.is_finite() || !step.is_finite() {
            return Scale { step: f16::NAN, least: f16::NAN, top };
        }
        Scale { step, least, top }
    }

    fn halves(self) -> (u16, u16) {
        (self.step.to_bits(), self.least.to_bits())
    }

    /// The code of the nearest number.
    fn code(self, x: f32) -> u32 {
        let step = self.step.to_f32();
        // Also NaN becomes 0 here; its group is NaN by its scale.
        if step > 0.0 { ((x - self.least.to_f32()) / step).round().clamp(0.0, self.top) as u32 } else { 0 }
    }
}

/// The next half below one that is not zero.
fn step_down(x: f16) -> f16 {
    f16::from_bits(if x.is_sign_negative() { x.to_bits() + 1 } else { x.to_bits() - 1 })
}

#[inline(always)]
fn number(step: u16, least: u16, code: u32) -> f32 {
    f16::from_bits(step).to_f32().mul_add(code as f32, f16::from_bits(least).to_f32())
}

/// # Safety
/// The byte of the place is readable.
#[inline(always)]
unsafe fn code(codes: *const u8, (byte, bit): (usize, u32), bits: u32) -> u32 {
    // SAFETY: the caller's promise.
    u32::from(unsafe { *codes.add(byte) }) >> bit & ((1 << bits) - 1)
}

/// # Safety
/// The byte of the place is readable and writable.
#[inline(always)]
unsafe fn put_code(codes: *mut u8, (byte, bit): (usize, u32), bits: u32, code: u32) {
    let mask = (((1u32 << bits) - 1) << bit) as u8;
    // SAFETY: the caller's promise.
    unsafe {
        let byte = codes.add(byte);
        *byte = *byte & !mask | (code << bit) as u8;
    }
}

/// # Safety
/// An aligned element of `dtype` at `p`.
#[inline(always)]
unsafe fn element(dtype: Dtype, p: *const u8) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            Dtype::F32 => *p.cast::<f32>(),
            Dtype::BF16 => bf16::from_bits(*p.cast()).to_f32(),
            Dtype::F16 => f16::from_bits(*p.cast()).to_f32(),
        }
    }
}

/// # Safety
/// Room for an aligned element of `dtype` at `p`.
#[inline(always)]
unsafe fn put_element(dtype: Dtype, p: *mut u8, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            Dtype::F32 => *p.cast::<f32>() = x,
            Dtype::BF16 => *p.cast::<u16>() = bf16::from_f32(x).to_bits(),
            Dtype::F16 => *p.cast::<u16>() = f16::from_f32(x).to_bits(),
        }
    }
}
