"""Every row of the fault matrix, one after the other: a count, and whether anything was wrong.

    python tests/faults/run.py                      # reduced, about ten minutes: `make faults`
    python tests/faults/run.py --times 10           # ten times as much of each
    python tests/faults/run.py --record benches/record/faults.json
    python tests/faults/run.py --page               # writes the counts of the record into docs/guarantees.md

Each row is a command of its own (:data:`ROWS`), which can be run for longer by itself. The result goes to `out/faults.json` too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE, RECORD = ROOT / "docs" / "guarantees.md", ROOT / "benches" / "record" / "faults.json"
BEGIN, END = "<!-- counts: python tests/faults/run.py --page -->", "<!-- end of counts -->"
LIMIT = 1800
"""Seconds for one row."""


@dataclass(frozen=True)
class Row:
    """One promise and what tries it.

    Attributes:
        what: the promise.
        unit: what is counted.
        script: a file beside this one, and its arguments; ``{n}`` stands for ``size`` times what `--times` says.
        size: how much of it is tried in a reduced run.
        count: the count of what the script printed, a line of JSON each.
    """

    what: str
    unit: str
    script: tuple[str, ...]
    size: int
    count: Callable[[list[dict[str, Any]]], int]

    def command(self, times: float) -> list[str]:
        return [part.replace("{n}", str(max(round(self.size * times), 1))) for part in self.script]


def total(name: str) -> Callable[[list[dict[str, Any]]], int]:
    """The sum of one number over all lines."""
    return lambda lines: sum(line.get(name, 0) for line in lines)


ROWS = {
    "memory": Row(
        "memory refused anywhere is a `MemoryError`: nothing has changed, or the stream says that it must be reset", "refusals",
        ("inject.py", "--kind", "memory", "--every", "{n}"), 3, total("tried"),
    ),
    "panics": Row(
        "a panic anywhere in the core is a `RuntimeError`, and the stream goes on, or says that it must be reset", "panics",
        ("inject.py", "--kind", "panic", "--every", "{n}"), 40, total("tried"),
    ),
    "long texts": Row(
        "memory and time a token stay flat under every bounded policy, however it is fed", "tokens",
        ("long_run.py", "--tokens", "{n}", "--streams", "1"), 12_000, total("tokens"),
    ),
    "streams": Row(
        "streams that are opened and closed, forks and marks among them, leave nothing", "streams",
        ("long_run.py", "--way", "streams", "--streams", "{n}"), 1_000, total("streams"),
    ),
    "threads": Row(
        "threads answer as alone, or are refused; forks of the process and workers never hang", "conversations, calls and forks",
        ("threads.py", "--rounds", "{n}"), 3, total("count"),
    ),
    "interrupts": Row(
        "Ctrl-C is raised within 200 ms, and what follows is as if the call had not been made", "interrupts",
        ("interrupts.py", "--moments", "{n}"), 110, total("interrupted"),
    ),
    "killed servers": Row(
        "a server that is killed goes on with what it wrote, and with every durable answer, or says that it read again", "kills",
        ("serve_kill.py", "--times", "{n}"), 6, total("killed"),
    ),
    "clients of servers": Row(
        "clients that leave harm nobody, and every answer is the stock model's, also once its conversation was in a file",
        "answers",
        ("serve_clients.py", "--answers", "{n}"), 200, total("answers"),
    ),
    "GIL": Row(
        "no call into the core keeps other threads waiting for 20 ms", "calls",
        ("gil.py", "--repeat", "{n}"), 3, len,
    ),
    "instruction sets": Row(
        "every instruction set retains and selects the same, ties by the lowest index", "arrays compared",
        ("isa_levels.py",), 1, total("compared"),
    ),
    "core calls": Row(
        "any argument to the core ends in a result or a typed error", "calls",
        ("fuzz_core.py", "--calls", "{n}"), 20_000, lambda lines: 0,
    ),
    "public calls": Row(
        "any argument to a public call ends in a result or a typed error, which changes nothing", "calls",
        ("fuzz_public.py", "--calls", "{n}"), 1_500, lambda lines: 0,
    ),
    "files": Row(
        "a changed file is refused, or holds what it says", "files",
        ("fuzz_files.py", "--executions", "{n}"), 3_000, lambda lines: 0,
    ),
}  # fmt: skip


def lines_of(text: str) -> list[dict[str, Any]]:
    """The lines of a script's output that are JSON."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run(name: str, times: float) -> dict[str, Any]:
    """What one row's command found."""
    row, began = ROWS[name], time.monotonic()
    script, *arguments = row.command(1 / times if "--every" in row.script else times)
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=env, check=False)
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as over:
        status, out, err = -1, str(over.stdout or ""), "it took too long"
    lines = lines_of(out)
    wrong = [text for line in lines for text in _listed(line.get("wrong"))]
    if status and not wrong:
        wrong = [(err.strip().splitlines() or out.strip().splitlines() or ["ended without a word"])[-1][:300]]
    # The fuzzers print sentences; each was asked for its number, and ends otherwise than well if it does not come to it.
    asked = int(arguments[-1]) if not lines and not status else 0
    return {
        "row": name,
        "count": row.count(lines) or asked,
        "unit": row.unit,
        "command": " ".join([f"tests/faults/{script}", *arguments]),
        "seconds": round(time.monotonic() - began),
        "wrong": wrong[:20],
    }


def _listed(wrong: Any) -> list[str]:
    return wrong if isinstance(wrong, list) else [wrong] if wrong else []


def machine() -> str:
    """The machine in words."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}"


def table(record: dict[str, Any]) -> str:
    """The rows of a record as a table."""
    more = "" if record["times"] == 1 else f' FAULT_ARGS="--times {record["times"]:g}"'
    said = f"Recorded {record['date']} on machine C ({record['machine']}) by `make faults{more}`."
    lines = [said, "", "| promise | count | verdict |"]
    lines.append("|---|---|---|")
    for row in record["rows"]:
        verdict = "holds" if not row["wrong"] else f"{len(row['wrong'])} wrong"
        lines.append(f"| {ROWS[row['row']].what} | {row['count']:,} {row['unit']} | {verdict} |")
    return "\n".join(lines)


def page(text: str, record: dict[str, Any]) -> str:
    """The page with the record's counts."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(record)}\n\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=float, default=1.0, help="how much more, or less, of each row than in a reduced run")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="by default all")
    parser.add_argument("--record", type=Path, help="write the result there as well")
    parser.add_argument("--page", action="store_true", help="run nothing; write the counts of the record into the page")
    args = parser.parse_args(argv)
    if args.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    rows = []
    for name in args.row or list(ROWS):
        rows.append(run(name, args.times))
        verdict = "holds" if not rows[-1]["wrong"] else "; ".join(rows[-1]["wrong"][:3])
        print(f"{name}: {rows[-1]['count']:,} {rows[-1]['unit']} in {rows[-1]['seconds']} s: {verdict}", flush=True)
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    found = {"date": f"{today.day} {today:%B %Y}", "machine": machine(), "times": args.times, "rows": rows}
    for path in (ROOT / "out" / "faults.json", args.record):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
