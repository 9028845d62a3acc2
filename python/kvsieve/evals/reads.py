"""What a policy that selects reads while it writes: every step, every layer, every key-value head."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import kvsieve
from kvsieve.errors import KvsieveError, PolicyError
from kvsieve.stats import LayerTrace
from kvsieve.view.trace import Panel, bin_edges, draw_reads, share_read

__all__ = ["Reads", "Settings", "record", "run"]

BINS = 160
"""Most bins over the text between sinks and window."""


@dataclass
class Reads:
    """What was read at each step, of the layers that select.

    Attributes:
        heads: of each step, for each layer and key-value head the ranges that its newest query read, int64 ``[n, 2]``.
        seen: of each step, the tokens that there were.
        scored: of each step, keys that a selection compared for each head; of the first, as many as its block of the prompt did.
        read: of each step, keys that each head read.
        dense: layers that read everything and are left out.
        layers: layers that select.
    """

    heads: list[list[npt.NDArray[np.int64]]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    dense: int = 0
    layers: int = 0

    def add(self, trace: Sequence[LayerTrace], seen: int) -> None:
        """One step of a stream of one row."""
        searching = [layer for layer in trace if not layer.dense]
        heads = [head for layer in searching for head in layer.rows[0]]
        self.dense, self.layers = len(trace) - len(searching), len(searching)
        first = not self.seen
        work = sum(head.scored for head in heads) if first else sum(layer.scored for layer in searching)
        self.heads.append([head.read for head in heads])
        self.seen.append(seen)
        self.scored.append(work / max(len(heads), 1))
        self.read.append(statistics.fmean(int(np.diff(head.read).sum()) for head in heads) if heads else float(seen))

    def panels(self, sinks: int, window: int, bins: int = BINS) -> list[Panel]:
        """The sinks, what lies between them and the first step's window, and from there to the end."""
        first, end = self.seen[0], self.seen[-1]
        cuts = [0, min(sinks, first), max(first - window, min(sinks, first)), end]
        titles = (f"sinks\n(first {sinks})", "between them: what was selected", f"window\n(newest {window})")
        found = []
        for title, lo, hi in zip(titles, cuts, cuts[1:]):
            if lo < hi:
                edges = bin_edges(lo, hi, bins)
                share = np.stack([share_read(heads, edges, seen) for heads, seen in zip(self.heads, self.seen)])
                found.append(Panel(title, edges, share))
        return found


def record(stream: kvsieve.Stream, ids: torch.Tensor, max_new_tokens: int) -> tuple[Reads, torch.Tensor]:
    """Generates greedily after ``ids`` int64 ``[1, n]``, and looks at every step.

    Returns:
        the reads, the first of the prompt's last token; and the new tokens, int64 ``[m]``.

    Raises:
        StateError: for a policy that does not select.
        KvsieveError: if the text is so short that everything was read.
    """
    reads = Reads()

    def look(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        reads.add(stream.trace(), stream.seen)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    written = stream.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[look])
    if not reads.layers:
        raise KvsieveError(
            f"{stream.policy!r} reads a text of {ids.shape[1]:,} tokens whole; give it more tokens, or a smaller budget"
        )
    return reads, written[0, ids.shape[1] :]


@dataclass(frozen=True)
class Settings:
    """What is read and drawn."""

    model: str
    policy: str
    out: Path
    text: Path | None = None
    tokens: int = 4000
    max_new_tokens: int = 32
    dtype: str = "float32"
    backend: str | None = None


def run(settings: Settings) -> dict[str, Any]:
    """Reads the first ``tokens`` of a text, goes on writing, draws what was read, and writes the numbers beside the picture."""
    from kvsieve.evals.models import load_model
    from kvsieve.evals.texts import read_text
    from kvsieve.methods import parse

    policy = parse(settings.policy)
    rule = policy.selection or policy.fetching
    if policy.recycling is not None:
        raise PolicyError(
            f"{policy!r} reads everything at some steps, which is not drawn; stream.trace() tells what it read: try 'hip(512)'"
        )
    if rule is None:
        raise PolicyError(f"{policy!r} reads all that it holds; a trace shows what a selection leaves out: try 'hip(512)'")
    text = read_text(settings.text)
    model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : settings.tokens]
    with kvsieve.stream(model, policy, backend=settings.backend) as stream:
        reads, new = record(stream, ids, settings.max_new_tokens)
        backend = stream.stats().backend
    panels = reads.panels(*rule.always_read)
    kv_heads = len(reads.heads[0]) // reads.layers
    dense = f"; {reads.dense} more layers read everything" if reads.dense else ""
    draw_reads(
        panels,
        reads.scored,
        reads.read,
        settings.out,
        title=f"What {policy!r} reads after {ids.shape[1]:,} tokens: {Path(settings.model).name}",
        caption=f"{reads.layers} layers of {kv_heads} key-value heads that select{dense}",
    )
    report = {
        "model": settings.model,
        "policy": repr(policy),
        "backend": backend,
        "prompt_tokens": ids.shape[1],
        "text": tokenizer.decode(new),
        "layers_that_search": reads.layers,
        "layers_that_read_everything": reads.dense,
        "kv_heads": kv_heads,
        "steps": [
            {"seen": seen, "compared": compared, "read": read} for seen, compared, read in zip(reads.seen, reads.scored, reads.read)
        ],
        "panels": [
            {
                "title": panel.title.replace("\n", " "),
                "edges": panel.edges.tolist(),
                "share": [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in panel.share],
            }
            for panel in panels
        ],
    }
    beside = settings.out.with_suffix(".json")
    beside.write_text(json.dumps(report, allow_nan=False) + "\n", encoding="utf-8")
    print(
        f"{settings.out} and {beside}: {len(reads.seen)} steps, {statistics.fmean(reads.read):,.0f} keys read for each head, "
        f"{statistics.fmean(reads.scored[1:] or reads.scored):,.0f} compared"
    )
    return report
