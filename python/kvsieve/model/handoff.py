"""What one thread's forward is doing, and how a cache layer reaches the attention function.

`generate` rejects unknown arguments, so `update()` hands its layer to the attention function through a thread-local. Two threads
may run forwards on one model. Nothing here keeps a cache or a model alive: a forward that died leaves weak references only.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvsieve.errors import StateError

if TYPE_CHECKING:
    from kvsieve.runtime.engine import Engine

__all__ = ["GRAPH", "OPEN", "STOCK", "HandedLayer", "Pass", "StreamsCache", "Watch", "enter", "hand_off", "leave", "state", "take"]

STOCK, OPEN, GRAPH = 0, 1, 2
"""How code that is being compiled reaches attention: the model's own, kvsieve's in Python (which ends the graph), or kvsieve's as
one operation of the graph (:mod:`.graphed`). Compiled code is kept for later calls, so it is guarded by the thread's `mode`."""


class StreamsCache(Protocol):
    """The cache of a stream, as a forward through it knows it."""

    engine: Engine
    attending: int
    """How many layers take part in a forward."""


class HandedLayer(Protocol):
    """A cache layer that attends by itself: its `update` calls :func:`hand_off`, the attention function calls `attend`."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attention of ``query`` ``[B, H, q, D]`` over what the layer holds and the new ``key``, ``value`` ``[B, Hkv, q, D]``.

        ``mask`` is bool-like ``[B, q]`` (the padding of the new columns) or None. Returns ``[B, q, H, Dv]``.
        """


class Pass:
    """One forward of a model through a stream's cache.

    Attributes:
        attended: how many of its layers have attended.
        graph: whether compiled code may reach them by :mod:`.graphed`.
        mask: ``[B, seen + q]`` that the decoder was called with where compiled code may run, or None if there is none.
    """

    __slots__ = ("_cache", "_columns", "attended", "graph", "mask")

    def __init__(self, cache: StreamsCache, graph: bool = False) -> None:
        self._cache = weakref.ref(cache)
        self.attended, self.graph = 0, graph
        self.mask: torch.Tensor | None = None
        self._columns: torch.Tensor | None = None

    @property
    def cache(self) -> StreamsCache | None:
        """The cache, while anything else holds it."""
        return self._cache()

    def columns(self, width: int) -> torch.Tensor | None:
        """The padding of the ``width`` new columns, bool ``[B, width]``: the end of :attr:`mask`, which is looked at once."""
        if self._columns is None and self.mask is not None:
            cache = self._cache()
            assert cache is not None
            mask = self.mask.to(torch.bool)
            cache.engine.check_mask(mask, width)
            # Compiled layers are guarded by strides, and those of a part of the mask are another for every length.
            self._columns = mask[:, -width:].clone(memory_format=torch.contiguous_format)
        return self._columns


class _Frame:
    """A hooked module that is running; ``through`` is None of a forward without a stream's cache."""

    __slots__ = ("key", "through")

    def __init__(self, key: tuple[int, int], through: Pass | None) -> None:
        self.key, self.through = key, through


class Watch:
    """What the probe's thread sees of a forward.

    Attributes:
        dispatch: whether the forward goes through kvsieve's attention function.
        implementation: the attention that it falls back to; by default the one that the configuration names.
        seen: query, key and value of each attention module.
        answers: what the attention function answered, by module, one entry a forward.
        called: the arguments that modules with a layer index were called with.
        hidden: what the decoder returned, last.
    """

    def __init__(self, dispatch: bool, implementation: str | None = None) -> None:
        self.dispatch, self.implementation = dispatch, implementation
        self.seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.answers: dict[torch.nn.Module, list[torch.Tensor]] = {}
        self.called: dict[torch.nn.Module, tuple[Any, dict[str, Any]]] = {}
        self.hidden: torch.Tensor | None = None

    def saw(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """The attention function was called."""
        self.seen[module] = query, key, value

    def answered(self, module: torch.nn.Module, out: torch.Tensor) -> None:
        """The attention function returned ``out``."""
        self.answers.setdefault(module, []).append(out)


class _Thread(threading.local):
    """One thread's forwards.

    Attributes:
        frames: hooked modules that run, innermost last.
        handed: the layer that was handed over and not taken yet.
        watch: what a probe sees.
        mode, raw: what compiled code is guarded by, so plain values: how it reaches attention, and whether keys are stored before
            their rotation.
    """

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.handed: weakref.ref[Any] | None = None
        self.watch: Watch | None = None
        self.mode, self.raw = STOCK, False

    @property
    def through(self) -> Pass | None:
        """The pass of the innermost hooked module that runs on this thread."""
        return self.frames[-1].through if self.frames else None

    @property
    def cache(self) -> StreamsCache | None:
        """The stream's cache of the forward that runs on this thread."""
        through = self.through
        return None if through is None else through.cache

    def refresh(self) -> None:
        """What runs on this thread, or is watched, has changed."""
        through = self.through
        cache = None if through is None else through.cache
        self.raw = cache is not None and cache.engine.stored_keys == "pre_rope"
        watched = self.watch is not None and self.watch.dispatch
        if through is None or cache is None:
            self.mode = OPEN if watched else STOCK
        else:
            self.mode = GRAPH if through.graph and self.watch is None else OPEN


state = _Thread()
"""This thread's forwards, innermost last."""


def enter(owner: object, module: torch.nn.Module, cache: StreamsCache | None, *, graph: bool = False) -> Pass | None:
    """A module hooked by ``owner`` begins; ``graph`` is the new pass's.

    Returns:
        the pass, if this is the outermost module of a forward through ``cache``.
    """
    key = id(owner), id(module)
    outer = state.through
    if cache is None:
        # A forward without a stream inside of another one must not be taken for a part of it.
        if state.frames:
            state.frames.append(_Frame(key, None))
            state.refresh()
        return None
    if outer is not None and outer.cache is cache and not any(f.key == key and f.through is outer for f in state.frames):
        state.frames.append(_Frame(key, outer))
        return None
    _drop_dead(cache)
    through = Pass(cache, graph)
    state.frames.append(_Frame(key, through))
    state.handed = None
    state.refresh()
    return through


def leave(owner: object, module: torch.nn.Module) -> tuple[Pass | None, bool]:
    """A hooked module ends: its pass, and whether it was the outermost module of that pass. None for what never was a stream's."""
    frames, key = state.frames, (id(owner), id(module))
    for at in range(len(frames) - 1, -1, -1):
        if frames[at].key == key:
            through = frames[at].through
            del frames[at:]
            outermost = through is not None and not any(frame.through is through for frame in frames)
            if outermost:
                state.handed = None
            state.refresh()
            return through, outermost
    return None, False


def _drop_dead(cache: StreamsCache) -> None:
    """Forget frames of a forward through this cache that died without a word (Ctrl-C, an error in compiled code)."""
    for at, frame in enumerate(state.frames):
        if frame.through is not None and frame.through.cache in (None, cache):
            del state.frames[at:]
            return


def hand_off(layer: HandedLayer) -> None:
    """Leave ``layer`` for the attention function that runs next on this thread.

    Raises:
        StateError: outside of a forward that a stream takes part in, or if the layer before was never attended to.
    """
    if state.handed is not None:
        state.handed = None
        raise StateError(
            "a layer's keys were stored but its attention never ran through kvsieve; "
            "was the model's attention implementation changed inside the stream?"
        )
    if state.through is None:
        raise StateError(
            "stream.cache was used outside its `with kvsieve.stream(...)` block, with a model that has no stream, "
            "or by calling .forward(...) instead of the model itself"
        )
    state.handed = weakref.ref(layer)


def take() -> HandedLayer | None:
    """The layer that was handed over to the attention that runs now, if any."""
    handed = state.handed
    if handed is None:
        return None
    state.handed = None
    layer: HandedLayer | None = handed()
    if layer is not None and state.frames and (through := state.frames[-1].through) is not None:
        through.attended += 1
    return layer
