"""Every row of the fault matrix, one after the other: a count, and whether anything was wrong.

    python tests/faults/run.py                      # reduced, about ten minutes: `make faults`
    python tests/faults/run.py --times 10           # ten times as much of each
    python tests/faults/run.py --whole --record     # as much as is worth trying once: hours of a core
    python tests/faults/run.py --whole --record --row files --row "core calls"
    python tests/faults/run.py --page               # writes the counts of the record into docs/guarantees.md

Each row is a command of its own (:data:`ROWS`), which can be run for longer by itself. The result goes to `out/faults.json`; with
`--record` each row takes its own place in the record as soon as it is done, and the others stay as they were.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
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
"""Seconds for one row of a reduced run; a whole one may take as long as it does."""


@dataclass(frozen=True)
class Row:
    """One promise and what tries it.

    Attributes:
        what: the promise.
        unit: what is counted.
        script: a file beside this one, and its arguments; ``{n}`` stands for ``size`` times what `--times` says.
        size: how much of it is tried in a reduced run.
        whole: how much in a whole one.
        count: the count of what the script printed, a line of JSON each.
    """

    what: str
    unit: str
    script: tuple[str, ...]
    size: int
    whole: int
    count: Callable[[list[dict[str, Any]]], int]

    def command(self, times: float | None) -> list[str]:
        """The script and its arguments; None stands for a whole run."""
        # Of every so many places one is tried: twice as much is half that number.
        size = self.whole if times is None else self.size / times if "--every" in self.script else self.size * times
        return [part.replace("{n}", str(max(round(size), 1))) for part in self.script]


def total(name: str) -> Callable[[list[dict[str, Any]]], int]:
    """The sum of one number over all lines."""
    return lambda lines: sum(line.get(name, 0) for line in lines)


ROWS = {
    "memory": Row(
        "memory refused anywhere is a `MemoryError`: nothing has changed, or the stream says that it must be reset", "refusals",
        ("inject.py", "--kind", "memory", "--every", "{n}"), 6, 1, total("tried"),
    ),
    "limits": Row(
        "a process that gets no more memory from the system says so, and its streams go on", "refusals",
        ("limits.py", "--refusals", "{n}"), 20, 300, total("refusals"),
    ),
    "panics": Row(
        "a panic anywhere in the core is a `RuntimeError`, and the stream goes on, or says that it must be reset", "panics",
        ("inject.py", "--kind", "panic", "--every", "{n}"), 40, 10, total("tried"),
    ),
    "long texts": Row(
        "memory and time a token stay flat under every bounded policy", "tokens",
        ("long_run.py", "--way", "feed", "--tokens", "{n}"), 80_000, 1_000_000, total("tokens"),
    ),
    "long conversations": Row(
        "so they do when it answers", "tokens",
        ("long_run.py", "--way", "stream.generate", "--tokens", "{n}"), 80_000, 1_000_000, total("tokens"),
    ),
    "long texts of callers": Row(
        "so they do under `model.generate` and a caller's own loop, beside what a caller's columns cost", "tokens",
        ("long_run.py", "--way", "model.generate", "--way", "forward", "--tokens", "{n}"), 66_000, 1_000_000, total("tokens"),
    ),
    "streams": Row(
        "streams that are opened and closed, forks and marks among them, leave nothing", "streams",
        ("long_run.py", "--way", "streams", "--streams", "{n}"), 500, 10_000, total("streams"),
    ),
    "soak": Row(
        "whatever is done to a stream in whatever order, it goes on as one that was told only what is left", "steps",
        ("soak.py", "--steps", "{n}"), 1_500, 50_000, total("steps"),
    ),
    "threads": Row(
        "threads answer as alone, or are refused; forks of the process and workers never hang", "conversations, calls and forks",
        ("threads.py", "--rounds", "{n}"), 3, 30, total("count"),
    ),
    "interrupts": Row(
        "Ctrl-C is raised within 200 ms, and what follows is as if the call had not been made", "interrupts",
        ("interrupts.py", "--moments", "{n}"), 110, 550, total("interrupted"),
    ),
    "killed saves": Row(
        "a process that is killed in a save leaves the old file or the new one, whole", "kills",
        ("save_kill.py", "--kills", "{n}"), 50, 200, total("kills"),
    ),
    "killed servers": Row(
        "a server that is killed goes on with what it wrote, and with every durable answer, or says that it read again", "kills",
        ("serve_kill.py", "--times", "{n}"), 6, 115, total("killed"),
    ),
    "clients of servers": Row(
        "clients that leave harm nobody, and every answer is the stock model's, also once its conversation was in a file",
        "answers",
        ("serve_clients.py", "--answers", "{n}"), 200, 1_000, total("answers"),
    ),
    "GIL": Row(
        "no call into the core keeps other threads waiting for 20 ms", "calls",
        ("gil.py", "--repeat", "{n}"), 3, 5, len,
    ),
    "instruction sets": Row(
        "every instruction set retains and selects the same, ties by the lowest index", "arrays compared",
        ("isa_levels.py",), 1, 1, total("compared"),
    ),
    "core calls": Row(
        "any argument to the core ends in a result or a typed error", "calls",
        ("fuzz_core.py", "--calls", "{n}"), 20_000, 100_000, total("calls"),
    ),
    "public calls": Row(
        "any argument to a public call ends in a result or a typed error, which changes nothing", "calls",
        ("fuzz_public.py", "--calls", "{n}"), 1_500, 100_000, total("calls"),
    ),
    "files": Row(
        "a changed file is refused, or holds what it says", "files",
        ("fuzz_files.py", "--executions", "{n}"), 3_000, 1_000_000, total("files"),
    ),
}  # fmt: skip


def lines_of(text: str) -> list[dict[str, Any]]:
    """The lines of a script's output that are JSON."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run(name: str, times: float | None) -> dict[str, Any]:
    """What one row's command found; None stands for a whole run."""
    row, began, before = ROWS[name], time.monotonic(), processor()
    script, *arguments = row.command(times)
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=None if times is None else LIMIT, env=env, check=False
        )
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as over:
        status, out, err = -1, str(over.stdout or ""), "it took too long"
    lines = lines_of(out)
    wrong = [text for line in lines for text in _listed(line.get("wrong"))]
    if status and not wrong:
        wrong = [(err.strip().splitlines() or out.strip().splitlines() or ["ended without a word"])[-1][:300]]
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    return {
        "row": name,
        "date": f"{today.day} {today:%B %Y}",
        "machine": machine(),
        "count": row.count(lines),
        "unit": row.unit,
        "command": " ".join([f"tests/faults/{script}", *arguments]),
        "seconds": round(time.monotonic() - began),
        "processor_seconds": round(processor() - before),
        "wrong": wrong[:20],
    }


def processor() -> float:
    """Seconds of processors that the commands of rows have taken: on a busy machine less than goes by on the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _listed(wrong: Any) -> list[str]:
    return wrong if isinstance(wrong, list) else [wrong] if wrong else []


def machine() -> str:
    """The machine in words, with its letter in docs/results/index.md where it is one of those."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model, flags = (re.search(rf"{key}\s*: (.*)", text) for key in ("model name", "flags"))
    name, can = model[1] if model else platform.machine(), set(flags[1].split()) if flags else set()
    letters = {
        "A": "AMD" in name and "avx512_bf16" in can,
        "B": "AMD" in name and "avx2" in can and "avx512f" not in can,
        "C": "Intel" in name and "avx512_fp16" in can,
    }
    letter = next((letter for letter, is_it in letters.items() if is_it), "another")
    return f"{letter} ({os.cpu_count()} cores, {name})"


def table(record: dict[str, Any]) -> str:
    """The rows of a record as a table."""
    runs: dict[tuple[str, str], list[str]] = {}
    for row in record["rows"]:
        runs.setdefault((row["date"], row["machine"]), []).append(row["row"])
    lines = []
    for (date, where), names in runs.items():
        which = "each row" if len(runs) == 1 else ", ".join(names)
        lines.append(f"Recorded {date} on machine {where} by `python tests/faults/run.py --record`: {which}.")
    lines += ["", "| promise | count | verdict | seconds | command |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        verdict = "holds" if not row["wrong"] else f"{len(row['wrong'])} wrong"
        lines.append(
            f"| {ROWS[row['row']].what} | {row['count']:,} {row['unit']} | {verdict} | {row['seconds']:,} | `{row['command']}` |"
        )
    return "\n".join(lines)


def page(text: str, record: dict[str, Any]) -> str:
    """The page with the record's counts."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(record)}\n\n{END}{rest.partition(END)[2]}"


def recorded(path: Path, row: dict[str, Any]) -> None:
    """The row takes its place in the record at ``path``, in the order of :data:`ROWS`."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    known = {one["row"]: one for one in rows} | {row["row"]: row}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"rows": [known[name] for name in ROWS if name in known]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=float, default=1.0, help="how much more, or less, of each row than in a reduced run")
    parser.add_argument("--whole", action="store_true", help="as much of each row as the record holds")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="by default all")
    parser.add_argument("--record", type=Path, nargs="?", const=RECORD, help="put each row there as well")
    parser.add_argument("--page", action="store_true", help="run nothing; write the counts of the record into the page")
    args = parser.parse_args(argv)
    if args.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    failed = False
    for name in args.row or list(ROWS):
        row = run(name, None if args.whole else args.times)
        failed |= bool(row["wrong"])
        verdict = "holds" if not row["wrong"] else "; ".join(row["wrong"][:3])
        took = f"{row['seconds']} s ({row['processor_seconds']} of a processor)"
        print(f"{name}: {row['count']:,} {row['unit']} in {took}: {verdict}", flush=True)
        for path in (ROOT / "out" / "faults.json", args.record):
            if path is not None:
                recorded(path, row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
