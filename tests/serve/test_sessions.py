"""Conversations on disk: they come back as they were, and whatever is wrong with a file, a conversation is read again at worst."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import serve_cases as cases
import tiny
from kvsieve.errors import SaveError, ServiceError, UnsupportedError
from serve_cases import FIRST, THEN, answer, job, rendered, said, same
from systems import SYSTEMS


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


# --------------------------------------------------------------------------------------------------------------------- coming back


@pytest.mark.parametrize("name", ["full", "sirllm", "snapkv", "quest", "think_quantized"])
def test_a_conversation_goes_on_after_a_restart(name: str, tmp_path: Path) -> None:
    """With the same probabilities as one that was never stopped, whose tokens lie in other runs of blocks."""
    policy = SYSTEMS[name].make()
    with cases.service(policy) as service:
        messages = said(service)
        want = answer(service, messages, logprobs=4)
    with cases.service(policy, sessions=tmp_path) as service:
        assert said(service) == messages
    with cases.service(policy, sessions=tmp_path) as service:
        found = answer(service, messages, logprobs=4)
        assert service.snapshot().loads == 1
        assert service.snapshot().rereads == 0
    same(found, want)
    assert found.usage().cached > 0


def test_what_leaves_memory_comes_back_from_its_file(tmp_path: Path) -> None:
    policy = kvsieve.Full()
    with cases.service(policy) as service:
        want = {name: answer(service, said(service, name, name * 400), logprobs=2, owner=name) for name in "abcde"}
    with cases.service(policy, memory=700_000, sessions=tmp_path) as service:
        pasts = {name: said(service, name, name * 400) for name in "abcde"}
        assert service.snapshot().evictions > 0
        for name, past in pasts.items():
            found = answer(service, past, logprobs=2, owner=name)
            same(found, want[name])
        counts = cases.settled(service)
        assert counts.loads >= 3
        assert counts.rereads == 0
        assert counts.bytes_held <= 700_000


def test_a_conversation_has_two_files_of_its_newest_ends(tmp_path: Path) -> None:
    """One who was not told of the newest answer, because the server was killed, asks for it again."""
    with cases.service(kvsieve.SirLLM(64, recent=8), sessions=tmp_path, durable=True) as service:
        messages = said(service)
        for turn in range(3):
            before = messages
            messages = [*messages, ("assistant", answer(service, messages).text()), THEN]
            assert len(files(tmp_path)) == 4, turn
        other = answer(service, [*messages[:-2], ("assistant", "no"), THEN])
        assert len(files(tmp_path)) == 6
        assert other.error is None
    for asked in (before, messages):
        with cases.service(kvsieve.SirLLM(64, recent=8), sessions=tmp_path) as service:
            heard = answer(service, asked)
            assert heard.usage().cached > 0
            assert not heard.usage().read_again


def test_restarts_leave_no_more_files(tmp_path: Path) -> None:
    messages = FIRST
    for _ in range(4):
        with cases.service(kvsieve.SirLLM(64, recent=8), sessions=tmp_path) as service:
            for _ in range(2):
                messages = [*messages, ("assistant", answer(service, messages).text()), THEN]
        assert len(files(tmp_path)) <= 4


def test_files_are_their_owners_and_tell_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "sessions"
    with cases.service(kvsieve.Full(), sessions=folder) as service:
        said(service, "somebody@example")
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
        assert "somebody" not in path.name
    (told,) = folder.rglob("*.json")
    assert "ships" not in told.read_text()
    assert "somebody" not in told.read_text()


def test_an_owner_finds_nothing_of_another_after_a_restart(tmp_path: Path) -> None:
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        messages = said(service, "ada")
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        assert answer(service, messages, owner="bob").usage().cached == 0
        assert answer(service, messages, owner="ada").usage().cached > 0


def test_a_durable_answer_is_on_the_disk_when_its_end_is_told(tmp_path: Path) -> None:
    there: list[int] = []

    class Looks(cases.Heard):
        def end(self, choice: int, reason: str, usage: Any) -> None:
            there.append(len(files(tmp_path)))
            super().end(choice, reason, usage)

    with cases.service(kvsieve.Full(), sessions=tmp_path, durable=True) as service:
        heard = Looks()
        service.submit(job(FIRST), heard)
        heard.wait()
    assert there == [2]


# -------------------------------------------------------------------------------------------------------------------- what is wrong


def damaged(folder: Path, how: str) -> None:
    """Change the files of the one conversation in a folder."""
    (told,), (data,) = folder.rglob("*.json"), folder.rglob("*.safetensors")
    if how == "no description":
        told.unlink()
    elif how == "no stream":
        data.unlink()
    elif how == "a flipped bit":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 4
        data.write_bytes(bytes(raw))
    elif how == "a cut":
        data.write_bytes(data.read_bytes()[:-7])
    elif how == "no JSON":
        told.write_bytes(b"\xff{")
    elif how == "another place":
        told.parent.rename(folder / ("0" * 32))
    elif how == "another stream":
        with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
            stream.feed(tiny.ids(1, 9))
            stream.save(data)
        told.write_text(json.dumps({**json.loads(told.read_text()), "size": data.stat().st_size}))
    elif how == "half-written":
        told.unlink()
        data.with_name(f".{data.name}.0123.partial").write_bytes(b"half")
    else:
        name, value = {"a number": ("tokens", True), "a digest": ("digest", "xy"), "a field": ("more", 1)}[how]
        told.write_text(json.dumps({**json.loads(told.read_text()), name: value}))


DAMAGES = [
    *("no description", "no stream", "a flipped bit", "a cut", "no JSON", "another place", "another stream", "half-written"),
    *("a number", "a digest", "a field"),
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]], list[int]]:
    """A folder with one conversation, its messages, and the answer to come."""
    folder = tmp_path_factory.mktemp("kept")
    with cases.service(kvsieve.Full(), sessions=folder) as service:
        messages = said(service)
    with cases.service(kvsieve.Full()) as service:
        return folder, messages, answer(service, messages, owner="nobody").ids()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_state_is_none_and_is_read_again(
    how: str, kept: tuple[Path, list[tuple[str, str]], list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    folder, messages, want = kept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damaged(tmp_path, how)
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        found = answer(service, messages)
        counts = service.snapshot()
        assert found.ids() == want
        assert found.usage().cached == 0
        assert found.usage().read_again
        assert counts.rereads == 1
        assert counts.unusable + (how in ("no description", "half-written")) == 1
    told = [record.getMessage() for record in caplog.records if record.name == "kvsieve.serve"]
    assert len(told) == counts.unusable
    assert not list(tmp_path.rglob("*.partial"))
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        later = answer(service, [*messages, ("assistant", found.text()), THEN])
        assert later.usage().cached > 0, "what was written since is whole"


@pytest.mark.parametrize("change", ["policy", "model", "tokenizer"])
def test_states_of_others_are_none_and_stay(
    change: str, kept: tuple[Path, list[tuple[str, str]], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder, messages, _ = kept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    policy, model = kvsieve.Full(), tiny.model()
    if change == "policy":
        policy = kvsieve.StreamingLLM(400)
    elif change == "model":
        model = tiny.model(seed=4)
    else:
        monkeypatch.setattr(cases.Letters, "special_tokens_map", {"eos_token": "$"})
    with cases.service(policy, model, sessions=tmp_path) as service:
        found = answer(service, messages)
        assert found.usage().cached == 0
        assert service.snapshot().unusable == 0
    monkeypatch.undo()
    assert len(files(tmp_path)) == 4
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        assert answer(service, messages).usage().cached > 0


def test_a_disk_that_fails_costs_nothing_but_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = kvsieve.Full()
    with cases.service(policy, sessions=tmp_path) as service:

        def fails(*_: Any, **__: Any) -> None:
            raise SaveError("the disk is full")

        monkeypatch.setattr(kvsieve.Stream, "save", fails)
        messages = said(service)
        assert answer(service, messages).usage().cached > 0
        assert service.snapshot().errors == 0
    assert files(tmp_path) == []
    assert any("disk is full" in record.getMessage() for record in caplog.records)
    with cases.service(policy, sessions=tmp_path, durable=True) as service:
        with pytest.raises(SaveError, match="disk is full"):
            said(service)
        monkeypatch.undo()
        assert answer(service, FIRST).error is None
        assert len(files(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_a_durable_answer_that_no_file_may_hold_has_no_end(tmp_path: Path) -> None:
    with cases.service(kvsieve.Full(), sessions=tmp_path, disk=1000, durable=True) as service:
        with pytest.raises(SaveError, match="limit is 1,000"):
            said(service)
        assert files(tmp_path) == []


def test_files_are_written_where_descriptors_are_inherited_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no ``O_CLOEXEC``."""
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        monkeypatch.delattr(os, "O_CLOEXEC", raising=False)
        said(service)
    assert len(files(tmp_path)) == 2


def test_files_stay_within_their_bytes(tmp_path: Path) -> None:
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        said(service)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    names = "abcde"
    with cases.service(kvsieve.Full(), sessions=tmp_path, disk=3 * size, durable=True) as service:
        pasts = {name: said(service, name) for name in names}
        assert cases.settled(service).bytes_stored <= 3 * size
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3 * size
    with cases.service(kvsieve.Full(), sessions=tmp_path, disk=2 * size) as service:
        assert len(files(tmp_path)) == 4
        assert answer(service, pasts["e"], 1, owner="e").usage().cached > 0, "those used last stay"
        assert answer(service, pasts["c"], 1, owner="c").usage().cached == 0
    with cases.service(kvsieve.Full(), sessions=tmp_path, disk=size // 2) as service:
        assert files(tmp_path) == []
        past = said(service)
        assert answer(service, past).usage().cached > 0
    assert files(tmp_path) == []


def test_a_file_that_makes_room_for_others_is_read_again(tmp_path: Path) -> None:
    """The conversation that comes back is the one whose file goes, because another one leaves a full memory for a full disk."""
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        past = said(service, "a", "a" * 400)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    with cases.service(kvsieve.Full(), sessions=tmp_path, disk=size * 6 // 5, memory=size * 8 // 5) as service:
        said(service, "b", "b" * 400)
        cases.settled(service)
        assert answer(service, past, owner="a").usage().read_again
        assert service.snapshot().failed == 0


def test_a_damaged_state_may_have_cost_the_one_before_it_its_place(tmp_path: Path) -> None:
    system = ("system", "s" * 100)
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        messages = [system, ("user", "a" * 300)]
        past = [*messages, ("assistant", answer(service, messages, owner="a").text()), THEN]
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with cases.service(kvsieve.Full(), sessions=tmp_path, memory=len(data) * 3 // 2) as service:
        answer(service, [system, ("user", "b" * 200)], owner="a")
        assert cases.settled(service).states > 1
        assert answer(service, past, owner="a").usage().cached == 0
        counts = cases.settled(service)
        assert (counts.failed, counts.unusable) == (0, 1)


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(SaveError, match="cannot keep conversations"):
        cases.service(kvsieve.Full(), sessions=file)
    with (
        cases.service(kvsieve.Full(), sessions=tmp_path / "one"),
        pytest.raises(ServiceError, match="another process"),
    ):
        cases.service(kvsieve.Full(), sessions=tmp_path / "one")
    cases.service(kvsieve.Full(), sessions=tmp_path / "one").close()
    own = kvsieve.Memory(evict=Own())
    with pytest.raises(UnsupportedError, match="cannot be written as text"):
        cases.service(own, sessions=tmp_path / "two")
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.feed(tiny.ids(1, 3))


class Own(type(kvsieve.SirLLM(64).memories[0].roles.evict)):  # type: ignore[misc]
    """A rule that no text names."""

    def __init__(self) -> None:
        super().__init__(64)

    def __repr__(self) -> str:
        return "Own()"


def test_a_folder_that_cannot_be_read_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(SaveError, match="Permission denied"):
            cases.service(kvsieve.Full(), sessions=tmp_path)
    cases.service(kvsieve.Full(), sessions=tmp_path).close()


def test_strangers_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.safetensors").write_text("mine")
    (tmp_path / ("f" * 32)).mkdir()
    (tmp_path / ("f" * 32) / "model.safetensors").write_text("mine too")
    os.symlink(tmp_path / "notes", tmp_path / ("e" * 32))
    with cases.service(kvsieve.Full(), sessions=tmp_path) as service:
        said(service)
        assert service.snapshot().unusable == 0
    assert (tmp_path / "notes" / "a.safetensors").read_text() == "mine"
    assert (tmp_path / ("f" * 32) / "model.safetensors").read_text() == "mine too"
    assert rendered(FIRST)
