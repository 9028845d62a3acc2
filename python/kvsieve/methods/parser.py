"""Policies as text: what :func:`repr` of a policy writes is read back."""

from __future__ import annotations

import ast
from typing import Any

from kvsieve.checks import told
from kvsieve.errors import PolicyError
from kvsieve.methods.registry import SYSTEMS
from kvsieve.policy.compose import Policy

__all__ = ["parse"]

LONGEST = 10_000
"""Letters of a policy's text."""

_MAKERS = {system.text_name: system.make for system in SYSTEMS}


def parse(text: str) -> Policy:
    """The policy that ``text`` describes, such as ``"sirllm(budget=1024, decay=0.9)"`` or ``"streamingllm(512) >> sirllm(512)"``.

    Names are case-insensitive; arguments are literals. Nothing is evaluated.

    Raises:
        PolicyError: if the text does not parse, names no known policy, or its arguments are refused.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise PolicyError(f"a policy is a text of at most {LONGEST} letters, such as 'sirllm(budget=1024)'; got {told(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        found = _build(tree, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        if isinstance(err, PolicyError):
            raise
        why = getattr(err, "msg", None) or str(err) or "too deep"
        raise PolicyError(f"cannot read the policy {told(text)}: {why}; write for example 'sirllm(budget=1024)'") from None
    if not isinstance(found, Policy):
        raise PolicyError(
            f"{found!r} is the end of a chain: write a policy before it, such as 'streamingllm(1024) >> {text.strip()}'"
        )
    return found


def _build(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _build(node.left, text) | _build(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _build(node.left, text) >> _build(node.right, text)
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise PolicyError(f"cannot read the policy {text!r}; write for example 'sirllm(budget=1024)'")
    make = _MAKERS.get(node.func.id.lower().replace("_", ""))
    if make is None:
        raise PolicyError(f"unknown policy {node.func.id!r}; known: {', '.join(sorted(_MAKERS))}")
    try:
        args = [ast.literal_eval(a) for a in node.args]
        kwargs = {k.arg or "**": ast.literal_eval(k.value) for k in node.keywords}
        return make(*args, **kwargs)
    except TypeError as err:
        raise PolicyError(f"{node.func.id}: {err}") from None
    except (ValueError, SyntaxError, RecursionError, MemoryError) as err:
        if isinstance(err, PolicyError):
            raise
        raise PolicyError(f"the arguments of {node.func.id!r} must be literals, in {told(text)}") from None
