"""HiP attention (Lee et al., ICLR 2025, arXiv 2406.09827) and InfiniteHiP (Lee et al., 2025, arXiv 2502.08910).

Departures from the papers and the published code, and why:

* One search for each key-value head, by the best score in its group: keys are read once for the group. HiP's is for each query
  head; published code also shares one over all heads of a layer, which loses what single heads look for.
* The window's start is frozen until the next search, so that no token falls between what was found and the window.
* Scores are plain products: no sigmoid, which ties great logits, and a product of exactly zero counts.
* Within the trained length tokens are scored and read at their true positions; the papers' other distances are ``extend``.
* InfiniteHiP: a chunk is judged by the best key met on the way, never by a mean of queries.

The definition, and further points that the papers leave open: :mod:`kvsieve.backends.reference.definition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kvsieve.errors import PolicyError
from kvsieve.roles import Consecutive, Memory, Search
from kvsieve.searches import STAGES, StagedSearch, TreeSearch

__all__ = ["PRESETS", "HiP", "InfiniteHiP"]

PRESETS: dict[str, dict[str, Any]] = {
    "3k": {"stages": STAGES, "refresh": (16, 8, 4)},
    "fast": {"stages": STAGES, "refresh": (32, 16, 8)},
    "flash": {"stages": STAGES, "refresh": (96, 24, 8)},
    "5k": {"stages": ((64, 32768), (32, 16384), (16, 4096)), "refresh": (16, 8, 4)},
}
"""InfiniteHiP's published settings."""


def HiP(
    budget: int = 1024,
    block: int = 2,
    sinks: int = 16,
    window: int = 256,
    representative: Literal["centre", "first", "last", "oracle"] = "centre",
    refresh: int = 1,
    dense_layers: int = 3,
    query_block: int = 64,
    query_stride: int = 8,
    extend: bool | int = False,
) -> Memory:
    """Keep every token; each query reads the first ``sinks``, the newest ``window`` and ``budget`` others that a tree search finds.

    A text of ``sinks + window + budget`` tokens or fewer is read whole, exactly. Nothing is freed: combine it by ``|`` with
    :func:`kvsieve.ThinK` or :func:`kvsieve.Quantized` to store tokens in less, or with :func:`kvsieve.SirLLM` to keep fewer.

    Args:
        budget: tokens that a search finds, sinks and window not counted; rounded up to whole blocks.
        block: tokens that are found or passed over together.
        sinks: first tokens, always read.
        window: newest tokens, always read, the query's own among them.
        representative: which block of a branch is scored; ``"oracle"`` reads them all and is for comparison.
        refresh: search anew every so many generated tokens. The paper's 8 is some three times as fast at 128,000 tokens, and cost
            the small model of the README's table five times as much in perplexity.
        dense_layers: the first so many layers of the model read everything.
        query_block: tokens of a prompt that share a search.
        query_stride: of these the last one is compared with keys, and every so many before it.
        extend: show what is read side by side, and search by content alone, beyond the model's trained length, or beyond so many
            tokens. Keys are then stored before rotation.

    Raises:
        PolicyError: for counts that are none, or an unknown representative.

    >>> HiP(512)
    HiP(budget=512)
    """
    select = TreeSearch(budget, block, sinks, window, representative, refresh, dense_layers, query_block, query_stride)
    return _memory("HiP", select, {"budget": budget}, extend)


def InfiniteHiP(
    preset: Literal["3k", "fast", "flash", "5k"] = "3k",
    stages: Sequence[tuple[int, int]] | None = None,
    refresh: Sequence[int] | None = None,
    sinks: int = 256,
    window: int = 1024,
    representative: Literal["first", "centre"] = "first",
    dense_layers: int = 0,
    wide_layers: int = 3,
    wide: int = 4096,
    query_block: int = 64,
    query_stride: int = 8,
    extend: bool | int = False,
) -> Memory:
    """As :func:`HiP`, with a search in stages: each cuts what is left into chunks and keeps the best of them.

    Args:
        preset: published stages and paces: about 3,000 tokens read (``"3k"``), the same with rarer searches (``"fast"``,
            ``"flash"``), or about 5,000 (``"5k"``).
        stages: (tokens of a chunk, tokens that stay) of each stage, instead of the preset's. A stage keeps a multiple of its
            chunk, and its chunk is a multiple of the next one's.
        refresh: compute each stage anew, and all later ones, every so many generated tokens; instead of the preset's.
        sinks, window, dense_layers, query_block, query_stride, extend: as of :func:`HiP`.
        representative: whether the first or the middle key of each half of a chunk is compared.
        wide_layers: the first so many layers keep ``wide`` tokens in the last stage.
        wide: what they keep.

    Raises:
        PolicyError: for an unknown preset, or stages that do not fit together.

    >>> InfiniteHiP("fast", window=512)
    InfiniteHiP(preset='fast', window=512)
    """
    if preset not in PRESETS:
        raise PolicyError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if stages is not None and refresh is None and len(stages) != len(PRESETS[preset]["refresh"]):
        raise PolicyError(f"give a refresh for each of the {len(stages)} stages")
    stages = PRESETS[preset]["stages"] if stages is None else stages
    refresh = PRESETS[preset]["refresh"] if refresh is None else refresh
    select = StagedSearch(
        stages,  # type: ignore[arg-type]
        sinks,
        window,
        refresh,  # type: ignore[arg-type]
        representative,
        dense_layers,
        wide_layers,
        wide,
        query_block,
        query_stride,
    )
    return _memory("InfiniteHiP", select, {"preset": preset}, extend, **PRESETS[preset])


def _memory(name: str, select: TreeSearch | StagedSearch, first: dict[str, Any], extend: bool | int, **known: Any) -> Memory:
    """The policy, written so that :func:`kvsieve.policies.parse` reads it."""
    defaults = {**vars(type(select)()), **known}
    parts = first | {key: value for key, value in vars(select).items() if value != defaults[key] and key not in first}
    return memory_of(name, parts, select, extend)


def memory_of(name: str, parts: dict[str, Any], select: Search, extend: bool | int) -> Memory:
    """``name(parts)`` as a policy: everything is kept, ``select`` reads, side by side beyond the length if ``extend`` says so."""
    if extend is not False:
        parts = parts | {"extend": extend}
    text = ", ".join(f"{key}={value!r}" for key, value in parts.items())
    place = None if extend is False else Consecutive(None if extend is True else extend)
    return Memory(place=place, select=select, text=f"{name}({text})")
