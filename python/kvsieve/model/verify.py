"""The check when a stream opens: a few tokens under a stream give what they give without one.

A release of transformers that renames an argument, no longer asks the cache, or looks attention up in another way fails here, with
both versions named, and not at a user's first token. The tokens are read in the same pieces by both, so that a model whose numbers
depend on how they are read together (dynamically quantized activations) agrees as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvsieve.errors import UnsupportedModelError
from kvsieve.model.handoff import Watch
from kvsieve.model.probe import PIECES, Probe
from kvsieve.model.support import versions

if TYPE_CHECKING:
    from kvsieve.facts import ModelFacts

__all__ = ["verify"]

_TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 0.1}
_QUANTIZED = 0.05
"""Rounding may take another step where weights or activations are integers."""


def verify(probe: Probe, facts: ModelFacts) -> None:
    """Read the probe's tokens through a stream that keeps everything, and compare with the stock model's logits.

    Raises:
        UnsupportedModelError: if they differ, or the stream's cache did not see them; names both versions and the supported range.
    """
    from kvsieve import backends
    from kvsieve.methods.registry import Full
    from kvsieve.model.cache import StreamCache
    from kvsieve.runtime.engine import Engine

    policy = Full()
    cache = StreamCache(Engine(policy, facts, backends.get("reference"), policy.stored_keys))
    try:
        got, watch = probe.pieces(cache, dispatch=True)
    except Exception as err:
        raise UnsupportedModelError(
            f"{probe.name} fails under a stream ({type(err).__name__}: {str(err)[:200]}); {versions()}"
        ) from err
    finally:
        seen = cache.engine.columns
        cache.reset()
    if seen != PIECES[-1][1]:
        raise UnsupportedModelError(
            f"{probe.name} ran {PIECES[-1][1]} tokens, but the stream's cache saw {seen}, so no stream can open on it; {versions()}"
        )
    error, tolerance = _distance(probe.stock, got), _tolerance(probe)
    if error > tolerance and _may_differ(probe):
        error, tolerance = _without_rounding(probe, facts.layers[0].module, watch, error, tolerance)
    if error > tolerance:
        raise UnsupportedModelError(
            f"{probe.name} does not answer under a stream as it does without one (off by {error:.2g} of the size of its numbers), "
            f"so no stream can open on it; {versions()}"
        )


def _may_differ(probe: Probe) -> bool:
    """Whether numbers are so coarse that a rounding alone may lead far away."""
    return probe.stock is not None and (probe.stock.dtype.itemsize < 4 or _is_quantized(probe.model))


def _without_rounding(probe: Probe, module: torch.nn.Module, watch: Watch, error: float, tolerance: float) -> tuple[float, float]:
    """A second look at coarse numbers: an error and how large it may be.

    An expert chosen the other way because of a rounding is a different answer, and a right one; so is a large activation that is
    rounded to the next of 8 bits. Of such a model the first layer's attention is compared, before any choice. Of any other one the
    stock model's own error is the measure, between the text read in pieces and read at once.
    """
    if _chooses(probe.decoder):
        _, stock = probe.pieces(probe.stock_cache(), dispatch=True)
        want, got = (torch.cat(w.answers[module], 1) for w in (stock, watch))
        return _distance(want, got), tolerance
    return error, tolerance + 4 * _distance(probe.stock, probe.forward(PIECES[0][0], PIECES[-1][1]))


def _distance(want: torch.Tensor | None, got: torch.Tensor) -> float:
    """How far apart two tensors are, as a share of their size; what is not finite in the stock one is left out."""
    assert want is not None
    known = want.isfinite()
    if not bool(known.any()):
        return 0.0
    want, got = want[known].double(), got[known].double()
    return float((want - got).norm() / want.norm().clamp_min(1e-12))


def _tolerance(probe: Probe) -> float:
    assert probe.stock is not None
    return _TOLERANCE.get(probe.stock.dtype, 0.1) + (_QUANTIZED if _is_quantized(probe.model) else 0.0)


def _is_quantized(model: torch.nn.Module) -> bool:
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    plain = (torch.nn.Parameter, torch.Tensor)
    return any(
        "quantized" in type(module).__module__ or any(p is not None and type(p) not in plain for p in module._parameters.values())
        for module in model.modules()
    )


def _chooses(decoder: torch.nn.Module) -> bool:
    """Whether it has experts, or layers that round activations to few bits."""
    return any(
        getattr(module, "rounds_activations", False)
        or any(word in type(module).__name__.lower() for word in ("expert", "moe", "router"))
        for module in decoder.modules()
    )
