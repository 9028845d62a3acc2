"""Text on the terminal as it is generated."""

from __future__ import annotations

import sys
from typing import Any, TextIO

__all__ = ["held", "print_while_generating"]


def print_while_generating(
    stream: Any, tokenizer: Any, ids: Any, *, out: TextIO | None = None, greedy: bool = True, **kwargs: Any
) -> str:
    """Generates from `ids [1, n]` through `stream`, prints the new text as it appears, and returns it.

    `kwargs` go to `generate`, which is `greedy` unless they say otherwise. The prompt is fed in chunks that fit the budget.
    """
    from transformers import TextStreamer

    sink = sys.stdout if out is None else out

    class Typist(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", file=sink, flush=True)

    streamer = Typist(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generated = stream.generate(ids, streamer=streamer, **{**({"do_sample": False} if greedy else {}), **kwargs})
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))


def held(stats: Any) -> str:
    """What a stream holds, in MiB, beside what a full cache of the same tokens would: from `stream.stats()`.

    The allocator takes memory a block of 64 tokens at a time, in every layer, so a short text holds more than its own tokens.
    """
    mib = stats.bytes_held / 2**20, stats.bytes_full / 2**20
    return f"{mib[0]:.1f} MiB held, in whole blocks of 64 tokens ({mib[1]:.1f} MiB would be the tokens of a full cache)"
