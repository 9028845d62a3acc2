//! The keys and values of one layer, block by block, in memory that grows without ever moving.

use std::ptr::NonNull;

use super::bounds::Bounds;
use super::packed::{Chosen, Packed, PackedBytes, Packing};
use crate::ids::{BLOCK, BlockId, PACKED, Run};
use crate::plan::{Move, Step};
use crate::tensor::{Dtype, Elems, ElemsMut, View, check_dtype, check_len, widen};
use crate::{Error, Result};

use super::slabs::{MAX_BLOCKS, Slabs, needs, number, reserve_all};

/// Keys and values of one layer.
///
/// Which slot holds which token is not known here. A block has memory from when it is first written, for the slots that were written
/// and some more; it is head-major inside, `[heads][slots][dim]`.
pub struct Arena {
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    dtype: Dtype,
    keys: Slabs,
    values: Slabs,
    packed: Option<Packed>,
    pub(super) bounds: Option<Bounds>,
}

/// Where the tokens of one block lie.
struct Place {
    keys: NonNull<u8>,
    values: NonNull<u8>,
    /// Bytes from head to head, of keys and of values.
    hops: (usize, usize),
    /// For each head.
    slots: usize,
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
        Ok(Arena { heads, key_dim, value_dim, dtype, keys, values, packed: None, bounds: None })
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

    /// Gives the packed blocks of `to` memory and the channels of those of `from`.
    pub(super) fn share_channels(&mut self, from: &[Run], to: &[Run]) -> Result<()> {
        let to: Vec<_> = to.iter().filter(|run| run.block.is_packed()).map(|run| (run.block, run.hi)).collect();
        let first = from.iter().map(|run| run.block).find(|block| block.is_packed());
        let (Some(packed), Some(first)) = (&mut self.packed, first) else {
            return match to.first() {
                Some((block, _)) => Err(self.bad_block(block.0)),
                None => Ok(()),
            };
        };
        let channels = std::sync::Arc::clone(packed.channels_of(first)?);
        packed.reserve(to.iter().copied())?;
        packed.choose(to.iter().map(|&(block, _)| block), &channels);
        Ok(())
    }

    /// Makes moves from plain blocks to packed ones: what lands there keeps these channels.
    pub fn pack(&mut self, moves: &[Move], chosen: &Chosen) -> Result<()> {
        let (heads, key_dim, kb) = (self.heads, self.key_dim, self.key_dim * self.dtype.size());
        let vb = self.value_dim * self.dtype.size();
        for m in moves {
            Self::check_slots("move", m.from_slot, m.from_slot.saturating_add(m.len))?;
            Self::check_slots("move", m.to_slot, m.to_slot.saturating_add(m.len))?;
            if m.from.is_packed() || !self.holds_to(m.from, m.from_slot + m.len) {
                return Err(self.bad_block(m.from.0));
            }
            self.check_id(m.to.0)?;
            if !m.to.is_packed() {
                return Err(self.bad_block(m.to.0));
            }
        }
        let Some(packed) = &mut self.packed else {
            return Err(Error::Unsupported("this layer was not told how to pack"));
        };
        let channels = match chosen {
            Chosen::New(channels) => std::sync::Arc::clone(channels),
            Chosen::Like(block) if block.is_packed() => std::sync::Arc::clone(packed.channels_of(*block)?),
            Chosen::Like(block) => return Err(Error::BadBlock { block: block.0, have: 0 }),
        };
        let fits = channels.kept() == packed.packing().key_kept && channels.heads() == heads;
        if !fits || channels.highest() >= key_dim {
            let expected = format!("[{heads}, {}]", packed.packing().key_kept);
            let got = format!("[{}, {}]", channels.heads(), channels.kept());
            return Err(Error::Shape { what: "channels", expected, got });
        }
        packed.reserve(moves.iter().map(ends))?;
        packed.choose(moves.iter().map(|m| m.to), &channels);
        let mut packed = self.packed.take();
        for packed in packed.iter_mut() {
            for head in 0..heads {
                for run in joined(moves) {
                    // Neighbouring moves into one block become one, so that numbers that share a scale are seen together.
                    let n: usize = run.iter().map(|m| m.len as usize).sum();
                    let (mut keys, mut values) = (vec![0u8; n * kb], vec![0u8; n * vb]);
                    let mut at = 0;
                    for m in run {
                        let (k, v) = self.rows(m.from, head, m.from_slot);
                        let len = m.len as usize;
                        // SAFETY: the source was checked to lie in its block; the buffers have room for all moves of the run.
                        unsafe {
                            std::ptr::copy_nonoverlapping(k, keys.as_mut_ptr().add(at * kb), len * kb);
                            std::ptr::copy_nonoverlapping(v, values.as_mut_ptr().add(at * vb), len * vb);
                        }
                        at += len;
                    }
                    // SAFETY: `n` rows at both pointers; the slots were checked, and the block was given memory and channels.
                    unsafe { packed.put(run[0].to, head, run[0].to_slot, keys.as_ptr(), values.as_ptr(), n) };
                }
            }
        }
        self.packed = packed;
        Ok(())
    }

    /// Blocks that have memory.
    pub fn num_blocks(&self) -> u32 {
        (0..self.keys.len()).filter(|&block| self.keys.get(block).is_some()).count() as u32
    }

    /// Gives every block below `num_blocks` memory. Writing does so by itself, for the blocks it writes.
    pub fn ensure(&mut self, num_blocks: u32) -> Result<()> {
        if num_blocks == 0 {
            return Ok(());
        }
        self.check_id(num_blocks - 1)?;
        self.reserve((0..num_blocks).map(|block| (BlockId(block), BLOCK)))
    }

    /// Gives these blocks memory up to a slot; on failure nothing has changed.
    fn reserve(&mut self, wanted: impl Iterator<Item = (BlockId, u32)>) -> Result<()> {
        reserve_all([&mut self.keys, &mut self.values].into_iter(), &needs(wanted))
    }

    /// What is known of these plain blocks no longer holds: they are written.
    fn touch(&mut self, blocks: impl Iterator<Item = BlockId>) {
        if let Some(bounds) = &mut self.bounds {
            blocks.for_each(|block| bounds.touch(block));
        }
    }

    /// Frees the blocks that are not in use. `in_use` is indexed by block; blocks beyond its end are not in use.
    /// `packed_in_use` is the same for packed blocks, counted from [`PACKED`].
    pub fn free_unused(&mut self, in_use: &[bool], packed_in_use: &[bool]) {
        if let Some(packed) = &mut self.packed {
            packed.free_unused(packed_in_use);
        }
        for block in 0..self.keys.len() {
            if !in_use.get(block).copied().unwrap_or(false) {
                self.keys.free(block);
                self.values.free(block);
                if let Some(bounds) = &mut self.bounds {
                    bounds.free(block);
                }
            }
        }
    }

    fn bad_block(&self, block: u32) -> Error {
        Error::BadBlock { block, have: self.num_blocks() }
    }

    fn check_id(&self, block: u32) -> Result<()> {
        let most = if BlockId(block).is_packed() { PACKED + MAX_BLOCKS } else { MAX_BLOCKS };
        if block < most { Ok(()) } else { Err(self.bad_block(block)) }
    }

    fn place(&self, block: BlockId) -> Result<Place> {
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

    /// Whether the block has memory.
    pub fn holds(&self, block: BlockId) -> bool {
        if block.is_packed() {
            return self.packed.as_ref().is_some_and(|packed| packed.holds(block));
        }
        self.place(block).is_ok()
    }

    /// Whether the block's slots before `end` have memory.
    fn holds_to(&self, block: BlockId, end: u32) -> bool {
        if block.is_packed() {
            return self.packed.as_ref().is_some_and(|packed| packed.holds_to(block, end));
        }
        self.place(block).is_ok_and(|place| end as usize <= place.slots)
    }

    fn check_slots(what: &'static str, lo: u32, hi: u32) -> Result<()> {
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

    fn rows_mut(&mut self, block: BlockId, head: usize, slot: u32) -> (*mut u8, *mut u8) {
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

    /// Makes the step's copies, then stores its new tokens from `k` and `v` (`[rows, heads, columns, dim]`).
    pub fn append(&mut self, k: &View<'_>, v: &View<'_>, step: &Step) -> Result<()> {
        for (what, view, dim) in [("k", k, self.key_dim), ("v", v, self.value_dim)] {
            check_dtype(what, view.elems(), self.dtype)?;
            let expected = [step.num_rows, self.heads, step.num_queries, dim];
            if view.shape() != expected {
                return Err(Error::Shape {
                    what,
                    expected: format!("{expected:?}"),
                    got: format!("{:?}", view.shape()),
                });
            }
        }
        check_len("new_lens", step.new_lens.len(), step.num_rows)?;
        if step.new_lens.iter().any(|&n| n > step.num_queries) {
            let expected = format!("at most {} new tokens a row", step.num_queries);
            return Err(Error::Shape { what: "new_lens", expected, got: format!("{:?}", step.new_lens) });
        }
        for a in &step.appends {
            Self::check_slots("append", a.slot, a.slot.saturating_add(a.len))?;
            let fits = step.new_lens.get(a.row).is_some_and(|&n| a.new <= n && a.len as usize <= n - a.new);
            if !fits {
                let got = format!("tokens {}..+{} of row {}", a.new, a.len, a.row);
                return Err(Error::OutOfRange { what: "append", expected: "new tokens of the step", got });
            }
            if a.block.0 >= step.num_blocks.min(MAX_BLOCKS) {
                return Err(Error::BadBlock { block: a.block.0, have: step.num_blocks });
            }
        }
        self.check_moves(&step.copies)?;
        if let Some(m) = step.copies.iter().find(|m| m.to.is_packed()) {
            return Err(self.bad_block(m.to.0));
        }
        let appended = step.appends.iter().map(|a| (a.block, a.slot + a.len));
        self.reserve(step.copies.iter().map(ends).chain(appended))?;

        self.move_tokens(&step.copies);
        self.touch(step.appends.iter().map(|a| a.block));
        let es = self.dtype.size();
        for a in step.appends.iter().filter(|a| a.len > 0) {
            let column = step.num_queries - step.new_lens[a.row] + a.new;
            for head in 0..self.heads {
                let (keys, values) = self.rows_mut(a.block, head, a.slot);
                for (to, view, dim) in [(keys, k, self.key_dim), (values, v, self.value_dim)] {
                    for i in 0..a.len as usize {
                        let from = view.row(a.row, head, column + i).as_bytes_ptr();
                        // SAFETY: `from` is a checked row of `dim` elements; `to` is the row of slot `a.slot + i`, which was
                        // checked to lie in the block. A borrowed view cannot overlap memory that the arena owns.
                        unsafe { std::ptr::copy_nonoverlapping(from, to.add(i * dim * es), dim * es) };
                    }
                }
            }
        }
        Ok(())
    }

    fn check_moves(&self, moves: &[Move]) -> Result<()> {
        for (i, m) in moves.iter().enumerate() {
            Self::check_slots("move", m.from_slot, m.from_slot.saturating_add(m.len))?;
            Self::check_slots("move", m.to_slot, m.to_slot.saturating_add(m.len))?;
            self.check_id(m.to.0)?;
            if m.from.is_packed() != m.to.is_packed() {
                return Err(Error::Unsupported("tokens cannot be moved between plain and packed blocks; pack them"));
            }
            // What an earlier move fills may be moved on, though it has no memory yet.
            let end = m.from_slot + m.len;
            let filled = |earlier: &Move| earlier.to == m.from && end <= earlier.to_slot + earlier.len;
            if !self.holds_to(m.from, end) && !moves[..i].iter().any(filled) {
                return Err(self.bad_block(m.from.0));
            }
        }
        Ok(())
    }

    /// Makes checked moves, each as a memmove: bits are carried over, never computed with.
    ///
    /// Head by head, keys before values: each is then one walk through memory, where all of them at once would be dozens.
    fn move_tokens(&mut self, moves: &[Move]) {
        self.touch(moves.iter().map(|m| m.to));
        let (kb, vb) = (self.key_dim * self.dtype.size(), self.value_dim * self.dtype.size());
        // Where the first head's rows lie, and how many bytes further on the next head's.
        let hops = moves.iter().filter(|m| m.len > 0).map(|m| {
            let hops = |block: BlockId| self.place(block).map_or((0, 0), |place| place.hops);
            let (from, to) = (self.rows(m.from, 0, m.from_slot), self.rows(m.to, 0, m.to_slot));
            // The buffers are raw memory owned through `&mut self`, so writing through their pointers is allowed.
            let to = (to.0.cast_mut(), to.1.cast_mut());
            (from, to, hops(m.from), hops(m.to), m.len as usize)
        });
        let hops: Vec<_> = hops.collect();
        for head in 0..self.heads {
            for &(from, to, from_hop, to_hop, len) in &hops {
                // SAFETY: both ranges were checked to lie inside their blocks, which have memory; `copy` allows them to overlap.
                unsafe { std::ptr::copy(from.0.add(head * from_hop.0), to.0.add(head * to_hop.0), len * kb) };
            }
            for &(from, to, from_hop, to_hop, len) in &hops {
                // SAFETY: as above.
                unsafe { std::ptr::copy(from.1.add(head * from_hop.1), to.1.add(head * to_hop.1), len * vb) };
            }
        }
    }

    /// Applies the moves in order.
    pub fn apply(&mut self, moves: &[Move]) -> Result<()> {
        self.check_moves(moves)?;
        let (packed, plain): (Vec<Move>, Vec<Move>) = moves.iter().partition(|m| m.to.is_packed());
        self.reserve(plain.iter().map(ends))?;
        if let Some(mine) = &mut self.packed
            && !packed.is_empty()
        {
            mine.reserve(packed.iter().map(ends))?;
            mine.move_tokens(&packed)?;
        }
        self.move_tokens(&plain);
        Ok(())
    }

    /// The number of tokens of the runs, when `k` and `v` are `[heads, total, dim]` with room for them from row `at` on.
    fn check_runs(&self, runs: &[Run], k: Elems<'_>, v: Elems<'_>, at: usize, total: usize) -> Result<()> {
        for run in runs {
            Self::check_slots("run", run.lo, run.hi)?;
            self.check_id(run.block.0)?;
        }
        let n: usize = runs.iter().map(|r| r.len() as usize).sum();
        if at.checked_add(n).is_none_or(|end| end > total) {
            let got = format!("{n} tokens at row {at} of {total}");
            return Err(Error::Shape { what: "runs", expected: "room for all tokens".to_string(), got });
        }
        for (what, elems, dim) in [("k", k, self.key_dim), ("v", v, self.value_dim)] {
            check_dtype(what, elems, self.dtype)?;
            let len = total.checked_mul(self.heads * dim);
            check_len(what, elems.len(), len.unwrap_or(usize::MAX))?;
        }
        Ok(())
    }

    /// For each run of plain blocks and head: its first key and value here, its first row there, its length. For the others `packed`.
    fn each_run(
        &self,
        runs: &[Run],
        at: usize,
        total: usize,
        mut plain: impl FnMut(*const u8, *const u8, usize, usize),
        mut packed: impl FnMut(&Run, usize, usize),
    ) {
        for head in 0..self.heads {
            let mut row = head * total + at;
            for run in runs.iter().filter(|r| !r.is_empty()) {
                if run.block.is_packed() {
                    packed(run, head, row);
                } else {
                    let (keys, values) = self.rows(run.block, head, run.lo);
                    plain(keys, values, row, run.len() as usize);
                }
                row += run.len() as usize;
            }
        }
    }

    /// Copies the tokens of the runs to rows `at..` of `k` and `v`, each `[heads, total, dim]`; dropped channels are zero.
    pub fn gather(
        &self,
        runs: &[Run],
        mut k: ElemsMut<'_>,
        mut v: ElemsMut<'_>,
        at: usize,
        total: usize,
    ) -> Result<()> {
        self.check_runs(runs, k.as_ref(), v.as_ref(), at, total)?;
        if let Some(bad) = runs.iter().find(|run| !self.holds_to(run.block, run.hi)) {
            return Err(self.bad_block(bad.block.0));
        }
        let (kb, vb) = (self.key_dim * self.dtype.size(), self.value_dim * self.dtype.size());
        let (k, v) = (k.as_bytes_mut_ptr(), v.as_bytes_mut_ptr());
        let plain = |keys: *const u8, values: *const u8, row: usize, n: usize| {
            // SAFETY: `check_runs` found room for all rows; the source is inside a block; a caller's buffer cannot overlap the arena.
            unsafe {
                std::ptr::copy_nonoverlapping(keys, k.add(row * kb), n * kb);
                std::ptr::copy_nonoverlapping(values, v.add(row * vb), n * vb);
            }
        };
        let packed = |run: &Run, head: usize, row: usize| {
            if let Some(packed) = &self.packed {
                // SAFETY: as above; the block was found to have memory.
                unsafe {
                    packed.unpack(run.block, head, run.lo, run.len() as usize, k.add(row * kb), v.add(row * vb));
                }
            }
        };
        self.each_run(runs, at, total, plain, packed);
        Ok(())
    }

    /// The inverse of [`Arena::gather`] from row 0 on: stores saved tokens at the slots of the runs. Packed blocks must have channels.
    pub fn write(&mut self, runs: &[Run], k: Elems<'_>, v: Elems<'_>) -> Result<()> {
        let total = runs.iter().map(|r| r.hi.saturating_sub(r.lo) as usize).sum();
        self.check_runs(runs, k, v, 0, total)?;
        if let Some(bad) = runs.iter().find(|run| run.block.is_packed() && !self.holds(run.block)) {
            return Err(self.bad_block(bad.block.0));
        }
        let (packed, plain): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.block.is_packed());
        self.reserve(plain.iter().map(|run| (run.block, run.hi)))?;
        if let Some(mine) = &mut self.packed {
            mine.reserve(packed.iter().map(|run| (run.block, run.hi)))?;
        }
        self.touch(runs.iter().map(|r| r.block));
        let (kb, vb) = (self.key_dim * self.dtype.size(), self.value_dim * self.dtype.size());
        let (k, v) = (k.as_bytes_ptr(), v.as_bytes_ptr());
        let mut mine = self.packed.take();
        // SAFETY: as in `gather`, the other way round; `&mut self` gives the right to write to the arena's memory.
        let plain = |keys: *const u8, values: *const u8, row: usize, n: usize| unsafe {
            std::ptr::copy_nonoverlapping(k.add(row * kb), keys.cast_mut(), n * kb);
            std::ptr::copy_nonoverlapping(v.add(row * vb), values.cast_mut(), n * vb);
        };
        let packed = |run: &Run, head: usize, row: usize| {
            if let Some(packed) = &mut mine {
                // SAFETY: as above; the block was found to have memory and channels.
                unsafe {
                    packed.put(run.block, head, run.lo, k.add(row * kb), v.add(row * vb), run.len() as usize);
                }
            }
        };
        self.each_run(runs, 0, total, plain, packed);
        self.packed = mine;
        Ok(())
    }
}

/// The block that a move writes, and up to which slot.
fn ends(m: &Move) -> (BlockId, u32) {
    (m.to, m.to_slot + m.len)
}

/// The moves, cut where one does not go on where the last one ended.
fn joined(moves: &[Move]) -> impl Iterator<Item = &[Move]> {
    moves.chunk_by(|a, b| a.to == b.to && a.to_slot + a.len == b.to_slot).filter(|run| run.iter().any(|m| m.len > 0))
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
