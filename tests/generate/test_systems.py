"""What holds for every system: forks, rows, beams, crops, assisted decoding, padding and turns, each while it is at work."""

from __future__ import annotations

import functools
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, pad_left, same_memory
from kvsieve.errors import KvsieveError
from kvsieve.methods import SYSTEMS as PUBLISHED
from kvsieve.runtime.bank import Banking
from kvsieve.runtime.fetching import Fetching
from kvsieve.runtime.recycling import Recycling
from kvsieve.runtime.selection import Selection
from kvsieve.runtime.value_selection import ValueSelection
from systems import OF_EVERY_KIND, PROMPT, SYSTEMS
from tiny import BACKENDS


def _slow(name: str) -> Any:
    return () if name in OF_EVERY_KIND else pytest.mark.slow


EVERY = pytest.mark.parametrize("name", [pytest.param(name, marks=_slow(name)) for name in SYSTEMS])

# The specification is tried with one system of every kind; what differs in its settings alone is compared with it, with a fork and
# turns, in `test_two_turns_and_a_fork_between_them_are_those_of_the_specification`.
EVERYWHERE = pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=_slow(name))
        for backend in BACKENDS
        for name in SYSTEMS
        if backend != "reference" or name in OF_EVERY_KIND
    ],
)

# Two ways of going on: long chunks, short ones and single tokens.
PIECES = ((40, 1, 5, 23, 1, 1), (17, 1, 40, 1, 3, 1))


def opened(name: str, backend: str, rows: int = 1) -> kvsieve.Stream:
    return kvsieve.stream(tiny.model(), SYSTEMS[name].of_rows(rows), backend)


def read(stream: kvsieve.Stream, rows: int = 1) -> None:
    """A prompt, and two tokens after it."""
    forwards(tiny.model(), stream.cache, tiny.ids(rows, PROMPT + 2), [PROMPT, 1])


def rest(at: int, rows: int = 1) -> list[torch.Tensor]:
    """What comes after it: pieces of another text for each ``at``."""
    return list(tiny.ids(rows, sum(PIECES[at % 2]), 50 + at).split(PIECES[at % 2], dim=1))


def close(name: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= SYSTEMS[name].tolerance * want.abs().max())


@functools.cache
def alone(name: str, backend: str, at: int) -> list[torch.Tensor]:
    """Logits of the pieces, by a stream that nobody forked."""
    with opened(name, backend) as stream:
        read(stream)
        return [forward(tiny.model(), stream.cache, piece) for piece in rest(at)]


def test_the_table_has_every_system() -> None:
    text = " ".join(repr(system.make()).lower() for system in SYSTEMS.values())
    assert all(f"{system.text_name}(" in text for system in PUBLISHED)


@EVERYWHERE
def test_the_system_is_at_work(name: str, backend: str) -> None:
    """Or the other tests here would show nothing."""
    with opened(name, backend) as stream:
        read(stream)
        engine = stream._engine
        assert ("evicts" in SYSTEMS[name].doing) == (engine.blocks.resident < stream.seen)
        selection = engine.parts.find(Selection)
        recycling, fetching = engine.parts.find(Recycling), engine.parts.find(Fetching)
        selects = engine.reads_top_k or (selection is not None and selection.searching)
        selects |= recycling is not None and all(sets[0] is not None for sets in recycling.read.values())
        values = engine.parts.find(ValueSelection)
        selects |= values is not None and all(bool((mass < 1).all()) for mass in values.mass.values())
        fetched = [] if fetching is None else [rows[0] for rows in fetching.read.values()]
        selects |= bool(fetched) and all(last is not None and last.choice.compared > 0 for last in fetched)
        assert ("selects" in SYSTEMS[name].doing) == selects
        banking = engine.parts.find(Banking)
        recalls = banking is not None and banking.rows[0].entries.num_chunks > 0
        assert ("recalls" in SYSTEMS[name].doing) == recalls
        assert ("stores" in SYSTEMS[name].doing) == (engine.planner.num_packed(0) > 0)
        tiers = engine.tier_stats
        assert ("spills" in SYSTEMS[name].doing) == (tiers is not None and tiers.spills > 0)


@EVERYWHERE
def test_a_fork_goes_on_as_the_original_would(name: str, backend: str) -> None:
    """Both go on at once, by chunks that end blocks and by single tokens; the parent while its fork is open, and its fork."""
    model, wanted = tiny.model(), [alone(name, backend, at) for at in range(3)]
    with opened(name, backend) as stream:
        read(stream)
        with stream.fork() as fork, fork.fork() as second:
            streams = [stream, fork, second]
            for step in range(len(PIECES[0])):
                for at in (1, 0, 2) if step % 2 else (2, 1, 0):
                    got = forward(model, streams[at].cache, rest(at)[step])
                    assert close(name, got, wanted[at][step]), f"stream {at}, piece {step}"
        # A second one, of what the first one left.
        with stream.fork() as fork:
            got = [forward(model, each.cache, tiny.ids(1, 70, 9)) for each in (stream, fork)]
            assert close(name, *got)


@EVERYWHERE
def test_rows_repeated_reordered_and_selected_go_on_as_if_alone(name: str, backend: str) -> None:
    model, wanted = tiny.model(), [alone(name, backend, at) for at in (0, 2)]
    with opened(name, backend) as stream:
        read(stream)
        stream.cache.batch_repeat_interleave(3)
        stream.cache.batch_select_indices(torch.tensor([2, 0]))
        for step, pieces in enumerate(zip(rest(0), rest(2))):
            got = forward(model, stream.cache, torch.cat(pieces))
            assert all(close(name, got[row : row + 1], wanted[row][step]) for row in range(2)), f"piece {step}"
        before = stream.fork()
        stream.cache.reorder_cache(torch.tensor([1, 1]))
        ids = tiny.ids(1, 45, 8)
        got = forward(model, stream.cache, ids.expand(2, -1))
        want = forward(model, before.cache, ids.expand(2, -1))[1:]
        assert close(name, got[:1], want)
        assert close(name, got[1:], want)
        before.close()


@EVERYWHERE
def test_the_best_beam_is_what_its_own_tokens_give(name: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, PROMPT, 6)
    how: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "length_penalty": 0.0}
    with opened(name, backend) as stream:
        out = model.generate(ids, past_key_values=stream.cache, return_dict_in_generate=True, output_scores=True, **how)
    best = out.sequences
    with opened(name, backend) as stream:
        logits = forwards(model, stream.cache, best[:, :-1], [PROMPT, 1])
    logps = logits[0, PROMPT - 1 :].log_softmax(-1).gather(-1, best[0, PROMPT:, None])
    assert float(logps.sum()) == pytest.approx(float(out.sequences_scores[0]), abs=1e-3)


@EVERYWHERE
def test_a_crop_is_exact_or_refused(name: str, backend: str) -> None:
    """What evicts nothing returns to where it was, with a fork open too; what refuses has changed nothing."""
    if not SYSTEMS[name].retains:
        pytest.skip("what was evicted meanwhile does not come back")
    model, wanted = tiny.model(), alone(name, backend, 1)
    with opened(name, backend) as stream:
        read(stream)
        with stream.fork() as fork:
            for piece in tiny.ids(1, 4, 7).split(1, dim=1):
                forward(model, stream.cache, piece)
            held = stream.fork()
            try:
                stream.cache.crop(-4)
            except KvsieveError:
                assert same_memory(stream, held)
            else:
                got = [forward(model, stream.cache, piece) for piece in rest(1)]
                assert all(close(name, a, b) for a, b in zip(got, wanted))
            held.close()
            assert all(close(name, forward(model, fork.cache, piece), want) for piece, want in zip(rest(1), wanted))


@EVERYWHERE
def test_assisted_decoding_is_lossless(name: str, backend: str) -> None:
    """The prompt repeats itself, so that lookups find something to propose."""
    model, ids = tiny.model(), torch.cat([tiny.ids(1, 30, 4)] * 10, 1)
    answers = []
    for lookup in ({}, {"prompt_lookup_num_tokens": 4}):
        with opened(name, backend) as stream:
            out = model.generate(ids, past_key_values=stream.cache, do_sample=False, max_new_tokens=12, **lookup)
            answers.append(out.tolist())
    assert answers[0] == answers[1]


@EVERYWHERE
def test_a_padded_row_equals_its_solo_run(name: str, backend: str) -> None:
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (PROMPT, 207)]
    after = tiny.ids(2, 48, 3)
    ids, mask = pad_left(rows)
    mask = torch.cat([mask, torch.ones(2, 48, dtype=torch.long)], 1)
    with opened(name, backend, 2) as stream:
        got = forwards(model, stream.cache, torch.cat([ids, after], 1), [PROMPT, 1, 1, 44, 1], mask)
    for row, text in enumerate(rows):
        with opened(name, backend) as stream:
            want = forwards(model, stream.cache, torch.cat([text[None], after[row : row + 1]], 1), [len(text), 1, 1, 44, 1])
        assert close(name, got[row : row + 1, -want.shape[1] :], want)


@EVERY
def test_two_turns_and_a_fork_between_them_are_those_of_the_specification(name: str) -> None:
    answers = []
    for backend in BACKENDS:
        with opened(name, backend) as stream:
            first = stream.generate(tiny.ids(1, PROMPT, 1), max_new_tokens=6, do_sample=False)
            with stream.fork() as fork:
                turns = [each.generate(tiny.ids(1, 30, 2), max_new_tokens=6, do_sample=False) for each in (fork, stream)]
            assert torch.equal(*turns)
            answers.append([first.tolist(), turns[1].tolist()])
    assert answers[0] == answers[1]
