"""Selective values (Sigma: Lin et al., 2025, arXiv 2501.13629): exact scores over all keys, and few values.

The paper found that a model which adds up the 100 heaviest values of each query loses next to nothing. Departures from it, and why:

* It says nothing of the probabilities that are left over: here they stay what they are, which has the smaller bound of error.
* Prompts, and any text of several tokens, add up everything: there a value that is read serves many queries.
* ``mass`` is ours: as many values as it takes.
"""

from __future__ import annotations

from kvsieve.checks import as_plain
from kvsieve.policy.compose import Memory
from kvsieve.policy.select import HeaviestValues

__all__ = ["SelectiveV"]


@as_plain
def SelectiveV(top_m: int | None = 100, mass: float | None = None, renormalise: bool = False) -> Memory:
    """Keep every token; a generated token is compared with every key, and each query head adds up its ``top_m`` heaviest values.

    Values that no head adds up are neither read nor decompressed. With ``M`` the probability mass of those that are, which
    :meth:`kvsieve.Stream.stats` tells (``value_mass`` of each layer), a head's output is off by at most ``(1 - M) * max |v|``.
    Nothing is freed.

    Args:
        top_m: values that a query head adds up; None for as many as it takes for ``mass``.
        mass: stop at so many values that have this much of the probability, above 0 and below 1; None: always ``top_m``.
        renormalise: scale the probabilities of what is added up to the sum of all; the bound is then twice as large.

    Raises:
        PolicyError: for a count that is none, a mass that is no share, or neither of both.

    >>> SelectiveV(64)
    SelectiveV(64)
    """
    select = HeaviestValues(top_m, mass, renormalise)
    shown = [] if top_m == 100 else [repr(top_m)]
    shown += [] if mass is None else [f"mass={mass!r}"]
    shown += ["renormalise=True"] if renormalise else []
    return Memory(select=select, text=f"SelectiveV({', '.join(shown)})")
