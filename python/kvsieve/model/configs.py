"""Config views: how a model's attention reaches kvsieve while its configuration stays as it is.

A transformers module looks its attention up by ``self.config._attn_implementation``. While a stream is open, the modules that look
it up have a *view* in place of their configuration: an object of a subclass that shares the original's ``__dict__``, so that every
value read or written is the original's, but whose ``_attn_implementation`` reads "kvsieve" in a forward that a stream is part of.
Forwards without a stream read the original's value. ``model.config`` is never touched; copies and pickles of a view are (copies of)
the original, so that a model copied inside a block is a stock model.
"""

from __future__ import annotations

import copy
import operator
import weakref
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.locks import shared_lock
from kvsieve.model.handoff import GRAPH, OPEN, state

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ATTENTION_NAME", "GRAPH_NAME", "Views", "hide", "original", "show"]

ATTENTION_NAME = "kvsieve"
"""The name under which the attention and mask functions are registered. It must not contain `sdpa`, `flash`, `flex` or `/`."""

GRAPH_NAME = "kvsieve_graph"
"""The name under which compiled code finds the attention that is one operation. No mask function has it, so none is made there."""

_lock = shared_lock()
_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def original(config: Any) -> Any:
    """The configuration behind a view; any other object as it is."""
    return config._kvsieve_original if hasattr(type(config), "_kvsieve_original") else config


def _name(self: Any) -> Any:
    # Compiled code is kept for later calls. It is guarded by plain values of its thread; frames are none.
    if torch.compiler.is_compiling():
        if state.mode == GRAPH:
            return GRAPH_NAME
        return ATTENTION_NAME if state.mode == OPEN else self._kvsieve_original._attn_implementation
    if state.frames or (state.watch is not None and state.watch.dispatch):
        return ATTENTION_NAME
    return self._kvsieve_original._attn_implementation


def _set_name(self: Any, value: Any) -> None:
    self._kvsieve_original._attn_implementation = value


def _view_class(base: type, parts: tuple[str, ...]) -> type:
    """The class of views of ``base``; what is under the names ``parts`` is seen through views too."""

    def part(name: str) -> property:
        def get(self: Any) -> Any:
            return self._kvsieve_views.of(self.__dict__[name])

        def put(self: Any, value: Any) -> None:
            self.__dict__[name] = original(value)

        return property(get, put)

    key = base, parts
    with _lock:
        if key not in _classes:
            members: dict[str, Any] = {
                "__slots__": ("_kvsieve_original", "_kvsieve_views"),
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__class__": property(lambda self: base),
                "__copy__": lambda self: copy.copy(self._kvsieve_original),
                "__deepcopy__": lambda self, memo: copy.deepcopy(self._kvsieve_original, memo),
                "__reduce_ex__": lambda self, protocol: (operator.getitem, ([self._kvsieve_original], 0)),
                "_attn_implementation": property(_name, _set_name),
                **{name: part(name) for name in parts},
            }
            _classes[key] = type(base.__name__, (base,), members)
        return _classes[key]


class Views:
    """The views of one model's configurations, one for each object."""

    def __init__(self, text: Any) -> None:
        self._text = original(text)
        self._made: dict[int, Any] = {}

    def of(self, config: Any) -> Any:
        """The view of ``config`` (a configuration or a view)."""
        config = original(config)
        if id(config) not in self._made:
            cls: Any = _view_class(type(config), self._parts(config))
            view = object.__new__(cls)
            cls._kvsieve_original.__set__(view, config)
            cls._kvsieve_views.__set__(view, self)
            object.__setattr__(view, "__dict__", vars(config))
            self._made[id(config)] = view
        return self._made[id(config)]

    def _parts(self, config: Any) -> tuple[str, ...]:
        """Names under which ``config`` holds the text configuration, or one that holds it."""
        return tuple(sorted(name for name, value in vars(config).items() if self._holds(value)))

    def _holds(self, value: Any, depth: int = 3) -> bool:
        from transformers import PretrainedConfig

        value = original(value)
        if not isinstance(value, PretrainedConfig):
            return False
        return value is self._text or (depth > 0 and any(self._holds(v, depth - 1) for v in vars(value).values()))


_shown: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
"""Modules whose configuration is a view now, and for how many models: two models may share a decoder."""


def show(views: Views, modules: Iterable[torch.nn.Module]) -> None:
    """Put views in place of the configurations of ``modules``."""
    with _lock:
        for module in modules:
            if original(module.config) is module.config:
                module.config = views.of(module.config)
            _shown[module] = _shown.get(module, 0) + 1


def hide(modules: Iterable[torch.nn.Module]) -> None:
    """Undo :func:`show`: a module that no other model shows gets its configuration back."""
    with _lock:
        for module in modules:
            left = _shown.get(module, 0) - 1
            if left > 0:
                _shown[module] = left
            else:
                _shown.pop(module, None)
                module.config = original(module.config)
