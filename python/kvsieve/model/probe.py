"""What a model does, found by running a few tokens through it and watching.

Nothing that a probe sets is seen by other threads: what it watches hangs on its own thread. The one exception is a model in train
mode, whose modules are put in eval mode while the probe runs, because dropout would make its answers random.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import UnsupportedModelError
from kvsieve.facts import AttentionLayer, LayerRope, ModelFacts
from kvsieve.model.handoff import Watch, state
from kvsieve.model.head import find_head
from kvsieve.model.parallel import ranks_of
from kvsieve.model.rope import measure
from kvsieve.model.support import cache_name, layer_types, versions
from kvsieve.runtime.modes import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PIECES", "Probe", "with_identity"]

PIECES = ((0, 4), (4, 5))
"""The probe's tokens as they are read: a prompt, then one token."""


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """``watch`` sees what this thread does."""
    before, state.watch = state.watch, watch
    state.refresh()
    try:
        yield watch
    finally:
        state.watch = before
        state.refresh()


class Probe:
    """A few tokens on one model. The stock answer first, then what its attention modules do; :mod:`.verify` goes on."""

    def __init__(self, model: PreTrainedModel, decoder: torch.nn.Module) -> None:
        import inspect

        self.model, self.decoder = model, decoder
        self.name = type(model).__name__
        self.cache_name = cache_name(model)
        self.config = model.config.get_text_config(decoder=True)
        self.device = _device_of(model)
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self.stock: torch.Tensor | None = None
        """The stock model's logits ``[5, V]``, read in pieces with its own cache."""

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without gradients, autocast, dropout and compiled code, whatever the caller has on."""
        training = [module for module in self.model.modules() if module.training]
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            modes.enter_context(uncompiled())
            for kind in {self.device.type, "cpu"}:
                modes.enter_context(torch.autocast(kind, enabled=False))
            try:
                for module in training:
                    module.training = False
                yield
            finally:
                for module in training:
                    module.training = True

    def forward(self, lo: int, hi: int, cache: Any = None) -> torch.Tensor:
        """Logits ``[hi - lo, V]`` of the tokens ``lo .. hi``."""
        if cache is None and lo:
            return self.forward(0, hi)[lo:]
        ids = torch.arange(lo, hi, device=self.device)[None]
        # Positions are passed, so that no model works them out and remembers them.
        extra: dict[str, Any] = {"position_ids": ids.clone()} if self._takes_positions else {}
        extra |= {"use_cache": False} if cache is None else {"use_cache": True, self.cache_name: cache}
        logits: torch.Tensor = self.model(input_ids=ids, **extra).logits[0]
        return logits

    def pieces(self, cache: Any, *, dispatch: bool) -> tuple[torch.Tensor, Watch]:
        """Logits ``[5, V]`` of the probe's tokens, read in pieces through ``cache``, and what was seen meanwhile."""
        with watching(Watch(dispatch)) as watch:
            return torch.cat([self.forward(lo, hi, cache) for lo, hi in PIECES]), watch

    def stock_cache(self) -> Any:
        """An empty cache of transformers' own; None where it would be wrong."""
        from transformers import DynamicCache

        # That cache never forgets under a window of one token; without a cache nothing need be forgotten.
        narrow = any(kwargs.get("sliding_window") == 1 for kwargs in layer_types(self.config)[1])
        return None if narrow else DynamicCache(config=self.config)

    def run_stock(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stock model's answer, and of its first piece hidden states and logits."""
        cache = self.stock_cache()
        # Some releases give a model with a cap on its attention logits `sdpa`, which leaves the cap out; a stream applies it.
        exact = "eager" if getattr(self.config, "attn_logit_softcapping", None) else None
        with watching(Watch(dispatch=exact is not None, implementation=exact)) as watch:
            first = self.forward(*PIECES[0], cache)
            hidden = watch.hidden
            self.stock = torch.cat([first, self.forward(*PIECES[1], cache)])
        if hidden is None:
            raise UnsupportedModelError(f"{self.name} does not call what its get_decoder() returns; {versions()}")
        return hidden[0], first

    def facts(self) -> ModelFacts:
        """What the model does."""
        hidden, logits = self.run_stock()
        types, kwargs = layer_types(self.config)
        with watching(Watch(dispatch=True)) as watch:
            self.forward(*PIECES[0])
        modules: dict[Any, torch.nn.Module] = {getattr(m, "layer_idx", None): m for m in watch.seen}
        full = [i for i, t in enumerate(types) if t == "full_attention"]
        missing = [i for i in range(len(types)) if i not in modules]
        if missing:
            raise UnsupportedModelError(
                f"{self.name}: layers {missing} do not dispatch their attention through transformers' AttentionInterface, "
                f"so no stream can open on it; {versions()}"
            )
        frequencies = _frequencies(self.decoder)
        layers, ropes = [], list[LayerRope]()
        for index in full:
            module = modules[index]
            query, key, value = watch.seen[module]
            raw = _raw_queries(module, watch)
            layers.append(
                AttentionLayer(
                    index=index,
                    module=module,
                    num_kv_heads=key.shape[1],
                    key_dim=key.shape[3],
                    value_dim=value.shape[3],
                    dtype=key.dtype,
                    device=key.device,
                    rope=None if raw is None else _shared(_rope_of(self.name, index, raw, query[0], frequencies), ropes),
                )
            )
        rope_type = _rope_type(self.config)
        return ModelFacts(
            layers=tuple(layers),
            modules=tuple(modules[index] for index in range(len(types))),
            layer_types=tuple(types),
            layer_kwargs=tuple(kwargs),
            trained_length=getattr(self.config, "max_position_embeddings", None),
            logits_of=find_head(self.model, self.config, hidden, logits),
            longrope=rope_type == "longrope",
            dynamic_rope=rope_type == "dynamic",
            ranks=ranks_of(self.model),
        )


def with_identity(kwargs: dict[str, Any]) -> dict[str, Any]:
    """An attention module's arguments with a rotation that changes nothing."""
    cos, sin = kwargs["position_embeddings"]
    return {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def _raw_queries(module: torch.nn.Module, watch: Watch) -> torch.Tensor | None:
    """Queries ``[H, n, D]`` of a module's last call without their rotation; None if it is not given any."""
    args, kwargs = watch.called.get(module, ((), {}))
    if not isinstance(kwargs.get("position_embeddings"), tuple):
        return None
    with watching(Watch(dispatch=True)) as again:
        module.forward(*args, **with_identity(kwargs))
    return again.seen[module][0][0] if module in again.seen else None


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where the model's input goes. Offloaded weights are on no device until they are used: their hooks move the input."""
    module = model.get_input_embeddings()
    weights: list[torch.device] = [t.device for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"]
    if weights:
        return weights[0]
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu") if device is None else torch.zeros((), device=device).device


def _frequencies(decoder: torch.nn.Module) -> list[tuple[torch.Tensor, float]]:
    """Every (inv_freq, factor) that a rotary module of the model holds."""
    found = []
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                prefix = name[: -len("inv_freq")]
                factor = getattr(module, f"{prefix}attention_scaling", getattr(module, "attention_scaling", 1.0))
                found.append((_loaded(module, name, buffer), float(factor)))
    return found


def _loaded(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A buffer's values, where they are offloaded."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return weights[name] if tensor.is_meta and weights is not None else tensor


def _rope_of(
    name: str, index: int, raw: torch.Tensor, rotated: torch.Tensor, frequencies: list[tuple[torch.Tensor, float]]
) -> LayerRope | None:
    try:
        return measure(raw, rotated, frequencies)
    except LookupError as err:
        raise UnsupportedModelError(f"{name}, layer {index}: {err}; its positions cannot be re-placed") from None


def _shared(rope: LayerRope | None, ropes: list[LayerRope]) -> LayerRope | None:
    """The first of ``ropes`` that is the same rotation, so that what a step knows of it is made once and not for every layer."""
    if rope is None:
        return None
    found = next((known for known in ropes if known.equals(rope)), None)
    if found is None:
        ropes.append(rope)
    return found or rope


def _rope_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    types = {str(p.get("rope_type", "default")) for p in kinds}
    return next((t for t in ("dynamic", "longrope") if t in types), "default")
