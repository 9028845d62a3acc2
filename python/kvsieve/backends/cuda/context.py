"""What the layers of a stream share on a device: the step's plan, uploaded moves, rotations."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsieve.backends.attention import Partial
from kvsieve.backends.cuda.buffers import StepBuffer, round_up, upload
from kvsieve.backends.cuda.ops.rotations import Rotations
from kvsieve.backends.cuda.plan import Plan
from kvsieve.budget import BLOCK

if TYPE_CHECKING:
    from kvsieve._core import Moves, Step
    from kvsieve.facts import LayerRope

__all__ = ["Context"]


class _Local(threading.local):
    """What one thread's forward has planned: a fork on another thread must not overwrite it."""

    def __init__(self) -> None:
        self.plans: dict[torch.device, Plan] = {}
        self.buffers: dict[tuple[Any, ...], StepBuffer] = {}
        self.moves: tuple[Moves, dict[torch.device, torch.Tensor]] | None = None


class Context:
    """Plans, moves and rotations: made and uploaded once, found by all layers."""

    def __init__(self) -> None:
        self._local = _Local()
        self._ropes: dict[LayerRope, dict[torch.device, Partial]] = {}
        self._angles: dict[LayerRope, dict[torch.device, torch.Tensor]] = {}
        self._same: weakref.WeakKeyDictionary[LayerRope, LayerRope] = weakref.WeakKeyDictionary()

    def plan(self, step: Step, device: torch.device) -> Plan:
        """The step's integers on ``device``: made and uploaded once, found by all layers."""
        plan = self._local.plans.get(device)
        if plan is None or plan.step is not step:
            plan = self._local.plans[device] = Plan(step, device, self._local.buffers)
        return plan

    def moves(self, moves: Moves, table: npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
        """The moves on ``device``: uploaded once, found by all layers."""
        if self._local.moves is None or self._local.moves[0] is not moves:
            self._local.moves = (moves, {})
        held = self._local.moves[1]
        if device not in held:
            held[device] = upload(table, device)
        return held[device]

    def rope(self, rope: LayerRope, device: torch.device) -> Partial:
        """A rotation on ``device``: its frequencies float64 ``[pairs]``; float32 ``[64, 2 * pairs]``, those of a block's slots."""
        held = self._ropes.setdefault(self.same(rope), {})
        if device not in held:
            frequencies = rope.inv_freq.to(device=device, dtype=torch.float64).contiguous()
            table = torch.empty(BLOCK, rope.rotary_dim, dtype=torch.float32, device=device)
            Rotations(torch.arange(BLOCK, device=device), None, frequencies, table).launch()
            held[device] = frequencies, table
        return held[device]

    def angles(self, rope: LayerRope, device: torch.device, count: int) -> torch.Tensor:
        """Cosines and sines of the positions ``0 .. count - 1``, or of more: float32 ``[n, 2 * pairs]``."""
        held, (frequencies, _) = self._angles.setdefault(self.same(rope), {}), self.rope(rope, device)
        if device not in held or held[device].shape[0] < count:
            table = torch.empty(round_up(count), rope.rotary_dim, dtype=torch.float32, device=device)
            Rotations(torch.arange(len(table), device=device), None, frequencies, table).launch()
            held[device] = table
        return held[device]

    def same(self, rope: LayerRope) -> LayerRope:
        """The first rope with these frequencies: layers of a model have equal ones, and need their tables made once."""
        found = self._same.get(rope)
        if found is None:
            by_value = (other for other in self._ropes if torch.equal(other.inv_freq, rope.inv_freq))
            found = self._same[rope] = next(by_value, rope)
        return found
