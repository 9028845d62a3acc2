"""ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): keys without the channels that the prompt's queries make least use of.

Departures from the published code, and why:

* Pruned keys are stored with fewer channels and read as such; the query is cut to the kept channels instead. The published fast
  path pads the rows back to their full width at every step, which frees nothing at the peak.
* Whole rotary pairs are dropped by default, which costs next to nothing and keeps every rule of placing legal;
  ``channels="single"`` is the paper's choice.
* One set of channels per KV head, by the summed energy of its group's queries. Keys are never repeated for query heads.
* The weights use the keys that will be pruned (``norm_over="all"`` also the recent ones, as published); of equal channels the lower
  one goes; pads are no keys.
* A further prompt is compressed as well, with the channels that the first one chose; answers stay whole unless ``flush_every`` says
  otherwise.
* ``when="prefill"`` compresses a prompt piece by piece while it is read, which the paper does not: it prunes once, at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsieve.budget import check_choice, check_count
from kvsieve.checks import as_plain, plain_fields, real, told
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.storage import (
    WHEN,
    Channels,
    LayerShape,
    Packing,
    RotaryPairs,
    StorageObservation,
    StorageRule,
    in_order,
    pairs_of,
)

if TYPE_CHECKING:
    import torch

__all__ = ["ChannelPruned", "ThinK", "channel_scores", "heaviest_channels", "num_kept_channels"]

MOST_LAYERS = 2**16
"""No model has more."""


@dataclass(frozen=True)
class ChannelPruned(StorageRule):
    """Keys keep their heaviest channels (ThinK); see :func:`kvsieve.ThinK`."""

    ratio: float = 0.4
    recent: int = 32
    observe: int = 32
    norm_over: Literal["pruned", "all"] = "pruned"
    channels: Literal["pairs", "single"] = "pairs"
    round_to: int | None = None
    flush_every: int | None = None
    skip_layers: tuple[int, ...] = ()
    mode: Literal["slice", "zero"] = "slice"
    when: Literal["decode", "prefill"] = "decode"
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        ratio = real(self.ratio)
        if ratio is None or not 0.0 <= ratio < 1.0:
            raise PolicyError(f"ratio must lie in [0, 1), got {told(self.ratio)}")
        check_count("recent", self.recent)
        check_count("observe", self.observe, least=1)
        for name, value, allowed in (
            ("norm_over", self.norm_over, ("pruned", "all")),
            ("channels", self.channels, ("pairs", "single")),
            ("mode", self.mode, ("slice", "zero")),
            ("when", self.when, WHEN),
        ):
            check_choice(name, value, allowed)
        for name, count in (("round_to", self.round_to), ("flush_every", self.flush_every)):
            if count is not None:
                check_count(name, count, least=1)
        object.__setattr__(self, "skip_layers", _indices(self.skip_layers))
        for layer in self.skip_layers:
            check_count("skip_layers", layer)

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        return self.channels == "pairs"

    def packing(self, layer: LayerShape) -> Packing:
        whole = self.mode == "zero" or layer.index in self.skip_layers
        count = layer.key_dim if whole else num_kept_channels(layer.key_dim, self.ratio, self.channels, self.round_to)
        return Packing(count)

    def idle(self, layer: LayerShape) -> bool:
        return (
            layer.index in self.skip_layers
            or num_kept_channels(layer.key_dim, self.ratio, self.channels, self.round_to) == layer.key_dim
        )

    def choose_channels(self, seen: StorageObservation) -> Channels:
        if seen.layer.index in self.skip_layers:
            return Channels.all(seen.keys, seen.rope)
        count = num_kept_channels(seen.layer.key_dim, self.ratio, self.channels, self.round_to)
        keys = seen.keys if self.norm_over == "all" else seen.keys[:, : seen.count]
        chosen = heaviest_channels(seen.queries, keys, count, self.channels, seen.rope, pre_rope=seen.pre_rope)
        return chosen.with_zeros(seen.keys, seen.rope) if self.mode == "zero" else chosen


def _indices(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, tuple | list | range) or len(layers) > MOST_LAYERS:
        raise PolicyError(f"skip_layers must be a tuple of the indices of layers, got {told(layers)}")
    return tuple(layers)


@as_plain
def ThinK(
    ratio: float = 0.4,
    recent: int = 32,
    observe: int = 32,
    norm_over: Literal["pruned", "all"] = "pruned",
    channels: Literal["pairs", "single"] = "pairs",
    round_to: int | None = None,
    flush_every: int | None = None,
    skip_layers: Sequence[int] = (),
    mode: Literal["slice", "zero"] = "slice",
    when: Literal["decode", "prefill"] = "decode",
) -> Memory:
    """Drop the share ``ratio`` of the channels of all keys of a prompt but the newest; combine it with other policies by ``|``.

    By default a prompt is compressed once the first token is decoded after it, or its turn ends: its own attention is exact, and so
    is the first generated token. Until then its keys are whole, in however many pieces it is fed. Nothing is dropped until
    ``observe`` queries were seen and there are more than ``recent`` tokens.

    Args:
        ratio: share of key channels to drop, in [0, 1). What is saved of keys and values together is half of it, at most.
        recent: newest tokens whose keys stay whole.
        observe: how many of the prompt's last queries weigh the channels.
        norm_over: whether the keys' norms are taken over those that will be pruned or over all.
        channels: ``"pairs"`` to drop rotary pairs, ``"single"`` for single channels, which no rule that moves tokens can read.
        round_to: round the number of kept channels up to a multiple of this, for aligned rows.
        flush_every: compress generated tokens too, so many at a time.
        skip_layers: layers whose keys stay whole.
        mode: ``"zero"`` stores zeros for what is dropped and saves nothing: for comparison with libraries that do.
        when: ``"prefill"`` to compress after each piece of a prompt, so that a long one never has all its keys whole. Then the last
            queries of its first piece choose the channels, for the whole text, and later pieces read compressed keys.

    Raises:
        PolicyError: for a ratio outside [0, 1), or counts that are not.

    >>> ThinK(0.5)
    ThinK(ratio=0.5)
    """
    storage = ChannelPruned(
        ratio,
        recent,
        observe,
        norm_over,
        channels,
        round_to=round_to,
        flush_every=flush_every,
        skip_layers=_indices(skip_layers),
        mode=mode,
        when=when,
    )
    text = f"ThinK(ratio={ratio!r}"
    defaults = ChannelPruned()
    for name in ("recent", "observe", "norm_over", "channels", "round_to", "flush_every", "skip_layers", "mode", "when"):
        value = getattr(storage, name)
        text += "" if value == getattr(defaults, name) else f", {name}={value!r}"
    return Memory(storage=storage, text=text + ")")


def num_kept_channels(dim: int, ratio: float, channels: Literal["pairs", "single"] = "single", round_to: int | None = None) -> int:
    """How many of ``dim`` channels stay when the share ``ratio`` is dropped, rounded down to whole channels, or whole pairs.

    ``round_to`` rounds what stays up to a multiple, ``dim`` at most.

    >>> num_kept_channels(128, 0.4), num_kept_channels(128, 0.4, "pairs"), num_kept_channels(128, 0.4, round_to=8)
    (77, 78, 80)
    """
    size = 2 if channels == "pairs" else 1
    # In binary 0.3 * 10 is 2.9999..., which must not lose a channel.
    count = dim - size * int(ratio * (dim // size) + 1e-9)
    while round_to is not None and count < dim and count % round_to:
        count = min(count + size, dim)
    return count


def channel_scores(queries: torch.Tensor, keys: torch.Tensor, *, rotated_by: RotaryPairs | None = None) -> torch.Tensor:
    """Weight of each channel: float32 ``[Hkv, D]``, ``sum(q**2)`` over queries and the heads of a group times ``sum(k**2)``.

    Args:
        queries: ``[H, m, D]``; keys: ``[Hkv, n, D]``.
        rotated_by: where both were not rotated yet, their rotation. Each channel then gets its pair's mean energy, which does not
            depend on the angle: what the product is on average over positions.
    """
    group = queries.shape[0] // keys.shape[0]
    energy = [queries.float().square().sum(1).view(keys.shape[0], group, -1).sum(1), keys.float().square().sum(1)]
    if rotated_by is not None:
        a, b = pairs_of(rotated_by)
        for x in energy:
            mean = (x[:, a] + x[:, b]) / 2
            x[:, a], x[:, b] = mean, mean
    return energy[0] * energy[1]


def heaviest_channels(
    queries: torch.Tensor,
    keys: torch.Tensor,
    count: int,
    channels: Literal["pairs", "single"],
    rope: RotaryPairs | None,
    *,
    pre_rope: bool = False,
) -> Channels:
    """The ``count`` heaviest channels of each KV head, or as many in whole pairs; of equals, the higher channel stays.

    Args:
        queries: ``[H, m, D]``; keys: ``[Hkv, n, D]``, those that will lose channels.
        rope: says which channels are a pair; halves of the head where there is none.
        pre_rope: whether both are as they were before rotation.
    """
    import torch

    weight = channel_scores(queries, keys, rotated_by=rope if pre_rope else None).cpu()
    weight = torch.nan_to_num(weight, nan=torch.inf)
    dim = weight.shape[1]
    if channels == "single":
        drop = weight.argsort(dim=1, stable=True)[:, : dim - count]
        mask = torch.ones_like(weight, dtype=torch.bool).scatter_(1, drop, False)
        return in_order(mask, rope, whole_pairs=False)
    units = [torch.stack(pairs_of(rope), 1)] if rope is not None else []
    rest = torch.arange(0 if rope is None else rope.rotary_dim, dim)
    half = len(rest) // 2
    units.append(torch.stack([rest[:half], rest[half : 2 * half]], 1))
    pairs = torch.cat(units)
    drop = weight[:, pairs].sum(2).argsort(dim=1, stable=True)[:, : (dim - count) // 2]
    mask = torch.ones_like(weight, dtype=torch.bool)
    for row, gone in zip(mask, drop):
        row[pairs[gone].flatten()] = False
    return in_order(mask, rope, whole_pairs=True)
