//! What may happen to a stream.

use proptest::prelude::*;

#[derive(Clone, Debug)]
pub enum Op {
    Append {
        lens: [usize; 3],
        pads: usize,
        store_all: bool,
        scored: bool,
    },
    Die {
        lens: [usize; 3],
        explicit: bool,
    },
    Settle {
        force: bool,
    },
    Tidy,
    Pack {
        row: usize,
        share: u64,
        align: u32,
    },
    Keep {
        memory: usize,
        row: usize,
        mask: u64,
    },
    Crop {
        n: u64,
    },
    CropRows {
        n: [u64; 3],
    },
    Select {
        index: Vec<usize>,
    },
    Decay {
        factor: f32,
    },
    /// The ends count from the tokens that the row has seen.
    Pin {
        row: usize,
        back: u64,
        len: u64,
    },
    Unpin {
        row: usize,
        back: u64,
        len: u64,
    },
    Evict {
        row: usize,
        back: u64,
        len: u64,
    },
    Fork,
    Leave,
    Reset,
}

pub fn op() -> impl Strategy<Value = (usize, Op)> {
    let lens = || prop_oneof![3 => prop::array::uniform3(0usize..4), 2 => prop::array::uniform3(0usize..130)];
    let op = prop_oneof![
        12 => (lens(), 0usize..3, any::<bool>(), any::<bool>())
            .prop_map(|(lens, pads, store_all, scored)| Op::Append { lens, pads, store_all, scored }),
        2 => (lens(), any::<bool>()).prop_map(|(lens, explicit)| Op::Die { lens, explicit }),
        6 => any::<bool>().prop_map(|force| Op::Settle { force }),
        3 => Just(Op::Tidy),
        4 => (0usize..3, 0u64..5, prop_oneof![Just(1u32), Just(32)])
            .prop_map(|(row, share, align)| Op::Pack { row, share, align }),
        3 => (0usize..3, 0usize..3, any::<u64>()).prop_map(|(memory, row, mask)| Op::Keep { memory, row, mask }),
        2 => (0u64..70).prop_map(|n| Op::Crop { n }),
        1 => prop::array::uniform3(0u64..70).prop_map(|n| Op::CropRows { n }),
        3 => prop::collection::vec(0usize..3, 1..4).prop_map(|index| Op::Select { index }),
        1 => (0.25f32..1.0).prop_map(|factor| Op::Decay { factor }),
        4 => (0usize..3, 0u64..40, 1u64..14).prop_map(|(row, back, len)| Op::Pin { row, back, len }),
        2 => (0usize..3, 0u64..200, 1u64..6).prop_map(|(row, back, len)| Op::Pin { row, back, len }),
        1 => (0usize..3, 0u64..90, 1u64..40).prop_map(|(row, back, len)| Op::Unpin { row, back, len }),
        4 => (0usize..3, 0u64..150, 1u64..60).prop_map(|(row, back, len)| Op::Evict { row, back, len }),
        2 => Just(Op::Fork),
        1 => Just(Op::Leave),
        1 => Just(Op::Reset),
    ];
    (0usize..4, op)
}

pub fn history() -> impl Strategy<Value = (usize, Vec<(usize, Op)>)> {
    (0usize..12, prop::collection::vec(op(), 1..60))
}
