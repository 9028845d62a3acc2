"""The rows of the table: which rival, in which environment, with which weights, arithmetic and cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["NO_NLL", "RIVALS", "Row", "rows"]

RIVALS = ("kvsieve", "transformers", "quanto", "kvpress", "openvino", "llamacpp")
TORCH = ("kvsieve", "transformers", "quanto", "kvpress")

NO_NLL = "no interface gives the log-probability of a given token after an eviction"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        rival: one of `RIVALS`; kvsieve and transformers share an environment, `quanto` is transformers with optimum-quanto.
        name: what the table calls the cache.
        weights: how they are stored: ``F32``, ``BF16``, ``F16``, ``Q8_0`` or ``Q4_1``.
        compute: the dtype of activations.
        cache: the dtype of stored keys and values, in words.
        setting: what the worker needs to make it.
        bounded: whether it holds, or means to hold, no more than the budget.
        no_nll: why its interface gives no log-probabilities; empty where it does.
    """

    rival: str
    name: str
    weights: str
    compute: str
    cache: str
    setting: dict[str, Any] = field(default_factory=dict)
    bounded: bool = False
    no_nll: str = ""

    @property
    def key(self) -> str:
        """Names the row among all others."""
        return f"{self.rival} / {self.name} / {self.weights} / {self.compute} / {self.cache}"

    @property
    def worker(self) -> str:
        """The process that a row runs in: torch's rows share a model, an engine that is made for one cache is alone."""
        return f"{self.rival}-{self.weights}-{self.compute}" if self.rival in TORCH else self.key

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for the worker."""
        return {**asdict(self), "key": self.key}


def rows(budget: int, prompt: int) -> list[Row]:
    """All rows, those of float32 first. Budgets are tokens; kvpress takes ratios of the prompt, OpenVINO whole blocks of 32."""
    found = []
    for compute, weights in (("float32", "F32"), ("bfloat16", "BF16")):
        found += _torch(budget, prompt, compute, weights)
    return found + _few_bits(budget) + _openvino(budget) + _llamacpp(budget, prompt)


def _torch(budget: int, prompt: int, compute: str, weights: str) -> list[Row]:
    def row(rival: str, name: str, cache: str = compute, bounded: bool = False, **setting: Any) -> Row:
        return Row(rival, name, weights, compute, cache, setting, bounded)

    policies = {
        "Full()": (compute, False),
        f"StreamingLLM({budget})": (compute, True),
        f"SnapKV({budget})": (compute, True),
        f"H2O({budget})": (compute, True),
        f"SirLLM({budget})": (compute, True),
        f"Quest({budget})": (compute, False),
        f"SirLLM({budget}) | Quantized(4)": ("4 bits", True),
        "ThinK(0.5)": (f"{compute}, half of the key channels", False),
    }
    ratio = 1 - (budget + 0.5) / (prompt - 1)  # the context is read without its last token
    presses: dict[str, dict[str, Any]] = {
        "no press": {"press": None},
        "StreamingLLMPress": {"press": "StreamingLLMPress", "arguments": {"compression_ratio": ratio}},
        "SnapKVPress": {"press": "SnapKVPress", "arguments": {"compression_ratio": ratio}},
        "ObservedAttentionPress": {"press": "ObservedAttentionPress", "arguments": {"compression_ratio": ratio}, "eager": True},
        "ThinKPress(0.5)": {"press": "ThinKPress", "arguments": {"key_channel_compression_ratio": 0.5}},
        "DecodingPress(KnormPress), every 16 tokens": {
            "press": "DecodingPress",
            "base": "KnormPress",
            "arguments": {"compression_interval": 16, "target_size": budget},
        },
    }
    whole = ("no press", "ThinKPress(0.5)")
    stock = {
        "DynamicCache": (compute, "dynamic"),
        "StaticCache": (compute, "static"),
        "QuantizedCache, fp8": ("8 bits", "fp8"),
    }
    return [
        *(row("kvsieve", name, cache, bounded, policy=name.lower()) for name, (cache, bounded) in policies.items()),
        *(row("transformers", name, cache, make=make) for name, (cache, make) in stock.items()),
        row("quanto", "QuantizedCache, quanto", "4 bits", make="quanto"),
        *(row("kvpress", name, compute, name not in whole, **setting) for name, setting in presses.items()),
    ]


def _few_bits(budget: int) -> list[Row]:
    """kvsieve as it is fastest: the file's weights stay in 4 bits, and tokens come by compiled code."""
    policies = {"Full()": False, f"SirLLM({budget})": True}
    return [
        Row("kvsieve", f"{name}, compiled", "Q4_1", "float32", "float32", {"policy": name.lower()}, bounded)
        for name, bounded in policies.items()
    ]


def _openvino(budget: int) -> list[Row]:
    def row(name: str, weights: str, compute: str, cache: str, **eviction: Any) -> Row:
        why = NO_NLL if eviction else ""
        return Row("openvino", name, weights, compute, cache, {"eviction": eviction or None}, bool(eviction), why)

    area = {"start_size": 32, "recent_size": budget // 2, "max_cache_size": budget}
    sums, means = {**area, "mode": "SUM"}, {**area, "mode": "NORM_SUM"}
    return [
        row("full", "F16", "float32", "float32"),
        row("eviction, NORM_SUM", "F16", "float32", "float32", **means),
        row("full", "Q8_0", "float32", "8 bits"),
        row("full", "Q4_1", "float32", "8 bits"),
        row("eviction, SUM, no window (as H2O)", "Q4_1", "float32", "8 bits", **sums, window=0),
        row("eviction, NORM_SUM, window 8 (as SnapKV)", "Q4_1", "float32", "8 bits", **means),
        row("eviction, SUM, KVCrush", "Q4_1", "float32", "8 bits", **sums, crush=8),
        row("eviction, NORM_SUM, rotation", "Q4_1", "float32", "8 bits", **means, rotation=True),
        row("full", "Q4_1", "bfloat16", "8 bits"),
        row("eviction, NORM_SUM", "Q4_1", "bfloat16", "8 bits", **means),
    ]


def _llamacpp(budget: int, prompt: int) -> list[Row]:
    def row(name: str, weights: str, cache: str, context: int, shift: bool = False) -> Row:
        setting = {"type": {"float16": "F16"}.get(cache, cache.upper()), "context": context, "shift": shift}
        return Row("llamacpp", name, weights, "8 bits", cache, setting, shift)

    whole = 256 * -(-(prompt + 256) // 256)
    return [
        row("full", "Q4_1", "float16", whole),
        row("full", "Q4_1", "q8_0", whole),
        row("full", "Q4_1", "q4_0", whole),
        row(f"context of {budget}, context shift", "Q4_1", "float16", budget, shift=True),
    ]
