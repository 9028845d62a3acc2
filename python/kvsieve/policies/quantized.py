"""Keys and values in a few bits, after KIVI (Liu et al., ICML 2024, arXiv 2402.02750).

Keys are grouped by channel over tokens, because a few channels carry large numbers in all of them; values by token over channels.

Departures from the published code, and why:

* Least values are rounded down and steps to the nearest float16, so that every number is within half a step of what is stored.
* A group with a number that is not finite becomes NaN, so that it is seen.
* Where a score-based policy moves tokens together, keys that come to share a scale with others are coded again: up to half a step
  more each time.
"""

from __future__ import annotations

from typing import Literal

from kvsieve.roles import Codes, Memory

__all__ = ["Quantized"]


def Quantized(
    bits: int | None = None,
    group: int = 32,
    residual: int = 32,
    key_bits: int | None = None,
    value_bits: int | None = None,
    when: Literal["decode", "prefill"] = "decode",
) -> Memory:
    """Store settled tokens as codes of ``bits`` bits; combine it with other policies by ``|``.

    Codes are read where they lie; there is never a full copy. A prompt is packed in multiples of ``group`` tokens, by default once
    the first token is decoded after it or its turn ends, and generated tokens as each group fills.

    Args:
        bits: 2, 4 or 8 for keys and values; 4 by default.
        group: numbers that share a step and a least value (float16 each): 8, 16, 32 or 64. It must divide the channels of a value.
        residual: newest tokens that stay as they came.
        key_bits, value_bits: the same for keys or for values alone; 0 leaves them as they are.
        when: ``"prefill"`` to pack after each piece of a prompt, so that a long one is never held in full; later pieces then read
            codes.

    Raises:
        PolicyError: for another number of bits or group; when a stream opens, if the group does not divide the values.

    >>> Quantized(4)
    Quantized(bits=4)
    """
    bits = 4 if bits is None else bits
    pack = Codes(bits if key_bits is None else key_bits, bits if value_bits is None else value_bits, group, residual, when)
    text = f"Quantized(bits={bits}"
    given = (
        ("group", group, 32),
        ("residual", residual, 32),
        ("key_bits", key_bits, None),
        ("value_bits", value_bits, None),
        ("when", when, "decode"),
    )
    text += "".join(f", {name}={value!r}" for name, value, default in given if value != default)
    return Memory(pack=pack, text=text + ")")
