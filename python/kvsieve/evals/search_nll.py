"""What reading a part of the past costs: perplexity under HiP, InfiniteHiP and Quest, beside windows that read as many tokens.

A window of the text is a prompt and its continuation. The continuation is given, and read one token at a time, as in decoding:
there a selection stands for some steps. The prompt is read

* ``"dense"``: by the full cache, whose keys and values the policy takes over: what a selection costs a decoder alone;
* ``"own"``: under the policy, in chunks, as a stream reads it; its own last tokens are judged too.

All windows are rows of one batch. Each is compared with itself under the full cache: windows differ among themselves far more than
policies do. Reads are counted, for each query, as the mean over layers and key-value heads, layers that read everything among them;
keys that a selection compares are counted apart.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

import kvsieve
from kvsieve.budget import BLOCK
from kvsieve.errors import KvsieveError
from kvsieve.evals.packing_nll import Price, price, price_of, windows
from kvsieve.evals.results import check_resume, check_writable, interrupted, read_held, write_json
from kvsieve.evals.texts import read_text
from kvsieve.model.support import cache_name
from kvsieve.policy.compose import Policy
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.runtime.transcript import Ids, Row, TranscriptState
from kvsieve.view.live import plain_table

__all__ = ["Cost", "Measured", "Prompts", "Settings", "compared", "continue_with", "exact_until", "read_prompts", "run", "swept"]

CHUNK = 256
"""Tokens of each row in a forward over a prompt."""

TAIL = 2000
"""Last tokens of a prompt that are judged as they are read in chunks; of a shorter one its second half."""

_ROWS = 128  # rows of logits that are cast to float32 at a time

Mode = Literal["dense", "own"]


# ------------------------------------------------------------------------------------------------------------- what is compared


def compared(which: Literal["all", "few"] = "all") -> dict[str, Policy]:
    """HiP, InfiniteHiP, Quest, and windows that read as many tokens between sinks and window as they find, or none; by name."""
    sinks, window = 16, 256
    found: dict[str, Policy] = {}
    for budget in (512, 1024, 2048) if which == "all" else (512,):
        stages = ((64, 4 * budget), (16, 2 * budget), (8, budget))
        found[f"HiP({budget})"] = kvsieve.HiP(budget)
        found[f"InfiniteHiP, {budget}"] = kvsieve.InfiniteHiP(
            stages=stages, sinks=sinks, window=window, dense_layers=3, wide_layers=0
        )
        found[f"Quest({budget})"] = kvsieve.Quest(budget, window=sinks + window - BLOCK)
        found[f"StreamingLLM, {budget} more"] = kvsieve.StreamingLLM(sinks + window + budget - 1, sinks=sinks)
        found[f"LMInfinite, {budget} more"] = kvsieve.LMInfinite(window + budget, sinks=sinks)
    found["StreamingLLM, window only"] = kvsieve.StreamingLLM(sinks + window - 1, sinks=sinks)
    found["LMInfinite, window only"] = kvsieve.LMInfinite(window, sinks=sinks)
    return found


def swept() -> dict[str, Policy]:
    """``HiP(512)`` and what changes when one of its arguments does."""
    changes: tuple[tuple[str, Sequence[Any]], ...] = (
        ("refresh", (2, 8)),
        ("block", (1, 8)),
        ("representative", ("first", "last")),
        ("dense_layers", (0,)),
        ("window", (64, 1024)),
        ("sinks", (4, 64)),
        ("query_block", (32, 128)),
    )
    found: dict[str, Policy] = {"HiP(512)": kvsieve.HiP(512)}
    for name, values in changes:
        found.update({f"{name}={value!r}": kvsieve.HiP(**{"budget": 512, name: value}) for value in values})
    return found


# ------------------------------------------------------------------------------------------------------------------ prompts, read


@dataclass(frozen=True)
class Prompts:
    """What a full cache holds of a batch of prompts.

    Attributes:
        count: tokens of each row.
        layers: keys ``[B, Hkv, n, D]``, as the model rotated them, and values ``[B, Hkv, n, Dv]`` of each layer, by its index.
        ids: int64 ``[n]`` of each row.
    """

    count: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ids: list[torch.Tensor]

    @classmethod
    def of(cls, stream: kvsieve.Stream) -> Prompts:
        """What a stream of :func:`kvsieve.Full` has read; its rows saw equally many tokens."""
        engine = stream._engine
        rows = [engine.planner.runs(0, row) for row in range(engine.num_rows)]
        layers = {}
        for index, store in engine.stores.items():
            keys, values = zip(*(store.read(runs) for runs in rows))
            layers[index] = torch.stack(keys), torch.stack(values)
        return cls(stream.seen, layers, [row.ids.tensor() for row in engine.transcript.rows])

    def into(self, stream: kvsieve.Stream, count: int | None = None) -> None:
        """Make these, or the first ``count`` tokens of them, what a stream has seen that has seen none.

        The stream keeps what its policy would: everything, or the sinks and the newest tokens.

        Raises:
            KvsieveError: for a policy that keeps anything else.
        """
        engine, count = stream._engine, self.count if count is None else count
        kept, rows = _residents(stream, count), next(iter(self.layers.values()))[0].shape[0]
        positions = torch.tensor(kept)
        told = TranscriptState(count, tuple(Row(Ids().append(ids[:count])) for ids in self.ids), False)
        engine.begin_at(count, [(count, [(kept, [math.nan] * len(kept))])] * rows)
        engine.transcript.return_to(told)
        for layer in engine.facts.layers:
            k, v = (x[:, :, positions] for x in self.layers[layer.index])
            if engine.stored_keys == "pre_rope" and layer.rope is not None:
                k = layer.rope.rotate(k, -positions, factor=False) / layer.rope.factor
            store = engine.make_store(layer.index, k, v)
            for row in range(rows):
                store.write(engine.planner.runs(0, row), k[row], v[row])


def _residents(stream: kvsieve.Stream, count: int) -> list[int]:
    (spec, *others) = stream.policy.specs(stream._engine.facts.bytes_per_token)
    if stream.policy.fetching is not None:
        raise KvsieveError(f"{stream.policy!r} sums up the text as it reads it: it must read the prompt itself")
    if spec.evict.rule == "keep_all" and not others:
        return list(range(count))
    if spec.evict.rule == "window" and not others:
        sinks = min(spec.evict.sinks, count)
        return [*range(sinks), *range(max(sinks, count - spec.evict.window), count)]
    raise KvsieveError(f"{stream.policy!r} keeps neither everything nor sinks and a window: it must read the prompt itself")


def exact_until(policy: Policy) -> int:
    """Tokens up to which a policy reads all that came before, so that a full cache can read them for it; 0 if unknown."""
    if policy.selection is not None:
        return int(policy.selection.dense_until)
    if policy.recycling is not None:
        return policy.recycling.budget
    (spec, *others) = policy.specs(1)
    return int(spec.evict.sinks + spec.evict.window) if spec.evict.rule == "window" and not others else 0


def read_prompts(model: Any, stream: kvsieve.Stream, ids: torch.Tensor, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the prompts ``ids`` int64 ``[B, n]`` from token ``skip`` on, in chunks.

    Returns:
        nll float32 ``[B, m]`` in nats of the last ``m`` tokens, at most :data:`TAIL`; the last logits ``[B, V]``.
    """
    count, found = ids.shape[1], []
    first = max(count - TAIL, count // 2)
    last: torch.Tensor | None = None
    for start in range(skip, count, CHUNK):
        part = ids[:, start : start + CHUNK]
        judged = start + part.shape[1] > first
        logits = model(part, **{cache_name(model): stream.cache}, logits_to_keep=0 if judged else 1).logits
        if judged:
            before = logits[:, :-1] if last is None else torch.cat([last[:, None], logits[:, :-1]], 1)
            targets = part[:, 1:] if last is None else part
            skipped = max(first - start - (last is None), 0)
            found.append(_nll(before[:, skipped:], targets[:, skipped:]))
        last = logits[:, -1].clone()
    assert last is not None
    return torch.cat(found, 1), last


def continue_with(
    model: Any, stream: kvsieve.Stream, last: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Reads a continuation ``ids`` int64 ``[B, m]`` token by token after logits ``last`` ``[B, V]``.

    Returns:
        nll float32 ``[B, m]`` in nats; keys compared, and keys read, for each query, in the mean over layers and heads.
    """
    found, work = [], []
    for at in range(ids.shape[1]):
        found.append(_nll(last[:, None], ids[:, at : at + 1]))
        last = model(ids[:, at : at + 1], **{cache_name(model): stream.cache}).logits[:, -1]
        work.append(_work(stream))
    scored, read = np.mean(work, 0)
    return torch.cat(found, 1), (float(scored), float(read))


def _work(stream: kvsieve.Stream) -> tuple[float, float]:
    """Keys compared and keys read by the last query, in the mean over rows, layers and key-value heads."""
    engine, selection = stream._engine, stream._engine.parts.find(Selection)
    if engine.parts.find(Recycling) is not None or engine.parts.find(Fetching) is not None:
        traced = [(layer, len(layer.rows) * len(layer.rows[0])) for layer in stream.trace()]
        compared = statistics.fmean(layer.scored / heads for layer, heads in traced)
        return compared, statistics.fmean(layer.read / heads for layer, heads in traced)
    (spec, *_) = stream.policy.specs(engine.facts.bytes_per_token)
    seen = [engine.planner.seen(row) for row in range(engine.num_rows)]
    whole = statistics.fmean(min(n, spec.evict.sinks + spec.evict.visible) if spec.evict.rule == "window" else n for n in seen)
    found = []
    for layer in engine.facts.layers:
        search = None if selection is None or not selection.searching else selection.searches.get(layer.index)
        each = layer.num_kv_heads * len(seen)
        found.append((0.0, whole) if search is None else (search.work[0] / each, search.work[1] / each))
    scored, read = np.mean(found, 0)
    return float(scored), float(read)


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """nll ``[B, m]`` of ``targets`` ``[B, m]`` under ``logits`` ``[B, m, V]``."""
    parts = zip(torch.split(logits, _ROWS, 1), torch.split(targets, _ROWS, 1))
    found = [F.cross_entropy(rows.float().transpose(1, 2), wanted, reduction="none") for rows, wanted in parts]
    return torch.cat(found, 1).cpu()


# -------------------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Cost:
    """What a policy costs against the full cache.

    Attributes:
        policy: the policy, written out.
        length: tokens of the prompt.
        prompt: who read it, the full cache (``"dense"``) or the policy itself (``"own"``).
        scored: keys that a selection compared for each query, mean over layers and key-value heads.
        read: keys that each query attended to, likewise.
        decoded: the continuation, token by token; ``held`` is as a share of the full cache's bytes.
        chunks: the prompt's last tokens, read in chunks; None if the full cache read them.
    """

    policy: str
    length: int
    prompt: Mode
    scored: float
    read: float
    decoded: Price
    chunks: Price | None


@dataclass(frozen=True)
class Settings:
    """What is run, on `smollm2`, the model of a local folder, or a GGUF file; counts are tokens, unless they say otherwise.

    Attributes:
        json: a file that holds what has been found so far, written after every row.
        resume: rows that the file holds are not measured again; the full cache reads the prompts again for those that it lacks.
    """

    model: str = "smollm2"
    text: Path | None = None
    windows: int = 4
    lengths: tuple[int, ...] = (4000, 7700)
    continuation: int = 256
    prompts: tuple[Mode, ...] = ("dense", "own")
    policies: tuple[str, ...] = ()
    sweep: bool = False
    only: tuple[str, ...] = ()
    dtype: str = "float32"
    json: Path | None = None
    resume: bool = False
    backend: str | None = None
    quick: bool = False

    def chosen(self) -> dict[str, Policy]:
        """The policies by name, without the full cache.

        Raises:
            KvsieveError: if no policy has any of ``only`` in its name. Others as :func:`kvsieve.methods.parse`.
        """
        if self.policies:
            return {text: kvsieve.methods.parse(text) for text in self.policies}
        found = swept() if self.sweep else compared("few" if self.quick else "all")
        wanted = [text.lower() for text in self.only] or [""]
        found = {name: policy for name, policy in found.items() if any(text in name.lower() for text in wanted)}
        if not found:
            raise KvsieveError(f"no policy has {' or '.join(self.only)} in its name")
        return found

    def facts(self, text: str) -> dict[str, Any]:
        """What two runs must have in common for their costs to stand in one table."""
        told = {name: getattr(self, name) for name in ("model", "windows", "continuation", "dtype", "backend")}
        return {**told, "text": hashlib.sha256(text.encode()).hexdigest(), "threads": torch.get_num_threads()}


_Key = tuple[int, str, Mode]
"""Of a cost: the prompt's length, the policy's name, who read the prompt."""

_FULL = "Full()"


def run(settings: Settings) -> list[Cost]:
    """Runs the comparison; prints a table for each length, and writes JSON after every row if asked to.

    Holds the keys and values of all windows twice.

    Raises:
        KvsieveError: before the model is loaded, for policies that do not parse, a file that cannot be written, and a file to go on
            with that was written under other settings; before anything is read, for a text that is too short.
    """
    from kvsieve.evals.models import load_model
    from kvsieve.model.hooks import examined

    chosen, text = settings.chosen(), read_text(settings.text)
    facts = settings.facts(text)
    held = read_held(check_resume(settings.json), facts, _costs) if settings.resume else None
    # A name may be another policy's by now.
    costs: dict[_Key, Cost] = {_key(cost): cost for cost in held or () if _is_of(cost, chosen)}
    if settings.json is not None:
        check_writable(settings.json)
    keys = {length: _wanted(chosen, length, settings.prompts) for length in settings.lengths}
    missing = {length: [key for key in wanted if key not in costs] for length, wanted in keys.items()}
    if any(missing.values()):
        model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"].to(model.device)
        texts = {n: torch.cat(windows(ids, settings.windows, n + settings.continuation)) for n in settings.lengths}
    try:
        for length, wanted in keys.items():
            if missing[length]:
                with examined(model):
                    for cost in _measured(model, chosen, texts[length], length, missing[length], settings.backend):
                        costs[_key(cost)] = cost
                        if settings.json is not None:
                            found = [_plain(asdict(cost)) for cost in costs.values()]
                            write_json(settings.json, {"settings": facts, "costs": found}, allow_nan=False)
            print("\n" + table([costs[key] for key in wanted]) + "\n", flush=True)
    except KeyboardInterrupt:
        print(f"kvsieve: {interrupted(len(costs), 'rows', settings.json)}", file=sys.stderr)
        raise
    return [costs[key] for wanted in keys.values() for key in wanted]


def _wanted(chosen: dict[str, Policy], length: int, prompts: Sequence[Mode]) -> list[_Key]:
    """The rows of one length, the full cache's first."""
    rows: list[_Key] = [(length, _FULL, "own"), *((length, name, mode) for name in chosen for mode in prompts)]
    return list(dict.fromkeys(rows))


def _key(cost: Cost) -> _Key:
    return cost.length, cost.decoded.name, cost.prompt


def _is_of(cost: Cost, chosen: dict[str, Policy]) -> bool:
    policy = chosen.get(cost.decoded.name)
    return policy is None or repr(policy) == cost.policy


def _measured(
    model: Any, chosen: dict[str, Policy], texts: torch.Tensor, length: int, missing: Sequence[_Key], backend: str | None
) -> Iterator[Cost]:
    """The ``missing`` rows of one length; the full cache reads the prompts first, whose row it is for that."""
    measured = Measured(model, texts[:, :length], texts[:, length:], backend)
    for key in missing:
        _, name, mode = key
        cost = measured.full if (name, mode) == (_FULL, "own") else measured.cost(name, chosen[name], mode)
        print(_line(cost), flush=True)
        yield cost


class Measured:
    """Windows that the full cache has read, and what others cost beside it.

    Args:
        prompt, continuation: int64 ``[B, n]`` and ``[B, m]``, a row for each window.
    """

    @torch.no_grad()
    def __init__(self, model: Any, prompt: torch.Tensor, continuation: torch.Tensor, backend: str | None) -> None:
        self.model, self.prompt, self.continuation, self.backend = model, prompt, continuation, backend
        with kvsieve.stream(model, kvsieve.Full(), backend=backend) as stream:
            self.chunks, self.last = read_prompts(model, stream, prompt)
            self.prompts = Prompts.of(stream)
            self.decoded, work = continue_with(model, stream, self.last, continuation)
            self.full = self._cost(_FULL, stream, "own", work, self.decoded, self.chunks)

    @torch.no_grad()
    def cost(self, name: str, policy: Policy, mode: Mode) -> Cost:
        """One row."""
        with kvsieve.stream(self.model, policy, backend=self.backend) as stream:
            chunks, last, count = None, self.last, self.prompts.count
            if mode == "dense":
                self.prompts.into(stream)
            else:
                skip = min(exact_until(policy), count // 2, count - TAIL) // CHUNK * CHUNK
                if skip > 0:
                    self.prompts.into(stream, skip)
                chunks, last = read_prompts(self.model, stream, self.prompt, max(skip, 0))
            decoded, work = continue_with(self.model, stream, last, self.continuation)
            return self._cost(name, stream, mode, work, decoded, chunks)

    def _cost(
        self,
        name: str,
        stream: kvsieve.Stream,
        mode: Mode,
        work: tuple[float, float],
        decoded: torch.Tensor,
        chunks: torch.Tensor | None,
    ) -> Cost:
        stats = stream.stats()
        # Of all rows; `bytes_full` counts them too.
        held = stats.bytes_held / stats.bytes_full
        prices = [
            None if mine is None else price(name, held, mine.mean(1).tolist(), full.mean(1).tolist())
            for mine, full in ((decoded, self.decoded), (chunks, self.chunks))
        ]
        assert prices[0] is not None
        return Cost(stats.policy, self.prompts.count, mode, *work, prices[0], prices[1])


def _change(p: Price | None) -> str:
    if p is None:
        return ""
    return f"{100 * p.change:+.1f} %" if math.isnan(p.error) else f"{100 * p.change:+.1f} ± {100 * p.error:.1f} %"


def _line(cost: Cost) -> str:
    chunks = "" if cost.chunks is None else f"; in chunks {_change(cost.chunks)}"
    return f"{cost.decoded.name}, prompt {cost.prompt}: {cost.decoded.perplexity:.3f} ({_change(cost.decoded)}{chunks})"


def table(costs: Sequence[Cost]) -> str:
    """A line for each cost."""
    rows = [
        (
            c.decoded.name,
            c.prompt,
            f"{c.read:,.0f}",
            f"{c.scored:,.0f}",
            f"{c.decoded.perplexity:.3f}",
            _change(c.decoded),
            "" if c.chunks is None else f"{c.chunks.perplexity:.3f}",
            _change(c.chunks),
        )
        for c in costs
    ]
    header = ("policy", "prompt", "read", "compared", "decoding", "change", "in chunks", "change")
    return f"prompts of {costs[0].length:,} tokens\n" + plain_table(header, rows)


def _costs(told: Any) -> tuple[dict[str, Any], list[Cost]]:
    """The facts of a file's run, and its costs. Raises KeyError, TypeError or ValueError for what is none."""
    found = []
    for row in told["costs"]:
        if row["prompt"] not in get_args(Mode):
            raise ValueError(f"a prompt that was read by {row['prompt']!r}")
        chunks = None if row["chunks"] is None else price_of(row["chunks"])
        work = float(row["scored"]), float(row["read"])
        found.append(Cost(str(row["policy"]), int(row["length"]), row["prompt"], *work, price_of(row["decoded"]), chunks))
    return dict(told["settings"]), found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
