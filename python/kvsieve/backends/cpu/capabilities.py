"""What the CPU backend can hold."""

from kvsieve._core import selection_rules
from kvsieve.backends.capabilities import FLOATS, Capabilities, SelectionCapabilities

__all__ = ["CAPABILITIES"]

CAPABILITIES = Capabilities(
    "cpu",
    SelectionCapabilities(frozenset(selection_rules())),
    devices=frozenset({"cpu"}),
    dtypes=FLOATS,
    residents_suffice=True,
    value_tiers=True,
)
