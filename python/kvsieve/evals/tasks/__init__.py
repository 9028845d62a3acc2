"""The tasks of `kvsieve eval` that run on any model, a file each. None of them imports torch."""

from __future__ import annotations

from kvsieve.evals.task import Task
from kvsieve.evals.tasks import (
    chat_memory,
    common_words,
    copy,
    frequent_words,
    grocery,
    kv_turns,
    niah_multikey,
    niah_multiquery,
    niah_multivalue,
    niah_single,
    passkey,
    rps,
    variable_tracking,
)

__all__ = ["TASKS"]

_MODULES = (
    passkey,
    niah_single,
    niah_multikey,
    niah_multivalue,
    niah_multiquery,
    variable_tracking,
    common_words,
    frequent_words,
    kv_turns,
    chat_memory,
    grocery,
    rps,
    copy,
)

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}
"""Every task by its name, in the order in which they are listed to a reader."""
