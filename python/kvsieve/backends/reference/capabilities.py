"""What the reference can hold: everything."""

from kvsieve.backends.capabilities import Capabilities, SelectionCapabilities
from kvsieve.backends.reference import select
from kvsieve.backends.rules import kinds

__all__ = ["CAPABILITIES"]

CAPABILITIES = Capabilities(
    "reference", SelectionCapabilities(kinds(select.__path__), definitions=True), needs_parts=True, residents_suffice=True
)
