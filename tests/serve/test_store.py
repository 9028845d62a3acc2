"""A store that several servers share: a conversation goes on at whichever of them it comes to, and what is wrong costs reading."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import kvsieve
import pytest
import serve_cases as cases
import tiny
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations
from kvsieve.errors import ArgumentError, BackendError, SaveError, SessionNotFoundError, UnsupportedError
from kvsieve.serve import shared
from kvsieve.serve.shared import Shared, file_system
from kvsieve.serve.store import Stored, owner_key
from serve_cases import THEN, answer, said, same
from systems import SYSTEMS

LAST = ("user", "and who is left at home?")


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """Object storage, as far as a store sees it: no folders, and what is put is there at once. It can fail."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012 - as its base class
    pseudo_dirs = [""]  # noqa: RUF012
    failing: set[str] = set()  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def _may(self, what: str) -> None:
        self.asked.append(what)
        if what in self.failing:
            raise RuntimeError(f"{what}: no route to the bucket")

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self._may("ls")
        return super().ls(path, detail, **more)

    def put_file(self, *paths: str, **more: Any) -> None:
        self._may("put")
        super().put_file(*paths, **more)

    def get_file(self, *paths: str, **more: Any) -> None:
        self._may("get")
        super().get_file(*paths, **more)

    def mv(self, *paths: str, **more: Any) -> None:
        raise AssertionError("an object store has no moves")

    def rm_file(self, path: str) -> None:
        self._may("rm")
        super().rm_file(path)


@pytest.fixture(params=["file", "memory", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from place(request.param, tmp_path)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    yield from place("bucket", tmp_path)


def place(kind: str, tmp_path: Path) -> Iterator[str]:
    """The address of an empty store."""
    if kind == "file":
        yield f"file://{tmp_path}/kept"
        return
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.failing.clear()
    yield f"{'s3' if kind == 'bucket' else 'memory'}://{tmp_path.name}/kept"
    Bucket.store.clear()
    MemoryFileSystem.store.clear()
    for one in (Bucket, MemoryFileSystem):
        one.pseudo_dirs[:] = [""]
    _registry.pop("s3")


def objects(url: str) -> list[str]:
    """Everything that is there."""
    found, path = file_system(url)
    return [one for one in found.find(path) if not one.endswith("/")]


def opened(url: str, **changes: Any) -> Shared:
    given = {"model": tiny.model(), "tokenizer": cases.Letters(), "policy": kvsieve.Full(), "backend": "cpu", **changes}
    return Shared(url, given.pop("model"), **given)


# ------------------------------------------------------------------------------------------------------------- from one to another


@pytest.mark.parametrize("name", ["full", "sirllm", "snapkv", "think_quantized"])
def test_a_conversation_goes_on_at_another_server(name: str, url: str) -> None:
    """Forth and back, as if one server had had all of it. The first one stays open: nothing is told when it dies."""
    policy = SYSTEMS[name].make()
    with cases.service(policy) as alone:
        messages = said(alone)
        second = answer(alone, messages, logprobs=2)
        longer = [*messages, ("assistant", second.text()), LAST]
        third = answer(alone, longer, logprobs=2)
    with (
        cases.service(policy, sessions=url, durable=True) as one,
        cases.service(policy, sessions=url, durable=True) as other,
    ):
        assert said(one) == messages
        same(answer(other, messages, logprobs=2), second)
        assert other.snapshot().loads == 1
        same(answer(one, longer, logprobs=2), third)
        assert [one.snapshot().rereads, other.snapshot().rereads] == [0, 0]
        assert one.snapshot().loads == 1, "the newest state, not its own older one"


def test_a_conversation_goes_on_after_all_servers_ended(url: str) -> None:
    """What a server has not written yet, it writes when it ends."""
    with cases.service(kvsieve.Full(), sessions=url) as service:
        messages = said(service)
    with cases.service(kvsieve.Full(), sessions=url) as service:
        found = answer(service, messages)
        assert found.usage().cached > 0
        assert not found.usage().read_again


def test_a_text_without_messages_is_found_too(url: str) -> None:
    with (
        cases.service(kvsieve.Full(), sessions=url, durable=True) as one,
        cases.service(kvsieve.Full(), sessions=url, durable=True) as other,
    ):
        text = "ships that leave at night " * 3
        text += answer(one, text).text()
        assert answer(other, f"{text} and more").usage().cached > 70


def test_a_shared_store_is_asked_only_when_it_may_know_more(bucket: str) -> None:
    with cases.service(kvsieve.Full(), sessions=bucket, durable=True) as service:
        Bucket.asked.clear()
        messages = said(service)
        assert "ls" not in Bucket.asked, "nobody has answered a first message"
        second = answer(service, messages)
        assert "ls" not in Bucket.asked, "this server said the newest answer itself"
        answer(service, [*messages, ("assistant", f"no, {second.text()}"), LAST])
        assert "ls" in Bucket.asked, "somebody else may have said another one"


def test_a_conversation_that_left_memory_comes_back_from_the_store(url: str) -> None:
    with cases.service(kvsieve.Full()) as alone:
        want = {name: answer(alone, said(alone, name, name * 400), owner=name) for name in "abcde"}
    with cases.service(kvsieve.Full(), memory=700_000, sessions=url) as service:
        pasts = {name: said(service, name, name * 400) for name in "abcde"}
        assert service.snapshot().evictions > 0
        for name, past in pasts.items():
            same_text = answer(service, past, owner=name)
            assert same_text.ids() == want[name].ids()
            assert not same_text.usage().read_again
        counts = cases.settled(service)
        assert counts.loads >= 3
        assert counts.stored <= counts.states + 2, "what is in the store alone is not listed here"


def test_an_owner_finds_nothing_of_another(url: str) -> None:
    with (
        cases.service(kvsieve.Full(), sessions=url, durable=True) as one,
        cases.service(kvsieve.Full(), sessions=url, durable=True) as other,
    ):
        messages = said(one, "ada")
        assert answer(other, messages, owner="bob").usage().cached == 0
        assert answer(other, messages, owner="ada").usage().cached > 0


def test_a_conversation_has_two_states_of_its_newest_ends_wherever_it_goes(url: str) -> None:
    with (
        cases.service(kvsieve.SirLLM(64, recent=8), sessions=url, durable=True) as one,
        cases.service(kvsieve.SirLLM(64, recent=8), sessions=url, durable=True) as other,
    ):
        messages = said(one)
        for turn in range(4):
            before = messages
            heard = answer((other, one)[turn % 2], messages)
            assert not heard.usage().read_again
            messages = [*messages, ("assistant", heard.text()), THEN]
            assert len(objects(url)) == 2
        assert not answer(other, before).usage().read_again, "one who was not told of the newest answer asks again"


# --------------------------------------------------------------------------------------------------------------------- one store


def test_two_that_write_one_state_leave_two_whole_ones(url: str) -> None:
    """Both forks have read the same text, one of them in other pieces."""
    stores, streams = [opened(url), opened(url)], []
    for chunk in (8, 24):
        stream = kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu")
        stream.feed(cases.ids_of("a" * 40), chunk=chunk)
        streams.append(stream)
    ((length, digest),) = shared.digests("a" * 40, [40])
    owner, wrote = owner_key("ada"), list[Stored]()
    threads = [
        threading.Thread(target=lambda at=at: wrote.append(stores[at].save(owner, length, digest.hex(), streams[at])))  # type: ignore[misc]
        for at in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.name for one in wrote}) == len(objects(url)) == 2
    for store in stores:
        (found,) = store.find(owner, "a" * 44)
        assert (found.length, found.tokens, found.unread) == (40, 40, 0)
        for one in wrote:
            with store.load(one) as stream:
                assert stream.seen == 40
    stores[0].remove(found)
    stores[0].remove(found)
    assert not stores[1].holds(found)
    with pytest.raises(SessionNotFoundError):
        stores[1].load(found)
    (left,) = stores[1].find(owner, "a" * 44)
    assert left.name != found.name
    assert store.find(owner, "a" * 39) == [], "the text does not begin with it"
    assert store.find(owner, "b" * 44) == []
    for stream in streams:
        stream.close()


def damaged(url: str, how: str) -> None:
    """Change the only object of a store."""
    files, _ = file_system(url)
    (path,) = objects(url)
    data = bytearray(files.cat_file(path))
    if how == "a flipped bit":
        data[len(data) // 3] ^= 4
    elif how == "a cut":
        del data[-7:]
    elif how == "half":
        del data[len(data) // 2 :]
    elif how == "nothing":
        data.clear()
    elif how == "a long description":
        data[-12:-8] = b"\xff\xff\xff\x7f"
    elif how == "no JSON":
        data[-14] ^= 0x55
    elif how == "another length":
        data = data.replace(b'"tokens": ', b'"tokens":1')
    elif how == "another place":
        files.rm_file(path)
        parts = path.rsplit("/", 2)
        path = f"{parts[0]}/{owner_key('bob')}/{parts[2]}"
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
    elif how == "another name":
        files.rm_file(path)
        path = path.replace(".state", "")[:-16] + "0" * 16 + ".state"
    files.pipe_file(path, bytes(data))


DAMAGES = [
    "a flipped bit",
    "a cut",
    "half",
    "nothing",
    "a long description",
    "no JSON",
    "another length",
    "another place",
    "another name",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_state_is_none_and_is_read_again(how: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    with cases.service(kvsieve.Full()) as alone:
        messages = said(alone)
        want = answer(alone, messages, owner="nobody").ids()
    with cases.service(kvsieve.Full(), sessions=url, durable=True) as service:
        assert said(service) == messages
    damaged(url, how)
    owner = "bob" if how == "another place" else "ada"
    with cases.service(kvsieve.Full(), sessions=url, durable=True) as service:
        found = answer(service, messages, owner=owner)
        assert found.ids() == want
        assert found.usage().cached == 0
        assert found.usage().read_again
        assert service.snapshot().unusable == 1
        assert any("damaged" in record.getMessage() or "session file" in record.getMessage() for record in caplog.records)
        assert len(objects(url)) == 2, "who reads it wrong does not remove it"
        again = answer(service, messages, owner=owner)
        assert again.ids() == want
        assert service.snapshot().unusable == 1, "it is not read again"
        longer = [*messages, ("assistant", found.text()), THEN]
    with cases.service(kvsieve.Full(), sessions=url) as service:
        assert not answer(service, longer, owner=owner).usage().read_again, "what was written since is whole"


@pytest.mark.parametrize("change", ["policy", "model", "tokenizer"])
def test_states_of_others_are_none_and_stay(change: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.service(kvsieve.Full(), sessions=url) as service:
        messages = said(service)
    policy, model = kvsieve.Full(), tiny.model()
    if change == "policy":
        policy = kvsieve.StreamingLLM(400)
    elif change == "model":
        model = tiny.model(seed=4)
    else:
        monkeypatch.setattr(cases.Letters, "special_tokens_map", {"eos_token": "$"})
    with cases.service(policy, model, sessions=url) as service:
        assert answer(service, messages).usage().cached == 0
        assert service.snapshot().unusable == 0
    monkeypatch.undo()
    assert len(objects(url)) == 2
    with cases.service(kvsieve.Full(), sessions=url) as service:
        assert answer(service, messages).usage().cached > 0


def test_a_state_that_another_server_removed_costs_reading(url: str) -> None:
    with cases.service(kvsieve.Full(), sessions=url) as service:
        messages = said(service)
    with cases.service(kvsieve.Full(), sessions=url, durable=True) as service:
        heard = answer(service, messages)
        files, _ = file_system(url)
        for path in objects(url):
            files.rm_file(path)
        again = answer(service, messages)
        assert again.ids() == heard.ids()
        assert len(objects(url)) == 1, "a durable answer is in the store, though it was there before"
        for path in objects(url):
            files.rm_file(path)
    with cases.service(kvsieve.Full(), sessions=url) as service:
        found = answer(service, messages)
        assert found.ids() == heard.ids()
        assert found.usage().read_again
        assert service.snapshot().unusable == 0


# ------------------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_store_that_does_not_take_a_state_fails_a_durable_answer(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    with cases.service(kvsieve.Full(), sessions=bucket, durable=True) as service:
        Bucket.failing.add("put")
        with pytest.raises(SaveError, match="no route to the bucket"):
            said(service)
        Bucket.failing.clear()
        messages = said(service)
        assert len(objects(bucket)) == 1
    with cases.service(kvsieve.Full(), sessions=bucket) as service:
        Bucket.failing.add("put")
        answer(service, messages)
    assert any("in memory only" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("what", ["ls", "get"])
def test_a_store_that_does_not_answer_costs_reading(what: str, bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    with cases.service(kvsieve.Full(), sessions=bucket) as service:
        messages = said(service)
    with cases.service(kvsieve.Full(), sessions=bucket) as service:
        Bucket.failing.add(what)
        assert answer(service, messages).usage().read_again
        assert service.snapshot().failed == 0
        Bucket.failing.clear()
        assert any("no route to the bucket" in record.getMessage() for record in caplog.records)
    assert len(objects(bucket)) == 2
    with cases.service(kvsieve.Full(), sessions=bucket) as service:
        assert answer(service, messages).usage().cached > 0, "the state stayed"


def test_a_state_is_seen_when_it_is_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies in the middle leaves what nobody finds, and what is removed a day later."""
    store, ((length, digest),) = opened(url), shared.digests("a" * 40, [40])
    with kvsieve.stream(tiny.model(), kvsieve.Full(), "cpu") as stream:
        stream.feed(cases.ids_of("a" * 40))

        def killed(*_: Any) -> None:
            raise OSError("killed")

        monkeypatch.setattr(Shared, "_clean", lambda *_: None)
        if url.startswith("file"):
            monkeypatch.setattr(Shared, "_publish", killed)
        else:
            monkeypatch.setattr(MemoryFileSystem, "mv", killed)
            monkeypatch.setattr(Bucket, "put_file", killed)
        with pytest.raises(SaveError):
            store.save(owner_key("ada"), length, digest.hex(), stream)
    monkeypatch.undo()
    left = objects(url)
    assert len(left) == (0 if url.startswith("s3") else 1)
    assert store.find(owner_key("ada"), "a" * 44) == []
    opened(url, disk=1 << 20)
    assert objects(url) == left, "it may still be written"
    later = time.time() + 2 * shared.ABANDONED
    monkeypatch.setattr(time, "time", lambda: later)
    opened(url, disk=1 << 20)
    assert objects(url) == []


def test_states_stay_within_their_bytes_whoever_wrote_them(url: str) -> None:
    with cases.service(kvsieve.Full(), sessions=url) as service:
        said(service)
    files, _ = file_system(url)
    (first,) = objects(url)
    size = files.size(first)
    with (
        cases.service(kvsieve.Full(), sessions=url, disk=4 * size, durable=True) as one,
        cases.service(kvsieve.StreamingLLM(400), sessions=url, disk=4 * size, durable=True) as other,
    ):
        for at, name in enumerate("abcdef"):
            time.sleep(0.01)  # file systems tell time in hundredths of a second
            said((one, other)[at % 2], name)
    assert sum(files.size(path) for path in objects(url)) <= 4 * size * (1 + 1 / shared.PARTS)
    assert first not in objects(url)
    assert any(owner_key("f") in path for path in objects(url)), "the newest stay"
    with (
        cases.service(kvsieve.Full(), sessions=url, disk=size // 2, durable=True) as service,
        pytest.raises(SaveError, match="limit is"),
    ):
        said(service)
    assert objects(url) == []


def test_files_are_their_owners_and_tell_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kept"
    with cases.service(kvsieve.Full(), sessions=f"file://{folder}") as service:
        said(service, "somebody@example")
    (path,) = folder.rglob("*.state")
    for one in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(one.stat().st_mode) == (0o700 if one.is_dir() else 0o600), one
        assert "somebody" not in one.name
    end = path.read_bytes()[-600:]
    assert b"ships" not in end
    assert b"somebody" not in end


def test_strangers_files_are_left_alone(url: str) -> None:
    files, root = file_system(url)
    files.makedirs(root, exist_ok=True)
    files.pipe_file(f"{root}/notes.state", b"mine")
    with cases.service(kvsieve.Full(), sessions=url, disk=1 << 20) as service:
        messages = said(service)
    owner = f"{root}/{opened(url).identity[:32]}/{owner_key('ada')}"
    files.pipe_file(f"{owner}/model.state", b"mine too")
    with cases.service(kvsieve.Full(), sessions=url, disk=1 << 20) as service:
        assert answer(service, messages).usage().cached > 0
        assert service.snapshot().unusable == 0
    assert files.cat_file(f"{root}/notes.state") == b"mine"
    assert files.cat_file(f"{owner}/model.state") == b"mine too"


def test_an_address_that_cannot_be_used_is_refused_at_once(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, said_of_it in (("nowhere://a/b", "nowhere"), ("simplecache::file:///tmp/a", "chain")):
        with pytest.raises(ArgumentError, match=said_of_it):
            cases.service(kvsieve.Full(), sessions=url)
    monkeypatch.setitem(known_implementations, "far", {"class": "no_such_package.Far", "err": "install far"})
    with pytest.raises(BackendError, match="install far"):
        cases.service(kvsieve.Full(), sessions="far://a/b")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SaveError, match="cannot keep conversations"):
        cases.service(kvsieve.Full(), sessions=f"file://{tmp_path}/file")
    monkeypatch.setattr(Bucket, "pipe_file", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(SaveError, match="Permission denied"):
        cases.service(kvsieve.Full(), sessions=bucket)
    with pytest.raises(UnsupportedError, match="cannot be written as text"):
        opened(f"file://{tmp_path}/two", policy=kvsieve.Memory(evict=Own()))


class Own(type(kvsieve.SirLLM(64).memories[0].roles.evict)):  # type: ignore[misc]
    """A rule that no text names."""

    def __init__(self) -> None:
        super().__init__(64)

    def __repr__(self) -> str:
        return "Own()"


@pytest.mark.parametrize(
    ("info", "when"),
    [
        ({"mtime": 5.5}, 5.5),
        ({"LastModified": "1970-01-01T00:01:00Z"}, 60.0),
        ({"LastModified": "last week", "created": 7}, 7.0),
        ({"size": 3}, 0.0),
    ],
)
def test_when_an_object_was_written_is_told_by_many_names(info: dict[str, Any], when: float) -> None:
    assert shared._written(info) == when
