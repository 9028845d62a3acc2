"""Decoding under a CUDA graph: one token of every row at a time, the whole forward one launch.

What the policy decides still changes from step to step; what the forward launches does not. So the graph is captured once, and
before each replay the host plans the step, compresses what is due, and uploads both to where the kernels look. After the replay it
commits and evicts, outside the graph. The graph is captured anew when a buffer that it has built in had to grow.

The host never waits for the step that runs: a score-based policy's one float per token is read a step later, from pinned memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvsieve.backends.cuda.backend import CudaBackend
from kvsieve.backends.cuda.graphs import CapturedForward
from kvsieve.backends.cuda.store import CudaStore
from kvsieve.errors import StateError, UnsupportedError
from kvsieve.model.support import cache_name
from kvsieve.runtime.bank import Banking
from kvsieve.runtime.compression import Compression
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.head_eviction import HeadEviction
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.runtime.sliding import SlidingLayers
from kvsieve.runtime.surprisal import SurprisalScores
from kvsieve.runtime.tiers import Tiers
from kvsieve.runtime.value_selection import ValueSelection

if TYPE_CHECKING:
    from kvsieve._core import Step
    from kvsieve.streams import Stream

__all__ = ["GraphDecoder"]


class GraphDecoder:
    """Decodes on a stream that has read its prompt, by replaying one captured graph.

    >>> stream.feed(prompt)                                        # doctest: +SKIP
    >>> decoder = kvsieve.graphs.GraphDecoder(stream)              # doctest: +SKIP
    >>> tokens = decoder.greedy(last_token, max_new_tokens=200)    # doctest: +SKIP

    Between two tokens the stream may be used in any other way, after :meth:`finish`.

    Args:
        stream: a stream on the ``cuda`` backend that has seen at least one token per row.

    Raises:
        StateError: if the stream has seen nothing yet, or verifies candidates.
        UnsupportedError: for another backend, a memory read by top-k, a sparse selection, RefreshKV, SelectiveV, a bank, fetched
            blocks, blocks on the host, a rule per head, SirLLM's published score, or sliding layers; at the first token, for one
            that compresses by queries, if the prompt had too few.
    """

    def __init__(self, stream: Stream) -> None:
        engine = stream._check_open()
        if not isinstance(engine.backend, CudaBackend):
            raise UnsupportedError(f"a graph needs backend 'cuda', this stream runs on {engine.backend.name!r}")
        if engine.reads_top_k:
            raise UnsupportedError("a memory read by top-k is chosen on the host's side of each layer; decode it without a graph")
        if engine.parts.find(Selection) is not None:
            raise UnsupportedError("when a selection is due is decided on the host's side of each layer; decode it without a graph")
        if engine.parts.find(Fetching) is not None:
            raise UnsupportedError("which blocks are fetched is told to the host in each layer; decode it without a graph")
        if engine.parts.find(Tiers) is not None:
            raise UnsupportedError("blocks come from the host and go there in each layer; decode it without a graph")
        if engine.parts.find(Recycling) is not None:
            raise UnsupportedError(
                "which step reads everything is decided on the host's side of each layer; decode it without a graph"
            )
        if engine.parts.find(ValueSelection) is not None:
            raise UnsupportedError("the heaviest values are picked among as many keys as there are; decode it without a graph")
        if engine.parts.find(Banking) is not None:
            raise UnsupportedError("a bank is searched on the host's side of each layer; decode it without a graph")
        if engine.parts.find(HeadEviction) is not None:
            raise UnsupportedError("a rule per head looks at each layer's queries on the host's side; decode it without a graph")
        if engine.parts.find(SlidingLayers) is not None:
            raise UnsupportedError("this model has sliding layers, whose buffers grow and shrink; decode it without a graph")
        self._scores = engine.parts.find(SurprisalScores)
        if self._scores is not None and self._scores.published:
            raise UnsupportedError("the published score needs each token's own logits; decode it without a graph")
        if not engine.num_rows or not engine.stores:
            raise StateError("read a prompt first: stream.feed(ids), then decode")
        self.stream, self._engine, self._backend = stream, engine, engine.backend
        self._stores: list[CudaStore] = [s for s in engine.stores.values() if isinstance(s, CudaStore)]
        device, rows = self._stores[0].device, engine.num_rows
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._logits: torch.Tensor | None = None
        self._captured = CapturedForward(self._stores, self._forward)
        self._unread: tuple[Any, torch.Tensor] | None = None

    @property
    def captures(self) -> int:
        """How often the graph was captured."""
        return self._captured.captures

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` after the tokens ``ids`` (int64 ``[B, 1]``); overwritten by the next step."""
        engine = self.stream._check_open()
        if engine.candidates.verifying or engine.num_rows != self._ids.shape[0]:
            raise StateError(f"the stream verifies candidates, or no longer holds {self._ids.shape[0]} rows")
        self.finish()
        engine.expect(self._ids)
        engine.prepare()
        self._ids.copy_(ids)
        told = [seen + ahead for seen, ahead in zip(engine.blocks.seen, engine.positions.of_rows(engine.num_rows))]
        self._positions.copy_(self._upload(told)[:, None])
        self._score()
        forward = engine.open([1] * engine.num_rows, 1)
        try:
            self._check_packed()
            assert forward.step is not None
            self._run(forward.step)
        except BaseException:
            engine.rollback()
            self._unread = None
            raise
        assert self._logits is not None
        engine.close(self._ids)
        if self._scores is not None:
            self._scores.tail = self._logits.clone()
        else:
            engine.evict(force=False)
        return self._logits[:, -1]

    @torch.no_grad()
    def greedy(self, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """The most likely tokens after ``ids`` (int64 ``[B, 1]``, not read yet): int64 ``[B, max_new_tokens]``, on the device.

        The last of them is not read by the stream, as with `generate`.
        """
        found = []
        for _ in range(max_new_tokens):
            ids = self.step(ids).argmax(-1, keepdim=True)
            found.append(ids)
        self.finish()
        return torch.cat(found, 1)

    def finish(self) -> None:
        """Score the last step's tokens, if that was put off, and let the policy evict."""
        unread, self._unread = self._unread, None
        if unread is None:
            return
        event, scores = unread
        if event is not None:
            event.synchronize()
        values = scores.nan_to_num(nan=0.0).numpy()
        for row in range(len(values)):
            self._engine.planner.set_scores(row, values[row : row + 1].copy())
        self._engine.evict(force=False)

    # ------------------------------------------------------------------------------------------------------------------ internals

    def _check_packed(self) -> None:
        """A replay hands no queries to the host, so what they choose must have been chosen."""
        compression, planner = self._engine.parts.find(Compression), self._engine.planner
        if compression is None or not compression.rule.observe:
            return
        for row in range(planner.num_rows):
            if not planner.num_packed(row):
                raise UnsupportedError(
                    f"row {row} has not chosen its channels yet, and a graph does not show the queries that choose them; read a "
                    f"prompt of at least {compression.rule.observe} tokens and more than {compression.rule.recent}, or decode it "
                    "without one"
                )

    def _run(self, step: Step) -> None:
        self._engine.replaying = True
        try:
            self._captured.run(step)
        finally:
            self._engine.replaying = False

    def _forward(self) -> None:
        out = self.stream.model(
            input_ids=self._ids, position_ids=self._positions, use_cache=True, **{cache_name(self.stream.model): self.stream.cache}
        ).logits
        if self._logits is None:
            self._logits = torch.empty_like(out)
        self._logits.copy_(out)

    def _upload(self, values: list[int]) -> torch.Tensor:
        tensor = torch.tensor(values)
        pinned = tensor.pin_memory() if self._ids.device.type == "cuda" else tensor
        return pinned.to(self._ids.device, non_blocking=True)

    def _score(self) -> None:
        """Start reading back how surprising the new tokens are, under the logits of the last step."""
        scorer = self._scores
        if scorer is None:
            return
        if scorer.tail is None:
            scores = torch.full((self._ids.shape[0],), torch.nan)
        else:
            scores = self._backend.surprisal(scorer.tail[:, -1], self._ids[:, 0])
        cuda = scores.device.type == "cuda"
        here = torch.empty(scores.shape, dtype=torch.float32, pin_memory=cuda)
        here.copy_(scores, non_blocking=True)
        event = None
        if cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._unread = (event, here)
