"""LM-Infinite (Han et al., NAACL 2024, arXiv 2308.16137): a lambda-shaped mask and a ceiling on distances.

Departures from the published code, and why:

* Tokens that neither the window nor the sinks can ever show again are evicted (the published code keeps them all). With the middle
  on they are kept, because any of them may be chosen.
* Chunks of any size give the same answer as one, a second turn works, padding is honoured, KV heads are shared without a copy.
* The middle is read by the last query of each forward only, as published: every generated token, and a prompt's last one.
"""

from __future__ import annotations

from kvsieve.budget import check_count
from kvsieve.checks import as_plain
from kvsieve.methods.streaming_llm import Window
from kvsieve.policy.compose import Chain, Memory, Policy
from kvsieve.policy.evict import KeepAll
from kvsieve.policy.position import Capped, FixedDistance
from kvsieve.policy.select import TopKTokens

__all__ = ["LMInfinite"]


@as_plain
def LMInfinite(
    window: int,
    sinks: int = 10,
    ceiling: int | None = None,
    middle_top_k: int = 0,
    middle_from_layer: int = 4,
    middle_distance: int | None = None,
) -> Policy:
    """A query sees itself and the ``window - 1`` tokens before it at their true distance, and the sinks at ``ceiling``.

    Args:
        window: tokens seen at their true distance, the query included.
        sinks: first real tokens of each sequence, seen from everywhere.
        ceiling: the distance of every sink beyond the window; the window by default.
        middle_top_k: how many tokens of the middle each head may choose; 0 evicts the middle. A positive number keeps every token.
        middle_from_layer: first layer that reads the middle.
        middle_distance: the one distance of every middle token; half the window by default.

    Raises:
        PolicyError: for counts that are not, or a window below 2.

    >>> LMInfinite(window=1020, sinks=4)
    LMInfinite(window=1020, sinks=4)
    """
    for name, value, least in (("window", window, 2), ("sinks", sinks, 0), ("middle_top_k", middle_top_k, 0)):
        check_count(f"LMInfinite: {name}", value, least)
    extra = "" if ceiling is None else f", ceiling={ceiling}"
    if middle_top_k:
        extra += f", middle_top_k={middle_top_k}, middle_from_layer={middle_from_layer}"
        extra += "" if middle_distance is None else f", middle_distance={middle_distance}"
    text = f"LMInfinite(window={window}, sinks={sinks}{extra})"
    near = Memory(
        evict=Window(budget=sinks + window - 1, sinks=sinks),
        position=Capped(window if ceiling is None else ceiling),
        text=text,
    )
    if not middle_top_k:
        return near
    middle = Memory(
        evict=KeepAll(),
        position=FixedDistance(window // 2 if middle_distance is None else middle_distance),
        select=TopKTokens(middle_top_k, middle_from_layer),
    )
    return Chain((near, middle), text=text)
