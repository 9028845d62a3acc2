//! Random histories against plain lists, with a fake store on which every append and move is carried out.

mod checks;
mod lists;
mod ops;
mod rearrange;
mod world;

use super::common::cases;
use ops::{Op, history};
use proptest::prelude::*;
use world::World;

fn play(chain: usize, ops: &[(usize, Op)], check: impl Fn(&World, usize)) {
    let mut world = World::new(chain);
    for (at, op) in ops {
        world.act(*at, op);
        check(&world, *at);
    }
    while world.streams.len() > 1 {
        world.streams.pop();
    }
    let mut last = world.streams.swap_remove(0).planner;
    last.reset();
    assert_eq!((last.used_blocks(), last.num_blocks()), (0, 0), "blocks leak");
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn tables_read_as_lists((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_lists());
    }

    #[test]
    fn block_is_free_or_owned((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_blocks());
    }

    #[test]
    fn packed_residents_come_first((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_packed());
    }

    #[test]
    fn positions_strictly_increase((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_positions());
    }

    #[test]
    fn evicted_never_returns((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_evicted());
    }

    #[test]
    fn budget_holds_after_retain((chain, ops) in history()) {
        play(chain, &ops, World::check_budgets);
    }

    #[test]
    fn pinned_tokens_stay((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_pins());
    }

    // Every append checks its slots against all slots in use; reading back shows that nothing else wrote to them.
    #[test]
    fn slot_is_written_once((chain, ops) in history()) {
        play(chain, &ops, |world, _| world.check_lists());
    }
}
