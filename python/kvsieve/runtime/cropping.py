"""What refusals to crop have in common: how far a crop can be exact, and what goes further."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsieve.errors import CacheMismatchError

if TYPE_CHECKING:
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.part import Crop

__all__ = ["GO_BACK", "SPARE", "check_evicted"]

SPARE = 64
"""Tokens that can be forgotten exactly: so many queries are kept beyond those that are looked at."""

GO_BACK = "take a mark before (stream.mark()) and go back to it (stream.rewind(mark))"
"""The end of every message that refuses a crop."""


def check_evicted(policy: Policy, crop: Crop, row: int, evicted_at: int) -> None:
    """Refuse a crop of ``row`` to before it last evicted tokens, when it had seen ``evicted_at``: a shorter text would hold them.

    Raises:
        CacheMismatchError: saying how many can be forgotten.
    """
    seen, gone = crop.seen[row], crop.counts[row]
    if gone and 0 < seen - gone < evicted_at + crop.read_again:
        raise CacheMismatchError(
            f"row {row}: cannot forget {gone} tokens: {policy!r} evicted others when the row had seen {evicted_at}, "
            f"which a text of {seen - gone} tokens would still hold; at most {max(seen - evicted_at - crop.read_again, 0)} can be "
            f"forgotten; {GO_BACK}"
        )
