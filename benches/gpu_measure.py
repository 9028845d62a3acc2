"""What the sections of `gpu.py` share: the device, the sizes, how to time, stores of a layer's shape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Bench", "Dense", "caught", "rope"]


class Bench:
    """The device, the sizes, and how to time."""

    def __init__(self, dry: bool, seconds: float) -> None:
        import torch

        self.dry, self.end = dry, time.monotonic() + seconds
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self.lengths = [200, 500] if dry else [8 << 10, 32 << 10, 128 << 10, 1 << 20]
        self.heads, self.kv_heads, self.dim = (4, 2, 16) if dry else (32, 8, 128)
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.beyond_cache = 0 if dry else 256 << 20
        self.budget = 128 if dry else 4096

    @property
    def left(self) -> float:
        """Seconds until the whole must be over."""
        return self.end - time.monotonic()

    def microseconds(self, run: Callable[[int], Any], inner: int = 8, rounds: int = 7) -> dict[str, float]:
        """Median, least and most time of one ``run(i)`` on the GPU, without launches: ``inner`` of them are one captured graph."""
        import torch

        if self.dry:
            run(0)
            return {"us": 1.0, "least": 1.0, "most": 1.0}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(2):
                run(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [run(i) for i in range(inner)]
        times = []
        for _ in range(rounds + 2):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / inner)
        del kept, graph
        times = times[2:]
        return {"us": statistics.median(times), "least": min(times), "most": max(times)}

    def wall(self, run: Callable[[], Any], count: int) -> float:
        """Microseconds of one ``run()`` by the wall clock, the GPU waited for at the end."""
        import torch

        count = 2 if self.dry else count
        for _ in range(min(count, 3)):
            run()
        if not self.dry:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        if not self.dry:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count * 1e6


def rope(dim: int) -> Any:
    import torch
    from kvsieve.facts import LayerRope

    return LayerRope(500000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), "half")


class Dense:
    """Stores of one layer's shape with ``length`` tokens resident, enough of them to be larger than the GPU's cache."""

    def __init__(self, b: Bench, length: int, raw: bool) -> None:
        import kvsieve
        import torch
        from kvsieve import backends
        from kvsieve.backends.base import AttendCall
        from kvsieve.policy.specs import make_planner

        policy = kvsieve.SirLLM(length + 1, sinks=4, recent=8) if raw else kvsieve.Full()
        self.backend, self.length = backends.get("cuda"), length
        self.planner = make_planner(policy.specs(1), "pre_rope" if raw else "post_rope")
        self.planner.restore(length, [(length, [(list(range(length)), [0.0] * length)])])
        self.bytes = 2 * length * b.kv_heads * b.dim * b.dtype.itemsize
        self.q = torch.randn(1, b.heads, 1, b.dim, device=b.device).to(b.dtype)
        self.k, self.v = (torch.randn(1, b.kv_heads, 1, b.dim, device=b.device).to(b.dtype) for _ in "kv")
        self.call = AttendCall(b.dim**-0.5, rope=rope(b.dim) if raw else None)
        blocks = sorted({block for block, _, _ in self.planner.runs(0, 0)})
        self.step = self.planner.begin([1], 1, True, False)
        self.stores = [self.backend.make_store(self.k, self.v) for _ in range(max(1, math.ceil(b.beyond_cache / self.bytes)))]
        for store in self.stores:
            store.plain.reserve(blocks)
            for slab in store.plain.slabs.values():
                for x in slab:
                    x.normal_()
            self.out = store.run(self.q, self.k, self.v, self.step, self.call)
        self.planner.commit()
        self.runs = self.planner.runs(0, 0)

    def attend(self, i: int) -> Any:
        store = self.stores[i % len(self.stores)]
        return store.attend_spans(self.q, self.backend.context.plan(self.step, store.device), self.call)[0]


@contextmanager
def caught(row: dict[str, Any], name: str) -> Iterator[None]:
    """One measurement that fails does not lose the others."""
    try:
        yield
    except Exception as err:
        row[name] = {"error": f"{type(err).__name__}: {err}"[:2000]}
