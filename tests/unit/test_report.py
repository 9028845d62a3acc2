"""`make report`: what it shows, what it does when a part fails or the time is up, and that it goes on. No part is run really."""

from __future__ import annotations

import html.parser
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pages
import pytest

FAKE = """
import json, os, sys, time
from pathlib import Path
arguments, records = sys.argv[1:], Path(os.environ["RECORDS"])
if arguments[0] == "info":
    print(json.dumps({"versions": {"kvsieve": "0.0"}, "instruction_set": "none"}))
    sys.exit(0)
name = arguments[1]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(arguments) + "\\n")
if name == os.environ.get("FAIL"):
    print("kvsieve: no space <left>")
    sys.exit(2)
if name == os.environ.get("HANG"):
    time.sleep(60)
if arguments[0] == "eval":
    told = json.loads((records / "tasks.json").read_text())["runs"][name]
else:
    told = json.loads((records / f"{name}.json").read_text())
Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(told))
print("measured", name)
"""
ONLY = ["--only", "bench-decode", "eval-passkey", "eval-copy"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script with a command that only copies what is recorded; gives the exit status, the page and the calls."""
    monkeypatch.syspath_prepend(str(pages.ROOT / "scripts"))
    import report

    fake, calls = tmp_path / "fake.py", tmp_path / "calls"
    fake.write_text(FAKE)
    monkeypatch.setenv("RECORDS", str(pages.ROOT / "benches" / "record"))
    monkeypatch.setenv("CALLS", str(calls))

    def run(*arguments: str, **env: str) -> tuple[int, str, list[str]]:
        for name in ("FAIL", "HANG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        calls.write_text("")
        status = report.main([*ONLY, "--out", str(tmp_path / "out"), *arguments], (sys.executable, str(fake)))
        page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
        return status, page, calls.read_text().splitlines()

    return run


class Seen(html.parser.HTMLParser):
    """The tags that are open, and what a page asks of other files."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect", "circle", "polyline"):
            self.open.append(tag)
        self.outside += [value or "" for name, value in attributes if name in ("src", "href") and not (value or "").startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "rect", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_page_holds_every_table_figure_and_command_and_needs_no_other_file(run: Any) -> None:
    status, page, calls = run()
    assert status == 0
    assert len(calls) == 3
    seen = Seen()
    seen.feed(page)
    assert seen.open == []
    assert seen.outside == []
    assert page.count("<svg") == 2 * 2
    for text in ("kvsieve bench decode --quick", "kvsieve eval copy", "QuantizedCache", "measured passkey", "kvsieve 0.0"):
        assert text in page
    assert "failed" not in page
    assert "3 <a href='#parts'>parts</a>: 3 done." in page


def test_a_part_that_fails_is_shown_and_the_others_go_on(run: Any) -> None:
    status, page, calls = run(FAIL="passkey")
    assert status == 1
    assert len(calls) == 3
    assert "<span class=bad>failed</span>: <code>eval-passkey</code> exit status 2: kvsieve: no space &lt;left&gt;" in page
    assert "measured copy" in page
    status, page, calls = run("--resume")
    assert (status, len(calls)) == (0, 1)
    assert calls[0].startswith("eval passkey")
    assert "failed" not in page


def test_what_the_time_is_too_short_for_is_interrupted_or_left_out_and_gone_on_with(run: Any) -> None:
    status, page, calls = run("--minutes", "0.05", HANG="decode")
    assert status == 0
    assert "<span class=bad>interrupted</span>: <code>bench-decode</code> the time was up" in page
    assert "left out, the time was up: <code>eval-passkey</code>, <code>eval-copy</code>" in page
    assert len(calls) == 1
    status, page, calls = run("--resume")
    assert (status, len(calls)) == (0, 3)
    assert "interrupted" not in page
    assert run("--resume")[2] == []
    assert len(run()[2]) == 3


def test_a_task_that_was_interrupted_is_shown_as_far_as_it_came(run: Any, tmp_path: Path) -> None:
    assert run()[0] == 0
    path = tmp_path / "out" / "parts" / "eval-copy.json"
    told = json.loads(path.read_text())
    told["summary"] = told["summary"][:1]
    path.write_text(json.dumps(told))
    status, page, _ = run("--resume")
    assert status == 0
    assert "<td class=text><code>copy</code></td><td>1</td><td>4 %</td><td></td><td></td>" in page


def test_a_file_that_lost_its_rows_is_said_to_be_unreadable(run: Any, tmp_path: Path) -> None:
    assert run()[0] == 0
    (tmp_path / "out" / "parts" / "bench-decode.json").write_text(json.dumps({"rows": [{}]}))
    status, page, _ = run("--resume")
    assert status == 1
    assert "not shown" in page


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--only", "abacus"]])
def test_wrong_arguments_exit_with_2(run: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------- figures


@pytest.fixture
def svg(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(pages.ROOT / "scripts"))
    import svg

    return svg


def test_names_at_the_ends_of_lines_do_not_cover_each_other(svg: Any) -> None:
    wanted = [100.0, 101.0, 99.0, 300.0, 100.5]
    found = svg.spread_out(wanted, 14)
    apart = sorted(found)
    assert all(b - a > 13.9 for a, b in itertools.pairwise(apart))
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=wanted.__getitem__)
    assert found[3] == 300.0


@pytest.mark.parametrize(("least", "most"), [(4.9, 210.0), (58.0, 126.0), (0.3, 9000.0), (990.0, 1010.0)])
def test_ticks_are_round_and_lie_within_the_axis(svg: Any, least: float, most: float) -> None:
    for log in (True, False):
        found = svg.ticks(least, most, log)
        assert 2 <= len(found) <= 8
        assert all(least <= at <= most for at in found)
        assert all(float(f"{at:.2g}") == pytest.approx(at) for at in found if most / least > 2)


def test_what_tells_policies_apart_is_in_their_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pages.ROOT / "scripts"))
    import figures

    names = ["SnapKV(budget=64, kernel=7)", "Full() | Quantized(bits=4, when='prefill')", "A(1, x=2)", "A(1, x=3)", "DynamicCache"]
    assert list(figures.short(names).values()) == ["SnapKV(64)", "Full() | Quantized(4)", "A(1, x=2)", "A(1, x=3)", "DynamicCache"]
