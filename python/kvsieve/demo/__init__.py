"""The demo: a shopping list, a long text and a continuation, each through memories with and without a budget."""

from kvsieve.demo.stages import Settings, run

__all__ = ["Settings", "run"]
