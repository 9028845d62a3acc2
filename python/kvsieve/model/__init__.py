"""Everything kvsieve knows about `transformers`. Nothing happens at import.

The seam is four public doors, opened when a stream opens and closed when the last one on the model closes:

1. a `Cache` given to any forward (:mod:`.cache`);
2. a registered attention function (:mod:`.attention`), the only place where queries and fresh keys meet;
3. a registered mask function (:mod:`.masks`), without which left padding never reaches the attention function;
4. forward hooks (:mod:`.hooks`), and in place of the configurations that they look attention up in, views (:mod:`.configs`).

What a model does is found by watching it (:mod:`.probe`), which models are served says :mod:`.support`, and every opening is
checked against the stock model's answer (:mod:`.verify`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsieve.model.hooks import Attachment, attach
    from kvsieve.model.support import look_through

__all__ = ["Attachment", "attach", "look_through"]

_HOME = {"Attachment": "hooks", "attach": "hooks", "look_through": "support"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"kvsieve.model.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
