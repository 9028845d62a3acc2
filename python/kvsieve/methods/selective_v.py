"""Selective values (Sigma: Lin et al., 2025, arXiv 2501.13629): exact scores over all keys, and few values.

The paper found that a model which adds up the 100 heaviest values of each query loses next to nothing. Departures from it, and why:

* It says nothing of the probabilities that are left over: here they stay what they are, which has the smaller bound of error.
* Prompts, and any text of several tokens, add up everything: there a value that is read serves many queries.
* ``mass`` is ours: as many values as it takes.
* So is ``host_budget``: values in a file, of which a token fetches the blocks of those that it adds up.
"""

from __future__ import annotations

from os import PathLike

from kvsieve.checks import as_plain
from kvsieve.policy.compose import Memory
from kvsieve.policy.select import HeaviestValues
from kvsieve.policy.storage import on_disk

__all__ = ["SelectiveV"]


@as_plain
def SelectiveV(
    top_m: int | None = 100,
    mass: float | None = None,
    renormalise: bool = False,
    host_budget: int | str | None = None,
    disk: str | PathLike[str] | None = None,
) -> Memory:
    """Keep every token; a generated token is compared with every key, and each query head adds up its ``top_m`` heaviest values.

    Values that no head adds up are neither read nor decompressed. With ``M`` the probability mass of those that are, which
    :meth:`kvsieve.Stream.stats` tells (``value_mass`` of each layer), a head's output is off by at most ``(1 - M) * max |v|``.
    Nothing is evicted; with ``host_budget`` keys are in memory, and most values lie in a file: a token fetches the blocks of those
    that it adds up.

    Args:
        top_m: values that a query head adds up; None for as many as it takes for ``mass``.
        mass: stop at so many values that have this much of the probability, above 0 and below 1; None: always ``top_m``.
        renormalise: scale the probabilities of what is added up to the sum of all; the bound is then twice as large.
        host_budget: bytes of values in memory between two forwards, of all layers (an int, or a text such as ``"1GiB"``); None for
            all of them. A text of several tokens fetches all values of one layer after another. On the backend ``cpu``. It changes
            no output.
        disk: the folder of the file; None for the system's folder for temporary files.

    Raises:
        PolicyError: for a count that is none, a mass that is no share, or neither of both; for a folder without a budget.
        BudgetError: for a budget that is no count of bytes.

    >>> SelectiveV(64)
    SelectiveV(64)
    """
    select = HeaviestValues(top_m, mass, renormalise)
    shown = [] if top_m == 100 else [repr(top_m)]
    shown += [] if mass is None else [f"mass={mass!r}"]
    shown += ["renormalise=True"] if renormalise else []
    storage = on_disk(host_budget, disk, "values", values_alone=True)
    if storage is not None:
        shown += [f"host_budget={host_budget!r}"] + ([] if storage.disk is None else [f"disk={storage.disk!r}"])
    return Memory(select=select, storage=storage, text=f"SelectiveV({', '.join(shown)})")
