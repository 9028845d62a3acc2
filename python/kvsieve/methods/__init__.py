"""The published systems, one a file: its rule, its defaults, its constructor, its paper.

:data:`SYSTEMS` lists them, and :func:`parse` reads a policy from text. Each is a choice of roles; see :mod:`kvsieve.policy`.
"""

from __future__ import annotations

from kvsieve.methods.parser import parse
from kvsieve.methods.registry import SYSTEMS, System

__all__ = ["SYSTEMS", "System", "parse"]
