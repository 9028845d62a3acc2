"""CUDA graphs: a decoding step's forward as one launch.

What a step decides changes from step to step; what its forward launches does not. So the graph is captured once, and before each
replay the step is planned and uploaded to where the kernels look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvsieve._core import Step
    from kvsieve.backends.cuda.store import CudaStore

__all__ = ["CapturedForward", "record"]


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what ``run`` launches; the result launches it again. ``run`` may be called any number of times."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # whatever is made at first use is made outside the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class CapturedForward:
    """A forward over one token of every row, captured anew when a buffer that it has built in had to grow.

    Args:
        stores: of all layers; forward: launches everything, and writes its results where they were before.
    """

    def __init__(self, stores: Sequence[CudaStore], forward: Callable[[], None]) -> None:
        self._stores, self._forward = stores, forward
        self._step: Step | None = None
        self._replay: Callable[[], None] | None = None
        self._addresses: list[tuple[int, ...]] = []
        self.captures = 0
        """How often the forward was captured."""

    def run(self, step: Step) -> None:
        """The forward of ``step``."""
        self._step = step
        for store in self._stores:
            store.prepare(step)
        addresses = [store.addresses(step) for store in self._stores]
        if self._replay is None or addresses != self._addresses:
            self._replay = record(self._launch)
            self._addresses = addresses
            self.captures += 1
        self._replay()

    def _launch(self) -> None:
        assert self._step is not None
        for store in self._stores:
            store.forget_rotations(self._step)
        self._forward()
