"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): blocks are judged by the maximum and the minimum of every key channel.

No key is read to see which blocks matter: ``sum over channels of max(q * maximum, q * minimum)`` is what the block's keys can score
at most, and the two rows of each block lie side by side, to be read as fast as memory goes. Departures from the paper, and why:

* The best blocks are candidates, of which the best few keys are read: a bound says that there may be something, not where, and the
  attention to a whole block is spent on its neighbours. ``candidates=1`` is the paper's rule.
* One selection per key-value head, by the best score in its group; the newest ``window`` and the first ``sinks`` are always read.
* Pages are 64 residents, counted from the first, of their keys as they are stored; the paper's have 16.
* Prompts are read the same way, a selection for each block of queries; the paper reads them whole.

The definition: :mod:`kvsieve.backends.reference.definition`.
"""

from __future__ import annotations

from kvsieve.budget import BLOCK, check_count
from kvsieve.checks import as_plain
from kvsieve.errors import PolicyError
from kvsieve.methods.hip import memory_of
from kvsieve.methods.infinite_hip import InfiniteHiPSelection
from kvsieve.policy.compose import Memory

__all__ = ["Quest"]


@as_plain
def Quest(
    budget: int = 1024,
    block: int = 2,
    candidates: int = 4,
    sinks: int = 64,
    window: int = 256,
    refresh: int | tuple[int, int] = 1,
    dense_layers: int = 0,
    query_block: int = 64,
    query_stride: int = 8,
    extend: bool | int = False,
) -> Memory:
    """Keep every token; each query reads the first ``sinks``, the newest ``window`` and ``budget`` others, the best of
    ``candidates`` times as many in the blocks whose keys can score most.

    A text of ``sinks + window + budget`` tokens or fewer is read whole, exactly. Nothing is freed; page bounds add a 64th to what
    keys and values take as they came (bytes of ``bounds`` in :meth:`kvsieve.Stream.stats`). Combine it by ``|`` with
    :func:`kvsieve.ThinK` or :func:`kvsieve.Quantized` to store tokens in less, or with :func:`kvsieve.SirLLM` to keep fewer. The
    backend ``cuda`` refuses all three when the stream opens, and :meth:`kvsieve.Stream.evict` and :meth:`kvsieve.Stream.join`.

    Args:
        budget: tokens that are selected, sinks and window not counted; a multiple of ``block``, and times ``candidates`` of 64.
        block: tokens that are selected or not together, a power of two up to 64. Of more than two not every key is compared.
        candidates: how many times ``budget`` the best blocks of 64 have, together.
        sinks: first tokens, always read; a multiple of 64.
        window: newest tokens, always read, the query's own among them; at least 64.
        refresh: select anew every so many generated tokens; or blocks, and tokens in them, each at a pace of its own.
        dense_layers, query_block, query_stride, extend: as of :func:`kvsieve.HiP`.

    Raises:
        PolicyError: for counts that are none, or that do not fit blocks of 64.

    >>> Quest(512)
    Quest(budget=512)
    """
    for name, count in (("budget", budget), ("block", block), ("candidates", candidates)):
        check_count(name, count, least=1)
    if BLOCK % block:
        raise PolicyError(f"block must divide {BLOCK}, got {block}")
    if budget % block or budget * candidates % BLOCK:
        raise PolicyError(
            f"budget must be a multiple of block, and budget x candidates of {BLOCK}; got {budget}, {block} and {candidates}"
        )
    if isinstance(refresh, int):
        refresh = (refresh, refresh)
    select = InfiniteHiPSelection(
        ((BLOCK, budget * candidates), (block, budget)),
        sinks,
        window,
        refresh,
        dense_layers=dense_layers,
        wide_layers=0,
        query_block=query_block,
        query_stride=query_stride,
        page_bounds=True,
    )
    paces = select.refresh[0] if len(set(select.refresh)) == 1 else select.refresh
    given = {
        "block": (block, 2),
        "candidates": (candidates, 4),
        "sinks": (sinks, 64),
        "window": (window, 256),
        "refresh": (paces, 1),
        "dense_layers": (dense_layers, 0),
        "query_block": (query_block, 64),
        "query_stride": (query_stride, 8),
    }
    changed = {name: value for name, (value, default) in given.items() if value != default}
    return memory_of("Quest", {"budget": budget, **changed}, select, extend)
