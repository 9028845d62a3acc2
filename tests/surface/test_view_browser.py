"""The page of `kvsieve view` in a real browser: what it shows, by keyboard and to a screen reader, in light and dark.

Needs Chromium or Chrome: `scripts/browser.sh` finds or installs one, as `.ci/run` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import kvsieve
import numpy as np
import pytest
import tiny
from browser import Browser, Tab
from kvsieve.cli import main
from kvsieve.files.recording_file import COLUMNS, pack, write
from recorded import Recorded, Words

POLICIES: dict[str, Any] = {
    "sirllm": kvsieve.SirLLM(24, sinks=2, recent=4),
    "snapkv": kvsieve.SnapKV(24, observe=4, kernel=3),
    "infllm": kvsieve.InfLLM(window=16, blocks=2, block=8, sinks=4, query_block=16),
}

STEP = "(step) => { const time = document.getElementById('time'); time.value = step; time.dispatchEvent(new Event('input')); }"
"""Moves the slider, as a mouse does."""

# A token's classes, of all that were laid out; and the ratio of contrast of a text on its background (WCAG 2).
CLASSES = "Object.fromEntries([...document.querySelectorAll('#text span')].map((one) => [one.dataset.token, one.className]))"
CONTRAST = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = (colour) => parts(colour).slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor, alpha = parts(colour)[3];
      if (alpha === undefined || alpha > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  const all = document.querySelectorAll('h1, h2, p, label, button, select, summary, li, #legend span, #text span:not(.future)');
  for (const one of all) {
    if (!one.textContent.trim() || one.classList.contains('unseen') || one.disabled) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
    found[one.tagName + '.' + one.className] = (a + .05) / (b + .05);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if browser.found() is None:
        missing = "NO BROWSER HERE: the page of `kvsieve view` went untested; scripts/browser.sh says how to get one"
        (pytest.fail if os.environ.get("KVSIEVE_BROWSER_MUST_RUN") else pytest.skip)(missing)
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny stream of each policy, and a recording of 50,000 tokens, each of them a step."""
    folder, files = tmp_path_factory.mktemp("pages"), {}
    for name, policy in POLICIES.items():
        files[name] = folder / f"{name}.json"
        with kvsieve.stream(tiny.model(), policy) as stream, stream.record(files[name], Words()):
            stream.feed(tiny.ids(1, 90), chunk=30)
            stream.generate(tiny.ids(1, 4, 1), max_new_tokens=12, do_sample=False)
    files["long"] = folder / "long.json"
    write(files["long"], long_recording(50_000))
    for file in files.values():
        assert main(["view", str(file)]) == 0
    return files


def long_recording(count: int) -> dict[str, Any]:
    """A window of 1,000 tokens over a text whose tokens come one by one."""
    at = np.arange(count)
    seen = at + 1
    left = np.where(at + 1000 < count, at + 1000, -1)
    numbers = {"seen": seen, "held": np.minimum(seen, 1000), "bytes": 1024.0 * np.minimum(seen, 1000), "full": 1024.0 * seen}
    steps = {name: pack(numbers.get(name, np.full(count, 0.01)), dtype) for name, dtype in COLUMNS.items()}
    holds = [{"layer": None, "heads": 1, "left": pack(left, "<i4"), "again": pack([], "<i4"), "scores": None}]
    told: dict[str, Any] = {"policy": "StreamingLLM(1000)", "model": "M", "backend": "cpu", "date": "today", "reads": None}
    tokens = [["the", " sea", " is", " history", ".\n"][i % 5] for i in range(count)]
    return {**told, "tokens": tokens, "steps": steps, "holds": holds, "scores_at": "step"}


@pytest.fixture
def show(chromium: Browser, recordings: dict[str, Path]) -> Iterator[Any]:
    """Opens the page of a recording; the test fails if its console says anything, or it asks for anything beside itself."""
    opened: list[tuple[Tab, str]] = []

    def show_one(name: str) -> Tab:
        address = recordings[name].with_suffix(".html").as_uri()
        tab = chromium.open(address)
        tab.size(1280, 900)
        tab.wait("document.documentElement.dataset.ready === 'yes'")
        opened.append((tab, address))
        return tab

    yield show_one
    for tab, address in opened:
        tab.js("1")
        assert tab.said == []
        assert tab.asked == [address]


@pytest.mark.parametrize("name", POLICIES)
def test_the_text_is_shown_and_none_of_it_runs(name: str, show: Any, recordings: dict[str, Path]) -> None:
    tab, told = show(name), Recorded(recordings[name])
    assert tab.js("document.querySelector('#text').textContent") == "".join(told.tokens)
    assert tab.js("window.hurt === undefined && document.querySelectorAll('img').length === 0")
    assert tab.js("document.querySelector('#policy').textContent") == told.told["policy"]


def test_tokens_are_held_evicted_and_weighed_as_recorded(show: Any, recordings: dict[str, Path]) -> None:
    tab, told = show("sirllm"), Recorded(recordings["sirllm"])
    last = len(told.steps["seen"]) - 1
    edges = np.sort(list(told.scores(last).values()))
    edges = [edges[len(edges) * i // 5] for i in range(1, 5)]
    for step in (0, 3, 8, last):
        tab.js(f"({STEP})({step})")
        seen, held, scores = told.steps["seen"][step], told.held(step), told.scores(step)
        expected = {}
        for token in range(len(told.tokens)):
            level = f" s{1 + sum(scores[token] >= edge for edge in edges)}" if token in scores else ""
            expected[str(token)] = "future" if token >= seen else f"kept{level}" if token in held else "gone"
        assert tab.js(CLASSES) == expected
        summary = f"token {seen} of {len(told.tokens)}: {len(held)} held, {told.steps['bytes'][step] / 2**20:.1f} MiB"
        shown = tab.js("document.querySelector('#now').textContent")
        assert shown == summary.replace(": ", "") + f" · step {step + 1} of {last + 1}"
        assert summary in tab.js("document.querySelector('#time').getAttribute('aria-valuetext')")
    assert "gone" in expected.values()
    tab.wait(f"document.querySelector('#said').textContent === {summary!r}", 10)


def test_each_head_can_be_looked_at(show: Any, recordings: dict[str, Path]) -> None:
    tab, told = show("snapkv"), Recorded(recordings["snapkv"])
    last = len(told.steps["seen"]) - 1
    heads = {(layer, head): told.held(last, layer, head) for layer in range(2) for head in range(2)}
    shown = {int(token): name for token, name in tab.js(CLASSES).items()}
    for token, name in shown.items():
        share = sum(token in held for held in heads.values()) / 4
        assert name == (f"kept s{int(np.ceil(5 * share))}" if share else "gone")
    assert {"kept s5", "gone"} < set(shown.values())
    choose = (
        "(id, value) => { const one = document.getElementById(id); one.value = value; one.dispatchEvent(new Event('change')); }"
    )
    assert tab.js("document.getElementById('head').disabled")
    for layer, head in ((1, 0), (0, 1)):
        tab.js(f"({choose})('layer', {layer})")
        tab.wait("!document.getElementById('head').disabled")
        tab.js(f"({choose})('head', {head})")
        wanted = {token for token in range(len(told.tokens)) if token not in heads[layer, head]}
        tab.wait("[...document.querySelectorAll('#legend li')].every((one) => !one.textContent.includes('heads'))")
        assert {int(token) for token, name in tab.js(CLASSES).items() if name == "gone"} == wanted


def test_fetched_blocks_are_marked(show: Any, recordings: dict[str, Path]) -> None:
    tab, told = show("infllm"), Recorded(recordings["infllm"])
    last = len(told.steps["seen"]) - 1
    lanes = [told.selected(last, layer, 0) for layer in range(2)]
    names = {int(token): name for token, name in tab.js(CLASSES).items()}
    for token in range(len(told.tokens)):
        fetched = sum(any(lo <= token < hi for lo, hi in lane or ()) for lane in lanes)
        always = token < told.told["reads"]["first"] or token >= len(told.tokens) - told.told["reads"]["newest"]
        assert names[token] == (f"fetched s{[3, 5][fetched - 1]}" if fetched else "kept" if always else "idle")
    assert {name.split()[0] for name in names.values()} == {"fetched", "kept", "idle"}
    tab.js("document.querySelector('#words').open = true")
    tab.wait("document.querySelectorAll('#words-body p').length === 4")
    told_fetched = sum(name.startswith("fetched") for name in names.values())
    assert tab.js("document.querySelectorAll('#words-body p')[2].textContent").startswith(f"Fetched: {told_fetched} tokens: ")
    line = "getComputedStyle(document.querySelector('#text .fetched')).textDecorationLine"
    assert tab.js(line) == "underline", "not by colour alone"


def test_the_keyboard_is_enough(show: Any) -> None:
    tab = show("sirllm")
    step = "+document.getElementById('time').value"
    last = tab.js("+document.getElementById('time').max")
    order = []
    for _ in range(6):
        tab.key("Tab")
        order.append(tab.js("document.activeElement.id"))
    assert order == ["play", "back", "on", "time", "follow", "text"]
    tab.js("document.getElementById('time').focus()")
    for key, wanted in (("ArrowLeft", last - 1), ("ArrowLeft", last - 2), ("Home", 0), ("ArrowRight", 1), ("End", last)):
        tab.key(key)
        assert tab.js(step) == wanted
    tab.js("document.getElementById('text').focus()")
    assert "arrows" in tab.js("document.getElementById('token').textContent")
    for wanted in ("Token 0", "Token 1", "Token 2"):
        tab.key("ArrowRight")
        assert tab.js("document.getElementById('token').textContent").startswith(wanted)
    assert tab.js("document.querySelectorAll('#text .here').length") == 1
    tab.key("ArrowLeft")
    said = tab.js("document.getElementById('token').textContent")
    assert said.startswith("Token 1")
    assert "held" in said or "evicted" in said


def test_a_screen_reader_finds_names_and_words(show: Any, recordings: dict[str, Path]) -> None:
    tab, told = show("sirllm"), Recorded(recordings["sirllm"])
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}
    roles = {role for role, _ in named}
    assert ("slider", "Step") in named
    assert {("button", "Play"), ("button", "One step back"), ("button", "One step on")} <= named
    assert {"main", "complementary", "heading", "image", "list"} <= roles
    assert not [role for role, name in named if role in ("button", "slider", "image", "combobox", "checkbox") and not name]
    tab.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    tab.wait("document.querySelectorAll('#words-body p').length === 2 && document.querySelector('#numbers table') !== null")
    held = told.held(len(told.steps["seen"]) - 1)
    assert tab.js("document.querySelector('#words-body p').textContent").startswith(f"Held: {len(held)} tokens: 0 to 1; ")
    assert tab.js("document.querySelectorAll('#numbers tbody tr').length") == len(told.steps["seen"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_can_be_read_in_light_and_dark(theme: str, show: Any) -> None:
    for name in POLICIES:
        tab = show(name)
        tab.media(prefers_color_scheme=theme, prefers_reduced_motion="reduce")
        ratios = tab.js(CONTRAST)
        assert len(ratios) > 12
        assert not {what: ratio for what, ratio in ratios.items() if ratio < 4.5}
        background = tab.js("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (theme == "light")


def test_a_narrow_window_has_one_column(show: Any) -> None:
    tab = show("snapkv")
    tab.size(360, 740)
    assert tab.js("document.documentElement.scrollWidth <= 360")
    assert tab.js("document.getElementById('panel').getBoundingClientRect().left < 10")


def test_a_long_text_is_laid_out_where_it_is_looked_at(show: Any) -> None:
    """What a step costs does not grow with the text: few of the 50,000 tokens are elements, and those are the right ones."""
    tab = show("long")
    assert tab.js("+document.getElementById('time').max") == 49_999
    assert tab.js("document.getElementById('text').textContent.length") > 150_000
    assert 0 < tab.js("document.querySelectorAll('#text span').length") < 3000
    tab.js(f"({STEP})(25000)")
    frame = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"
    tab.js(frame)
    names = {int(token): name for token, name in tab.js(CLASSES).items() if 24_950 < int(token) < 25_010}
    assert len(names) == 59
    assert all(name == ("kept" if token <= 25_000 else "future") for token, name in names.items())
    follows = "document.getElementById('follow').checked"
    assert tab.js(follows)
    tab.call("Input.dispatchMouseEvent", type="mouseWheel", x=300, y=600, deltaX=0, deltaY=-500)
    tab.wait(f"!{follows}", 10)
    tab.js("document.getElementById('text').scrollTop = 0")
    tab.js(frame)
    assert tab.js("document.querySelector('#text span[data-token=\"3\"]').className") == "gone"
    assert tab.js("document.querySelectorAll('#text span').length") < 5000
    tab.js("document.getElementById('play').click()")
    tab.wait("+document.getElementById('time').value > 25000", 20)
    tab.js("document.getElementById('play').click()")
