"""Session files under damage, ill intent, full disks and sudden ends: the old or the new file, whole, or a typed error."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from kvsieve.errors import CacheMismatchError, KvsieveError, SaveError, SessionError, SessionNotFoundError, UnsupportedError
from kvsieve.files import replace, tensor_file
from kvsieve.files.tensor_file import Kind, Later, TensorFile
from pages import load as load_script

KIND = Kind("test", "test file", 3)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load_script("tests/faults/fuzz_files.py")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A session file."""
    path = tmp_path_factory.mktemp("real") / "stream"
    with kvsieve.stream(tiny.model(), kvsieve.SirLLM(24, sinks=2, recent=4), "cpu") as stream:
        stream.feed(tiny.ids(1, 40))
        stream.save(path)
    return path.read_bytes()


def load(path: Path) -> None:
    kvsieve.load(path, tiny.model(), "cpu").close()


# --------------------------------------------------------------------------------------------------------------------- damage


def test_a_changed_file_is_refused_or_holds_what_it_says(fuzz: ModuleType) -> None:
    wrong, counts = fuzz.run(600, seed=11, tell=lambda _: None)
    assert wrong == []
    assert counts["fine"] > 510


def test_what_is_silent_raw_or_broken_is_told(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer notices a reader without its checks."""
    monkeypatch.setattr(TensorFile, "_check_digest", lambda self, raw: None)
    told, _ = fuzz.run(400, seed=5, tell=lambda _: None, only="sirllm")
    assert any(line.startswith("SILENT") for line in told)
    monkeypatch.undo()
    monkeypatch.setattr(TensorFile, "error", lambda self, why: ArithmeticError(why))
    told, _ = fuzz.run(100, seed=5, tell=lambda _: None, only="sirllm")
    assert any(line.startswith("RAW ArithmeticError") for line in told)


def test_every_cut_of_the_header_and_random_ones_behind_it_are_refused(real: bytes, tmp_path: Path) -> None:
    path, header = tmp_path / "cut", int.from_bytes(real[:8], "little")
    lot = random.Random(3)
    cuts = [*range(0, 8 + header, 7), *(lot.randrange(8 + header, len(real)) for _ in range(200)), len(real) - 1]
    for cut in cuts:
        path.write_bytes(real[:cut])
        with pytest.raises(SessionError, match="no kvsieve stream"):
            load(path)


def test_every_bit_of_the_file_counts(real: bytes, tmp_path: Path) -> None:
    path, lot = tmp_path / "flipped", random.Random(4)
    for at in [*range(0, 400), *(lot.randrange(len(real)) for _ in range(600))]:
        changed = bytearray(real)
        changed[at] ^= 1 << lot.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(SessionError):
            load(path)


def written(tmp_path: Path, **tensors: torch.Tensor) -> bytes:
    path = tmp_path / "made"
    tensor_file.write(path, KIND, {"told": [1, 2]}, tensors or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)})
    return path.read_bytes()


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry("F32", [2, 3], 0, 24), "b": entry("F32", [4], 20, 36)},  # they overlap
        {"a": entry("F32", [2, 3], 0, 24), "b": entry("F32", [3], 28, 40)},  # a gap
        {"a": entry("F32", [2, 3], 0, 24)},  # bytes that belong to nobody
        {"b": entry("F32", [4], 24, 40), "a": entry("F32", [2, 3], 0, 24)},  # another order
        {"a": entry("F32", [-2, -5], 0, 40)},
        {"a": entry("F32", [2**62, 4], 0, 40)},
        {"a": entry("F32", [2**33, 2**33], 0, 40)},
        {"a": entry("F32", [True, 10], 0, 40)},
        {"a": entry("F32", [2.0, 5.0], 0, 40)},
        {"a": entry("F32", [1] * 9, 0, 4), "b": entry("F32", [9], 4, 40)},
        {"a": entry("C64", [5], 0, 40)},
        {"a": entry("F32", [10], 0, 2**64)},
        {"a": entry("F32", [10], -40, 0)},
        {"a": {"dtype": "F32", "shape": [10]}},
        {"a": [1, 2, 3]},
        {"a": {**entry("F32", [10], 0, 40), "more": 1}},
    ],
)
def test_tensors_that_are_not_where_they_must_be_are_refused(fuzz: ModuleType, tmp_path: Path, entries: Any) -> None:
    """The digest is right; only what the header says is wrong, and nothing of that size is ever asked for."""
    header, body = fuzz.split(written(tmp_path))
    path = tmp_path / "changed"
    path.write_bytes(fuzz.signed(fuzz.joined({"__metadata__": header["__metadata__"], **entries}, body)))
    with pytest.raises(SessionError, match="test file"), tensor_file.opened(path, KIND) as file:
        file.tensor("a")


def test_headers_that_are_no_headers_are_refused(fuzz: ModuleType, tmp_path: Path) -> None:
    data, path = written(tmp_path), tmp_path / "changed"
    header, body = fuzz.split(data)

    def told(text: str) -> bytes:
        metadata = {**header["__metadata__"], "test": text}
        return bytes(fuzz.signed(fuzz.joined({**header, "__metadata__": metadata}, body)))

    twice = data.replace(b'"b":{', b'"a":{')
    deep = told("[" * 50_000)
    number = told('{"version": 3, "told": ' + "9" * 5000 + "}")
    for changed, match in (
        (fuzz.signed(twice), "comes twice"),
        (deep, "cannot be read"),
        (number, "cannot be read"),
        (told('{"version": 3, "told": NaN}'), "is no number"),
        (told('{"version": 3, "told": 1, "told": 2}'), "comes twice"),
        (told("[]"), "no JSON object"),
        (told('{"version": 2}'), "format 2; this kvsieve reads format 3"),
        (told('{"version": true}'), "format True"),
        (told("{}"), "format None"),
        ((2**63).to_bytes(8, "little") + data[8:], "does not fit"),
        (b"", "0 bytes"),
    ):
        path.write_bytes(changed)
        with pytest.raises(SessionError, match=match), tensor_file.opened(path, KIND):
            pass


def test_a_file_that_shrinks_or_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "made", written(tmp_path)
    with tensor_file.opened(path, KIND) as file:
        path.write_bytes(data[:-8])
        with pytest.raises(SessionError, match="was cut while it was read"):
            file.tensor("b")
    path.write_bytes(data)
    with tensor_file.opened(path, KIND) as file:
        file.check_unchanged()
        os.utime(path, ns=(1, 1))
        with pytest.raises(SessionError, match="was changed while it was read"):
            file.check_unchanged()


def test_a_disk_that_fails_while_it_is_read_is_a_typed_error(tmp_path: Path) -> None:
    written(tmp_path)
    with tensor_file.opened(tmp_path / "made", KIND) as file:

        class Failing:
            def seek(self, at: int) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        file._file = Failing()  # type: ignore[assignment]
        with pytest.raises(SessionError, match="Input/output error"):
            file.tensor("a")


def test_what_is_no_file_is_no_session(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    for name, match in (
        ("", "folder"),
        ("pipe", "pipe"),
        ("link", "symbolic links"),
        ("x" * 300, "name too long"),
    ):
        with pytest.raises(SessionError, match=f"(?i){match}"):
            load(tmp_path / name)
    with pytest.raises(SessionError, match="no file can have the name"):
        load(tmp_path / "a\0b")
    with pytest.raises(SessionError, match="device"):
        load(Path("/dev/zero"))
    with pytest.raises(SessionNotFoundError, match="there is no kvsieve stream") as caught:
        load(tmp_path / "missing")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(SessionError, match="must be a path"):
        kvsieve.load(7, tiny.model())  # type: ignore[arg-type]


def test_the_longest_name_that_a_folder_takes_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / ("\U0001f30a" * 60 + ".wave")
    with replace.replacing(file, "test file") as out:
        out.write(b"sea")
    assert file.read_bytes() == b"sea"
    assert os.listdir(tmp_path) == [file.name]


def test_another_byte_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UnsupportedError, match="little-endian"):
        tensor_file.write(tmp_path / "made", KIND, {}, {})
    with pytest.raises(UnsupportedError, match="little-endian"), tensor_file.opened(tmp_path / "made", KIND):
        pass


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {str(dtype): (torch.rand(3, 5) * 100).to(dtype) for dtype in dtypes} | {"none": torch.zeros(2, 0, 3)}
    later: dict[str, Any] = {**tensors, "later": Later(torch.float32, (2, 2), lambda: torch.ones(2, 2).t())}
    tensor_file.write(tmp_path / "made", KIND, {"told": "\u00e9"}, later)
    found = load_file(tmp_path / "made")
    with tensor_file.opened(tmp_path / "made", KIND) as file:
        assert file.header == {"told": "\u00e9"}
        assert file.names == list(later)
        for name, tensor in {**tensors, "later": torch.ones(2, 2)}.items():
            assert torch.equal(found[name], tensor)
            assert torch.equal(file.tensor(name), tensor)
    with pytest.raises(UnsupportedError, match="complex64"):
        tensor_file.write(tmp_path / "made", KIND, {}, {"x": torch.zeros(1, dtype=torch.complex64)})


# -------------------------------------------------------------------------------------------------------------------- writing


def save(path: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(24, sinks=2), "cpu") as stream:
        stream.feed(tiny.ids(1, 40))
        stream.save(path)


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    before = os.stat(os.devnull)
    for path, match in (
        (Path(os.devnull), "a device"),
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "none" / "x", "No such file"),
        (f"{tmp_path}/none/", "folder"),
        ("", "empty"),
        ("a\0b", "null"),
        (b"bytes", "must be text"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(SaveError, match=f"(?i){match}") as caught:
            save(path)
        assert isinstance(caught.value, OSError)
    with pytest.raises(SaveError):
        save(3)
    assert stat.S_ISCHR(before.st_mode) == stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["loop", "pipe"]


def test_a_link_is_followed_and_stays_and_permissions_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to("folder/target")
    save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    load(target)
    (tmp_path / "dangling").symlink_to("folder/new")
    save(tmp_path / "dangling")
    load(tmp_path / "folder" / "new")
    mask = os.umask(0o027)
    try:
        save(tmp_path / "fresh")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640


AS_NOBODY = """
import os, sys
import kvsieve.files.replace
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from kvsieve.errors import SaveError
from kvsieve.files.replace import replacing
for path in sys.argv[1:]:
    try:
        with replacing(path, "file") as file:
            file.write(b"new")
        print("written", path)
    except SaveError as err:
        print("refused", err)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_folders_and_files_without_permission_are_refused(tmp_path: Path) -> None:
    closed, read_only = tmp_path / "closed", tmp_path / "open" / "read_only"
    closed.mkdir(mode=0o755)
    read_only.parent.mkdir()
    read_only.parent.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    read_only.write_bytes(b"old")
    read_only.chmod(0o644)
    paths = [str(closed / "x"), str(read_only), str(read_only.parent / "fresh")]
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, *paths], capture_output=True, text=True, check=False)
    told = done.stdout.splitlines()
    assert [line.split()[0] for line in told] == ["refused", "refused", "written"], done.stderr
    assert "ermission denied" in told[0]
    assert "ermission denied" in told[1]
    assert read_only.read_bytes() == b"old"
    assert list(closed.iterdir()) == []


def test_a_limit_of_the_file_size_leaves_the_old_file(real: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(real)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (0, 100, 4096, 8192):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(SaveError, match="too large; what was there before is as it was"):
                save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == real
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace", "fsync of the folder"])
def test_a_full_disk_leaves_the_old_file_or_says_that_the_new_one_is_there(
    where: str, real: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stream"
    path.write_bytes(real)
    calls = []

    def failing(name: str, after: int) -> Callable[..., Any]:
        right = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return right(*args, **kwargs)

        return call

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(24, sinks=2), "cpu") as stream:
        stream.feed(tiny.ids(1, 40))
        with monkeypatch.context() as patched:
            if where == "write":
                patched.setattr(tensor_file, "_write_tensor", full)
            else:
                patched.setattr(replace.os, where.split()[0], failing(where.split()[0], int("folder" in where)))
            with pytest.raises(SaveError, match="No space left"):
                stream.save(path)
        assert (path.read_bytes() == real) == ("folder" not in where)
        assert list(tmp_path.iterdir()) == [path]
        load(path)
        stream.save(path)
        assert stream.generate(tiny.ids(1, 3), max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_two_savers_do_not_meet(tmp_path: Path) -> None:
    """Each has a name of its own for what is not complete."""
    path = tmp_path / "file"
    with replace.replacing(path, "file") as one, replace.replacing(path, "file") as two:
        one.write(b"one")
        two.write(b"two")
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replace.replacing(path, "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file() -> None:
    """200 kills of a process that writes without end, in a process of its own: no thread of this one is forked."""
    command = [sys.executable, str(Path(__file__).with_name("save_kill.py")), "--kills", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 200
    assert found["saves"] > 100
    assert found["partial"] > 0


# --------------------------------------------------------------------------------------------------------------- whole streams


def test_keys_and_values_are_made_when_they_are_written(tmp_path: Path) -> None:
    """Keys and values are read from the stores when they are written."""
    held: list[int] = []
    config = {"num_hidden_layers": 6}
    with kvsieve.stream(tiny.model(**config), kvsieve.Full(), "cpu") as stream:
        stream.feed(tiny.ids(1, 64))
        from kvsieve import session

        made = [x for x in session._tokens(stream._engine).values() if isinstance(x, Later)]
        held = [x.make().nbytes for x in made]
    assert len(made) == 12
    assert set(held) == {2 * 64 * 16 * 4}


def test_a_forward_that_died_is_not_saved(tmp_path: Path) -> None:
    model = tiny.model()
    with kvsieve.stream(model, kvsieve.StreamingLLM(24, sinks=2), "cpu") as stream:
        stream.feed(tiny.ids(1, 40))
        stream.save(tmp_path / "before")
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.feed(tiny.ids(1, 5, 1))
        hook.remove()
        stream.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_scores_that_are_not_numbers_are_saved_and_loaded(tmp_path: Path) -> None:
    """A model that gave nan is the user's; that its stream cannot be loaded would be ours."""
    path = tmp_path / "stream"
    with kvsieve.stream(tiny.model(), kvsieve.SirLLM(24, sinks=2, recent=4), "cpu") as stream:
        stream.feed(tiny.ids(1, 20))
        stream._engine.planner.set_scores(0, torch.full((20,), torch.nan).numpy())
        stream.save(path)
    load(path)


def test_every_error_is_kvsieves_own(real: bytes, fuzz: ModuleType, tmp_path: Path) -> None:
    """A signed file whose header names a policy that does not exist, or another."""
    header, body = fuzz.split(real)
    inner = json.loads(header["__metadata__"]["kvsieve"])
    for policy in ("nothing()", "sirllm(", "", "__import__('os')", "sirllm(budget=-1)", "h2o(24)", 7):
        metadata = {**header["__metadata__"], "kvsieve": json.dumps({**inner, "policy": policy})}
        path = tmp_path / "other"
        path.write_bytes(fuzz.signed(fuzz.joined({**header, "__metadata__": metadata}, body)))
        with pytest.raises(KvsieveError, match="other"):
            load(path)


@pytest.mark.parametrize("twice", [False, True])
def test_a_file_of_other_sliding_windows_is_named(fuzz: ModuleType, tmp_path: Path, twice: bool) -> None:
    """The fingerprint of the weights is right, and what the file says of its windows is not, or it says it twice."""
    path, model = tmp_path / "stream", tiny.model("gemma2")
    with kvsieve.stream(model, kvsieve.StreamingLLM(24, sinks=2), "cpu") as stream:
        stream.feed(tiny.ids(1, 40))
        stream.save(path)
    header, body = fuzz.split(path.read_bytes())
    inner = json.loads(header["__metadata__"]["kvsieve"])
    (layers,) = (part["layers"] for part in inner["parts"].values() if "window" in str(part.get("layers")))
    if twice:
        layers.append(layers[0])
    else:
        layers[0]["window"] = 7
    metadata = {**header["__metadata__"], "kvsieve": json.dumps(inner)}
    path.write_bytes(fuzz.signed(fuzz.joined({**header, "__metadata__": metadata}, body)))
    kind, what = (
        (SessionError, "it tells of one layer twice") if twice else (CacheMismatchError, "the stream was saved from a model with")
    )
    with pytest.raises(kind, match=f"{path}.*{what}"):
        kvsieve.load(path, model, "cpu")
