"""The published systems, one a file. Each is a choice of roles; see :mod:`kvsieve.roles`."""

from __future__ import annotations

import ast
from collections.abc import Callable

from kvsieve.errors import PolicyError
from kvsieve.policies.full import Full
from kvsieve.policies.h2o import H2O
from kvsieve.policies.hip import HiP, InfiniteHiP
from kvsieve.policies.lm_infinite import LMInfinite
from kvsieve.policies.quantized import Quantized
from kvsieve.policies.quest import Quest
from kvsieve.policies.sirllm import SirLLM
from kvsieve.policies.snapkv import SnapKV
from kvsieve.policies.streaming_llm import StreamingLLM
from kvsieve.policies.think import ThinK
from kvsieve.roles import Policy

__all__ = [
    "H2O",
    "POLICIES",
    "Full",
    "HiP",
    "InfiniteHiP",
    "LMInfinite",
    "Quantized",
    "Quest",
    "SirLLM",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "parse",
]

POLICIES: dict[str, Callable[..., Policy]] = {
    "full": Full,
    "streamingllm": StreamingLLM,
    "lminfinite": LMInfinite,
    "sirllm": SirLLM,
    "snapkv": SnapKV,
    "h2o": H2O,
    "think": ThinK,
    "quantized": Quantized,
    "hip": HiP,
    "infinitehip": InfiniteHiP,
    "quest": Quest,
}
"""Every published system by its name in lower case."""


def parse(text: str) -> Policy:
    """The policy that ``text`` describes, such as ``"sirllm(budget=1024, decay=0.9)"`` or ``"streamingllm(512) >> sirllm(512)"``.

    Names are case-insensitive; arguments are literals. Nothing is evaluated.

    Raises:
        PolicyError: if the text does not parse, names no known policy, or its arguments are refused.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as err:
        raise PolicyError(f"cannot read the policy {text!r}: {err.msg}; write for example 'sirllm(budget=1024)'") from None
    return _build(tree, text)


def _build(node: ast.expr, text: str) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _build(node.left, text) | _build(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _build(node.left, text) >> _build(node.right, text)
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise PolicyError(f"cannot read the policy {text!r}; write for example 'sirllm(budget=1024)'")
    make = POLICIES.get(node.func.id.lower().replace("_", ""))
    if make is None:
        raise PolicyError(f"unknown policy {node.func.id!r}; known: {', '.join(sorted(POLICIES))}")
    try:
        args = [ast.literal_eval(a) for a in node.args]
        kwargs = {k.arg or "**": ast.literal_eval(k.value) for k in node.keywords}
        return make(*args, **kwargs)
    except TypeError as err:
        raise PolicyError(f"{node.func.id}: {err}") from None
    except ValueError as err:
        if isinstance(err, PolicyError):
            raise
        raise PolicyError(f"the arguments of {node.func.id!r} must be literals, in {text!r}") from None
