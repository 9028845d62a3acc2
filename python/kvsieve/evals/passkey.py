"""Passkey retrieval: five digits in a monotonous text. Is the passkey still resident, and can the model still say it?

A passkey is the extreme case of a surprising token: a memory that keeps surprisal keeps it, a recency window loses it
as soon as it slides out, a selection must find it. The text is that of :mod:`kvsieve.evals.passkey_text`.

:func:`run` asks at several depths. Texts that differ in the depth of their key alone share what comes before it: that is read once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import kvsieve
from kvsieve.budget import BLOCK
from kvsieve.errors import KvsieveError
from kvsieve.evals.passkey_text import LEAST, Passkey, make_passkey
from kvsieve.evals.results import write_json
from kvsieve.evals.search_nll import Prompts
from kvsieve.policy.compose import Policy
from kvsieve.view.live import plain_table
from kvsieve.view.trace import share_read

__all__ = ["Answer", "Passkey", "PasskeyResult", "Settings", "ask", "make_passkey", "read_all", "run", "score_passkey"]


Prompt = Literal["own", "dense", "ingested"]


@dataclass(frozen=True)
class PasskeyResult:
    """Share of the key's tokens still resident before the question, and whether the generated answer is the key."""

    retention: float
    found: bool
    answer: str


def score_passkey(stream: Any, tokenizer: Any, passkey: Passkey, *, device: Any = "cpu") -> PasskeyResult:
    """Feeds the text into an open, empty `stream`, then asks on a fork and generates greedily."""
    stream.feed(torch.tensor([passkey.ids], device=device))
    stream.end_turn()
    retention = float(np.isin(passkey.positions, stream.kept()[0].positions).mean())
    question = torch.tensor([passkey.question_ids], device=device)
    with stream.fork() as asked:
        ids = asked.generate(question, max_new_tokens=len(passkey.positions) + 2, do_sample=False)
    answer = tokenizer.decode(ids[0, question.shape[1] :])
    return PasskeyResult(retention, passkey.key in answer, answer)


# ------------------------------------------------------------------------------------------------------------ several depths


@dataclass(frozen=True)
class Answer:
    """One key, asked for.

    Attributes:
        policy: the policy, written out.
        prompt: who read the text: the policy (``"own"``); a full cache whose keys and values it took over (``"dense"``); or the
            policy's bank, before the stream was opened in which the question is asked (``"ingested"``).
        length, depth: tokens of the text; where the key lies in it, 0 to 1.
        key, text: the passkey, the answer; found: whether the one is in the other.
        read: how many heads of the layers that select read the key's digits while the answer was written, 0 to 1; None for a policy
            that does not select.
    """

    policy: str
    prompt: Prompt
    length: int
    depth: float
    key: str
    text: str
    found: bool
    read: float | None


def read_all(model: Any, policy: Policy, keys: Sequence[Passkey], backend: str | None = None) -> Iterator[kvsieve.Stream]:
    """Streams that have read the text of each key, one after the other; what the texts share is read once.

    Args:
        keys: of texts that differ in their keys and in where these lie, from the start to the end.
    """
    shared = [next((i for i, (a, b) in enumerate(zip(key.ids, keys[-1].ids)) if a != b), len(key.ids)) for key in keys[:-1]]
    # Cut at whole blocks, of a memory and of queries that select together: elsewhere a cut changes what they read.
    shared = [min([keys[-1].positions[0] - 1, *shared[i:]]) // BLOCK * BLOCK for i in range(len(keys))]
    device = next(model.parameters()).device
    with kvsieve.stream(model, policy, backend=backend) as trunk:
        for key, upto in zip(keys, shared):
            if upto > trunk.seen:
                trunk.feed(torch.tensor([key.ids[trunk.seen : upto]], device=device))
            with trunk.fork() as branch:
                branch.feed(torch.tensor([key.ids[branch.seen :]], device=device))
                branch.end_turn()
                yield branch


def ask(stream: kvsieve.Stream, tokenizer: Any, key: Passkey) -> tuple[str, float | None]:
    """The answer of a stream that has read a key's text, which it leaves changed; and :attr:`Answer.read`."""
    edges = np.array([key.positions[0], key.positions[-1] + 1])
    shares: list[float] = []

    def look(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        policy = stream.policy
        if any(rule is not None for rule in (policy.selection, policy.recycling, policy.fetching)):
            heads = [head.read for layer in stream.trace() if not layer.dense for head in layer.rows[0]]
            shares.append(float(share_read(heads, edges, stream.seen)[0]) if heads else 1.0)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    question = torch.tensor([key.question_ids], device=next(stream.model.parameters()).device)
    written = stream.generate(question, max_new_tokens=len(key.positions) + 2, do_sample=False, stopping_criteria=[look])
    return tokenizer.decode(written[0, question.shape[1] :]), float(np.mean(shares)) if shares else None


@dataclass(frozen=True)
class Settings:
    """What is asked, and of which model; lengths are tokens. Policies under ``dense`` take over what a full cache has read; the
    bank of those under ``ingested`` reads the text."""

    policies: tuple[str, ...] = ("full()", "hip(512)", "quest(512)", "streamingllm(783, sinks=16)")
    dense: tuple[str, ...] = ("hip(512)", "quest(512)")
    ingested: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4000, 7500)
    depths: int = 10
    seed: int = 0
    dtype: str = "float32"
    json: Path | None = None
    backend: str | None = None
    model: str = "smollm2"


def run(settings: Settings) -> list[Answer]:
    """Asks the model; prints a line for each policy and length, and writes JSON after every one if asked to."""
    from kvsieve.evals.models import load_model

    own = {text: kvsieve.methods.parse(text) for text in settings.policies}
    dense = {text: kvsieve.methods.parse(text) for text in settings.dense}
    ingested = {text: kvsieve.methods.parse(text) for text in settings.ingested}
    if not own and not dense and not ingested:
        raise KvsieveError("name a policy at least")
    for text, policy in ingested.items():
        if policy.bank is None:
            raise KvsieveError(
                f"--ingest is of policies that end with a bank, such as 'streamingllm(1024) >> memory_bank()', not {text!r}"
            )
    if min(settings.lengths) < LEAST:
        raise KvsieveError(f"a text with a passkey needs at least {LEAST} tokens, got --length {min(settings.lengths)}")
    model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype))
    answers: list[Answer] = []

    def add(policy: Policy, prompt: Prompt, length: int, depth: float, key: Passkey, stream: Any) -> None:
        text, read = ask(stream, tokenizer, key)
        answers.append(Answer(repr(policy), prompt, length, depth, key.key, text, key.key in text, read))

    def told(policy: Policy, length: int) -> None:
        print(f"{policy!r}, {length:,} tokens: done", flush=True)
        if settings.json is not None:
            name = "SmolLM2-135M-Instruct (Q4_1, dequantised)" if settings.model == "smollm2" else settings.model
            write_json(settings.json, {"model": name, "answers": [asdict(a) for a in answers]})

    full = repr(kvsieve.Full())
    for length in settings.lengths:
        depths, keys = _keys(tokenizer, length, settings)
        # The full cache reads the texts for those that take them over, whether it is asked itself or not.
        for policy in [*own.values(), *([kvsieve.Full()] if dense and full not in map(repr, own.values()) else [])]:
            for depth, key, stream in zip(depths, keys, read_all(model, policy, keys, settings.backend)):
                for other in dense.values() if repr(policy) == full else ():
                    with kvsieve.stream(model, other, backend=settings.backend) as taken:
                        Prompts.of(stream).into(taken)
                        add(other, "dense", length, depth, key, taken)
                if policy in own.values():
                    add(policy, "own", length, depth, key, stream)
            told(policy, length)
        for text in ingested:
            for depth, key in zip(depths, keys):
                policy = kvsieve.methods.parse(text)  # with a bank of its own
                policy.bank.ingest(model, torch.tensor([key.ids]), backend=settings.backend)  # type: ignore[union-attr]
                with kvsieve.stream(model, policy, backend=settings.backend) as stream:
                    add(policy, "ingested", length, depth, key, stream)
            told(ingested[text], length)
    print("\n" + table(answers))
    return answers


def _keys(tokenizer: Any, length: int, settings: Settings) -> tuple[list[float], list[Passkey]]:
    rng = random.Random(settings.seed)
    depths = [(i + 0.5) / settings.depths for i in range(settings.depths)]
    digits = [f"{rng.randrange(100_000):05}" for _ in depths]
    made = [
        make_passkey(tokenizer, num_tokens=length, depth=depth, seed=settings.seed, key=key) for depth, key in zip(depths, digits)
    ]
    return depths, made


def table(answers: Sequence[Answer]) -> str:
    """A line for each policy and length: keys found, and at which depths."""
    groups: dict[tuple[str, str, int], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.policy, answer.prompt, answer.length), []).append(answer)
    rows = []
    for (policy, prompt, length), mine in groups.items():
        mine = sorted(mine, key=lambda answer: answer.depth)
        read = [answer.read for answer in mine if answer.read is not None]
        rows.append(
            (
                policy,
                prompt,
                f"{length:,}",
                f"{sum(answer.found for answer in mine)} of {len(mine)}",
                "".join("+" if answer.found else "-" for answer in mine),
                f"{100 * np.mean(read):.0f} %" if read else "",
            )
        )
    return plain_table(("policy", "prompt", "tokens", "found", "start to end", "heads that read the key"), rows)
