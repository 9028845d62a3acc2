"""Keys and values in a few bits, after KIVI (Liu et al., ICML 2024, arXiv 2402.02750).

Keys are grouped by channel over tokens, because a few channels carry large numbers in all of them; values by token over channels.

Departures from the published code, and why:

* Zero points are rounded down and scales to the nearest float16, so that every number is within half a scale of what is stored.
* A group with a number that is not finite becomes NaN, so that it is seen.
* Where a score-based policy moves tokens together, keys that come to share a scale with others are coded again: up to half a scale
  more each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvsieve.budget import check_choice, check_count
from kvsieve.checks import as_plain, plain_fields, told
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.storage import WHEN, LayerShape, Packing, StorageRule

__all__ = ["Quantized", "QuantizedStorage"]


@dataclass(frozen=True)
class QuantizedStorage(StorageRule):
    """Keys and values as codes of a few bits (KIVI); see :func:`kvsieve.Quantized`."""

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    residual: int = 32
    when: Literal["decode", "prefill"] = "decode"
    quantizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        check_choice("when", self.when, WHEN)
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if type(bits) is not int or bits not in (0, 2, 4, 8):
                raise PolicyError(f"{name} must be 2, 4 or 8 (or 0 to leave them as they are), got {told(bits)}")
        if type(self.group) is not int or self.group not in (8, 16, 32, 64):
            raise PolicyError(f"group must be 8, 16, 32 or 64, got {told(self.group)}")
        check_count("residual", self.residual)

    @property
    def recent(self) -> int:  # type: ignore[override]
        return self.residual

    @property
    def align(self) -> int:  # type: ignore[override]
        return self.group if self.key_bits else 1

    @property
    def flush_every(self) -> int:  # type: ignore[override]
        return self.group

    def packing(self, layer: LayerShape) -> Packing:
        if self.value_bits and layer.value_dim % self.group:
            raise PolicyError(
                f"layer {layer.index} has values of {layer.value_dim} channels, which groups of {self.group} do not divide; "
                "choose another group"
            )
        return Packing(layer.key_dim, self.key_bits, self.value_bits, self.group)


@as_plain
def Quantized(
    bits: int | None = None,
    group: int = 32,
    residual: int = 32,
    key_bits: int | None = None,
    value_bits: int | None = None,
    when: Literal["decode", "prefill"] = "decode",
) -> Memory:
    """Store all but the newest tokens as codes of ``bits`` bits; combine it with other policies by ``|``.

    Codes are read where they lie; there is never a full copy. A prompt is quantized in multiples of ``group`` tokens, by default
    once the first token is decoded after it or its turn ends, and generated tokens as each group fills.

    Args:
        bits: 2, 4 or 8 for keys and values; 4 by default.
        group: numbers that share a scale and a zero point (float16 each): 8, 16, 32 or 64. It must divide the channels of a value.
        residual: newest tokens that stay as they came.
        key_bits, value_bits: the same for keys or for values alone; 0 leaves them as they are.
        when: ``"prefill"`` to quantize after each piece of a prompt, so that a long one is never held in full; later pieces then
            read codes.

    Raises:
        PolicyError: for another number of bits or group; when a stream opens, if the group does not divide the values.

    >>> Quantized(4)
    Quantized(bits=4)
    """
    bits = 4 if bits is None else bits
    if type(bits) is not int or bits not in (0, 2, 4, 8):
        raise PolicyError(f"bits must be 2, 4 or 8, got {told(bits)}")
    storage = QuantizedStorage(
        bits if key_bits is None else key_bits, bits if value_bits is None else value_bits, group, residual, when
    )
    text = f"Quantized(bits={bits}"
    given = (
        ("group", group, 32),
        ("residual", residual, 32),
        ("key_bits", key_bits, None),
        ("value_bits", value_bits, None),
        ("when", when, "decode"),
    )
    text += "".join(f", {name}={value!r}" for name, value, default in given if value != default)
    return Memory(storage=storage, text=text + ")")
