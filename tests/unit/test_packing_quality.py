"""What compression costs: the measure itself, and channels chosen by ThinK, by key norm and at random on a real model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from eval_cases import Letters
from kvsieve import policy as roles
from kvsieve.cli import main
from kvsieve.errors import KvsieveError
from kvsieve.evals import packing_nll
from kvsieve.evals.packing_nll import AtRandom, ByKeyNorm
from kvsieve.evals.shopping_text import FILLERS
from kvsieve.methods.think import ChannelPruned

# ----------------------------------------------------------------------------------------------------------------- the measure

PACKED = {
    "think": kvsieve.ThinK(0.5),
    "single": kvsieve.ThinK(0.4, channels="single"),
    "key_norm": roles.Memory(storage=ByKeyNorm(0.5)),
    "random": roles.Memory(storage=AtRandom(0.5)),
    "codes": kvsieve.Quantized(4, group=8),
    "think_codes": kvsieve.ThinK(0.5) | kvsieve.Quantized(2, group=16),
    "flushed": kvsieve.ThinK(0.5, flush_every=24),
}


@pytest.mark.parametrize("name", list(PACKED))
@pytest.mark.parametrize("prompt", [128, 141])
def test_a_continuation_in_chunks_is_the_one_token_by_token(name: str, prompt: int) -> None:
    """And a prefix that was read once for all policies is the same as reading it."""
    model, ids = tiny.model(), tiny.ids(1, prompt + 70)
    head = prompt - packing_nll.TAIL
    prefix = packing_nll.read_prefix(model, ids[:, :head])
    chunks, held = packing_nll.losses(model, PACKED[name], prefix, ids[:, head:prompt], ids[:, prompt:])
    tokens, alone = packing_nll.losses(model, PACKED[name], None, ids[:, :prompt], ids[:, prompt:], by_token=True)
    full, _ = packing_nll.losses(model, kvsieve.Full(), prefix, ids[:, head:prompt], ids[:, prompt:])
    assert chunks.shape == (70,)
    assert held == alone
    # A key that a matrix product rounds the other way, as it may on another processor, may fall to the next of 16 codes.
    torch.testing.assert_close(chunks, tokens, rtol=0, atol=3e-4 if "codes" in name else 1e-4)
    assert float((chunks - full).abs().max()) > 1e-3, "nothing was packed"
    assert float(chunks[0]) == pytest.approx(float(full[0]), abs=1e-5)  # predicted before anything was packed


def test_thinking_of_nothing_changes_nothing() -> None:
    model, ids = tiny.model(), tiny.ids(1, 200)
    full, _ = packing_nll.losses(model, kvsieve.Full(), None, ids[:, :130], ids[:, 130:])
    for policy in (kvsieve.ThinK(0.0), roles.Memory(storage=ByKeyNorm(0.0)), roles.Memory(storage=AtRandom(0.0))):
        same, _ = packing_nll.losses(model, policy, None, ids[:, :130], ids[:, 130:])
        torch.testing.assert_close(same, full, rtol=0, atol=1e-5)


def test_a_price_is_paired() -> None:
    """The windows differ by whole nats, the policies by a tenth in each: no doubt about a tenth."""
    cost = packing_nll.price("x", 0.8, [1.1, 3.1, 2.1], [1.0, 3.0, 2.0])
    assert cost.change == pytest.approx(math.expm1(0.1))
    assert cost.error == pytest.approx(0, abs=1e-9)
    assert cost.perplexity == pytest.approx(math.exp(2.1))
    assert packing_nll.price("x", 0.8, [1.1, 3.3], [1.0, 3.0]).error == pytest.approx(math.exp(0.2) * 0.1)
    assert math.isnan(packing_nll.price("x", 0.8, [1.1], [1.0]).error)
    with pytest.raises(KvsieveError, match="2 windows cannot be compared with 1"):
        packing_nll.price("x", 0.8, [1.1, 1.2], [1.0])


def test_windows_do_not_overlap() -> None:
    ids = torch.arange(103)[None]
    assert [w[0].tolist() for w in packing_nll.windows(ids, 3, 30)] == [list(range(x, x + 30)) for x in (0, 34, 68)]
    with pytest.raises(KvsieveError, match="4 windows of 30 tokens need 120, the text has 103"):
        packing_nll.windows(ids, 4, 30)


def test_random_channels_are_drawn_anew_for_each_layer_and_seed() -> None:
    shape = roles.LayerShape(0, 2, 16, 16)
    keys = torch.randn(2, 40, 16)

    def drawn(layer: int, seed: int) -> list[list[int]]:
        seen = roles.StorageObservation(roles.LayerShape(layer, 2, 16, 16), keys[:, :0], keys, 40, None, pre_rope=False)
        return AtRandom(0.5, seed=seed).choose_channels(seen).index.tolist()

    assert AtRandom(0.5).packing(shape).key_kept == 8
    assert drawn(0, 0) == drawn(0, 0)
    assert len({json.dumps(drawn(layer, seed)) for layer in range(3) for seed in range(3)}) == 9


def test_key_norm_looks_at_keys_to_be_compressed_only() -> None:
    keys = torch.ones(1, 10, 8)
    keys[:, :8, [1, 3]] = 2.0
    keys[:, 8:, [0, 2]] = 99.0
    seen = roles.StorageObservation(roles.LayerShape(0, 1, 8, 8), keys[:, :0], keys, 8, None, pre_rope=False)
    # Without a rotation, the channels of a pair are half a head apart.
    assert ByKeyNorm(0.5).choose_channels(seen).index.tolist() == [[1, 3, 5, 7]]


@pytest.mark.parametrize("argv", [["eval"], ["eval", "juggling"], ["eval", "packing", "--windows", "0"]])
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: kvsieve" in capsys.readouterr().err


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text, and the tiny model wherever a model is asked for."""
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: (tiny.model(), Letters()))
    path = tmp_path / "text.txt"
    path.write_text("The history of the sea is the history of people who crossed it. " * 8)
    return path


def command(text: Path, *more: str) -> list[str]:
    sizes = ["--windows", "2", "--prompt", "150", "--continuation", "40", "--threads", "1"]
    return ["eval", "packing", "--model", "mine", "--text", str(text), *sizes, *more]


def test_policies_of_all_kinds_on_a_model_of_ones_own(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What each reads is what it would read alone: nobody takes over what the full cache has read who would not hold it."""
    wanted = ["streamingllm(64)", "think(0.4)", "quest(64)", "snapkv(64) | quantized(4, group=8)"]
    path = text.with_suffix(".json")
    assert main(command(text, "--policy", *wanted, "--json", str(path))) == 0
    found = json.loads(path.read_text())["prices"]
    policies = {repr(policy): policy for policy in map(kvsieve.methods.parse, wanted)}
    assert [row["name"] for row in found] == ["Full()", *policies]
    windows = packing_nll.windows(Letters()(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"], 2, 190)
    for row in found[1:]:
        for ids, nll in zip(windows, row["nll"]):
            alone, _ = packing_nll.losses(tiny.model(), policies[row["name"]], None, ids[:, :150], ids[:, 150:])
            assert nll == pytest.approx(float(alone.mean()), abs=1e-4)
    assert capsys.readouterr().out.splitlines()[-1].startswith(repr(kvsieve.methods.parse(wanted[-1])))


def test_what_is_in_the_file_is_not_read_again(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = text.with_suffix(".json")
    again = ["--policy", "streamingllm(64)", "think(0.4)", "--json", str(path)]
    losses, calls = packing_nll.losses, []

    def stopped(model: Any, policy: Any, *rest: Any, **options: Any) -> Any:
        calls.append(repr(policy))
        if "ThinK" in repr(policy) and calls.count(repr(policy)) == 2:
            raise KeyboardInterrupt
        return losses(model, policy, *rest, **options)

    monkeypatch.setattr(packing_nll, "losses", stopped)
    assert main(command(text, *again)) == 130
    assert f"2 policies are in {path}" in capsys.readouterr().err
    held = json.loads(path.read_text())["prices"]
    calls.clear()
    monkeypatch.setattr(packing_nll, "losses", losses)
    assert main(command(text, *again, "--resume")) == 0
    assert json.loads(path.read_text())["prices"][:2] == held
    monkeypatch.setattr("kvsieve.evals.models.load_model", lambda name, dtype: pytest.fail("nothing is left to read"))
    assert main(command(text, *again, "--resume")) == 0
    assert main([*command(text, *again, "--resume"), "--prompt", "151"]) == 2
    assert "is of another run: prompt is 150 there and 151 here" in capsys.readouterr().err
    for rows in ("[]", '{"settings": {}, "prices": [{"name": "x"}]}'):
        path.write_text(rows)
        assert main(command(text, *again, "--resume")) == 2
        assert "was not written by this command" in capsys.readouterr().err
        assert path.read_text() == rows


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "nothing(3)"], "nothing"),
        (["--policy", "full()", "--quick"], "--only and --quick"),
        (["--only", "nobody"], "no policy has 'nobody' in its name"),
        (["--resume"], "name it by --json"),
        (["--prompt", "4000"], "give a longer text"),
    ],
)
def test_what_cannot_be_compared_is_one_line(text: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(text, *more)) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


# -------------------------------------------------------------------------------------------------------------- on the real model


class Spy(roles.StorageRule):
    """Keeps what a pack role is shown, and packs with every channel."""

    def __init__(self, observe: int) -> None:
        self.observe, self.seen = observe, dict[int, roles.StorageObservation]()

    def packing(self, layer: roles.LayerShape) -> roles.Packing:
        return roles.Packing(layer.key_dim)

    def idle(self, layer: roles.LayerShape) -> bool:
        return False

    def choose_channels(self, seen: roles.StorageObservation) -> roles.Channels:
        self.seen[seen.layer.index] = seen
        return super().choose_channels(seen)


PROMPT, AFTER, RECENT, OBSERVE = 1024, 64, 32, 32


def total_variation(seen: roles.StorageObservation, channels: torch.Tensor) -> float:
    """How far the weights of the queries after the prompt move when all keys of the prompt but the newest keep ``channels``
    ``[Hkv, kept]`` only: the mean total variation, 0 to 1."""
    heads, dim = seen.keys.shape[0], seen.keys.shape[2]
    q = seen.queries[:, -AFTER:].view(heads, -1, AFTER, dim)
    k = seen.keys[:, None]
    mask = torch.zeros(heads, dim).scatter_(1, channels, 1.0)
    thinned = k.clone()
    thinned[:, :, : PROMPT - RECENT] *= mask[:, None, None]
    future = torch.ones(AFTER, PROMPT + AFTER, dtype=torch.bool).triu(PROMPT + 1)
    whole, packed = (
        (q @ keys.transpose(-1, -2) / math.sqrt(dim)).masked_fill(future, -math.inf).softmax(-1) for keys in (k, thinned)
    )
    return float((whole - packed).abs().sum(-1).mean()) / 2


@pytest.fixture(scope="module")
def real(smollm2: tuple[Any, Any]) -> tuple[Any, torch.Tensor]:
    """The small model, and a text that no release of Python changes."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2
    text = "\n\n".join(f"{question}\n{answer}" for question, answer in FILLERS)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, : PROMPT + AFTER]
    assert ids.shape[1] == PROMPT + AFTER
    return model, ids


@pytest.mark.model
@pytest.mark.parametrize("policy", ["ThinK(0.4)", "ThinK(0.2) | Quantized(4)"])
def test_a_real_continuation_in_chunks_is_the_one_token_by_token(real: tuple[Any, torch.Tensor], policy: str) -> None:
    model, ids = real
    made = kvsieve.methods.parse(policy)
    # After 14 tokens another group of 32 is full, and ten follow.
    prompt, continuation = ids[:, :178], ids[:, 178:202]
    chunks, held = packing_nll.losses(model, made, None, prompt, continuation)
    assert held < 0.95, "the prompt was not compressed"
    tokens, _ = packing_nll.losses(model, made, None, prompt, continuation, by_token=True)
    torch.testing.assert_close(chunks, tokens, rtol=0, atol=2e-3)


@pytest.mark.model
def test_think_has_the_least_error_on_a_real_model_then_key_norm_then_random(real: tuple[Any, torch.Tensor]) -> None:
    """By the weights of the queries that come after the prompt, all layers and heads, at ratio 0.4 and above."""
    model, ids = real
    spy = Spy(AFTER + OBSERVE)
    with kvsieve.stream(model, roles.Memory(storage=spy)) as stream:
        stream.feed(ids)
        stream.end_turn()
    assert len(spy.seen) == 30

    def mean(rule: roles.StorageRule) -> float:
        errors = []
        for seen in spy.seen.values():
            # What the rule would have been shown when the prompt ended.
            then = roles.StorageObservation(
                seen.layer, seen.queries[:, :OBSERVE], seen.keys[:, :PROMPT], PROMPT - RECENT, seen.rope, pre_rope=False
            )
            errors.append(total_variation(seen, rule.choose_channels(then).index))
        return sum(errors) / len(errors)

    assert mean(ChannelPruned(0.0)) == 0.0
    for ratio in (0.4, 0.5, 0.6):
        think, norm, lots = mean(ChannelPruned(ratio)), mean(ByKeyNorm(ratio)), mean(AtRandom(ratio))
        print(f"ratio {ratio}: ThinK {think:.4f}, key norm {norm:.4f}, at random {lots:.4f}")
        assert 0.0 < think < norm < lots < 1.0
    assert mean(ChannelPruned(0.4)) < mean(ChannelPruned(0.6))


@pytest.mark.model
@pytest.mark.usefixtures("loaded")
def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "packing.json"
    argv = ["eval", "packing", "--quick", "--windows", "2", "--prompt", "160", "--continuation", "40", "--only", "at random"]
    assert main([*argv, "--threads", "1", "--json", str(path)]) == 0
    full, lots = json.loads(path.read_text())["prices"]
    assert (full["name"], full["change"], full["error"]) == ("Full()", 0.0, 0.0)
    assert lots["name"] == "at random, 0.4"
    assert lots["change"] > 0.1
    assert len(lots["nll"]) == 2
    out = capsys.readouterr().out
    assert "at random, 0.4" in out.splitlines()[-1]
