//! What few of many blocks have, side by side: who looks at all of it does not look at the other blocks, of which a text that lies in a file
//! has many.

use crate::{Error, Result, fault};

/// By block what some have.
pub(super) struct Dense<T> {
    /// By block which of the values is its own, plus one; 0 for none.
    of_block: Vec<u32>,
    held: Vec<(u32, T)>,
}

impl<T> Default for Dense<T> {
    fn default() -> Self {
        Dense { of_block: Vec::new(), held: Vec::new() }
    }
}

impl<T> Dense<T> {
    /// Blocks that there may be anything of: of none from here on there is.
    pub fn blocks(&self) -> usize {
        self.of_block.len()
    }

    /// What there is, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.held.iter().map(|(block, value)| (*block as usize, value))
    }

    #[inline]
    pub fn get(&self, block: usize) -> Option<&T> {
        let at = *self.of_block.get(block)?;
        Some(&self.held.get((at as usize).checked_sub(1)?)?.1)
    }

    /// Room for blocks below `len`, and for `more` values.
    pub fn reserve(&mut self, len: usize, more: usize) -> Result<()> {
        fault::may_lack(more)?;
        let blocks = len.saturating_sub(self.of_block.len());
        if self.of_block.try_reserve(blocks).is_err() || self.held.try_reserve(more).is_err() {
            return Err(Error::OutOfMemory { bytes: blocks * size_of::<u32>() + more * size_of::<(u32, T)>() });
        }
        self.of_block.resize(self.of_block.len() + blocks, 0);
        Ok(())
    }

    /// What was reserved is used.
    pub fn set(&mut self, block: usize, value: T) {
        match self.of_block[block] {
            0 => {
                self.held.push((block as u32, value));
                self.of_block[block] = self.held.len() as u32;
            }
            at => self.held[at as usize - 1].1 = value,
        }
    }

    pub fn take(&mut self, block: usize) -> Option<T> {
        let at = std::mem::take(self.of_block.get_mut(block)?).checked_sub(1)?;
        let (_, value) = self.held.swap_remove(at as usize);
        if let Some(&(moved, _)) = self.held.get(at as usize) {
            self.of_block[moved as usize] = at + 1;
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_and_go_in_any_order() {
        let (mut dense, mut plain) = (Dense::default(), vec![None; 40]);
        let mut noise = 88_172_645_463_325_252u64;
        for turn in 0..3000u32 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let block = noise as usize % 40;
            if noise >> 40 & 1 == 0 {
                dense.reserve(block + 1, 1).unwrap();
                dense.set(block, turn);
                plain[block] = Some(turn);
            } else {
                assert_eq!(dense.take(block), plain[block].take());
            }
            assert!((0..45).all(|block| dense.get(block) == plain.get(block).and_then(Option::as_ref)));
            let mut held: Vec<_> = dense.iter().map(|(block, &value)| (block, Some(value))).collect();
            held.sort_unstable();
            assert!(held.into_iter().eq((0..).zip(plain.clone()).filter(|(_, value)| value.is_some())));
        }
        assert!(dense.blocks() <= 40);
    }
}
