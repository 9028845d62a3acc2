"""The page that `make report` writes: one file with its tables, figures and commands; light and dark as the reader's system is."""

from __future__ import annotations

import datetime
import html
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tables import Rows


class Part(NamedTuple):
    """A command: its name here, its arguments, and whether it can go on with the file of its results."""

    name: str
    arguments: tuple[str, ...]
    resumable: bool = True


class Section(NamedTuple):
    """Parts that are shown together.

    Attributes:
        what: what they show, for the reader.
        record: from the JSON of the parts, by name, to what the tables and figures are made of.
        tables: a caption for each function that makes rows; figures: functions that draw in a theme.
    """

    title: str
    what: str
    parts: tuple[Part, ...]
    record: Callable[[dict[str, Any]], Any]
    tables: tuple[tuple[str, Callable[[Any], Rows]], ...]
    figures: tuple[Callable[[Any, str], str], ...] = ()


class Results(Protocol):
    """What became of the parts."""

    state: dict[str, dict[str, Any]]

    def record(self, part: Part) -> Any:
        """What the part's file of results holds; None where there is none."""

    def log_of(self, part: Part) -> str:
        """What the part said."""


def today() -> str:
    return datetime.date.today().isoformat()


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --grid: #d1d9e0; --back: #ffffff; --soft: #f6f8fa;
  --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --text: #f0f6fc; --muted: #9198a1; --grid: #3d444d; --back: #0d1117; --soft: #151b23; --bad: #ff7b72 } }
body { font: 15px/1.5 -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif; color: var(--text);
  background: var(--back); max-width: 1280px; margin: 2rem auto; padding: 0 1.5rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--grid); padding-bottom: .2rem }
h3 { font-size: 1rem }
p.lead { color: var(--muted); margin-top: .2rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text, th.text { text-align: left } th { color: var(--muted); font-weight: 600 }
code, pre { font: 12.5px/1.45 ui-monospace, 'DejaVu Sans Mono', Menlo, monospace }
pre { background: var(--soft); padding: .7rem 1rem; overflow-x: auto; border-radius: 6px; max-height: 24rem }
.bad { color: var(--bad); font-weight: 600 } svg { max-width: 100%; height: auto } .dark { display: none }
@media (prefers-color-scheme: dark) { .light { display: none } .dark { display: block } }
details { margin: .4rem 0 } summary { cursor: pointer; color: var(--muted) } nav a { margin-right: 1rem }
"""


def rich(text: str) -> str:
    """Text with what stands between backticks as code."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def table_of(rows: Rows, left: int = 1) -> str:
    """A table; the first ``left`` columns are text."""
    header, *others = rows

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = (f"<{tag}{' class=text' if at < left else ''}>{rich(cell)}</{tag}>" for at, cell in enumerate(cells))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(line("td", row) for row in others)
    return f'<div class="scroll"><table><thead>{line("th", header)}</thead><tbody>\n{body}\n</tbody></table></div>'


def status_of(state: Mapping[str, Any]) -> str:
    status = state.get("status", "left out")
    return f"<span class=bad>{status}</span>" if status in ("failed", "interrupted") else status


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def shown(section: Section, runner: Results) -> tuple[str, bool]:
    """A section of the page, and whether everything in it could be made."""
    parts, good = [f'<h2 id="{anchor(section.title)}">{section.title}</h2><p>{rich(section.what)}</p>'], True
    found = {part.name.removeprefix("eval-"): runner.record(part) for part in section.parts}
    found = {name: told for name, told in found.items() if told is not None}
    left = [part.name for part in section.parts if runner.state.get(part.name, {}).get("status", "left out") == "left out"]
    if left:
        parts.append(f"<p>left out, the time was up: {', '.join(f'<code>{name}</code>' for name in left)}</p>")
    for part in section.parts:
        state = runner.state.get(part.name, {})
        if state.get("status", "left out") not in ("done", "left out"):
            parts.append(f"<p>{status_of(state)}: <code>{html.escape(part.name)}</code> {html.escape(state.get('said', ''))}</p>")
    if found:
        try:
            record = section.record(found)
            for caption, rows in section.tables:
                parts.append(f"<h3>{caption}</h3>{table_of(rows(record))}")
            for draw in section.figures:
                parts += [f'<div class="{theme}">{draw(record, theme)}</div>' for theme in ("light", "dark")]
        except Exception as error:  # a file of an interrupted run may lack what a table needs: the page says so and goes on
            good = any(runner.state.get(part.name, {}).get("status") != "done" for part in section.parts)
            parts.append(f"<p><span class=bad>not shown</span>: {html.escape(repr(error))}</p>")
    for part in section.parts:
        state, log = runner.state.get(part.name, {}), runner.log_of(part)
        summary = f"<code>{html.escape(state.get('command', shlex.join(('kvsieve', *part.arguments))))}</code>"
        if log:
            parts.append(f"<details><summary>{summary}</summary><pre>{html.escape(log)}</pre></details>")
    return "\n".join(parts), good


def page(chosen: Sequence[Section], runner: Results, facts: Mapping[str, Any], minutes: float) -> tuple[str, bool]:
    """The whole page, and whether everything could be made."""
    made = [shown(section, runner) for section in chosen]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items() if version)
    machine = f"{cpu()}, {os.cpu_count()} processors, {facts.get('instruction_set')}; {platform.platform()}"
    overview = [["part", "", "command", "seconds", "CPU seconds"]]
    for section in chosen:
        for part in section.parts:
            state = runner.state.get(part.name, {})
            took = (f"{state[name]:.0f}" if state.get(name) else "" for name in ("seconds", "cpu_seconds"))
            overview.append([part.name, state.get("status", "left out"), f"`{state.get('command', '')}`", *took])
    states = [runner.state.get(part.name, {}).get("status", "left out") for section in chosen for part in section.parts]
    counts = ", ".join(f"{states.count(status)} {status}" for status in dict.fromkeys(states))
    bad = [part.name for section in chosen for part in section.parts if runner.state.get(part.name, {}).get("status") == "failed"]
    told = f" <span class=bad>Failed: {', '.join(bad)}.</span>" if bad else ""
    nav = " ".join(f'<a href="#{anchor(section.title)}">{section.title}</a>' for section in chosen)
    head = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>kvsieve: what was measured here</title><style>{STYLE}</style></head><body>",
        f"<h1>kvsieve: what was measured here</h1><p class=lead>{today()}. {html.escape(machine)}. {html.escape(versions)}. "
        f"Made by <code>make report</code> in at most {minutes:g} minutes: short runs, which show that everything works "
        "and about where it stands. Ratios within one run mean something on a shared machine, milliseconds little.</p>",
        f"<p>{len(states)} <a href='#parts'>parts</a>: {counts}.{told}</p>",
        f"<nav>{nav}</nav>",
    ]
    tail = [f'<h2 id="parts">All parts</h2>{table_of(overview, left=3)}', "</body></html>\n"]
    return "\n".join([*head, *(text for text, _ in made), *tail]), all(good for _, good in made)
