//! The memory of packed blocks.

use std::sync::Arc;

use super::channels::Channels;
use super::packing::{Packing, row_bytes};
use crate::ids::{BLOCK, BlockId, PACKED};
use crate::storage::slabs::{COLUMN, Held, Slabs, needs, number, reserve_all};
use crate::tensor::Dtype;
use crate::{Error, Result, fault};

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
    pub(super) heads: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) dtype: Dtype,
    pub(super) packing: Packing,
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

/// Memory for keys, which lie in columns. Where those are not all of one width, and where they are codes, a block has it as a whole.
fn key_slabs(heads: usize, packing: &Packing, dtype: Dtype) -> Slabs {
    match (packing.key_bits, dtype) {
        (0, Dtype::F32 | Dtype::F16) => Slabs::of_columns(heads, packing.key_kept, dtype.size()),
        (0, Dtype::BF16) if packing.key_kept.is_multiple_of(2) => Slabs::of_columns(heads, packing.key_kept / 2, 4),
        _ => Slabs::of_blocks(heads, BLOCK as usize * row_bytes(packing.key_kept, packing.key_bits, dtype)),
    }
}

const _: () = assert!(BLOCK.is_multiple_of(COLUMN));

impl Packed {
    pub(in crate::storage) fn new(
        heads: usize,
        key_dim: usize,
        value_dim: usize,
        dtype: Dtype,
        packing: Packing,
    ) -> Result<Self> {
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

    pub(in crate::storage) fn holds(&self, block: BlockId) -> bool {
        let at = number(block);
        self.keys.get(at).is_some() && self.channels.get(at).is_some_and(Option::is_some)
    }

    /// Whether the block's slots before `end` have memory.
    pub(in crate::storage) fn holds_to(&self, block: BlockId, end: u32) -> bool {
        let at = number(block);
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
    pub(in crate::storage) fn reserve(&mut self, wanted: impl Iterator<Item = (BlockId, u32)>) -> Result<()> {
        let needs = needs(wanted);
        let Some(&(last, _)) = needs.last() else { return Ok(()) };
        let more = (last + 1).saturating_sub(self.channels.len());
        let oom = |_| Error::OutOfMemory { bytes: more * size_of::<Option<Arc<Channels>>>() };
        fault::may_lack(more)?;
        self.channels.try_reserve(more).map_err(oom)?;
        self.channels.resize_with(self.channels.len() + more, || None);
        reserve_all(self.sections(), &needs)
    }

    /// Frees the blocks that are not in use, and forgets their channels.
    pub(in crate::storage) fn free_unused(&mut self, in_use: &[bool]) {
        for block in 0..self.channels.len() {
            if !in_use.get(block).copied().unwrap_or(false) {
                self.channels[block] = None;
                self.sections().for_each(|section| section.free(block));
            }
        }
    }

    /// One head of a block, from `slot` on. Panics when the block has no memory.
    pub(crate) fn rows(&self, block: BlockId, head: usize, slot: u32) -> Rows<'_> {
        let at = number(block);
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

    /// Gives blocks their channels. The blocks have memory.
    pub(in crate::storage) fn choose(&mut self, blocks: impl Iterator<Item = BlockId>, channels: &Arc<Channels>) {
        for block in blocks {
            self.channels[(block.0 - PACKED) as usize] = Some(Arc::clone(channels));
        }
    }
}
