"""What the tests of HiP and InfiniteHiP under a model share: the policies, small enough for a short text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvsieve

Make = Callable[..., Any]


def hip(**changes: Any) -> Any:
    known = {"budget": 12, "sinks": 2, "window": 8, "dense_layers": 1, "refresh": 4, "query_block": 16, "query_stride": 3}
    return kvsieve.HiP(**{**known, **changes})


def infinite(**changes: Any) -> Any:
    known = {"stages": ((16, 48), (4, 24), (2, 8)), "refresh": (8, 4, 2), "sinks": 2, "window": 8, "wide": 16, "wide_layers": 1}
    return kvsieve.InfiniteHiP(**{**known, "query_block": 16, "query_stride": 3, **changes})


SEARCHES: dict[str, Make] = {
    "hip": hip,
    # Both layers of a model search under this one, and only the second under the one before.
    "hip_first": lambda **changes: hip(**{"representative": "first", "block": 4, "dense_layers": 0, **changes}),
    "infinite": infinite,
    "infinite_middle": lambda **changes: infinite(representative="middle", **changes),
}
