"""What selection costs: the measure itself, and HiP beside a window on a real model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.cli import main
from kvsieve.errors import KvsieveError
from kvsieve.evals import search_nll
from kvsieve.evals.shopping_text import FILLERS

# ------------------------------------------------------------------------------------------------------------------ the measure

POLICIES = {
    "full": kvsieve.Full(),
    "hip": kvsieve.HiP(16, sinks=2, window=8, dense_layers=1, refresh=4, query_block=16),
    "infinite": kvsieve.InfiniteHiP(stages=((16, 64), (4, 32), (2, 8)), sinks=2, window=8, wide_layers=1, wide=16, query_block=16),
    "quest": kvsieve.Quest(16, sinks=0, window=64, query_block=16),
    "streaming": kvsieve.StreamingLLM(25, sinks=2),
    "lm_infinite": kvsieve.LMInfinite(24, sinks=2),
}
PROMPT, AFTER = 150, 20


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as small as these models' windows, so that a prompt has several."""
    monkeypatch.setattr(search_nll, "CHUNK", 16)
    monkeypatch.setattr(search_nll, "TAIL", 40)


def whole(model: Any, stream: kvsieve.Stream, ids: torch.Tensor) -> torch.Tensor:
    """nll of every token of ``ids`` but the first, in one forward."""
    with torch.no_grad():
        logits = model(ids, past_key_values=stream.cache).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def measured(ids: torch.Tensor, backend: str | None = None) -> search_nll.Measured:
    return search_nll.Measured(tiny.model(), ids[:, :PROMPT], ids[:, PROMPT:], backend)


def test_the_full_cache_is_plain_attention_wherever_it_is_cut() -> None:
    model, ids = tiny.model(), tiny.ids(2, PROMPT + AFTER)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        want = whole(model, stream, ids)
    got = measured(ids)
    torch.testing.assert_close(got.decoded, want[:, -AFTER:], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.chunks, want[:, -AFTER - 40 : -AFTER], atol=1e-4, rtol=0)
    assert got.full.read == PROMPT + (AFTER + 1) / 2
    assert (got.full.scored, got.full.decoded.change, got.full.prompt) == (0.0, 0.0, "own")


def test_a_short_prompt_is_judged_from_its_middle_on() -> None:
    model, ids = tiny.model(), tiny.ids(2, 31)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        want = whole(model, stream, ids)
    with kvsieve.stream(model, kvsieve.Full()) as stream, torch.no_grad():
        got, last = search_nll.read_prompts(model, stream, ids)
    torch.testing.assert_close(got, want[:, -16:], atol=1e-4, rtol=0)
    assert last.shape == (2, tiny.VOCAB)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_what_a_full_cache_read_first_is_as_if_the_policy_had(name: str, backend: str) -> None:
    """Rows of a batch that took over the tokens that no policy treats otherwise, beside each row alone from the start."""
    model, ids, policy = tiny.model(), tiny.ids(2, PROMPT + AFTER), POLICIES[name]
    cost = measured(ids, backend).cost("x", policy, "own")
    assert cost.chunks is not None
    for row in range(2):
        with kvsieve.stream(model, policy, backend) as stream, torch.no_grad():
            chunks, last = search_nll.read_prompts(model, stream, ids[row : row + 1, :PROMPT])
            decoded, _ = search_nll.continue_with(model, stream, last, ids[row : row + 1, PROMPT:])
        assert cost.chunks.nll[row] == pytest.approx(float(chunks.mean()), abs=1e-4)
        assert cost.decoded.nll[row] == pytest.approx(float(decoded.mean()), abs=1e-4)
    assert (search_nll.exact_until(policy) > 0) == (name != "full")
    assert (abs(cost.chunks.change) > 1e-4) == (name != "full")


TAKEN = {
    "lm_infinite": (lambda window: kvsieve.LMInfinite(window, sinks=0), 24),
    "streaming": (lambda window: kvsieve.StreamingLLM(window - 1, sinks=0), 24),
    "hip": (lambda window: kvsieve.HiP(1, 1, sinks=0, window=window, dense_layers=0), 200),
}


@pytest.mark.parametrize("name", list(TAKEN))
def test_prompts_that_were_taken_over_are_the_full_caches(name: str) -> None:
    """The next query reads the newest keys of the full cache, at their true distance: as transformers does, given these alone."""
    from transformers import DynamicCache

    make, window = TAKEN[name]
    model, ids = tiny.model(), tiny.ids(2, PROMPT + 1)
    with kvsieve.stream(model, kvsieve.Full()) as full:
        full.feed(ids[:, :PROMPT])
        prompts = search_nll.Prompts.of(full)
    with kvsieve.stream(model, make(window)) as stream, torch.no_grad():
        prompts.into(stream)
        assert stream.seen == PROMPT
        got = model(ids[:, PROMPT:], past_key_values=stream.cache).logits
    newest = slice(max(PROMPT + 1 - window, 0), None)
    stock = DynamicCache()
    for index, (k, v) in prompts.layers.items():
        stock.update(k[:, :, newest], v[:, :, newest], index)
    with torch.no_grad():
        want = model(ids[:, PROMPT:], past_key_values=stock, position_ids=torch.tensor([[PROMPT]] * 2)).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_sinks_are_taken_over_too() -> None:
    model, ids = tiny.model(), tiny.ids(1, PROMPT)
    with kvsieve.stream(model, kvsieve.Full()) as full, kvsieve.stream(model, POLICIES["streaming"]) as stream:
        full.feed(ids)
        search_nll.Prompts.of(full).into(stream)
        assert stream.kept()[0].positions.tolist() == [0, 1, *range(PROMPT - 23, PROMPT)]


def test_reads_are_counted() -> None:
    found = measured(tiny.ids(2, PROMPT + AFTER))
    reads = {name: found.cost(name, policy, "dense") for name, policy in POLICIES.items()}
    assert (reads["streaming"].read, reads["streaming"].scored) == (26.0, 0.0)
    assert (reads["lm_infinite"].read, reads["lm_infinite"].scored) == (26.0, 0.0)
    assert reads["full"].read == found.full.read
    # One layer of two reads everything; in the other a query reads what was found, and the window grows while a choice stands.
    assert (found.full.read + 26) / 2 - 1 <= reads["hip"].read <= (found.full.read + 26 + 3) / 2
    assert 0 < reads["hip"].scored < 2 * 16 * 5
    assert reads["infinite"].read < reads["hip"].read


def test_a_policy_that_keeps_by_score_must_read_its_prompt_itself() -> None:
    found = measured(tiny.ids(1, PROMPT + AFTER))
    with pytest.raises(KvsieveError, match="must read the prompt itself"):
        found.cost("x", kvsieve.SirLLM(26, sinks=2, recent=4), "dense")
    assert math.isfinite(found.cost("x", kvsieve.SirLLM(26, sinks=2, recent=4), "own").decoded.change)


def test_policies_that_are_compared_read_as_much() -> None:
    found = search_nll.compared()
    for budget in (512, 1024, 2048):
        until = {name: search_nll.exact_until(policy) for name, policy in found.items() if str(budget) in name}
        assert len(until) == 5
        # A window's query sees itself besides what stays resident.
        assert {count + (name.startswith(("Str", "LM"))) for name, count in until.items()} == {16 + 256 + budget}
    assert {repr(kvsieve.methods.parse(repr(p))) for p in search_nll.swept().values()} == {
        repr(p) for p in search_nll.swept().values()
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "juggling"], "no policy has juggling in its name"),
        (["--policy", "juggle(3)"], "unknown policy"),
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
        (["--resume"], "name it by --json"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", lambda dtype: (tiny.model(), None))
    assert main(["eval", "search", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert says in err[0]


def test_a_run_that_was_interrupted_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, path, ran = tiny.model(), tiny.ids(1, 400), tmp_path / "search.json", list[str]()
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", lambda dtype: (model, lambda *_, **__: {"input_ids": ids}))
    cost = search_nll.Measured.cost

    def once(self: Any, name: str, policy: Any, mode: search_nll.Mode) -> search_nll.Cost:
        if len(ran) == 3:
            ran.append("interrupted")
            raise KeyboardInterrupt
        ran.append(f"{name} {mode}")
        return cost(self, name, policy, mode)

    monkeypatch.setattr(search_nll.Measured, "cost", once)
    policies = ["quest(16, sinks=0, window=64)", "hip(16, sinks=2, window=8, dense_layers=1)"]
    argv = ["eval", "search", "--windows", "2", "--length", "90", "120", "--continuation", "8", "--policy", *policies]
    argv += ["--threads", "1", "--json", str(path)]
    assert main(argv) == 130
    assert "4 rows are in" in capsys.readouterr().err
    held = json.loads(path.read_text())["costs"]
    assert (held[0]["length"], held[0]["policy"]) == (90, "Full()")
    assert main([*argv, "--resume"]) == 0
    after = json.loads(path.read_text())
    assert after["costs"][:4] == held
    # What was interrupted and all of the second length, each once.
    assert ran == [f"{policies[0]} dense", f"{policies[0]} own", f"{policies[1]} dense", "interrupted", f"{policies[1]} own"] + [
        f"{policy} {mode}" for policy in policies for mode in ("dense", "own")
    ]
    assert "prompts of 120 tokens" in capsys.readouterr().out
    # Nothing is left to do, so no model is loaded; a whole run gives the same.
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", None)
    assert main([*argv, "--resume"]) == 0
    assert json.loads(path.read_text()) == after
    assert main([*argv, "--resume", "--continuation", "9"]) == 2
    assert "continuation is 8 there and 9 here" in capsys.readouterr().err
    path.write_text('{"costs": 3}', encoding="utf-8")
    assert main([*argv, "--resume"]) == 2
    assert path.read_text() == '{"costs": 3}'


# -------------------------------------------------------------------------------------------------------------- on the real model


@pytest.fixture(scope="module")
def real(smollm2: tuple[Any, Any]) -> tuple[Any, torch.Tensor]:
    """The small model, and two rows of a text that no release of Python changes: as it is, and from its middle on."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2
    text = "\n\n".join(f"{question}\n{answer}" for question, answer in FILLERS)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    half = ids.shape[1] // 2
    rows = torch.cat([ids, torch.cat([ids[:, half:], ids[:, :half]], 1)])
    assert rows.shape[1] >= 1000
    return model, rows


@pytest.mark.model
def test_what_is_selected_is_worth_more_than_a_window(real: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the text, found by a search, costs next to nothing; sinks and window without it cost a tenth and more."""
    monkeypatch.setattr(search_nll, "CHUNK", 256)
    model, rows = real
    found = search_nll.Measured(model, rows[:1, :930], rows[:1, 930:962], None)
    search = found.cost("HiP", kvsieve.HiP(256, sinks=4, window=64, refresh=1), "dense")
    window = found.cost("window", kvsieve.StreamingLLM(67, sinks=4), "dense")
    print(f"HiP {search.decoded.change:+.4f}, window {window.decoded.change:+.4f}")
    assert search.decoded.change < 0.03
    assert window.decoded.change > 0.10
    # Three layers of thirty read everything.
    assert search.read == pytest.approx(0.9 * (4 + 64 + 256) + 0.1 * found.full.read, abs=2)
    assert window.read == 68


@pytest.mark.model
def test_the_command_prints_a_table_and_writes_json(
    real: tuple[Any, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    model, rows = real
    monkeypatch.setattr("kvsieve.evals.models.load_smollm2", lambda dtype: (model, lambda *_, **__: {"input_ids": rows[:1]}))
    path = tmp_path / "search.json"
    argv = [
        "eval",
        "search",
        "--windows",
        "2",
        "--length",
        "200",
        "--continuation",
        "10",
        "--policy",
        "hip(32, window=32, sinks=4)",
    ]
    assert main([*argv, "--threads", "1", "--json", str(path)]) == 0
    full, dense, own = json.loads(path.read_text())["costs"]
    assert (full["policy"], full["decoded"]["change"], full["decoded"]["error"]) == ("Full()", 0.0, 0.0)
    assert [(x["policy"], x["prompt"], x["length"]) for x in (dense, own)] == [
        ("HiP(budget=32, sinks=4, window=32)", prompt, 200) for prompt in ("dense", "own")
    ]
    assert dense["chunks"] is None
    assert len(own["chunks"]["nll"]) == 2
    assert own["read"] < full["read"]
    out = capsys.readouterr().out
    assert "prompts of 200 tokens" in out
    assert len([line for line in out.splitlines() if line.startswith("hip(32")]) == 4  # as they come, and in the table
