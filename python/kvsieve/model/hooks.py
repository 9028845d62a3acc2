"""kvsieve's presence on one model: hooks and config views, shared by all streams that are open on it.

Hooks stand on the causal LM (ids, logits), on its decoder and on what is between the two (which cache is this forward's?), and on
attention modules (pre-RoPE keys). A copy of the model gets hooks that do nothing and need no kvsieve to be unpickled.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import CacheMismatchError, KvsieveError, StateError, UnsupportedModelError
from kvsieve.locks import shared_lock
from kvsieve.model import configs, handoff, masks
from kvsieve.model.attention import attention_forward
from kvsieve.model.cache import StreamCache
from kvsieve.model.generation import driven_by_generate
from kvsieve.model.graphed import graphed_attention, mark, unmark
from kvsieve.model.handoff import state
from kvsieve.model.ids import check_forward
from kvsieve.model.pieces import read_pieces
from kvsieve.model.probe import Probe, with_identity
from kvsieve.model.reread import read_again
from kvsieve.model.support import look_through, refuse, versions
from kvsieve.model.verify import verify
from kvsieve.runtime.modes import autocast_enabled, unrecorded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvsieve.facts import ModelFacts

__all__ = ["Attachment", "attach", "between", "examined"]


class _Hook:
    """A hook that dies with its stream: copies and pickles of it do nothing."""

    def __init__(self, owner: Attachment, call: Callable[..., Any]) -> None:
        self._owner, self._call = owner, call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return self._call(*args) if self._owner.users else None

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _RotationHook:
    """Before an attention module: where a stream stores keys as they are before their rotation, the module's own is the identity.

    Compiled code has it inside, so it reads nothing but a plain value of its thread.
    """

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, with_identity(kwargs)) if state.raw else None

    __deepcopy__ = _Hook.__deepcopy__
    __reduce_ex__ = _Hook.__reduce_ex__


_numbers = itertools.count(1 << 60)
"""Numbers of hooks, far from torch's own: a pickled model carries them into processes whose hooks have low ones."""


def _renumbered(handle: Any) -> Any:
    number = next(_numbers)
    for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
        hooks = reference()
        if hooks is not None and handle.id in hooks:
            hooks[number] = hooks.pop(handle.id)
    handle.id = number
    return handle


class Attachment:
    """kvsieve's presence on one model. It does not keep the model alive."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = type(model).__name__
        self._model = weakref.ref(model)
        self.decoder: torch.nn.Module = model.get_decoder()
        self.users = 0
        self.lock = shared_lock()
        """Held while the attachment is made, which runs a few tokens; never during a user's forward."""
        self._facts: ModelFacts | None = None
        self._takes_positions = "position_ids" in inspect.signature(type(self.decoder).forward).parameters
        self._hooks: list[Any] = []
        self._between = between(model, self.decoder)
        self._views = configs.Views(model.config.get_text_config(decoder=True))
        self._viewed = [*self._between, *_with_configs(self.decoder)]

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        model = self._model()
        if model is None:
            raise StateError("the model of this stream is gone")
        return model

    @property
    def facts(self) -> ModelFacts:
        """What the probe found."""
        if self._facts is None:
            raise StateError(f"{self.name} has not been examined")
        return self._facts

    # ------------------------------------------------------------------------------------------------------- on and off the model

    def put_on(self) -> None:
        """Install the hooks and, the first time, find out what the model does and that a stream on it does the same."""
        with self.lock:
            if not self._hooks:
                self._install()
            if self._facts is not None:
                return
            try:
                self._examine()
            except BaseException:
                self._facts = None
                raise
            self._hook_layers()

    def _examine(self) -> None:
        probe = Probe(self.model, self.decoder)
        with probe.quiet():
            handles = [self._hook_before(m, self._stash) for m in self.decoder.modules() if hasattr(m, "layer_idx")]
            try:
                facts = probe.facts()
            except (KvsieveError, MemoryError):
                raise
            except Exception as err:
                what = f"{type(err).__name__}: {str(err)[:200]}"
                raise UnsupportedModelError(
                    f"{self.name} cannot be examined, so no stream can open on it ({what}); {versions()}"
                ) from err
            finally:
                for handle in handles:
                    handle.remove()
            self._facts = facts
            verify(probe, facts)

    def release(self) -> None:
        """One stream less; the last one leaves the model as it was."""
        with _lock:
            self.users -= 1
            last = self.users == 0
            model = self._model()
            if last and model is not None and _attached.get(model) is self:
                # The next stream looks at the model anew: it may have been changed in between.
                del _attached[model]
        if last:
            with self.lock:
                self._remove()

    def _install(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(configs.ATTENTION_NAME, attention_forward)
        AttentionInterface.register(configs.GRAPH_NAME, graphed_attention)
        AttentionMaskInterface.register(configs.ATTENTION_NAME, masks.mask_rows)
        model = self.model
        self._hook_before(model, self._before_model, keep=True)
        self._hook_after(model, self._after_model)
        for module in self._between:
            self._hook_before(module, self._before_between, keep=True)
            self._hook_after(module, self._after_between)
        self._hook_before(self.decoder, self._before_decoder, keep=True)
        self._hook_after(self.decoder, self._after_decoder)
        self._hook_layers()
        configs.show(self._views, self._viewed)

    def _hook_layers(self) -> None:
        for layer in () if self._facts is None else self._facts.layers:
            if layer.rope is not None:
                self._hook_before(layer.module, _RotationHook(), keep=True)
        mark(() if self._facts is None else self._facts.modules)

    def _hook_before(self, module: torch.nn.Module, call: Callable[..., Any], keep: bool = False) -> Any:
        hook = call if isinstance(call, _RotationHook) else _Hook(self, call)
        handle = _renumbered(module.register_forward_pre_hook(hook, with_kwargs=True))
        if keep:
            self._hooks.append(handle)
        return handle

    def _hook_after(self, module: torch.nn.Module, call: Callable[..., Any]) -> None:
        self._hooks.append(_renumbered(module.register_forward_hook(_Hook(self, call), with_kwargs=True, always_call=True)))

    def _remove(self) -> None:
        configs.hide(self._viewed)
        unmark(() if self._facts is None else self._facts.modules)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # ------------------------------------------------------------------------------------------------------------------- hooks

    def _cache_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StreamCache | None:
        """The stream's cache among a forward's arguments, whatever their names are in this release."""
        return next((value for value in (*kwargs.values(), *args) if isinstance(value, StreamCache)), None)

    def _is_others(self, cache: StreamCache | None) -> bool:
        """Whether this forward belongs to another model with a stream on it that shares this module: its own hooks see to it.

        Raises:
            CacheMismatchError: if nobody here knows the cache.
        """
        if cache is None or cache.engine.facts is self._facts:
            return False
        if state.cache is cache:
            return True
        raise CacheMismatchError(f"this cache belongs to a closed stream or to a stream on another model, not to this {self.name}")

    def _begin(self, module: torch.nn.Module, cache: StreamCache, kwargs: dict[str, Any]) -> None:
        """The outermost hooked module of a forward through ``cache`` begins."""
        if kwargs.get("use_cache") is False:
            raise StateError("a stream needs use_cache=True: its cache is where the tokens go")
        masks.check_dimensions(kwargs.get("attention_mask"))
        if module.training and torch.is_grad_enabled() and _is_checkpointing(self.decoder):
            raise StateError(_CHECKPOINTING)

    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = self._cache_of(args, kwargs)
        if cache is None or self._is_others(cache):
            handoff.enter(self, module, None)
            return None
        self._begin(module, cache, kwargs)
        engine = cache.engine
        ids = kwargs.get("input_ids")
        ids = ids if ids is not None else next((a for a in args if isinstance(a, torch.Tensor)), None)
        if ids is not None and not engine.replaying:
            check_forward(self.model, ids, kwargs)
        foreign = engine.transcript.turn is None and not engine.candidates.inner and driven_by_generate(self.model)
        changed = None
        if ids is not None and engine.transcript.turn is None and not engine.candidates.inner:
            unrecorded(read_again, self.model, cache)
        if ids is not None and not args:
            pieces = engine.cut(ids.shape[1], kwargs.get("logits_to_keep", 1))
            if pieces is not None:
                kwargs = changed = unrecorded(read_pieces, self.model, cache, kwargs, pieces)
                ids = kwargs["input_ids"]
        handoff.enter(self, module, cache, graph=self._graphs(cache, args, kwargs))
        unrecorded(engine.expect, ids, foreign=foreign)
        unrecorded(engine.prepare)
        return None if changed is None else (args, changed)

    def _after_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        through, _ = handoff.leave(self, module)
        cache = None if through is None else through.cache
        if cache is None:
            return
        if output is None:
            unrecorded(cache.engine.rollback)
            return
        logits = _tensor(output, "logits")
        unrecorded(cache.engine.complete, logits if _are_last(kwargs, logits) else logits[:, :0])
        cache.engine.candidates.whole(output)

    def _before_between(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = self._cache_of(args, kwargs)
        graph = cache is not None and self._graphs(cache, args, kwargs)
        if not self._is_others(cache) and handoff.enter(self, module, cache, graph=graph) is not None and cache is not None:
            self._begin(module, cache, kwargs)
            unrecorded(cache.engine.prepare)

    def _after_between(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        through, outermost = handoff.leave(self, module)
        if outermost and output is None and through is not None and through.cache is not None:
            unrecorded(through.cache.engine.rollback)

    def _before_decoder(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._before_between(module, args, kwargs)
        through, positions = state.through, kwargs.get("position_ids")
        cache = None if through is None else through.cache
        if through is None or cache is None:
            return None
        if isinstance(positions, torch.Tensor) and positions.ndim == 3:
            cache.engine.positions.check_axes(positions)
        if not through.graph:
            return None
        # No mask is made in a graph, so that what a decoder is given of it must be known outside.
        through.mask = kwargs.get("attention_mask")
        return (args, _of_one_size(cache, args, kwargs)) if self._takes_positions else None

    def _graphs(self, cache: StreamCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether compiled code may hold this forward's attention: nothing but pads is masked, and nothing is recorded or cast.

        What is no input of a decoder is left to its own words.
        """
        mask = kwargs.get("attention_mask")
        given = [x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None]
        return (
            not self._between
            and not cache.engine.replaying
            and len(args) <= 1
            and (mask is None or isinstance(mask, torch.Tensor))
            and len(given) == 1
            and isinstance(given[0], torch.Tensor)
            and given[0].dim() > 1
            and not torch.is_grad_enabled()
            and not autocast_enabled(self.facts.layers[0].device.type)
        )

    def _after_decoder(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if state.watch is not None and output is not None:
            state.watch.hidden = _tensor(output, "last_hidden_state")
        through, _ = handoff.leave(self, module)
        cache = None if through is None else through.cache
        if through is None or cache is None:
            return
        if output is None:
            unrecorded(cache.engine.rollback)
            return
        state.handed = None
        if through.attended < cache.attending:
            unrecorded(cache.engine.rollback)
            if module.training and _is_checkpointing(module):
                raise StateError(_CHECKPOINTING)
            raise StateError(
                f"{through.attended} of {cache.attending} layers stored this forward's tokens in the stream's cache, so nothing "
                "was kept of it; was the cache taken away, or the attention replaced, inside the model?"
            )
        through.attended = 0
        unrecorded(cache.engine.decoded, _tensor(output, "last_hidden_state"))

    def _stash(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if state.watch is not None:
            state.watch.called[module] = args, kwargs


_CHECKPOINTING = (
    "gradient checkpointing drops the cache in train mode, so nothing would be remembered; "
    "call model.gradient_checkpointing_disable() or model.eval() before reading through a stream"
)

_attached: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()
_lock = shared_lock()


def attach(model: PreTrainedModel) -> Attachment:
    """kvsieve's attachment to ``model``, made if this is its first stream. The caller releases it, once for each call.

    Raises:
        UnsupportedModelError: if the model's attention cannot be served; the message names the reason.
    """
    refuse(model)
    with _lock:
        found = _attached.get(model)
        if found is None:
            found = _attached[model] = Attachment(model)
        found.users += 1
    try:
        found.put_on()
    except BaseException:
        found.release()
        raise
    return found


@contextlib.contextmanager
def examined(model: Any) -> Iterator[None]:
    """``model`` is examined once for all streams that open on it in the block, and not for each that opens when none is open.

    Who opens a stream for each of many texts saves some forwards before each. In the block nobody may change the model.

    Raises:
        UnsupportedModelError: as :func:`attach`.
    """
    attachment = attach(look_through(model))
    try:
        yield
    finally:
        attachment.release()


def between(model: PreTrainedModel, decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """Models between the causal LM and its decoder, outermost first: they may make masks."""
    from transformers import PreTrainedModel

    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if not path:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder inside of it that a stream could find")
    parts = path.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]
    return [module for module in above if isinstance(module, PreTrainedModel)]


def _with_configs(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a decoder, itself included, that hold a configuration."""
    from transformers import PretrainedConfig

    return [module for module in decoder.modules() if isinstance(vars(module).get("config"), PretrainedConfig)]


def _of_one_size(cache: handoff.StreamsCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments without what grows with the text, for which compiled code would be made again.

    Positions ``[B, q]`` are given, so that it counts none; as a part of the whole text's they had its strides. The mask over all
    that was seen goes by the pass to those who look at it. Without positions it stays too: some decoders make the one of the other.
    """
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None and mask is None:
        ids = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if isinstance(t, torch.Tensor))
        if ids.is_nested or ids.dim() < 2:
            return kwargs  # which the model itself refuses
        seen = cache.engine.columns
        positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)[None]
    elif isinstance(positions, torch.Tensor) and positions.layout is torch.strided:
        mask = None
        if positions.stride()[:1] != positions.shape[-1:]:
            positions = positions.clone(memory_format=torch.contiguous_format)
    return {**kwargs, "position_ids": positions, "attention_mask": mask}


def _is_checkpointing(decoder: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def _tensor(output: Any, name: str) -> torch.Tensor:
    """A tensor of a model's output, given as an object or as a tuple (whose first tensor may be a loss)."""
    if not isinstance(output, tuple):
        return getattr(output, name)  # type: ignore[no-any-return]
    return next(t for t in output if isinstance(t, torch.Tensor) and t.ndim == 3)


def _are_last(kwargs: dict[str, Any], logits: torch.Tensor) -> bool:
    """Whether logits ``[B, r, V]`` are those of the last ``r`` columns: a tensor of columns may ask for others."""
    keep, ids = kwargs.get("logits_to_keep"), kwargs.get("input_ids")
    if not isinstance(keep, torch.Tensor) or ids is None or keep.dim() != 1:
        return not isinstance(keep, torch.Tensor)
    width = ids.shape[1]
    return (keep.cpu() % width).tolist() == list(range(width - len(keep), width)) and len(keep) == logits.shape[1] > 0
