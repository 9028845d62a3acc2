"""The public face with hostile arguments; `make fuzz` makes many more calls."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from pages import load


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load("tests/faults/fuzz_public.py")


def test_every_public_call_ends_in_a_result_or_a_typed_error_and_a_refused_one_changes_nothing(fuzz: ModuleType) -> None:
    """And everything public was called, and returned something."""
    wrong, returned = fuzz.run(500, seed=11)
    assert wrong == []
    calls = fuzz.public()
    assert len(calls) > 110
    assert calls - returned == set()


BREAKS = {
    "RAW IndexError: as torch": "        if work.key == 'Stream.stats':\n            raise IndexError('as torch')\n",
    "REFUSED": "        if work.key == 'Stream.ids':\n            work.call = lambda: kvsieve.load('nowhere', scene.model)\n",
    "CHANGED": "        if work.key == 'StreamCache.update':\n"
    "            scene.before.feed(scene.prompt)\n"
    "            scene.stream = scene.before\n"
    "            work.call = lambda *_: kvsieve.load(3, None)\n"
    "            changed = {0}\n",
    "DIED -6": "        if work.key == 'Stream.mark':\n            os.abort()\n",
    "BROKEN": "        if work.key == 'Stream.seen':\n            scene.stream.stats = lambda: 1 // 0\n",
}
"""By what is told of it, something that goes wrong in every call of one kind."""


def test_what_goes_wrong_is_told(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "fuzz_broken.py"
    text = Path(fuzz.__file__).read_text(encoding="utf-8")
    needle = "        try:\n            made = work.call(*arguments, **named)\n"
    assert text.count(needle) == 1
    text = text.replace(needle, "".join(BREAKS.values()) + needle)
    text = text.replace("Path(__file__).resolve().parents[1]", repr(str(Path(fuzz.__file__).resolve().parents[1])))
    # Raised where the calls are made.
    raising = "        except KvsieveError as err:\n            if not changed"
    first, second = BREAKS["RAW IndexError: as torch"].splitlines()
    text = text.replace(f"{first}\n{second}\n", "").replace(
        "            made = work.call(*arguments, **named)\n" + raising,
        f"    {first}\n    {second}\n            made = work.call(*arguments, **named)\n" + raising,
    )
    broken.write_text(text, encoding="utf-8")
    monkeypatch.setattr(fuzz, "__file__", str(broken))
    told, _ = fuzz.run(150, seed=1, tell=lambda _: None)
    assert {name for name in BREAKS if any(line.startswith(name) for line in told)} == set(BREAKS)
