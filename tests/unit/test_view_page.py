"""`stream.record`, the file that it writes, and `kvsieve view FILE`: what is recorded is what the stream held and read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import pytest
import tiny
import torch
from kvsieve.cli import main
from kvsieve.errors import ArgumentError, RangeError, RecordingError, SaveError, StateError
from kvsieve.files.recording_file import COLUMNS, pack, read, unpack, write
from kvsieve.recording import Recorder, _Held, pieces
from kvsieve.view.page import page
from recorded import Recorded, Words

INFLLM = kvsieve.InfLLM(window=16, blocks=2, block=8, sinks=4, query_block=16)
HIP = kvsieve.HiP(16, sinks=2, window=8, dense_layers=1, refresh=4, query_block=16)
EVICTING = kvsieve.HiP(16, sinks=2, window=8, dense_layers=1, query_block=16) | kvsieve.SirLLM(64, sinks=2)
POLICIES: dict[str, Any] = {
    "full": kvsieve.Full(),
    "streaming": kvsieve.StreamingLLM(24, sinks=2),
    "sirllm": kvsieve.SirLLM(24, sinks=2, recent=4, decay=0.5),
    "chain": kvsieve.StreamingLLM(12, sinks=2) >> kvsieve.SirLLM(12, sinks=0, recent=0),
    "snapkv": kvsieve.SnapKV(24, observe=4, kernel=3),
    "h2o": kvsieve.H2O(24, recent=4, sinks=2),
    "infllm": INFLLM,
    "hip": HIP,
    "refreshkv": kvsieve.RefreshKV(16),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def heads_of(policy: Any) -> list[tuple[int | None, int]]:
    per_head = policy.memories[0].roles.evict.per_head
    return [(layer, head) for layer in range(2) for head in range(2)] if per_head else [(None, 0)]


def kept(stream: kvsieve.Stream, layer: int | None, head: int) -> Any:
    return stream.kept()[0] if layer is None else stream.kept(layer, head)[0]


@every_policy
def test_what_is_recorded_is_what_is_held_and_weighed_at_every_step(name: str, tmp_path: Path) -> None:
    policy, ids, seen = POLICIES[name], tiny.ids(1, 260), []
    lanes = heads_of(policy)
    with kvsieve.stream(tiny.model(), policy) as stream, stream.record(tmp_path / "r", Words()):
        for lo, hi in [(0, 70), (70, 140), *((i, i + 1) for i in range(140, 150)), (150, 260)]:
            # One forward a call, so that every step is looked at.
            stream.feed(ids[:, lo:hi], chunk=hi - lo)
            seen.append((stream.stats(), [kept(stream, *lane) for lane in lanes]))
        stream.end_turn()
        seen.append((stream.stats(), [kept(stream, *lane) for lane in lanes]))
    found = Recorded(tmp_path / "r")
    steps = len(found.steps["seen"])
    assert steps in (len(seen), len(seen) - 1), "the end of a turn is a step where it changed something"
    assert found.tokens == [Words().decode([i]) for i in ids[0].tolist()]
    for step, (stats, residents) in enumerate(seen[:steps]):
        assert found.steps["seen"][step] == stats.seen
        assert found.steps["held"][step] == len(residents[0].positions)
        assert found.steps["bytes"][step] == stats.bytes_held
        assert found.steps["full"][step] == stats.seen * stats.bytes_full / stats.seen
        for lane, one in zip(lanes, residents):
            assert found.held(step, *lane) == one.positions.tolist()
            if found.told["scores_at"] == "step":
                told = {p: s for p, s in found.scores(step, *lane).items() if p in set(one.positions.tolist())}
                there = np.isfinite(one.scores)
                assert told == dict(zip(one.positions[there].tolist(), one.scores[there].tolist()))
    assert np.isfinite(found.steps["seconds"][: len(seen) - 1]).all()
    if name == "h2o":
        for lane, one in zip(lanes, seen[-1][1]):
            assert found.scores(steps, *lane) == pytest.approx(dict(zip(one.positions.tolist(), one.scores.tolist())))


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@every_policy
def test_recording_changes_nothing(name: str, backend: str, tmp_path: Path) -> None:
    answers = []
    for recorded in (False, True):
        with kvsieve.stream(tiny.model(), POLICIES[name], backend) as stream:
            recording = stream.record(tmp_path / "r", Words()) if recorded else contextlib.nullcontext()
            with recording:
                told = stream.generate(
                    tiny.ids(1, 120), max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            answers.append((told.sequences, torch.stack(told.logits), stream.stats().as_dict(), stream.kept()[0].positions))
    plain, watched = answers
    assert torch.equal(plain[0], watched[0])
    assert torch.equal(plain[1], watched[1])
    assert plain[2] == watched[2]
    assert np.array_equal(plain[3], watched[3])


@pytest.mark.parametrize("policy", [INFLLM, HIP, EVICTING], ids=["infllm", "hip", "evicting"])
def test_what_was_fetched_is_what_the_trace_tells(policy: Any, tmp_path: Path) -> None:
    ids, told = tiny.ids(1, 160), []
    with kvsieve.stream(tiny.model(), policy) as stream, stream.record(tmp_path / "r", Words()):
        for lo, hi in [(0, 20), (20, 100), *((i, i + 1) for i in range(100, 120)), (120, 160)]:
            stream.feed(ids[:, lo:hi], chunk=hi - lo)
            told.append(stream.trace())
    found = Recorded(tmp_path / "r")
    some = 0
    for step, trace in enumerate(told):
        for layer in trace:
            for head, one in enumerate(layer.rows[0]):
                selected = found.selected(step, layer.index, head)
                assert (selected is None) == layer.dense
                if selected is not None:
                    assert selected == [tuple(pair) for pair in one.found.tolist()]
                    some += len(selected)
    assert some > 100
    assert (found.told["reads"]["first"], found.told["reads"]["newest"]) == (policy.selection or policy.fetching).always_read


def test_what_was_taken_back_is_not_recorded(tmp_path: Path) -> None:
    a, b, c = (tiny.ids(1, n, seed) for n, seed in ((60, 1), (40, 2), (30, 3)))
    with kvsieve.stream(tiny.model(), kvsieve.SirLLM(24, sinks=2, recent=4)) as stream, stream.record(tmp_path / "r", Words()):
        stream.feed(a)
        mark = stream.mark()
        for other in (b, c):
            stream.rewind(mark)
            stream.feed(other)
        last = stream.kept()[0].positions.tolist()
    found = Recorded(tmp_path / "r")
    assert found.tokens == [Words().decode([i]) for i in torch.cat([a, c], 1)[0].tolist()]
    assert found.held(len(found.steps["seen"]) - 1) == last
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream, stream.record(tmp_path / "r", Words()):
        stream.feed(a)
        stream.reset()
        stream.feed(c)
    assert Recorded(tmp_path / "r").tokens == [Words().decode([i]) for i in c[0].tolist()]


def test_a_reset_is_forgotten_and_what_broke_the_block_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        with stream.record(tmp_path / "r", Words()):
            stream.feed(tiny.ids(1, 70))
            stream.reset()
            stream.feed(tiny.ids(1, 9, 4))
        assert len(read(tmp_path / "r")["tokens"]) == 9

        def breaks() -> None:
            (tmp_path / "gone").rmdir()
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"), stream.record(tmp_path / "gone" / "r", Words()):
            breaks()


def test_tokens_may_come_back_and_leave_again(tmp_path: Path) -> None:
    """A pin in a chain brings tokens back to its first memory; one that is evicted by name leaves for good."""
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream, stream.record(tmp_path / "r", Words()):
        stream.feed(tiny.ids(1, 40))
        stream.evict(10, 20)
        stream.feed(tiny.ids(1, 5, 1))
    found = Recorded(tmp_path / "r")
    assert found.held(0) == list(range(40))
    assert found.held(1) == [*range(10), *range(20, 45)]
    recorder = _Held(1)
    for step, gone in enumerate(([], [1, 2], [2], [1, 2, 3], [1])):
        now = np.ones((1, 5), bool)
        now[0, gone] = False
        recorder.update(step, now)
    held = [{"layer": None, "heads": 1, **recorder.packed(5)}]
    write(tmp_path / "r", recording(["x"] * 5, [5] * 5, held))
    assert [Recorded(tmp_path / "r").held(step) for step in range(5)] == [
        [0, 1, 2, 3, 4], [0, 3, 4], [0, 1, 3, 4], [0, 4], [0, 2, 3, 4]]  # fmt: skip
    recorder.cut(3)
    write(tmp_path / "r", recording(["x"] * 5, [5] * 3, [{"layer": None, "heads": 1, **recorder.packed(5)}]))
    assert Recorded(tmp_path / "r").held(2) == [0, 1, 3, 4]


def test_a_block_that_breaks_is_written_and_a_recorder_that_breaks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.ids(1, 40)

    def broken(stream: kvsieve.Stream, name: str) -> None:
        with stream.record(tmp_path / name, Words()):
            stream.feed(ids)
            if name == "block":
                raise ZeroDivisionError

    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        with pytest.raises(ZeroDivisionError):
            broken(stream, "block")
        assert len(Recorded(tmp_path / "block").tokens) == 40
        monkeypatch.setattr(Recorder, "_look_at_reads", lambda *_: {}["recorder"])
        with pytest.raises(KeyError, match="recorder"):
            broken(stream, "recorder")
        assert stream.seen == 80, "the stream went on"


def test_wrong_arguments(tmp_path: Path) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.feed(tiny.ids(2, 4))
        for arguments, error in (
            ((tmp_path / "r", None), ArgumentError),
            ((3, Words()), ArgumentError),
            ((tmp_path, Words()), SaveError),
            ((tmp_path / "no" / "r", Words()), SaveError),
        ):
            with pytest.raises(error), stream.record(*arguments):
                pytest.fail("it began")
        for row in (2, -1):
            with pytest.raises(RangeError), stream.record(tmp_path / "r", Words(), row=row):
                pytest.fail("it began")
        with stream.record(tmp_path / "r", Words(), row=1):
            stream.feed(tiny.ids(2, 4, 1))
        assert Recorded(tmp_path / "r").tokens == [Words().decode([i]) for i in stream.ids[1].tolist()]
    with pytest.raises(StateError):
        stream.record(tmp_path / "r", Words())


# ------------------------------------------------------------------------------------------------------------------------- text


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", ["sea", "a é🌊 b", "日本語🌊🌊", ""])
def test_bytes_that_are_no_characters_wait_for_the_rest(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == text
    assert len(found) == len(ids) == len(text.encode())
    assert [len(part) for part in found] == [n for letter in text for n in [0] * (len(letter.encode()) - 1) + [1]]


def test_bytes_that_never_become_a_character_are_told_too() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a🌊")["input_ids"][:3] + tokenizer("b")["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == "a\ufffdb"
    assert pieces(tokenizer, [-1, *ids[:1]]) == ["▢", "a"]


def test_spaces_between_words_stay() -> None:
    """A decoder that drops the first space of a text, as those of sentencepiece do."""

    class Sentence:
        def decode(self, ids: Any) -> str:
            return "".join([" the", " sea", "s"][i] for i in ids).removeprefix(" ")

    assert pieces(Sentence(), [0, 1, 2, 1]) == ["the", " sea", "s", " sea"]


# ------------------------------------------------------------------------------------------------------------------------- files


def recording(tokens: list[str], seen: list[int], holds: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    steps = {name: pack(seen, dtype) for name, dtype in COLUMNS.items()}
    left = {"left": pack([-1] * len(tokens), "<i4"), "again": pack([], "<i4"), "scores": None}
    told: dict[str, Any] = {"policy": "Full()", "model": "M", "backend": "cpu", "date": "today", "tokens": tokens, "steps": steps}
    return {**told, "holds": holds or [{"layer": None, "heads": 1, **left}], "scores_at": "step", "reads": None, **more}


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    told = json.loads(json.dumps({"format": "kvsieve recording", "version": 1, **recording(["a", "b"], [1, 2])}))
    change(told)
    return json.dumps(told).encode()


LANE = {"layer": 0, "head": None, "step": pack([0], "<i4"), "count": pack([2], "<i4"), "ranges": pack([0, 1], "<i4")}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "no text": (b"\xff\xfe", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "another": (b'{"a": 1}', "no recording of a stream"),
    "a list": (b"[]", "no recording of a stream"),
    "version": (changed(lambda t: t.update(version=9)), "version 9, this kvsieve reads version 1"),
    "no steps": (changed(lambda t: t.update(recording([], []))), "no step"),
    "no policy": (changed(lambda t: t.pop("policy")), "'policy'"),
    "numbers for tokens": (changed(lambda t: t.update(tokens=[1, 2])), "'tokens'"),
    "too few tokens": (changed(lambda t: t["tokens"].pop()), "1 tokens"),
    "a column of another length": (changed(lambda t: t["steps"].update(held=pack([1], "<i4"))), "different lengths"),
    "backwards": (changed(lambda t: t["steps"].update(seen=pack([3, 2], "<i4"))), "do not lead"),
    "no base64": (changed(lambda t: t["steps"].update(seen="!")), "unpacked"),
    "not packed": (changed(lambda t: t["steps"].update(seen="AAAA")), "unpacked"),
    "cut": (changed(lambda t: t["steps"].update(seen=t["steps"]["seen"][:-4])), "cut"),
    "a bomb": (
        changed(lambda t: t["holds"][0].update(left=base64.b64encode(zlib.compress(bytes(1 << 26))).decode())), "longer than"),
    "a step that is none": (changed(lambda t: t["holds"][0].update(left=pack([-1, 2], "<i4"))), "'left'"),
    "heads": (changed(lambda t: t["holds"][0].update(heads=1 << 40)), "heads that are none"),
    "nothing held": (changed(lambda t: t.update(holds=[])), "'holds'"),
    "ranges": (changed(lambda t: t.update(reads={"first": 1, "newest": 1, "of": [LANE]})), "different lengths"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, says = BAD[name]
    (tmp_path / "bad.json").write_bytes(data)
    assert main(["view", str(tmp_path / "bad.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.json" in line
    assert says in line
    assert not list(tmp_path.glob("*.html"))


def test_files_that_cannot_be_read_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "r.json", recording(["a"], [1]))
    write(tmp_path / "r.html", recording(["a"], [1]))
    for argv, says in (
        ([tmp_path / "none.json"], "No such file"),
        ([tmp_path], "Is a directory"),
        ([tmp_path / "r.html"], "would replace"),
    ):
        assert main(["view", *map(str, argv)]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["view", str(tmp_path / "r.json"), "--out", str(tmp_path / "no" / "page.html")])
    read(tmp_path / "r.html")


def test_a_recording_without_a_forward_has_no_page(tmp_path: Path) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream, stream.record(tmp_path / "r", Words()):
        pass
    with pytest.raises(RecordingError, match="read nothing while it was recorded"):
        read(tmp_path / "r")


# -------------------------------------------------------------------------------------------------------------------------- page


def test_the_page_holds_the_recording_and_nothing_of_it_is_html() -> None:
    words = ["</script><script>alert(1)</script>", "<!--", "&amp;", "@SCRIPT@", "\u2028", '"', "\\"]
    told = recording(words, [7], policy="<b>@STYLE@</b>")
    made = page(told, title="<i>")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", made, re.DOTALL)
    assert len(scripts) == 2
    assert "<!--" not in scripts[0][1]
    assert json.loads(scripts[0][1]) == told
    assert "<b>" not in made
    assert "<title>&lt;i&gt;</title>" in made


def test_the_page_lets_its_own_script_and_style_run_alone() -> None:
    made = page(recording(["a"], [1]))
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', made)[0]
    script, style = (
        re.findall(r"<script>(.*?)</script>", made, re.DOTALL)[0],
        re.findall(r"<style>(.*?)</style>", made, re.DOTALL)[0],
    )
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"\b(?:src|href|action)=|url\(|@import|https?://|style=", made)


def test_a_session_file_is_one_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvsieve.view.session import recording_of

    for name in ("sirllm", "snapkv", "chain", "infllm"):
        policy, file = POLICIES[name], tmp_path / f"{name}.safetensors"
        with kvsieve.stream(tiny.model(), policy) as stream:
            stream.feed(tiny.ids(1, 100))
            stream.save(file)
            now = [kept(stream, *lane) for lane in heads_of(policy)]
            ids = stream.ids[0].tolist()
        assert main(["view", str(file)]) == 0
        write(tmp_path / "r", recording_of(file, None))
        found = Recorded(tmp_path / "r")
        assert [found.held(0, *lane) for lane in heads_of(policy)] == [one.positions.tolist() for one in now]
        assert found.tokens == [f"{token} " for token in ids]
        if name == "sirllm":
            there = np.isfinite(now[0].scores)
            assert found.scores(0) == dict(zip(now[0].positions[there].tolist(), now[0].scores[there].tolist()))
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.save(tmp_path / "none.safetensors")
    capsys.readouterr()
    assert main(["view", str(tmp_path / "none.safetensors")]) == 2
    assert "holds no token" in capsys.readouterr().err
    data = bytearray((tmp_path / "sirllm.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "cut.safetensors").write_bytes(data)
    assert main(["view", str(tmp_path / "cut.safetensors")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.model
@pytest.mark.usefixtures("loaded")
def test_the_command_records_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, text = tmp_path / "run.json", "The sea 🌊 is " * 30
    argv = ["generate", "--model", "smollm2", "--policy", "sirllm(64)", "--prompt", text, "--max-new-tokens", "3"]
    assert main([*argv, "--record", str(file)]) == 0
    found = Recorded(file)
    assert "".join(found.tokens).startswith(text)
    assert "" in found.tokens
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    assert main(["view", str(file), "--out", str(tmp_path / "p.html"), "--open"]) == 0
    assert opened == [(tmp_path / "p.html").as_uri()]
    assert unpack(found.told["steps"]["seen"], "<i4", 1000)[-1] == len(found.tokens)
