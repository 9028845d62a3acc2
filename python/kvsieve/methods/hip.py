"""HiP attention (Lee et al., ICLR 2025, arXiv 2406.09827).

Departures from the paper and the published code, and why:

* One selection for each key-value head, by the best score in its group: keys are read once for the group. HiP's is for each query
  head; published code also shares one over all heads of a layer, which loses what single heads look for.
* The window's start is frozen until the next selection, so that no token falls between what was found and the window.
* Scores are plain products: no sigmoid, which ties high logits, and a product of exactly zero counts.
* Within the trained length tokens are scored and read at their true positions; the paper's other distances are ``extend``.

The definition, and further points that the paper leaves open: :mod:`kvsieve.backends.reference.definition`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvsieve.budget import check_count
from kvsieve.checks import as_plain, plain_fields, told
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import Rebased
from kvsieve.policy.select import Parameter, SparseSelection

__all__ = ["HiP", "HiPSelection", "changed", "memory_of"]


@dataclass(frozen=True)
class HiPSelection(SparseSelection):
    """A beam search over an implicit binary tree of blocks (HiP); see :func:`kvsieve.HiP`."""

    budget: int = 1024
    block: int = 2
    sinks: int = 16
    window: int = 256
    representative: Literal["middle", "first", "last", "oracle"] = "middle"
    refresh: int = 1
    dense_layers: int = 3
    query_block: int = 64
    query_stride: int = 8
    kind: ClassVar[str] = "hip"

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("budget", "block", "window", "refresh", "query_block", "query_stride"):
            check_count(name, getattr(self, name), least=1)
        for name in ("sinks", "dense_layers"):
            check_count(name, getattr(self, name))
        allowed = ("middle", "first", "last", "oracle")
        if not isinstance(self.representative, str) or self.representative not in allowed:
            raise PolicyError(f"representative must be one of {', '.join(allowed)}, got {told(self.representative)}")

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return {"budget": self.budget, "block": self.block, "representative": self.representative}

    @property
    def paces(self) -> tuple[int, ...]:
        return (self.refresh,)

    @property
    def dense_until(self) -> int:
        return self.sinks + self.window + self.budget

    def for_layer(self, index: int, past_trained_length: bool = False) -> HiPSelection | None:
        return None if index < self.dense_layers and not past_trained_length else self


@as_plain
def HiP(
    budget: int = 1024,
    block: int = 2,
    sinks: int = 16,
    window: int = 256,
    representative: Literal["middle", "first", "last", "oracle"] = "middle",
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
        budget: tokens that are selected, sinks and window not counted; rounded up to whole blocks.
        block: tokens that are selected or passed over together.
        sinks: first tokens, always read.
        window: newest tokens, always read, the query's own among them.
        representative: which block of a branch is scored; ``"oracle"`` reads them all and is for comparison.
        refresh: select anew every so many generated tokens. The paper's 8 is some three times as fast at 128,000 tokens, and cost
            a small model five times as much in perplexity (docs/results/search-quality.md).
        dense_layers: the first so many layers of the model read everything.
        query_block: tokens of a prompt that share a selection.
        query_stride: of these the last one is compared with keys, and every so many before it.
        extend: show what is read side by side, and select by content alone, past the model's trained length, or past so many
            tokens. Keys are then stored before rotation.

    Raises:
        PolicyError: for counts that are none, or an unknown representative.

    >>> HiP(512)
    HiP(budget=512)
    """
    select = HiPSelection(
        budget,
        block,
        sinks,
        window,
        representative,
        refresh,
        dense_layers=dense_layers,
        query_block=query_block,
        query_stride=query_stride,
    )
    return memory_of("HiP", changed(select, {"budget": budget}), select, extend)


def changed(select: SparseSelection, first: dict[str, Any], **known: Any) -> dict[str, Any]:
    """The arguments to write for ``select``: ``first``, and what differs from ``known`` or from its class's defaults."""
    defaults = {**vars(type(select)()), **known}
    return first | {key: value for key, value in vars(select).items() if value != defaults[key] and key not in first}


def memory_of(name: str, parts: dict[str, Any], select: SparseSelection, extend: bool | int) -> Memory:
    """``name(parts)`` as a policy: everything is kept, ``select`` reads, side by side past the length if ``extend`` says so."""
    if not isinstance(extend, bool):
        check_count("extend", extend)
    if extend is not False:
        parts = parts | {"extend": extend}
    text = ", ".join(f"{key}={value!r}" for key, value in parts.items())
    position = None if extend is False else Rebased(None if extend is True else extend)
    return Memory(position=position, select=select, text=f"{name}({text})")
