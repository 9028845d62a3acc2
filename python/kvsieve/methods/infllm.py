"""InfLLM (Xiao et al., NeurIPS 2024, arXiv 2402.04617).

Departures from the paper and the published code, and why:

* A token is read once: inside the window of a query at its true distance, beyond it at the fixed one. The published code shows
  tokens at a window's edge twice to all but the last query of a block.
* The fixed distance is ``window - 1``, the largest one inside the window, as in the published code; the paper says ``window``.
* A token's representative score is the sum of the attention that it gets from the queries that see it in their window, as in the
  published code; the paper has the mean of raw logits. Sums are float32.
* Tokens that represent a block are chosen for each KV head, not for each query head: scores are summed over the group.
* Of equal scores the earlier token, and the earlier block, is taken.
* Where blocks lie, and which of them are in memory, changes no result.
* Blocks may be summed up otherwise (``summary``): by the mean of all their keys, or by bounds, after Quest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from kvsieve.budget import check_count
from kvsieve.checks import as_plain, check_flag, plain_fields
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.position import Fetched
from kvsieve.policy.select import FetchedSelection, Piece, check_summary
from kvsieve.policy.storage import on_disk

__all__ = ["InfLLM", "InfLLMSelection"]


@dataclass(frozen=True)
class InfLLMSelection(FetchedSelection):
    """Sinks, a window, and the blocks whose representative tokens suit the queries best; see :func:`kvsieve.InfLLM`."""

    window: int = 4096
    blocks: int = 16
    block: int = 128
    representatives: int = 4
    sinks: int = 128
    per_head: bool = False
    query_block: int = 512
    summary: str = "representatives"

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("window", "block", "representatives", "query_block"):
            check_count(name, getattr(self, name), least=1)
        for name in ("blocks", "sinks"):
            check_count(name, getattr(self, name))
        check_summary(self.summary, ("representatives", "mean", "bounds"))
        if self.summary != "representatives":
            if self.representatives != type(self).representatives:
                raise PolicyError(
                    f"representatives are for summary='representatives'; {self.summary!r} is made of all tokens of a block"
                )
        elif self.representatives > self.block:
            raise PolicyError(f"a block of {self.block} tokens cannot have {self.representatives} representatives")
        check_flag("per_head", self.per_head, PolicyError)

    @property
    def start(self) -> int:  # type: ignore[override]
        return self.sinks

    @property
    def compared_at(self) -> int:  # type: ignore[override]
        return self.window - 1

    @property
    def always_read(self) -> tuple[int, int]:
        return self.sinks, self.window

    def num_blocks(self, seen: int) -> int:
        return max((seen - self.sinks - self.window) // self.block, 0)

    def candidates(self, first: int) -> range:
        return range(self.num_blocks(first))

    def limit(self, first: int) -> int:
        return self.blocks

    def pieces(self, first: int, count: int, chosen: Sequence[Sequence[int]]) -> list[Piece]:
        near = max(first - self.window + 1, 0)
        found = [Piece(near, first + count, first - near, within=self.window)]
        for number, blocks in enumerate(chosen):
            head, last = None if len(chosen) == 1 else number, len(blocks) - 1
            begins = 0
            for at, block in enumerate(blocks):  # neighbours are one piece
                if at == last or blocks[at + 1] != block + 1:
                    found.append(self._far(self._first_token(blocks[begins]), self._first_token(block + 1), head))
                    begins = at + 1
        # Sinks, and what no block has yet, where they are beyond the window.
        beyond = first + count - self.window
        tail = self._first_token(self.num_blocks(first))
        found += [self._far(lo, hi) for lo, hi in ((0, min(self.sinks, beyond)), (tail, beyond)) if lo < hi]
        return found

    def _first_token(self, block: int) -> int:
        return self.sinks + block * self.block

    def _far(self, lo: int, hi: int, head: int | None = None) -> Piece:
        return Piece(lo, hi, self.window - 1, fixed=True, nearest=self.window, head=head)


@as_plain
def InfLLM(
    window: int = 4096,
    blocks: int = 16,
    block: int = 128,
    representatives: int = 4,
    sinks: int = 128,
    per_head: bool = False,
    query_block: int = 512,
    summary: str = "representatives",
    host_budget: int | str | None = None,
    disk: str | PathLike[str] | None = None,
) -> Memory:
    """Keep every token; a query reads its window, the first tokens, and the blocks of the text that suit it best, without training.

    Inside the window tokens are at their true distances. All that lies beyond it is at ``window - 1``, so no distance is larger,
    however long the text is. Blocks are of tokens that have left the window; each is summed up, by default by the mean key of the
    tokens that got the most attention while they were in it. Nothing is evicted; with ``host_budget`` blocks that no query reads
    lie in a file. Combine it by ``|`` with :func:`kvsieve.ThinK` or :func:`kvsieve.Quantized` to store tokens in less, which the
    backend ``cuda`` refuses when the stream opens. Runs on every backend.

    Args:
        window: tokens that a query sees at their true distance, itself included. At most what the model was trained for.
        blocks: blocks that are read; one choice for all heads of a layer.
        block: tokens of a block.
        representatives: tokens of a block by which it is compared; for ``summary="representatives"`` only.
        sinks: first tokens, which are always read. Blocks begin after them.
        per_head: each KV head chooses blocks for itself.
        query_block: queries of a prompt that share a choice: those of equal ``position // query_block``. A decoded one is alone.
        summary: by what a block is compared with queries: ``"representatives"``, the mean key of some tokens, as published;
            ``"mean"``, the mean of all its keys; ``"bounds"``, the greatest and the least of every channel of them, by which no
            key of a block suits a query better than the block does (Quest, arXiv 2406.10774).
        host_budget: bytes of keys and values in memory, of all layers (an int, or a text such as ``"1GiB"``); None for all of them.
            On the backend ``cuda`` bytes on the device; what is not there is in memory of the host. It changes no output.
            ``Memory(storage=policy.Tiered(...))`` has more to choose.
        disk: the folder of the file; None for the system's folder for temporary files. Refused on ``cuda``, which has no file.

    Raises:
        PolicyError: for counts that are none, more representatives than a block has tokens, representatives of a summary that has
            none, a summary that is none of these, or a folder without a budget.
        BudgetError: for a budget that is no count of bytes.

    >>> InfLLM(window=2048)
    InfLLM(window=2048)
    """
    select = InfLLMSelection(window, blocks, block, representatives, sinks, per_head, query_block, summary)
    plain = vars(InfLLMSelection())
    told = {name: value for name, value in vars(select).items() if value != plain[name]}
    storage = on_disk(host_budget, disk, "keys and values", keep=window + block)
    if storage is not None:
        told |= {"host_budget": host_budget} | ({} if storage.disk is None else {"disk": storage.disk})
    text = ", ".join(f"{name}={value!r}" for name, value in told.items())
    return Memory(position=Fetched(), select=select, storage=storage, text=f"InfLLM({text})")
