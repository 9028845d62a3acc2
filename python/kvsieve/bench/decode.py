"""Whole tokens of a model: the time a user feels. Unless one is named, it has SmolLM2-135M's shape and random weights.

transformers' caches, ours (the same logits), and the bounded policies, with as many tokens seen. Beside them stand three limits:

* the time of a token that attends to itself alone. If attention cost nothing, a token of transformers' full cache would be so
  many times as fast (Amdahl's law), and no cache can do better;
* reading weights, keys and values once at the read bandwidth of the moment, which is the least that a full cache takes;
* what eviction can gain over ``Full()`` at batch 1: a token reads all weights and all residents, so evicting every resident makes
  it at most ``1 + KV bytes / weight bytes`` times as fast, as long as reading is what it waits for.

Bounded policies are held against the reference backend with the same residents, transformers' `QuantizedCache` against nothing:
it is not exact, and its error is printed. How much of a text they remember is not a
question for random weights; ``kvsieve demo`` answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

import kvsieve
from kvsieve.bench.caches import RIVALS, STOCK, cache_bytes, make_cache
from kvsieve.bench.measure import Clock, Run, figure, interleaved, readers, steady
from kvsieve.bench.options import DTYPES, MOST_ROUNDS, RANDOM, Options
from kvsieve.bench.report import Report, Row, middle, spread, timings
from kvsieve.bench.subject import Layers, Pair, layers_of, load, model, past, token, unrotated, weight_bytes, wide
from kvsieve.errors import AccuracyError
from kvsieve.policy.compose import Policy

__all__ = ["BOUNDED", "BUDGET", "fill", "run", "stock_cache"]

ALONE = "alone"
"""A token that attends to itself only."""

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
    ("DynamicCache", 20),
    ("static x", 8),
    ("quant. x", 8),
    ("Full()", 20),
    ("x", 5),
    *((name, width) for name in BOUNDED for name, width in ((name, max(len(name), 6)), ("x", 5))),
    ("alone", 6),
    ("bound x", 7),
    ("least", 6),
    ("ceiling", 7),
    ("error", 7),
    ("torch's", 7),
)

QUANTIZED = 0.05
"""Most error of logits where activations are rounded to 8 bits: a rounding elsewhere moves some of them by a step."""

ROOM = MOST_ROUNDS + 14
"""Tokens for which a static cache has room beside those that were seen."""


def filled(cache: Any, pairs: Sequence[Pair], computed: torch.dtype | None = None) -> Any:
    """A cache of transformers with keys and values ``[Hkv, n, D]`` of every layer in it, converted to ``computed``."""
    for index, (k, v) in enumerate(pairs):
        cache.update(k[None].to(computed or k.dtype), v[None].to(computed or v.dtype), index)
    return cache


def stock_cache(config: Any, length: int, dtype: torch.dtype, computed: torch.dtype | None = None) -> Any:
    """transformers' full cache with :func:`past` of ``dtype`` in it, converted to ``computed``."""
    return filled(make_cache(STOCK, config, length), past(length, dtype), computed)


def fill(stream: kvsieve.Stream, positions: list[int], seen: int, dtype: torch.dtype, computed: torch.dtype | None = None) -> None:
    """Puts ``len(positions)`` tokens of :func:`past`, converted to ``computed``, into a stream as if it had seen ``seen``."""
    put(stream, positions, seen, past(len(positions), dtype), computed)


def put(
    stream: kvsieve.Stream, positions: list[int], seen: int, pairs: Sequence[Pair], computed: torch.dtype | None = None
) -> None:
    """Puts keys and values ``[Hkv, len(positions), D]`` of every layer into a stream, as the tokens at ``positions``."""
    engine = stream._engine
    engine.begin_at(seen, [(seen, [(positions, [float(p % 97) for p in positions])])])
    for index, (k, v) in enumerate(pairs):
        k, v = k.to(computed or k.dtype), v.to(computed or v.dtype)
        store = engine.stores[index] = engine.backend.make_store(k[None], v[None])
        store.write(engine.planner.runs(0, 0), k, v)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def same(what: str, got: torch.Tensor, exact: torch.Tensor, most: float) -> float:
    """The error of ``got``, if it is at most ``most``.

    Raises:
        AccuracyError: if it is not.
    """
    error = off(got, exact)
    if not error <= most:
        raise AccuracyError(f"{what}: logits are {error:.1e} off float32, rounding explains {most:.1e}; nothing was timed")
    return error


def held(seen: int) -> list[int]:
    """What a bounded policy holds after ``seen`` tokens: four sinks and the newest."""
    return list(range(seen)) if seen < BUDGET else [0, 1, 2, 3, *range(seen - BUDGET + 5, seen)]


def run(options: Options, report: Report) -> None:
    """Measures every case of ``options``."""
    report.note(
        "x: times as fast as transformers' DynamicCache; alone: a token that attends to itself only; bound: what a token could "
        "gain if attention cost nothing; least: reading weights, keys and values once; ceiling: 1 + KV bytes / weight bytes"
    )
    if options.compiled:
        report.note("streams decode by compiled code (kvsieve.compile); transformers' caches and alone do not")
    report.head(cells, *COLUMNS)
    with steady(options.threads) as clock:
        for dtype in options.dtypes:
            kind = getattr(torch, DTYPES[dtype])
            for length in options.lengths:
                if report.known(dtype=dtype, length=length):
                    continue
                layers = layers_of(model(kind, options.model, options.weights))
                kv, weights = layers.token_bytes(kind.itemsize) * length, weight_bytes(model(kind, options.model, options.weights))
                exact = 0 if dtype == "f32" else 2 * kv + 3 * weights
                if not report.skip(f"{dtype} {length}", 5 * kv + exact + weights + (2 << 30)):
                    with ExitStack() as streams:
                        Case(options, dtype, length, layers, streams).measure(clock, report)
                past.cache_clear()
            wide.cache_clear()
    load.cache_clear()


class Case:
    """One row: a model, and every cache with ``length`` tokens in it."""

    def __init__(self, options: Options, dtype: str, length: int, layers: Layers, streams: ExitStack) -> None:
        self.dtype, self.length, self.layers, self.streams = dtype, length, layers, streams
        self.rounds, self.kind = options.rounds, getattr(torch, DTYPES[dtype])
        named = (options.model, options.weights)
        self.made, self.wide = model(self.kind, *named), wide(self.kind, *named)
        self.runs: dict[str, Run] = {}
        self.errors: dict[str, float] = {}
        self.held: dict[str, int] = {}
        self.pairs = past(length, self.kind, layers, *named)
        self.text, self.weights, self.compiled = options.model != RANDOM, options.weights, options.compiled

    def rivals(self, report: Report) -> torch.Tensor:
        """Fills transformers' caches, and adds them to what is timed; gives the logits in float32."""
        config = self.made.config
        theirs = filled(make_cache(STOCK, config, self.length), self.pairs)
        stock = token(self.made, theirs)
        exact = stock
        if self.dtype != "f32":
            exact = token(self.wide, filled(make_cache(STOCK, config, self.length), self.pairs, torch.float32))
        self.errors[STOCK] = off(stock, exact)
        self.add(STOCK, theirs)
        for name in RIVALS:
            if name == STOCK:
                continue
            try:
                cache = filled(make_cache(name, config, self.length + ROOM), self.pairs)
            except NotImplementedError as error:
                report.note(f"{self.dtype} {self.length} {name}: left out ({error})")
                continue
            got = token(self.made, cache)
            what = f"decode {self.dtype} {self.length}, {name}"
            exactly = name == "StaticCache"
            self.errors[name] = same(what, got, exact, self.most(self.errors[STOCK])) if exactly else off(got, exact)
            self.add(name, cache)
        self.runs[ALONE] = lambda: token(self.made, None)
        return exact

    def most(self, others: float) -> float:
        """What rounding explains: in 16 bits another right answer is off by ``others``."""
        if self.weights is not None:
            return QUANTIZED
        return LOGITS if self.dtype == "f32" else SLACK * others

    def add(self, name: str, cache: Any) -> None:
        self.runs[name] = lambda: token(self.made, cache)
        self.held[name] = cache_bytes(cache)

    def opened(self, policy: Policy, positions: list[int]) -> kvsieve.Stream:
        """A stream that has seen the row's tokens and holds ``positions``."""
        stream = self.streams.enter_context(kvsieve.stream(self.made, policy, backend="cpu"))
        self.put(stream, positions)
        return stream

    def put(self, stream: kvsieve.Stream, positions: list[int]) -> None:
        """The row's keys and values at ``positions``, as the stream stores them."""
        engine, dtype = stream._engine, stream.model.dtype
        if self.text and engine.stored_keys == "pre_rope":
            ropes = [layer.rope for layer in engine.facts.layers]
            pairs = [(unrotated(k[:, positions], positions, r), v[:, positions]) for (k, v), r in zip(self.pairs, ropes)]
        else:
            pairs = [(k[:, positions], v[:, positions]) for k, v in self.pairs]
        put(stream, positions, self.length, pairs, dtype)

    def slowly(self, made: Any, policy: Policy) -> torch.Tensor:
        """The same token by the reference backend, on the same residents."""
        with kvsieve.stream(made, policy, backend="reference") as stream:
            self.put(stream, held(self.length))
            return token(made, stream.cache)

    def ours(self, exact: torch.Tensor) -> dict[str, int]:
        """Opens the streams, compares their logits, and adds them to what is timed; gives the tokens that each holds."""
        what = f"decode {self.dtype} {self.length}"
        full = self.opened(kvsieve.Full(), list(range(self.length)))
        self.errors["Full"] = same(f"{what}, Full()", token(self.made, full.cache), exact, self.most(self.errors[STOCK]))
        opened, resident = {"Full": full}, {}
        for name, policy in BOUNDED.items():
            stream = opened[name] = self.opened(policy(), held(self.length))
            got, want, reference = token(self.made, stream.cache), *(self.slowly(m, policy()) for m in (self.wide, self.made))
            self.errors[name] = same(f"{what}, {name}", got, want, self.most(off(reference, want)))
            resident[name] = stream.stats().resident
        for name, stream in opened.items():
            self.held[name] = stream.stats().bytes_held
            self.runs[name] = lambda cache=stream.cache: token(self.made, cache)  # type: ignore[misc]
        return resident

    def measure(self, clock: Clock, report: Report) -> None:
        """Compares all logits, then measures."""
        exact = self.rivals(report)
        if self.compiled:
            kvsieve.compile(self.made)
            self.streams.callback(kvsieve.compile, self.made, disable=True)
        resident = self.ours(exact)
        self.pairs = []
        past.cache_clear()
        bytes_read, yardsticks = readers()
        # A token changes what the next one sees: nothing is repeated.
        times = interleaved({**yardsticks, **self.runs}, self.rounds, clock=clock, repeat=False)
        read = bytes_read / min(times[name].median for name in yardsticks)
        weights, kv = weight_bytes(self.made), self.layers.token_bytes(self.kind.itemsize) * self.length
        least = (weights + kv) / read
        report.row(
            dtype=self.dtype,
            length=self.length,
            weight_bytes=weights,
            kv_bytes=kv,
            ceiling=round(1 + kv / weights, 4),
            read_gb_per_s=round(read / 1e9, 3),
            least_ms=round(least * 1e3, 4),
            of_least=round(least / times["Full"].median, 4),
            amdahl=round(times[STOCK].median / times[ALONE].median, 4),
            times_as_fast={name: round(times[STOCK].median / times[name].median, 4) for name in self.runs if name != STOCK},
            budget=BUDGET,
            resident=resident,
            bytes_held=self.held,
            errors=self.errors,
            times=timings(times),
        )


def cells(row: Row) -> list[str]:
    """The row, as it is printed."""
    times, fast = row["times"], row["times_as_fast"]
    made = [row["dtype"], str(row["length"]), f"{row['read_gb_per_s']:.1f}", spread(times[STOCK])]
    made += [f"{fast[name]:.2f}" if name in fast else "none" for name in RIVALS if name != STOCK]
    made += [spread(times["Full"]), f"{fast['Full']:.2f}"]
    for name in BOUNDED:
        made += [middle(times[name]), f"{fast[name]:.2f}"]
    made += [middle(times[ALONE]), f"{row['amdahl']:.2f}", figure(row["least_ms"] / 1e3), f"{row['ceiling']:.2f}"]
    return [*made, f"{row['errors']['Full']:.0e}", f"{row['errors'][STOCK]:.0e}"]
