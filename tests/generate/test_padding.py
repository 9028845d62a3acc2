"""A row of a padded batch equals its solo run. Pad tokens are never stored and never sinks. Other padding is refused."""

from __future__ import annotations

import kvsieve
import pytest
import tiny
import torch
from drive import forwards, greedy, pad_left, positions
from kvsieve.errors import PaddingError, ShapeError

LENGTHS = [50, 23, 37]
ROWS = [tiny.ids(1, n, seed)[0] for seed, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [200, 20], ids=["under", "over"])
def test_a_row_equals_its_solo_run(family: str, policy: str, budget: int, backend: str) -> None:
    model, (ids, mask) = tiny.model(family), pad_left(ROWS)
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
        # The stock cache of a sliding layer takes the pads of a first chunk with it, so the batch starts with one forward.
        together = forwards(model, stream.cache, ids, [50], mask)
        kept = positions(stream)
        more = torch.cat([tiny.ids(1, 6, 9)] * 3)
        whole = torch.cat([mask, torch.ones_like(more)], 1)
        after = torch.cat([_next(model, stream, more[:, i : i + 1], whole[:, : 51 + i]) for i in range(6)], 1)
    for row, n in enumerate(LENGTHS):
        with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as solo:
            alone = forwards(model, solo.cache, ROWS[row][None], [n])
            assert positions(solo)[0] == kept[row]
            alone_after = forwards(model, solo.cache, more[:1], [1])
        torch.testing.assert_close(together[row, 50 - n :], alone[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(after[row], alone_after[0], atol=1e-4, rtol=0)


def _next(model: object, stream: kvsieve.Stream, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from drive import forward

    return forward(model, stream.cache, ids, mask)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
@pytest.mark.parametrize("budget", [200, 20], ids=["under", "over"])
def test_generated_tokens_of_a_row_equal_its_solo_run(policy: str, budget: int, backend: str) -> None:
    model, (ids, mask) = tiny.model(), pad_left(ROWS)
    with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as stream:
        together = greedy(model, ids, 8, attention_mask=mask, past_key_values=stream.cache)
    for row, n in enumerate(LENGTHS):
        with kvsieve.stream(model, tiny.POLICIES[policy](budget), backend) as solo:
            alone = greedy(model, ROWS[row][None], 8, past_key_values=solo.cache)
        assert together[row, 50:].tolist() == alone[0, n:].tolist()


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_chunks_of_pads_only_are_fine_before_a_rows_first_token(policy: str, backend: str) -> None:
    """A short row's pads may fill whole chunks of a prompt."""
    model, (ids, mask) = tiny.model(), pad_left(ROWS)
    with kvsieve.stream(model, tiny.POLICIES[policy](120), backend) as stream:
        together = forwards(model, stream.cache, ids, [10], mask)
        assert positions(stream) == [list(range(n)) for n in LENGTHS]
    with torch.no_grad():
        for row, n in enumerate(LENGTHS):
            want = model(ROWS[row][None]).logits[0]
            torch.testing.assert_close(together[row, 50 - n :], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", [name for name in tiny.BOUNDED if name != "snapkv"])  # which has none
def test_sinks_are_each_rows_first_real_tokens(policy: str, backend: str) -> None:
    model, (ids, mask) = tiny.model(), pad_left(ROWS)
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        greedy(model, ids, 6, attention_mask=mask, past_key_values=stream.cache)
        seen = [n + 5 for n in LENGTHS]
        for kept, n in zip(positions(stream), seen):
            assert kept[:2] == [0, 1]
            assert kept == sorted(set(kept))
            assert kept[-1] == n - 1
        assert stream.stats().seen == max(seen)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_pads_are_never_stored(backend: str) -> None:
    """A long row among short ones: what is held, and what a full cache would hold, counts real tokens only."""
    model, (ids, mask) = tiny.model(), pad_left([tiny.ids(1, 300)[0], tiny.ids(1, 5)[0], tiny.ids(1, 2)[0]])
    with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
        forwards(model, stream.cache, ids, [300], mask)
        stats, token = stream.stats(), stream._engine.facts.bytes_per_token
        assert [len(kept) for kept in positions(stream)] == [300, 5, 2]
        assert stats.bytes_full == 307 * token
        assert 307 * token <= stats.bytes_held < 2 * 300 * token


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", ["full", "streaming", "sirllm"])
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ([[1, 1, 1, 1, 0, 0], [1] * 6], "row 0 .* pad .*left"),
        ([[1] * 6, [0, 1, 1, 0, 1, 1]], "row 1 .* pad .*left"),
        ([[1] * 6, [1, 0, 0, 0, 0, 0]], "row 1 .* pad .*left"),
    ],
    ids=["right", "hole", "one_token_then_pads"],
)
def test_other_padding_is_refused_and_leaves_the_stream_clean(policy: str, backend: str, mask: list[list[int]], match: str) -> None:
    model, ids = tiny.model(), tiny.ids(2, 6)
    with kvsieve.stream(model, tiny.POLICIES[policy](20), backend) as stream:
        with pytest.raises(PaddingError, match=match):
            model(ids, attention_mask=torch.tensor(mask), past_key_values=stream.cache)
        assert stream.seen == 0
        torch.testing.assert_close(forwards(model, stream.cache, ids, [6]), model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("how", ["generate", "stream.generate", "feed"])
def test_a_row_of_pads_only_is_refused(backend: str, how: str) -> None:
    model, ids, mask = tiny.model(), tiny.ids(2, 6), torch.tensor([[1] * 6, [0] * 6])
    with kvsieve.stream(model, kvsieve.SirLLM(budget=20), backend) as stream:
        calls = {
            "generate": lambda: greedy(model, ids, 3, attention_mask=mask, past_key_values=stream.cache),
            "feed": lambda: stream.feed(ids, mask),
            "stream.generate": lambda: stream.generate(ids, mask, max_new_tokens=3, do_sample=False),
        }
        with pytest.raises(PaddingError):
            calls[how]()
        stream.reset()
        assert torch.equal(greedy(model, ids, 3, past_key_values=stream.cache), greedy(model, ids, 3))


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_pads_between_turns_change_nothing(policy: str, backend: str) -> None:
    """The second turn of one row is shorter: its pads stand between its turns, and are not tokens."""
    model, ids = tiny.model(), tiny.ids(2, 12)
    mask = torch.tensor([[1] * 12, [1] * 6 + [0] * 3 + [1] * 3])
    with kvsieve.stream(model, tiny.POLICIES[policy](40), backend) as stream:
        got = forwards(model, stream.cache, ids, [6, 6], mask)
        assert positions(stream) == [list(range(12)), list(range(9))]
    with torch.no_grad():
        want = model(ids[:1]).logits[0], model(ids[1:][mask[1:].bool()][None]).logits[0]
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1, mask[1].bool()], want[1], atol=1e-4, rtol=0)


def test_a_mask_of_another_shape_is_refused() -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.Full(), "reference") as stream, pytest.raises(ShapeError, match="attention_mask"):
        stream.feed(tiny.ids(2, 6), torch.ones(2, 7))


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", list(tiny.POLICIES))
def test_a_row_that_ended_early_takes_its_next_turn_as_if_alone(policy: str, backend: str) -> None:
    """What it was padded with, while the other row went on, is neither remembered nor counted as positions."""
    model, (ids, mask) = tiny.model(), pad_left([tiny.ids(1, 12)[0], tiny.ids(1, 9, 2)[0]])
    how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    made, more = tiny.POLICIES[policy](160), tiny.ids(2, 5, 3)
    with kvsieve.stream(model, made, backend) as stream:
        short, other = stream.generate(ids, mask, **how)[:, 12:].tolist()
    at = next(i for i, token in enumerate(short) if token not in other and token not in short[:i])
    assert at < 12, "no row ends early: nothing is tested"
    how["eos_token_id"] = short[at]
    with kvsieve.stream(model, made, backend) as stream:
        assert stream.generate(ids, mask, **how)[:, 12:].tolist() == [short[: at + 1] + [0] * (15 - at), other]
        together = stream.generate(more, **how)
    for row, prompt in enumerate((tiny.ids(1, 12), tiny.ids(1, 9, 2))):
        with kvsieve.stream(model, made, backend) as solo:
            solo.generate(prompt, **how)
            alone = solo.generate(more[row : row + 1], **how)[0].tolist()
        got = together[row].tolist()
        assert got[: len(alone)] == alone
        assert not any(got[len(alone) :])
