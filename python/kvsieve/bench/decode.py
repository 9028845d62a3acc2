"""Whole tokens of a model of SmolLM2-135M's shape with random weights: the time a user feels.

transformers' full cache, ours (the same logits), and the bounded policies, with as many tokens seen. Beside them stands the
ceiling of whatever a cache can do at batch 1: a token reads all weights and all residents, so evicting every resident makes it
at most ``1 + KV bytes / weight bytes`` times as fast, as long as reading is what it waits for.

Bounded policies are held against the reference backend with the same residents. How much of a text they remember is not a
question for random weights; ``kvsieve demo`` answers it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import kvsieve
from kvsieve.bench.measure import Clock, Run, figure, interleaved, readers, steady
from kvsieve.bench.options import DTYPES, Options, Shape
from kvsieve.bench.report import Report
from kvsieve.errors import AccuracyError
from kvsieve.model.support import cache_name
from kvsieve.policy.compose import Policy

__all__ = ["BOUNDED", "BUDGET", "LAYERS", "SHAPE", "fill", "model", "past", "run", "stock_cache", "token"]

LAYERS, SHAPE, VOCABULARY = 30, Shape(9, 3, 64), 49152

BUDGET = 1024
"""Tokens that the bounded policies hold."""

BOUNDED: dict[str, Callable[[], Policy]] = {
    "StreamingLLM": lambda: kvsieve.StreamingLLM(BUDGET),
    "LMInfinite": lambda: kvsieve.LMInfinite(BUDGET - 4, sinks=4),
    "SirLLM": lambda: kvsieve.SirLLM(BUDGET),
}

LOGITS = 1e-4
"""How far logits may be off in float32, relative, in the Euclidean norm."""

SLACK = 1.25
"""Every layer rounds to 16 bits, so that right answers differ, and one may be so many times as far off as another."""

COLUMNS = (
    ("dtype", 5),
    ("seen", 6),
    ("read GB/s", 9),
    ("transformers", 20),
    ("Full()", 20),
    ("x", 5),
    *((name, width) for name in BOUNDED for name, width in ((name, max(len(name), 6)), ("x", 5))),
    ("ceiling", 7),
    ("error", 7),
    ("torch's", 7),
)


@functools.lru_cache(maxsize=1)
def model(dtype: torch.dtype) -> Any:
    """The model, in ``dtype``; the same weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SHAPE.heads * SHAPE.dim,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@functools.lru_cache(maxsize=1)
def wide(dtype: torch.dtype) -> Any:
    """The same weights, computing in float32."""
    if dtype == torch.float32:
        return model(dtype)
    return copy.deepcopy(model(dtype)).float()


@functools.lru_cache(maxsize=1)
def past(length: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values ``[Hkv, length, D]`` of every layer."""
    generator = torch.Generator().manual_seed(1)
    shape = (SHAPE.kv_heads, length, SHAPE.dim)

    def made() -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [(made(), made()) for _ in range(LAYERS)]


def stock_cache(config: Any, length: int, dtype: torch.dtype, computed: torch.dtype | None = None) -> Any:
    """transformers' full cache with :func:`past` of ``dtype`` in it, converted to ``computed``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for index, (k, v) in enumerate(past(length, dtype)):
        cache.update(k[None].to(computed or dtype), v[None].to(computed or dtype), index)
    return cache


def fill(stream: kvsieve.Stream, positions: list[int], seen: int, dtype: torch.dtype, computed: torch.dtype | None = None) -> None:
    """Puts ``len(positions)`` tokens of :func:`past`, converted to ``computed``, into a stream as if it had seen ``seen``."""
    engine = stream._engine
    engine.begin_at(seen, [(seen, [(positions, [float(p % 97) for p in positions])])])
    for index, (k, v) in enumerate(past(len(positions), dtype)):
        k, v = k.to(computed or dtype), v.to(computed or dtype)
        store = engine.stores[index] = engine.backend.make_store(k[None], v[None])
        store.write(engine.planner.runs(0, 0), k, v)


def token(made: Any, cache: Any) -> torch.Tensor:
    """One token's forward: logits ``[1, 1, V]``."""
    with torch.no_grad():
        logits: torch.Tensor = made(torch.tensor([[7]]), **{cache_name(made): cache}).logits
    return logits


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def slowly(made: Any, policy: Policy, length: int, kind: torch.dtype) -> torch.Tensor:
    """The same token by the reference backend, on the same residents."""
    with kvsieve.stream(made, policy, backend="reference") as stream:
        fill(stream, held(length), length, kind, made.dtype)
        return token(made, stream.cache)


def same(what: str, dtype: str, got: torch.Tensor, exact: torch.Tensor, others: float) -> float:
    """The error of ``got``, if it is what rounding in ``dtype`` explains: in 16 bits another right answer is off by ``others``.

    Raises:
        AccuracyError: if it is not.
    """
    error = off(got, exact)
    if not error <= (LOGITS if dtype == "f32" else SLACK * others):
        raise AccuracyError(f"{what}: logits are {error:.1e} off float32, another right answer {others:.1e}; nothing was timed")
    return error


def held(seen: int) -> list[int]:
    """What a bounded policy holds after ``seen`` tokens: four sinks and the newest."""
    return list(range(seen)) if seen < BUDGET else [0, 1, 2, 3, *range(seen - BUDGET + 5, seen)]


def run(options: Options, report: Report) -> None:
    """Measures every case of ``options``."""
    report.note(
        "x: times as fast as transformers' full cache; ceiling: 1 + KV bytes / weight bytes, of what eviction gains over Full()"
    )
    report.head(*COLUMNS)
    with steady(options.threads) as clock:
        for dtype in options.dtypes:
            kind = getattr(torch, DTYPES[dtype])
            for length in options.lengths:
                kv = LAYERS * SHAPE.token_bytes(kind.itemsize) * length
                exact = 0 if dtype == "f32" else 2 * kv + (1 << 30)
                if not report.skip(f"{dtype} {length}", 3 * kv + exact + (2 << 30)):
                    with ExitStack() as streams:
                        measure(dtype, kind, length, options.rounds, clock, report, streams)
                past.cache_clear()
            wide.cache_clear()
    model.cache_clear()


def measure(dtype: str, kind: torch.dtype, length: int, rounds: int, clock: Clock, report: Report, streams: ExitStack) -> None:
    """One row: compares all logits, then measures."""
    what, made = f"decode {dtype} {length}", model(kind)
    theirs = stock_cache(made.config, length, kind)
    runs: dict[str, Run] = {"transformers": lambda: token(made, theirs)}
    stock = token(made, theirs)
    exact = stock if dtype == "f32" else token(wide(kind), stock_cache(made.config, length, kind, torch.float32))
    errors = {"transformers": off(stock, exact)}

    def opened(policy: Policy, positions: list[int]) -> kvsieve.Stream:
        stream = streams.enter_context(kvsieve.stream(made, policy, backend="cpu"))
        fill(stream, positions, length, kind)
        return stream

    full = opened(kvsieve.Full(), list(range(length)))
    errors["Full"] = same(f"{what}, Full()", dtype, token(made, full.cache), exact, errors["transformers"])
    runs["Full"] = lambda: token(made, full.cache)
    resident: dict[str, int] = {}
    for name, policy in BOUNDED.items():
        stream = opened(policy(), held(length))
        got, want, reference = token(made, stream.cache), *(slowly(m, policy(), length, kind) for m in (wide(kind), made))
        errors[name] = same(f"{what}, {name}", dtype, got, want, off(reference, want))
        resident[name] = stream.stats().resident
        runs[name] = lambda cache=stream.cache: token(made, cache)  # type: ignore[misc]
    past.cache_clear()
    bytes_read, yardsticks = readers()
    # A token changes what the next one sees: nothing is repeated.
    times = interleaved({**yardsticks, **runs}, rounds, clock=clock, repeat=False)
    read = bytes_read / min(times[name].median for name in yardsticks)
    weights = sum(p.nbytes for p in made.parameters())
    kv = LAYERS * SHAPE.token_bytes(kind.itemsize) * length
    ratios = {name: times["transformers"].median / times[name].median for name in ("Full", *BOUNDED)}
    cells = [dtype, str(length), f"{read / 1e9:.1f}", str(times["transformers"]), str(times["Full"]), f"{ratios['Full']:.2f}"]
    for name in BOUNDED:
        cells += [figure(times[name].median), f"{ratios[name]:.2f}"]
    cells += [f"{1 + kv / weights:.2f}", f"{errors['Full']:.0e}", f"{errors['transformers']:.0e}"]
    report.row(
        cells,
        dtype=dtype,
        length=length,
        weight_bytes=weights,
        kv_bytes=kv,
        ceiling=round(1 + kv / weights, 4),
        read_gb_per_s=round(read / 1e9, 3),
        times_as_fast=ratios,
        budget=BUDGET,
        resident=resident,
        errors=errors,
        times={name: time.as_dict() for name, time in times.items()},
    )
