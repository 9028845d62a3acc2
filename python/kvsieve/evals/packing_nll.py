"""What compressing a prompt, or forgetting a part of it, costs: the perplexity of the text that follows it.

A prompt is read exactly, then compressed, or compressed while it is read in pieces of 512 tokens (``when="prefill"``). Its
continuation is given, so that every policy predicts the same words. A window of the text is compared with itself under the full
cache: windows differ among themselves far more than policies do.

A continuation is read in chunks where that is the same as token by token: in any where generated tokens stay whole, and from one
compression to the next where they are compressed as they come.

:class:`ByKeyNorm` and :class:`AtRandom` choose channels without looking at queries, or at anything: what ThinK has to beat.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

import kvsieve
from kvsieve.errors import KvsieveError
from kvsieve.evals.results import check_resume, check_writable, interrupted, read_held, write_json
from kvsieve.evals.texts import read_text
from kvsieve.methods import think
from kvsieve.model.support import cache_name
from kvsieve.policy.compose import Memory, Policy
from kvsieve.policy.storage import Channels, LayerShape, Packing, StorageObservation, StorageRule
from kvsieve.view.live import plain_table

__all__ = [
    "AtRandom",
    "ByKeyNorm",
    "Prefix",
    "Price",
    "Settings",
    "losses",
    "policies",
    "price",
    "price_of",
    "read_prefix",
    "run",
    "windows",
]

TAIL = 64
"""Last tokens of a prompt, which every policy reads itself, to see the queries. Those before are read once for all."""

CHUNK = 512
"""Most tokens of a forward."""

RATIOS = (0.2, 0.4, 0.5, 0.6)

_ROWS = 128  # rows of logits that are cast to float32 at a time


# ---------------------------------------------------------------------------------------------------------- channels by other rules


@dataclass(frozen=True)
class ByKeyNorm(StorageRule):
    """Keys keep the rotary pairs in which they are longest, whatever the queries are."""

    ratio: float
    recent: int = 32

    def packing(self, layer: LayerShape) -> Packing:
        return Packing(think.num_kept_channels(layer.key_dim, self.ratio, "pairs"))

    def choose_channels(self, seen: StorageObservation) -> Channels:
        keys = seen.keys[:, : seen.count]
        alike = torch.ones(keys.shape[0], 1, keys.shape[2])  # queries that weigh all channels alike
        return think.heaviest_channels(alike, keys, self.packing(seen.layer).key_kept, "pairs", seen.rope, pre_rope=seen.pre_rope)


@dataclass(frozen=True)
class AtRandom(StorageRule):
    """Keys keep rotary pairs drawn at random, for each layer and head anew, the same ones for the same ``seed``."""

    ratio: float
    recent: int = 32
    seed: int = 0

    def packing(self, layer: LayerShape) -> Packing:
        return Packing(think.num_kept_channels(layer.key_dim, self.ratio, "pairs"))

    def choose_channels(self, seen: StorageObservation) -> Channels:
        generator = torch.Generator().manual_seed(self.seed * 1009 + seen.layer.index)
        lots = torch.rand(seen.keys.shape[0], 1, seen.keys.shape[2], generator=generator)
        return think.heaviest_channels(lots, torch.ones_like(lots), self.packing(seen.layer).key_kept, "pairs", seen.rope)


def policies(which: Literal["all", "few"] = "all") -> dict[str, Policy]:
    """What is compared, by name; the full cache first. ``"few"`` leaves most ratios out."""
    ratios = RATIOS if which == "all" else (0.4,)
    found: dict[str, Policy] = {"Full()": kvsieve.Full()}
    found.update({f"ThinK({r})": kvsieve.ThinK(r) for r in ratios})
    found.update({f"Quantized({bits})": kvsieve.Quantized(bits) for bits in ((8, 4, 2) if which == "all" else (4,))})
    found["ThinK(0.2) | Quantized(4)"] = kvsieve.ThinK(0.2) | kvsieve.Quantized(4)
    early = [*(kvsieve.ThinK(r, when="prefill") for r in ratios), kvsieve.Quantized(4, when="prefill")]
    found.update({repr(policy): policy for policy in early})
    found.update({f"by key norm, {r}": Memory(storage=ByKeyNorm(r)) for r in ratios})
    found.update({f"at random, {r}": Memory(storage=AtRandom(r)) for r in ratios})
    found.update({f"ThinK({r}, channels='single')": kvsieve.ThinK(r, channels="single") for r in ratios})
    return found


# --------------------------------------------------------------------------------------------------------------- one window of text


@dataclass(frozen=True)
class Prefix:
    """Tokens that were read once for all policies.

    Attributes:
        count: how many.
        layers: keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of each layer, by its index.
    """

    count: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def into(self, stream: kvsieve.Stream) -> None:
        """Make these the first tokens of a stream that has seen none and does not move tokens."""
        engine = stream._engine
        engine.begin_at(self.count, [(self.count, [(list(range(self.count)), [math.nan] * self.count)])])
        for index, (k, v) in self.layers.items():
            store = engine.make_store(index, k[None], v[None])
            store.write(engine.planner.runs(0, 0), k, v)


def read_prefix(model: Any, ids: torch.Tensor, backend: str | None = None) -> Prefix:
    """Reads ``ids`` ``[1, n]`` with a full cache."""
    with kvsieve.stream(model, kvsieve.Full(), backend=backend) as stream:
        stream.feed(ids, chunk=CHUNK)
        engine = stream._engine
        runs = engine.planner.runs(0, 0)
        return Prefix(ids.shape[1], {index: store.read(runs) for index, store in engine.stores.items()})


def losses(
    model: Any,
    policy: Policy,
    prefix: Prefix | None,
    prompt: torch.Tensor,
    continuation: torch.Tensor,
    *,
    backend: str | None = None,
    by_token: bool = False,
) -> tuple[torch.Tensor, float]:
    """The continuation after the compressed prompt.

    Args:
        prefix: what comes before ``prompt``; None for nothing.
        prompt: int64 ``[1, n]``; continuation: int64 ``[1, m]``.
        by_token: read the continuation one token at a time, as ``generate`` does, which is slow and gives the same.

    Returns:
        nll float32 ``[m]`` in nats, the first of them predicted before anything was compressed; and the bytes held once the
        prompt was compressed, as a share of the full cache's.

    Raises:
        KvsieveError: for an empty prompt or continuation.
    """
    if not prompt.shape[1] or not continuation.shape[1]:
        raise KvsieveError("a prompt and a continuation need at least one token each")
    found: list[torch.Tensor] = []
    with kvsieve.stream(model, policy, backend=backend) as stream, torch.no_grad():
        if prefix is not None:
            prefix.into(stream)
        for part in torch.split(prompt, CHUNK, 1):
            last = model(part, **{cache_name(model): stream.cache}, logits_to_keep=1).logits[0]
        stream.end_turn()
        stats = stream.stats()
        for part, packs in _parts(policy.compression, stats.seen, continuation, by_token):
            logits = model(part, **{cache_name(model): stream.cache}).logits[0]
            found.append(_nll(torch.cat([last, logits[:-1]]), part[0]))
            last = logits[-1:]
            if packs:
                stream.end_turn()
    return torch.cat(found), stats.bytes_held / stats.bytes_full


def _parts(pack: StorageRule | None, prompt: int, ids: torch.Tensor, by_token: bool) -> Iterator[tuple[torch.Tensor, bool]]:
    """The continuation in pieces, and whether what is due is compressed after each, as it would be token by token."""
    every = None if pack is None else pack.flush_every
    if by_token or not every or pack is None:
        yield from ((part, False) for part in torch.split(ids, 1 if by_token else CHUNK, 1))
        return
    # The prompt was compressed in whole groups: so many tokens wait already for theirs to be full.
    first = every - max(prompt - pack.recent, 0) % pack.align
    yield ids[:, :first], True
    yield from ((part, True) for part in torch.split(ids[:, first:], every, 1) if part.shape[1])


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    parts = zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS))
    return torch.cat([F.cross_entropy(rows.float(), wanted, reduction="none") for rows, wanted in parts]).cpu()


# --------------------------------------------------------------------------------------------------------------------- many windows


@dataclass(frozen=True)
class Price:
    """What a policy costs against the full cache.

    Attributes:
        name: the policy.
        held: bytes after the prompt, as a share of the full cache's.
        nll: mean nats a token of each window.
        perplexity: over all windows.
        change: its relative change, 0.02 for 2 % more; error: the standard error of that, from the differences of the windows, nan
            for one window.
    """

    name: str
    held: float
    nll: tuple[float, ...]
    perplexity: float
    change: float
    error: float


def price(name: str, held: float, nll: Sequence[float], full: Sequence[float]) -> Price:
    """Compares the windows of a policy, in nats a token, with the same ones under the full cache.

    >>> cost = price("x", 0.8, [2.1, 2.3], [2.0, 2.2])
    >>> f"{cost.change:.3f} {cost.error:.3f}"
    '0.105 0.000'
    """
    if len(nll) != len(full) or not nll:
        raise KvsieveError(f"{name}: {len(nll)} windows cannot be compared with {len(full)}")
    differences = [mine - theirs for mine, theirs in zip(nll, full)]
    ratio = math.exp(statistics.fmean(differences))
    error = statistics.stdev(differences) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    return Price(name, held, tuple(nll), math.exp(statistics.fmean(nll)), ratio - 1, ratio * error)


def windows(ids: torch.Tensor, count: int, size: int) -> list[torch.Tensor]:
    """``count`` windows of ``size`` tokens of ``ids`` ``[1, n]``, at even distances, without overlap.

    Raises:
        KvsieveError: if the text is too short.
    """
    if ids.shape[1] < count * size:
        raise KvsieveError(
            f"{count} windows of {size:,} tokens need {count * size:,}, the text has {ids.shape[1]:,}; "
            "give a longer text or fewer windows"
        )
    step = ids.shape[1] // count
    return [ids[:, start : start + size] for start in range(0, step * count, step)]


@dataclass(frozen=True)
class Settings:
    """What is run; counts are tokens, unless they say otherwise.

    Attributes:
        model: `smollm2`, a local folder, or a GGUF file; text: a file, None for Python's own reference pages.
        policies: as text, in place of the policies of :func:`policies`; the full cache is read beside them.
        only: of those, which have this in their name; quick: one ratio of each kind.
        json: a file that holds what has been found so far, written after every policy.
        resume: policies that the file holds are not read again.
    """

    model: str = "smollm2"
    policies: tuple[str, ...] = ()
    text: Path | None = None
    windows: int = 4
    prompt: int = 4000
    continuation: int = 1000
    only: str | None = None
    dtype: str = "float32"
    json: Path | None = None
    resume: bool = False
    backend: str | None = None
    quick: bool = False

    def chosen(self) -> dict[str, Policy]:
        """The policies by name, the full cache first.

        Raises:
            KvsieveError: if no policy has ``only`` in its name. Others as :func:`kvsieve.methods.parse`.
        """
        if self.policies:
            return {"Full()": kvsieve.Full(), **{repr(policy): policy for policy in map(kvsieve.methods.parse, self.policies)}}
        wanted = (self.only or "").lower()
        found = {name: policy for name, policy in policies("few" if self.quick else "all").items() if wanted in name.lower()}
        if not found:
            raise KvsieveError(f"no policy has {self.only!r} in its name")
        return {"Full()": kvsieve.Full(), **found}

    def facts(self, text: str) -> dict[str, Any]:
        """What two runs must have in common for their prices to stand in one table."""
        told = {name: getattr(self, name) for name in ("model", "windows", "prompt", "continuation", "dtype", "backend")}
        return {**told, "text": hashlib.sha256(text.encode()).hexdigest(), "threads": torch.get_num_threads()}


def run(settings: Settings) -> list[Price]:
    """Runs the comparison; prints a table, and writes JSON after every policy if asked to.

    Holds the keys and values of all windows.

    Raises:
        KvsieveError: before the model is loaded, for policies that do not parse, a file that cannot be written, and a file to go on
            with that was written under other settings; before anything is read, for a text that is too short.
    """
    from kvsieve.evals.models import load_model

    chosen, source = settings.chosen(), read_text(settings.text)
    facts = settings.facts(source)
    held = read_held(check_resume(settings.json), facts, _prices) if settings.resume else None
    prices = {price.name: price for price in held or ()}
    if settings.json is not None:
        check_writable(settings.json)
    if not all(name in prices for name in chosen):
        model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
        ids = tokenizer(source, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"].to(model.device)
        texts = windows(ids, settings.windows, settings.prompt + settings.continuation)
        try:
            for name, nll, share in _read(model, {x: chosen[x] for x in chosen if x not in prices}, texts, settings):
                prices[name] = price(name, share, nll, prices["Full()"].nll if prices else nll)
                print(f"{name}: {prices[name].perplexity:.3f} ({100 * prices[name].change:+.1f} %)", flush=True)
                if settings.json is not None:
                    write_json(settings.json, {"settings": facts, "prices": [_plain(x) for x in prices.values()]}, allow_nan=False)
        except KeyboardInterrupt:
            print(f"kvsieve: {interrupted(len(prices), 'policies', settings.json)}", file=sys.stderr)
            raise
    wanted = [prices[name] for name in chosen]
    print("\n" + table(wanted))
    return wanted


def _read(
    model: Any, chosen: dict[str, Policy], texts: list[torch.Tensor], settings: Settings
) -> Iterator[tuple[str, list[float], float]]:
    """Of each policy its name, the mean nats a token of each window, and what it held, as a share of the full cache's bytes."""
    from kvsieve.model.hooks import examined

    head = max(settings.prompt - TAIL, 0)
    with examined(model):
        prefixes = [read_prefix(model, text[:, :head], settings.backend) if head else None for text in texts]
        for name, policy in chosen.items():
            nll, held = [], []
            for prefix, text in zip(prefixes, texts):
                # What was read exactly, once for all, serves only those that keep it so until the prompt's end.
                known, first = (prefix, head) if _keeps_until_end_of_turn(policy) else (None, 0)
                prompt, continuation = text[:, first : settings.prompt], text[:, settings.prompt :]
                one, share = losses(model, policy, known, prompt, continuation, backend=settings.backend)
                nll.append(float(one.mean()))
                held.append(share)
            yield name, nll, statistics.fmean(held)


def _keeps_until_end_of_turn(policy: Policy) -> bool:
    """Every token is there as the full cache has read it until the turn ends, and read whole; only then it may be compressed."""
    if not isinstance(policy, Memory) or policy.tiers is not None:
        return False
    roles = Memory().roles
    whole = all(getattr(policy.roles, name) == getattr(roles, name) for name in ("evict", "position", "select"))
    return whole and (policy.compression is None or policy.compression.when == "decode")


def table(prices: Sequence[Price]) -> str:
    """A line for each policy."""
    rows = [(p.name, f"{p.held:.3f}", f"{p.perplexity:.3f}", f"{100 * p.change:+.1f} %", f"{100 * p.error:.1f}") for p in prices]
    return plain_table(("policy", "of the full cache", "perplexity", "change", "standard error"), rows)


def _plain(found: Price) -> dict[str, Any]:
    """As it stands in a file: None for a number that there is not."""
    return {key: None if value != value else value for key, value in asdict(found).items()}


def _prices(told: Any) -> tuple[dict[str, Any], list[Price]]:
    """The facts of a file's run, and its prices. Raises KeyError, TypeError or ValueError for what is none."""
    return dict(told["settings"]), [price_of(row) for row in told["prices"]]


def price_of(row: Any) -> Price:
    """A price as it stands in a file. Raises KeyError, TypeError or ValueError for what is none."""
    numbers = {name: float(row[name]) for name in ("held", "perplexity", "change")}
    error = math.nan if row["error"] is None else float(row["error"])
    return Price(str(row["name"]), nll=tuple(map(float, row["nll"])), error=error, **numbers)
