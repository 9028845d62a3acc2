"""HiP and InfiniteHiP under a model in every loop: beams, assistants, forks, turns, files, forwards that die."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy
from kvsieve.errors import StateError
from search_policies import SEARCHES, hip
from tiny import BACKENDS

# What is chosen depends on no release of transformers, and `test_systems` asks the rest of the same policies.
pytestmark = pytest.mark.slow

EVERY = pytest.mark.parametrize("name", list(SEARCHES))
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@BACKEND
@EVERY
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_is_lossless(name: str, how: str, backend: str) -> None:
    model = tiny.model()
    ids = torch.cat([tiny.ids(1, 9, 4)] * 7, 1)
    extra = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": tiny.model(seed=1, num_hidden_layers=1)}
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        want = greedy(model, ids, 24, past_key_values=stream.cache)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        assert torch.equal(greedy(model, ids, 24, past_key_values=stream.cache, **extra), want)


@EVERY
def test_beams_are_those_of_the_specification(name: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(2, 60), []
    for backend in BACKENDS:
        with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
            got.append(model.generate(ids, past_key_values=stream.cache, num_beams=3, do_sample=False, max_new_tokens=14))
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_rows_are_selected_and_repeated_with_what_they_chose(name: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 80)
    tail = tiny.ids(1, 7, 3)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        forwards(model, stream.cache, ids, [70, 1])
        stream.cache.reorder_cache(torch.tensor([1, 1]))
        got = forwards(model, stream.cache, tail.repeat(2, 1), [1])
        stream.cache.batch_select_indices(torch.tensor([1]))
        later = forwards(model, stream.cache, tail, [1])
    with kvsieve.stream(model, SEARCHES[name](), backend) as solo:
        forwards(model, solo.cache, ids[1:], [70, 1])
        want = forwards(model, solo.cache, tail, [1])
        after = forwards(model, solo.cache, tail, [1])
    torch.testing.assert_close(got, want.repeat(2, 1, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(later, after, atol=1e-4, rtol=0)


@BACKEND
@EVERY
def test_a_fork_and_its_parent_do_not_touch_each_other(name: str, backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 73)
    one, two = tiny.ids(1, 9, 1), tiny.ids(1, 9, 2)
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        forwards(model, stream.cache, ids, [70, 1])
        with stream.fork() as child:
            assert repr([layer.rows for layer in child.trace()]) == repr([layer.rows for layer in stream.trace()])
            mixed = [[forward(model, s.cache, x[:, i : i + 1]) for s, x in ((stream, one), (child, two))] for i in range(9)]
    for which, x in enumerate((one, two)):
        with kvsieve.stream(model, SEARCHES[name](), backend) as solo:
            forwards(model, solo.cache, ids, [70, 1])
            want = forwards(model, solo.cache, x, [1])
        assert torch.equal(torch.cat([step[which] for step in mixed], 1), want)


@BACKEND
@EVERY
@pytest.mark.parametrize("width", [1, 24])
def test_a_forward_that_died_leaves_every_choice_as_it_was(
    name: str, width: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny.model(), tiny.ids(1, 110)

    def dies(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    got = []
    for unlucky in (False, True):
        with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
            forwards(model, stream.cache, ids[:, :73], [70, 1])
            if unlucky:
                for _ in range(2):
                    with monkeypatch.context() as patch:
                        patch.setattr(model.model.layers[1].mlp, "forward", dies)
                        with pytest.raises(RuntimeError, match="out of memory"):
                            forward(model, stream.cache, ids[:, 73 : 73 + width])
            got.append(forwards(model, stream.cache, ids[:, 73:], [width, 1]))
    assert torch.equal(*got)


@BACKEND
@EVERY
def test_turns(name: str, backend: str) -> None:
    """Turns of new tokens are read by the same rule as one long loop of forwards."""
    model = tiny.model()
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        said = stream.generate(tiny.ids(1, 64), max_new_tokens=8, do_sample=False)
        more = stream.generate(tiny.ids(1, 31, 7), max_new_tokens=8, do_sample=False)
        assert stream.seen == 64 + 8 + 31 + 7
        assert stream.stats().resident == stream.seen
    with kvsieve.stream(model, SEARCHES[name](), backend) as stream:
        last = forward(model, stream.cache, tiny.ids(1, 64))
        for at in range(64, 72):
            assert int(last[0, -1].argmax()) == int(said[0, at])
            if at < 71:
                last = forward(model, stream.cache, said[:, at : at + 1])
        last = forward(model, stream.cache, torch.cat([said[:, -1:], tiny.ids(1, 31, 7)], 1))
        assert int(last[0, -1].argmax()) == int(more[0, 31])


@BACKEND
@EVERY
def test_a_saved_stream_goes_on(name: str, backend: str, tmp_path: Path) -> None:
    """What was chosen is not written: a loaded stream chooses at its first token, as one whose choices are all due."""
    model, ids = tiny.model(), tiny.ids(1, 96)
    every = {"refresh": 1} if name.startswith("hip") else {"refresh": (1, 1, 1)}
    with kvsieve.stream(model, SEARCHES[name](**every), backend) as stream:
        forwards(model, stream.cache, ids[:, :90], [80, 1])
        stream.save(tmp_path / "stream.safetensors")
        want = forwards(model, stream.cache, ids[:, 90:], [1])
    with kvsieve.load(tmp_path / "stream.safetensors", model, backend) as stream:
        assert repr(stream.policy) == repr(SEARCHES[name](**every))
        torch.testing.assert_close(forwards(model, stream.cache, ids[:, 90:], [1]), want, atol=1e-5, rtol=0)


@BACKEND
def test_reset_forgets_what_was_chosen(backend: str) -> None:
    model, ids, got = tiny.model(), tiny.ids(1, 80), []
    with kvsieve.stream(model, hip(), backend) as stream:
        for _ in range(2):
            got.append(forwards(model, stream.cache, ids, [70, 1]))
            stream.reset()
        with pytest.raises(StateError, match="nothing"):
            stream.trace()
    assert torch.equal(*got)
