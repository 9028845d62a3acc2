"""What the CPU backend can hold."""

from kvsieve.backends.base import FLOATS, Capabilities, SelectionCapabilities
from kvsieve.backends.cpu import select
from kvsieve.backends.rules import kinds

__all__ = ["CAPABILITIES"]

CAPABILITIES = Capabilities("cpu", SelectionCapabilities(kinds(select.__path__)), devices=frozenset({"cpu"}), dtypes=FLOATS)
