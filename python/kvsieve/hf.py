"""Everything kvsieve relies on in `transformers`, in one file. Nothing happens at import.

The seam is four public doors, opened when a stream opens and closed when the last one on the model closes:

1. a `Cache` given to any forward (:mod:`kvsieve.cache`);
2. a registered attention function, the only place where queries and fresh keys meet;
3. a registered mask function, without which left padding never reaches the attention function: it hands the padding rows through;
4. forward hooks: on the decoder (which cache is this forward's?), on the attention modules (raw keys), on the model (logits).

`update()` hands its layer to the attention function through a thread-local, because `generate` rejects unknown arguments, and two
threads may generate on one model.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import CacheMismatchError, StateError, UnsupportedModelError
from kvsieve.generate import read_pieces
from kvsieve.model.generation import driven_by_generate
from kvsieve.rope import LayerRope, measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from kvsieve.cache import StreamCache, StreamLayer

__all__ = ["ATTENTION_NAME", "Attachment", "AttentionLayer", "ModelFacts", "attach", "hand_over"]

ATTENTION_NAME = "kvsieve"
"""The name under which the attention and mask functions are registered. It must not contain `sdpa`, `flash`, `flex` or `/`."""

_PROBE_LENGTH = 4


class _Thread(threading.local):
    """What one thread's forward is doing."""

    def __init__(self) -> None:
        self.attachment: Attachment | None = None
        self.cache: StreamCache | None = None
        self.handed: StreamLayer | None = None
        self.record: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


_thread = _Thread()


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One full-attention layer of a model, as the probe saw it."""

    index: int
    module: torch.nn.Module
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    rope: LayerRope | None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in this layer."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What kvsieve knows about a model.

    Attributes:
        layers: its full-attention layers, in order.
        layer_types: the type of every layer, full or sliding attention.
        layer_kwargs: of each sliding layer its `sliding_window`, in tokens.
        trained_length: tokens the model was trained for; None when the configuration does not say.
        logits_of: maps hidden states ``[n, hidden]`` after the final norm to the model's logits ``[n, V]``; None when unknown.
        longrope: whether the model changes its frequencies with the length it has seen.
        dynamic_rope: whether it does so in a way that cannot be re-placed.
    """

    layers: tuple[AttentionLayer, ...]
    layer_types: tuple[str, ...]
    layer_kwargs: tuple[dict[str, Any], ...]
    trained_length: int | None
    logits_of: Callable[[torch.Tensor], torch.Tensor] | None
    longrope: bool
    dynamic_rope: bool

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all full-attention layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def has_rope(self) -> bool:
        """Whether any full-attention layer rotates."""
        return any(layer.rope is not None for layer in self.layers)


# ------------------------------------------------------------------------------------------------------------- registered pieces


def hand_over(layer: StreamLayer) -> None:
    """Leave ``layer`` for the attention function that runs next on this thread."""
    if _thread.handed is not None:
        _thread.handed = None
        raise StateError(
            "a layer's keys were stored but its attention never ran through kvsieve; "
            "was the model's attention implementation changed inside the stream?"
        )
    if _thread.cache is None:
        raise StateError("stream.cache was used outside its `with kvsieve.stream(...)` block, or with a model that has no stream")
    _thread.handed = layer


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The registered attention function: a stream's layer if one was handed over, the model's own attention otherwise."""
    if _thread.record is not None:
        _thread.record(module, query, key, value)
    layer, _thread.handed = _thread.handed, None
    if layer is None:
        return _stock_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if kwargs.get("output_attentions"):
        raise StateError("output_attentions is not available inside a stream: probabilities are never materialised")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = layer.attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=scale,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_ids=kwargs.get("position_ids"),
        sliding_window=kwargs.get("sliding_window"),
    )
    return out, None


def mask_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The registered mask function: the padding of the new columns for our layers, the model's own mask for all others."""
    if _thread.cache is not None and attention_mask is not None and attention_mask.dim() == 2:
        _thread.cache.engine.check_mask(attention_mask, q_length)
    if _thread.cache is None:
        return _stock_mask()(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    return None if attention_mask is None else attention_mask[:, -q_length:]


def _stock_name() -> str:
    if _thread.attachment is None:
        raise StateError("a model uses kvsieve's attention but no stream is open on it")
    return _thread.attachment.previous


def _stock_attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    result: tuple[torch.Tensor, torch.Tensor | None] = ALL_ATTENTION_FUNCTIONS.get_interface(_stock_name(), eager)(
        module, *args, **kwargs
    )
    return result


def _stock_mask() -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[_stock_name()]


# -------------------------------------------------------------------------------------------------------------------- attachment


class Attachment:
    """kvsieve's presence on one model; shared by all streams that are open on it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.previous: str = model.config._attn_implementation
        self.users = 0
        self._hooks: list[Any] = []
        self._install()
        try:
            self.facts = _examine(self)
            self._hook_layers()
        except BaseException:
            self._remove()
            raise

    def _install(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(ATTENTION_NAME, attention_forward)
        AttentionMaskInterface.register(ATTENTION_NAME, mask_rows)
        name = type(self.model).__name__
        self.model.set_attn_implementation(ATTENTION_NAME)
        if self.model.config._attn_implementation != ATTENTION_NAME:
            raise UnsupportedModelError(
                f"{name} does not dispatch its attention through transformers' AttentionInterface, so no stream can open on it"
            )
        self.decoder = self.model.get_decoder()
        self._hooks += [
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True),
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
        ]

    def _hook_layers(self) -> None:
        for layer in self.facts.layers:
            if layer.rope is not None:
                self._hooks.append(layer.module.register_forward_pre_hook(self._before_attention, with_kwargs=True))

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.model.config._attn_implementation == ATTENTION_NAME:
            self.model.set_attn_implementation(self.previous)

    def acquire(self) -> None:
        """One more stream uses this attachment."""
        self.users += 1

    def release(self) -> None:
        """One stream less; the last one restores the model."""
        self.users -= 1
        if self.users == 0:
            _attached.pop(self.model, None)
            self._remove()

    # Hooks. `_cache_of` is the only test of whether a forward is a stream's.

    def _cache_of(self, kwargs: dict[str, Any]) -> StreamCache | None:
        from kvsieve.cache import StreamCache

        cache = kwargs.get("past_key_values")
        if not isinstance(cache, StreamCache):
            return None
        if cache.engine.facts is not self.facts:
            raise CacheMismatchError(f"this cache belongs to a stream on another model, not to this {type(self.model).__name__}")
        return cache

    def _before_decoder(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _thread.attachment, _thread.handed = self, None
        _thread.cache = cache = self._cache_of(kwargs)
        if cache is not None:
            if kwargs.get("use_cache") is False:
                raise StateError("a stream needs use_cache=True: its cache is where the tokens go")
            cache.engine.prepare()

    def _after_decoder(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache, _thread.cache, _thread.handed = _thread.cache, None, None
        if cache is not None and output is None:
            cache.engine.rollback()
        elif cache is not None:
            cache.engine.decoded(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = self._cache_of(kwargs)
        if cache is None:
            return None
        engine = cache.engine
        ids = kwargs.get("input_ids")
        ids = ids if ids is not None else (args[0] if args else None)
        foreign = engine.turn is None and not engine.inner and driven_by_generate(self.model)
        changed = None
        if ids is not None and not args:
            pieces = engine.pieces(ids.shape[0], ids.shape[1], kwargs.get("logits_to_keep", 1))
            if pieces is not None:
                kwargs = changed = read_pieces(self.model, cache, kwargs, pieces)
                ids = kwargs["input_ids"]
        engine.expect(ids, foreign=foreign)
        return None if changed is None else (args, changed)

    def _after_model(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        from kvsieve.cache import StreamCache

        cache = kwargs.get("past_key_values")
        if isinstance(cache, StreamCache) and output is None:
            cache.engine.rollback()
        elif isinstance(cache, StreamCache):
            cache.engine.complete(output[0] if isinstance(output, tuple) else output.logits)
            cache.engine.whole(output)

    def _before_attention(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Raw keys: the module's own rotation becomes the identity."""
        cache = _thread.cache
        if cache is None or cache.engine.frame != "raw":
            return None
        return args, _with_identity(kwargs)


_attached: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def attach(model: PreTrainedModel) -> Attachment:
    """kvsieve's attachment to ``model``, made if this is its first stream. The caller acquires and releases it.

    Raises:
        UnsupportedModelError: if the model's attention cannot be served; the message names the reason.
    """
    with _lock:
        _refuse_by_configuration(model)
        found = _attached.get(model)
        if found is None:
            found = _attached[model] = Attachment(model)
        return found


def _with_identity(kwargs: dict[str, Any]) -> dict[str, Any]:
    cos, sin = kwargs["position_embeddings"]
    return {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


# ------------------------------------------------------------------------------------------------------------------- examination


def _refuse_by_configuration(model: PreTrainedModel) -> None:
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"a stream needs a transformers PreTrainedModel, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; streams serve decoder-only models")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head; pass the causal-LM model, not its base")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name} uses multi-head latent attention, whose cache is not keys and values per head")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise UnsupportedModelError(f"{name} shares keys and values between layers, which bypasses the cache")
    types, kwargs = _layer_types(config)
    other = sorted({t for t in types if t not in ("full_attention", "sliding_attention")})
    if other:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(other)}; streams serve full and sliding attention")
    if "full_attention" not in types:
        width = kwargs[0].get("sliding_window")
        raise UnsupportedModelError(
            f"every layer of this {name} already slides over {width} tokens, which bounds its cache; nothing is left to budget"
        )


def _layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, kwargs = get_layer_types_and_kwargs(config)
    return types[: config.num_hidden_layers], kwargs[: config.num_hidden_layers]


@contextmanager
def _recording(record: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    _thread.record = record
    try:
        yield
    finally:
        _thread.record = None


def _examine(attachment: Attachment) -> ModelFacts:
    """Run a few tokens through the model and watch. Two forwards: who attends, then what rotation does."""
    model, name = attachment.model, type(attachment.model).__name__
    config = model.config.get_text_config(decoder=True)
    types, kwargs = _layer_types(config)
    seen = _watch(model)
    modules: dict[Any, torch.nn.Module] = {getattr(m, "layer_idx", None): m for m in seen}
    full = [i for i, t in enumerate(types) if t == "full_attention"]
    missing = [i for i in range(len(types)) if i not in modules]
    if missing:
        raise UnsupportedModelError(
            f"{name}: layers {missing} do not call the registered attention function, so no stream can open on it"
        )
    pairs = _watch_rotation(model, [modules[i] for i in full])
    frequencies = _frequencies(attachment.decoder)
    layers = []
    for index in full:
        module = modules[index]
        _, key, value = seen[module]
        layers.append(
            AttentionLayer(
                index=index,
                module=module,
                num_kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                dtype=key.dtype,
                device=key.device,
                rope=_rope_of(name, index, pairs.get(module), frequencies),
            )
        )
    rope_type = _rope_type(config)
    return ModelFacts(
        layers=tuple(layers),
        layer_types=tuple(types),
        layer_kwargs=tuple(kwargs),
        trained_length=getattr(config, "max_position_embeddings", None),
        logits_of=_logits_of(model),
        longrope=rope_type == "longrope",
        dynamic_rope=rope_type == "dynamic",
    )


def _probe(model: PreTrainedModel, **kwargs: Any) -> Any:
    ids = torch.arange(_PROBE_LENGTH, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs)


def _watch(model: PreTrainedModel) -> dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, key and value of every attention module that calls the registered function."""
    seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    with _recording(lambda module, q, k, v: seen.__setitem__(module, (q, k, v))):
        _probe(model)
    return seen


def _watch_rotation(
    model: PreTrainedModel, modules: list[torch.nn.Module]
) -> dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Queries ``[H, n, D]`` of each module without and with its rotation, from the same hidden states."""
    last: dict[torch.nn.Module, torch.Tensor] = {}
    raw: dict[torch.nn.Module, torch.Tensor] = {}

    def twice(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("position_embeddings"), tuple):
            module.forward(*args, **_with_identity(kwargs))
            raw[module] = last[module][0].clone()

    hooks = [m.register_forward_pre_hook(twice, with_kwargs=True) for m in modules]
    try:
        with _recording(lambda module, q, k, v: last.__setitem__(module, q)):
            _probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {m: (raw[m], last[m][0]) for m in raw}


def _frequencies(decoder: torch.nn.Module) -> list[tuple[torch.Tensor, float]]:
    """Every (inv_freq, factor) that a rotary module of the model holds."""
    found = []
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                prefix = name[: -len("inv_freq")]
                factor = getattr(module, f"{prefix}attention_scaling", getattr(module, "attention_scaling", 1.0))
                found.append((buffer, float(factor)))
    return found


def _rope_of(
    name: str, index: int, pair: tuple[torch.Tensor, torch.Tensor] | None, frequencies: list[tuple[torch.Tensor, float]]
) -> LayerRope | None:
    if pair is None:
        return None
    try:
        return measure(*pair, frequencies)
    except LookupError as err:
        raise UnsupportedModelError(f"{name}, layer {index}: {err}; its positions cannot be re-placed") from None


def _rope_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    types = {str(p.get("rope_type", "default")) for p in kinds}
    return next((t for t in ("dynamic", "longrope") if t in types), "default")


def _logits_of(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How this model turns hidden states into logits, found by comparing candidates with what it returns."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    kept: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_hook(
        lambda m, a, o: kept.append(o[0] if isinstance(o, tuple) else o.last_hidden_state)
    )
    try:
        logits = _probe(model).logits[0]
    finally:
        hook.remove()
    cap, scale, divisor = (getattr(config, n, None) for n in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    candidates: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda h: head(h)]
    if cap:
        candidates.append(lambda h: torch.tanh(head(h) / cap) * cap)
    if scale:
        candidates.append(lambda h: head(h) * scale)
    if divisor:
        candidates.append(lambda h: head(h) / divisor)
    with torch.no_grad():
        for candidate in candidates:
            if torch.allclose(candidate(kept[0][0]).float(), logits.float(), rtol=1e-2, atol=1e-3 * float(logits.abs().max())):
                return candidate
    return None
