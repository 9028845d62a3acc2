"""What a user holds: a stream is a model with a memory."""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve import backends
from kvsieve.errors import (
    CacheMismatchError,
    PaddingError,
    PolicyError,
    ShapeError,
    StateError,
    UnsupportedError,
    UnsupportedModelError,
)
from kvsieve.roles import Policy

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from kvsieve.cache import StreamCache
    from kvsieve.engine import Engine
    from kvsieve.facts import ModelFacts
    from kvsieve.model import Attachment

__all__ = ["HeadTrace", "Kept", "LayerStats", "LayerTrace", "Parts", "Stats", "Stream", "stream"]

MAX_CHUNK = 512
"""Most prompt tokens fed at a time."""


@dataclass(frozen=True)
class LayerStats:
    """One full-attention layer: its index, resident tokens of the fullest row, and bytes of keys and values held."""

    index: int
    resident: int
    bytes_held: int


@dataclass(frozen=True)
class Parts:
    """The bytes of a stream's keys and values by what they hold; their sum, and the sliding layers' own caches, is ``bytes_held``.

    Attributes:
        keys, values: packed tokens; of a policy that packs nothing, all tokens.
        scales: steps and least values of codes.
        channels: which channels of keys were kept.
        tail: keys and values that are not packed yet.
        bounds: what :func:`kvsieve.Quest` knows of blocks.
    """

    keys: int
    values: int
    scales: int
    channels: int
    tail: int
    bounds: int = 0


@dataclass(frozen=True)
class Stats:
    """What a stream has seen and holds.

    Attributes:
        seen: tokens of the row that saw most (pads not counted).
        resident: tokens of the row that holds most.
        bytes_held: bytes of keys and values the allocator holds, for all rows and layers; forks share blocks with their parent.
        bytes_full: bytes a full cache of the same rows would hold.
        ratio: ``bytes_held / bytes_full``; 0 before the first token.
        packed: packed tokens of the row that has most.
        parts: the bytes by what they hold.
        backend: name of the backend.
        policy: the policy, as text.
        frame: how keys are stored, ``"rotated"`` or ``"raw"``.
        layers: one entry per full-attention layer.
    """

    seen: int
    resident: int
    bytes_held: int
    bytes_full: int
    ratio: float
    packed: int
    parts: Parts
    backend: str
    policy: str
    frame: str
    layers: tuple[LayerStats, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """The resident tokens of one row, in text order.

    Attributes:
        positions: int64 ``[n]``, numbers of the tokens in their sequence (pads not counted).
        scores: float32 ``[n]``; nan where the policy has no score.
    """

    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeadTrace:
    """What one key-value head of one row read last.

    Attributes:
        read: int64 ``[n, 2]``, stretches ``lo..hi`` of token positions that the newest query read, ascending; pads do not count.
        found: int64 ``[n, 2]``, what a search found, as it was found: the window may have moved on since.
        searched: representative keys that its last search scored; 0 where it was not needed.
        rounds: levels of that search's tree, or its stages.
    """

    read: npt.NDArray[np.int64]
    found: npt.NDArray[np.int64]
    searched: int
    rounds: int


@dataclass(frozen=True)
class LayerTrace:
    """What one full-attention layer read last.

    Attributes:
        index: the layer's index in the model.
        dense: whether it read everything.
        searched: keys scored in the last forward, over all rows, queries and key-value heads.
        read: keys attended to, likewise; of a dense layer, by the newest query of each row.
        rows: for each row its key-value heads.
    """

    index: int
    dense: bool
    searched: int
    read: int
    rows: tuple[tuple[HeadTrace, ...], ...]


def stream(model: PreTrainedModel, policy: Policy, backend: str | None = None) -> Stream:
    """Open a stream: give ``model`` a memory with a budget.

    Everything a user may get wrong fails here, not after four thousand tokens. Opening runs a few tokens through the model, to see
    what it does with positions. Leaving the ``with`` block (or ``close()``) restores the model exactly.

    Args:
        model: a decoder-only causal LM whose attention goes through transformers' ``AttentionInterface``.
        policy: for example ``kvsieve.SirLLM(budget=1024)``.
        backend: ``"cpu"``, ``"cuda"`` or ``"reference"``; by default the fastest for the model's device and dtype.

    Raises:
        UnsupportedModelError: if the model cannot be served with this policy; the message names the reason.
        PolicyError: if a budget cannot be met on this model.
        BackendError: if the backend cannot run here.

    >>> with kvsieve.stream(model, kvsieve.StreamingLLM(1024)) as stream:  # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=stream.cache, max_new_tokens=200)
    """
    return Stream(model, policy, backend)


class Stream:
    """A model with a memory. Open one with :func:`stream`; use it as a context manager, or :meth:`close` it."""

    def __init__(
        self, model: PreTrainedModel, policy: Policy, backend: str | None = None, *, _parent: Stream | None = None
    ) -> None:
        from kvsieve.cache import StreamCache
        from kvsieve.engine import Engine
        from kvsieve.model import attach, look_through

        if not isinstance(policy, Policy):
            raise PolicyError(f"a stream needs a policy such as kvsieve.SirLLM(budget=1024) second, got {type(policy).__name__}")
        self.model, self.policy = look_through(model), policy
        self._attachment: Attachment | None = attach(self.model)
        self._leave = weakref.finalize(self, self._attachment.release)
        try:
            if _parent is None:
                facts = self._attachment.facts
                name = backend or backends.choose(facts.layers[0].device, facts.layers[0].dtype)
                self._engine = Engine(policy, facts, backends.get(name), _frame(type(self.model).__name__, policy, facts))
            else:
                self._engine = _parent._engine.fork()
            self._cache = StreamCache(self._engine)
            self._engine.own_layers = self._cache.own_layers
        except BaseException:
            self.close()
            raise
        self._pads: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None

    # --------------------------------------------------------------------------------------------------------------- lifetime

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model. The last stream on it restores it exactly; closing twice is fine."""
        self._attachment = None
        self._leave()

    def _check_open(self) -> Engine:
        if self._attachment is None:
            raise StateError("this stream is closed; open another with kvsieve.stream(model, policy)")
        return self._engine

    # ------------------------------------------------------------------------------------------------------------------ facts

    @property
    def cache(self) -> StreamCache:
        """The cache to pass to any forward or generate loop, as ``past_key_values``."""
        self._check_open()
        return self._cache

    @property
    def seen(self) -> int:
        """Tokens of the row that saw most."""
        planner = self._engine.planner
        return max((planner.seen(row) for row in range(planner.num_rows)), default=0)

    def stats(self) -> Stats:
        """What this stream has seen and holds."""
        engine = self._engine
        planner, facts, resident = engine.planner, engine.facts, engine.resident
        seen = [planner.seen(row) for row in range(planner.num_rows)]
        layers = tuple(
            LayerStats(layer.index, resident, engine.stores[layer.index].bytes_held if layer.index in engine.stores else 0)
            for layer in facts.layers
        )
        held, full = engine.bytes_held, sum(seen) * facts.bytes_per_token + engine.own_bytes
        return Stats(
            seen=max(seen, default=0),
            resident=resident,
            bytes_held=held,
            bytes_full=full,
            ratio=held / full if full else 0.0,
            packed=max((planner.num_packed(row) for row in range(planner.num_rows)), default=0),
            parts=_parts(engine),
            backend=engine.backend.name,
            policy=repr(self.policy),
            frame=engine.frame,
            layers=layers,
        )

    def kept(self, layer: int | None = None, head: int | None = None) -> list[Kept]:
        """The resident tokens of each row and their scores, in text order.

        Under a rule per head (SnapKV, H2O) the heads of a layer hold different tokens: name one by its ``layer`` and key-value
        ``head``. Without ``head`` the result is what any head of the layer holds, without both what any head of any layer
        holds, and no scores. Under every other policy all heads of all layers hold the same.

        Args:
            layer: index of a full-attention layer of the model.
            head: number of one of its key-value heads; needs ``layer``.

        Raises:
            StateError: for a layer or head that the stream does not have, or a head without its layer.
        """
        planner, observer = self._engine.planner, self._engine.observer
        _check_head(self._engine, layer, head)
        if observer is not None:
            return [Kept(*observer.kept(planner, row, layer, head)) for row in range(planner.num_rows)]
        rows = []
        for row in range(planner.num_rows):
            memories = range(len(self.policy.memories))
            positions = np.concatenate([planner.positions(m, row) for m in memories])
            scores = np.concatenate([planner.scores(m, row) for m in memories])
            order = np.argsort(positions, kind="stable")
            rows.append(Kept(positions[order], scores[order]))
        return rows

    def trace(self) -> tuple[LayerTrace, ...]:
        """What each layer and key-value head read at the last step, under a policy that searches (HiP, InfiniteHiP).

        Raises:
            StateError: for a policy that reads all it holds, or before the first token.
        """
        from kvsieve.tracing import trace

        return trace(self._check_open())

    # ---------------------------------------------------------------------------------------------------------------- feeding

    @torch.no_grad()
    def feed(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, chunk: int | None = None) -> None:
        """Read new tokens without generating.

        Args:
            ids: int64 ``[B, n]``, the new tokens only.
            attention_mask: bool-like ``[B, n]``; zeros may only stand before a row's first real token.
            chunk: tokens per forward; chosen from the budget by default.

        Raises:
            ShapeError: for ids that are not two-dimensional integers, or empty.
            PaddingError: for padding that is not on the left.
            CacheMismatchError: if the batch is not the stream's.
        """
        ids, mask = self._with_pending(ids, self._accept(ids, attention_mask))
        self._feed(ids, mask, self._chunk() if chunk is None else chunk)

    def _feed(self, ids: torch.Tensor, mask: torch.Tensor, chunk: int) -> None:
        if chunk < 1:
            raise ShapeError(f"chunk must be at least 1, got {chunk}")
        extra = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        for lo in range(0, ids.shape[1], chunk):
            part = slice(lo, lo + chunk)
            whole = self._whole_mask(mask[:, part])
            self.model(
                input_ids=ids[:, part],
                attention_mask=whole,
                position_ids=(whole.cumsum(1) - 1).clamp(min=0)[:, -ids[:, part].shape[1] :],
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            )
            self._pads = whole

    @torch.no_grad()
    def generate(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, end_turn: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """One turn: read the *new* tokens and answer. What was said before is in the memory.

        Prompts longer than a chunk are read in chunks, so a prompt may be longer than the budget and than the trained length.

        Args:
            ids: int64 ``[B, n]``, this turn's new tokens only.
            attention_mask: bool-like ``[B, n]``; zeros may only stand before a row's first real token.
            end_turn: call :meth:`end_turn` when done.
            kwargs: passed to ``model.generate``. With several beams or return sequences the stream stays a single sequence per row:
                they run on a fork, and the stream then reads the best one.

        Returns:
            int64 ``[B * num_return_sequences, n + new]``: the new prompt and the answer, or as ``return_dict_in_generate`` asks.

        Raises:
            UnsupportedError: for assisted decoding on a stream that has seen tokens (transformers would feed the history again).
        """
        mask = self._accept(ids, attention_mask)
        if "past_key_values" in kwargs:
            raise StateError("stream.generate uses the stream's own cache; pass past_key_values to model.generate instead")
        wide = int(kwargs.get("num_beams") or 1) > 1 or int(kwargs.get("num_return_sequences") or 1) > 1
        if wide:
            return self._generate_wide(ids, mask, end_turn, kwargs)
        assisted = kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens")
        if assisted and self._engine.columns:
            raise UnsupportedError(
                "assisted decoding on a stream that has already seen tokens: transformers would feed it the history again; "
                "decode this turn without an assistant"
            )
        prompt = ids
        ids, mask = self._with_pending(ids, mask)
        chunk = self._chunk()
        if ids.shape[1] > chunk:
            last = (ids.shape[1] - 1) // chunk * chunk
            self._feed(ids[:, :last], mask[:, :last], chunk)
            ids, mask = ids[:, last:], mask[:, last:]
        whole = self._whole_mask(mask)
        result = self.model.generate(input_ids=ids, attention_mask=whole, past_key_values=self.cache, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        answer = sequences[:, ids.shape[1] :]
        self._remember(whole, answer, self._ends(kwargs))
        if end_turn:
            self.end_turn()
        if isinstance(result, torch.Tensor):
            return torch.cat([prompt, answer], 1)
        result.sequences = torch.cat([prompt, answer], 1)
        return result  # type: ignore[no-any-return]

    def _generate_wide(self, ids: torch.Tensor, mask: torch.Tensor, end_turn: bool, kwargs: dict[str, Any]) -> torch.Tensor:
        if ids.shape[1] > 1:
            self.feed(ids[:, :-1], mask[:, :-1])
        count = max(int(kwargs.get(n) or 1) for n in ("num_beams", "num_return_sequences"))
        with self.fork() as child:
            if child._engine.num_rows:
                child.cache.batch_repeat_interleave(count)
            whole = child._whole_mask(mask[:, -1:])
            result = self.model.generate(input_ids=ids[:, -1:], attention_mask=whole, past_key_values=child.cache, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        best = sequences[:: sequences.shape[0] // ids.shape[0]]
        self.feed(*_pads_first(best, torch.cat([mask[:, -1:], _real(best[:, 1:], self._ends(kwargs)).to(mask.dtype)], 1)))
        if end_turn:
            self.end_turn()
        heads = ids[:, :-1].repeat_interleave(sequences.shape[0] // ids.shape[0], 0)
        full = torch.cat([heads, sequences], 1)
        if isinstance(result, torch.Tensor):
            return full
        result.sequences = full
        return result  # type: ignore[no-any-return]

    def _with_pending(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens, after the ones the last turn sampled but the model has not read."""
        pending, self._pending = self._pending, None
        if pending is None:
            return ids, mask
        # Rows that ended early have pads there; pads go first, so that each row's tokens are its last columns.
        return _pads_first(torch.cat([pending[0], ids], 1), torch.cat([pending[1], mask], 1))

    def _ends(self, kwargs: dict[str, Any]) -> list[int]:
        """Token ids that end a sequence in this call of generate."""
        chosen = kwargs.get("generation_config") or self.model.generation_config
        ends = kwargs.get("eos_token_id", chosen.eos_token_id)
        if isinstance(ends, torch.Tensor):
            ends = ends.tolist()
        return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]

    def _remember(self, whole: torch.Tensor, answer: torch.Tensor, ends: list[int]) -> None:
        """After a turn: forget what a row that ended early was padded with, and note the token the model has not read yet."""
        stored = self._engine.columns - whole.shape[1]
        real = _real(answer, ends).to(whole.dtype)
        filler = (real[:, :stored] == 0).sum(1).tolist()
        if any(filler):
            self._engine.crop_rows(filler)
        self._pads = torch.cat([whole, real[:, :stored]], 1)
        self._pending = (answer[:, stored:], real[:, stored:]) if answer.shape[1] > stored else None

    def end_turn(self) -> None:
        """A turn ends: scores decay, residents come down to the budget, unused memory is given back."""
        engine = self._check_open()
        if engine.num_rows:
            engine.end_turn()

    def reset(self) -> None:
        """Forget everything, give all memory back, and start a new session."""
        self.cache.reset()
        self._pads = self._pending = None

    def fork(self) -> Stream:
        """A second stream that shares this one's past. Blocks are shared until one of the two writes; neither changes the other."""
        self._check_open()
        child = Stream(self.model, self.policy, _parent=self)
        child._pads, child._pending = self._pads, self._pending
        for mine, theirs in zip(self._cache.own_layers, child._cache.own_layers):
            vars(theirs).update(vars(mine))
        return child

    def save(self, path: str | PathLike[str]) -> None:
        """Write this stream's memory to one ``.safetensors`` file; see :func:`kvsieve.load`."""
        from kvsieve.snapshot import save

        self._check_open()
        save(self, path)

    # --------------------------------------------------------------------------------------------------------------- internals

    def _chunk(self) -> int:
        """Tokens per forward: small beside the budget where chunks change what is kept, and within the trained length."""
        specs = self.policy.specs(self._engine.facts.bytes_per_token)
        sizes = [spec.get("budget", 0) for spec in specs] + [spec.get("window", 0) for spec in specs[:-1]]
        chunk: int = min([MAX_CHUNK, *(max(size // 2, 16) for size in sizes if size)])
        trained = self._engine.facts.trained_length
        return chunk if trained is None else max(min(chunk, trained // 2), 1)

    def _accept(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        engine = self._check_open()
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ShapeError(f"ids must be an integer tensor of shape [batch, tokens], got {got}")
        if ids.shape[0] == 0 or ids.shape[1] == 0:
            raise ShapeError(f"the prompt is empty: ids have shape {tuple(ids.shape)}")
        if engine.num_rows and engine.num_rows != ids.shape[0]:
            raise CacheMismatchError(f"the stream holds {engine.num_rows} sequences, the input has {ids.shape[0]}")
        if mask is None:
            return torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise ShapeError(f"attention_mask must have the shape of ids, {tuple(ids.shape)}, got {tuple(mask.shape)}")
        empty = (mask == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise PaddingError(f"rows {empty} of the input have pads only")
        right = ((mask[:, :-1] != 0) & (mask[:, 1:] == 0)).any(1).nonzero().flatten().tolist()
        if right:
            raise PaddingError(f"rows {right} have a pad after a real token; pad on the left (tokenizer.padding_side = 'left')")
        return mask.to(ids.dtype)

    def _whole_mask(self, new: torch.Tensor) -> torch.Tensor:
        """The attention mask over every column seen and the new ones."""
        columns = self._engine.columns
        if not columns:
            return new
        if self._pads is None or self._pads.shape[1] < columns:
            known = 0 if self._pads is None else self._pads.shape[1]
            fill = torch.ones(new.shape[0], columns - known, dtype=new.dtype, device=new.device)
            self._pads = fill if self._pads is None else torch.cat([self._pads, fill], 1)
        return torch.cat([self._pads[:, :columns], new], 1)


def _parts(engine: Engine) -> Parts:
    held = [store.held() for store in engine.stores.values()]
    keys, values = sum(h.plain_keys for h in held), sum(h.plain_values for h in held)
    if engine.packer is None:
        return Parts(keys, values, 0, 0, 0, sum(h.bounds for h in held))
    keys, values, tail = sum(h.keys for h in held), sum(h.values for h in held), keys + values
    return Parts(keys, values, sum(h.scales for h in held), sum(h.channels for h in held), tail)


def _check_head(engine: Engine, layer: int | None, head: int | None) -> None:
    known = {facts.index: facts.num_kv_heads for facts in engine.facts.layers}
    if layer is None and head is not None:
        raise StateError(f"head {head} of which layer? pass layer= too, one of {sorted(known)}")
    if layer is not None and layer not in known:
        raise StateError(f"the stream holds no layer {layer!r}; its full-attention layers are {sorted(known)}")
    if layer is not None and head is not None and not 0 <= head < known[layer]:
        raise StateError(f"layer {layer} has key-value heads 0 to {known[layer] - 1}, not {head!r}")


def _real(answer: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Which tokens of ``answer`` ``[B, n]`` were sampled: those up to and including a row's first end token."""
    ended = torch.isin(answer, torch.tensor(ends, dtype=answer.dtype, device=answer.device))
    return ended.cumsum(1) - ended.long() == 0


def _pads_first(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same columns with each row's pads moved to its front, the order of its tokens kept."""
    if bool(mask.all()):
        return ids, mask
    order = mask.to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _frame(name: str, policy: Policy, facts: ModelFacts) -> str:
    """The frame of the keys, if this model's positions allow the policy at all."""
    if not policy.moves:
        return policy.frame
    if facts.dynamic_rope:
        raise UnsupportedModelError(
            f"{name} scales its rotary frequencies with the length (dynamic NTK), so {policy!r} cannot re-place its keys"
        )
    if not facts.has_rope and not _mixes_positions(facts):
        raise UnsupportedModelError(f"{name} has no rotary positions, so {policy!r} cannot re-place its keys; use kvsieve.Full()")
    return "raw" if facts.longrope else policy.frame


def _mixes_positions(facts: ModelFacts) -> bool:
    """Whether layers without rotation are meant: full attention without positions beside sliding layers that have them."""
    return len(facts.layers) < len(facts.layer_types)
