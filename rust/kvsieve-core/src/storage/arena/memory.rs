//! Which blocks have memory, and where a token's rows are in it.
//!
//! Which slot holds which token is not known here.

use std::ptr::NonNull;

use crate::ids::{BLOCK, BlockId, PACKED};
use crate::storage::bounds::Bounds;
use crate::storage::packed::{Packed, PackedBytes, Packing};
use crate::storage::slabs::{MAX_BLOCKS, Slabs, needs, number, reserve_all};
use crate::storage::tier::Tier;
use crate::tensor::{Dtype, Elems, widen};
use crate::{Error, Result};

/// Keys and values of one layer.
///
/// Which slot holds which token is not known here. A block has memory from when it is first written, for the slots that were written
/// and some more; it is head-major inside, `[heads][slots][dim]`.
pub struct Arena {
    pub(super) heads: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) dtype: Dtype,
    pub(super) keys: Slabs,
    pub(super) values: Slabs,
    pub(super) packed: Option<Packed>,
    pub(super) bounds: Option<Bounds>,
    /// Of blocks that may lie in a file.
    pub(super) tier: Option<Tier>,
}

/// Where the tokens of one block lie.
pub(super) struct Place {
    pub(super) keys: NonNull<u8>,
    pub(super) values: NonNull<u8>,
    /// Bytes from head to head, of keys and of values.
    pub(super) hops: (usize, usize),
    /// For each head.
    pub(super) slots: usize,
}

impl Arena {
    pub fn new(heads: usize, key_dim: usize, value_dim: usize, dtype: Dtype) -> Result<Self> {
        let largest = BLOCK as usize;
        for (what, n) in [("num_kv_heads", heads), ("key_dim", key_dim), ("value_dim", value_dim)] {
            // Each below 2^20 keeps every product of a slab far inside 64 bits.
            if n == 0 || n >= 1 << 20 || largest.checked_mul(n * dtype.size()).is_none() {
                return Err(Error::OutOfRange { what, expected: "between 1 and 2^20 - 1", got: n.to_string() });
            }
        }
        let rows = |dim: usize| Slabs::of_rows(heads, dim * dtype.size());
        let (keys, values) = (rows(key_dim), rows(value_dim));
        Ok(Arena { heads, key_dim, value_dim, dtype, keys, values, packed: None, bounds: None, tier: None })
    }

    pub fn num_kv_heads(&self) -> usize {
        self.heads
    }

    pub fn key_dim(&self) -> usize {
        self.key_dim
    }

    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of one token's keys and values over all heads.
    pub fn token_bytes(&self) -> usize {
        self.heads * (self.key_dim + self.value_dim) * self.dtype.size()
    }

    /// Exactly what was asked for: addresses without memory do not count.
    pub fn bytes(&self) -> usize {
        let PackedBytes { keys, values, scales, channels } = self.packed_bytes();
        self.plain_bytes().0 + self.plain_bytes().1 + keys + values + scales + channels + self.bounds_bytes()
    }

    /// Bytes of plain keys and of plain values.
    pub fn plain_bytes(&self) -> (usize, usize) {
        (self.keys.bytes(), self.values.bytes())
    }

    /// Bytes of packed tokens.
    pub fn packed_bytes(&self) -> PackedBytes {
        self.packed.as_ref().map(Packed::bytes).unwrap_or_default()
    }

    /// Says how this layer packs its tokens. Once, before any is packed.
    pub fn set_packing(&mut self, packing: Packing) -> Result<()> {
        match &self.packed {
            Some(packed) if packed.packing() != packing => {
                Err(Error::Unsupported("a layer's packing cannot change; open a new stream"))
            }
            Some(_) => Ok(()),
            None => {
                self.packed = Some(Packed::new(self.heads, self.key_dim, self.value_dim, self.dtype, packing)?);
                Ok(())
            }
        }
    }

    pub fn packed(&self) -> Option<&Packed> {
        self.packed.as_ref()
    }

    /// Blocks that have memory.
    pub fn num_blocks(&self) -> u32 {
        self.keys.held().count() as u32
    }

    /// Gives every block below `num_blocks` memory. Writing does so by itself, for the blocks it writes.
    pub fn ensure(&mut self, num_blocks: u32) -> Result<()> {
        if num_blocks == 0 {
            return Ok(());
        }
        self.check_id(num_blocks - 1)?;
        self.reserve((0..num_blocks).map(|block| (BlockId(block), BLOCK)))
    }

    /// Gives these blocks memory up to a slot, with what they hold in a file; on failure no token has changed.
    pub(super) fn reserve(&mut self, wanted: impl Iterator<Item = (BlockId, u32)>) -> Result<()> {
        let needs = needs(wanted);
        self.load_for(needs.iter().map(|&(block, _)| BlockId(block as u32)))?;
        reserve_all([&mut self.keys, &mut self.values].into_iter(), &needs)
    }

    /// What is known of these blocks no longer holds: they are written, from a slot on.
    pub(super) fn touch(&mut self, blocks: impl Iterator<Item = (BlockId, u32)>) {
        for (block, slot) in blocks {
            self.void_bounds(block, slot);
            if let Some(tier) = self.tier.as_mut().filter(|_| !block.is_packed()) {
                tier.touch(number(block));
            }
        }
    }

    /// Frees the blocks that are not in use. `in_use` is indexed by block; blocks beyond its end are not in use.
    /// `packed_in_use` is the same for packed blocks, counted from [`PACKED`].
    pub fn free_unused(&mut self, in_use: &[bool], packed_in_use: &[bool]) {
        if let Some(packed) = &mut self.packed {
            packed.free_unused(packed_in_use);
        }
        if let Some(bounds) = &mut self.bounds {
            bounds.free_unused(in_use, packed_in_use);
        }
        for block in 0..self.keys.len() {
            if !in_use.get(block).copied().unwrap_or(false) {
                self.keys.free(block);
                self.values.free(block);
                if let Some(tier) = &mut self.tier {
                    tier.free(block);
                }
            }
        }
    }

    pub(super) fn bad_block(&self, block: u32) -> Error {
        if self.is_spilled(BlockId(block)) {
            return Error::NotInMemory { block };
        }
        Error::BadBlock { block, have: self.num_blocks() }
    }

    pub(super) fn check_id(&self, block: u32) -> Result<()> {
        let most = if BlockId(block).is_packed() { PACKED + MAX_BLOCKS } else { MAX_BLOCKS };
        if block < most { Ok(()) } else { Err(self.bad_block(block)) }
    }

    pub(super) fn place(&self, block: BlockId) -> Result<Place> {
        if block.is_packed() {
            return Err(self.bad_block(block.0));
        }
        let at = number(block);
        match (self.keys.get(at), self.values.get(at)) {
            (Some(keys), Some(values)) => {
                let hops = (keys.hop, values.hop);
                Ok(Place { keys: keys.start, values: values.start, hops, slots: keys.slots })
            }
            _ => Err(self.bad_block(block.0)),
        }
    }

    /// Where the keys of `head` from `slot` of a block on are, whether its values are in memory or not.
    pub(super) fn keys_from(&self, block: BlockId, head: usize, slot: u32) -> Result<*const u8> {
        let found = if block.is_packed() { None } else { self.keys.get(number(block)) };
        let Some(keys) = found.filter(|keys| head < self.heads && (slot as usize) < keys.slots) else {
            return Err(self.bad_block(block.0));
        };
        // SAFETY: the block has memory for so many slots of every head.
        Ok(unsafe { keys.start.as_ptr().add(head * keys.hop + slot as usize * self.key_dim * self.dtype.size()) })
    }

    /// Whether the block has memory.
    pub fn holds(&self, block: BlockId) -> bool {
        if block.is_packed() {
            return self.packed.as_ref().is_some_and(|packed| packed.holds(block));
        }
        self.place(block).is_ok()
    }

    /// Whether the block's slots before `end` have memory.
    pub(super) fn holds_to(&self, block: BlockId, end: u32) -> bool {
        if block.is_packed() {
            return self.packed.as_ref().is_some_and(|packed| packed.holds_to(block, end));
        }
        self.place(block).is_ok_and(|place| end as usize <= place.slots)
    }

    pub(super) fn check_slots(what: &'static str, lo: u32, hi: u32) -> Result<()> {
        if lo <= hi && hi <= BLOCK {
            return Ok(());
        }
        Err(Error::OutOfRange { what, expected: "a range of slots inside one block", got: format!("{lo}..{hi}") })
    }

    /// Refuses a span that lies outside its block or has no memory.
    pub(crate) fn check_span(&self, block: BlockId, lo: u32, hi: u32) -> Result<()> {
        Self::check_slots("span", lo, hi)?;
        if self.holds_to(block, hi) { Ok(()) } else { Err(self.bad_block(block.0)) }
    }

    /// As [`Arena::check_span`], of the keys alone: values may be in the file.
    pub(crate) fn check_keys(&self, block: BlockId, lo: u32, hi: u32) -> Result<()> {
        if !self.values_alone() || block.is_packed() {
            return self.check_span(block, lo, hi);
        }
        Self::check_slots("span", lo, hi)?;
        let slots = self.keys.slots(number(block));
        if hi <= slots { Ok(()) } else { Err(self.bad_block(block.0)) }
    }

    /// The keys of [`Arena::rows`], and no values: these may be in the file. Panics as that.
    pub(crate) fn key_rows(&self, block: BlockId, head: usize, slot: u32) -> *const u8 {
        let Ok(keys) = self.keys_from(block, head, slot) else { panic!("{block:?} has no keys in memory") };
        keys
    }

    /// Keys and values of `head` from `slot` of `block` on; the slots behind it that have memory follow at distances of the dims. Heads lie
    /// at equal distances.
    ///
    /// Panics when the slot has no memory, or the head does not exist.
    pub(crate) fn rows(&self, block: BlockId, head: usize, slot: u32) -> (*const u8, *const u8) {
        let Ok(place) = self.place(block) else { panic!("{block:?} has no memory") };
        assert!(head < self.heads && (slot as usize) < place.slots, "head {head} or slot {slot} outside the arena");
        let (slot, es) = (slot as usize, self.dtype.size());
        // SAFETY: both have memory for so many slots of every head.
        unsafe {
            let keys = place.keys.as_ptr().add(head * place.hops.0 + slot * self.key_dim * es);
            let values = place.values.as_ptr().add(head * place.hops.1 + slot * self.value_dim * es);
            (keys.cast_const(), values.cast_const())
        }
    }

    pub(super) fn rows_mut(&mut self, block: BlockId, head: usize, slot: u32) -> (*mut u8, *mut u8) {
        // The buffers are raw memory owned through `&mut self` here, so writing through their pointers is allowed.
        let (keys, values) = self.rows(block, head, slot);
        (keys.cast_mut(), values.cast_mut())
    }

    fn check_plain(&self, block: BlockId, slot: u32) -> Result<()> {
        Self::check_slots("slot", slot, slot.saturating_add(1))?;
        let place = self.place(block)?;
        if (slot as usize) < place.slots { Ok(()) } else { Err(self.bad_block(block.0)) }
    }

    /// The key of one token, for tests and for the reference.
    pub fn key(&self, block: BlockId, head: usize, slot: u32) -> Result<Elems<'_>> {
        self.check_plain(block, slot)?;
        let (keys, _) = self.rows(block, head, slot);
        // SAFETY: a row of `key_dim` initialised elements starts here; they are aligned, for slabs are and rows are whole elements.
        Ok(unsafe { elems(self.dtype, keys, self.key_dim) })
    }

    /// The value of one token, for tests and for the reference.
    pub fn value(&self, block: BlockId, head: usize, slot: u32) -> Result<Elems<'_>> {
        self.check_plain(block, slot)?;
        let (_, values) = self.rows(block, head, slot);
        // SAFETY: as in `key`, for `value_dim` elements.
        Ok(unsafe { elems(self.dtype, values, self.value_dim) })
    }

    /// Key and value of one token as numbers, whatever the block stores; dropped channels are zero. For the reference.
    pub fn token(&self, block: BlockId, head: usize, slot: u32) -> Result<(Vec<f64>, Vec<f64>)> {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        match &self.packed {
            Some(packed) if block.is_packed() => {
                self.check_span(block, slot, slot + 1)?;
                let channels = packed.channels_of(block)?;
                let (mut thin, mut value) = (vec![0f32; channels.kept()], vec![0f32; self.value_dim]);
                // SAFETY: the block was found to have memory and channels, and the slot to lie in it.
                unsafe {
                    packed.keys_f32(block, head, slot, &mut thin);
                    packed.values_f32(block, head, slot, &mut value);
                }
                let mut key = vec![0f32; self.key_dim];
                thin.iter().zip(channels.of(head)).for_each(|(&x, &c)| key[usize::from(c)] = x);
                Ok((wide(&key), wide(&value)))
            }
            _ => {
                let (key, value) = (self.key(block, head, slot)?, self.value(block, head, slot)?);
                let wide = |x: Elems<'_>| (0..x.len()).map(|i| widen(x, self.dtype, i)).collect();
                Ok((wide(key), wide(value)))
            }
        }
    }
}

/// # Safety
/// `n` initialised, aligned elements of `dtype` at `p`, unchanged for the lifetime that the caller gives the result.
unsafe fn elems<'a>(dtype: Dtype, p: *const u8, n: usize) -> Elems<'a> {
    // SAFETY: the caller's promise; every bit pattern is a valid element.
    unsafe {
        match dtype {
            Dtype::F32 => Elems::F32(std::slice::from_raw_parts(p.cast(), n)),
            Dtype::BF16 | Dtype::F16 => Elems::Bits(std::slice::from_raw_parts(p.cast(), n)),
        }
    }
}
