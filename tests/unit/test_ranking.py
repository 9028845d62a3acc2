"""The greatest of some scores, against a full sort."""

from __future__ import annotations

import pytest
import torch
from kvsieve.backends.ranking import _counted, greatest


@pytest.mark.parametrize("newest", [False, True])
def test_the_greatest_are_those_of_a_full_sort(newest: bool) -> None:
    """Few different scores, so that the last place is mostly shared; and many, so that it is not."""
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        n, count = 1 + case % 40, case % 13
        scores = (
            torch.randint(-3, 4, (2, 3, n), generator=generator).float() if case % 2 else torch.randn(2, 3, n, generator=generator)
        )
        found = greatest(scores, count, newest)
        assert found.shape == (2, 3, min(count, n))
        for row, mine in zip(scores.flatten(0, 1).tolist(), found.flatten(0, 1).tolist()):
            ranked = sorted(range(n), key=lambda i, row=row: (-row[i], -i if newest else i))  # type: ignore[misc]
            assert mine == sorted(ranked[:count])
        if count < n:
            assert torch.equal(_counted(scores, count, newest), found), "as on a device that nothing waits for"
