"""The pictures and pages, drawn from made-up numbers."""

from __future__ import annotations

import io
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from kvsieve.view.curves import Series, plot_curves
from kvsieve.view.live import LiveTable, plain_table
from kvsieve.view.tokens import NUM_LEVELS, TokenMark, TokenSection, score_edges, tokens_page


class Spans(HTMLParser):
    """Collects the class lists and texts of the token spans inside `div.text`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[set[str], str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if tag == "div":
            self._inside = "text" in classes
        elif tag == "span" and self._inside:
            self.tokens.append((classes, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and self.tokens:
            classes, text = self.tokens[-1]
            self.tokens[-1] = (classes, text + data)


def marks() -> list[TokenMark]:
    texts = ["<b>", " &amp", ' "q"', "\n", " plain", " end"]
    return [
        TokenMark(text, i, kept=i % 2 == 0, score=float(i) if i < 4 else math.nan, marked=i == 2) for i, text in enumerate(texts)
    ]


def test_every_token_is_on_the_page_once_and_escaped() -> None:
    page = tokens_page([TokenSection("one", "a caption.", marks())], title="t")
    assert [text for _, text in Spans(page).tokens] == [mark.text for mark in marks()]
    assert page.count("&lt;b&gt;") == 1
    assert "<b></span>" not in page


def test_kept_and_gone_are_counted_as_given() -> None:
    page = tokens_page([TokenSection("one", "", marks()), TokenSection("two", "", marks())], title="t")
    classes = [found for found, _ in Spans(page).tokens]
    assert sum("kept" in found for found in classes) == 2 * 3
    assert sum("gone" in found for found in classes) == 2 * 3
    assert sum("mark" in found for found in classes) == 2
    assert not any({"kept", "gone"} <= found for found in classes)
    assert page.count("<b>3 of 6</b>") == 2


def test_a_token_without_a_score_has_no_level() -> None:
    page = tokens_page([TokenSection("one", "", marks())], title="t")
    levels = [{name for name in found if re.fullmatch(r"s\d", name)} for found, _ in Spans(page).tokens]
    assert [len(found) for found in levels] == [1, 0, 1, 0, 0, 0]


def test_levels_are_equally_full() -> None:
    tokens = [TokenMark("x", i, True, float(i * i)) for i in range(100)]
    found = [classes for classes, _ in Spans(tokens_page([TokenSection("s", "", tokens)], title="t")).tokens]
    assert [sum(f"s{level}" in classes for classes in found) for level in range(NUM_LEVELS)] == [20] * NUM_LEVELS


def test_edges_of_no_scores_and_of_equal_scores() -> None:
    assert score_edges([math.nan]) == []
    assert score_edges([1.0, 1.0]) == [1.0] * (NUM_LEVELS - 1)


def test_titles_and_captions_are_escaped() -> None:
    page = tokens_page([TokenSection("<s>", "<c>", [])], title="<t>", intro="<i>", unit="<u>", marked="<m>")
    assert not re.search(r"<[scium t]>", page.replace("<s ", "").replace("</", ""))
    for letter in "sctium":
        assert f"&lt;{letter}&gt;" in page


def test_the_page_asks_for_nothing_outside_itself() -> None:
    page = tokens_page([TokenSection("one", "", marks())], title="t")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page


def series(name: str = "a", length: int = 3) -> Series:
    return Series(name, [512.0 + 1024 * i for i in range(length)], [2.0] * length, [512, 1024], [2**20, 2**21])


def test_curves_are_a_png_of_some_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "curves.png"
    plot_curves([series("a"), series("b")], path, trained_length=2048, title="t")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 800
    assert height >= 600
    assert len(data) > 10_000


@pytest.mark.filterwarnings("error")
def test_a_trained_length_beyond_the_text_does_not_squeeze_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_curves([series("a")], tmp_path / "far.png", trained_length=1_000_000)
    plot_curves([series("a")], tmp_path / "none.png")
    assert (tmp_path / "far.png").stat().st_size == (tmp_path / "none.png").stat().st_size


def test_curves_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        plot_curves([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="different lengths"):
        plot_curves([Series("a", [1.0], [], [], [])], tmp_path / "x.png")


def test_plain_table_aligns_columns() -> None:
    assert plain_table(("name", "n"), [("a", "1"), ("long name", "1,000")]).splitlines() == [
        "name           n",
        "---------  -----",
        "a              1",
        "long name  1,000",
    ]


def test_live_table_prints_plain_lines_when_it_is_no_terminal() -> None:
    out = io.StringIO()
    with LiveTable(("memory", "tokens", "MiB"), title="reading", out=out) as table:
        table.update("full", "512", "10")
        table.update("full", "1,024", "20")
        table.update("full", "2,048", "40", final=True)
    assert out.getvalue().splitlines() == ["reading", "  full: 512 tokens, 10 MiB", "  full: 2,048 tokens, 40 MiB"]
