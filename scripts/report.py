"""`make report`: a little of each kind of measurement, and a page that shows it (``out/report/index.html``), all in one file.

    python scripts/report.py [--minutes 20] [--resume] [--only NAME ...] [--out out/report]

Every part is a command of ``kvsieve`` with its JSON and its output under ``out/report/parts``. A part that fails is shown as
failed, with what it said, and makes the exit status 1; the others go on. When the time is up, the part at work is interrupted and
what is left is left out; `--resume` goes on with both, and runs nothing again that is done. The figures of so short runs show that
everything works and about where it stands: docs/results has the long ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import tables
from report_page import Part, Section, cpu, page, today

ROOT = Path(__file__).resolve().parent.parent
TASKS = (
    *("passkey", "niah-single", "niah-multikey", "niah-multivalue", "niah-multiquery", "variable-tracking", "common-words"),
    *("frequent-words", "kv-turns", "chat-memory", "grocery", "rps", "copy"),
)
POLICIES = ("full()", "sirllm(256)", "quest(256)")
GRACE = 20
"""Seconds that an interrupted part has to end."""


def only(found: dict[str, Any]) -> Any:
    """The record of a section of one part."""
    (told,) = found.values()
    return told


def of_tasks(found: dict[str, Any]) -> Any:
    """Files of single tasks as one record, as in ``benches/record/tasks.json``."""
    return {"date": today(), "machine": cpu(), "runs": found}


def of_demo(found: dict[str, Any]) -> Any:
    told = only(found)
    return {**told, "date": today(), "command": "kvsieve demo --quick", "machine": {**told["machine"], "name": cpu()}}


def sections(minutes: float) -> tuple[Section, ...]:
    """What is measured in so many minutes: more cases and longer texts where there is time."""
    cases, length = ("1", "1024") if minutes < 40 else ("2", "2048")
    quick = ("--quick",) if minutes < 60 else ()
    policies = [word for text in POLICIES for word in ("--policy", text)]

    def bench(table: str, *more: str) -> tuple[Part, ...]:
        return (Part(f"bench-{table}", ("bench", table, *quick, *more)),)

    def task(name: str) -> Part:
        # Two need room; a copy writes half of its length, token by token.
        mine = {"grocery": "2048", "common-words": "2048", "copy": "512"}.get(name, length)
        return Part(f"eval-{name}", ("eval", name, *policies, "--length", mine, "--cases", cases))

    texts = ("full()", "streamingllm(512)", "sirllm(512)", 'full() | quantized(4, when="prefill")')
    reading = [word for text in texts for word in ("--policy", text)]
    return (
        Section(
            "Whole tokens",
            "The time of a generated token beside transformers' caches, on one thread, in CPU time. `bound`: what a token could "
            "gain if attention cost nothing; `least`: reading weights, keys and values once; `ceiling`: what eviction can gain "
            "over `Full()`.",
            bench("decode"),
            only,
            (("Times as fast as DynamicCache", tables.decode),),
            (figures.decode,),
        ),
        Section(
            "Every policy against length",
            "Each cache in a process of its own: what it holds, what the process takes, what a token costs.",
            bench("policies", *(() if minutes > 40 else ("--policy", "full()", "streamingllm(512)", "quest(512)"))),
            only,
            (("Bytes, memory and time", tables.policies),),
            (figures.policies,),
        ),
        Section(
            "One layer, one query",
            "Decode attention of one layer: ours, generate's own call, and the best exact formulation of torch.",
            bench("attend"),
            only,
            (("Times of others as multiples of ours", tables.attend),),
        ),
        Section(
            "One layer, many queries",
            "Attention of a chunk of queries; windows take the same time for each query, however long the chunk.",
            bench("prefill"),
            only,
            (("Times of others as multiples of ours", tables.prefill),),
        ),
        Section(
            "Perplexity of a text",
            "A text streams through each policy; each token is predicted from what is held.",
            (Part("eval-perplexity", ("eval", "perplexity", *reading, "--length", "2048" if minutes < 40 else "8192")),),
            only,
            (("Nats a token", tables.perplexities),),
        ),
        Section(
            "Tasks",
            "What is answered about a text that was read before the question came. So few cases rank nothing.",
            tuple(map(task, TASKS)),
            of_tasks,
            (("Mean scores", tables.task_scores), ("Most bytes of any case", tables.task_bytes)),
            (figures.tasks,),
        ),
        Section(
            "Finding a policy",
            "Candidates within a budget of bytes, on the same text.",
            (Part("tune", ("tune", "--bytes", "20MB", "--length", "1024", "--seconds", str(int(6 * minutes)))),),
            only,
            (("Candidates", tables.tuned),),
        ),
        Section(
            "The demo",
            "A long text and shopping lists under a full cache and bounded memories.",
            (Part("demo", ("demo", "--quick"), resumable=False),),
            of_demo,
            (("Reading and recall", tables.demo),),
            (figures.demo,),
        ),
    )


# -------------------------------------------------------------------------------------------------------------------------- running


def children_seconds() -> float:
    """CPU seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Runner:
    """Runs parts, and keeps what became of each in ``parts/state.json``: ``done``, ``failed``, ``interrupted`` or ``left out``."""

    def __init__(self, out: Path, resume: bool, minutes: float, program: Sequence[str]) -> None:
        self.folder, self.program, self.resume = out / "parts", tuple(program), resume
        self.until = time.monotonic() + 60 * minutes
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.state: dict[str, dict[str, Any]] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {}

    def json_of(self, part: Part) -> Path:
        return self.folder / f"{part.name}.json" if part.name != "demo" else self.folder / "demo" / "report.json"

    def log_of(self, part: Part) -> str:
        try:
            return (self.folder / f"{part.name}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def record(self, part: Part) -> Any:
        """What the part's file of results holds; None where there is none that can be read."""
        try:
            return json.loads(self.json_of(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def run(self, part: Part) -> None:
        command = shlex.join(("kvsieve", *part.arguments))
        before = self.state.get(part.name, {})
        if before.get("status") == "done" and before.get("command") == command and self.record(part) is not None:
            print(f"{part.name}: done before", flush=True)
            return
        left = self.until - time.monotonic()
        if left <= 0:
            self._became(part, command, "left out", 0.0, "the time was up")
            return
        print(f"{part.name}: {command}", flush=True)
        began, worked = time.monotonic(), children_seconds()
        status, said = self._process(part, before.get("command") == command, left)
        self._became(part, command, status, round(time.monotonic() - began, 1), said, round(children_seconds() - worked, 1))

    def _process(self, part: Part, known: bool, left: float) -> tuple[str, str]:
        """How the part ended, and what it said if not well."""
        file = self.json_of(part)
        told = ["--out", str(file.parent)] if part.name == "demo" else ["--json", str(file)]
        if known and part.resumable and file.exists():
            told.append("--resume")
        elif part.resumable:
            file.unlink(missing_ok=True)
        with open(self.folder / f"{part.name}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*self.program, *part.arguments, *told],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                # A script that runs in the background ignores Ctrl-C, and its children would.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            try:
                process.wait(left)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
                self._stop(process)
                if isinstance(stopped, KeyboardInterrupt):
                    self._became(part, shlex.join(("kvsieve", *part.arguments)), "interrupted", 0.0, "interrupted")
                    raise
                return "interrupted", "the time was up"
        if process.returncode == 0 and self.record(part) is not None:
            return "done", ""
        lines = self.log_of(part).strip().splitlines()
        return "failed", f"exit status {process.returncode}: {lines[-1] if lines else 'it said nothing'}"

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """As Ctrl-C does: what the part has found so far is in its file already."""
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(GRACE)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _became(self, part: Part, command: str, status: str, seconds: float, said: str, cpu_seconds: float = 0.0) -> None:
        told = {"status": status, "command": command, "seconds": seconds, "cpu_seconds": cpu_seconds, "said": said}
        self.state[part.name] = told
        text = json.dumps(self.state, indent=1) + "\n"
        partial = self.folder / "state.json.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.folder / "state.json")
        if status != "done":
            print(f"{part.name}: {status}: {said}", flush=True)


def main(arguments: Sequence[str], program: Sequence[str] = (sys.executable, "-m", "kvsieve.cli")) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="time for everything; default: 20")
    parser.add_argument("--resume", action="store_true", help="what is done already is not run again")
    parser.add_argument("--only", nargs="+", default=[], help="parts with one of these in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "report", help="folder; default: out/report")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {given.minutes:g}")
    chosen = []
    for section in sections(given.minutes):
        parts = tuple(part for part in section.parts if not given.only or any(word in part.name for word in given.only))
        chosen += [section._replace(parts=parts)] if parts else []
    if not chosen:
        parser.error(f"no part has any of {given.only} in its name")
    runner = Runner(given.out, given.resume, given.minutes, program)
    asked = subprocess.run([*program, "info", "--json"], capture_output=True, text=True, check=False)
    facts = json.loads(asked.stdout) if asked.returncode == 0 else {}
    stopped = False
    try:
        for section in chosen:
            for part in section.parts:
                runner.run(part)
    except KeyboardInterrupt:
        stopped = True
    text, good = page(chosen, runner, facts, given.minutes)
    path = given.out / "index.html"
    path.write_text(text, encoding="utf-8")
    states = [runner.state.get(part.name, {}).get("status", "left out") for section in chosen for part in section.parts]
    told = ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states))
    print(f"{path}: {told}")
    if stopped:
        print("interrupted: make report REPORT_ARGS=--resume goes on")
        return 130
    return int("failed" in states or not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
