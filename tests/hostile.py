"""Arguments that are wrong: something else in place of one that works, of its kind or of any."""

from __future__ import annotations

import decimal
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import tiny
import torch
from kvsieve import policy


class Nothing:
    """Has no length, no truth, no number and no text."""

    def __len__(self) -> int:
        raise ZeroDivisionError("no length")

    def __bool__(self) -> bool:
        raise ZeroDivisionError("no truth")

    def __index__(self) -> int:
        raise ZeroDivisionError("no number")


def tensors(of: torch.Tensor) -> list[Callable[[], Any]]:
    """Others in place of token ids or the like."""
    rows, width = (of.shape[0], of.shape[-1]) if of.dim() > 1 else (1, of.numel())
    some = torch.full((rows, 3), 5)
    return [
        lambda: of + tiny.VOCAB,
        lambda: of - tiny.VOCAB,
        lambda: torch.full_like(of, -1) if not of.dtype.is_floating_point else of * math.nan,
        lambda: torch.full_like(of, 2**31 - 1),
        lambda: torch.full(of.shape, 2**63 - 1),
        lambda: torch.full(of.shape, -(2**63)),
        lambda: torch.cat([of, torch.full_like(of[..., :1], tiny.VOCAB)], -1) if of.dim() else of,
        lambda: of.to(torch.int32),
        lambda: of.to(torch.int16),
        lambda: of.to(torch.uint8),
        lambda: of.to(torch.uint16),
        lambda: of.bool(),
        lambda: of.float(),
        lambda: of.double() * math.inf,
        lambda: of.to(torch.complex64),
        lambda: of.to(torch.float8_e5m2),
        lambda: torch.quantize_per_tensor(of.float(), 0.1, 0, torch.qint8),
        lambda: of.to("meta"),
        lambda: of.to_sparse(),
        lambda: of.float().requires_grad_(),
        lambda: torch.nested.nested_tensor([of.flatten().float(), of.flatten().float()[:1]]),
        lambda: of.flatten(),
        lambda: of.flatten()[0] if of.numel() else of,
        lambda: of[None],
        lambda: of[..., :0],
        lambda: of[:0],
        lambda: of.expand(3, *of.shape[1:]) if of.dim() > 1 and of.shape[0] == 1 else of.repeat(2, *(1,) * (of.dim() - 1)),
        lambda: torch.tensor(5).expand(rows, 2**31),
        lambda: torch.tensor(5).expand(2**31, max(width, 1)),
        lambda: torch.tensor(5).expand(2**31),
        lambda: torch.empty(rows, 2**40, device="meta", dtype=torch.int64),
        lambda: some.T,
        lambda: some[:, ::2],
        lambda: torch.nn.Parameter(of.float()),
        lambda: of.numpy() if not of.requires_grad else of,
        lambda: of.tolist(),
        lambda: {"input_ids": of},
        lambda: {"input_ids": of, "attention_mask": None},
        lambda: {"input_ids": of, "attention_mask": torch.zeros_like(of)},
        lambda: {"input_ids": of, "pixel_values": torch.zeros(1, 3, 4, 4)},
        lambda: {"input_ids": None},
        lambda: {},
        lambda: {3: of},
        lambda: {"input_ids": of, "token_type_ids": "x"},
        lambda: {"input_ids": of, "mm_token_type_ids": [0, 1]},
        lambda: (of,),
    ]


OTHERS: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (None, True, False, 0, -1, 1, 2, 7, 64, 10**6, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30)),
    *(lambda v=v: v for v in (0.5, 1.0, -0.0, math.nan, math.inf, -math.inf, 1e308, 1j, decimal.Decimal(3))),
    *(
        lambda v=v: v
        for v in ("", "x", "cpu", "cuda", "3", "64MiB", "1e3MiB", "9" * 400 + "GB", "0.0001B", "\0", "\ud800", "(" * 300)
    ),
    *(lambda v=v: v for v in (b"x", b"", (), (1,), (1, 2), (-1,), ("x",), (None,), (0.5, 1), (True,), ..., int, len, range(2))),
    *(
        lambda v=v: v
        for v in (np.int64(3), np.int32(-1), np.uint8(2), np.int64(2**62), np.float32(0.5), np.float64(0.25), np.bool_(True))
    ),
    *(lambda v=v: v for v in (Path("/"), Path("/nowhere/at all"), Path("new"), Path("x" * 300), "/dev/null", "/dev/full", ".")),
    list,
    dict,
    set,
    object,
    Nothing,
    lambda: [1],
    lambda: [[1]],
    lambda: [0, 0],
    lambda: [2**70],
    lambda: ["a", "a"],
    lambda: ["a", ""],
    lambda: [None],
    lambda: {"a": 1},
    lambda: iter([0]),
    lambda: (i for i in [1]),
    lambda: np.array([0, 1]),
    lambda: np.array(3),
    lambda: np.array([True]),
    lambda: np.array([0.5]),
    lambda: torch.tensor(3),
    lambda: torch.tensor(True),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor([0]),
    lambda: torch.tensor([[0]]),
    lambda: torch.tensor([0, 1]),
    lambda: torch.tensor([5, -9]),
    lambda: torch.empty(2, device="meta"),
    lambda: torch.tensor(0).expand(2**31),
    lambda: torch.eye(2).to_sparse(),
    kvsieve.Full,
    lambda: kvsieve.MemoryBank(),
    lambda: kvsieve.Memory(),
    lambda: policy.KeepAll(),
    lambda: policy.Tiered("1MiB"),
]
ENDLESS = ("max_new_tokens", "max_length", "num_beams")
"""A large number here is no mistake, and takes as long as it says."""


def hostile(value: Any, name: str, rng: random.Random) -> Any:
    """Something else in place of an argument that works: of its kind, or of any."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        try:
            return rng.choice(tensors(value))()
        except Exception:  # torch does not make every one of every kind
            return value.flatten()
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3 and name not in ENDLESS:
        return rng.choice((value + 1, value - 1, -value, value * 64, np.int64(value), np.int32(value), float(value), str(value), 0))
    if isinstance(value, float) and rng.random() < 0.3:
        return rng.choice((-value, value * 1e3, math.nan, math.inf, np.float32(value), np.float64(value), str(value), 0, 1))
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0123456789()=,>|*_abz/-\0 é") + value[at + rng.randrange(2) :]
    found = rng.choice(OTHERS)()
    if name in ENDLESS and isinstance(found, (int, np.integer, float)) and abs(found) > 64:
        return -1
    return found
