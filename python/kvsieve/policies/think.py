"""ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): thinner keys, by the channels that the prompt's queries make least use of.

Departures from the published code, and why:

* Pruned keys are stored as thin rows and read as such; the query is cut to the kept channels instead. The published fast path pads
  the rows back to their full width at every step, which frees nothing at the peak.
* Whole rotary pairs are dropped by default, which costs next to nothing and keeps every rule of placing legal;
  ``channels="single"`` is the paper's choice.
* One set of channels per KV head, by the summed energy of its group's queries. Keys are never repeated for query heads.
* The weights use the keys that will be pruned (``norm_over="all"`` also the recent ones, as published); of equal channels the lower
  one goes; pads are no keys.
* A further prompt is packed as well, with the channels that the first one chose; answers stay whole unless ``flush_every`` says
  otherwise.
* ``when="prefill"`` compresses a prompt piece by piece while it is read, which the paper does not: it prunes once, at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvsieve.roles import Memory, Thin

__all__ = ["ThinK"]


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
        flush_every: pack generated tokens too, so many at a time.
        skip_layers: layers whose keys stay whole.
        mode: ``"zero"`` stores zeros for what is dropped and saves nothing: for comparison with libraries that do.
        when: ``"prefill"`` to compress after each piece of a prompt, so that a long one never has all its keys whole. Then the last
            queries of its first piece choose the channels, for the whole text, and later pieces read compressed keys.

    Raises:
        PolicyError: for a ratio outside [0, 1), or counts that are not.

    >>> ThinK(0.5)
    ThinK(ratio=0.5)
    """
    pack = Thin(ratio, recent, observe, norm_over, channels, round_to, flush_every, tuple(skip_layers), mode, when)
    text = f"ThinK(ratio={ratio!r}"
    defaults = Thin()
    for name in ("recent", "observe", "norm_over", "channels", "round_to", "flush_every", "skip_layers", "mode", "when"):
        value = getattr(pack, name)
        text += "" if value == getattr(defaults, name) else f", {name}={value!r}"
    return Memory(pack=pack, text=text + ")")
