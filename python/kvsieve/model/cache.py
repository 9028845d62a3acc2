"""The cache that `generate` holds: it owns nothing but the way to the engine."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvsieve.checks import LARGEST, MOST_ROWS, integer
from kvsieve.errors import RangeError, StateError, UnsupportedError, UnsupportedModelError
from kvsieve.model.handoff import GRAPH, hand_off, state
from kvsieve.model.ids import number_of, row_indices
from kvsieve.model.masks import check_dimensions

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["Owner", "SlidingLayer", "StreamCache", "StreamLayer"]


_hand_off_outside = torch.compiler.disable(hand_off)  # type: ignore[no-untyped-call]
"""For compiled code, which ends there. What is not compiled need not pay for that."""


class Owner(Protocol):
    """A stream, as its cache knows it."""

    @property
    def cache(self) -> StreamCache:
        """The cache of its layers."""
        ...

    def fork(self) -> Owner:
        """A second stream that shares its past."""
        ...


class StreamLayer(CacheLayerMixin):  # type: ignore[misc]
    """A full-attention layer. `update` hands it to the attention function, where mask, queries and fresh keys meet."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    sliding_window: int | None = None

    def __init__(self, owner: Engine, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index
        # Under autocast queries, keys and values come in dtypes of their own; the attention function turns them into this one.
        known = {layer.index: layer.dtype for layer in owner.facts.layers}
        self.stored_dtype = known.get(index, owner.facts.layers[0].dtype)
        self.had_gradients = False
        """Whether what was stored could have been differentiated through: see :mod:`kvsieve.runtime.modes`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands this layer over; returns the new keys and values only, because the past is read from the store."""
        (_hand_off_outside if torch.compiler.is_compiling() else hand_off)(self)
        return key_states, value_states

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[B, H, q, D]`` over what the layer holds and the new ``key``, ``value`` ``[B, Hkv, q, D]``.

        ``mask`` is bool-like ``[B, q]`` (the padding of the new columns) or None. Returns ``[B, q, H, Dv]``.

        Raises:
            PaddingError: for a mask that says more than which columns are pads.
            UnsupportedModelError: if the model's window is not the one that its configuration names.
        """
        if mask is not None and mask.ndim != 2:
            check_dimensions(mask)
        if sliding_window is not None and sliding_window != self.sliding_window:
            raise UnsupportedModelError(
                f"layer {self.index} of this model slides over {sliding_window} tokens, its configuration says "
                f"{'full attention' if self.sliding_window is None else self.sliding_window}; "
                "correct layer_types and sliding_window in the configuration"
            )
        return self.owner.attend(
            self.index,
            module,
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            position_ids=position_ids,
        )

    def get_seq_length(self) -> int:
        """Tokens *seen* (columns, pads included), never tokens resident."""
        return self.owner.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a cache that keeps everything: positions and mask offsets count what was seen."""
        return self.owner.columns + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: a stream takes any number of tokens."""
        return -1

    def offload(self) -> None:
        raise UnsupportedError("a stream's cache cannot be offloaded by generate; give it a smaller budget instead")

    prefetch = offload


class SlidingLayer(StreamLayer):
    """A layer that sees its last tokens only; :mod:`kvsieve.runtime.sliding` holds them. To `generate` it looks like any other."""

    is_sliding = True

    def __init__(self, owner: Engine, index: int, sliding_window: int) -> None:
        super().__init__(owner, index)
        self.sliding_window = sliding_window


class StreamCache(Cache):  # type: ignore[misc]
    """A `transformers` cache whose layers live in a stream.

    Every method acts on all layers at once, because one plan serves them all.
    """

    serves_sliding = True
    """Sliding layers are the stream's too: of a mask they need the padding only."""

    def __init__(self, engine: Engine, stream: weakref.ref[Owner] | None = None) -> None:
        self.engine, self._stream = engine, stream
        self._fork: Owner | None = None
        """The stream that a copy lives in: nobody else holds it."""
        layers: list[Any] = []
        for index, (kind, kwargs) in enumerate(zip(engine.facts.layer_types, engine.facts.layer_kwargs)):
            full = kind == "full_attention"
            layers.append(StreamLayer(engine, index) if full else SlidingLayer(engine, index, kwargs["sliding_window"]))
        super().__init__(layers=layers)
        self.attending = len(layers)
        """How many layers take part in a forward through kvsieve's attention."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamCache:
        """A copy goes on by itself: the cache of a fork of its stream."""
        parent = None if self._stream is None else self._stream()
        if parent is None:
            raise StateError("the stream of this cache is gone; copy the cache, or fork() the stream, while it is open")
        child = parent.fork()
        cache = child.cache
        cache._fork = child
        return cache

    def __copy__(self) -> StreamCache:
        return self.__deepcopy__({})

    def __reduce__(self) -> Any:
        raise UnsupportedError("a stream's cache cannot be pickled; write the stream with stream.save(path), or fork() it")

    def __bool__(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether any token was seen."""
        return self.engine.columns > 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer ``layer_idx`` of the running forward has these keys and values; see :meth:`StreamLayer.update`.

        Raises:
            RangeError: for a layer that the model does not have. StateError: outside of a forward through this cache.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and state.mode == GRAPH:
            return key_states, value_states  # the operation that follows names its layer itself: see :mod:`.graphed`
        if type(layer_idx) is not int or not 0 <= layer_idx < len(self.layers):
            layer_idx = integer("layer_idx", layer_idx, 0, len(self.layers) - 1, RangeError)
        (_hand_off_outside if compiling else hand_off)(self.layers[layer_idx])
        return key_states, value_states

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be done: a layer's memory is made by its first forward."""

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """No layer holds a past of its own to go back to: :meth:`crop` needs none."""
        return False

    def offload(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Refused: a budget bounds what is on the device.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a stream's cache cannot be offloaded by generate; give it a smaller budget instead")

    prefetch = offload

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns *seen*, pads included, of any layer: what transformers must believe."""
        return self.engine.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """As of a cache that keeps everything, for every layer: positions and mask offsets count what was seen."""
        length: Any = query_length
        if not isinstance(length, int | torch.SymInt):
            length = integer("query_length", length, 0, error=RangeError)
        return self.engine.columns + length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum: a stream takes any number of tokens."""
        return -1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As :meth:`get_seq_length`."""
        return self.engine.columns

    def reset(self) -> None:
        """Forget everything."""
        self.engine.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` columns (``<= 0``, as `transformers` passes it), and what was said after them.

        Exact, or refused before anything has changed.

        Raises:
            CacheMismatchError, StateError: if what a shorter text would hold was evicted, or has left a sliding window;
                :meth:`Stream.rewind` goes back to a mark.
        """
        given: Any = tokens_to_remove
        if isinstance(given, torch.Tensor):  # as some releases of transformers pass it
            given = number_of(given)
        count = -integer("tokens_to_remove", given, -LARGEST, 0, RangeError)
        self.engine.check_crop(count)
        self.engine.crop(count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was. Blocks are shared until one of them is written.

        Raises:
            RangeError: for a row that there is not; nothing has changed then.
        """
        if self.engine.num_rows:
            self.engine.select_rows(row_indices("beam_idx", beam_idx, self.engine.num_rows))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, int ``[n]`` (-1 is the last one) or bool ``[rows]``.

        Raises:
            RangeError: for a row that there is not, or none.
        """
        if self.engine.num_rows:
            self.engine.select_rows(row_indices("indices", indices, self.engine.num_rows, from_end=True, mask=True))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, at least once.

        Raises:
            RangeError: for a number that is none, or too large for a batch.
        """
        rows = self.engine.num_rows
        repeats = integer("repeats", repeats, 1, MOST_ROWS // max(rows, 1), RangeError)
        self.engine.select_rows([row for row in range(rows) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Assisted decoding: nothing is evicted until its tokens are verified, that is until `crop` or the next forward."""
        self.engine.candidates.verifying = True
