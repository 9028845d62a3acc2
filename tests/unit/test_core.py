"""What crosses from the Rust core: errors of a class each, and memories that cannot be made of what does not fit together."""

from __future__ import annotations

import pytest
from kvsieve import _core, errors

CLASSES = {
    "BudgetTooSmall": errors.BudgetError,
    "OutOfRange": errors.PolicyError,
    "RowMismatch": errors.CacheMismatchError,
    "PinsTooMany": errors.BudgetError,
    "PinsGone": errors.StateError,
    "CropTooLong": errors.CacheMismatchError,
    "NoStep": errors.StateError,
    "StepOpen": errors.StateError,
    "Shape": errors.ShapeError,
    "OutOfMemory": MemoryError,
    "BadBlock": errors.StateError,
    "NotInMemory": errors.StateError,
    "TierFull": errors.TierFullError,
    "TierFailed": errors.TierError,
    "TierDamaged": errors.TierDamagedError,
    "Interrupted": errors.KvsieveError,
    "Unsupported": errors.UnsupportedError,
}


def test_every_error_of_the_core_has_its_class() -> None:
    samples = _core.error_samples()
    assert {name: type(error) for name, error in samples} == CLASSES
    assert len(samples) == len(CLASSES)
    assert all(str(error) for _, error in samples)


def test_a_memory_takes_rules_and_a_planner_takes_memories() -> None:
    keep, original = _core.Eviction.keep_all(), _core.PositionRule.original()
    with pytest.raises(TypeError):
        _core.Memory(original, keep)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.Planner([{"evict": "keep_all"}], "post_rope")  # type: ignore[list-item]
    with pytest.raises(errors.PolicyError, match=r'stored_keys must be "post_rope" or "pre_rope", got "raw"'):
        _core.Planner([_core.Memory(keep, original)], "raw")
    with pytest.raises(errors.PolicyError, match="window must be at least 1"):
        _core.Planner([_core.Memory(_core.Eviction.window(4, 0), original)], "post_rope")
    with pytest.raises(errors.UnsupportedError, match="pre-RoPE keys"):
        _core.Planner([_core.Memory(keep, _core.PositionRule.fixed(3))], "post_rope")
