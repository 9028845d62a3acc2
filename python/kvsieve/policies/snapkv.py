"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): what the end of the prompt looks at stays.

Departures from the published method, and why:

* A prompt may come in chunks, and turns may follow. The choice is made again, with the newest queries, after every chunk that
  leaves the memory over budget, at the end of a turn, and while decoding whenever the memory is a whole block over budget.
  Published, it is made once, and what is generated afterwards stays for good.
* Votes of a group's query heads are added up, so that each key and value is held once, by its KV head; published, keys are repeated
  for each query head first.
* After the first choice the tokens that pooling calls neighbours are neighbours among the residents.
"""

from __future__ import annotations

from kvsieve.roles import AsRotated, Memory, ObservationWindow

__all__ = ["SnapKV"]


def SnapKV(budget: int | str, observe: int = 32, kernel: int = 7) -> Memory:
    """Keep the newest ``observe`` tokens and, for each layer and KV head, the others that their queries look at most.

    A vote is a softmax probability over all residents, summed over the queries and over the query heads of the group, then
    max-pooled along the tokens. A prompt that fits the budget loses nothing.

    Args:
        budget: residents per sequence and head, in tokens, or in bytes such as ``"64MiB"``.
        observe: newest tokens that stay and whose queries vote.
        kernel: tokens that share the highest vote among them; odd.

    Raises:
        BudgetError: if the budget does not hold the observed tokens and one more.
        PolicyError: for counts that are not, or an even kernel.

    >>> SnapKV(1024)
    SnapKV(budget=1024, observe=32, kernel=7)
    """
    retain = ObservationWindow(budget=budget, observe=observe, kernel=kernel)
    return Memory(retain=retain, place=AsRotated(), text=f"SnapKV(budget={budget!r}, observe={observe}, kernel={kernel})")
