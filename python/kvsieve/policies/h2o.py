"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): tokens that were given much attention stay.

Departures from the published code, and why:

* Attention is added up for each KV head, over the query heads of its group, so that each key and value is held once.
* Tokens go a block at a time while decoding (published: one for each new one), so that memory moves seldom. Between two acts a row
  holds up to 63 tokens over budget.
* A prompt read in chunks is brought down to the budget after each; published, prompts are read whole.
"""

from __future__ import annotations

from kvsieve.roles import AsRotated, HeavyHitters, Memory

__all__ = ["H2O"]


def H2O(budget: int | str, recent: int | None = None, sinks: int = 0) -> Memory:
    """Keep the newest ``recent`` tokens and, for each layer and KV head, those others that were given the most attention.

    A token's score is the softmax probability that every query since gave it, its own included, summed over queries and over the
    query heads of the group.

    Args:
        budget: residents per sequence and head, in tokens, or in bytes such as ``"64MiB"``.
        recent: newest tokens that always stay; half of the budget by default.
        sinks: first real tokens of each sequence that are never let go.

    Raises:
        BudgetError: if the budget does not hold the sinks and the recent tokens.
        PolicyError: for counts that are not.

    >>> H2O(1024)
    H2O(budget=1024)
    """
    retain = HeavyHitters(budget=budget, recent=recent, sinks=sinks)
    text = f"H2O(budget={budget!r}"
    text += "" if recent is None else f", recent={recent}"
    text += "" if sinks == 0 else f", sinks={sinks}"
    return Memory(retain=retain, place=AsRotated(), text=text + ")")
