"""kvsieve beside its neighbours: the same model, prompt, budget and machine, each rival in an environment of its own versions.

    python benches/peers/run.py                                     # every rival, 2,000 tokens, 1,024 of them kept
    python benches/peers/run.py --rivals kvsieve openvino --rounds 5 --json out/peers.json
    python benches/peers/run.py --render benches/record/peers.json  # the table of the page, from a record

First each row answers for its quality: the negative log-likelihood of the text that follows the prompt, token by token through the
cache, and the digits of two numbers that the prompt names. Then all rows take turns: a round reads the prompt into a new cache and
decodes greedily. Only ratios of the same rounds mean something. A rival that fails is a row with its error. The page is
docs/results/peers.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script it is no package
    sys.path.insert(0, str(Path(__file__).parents[1]))

from peers import cases, driver, environments, table
from peers.cases import Row

WORKER = Path(__file__).with_name("worker.py")
FORCED = 64
"""Tokens of the text after the prompt by which perplexity is measured."""

KEYS = {"near": ("harbour", "90736"), "far": ("lighthouse", "48213")}
"""Two facts in the prompt: half a budget before its end, and at a quarter of it, which is outside of the last `budget` tokens."""
TOLD = " The secret number of the {what} is {key}. Remember it."
ASKED = "\nQuestion: what is the secret number of the {what}?\nAnswer: the secret number of the {what} is"


class Refused(Exception):
    """Wrong arguments; the message is one line."""


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line on standard error."""
    given = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers too
    try:
        if given.page is not None and given.render is None:
            raise Refused("--page needs --render FILE, the record that belongs on the page")
        if given.render is not None:
            render(read_record(given.render), given.page)
        else:
            Run(given).go()
    except (Refused, environments.EnvironmentFault) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--rivals", nargs="+", choices=cases.RIVALS, default=list(cases.RIVALS), metavar="RIVAL", help=", ".join(cases.RIVALS)
    )
    made.add_argument("--match", nargs="+", metavar="TEXT", help="only rows whose description has one of these in it")
    made.add_argument("--budget", type=positive(128, 32), default=1024, help="tokens that a bounded cache keeps (1024)")
    made.add_argument("--prompt", type=positive(256), default=2000, help="tokens that are read (2000)")
    made.add_argument("--tokens", type=positive(2), default=16, help="tokens that are decoded in a round (16)")
    made.add_argument("--rounds", type=positive(0), default=3, help="of each row; 0 for quality alone (3)")
    made.add_argument("--json", type=Path, metavar="FILE", help="the record, written after every answer")
    made.add_argument("--resume", action="store_true", help="keep what the record has, and measure what it lacks")
    made.add_argument("--timeout", type=positive(1), default=600, help="seconds that a rival has for an answer (600)")
    made.add_argument("--memory", type=positive(1), default=8, help="GiB that a rival may take (8)")
    made.add_argument("--no-quality", action="store_true", help="rounds alone; --resume adds the rest another time")
    made.add_argument("--render", type=Path, metavar="FILE", help="print the tables of a record, and measure nothing")
    made.add_argument(
        "--page", type=Path, metavar="FILE", help="with --render: put them into this page, where it has those of before"
    )
    return made


def positive(least: int, step: int = 1) -> Any:
    """An argument's type: a whole number of at least so much, a multiple of ``step``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least or value % step:
            of = f", a multiple of {step}" if step > 1 else ""
            raise argparse.ArgumentTypeError(f"{text}: at least {least}{of}")
        return value

    return number


def read_record(path: Path) -> dict[str, Any]:
    """A record. Raises `Refused` for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["runs"], dict):
            raise TypeError("runs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is not a record of this bench: {' '.join(str(error).split())[:200]}") from None
    return dict(found)


def render(record: dict[str, Any], page: Path | None) -> None:
    """The tables onto standard output, or between the marks of a page."""
    if page is None:
        print(table.page_tables(record), end="")
        return
    try:
        text = page.read_text(encoding="utf-8")
        page.write_text(table.placed(text, record), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Refused(f"--page {page}: {error}") from None


class Run:
    """One prompt's length: its record is ``runs[prompt]`` of the file."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        if 3 * given.prompt < 4 * given.budget + 256:
            raise Refused(f"--prompt {given.prompt} is too short: a quarter of it must lie outside of --budget {given.budget}")
        if given.resume and given.json is None:
            raise Refused("--resume needs --json FILE, the record to go on with")
        if given.json is not None and not given.json.parent.is_dir():
            raise Refused(f"--json {given.json}: there is no folder {given.json.parent}")
        chosen = [row for row in cases.rows(given.budget, given.prompt) if row.rival in given.rivals]
        self.rows = {row.key: row for row in chosen if given.match is None or any(text in row.key for text in given.match)}
        if not self.rows:
            raise Refused(f"no row has {' or '.join(map(repr, given.match))} in its description")
        self.settings = {name: getattr(given, name) for name in ("budget", "prompt", "tokens")} | {"forced": FORCED}
        self.record = self.begun()
        self.run: dict[str, Any] = self.record["runs"][str(given.prompt)]

    def begun(self) -> dict[str, Any]:
        """The record to go on with; nothing is written yet."""
        path, name = self.given.json, str(self.given.prompt)
        record = read_record(path) if path is not None and path.exists() else {"runs": {}}
        if not self.given.resume or name not in record["runs"]:
            record["runs"][name] = {"settings": self.settings, "machine": machine(), "loads": [], "bandwidths": [], "rows": {}}
        elif (had := record["runs"][name]["settings"]) != self.settings:
            different = [key for key, value in self.settings.items() if had.get(key) != value]
            raise Refused(
                f"--resume: {path} was measured with another {different[0]} ({had.get(different[0])}); leave --resume out"
            )
        return record

    def go(self) -> None:
        """Environments, quality, rounds, the table."""
        pythons = {rival: environments.python_of(rival, told) for rival in dict.fromkeys(row.rival for row in self.rows.values())}
        files = {
            weights: environments.weights_file(weights) for weights in dict.fromkeys(row.weights for row in self.rows.values())
        }
        self.texts()
        with tempfile.TemporaryDirectory(prefix="peers-") as logs:
            by_worker = {row.worker: row for row in self.rows.values()}

            def start(worker: str) -> driver.Process:
                row = by_worker[worker]
                log = Path(logs) / f"{len(list(Path(logs).iterdir()))}.log"
                limit = str(self.given.memory)
                command = [
                    str(pythons[row.rival]),
                    str(WORKER),
                    row.rival,
                    str(files[row.weights]),
                    row.weights,
                    row.compute,
                    limit,
                ]
                return driver.Process(command, log, workers_environment(row.rival))

            self.workers = driver.Workers(start, self.given.timeout)
            try:
                for row in self.rows.values():
                    self.greet(row)
                    if not self.given.no_quality:
                        self.quality(row)
                driver.turns(self.rows, self.missing, self.measure, self.fail, self.yardstick)
            finally:
                self.workers.close()
        print(table.page_tables({"runs": {str(self.given.prompt): self.run}}), end="")

    def texts(self) -> None:
        """The prompt, what follows it, and the questions, as ids of kvsieve's environment."""
        from pydoc_data.topics import topics

        from transformers import AutoTokenizer

        file = environments.weights_file("Q4_1")
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.text = "\n\n".join(topics.values())
        length, ids = self.given.prompt, self.encode(self.text)
        if len(ids) < length + FORCED:
            raise Refused(f"--prompt {length}: the text has {len(ids)} tokens, at most {len(ids) - FORCED} are a prompt")
        at = {"near": length - self.given.budget // 2, "far": length // 4}
        for where in sorted(at, key=at.__getitem__):
            what, key = KEYS[where]
            ids[at[where] : at[where]] = self.encode(TOLD.format(what=what, key=key))
        self.prompt, self.following = ids[:length], ids[length : length + FORCED]
        self.questions = {where: self.encode(ASKED.format(what=what)) for where, (what, _) in KEYS.items()}
        self.digits = {where: self.encode(f" {key}") for where, (_, key) in KEYS.items()}

    def encode(self, text: str) -> list[int]:
        """Ids by kvsieve's tokenizer."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # ------------------------------------------------------------------------------------------------------------------- one row

    def entry(self, row: Row) -> dict[str, Any]:
        """What is known of a row."""
        found: dict[str, Any] = self.run["rows"].setdefault(row.key, {**row.as_dict(), "error": None, "rounds": []})
        return found

    def missing(self, key: str) -> int:
        """Rounds that a row still lacks."""
        entry = self.entry(self.rows[key])
        return 0 if entry["error"] else max(self.given.rounds - len(entry["rounds"]), 0)

    def greet(self, row: Row) -> None:
        """Versions and tokenizer, if the record lacks them."""
        entry = self.entry(row)
        if entry["error"] or "versions" in entry:
            return
        try:
            said = self.workers.ask(row.worker, {"do": "hello", "text": self.text[:20000]})
        except driver.Fault as fault:
            self.fail(row.key, str(fault))
            return
        same = said["ids"] == self.encode(self.text[:20000]) if said["ids"] else None
        size = said["weights_bytes"] or environments.weights_bytes(row.weights)
        self.keep(row, entry | {"versions": said["versions"], "same_ids": same, "weights_bytes": size})

    def quality(self, row: Row) -> None:
        """Log-likelihoods and digits: what the record lacks of them."""
        entry = self.entry(row)
        try:
            if not entry["error"] and not row.no_nll and "nll" not in entry:
                self.keep(row, entry | self.score(row))
            for where in KEYS:
                if not (entry := self.entry(row))["error"] and where not in entry.get("digits", {}):
                    self.keep(row, entry | {"digits": {**entry.get("digits", {}), where: self.answered(row, where)}})
        except driver.Fault as fault:
            self.fail(row.key, str(fault))

    def score(self, row: Row) -> dict[str, Any]:
        """Through one cache: the text that follows, then both questions with their answers."""
        forced, places = list(self.following), {}
        for where in KEYS:
            forced += self.questions[where]
            places[where] = slice(len(forced), len(forced) + len(self.digits[where]))
            forced += self.digits[where]
        told = self.workers.ask(row.worker, {"do": "score", "row": row.as_dict(), "prompt": self.prompt, "following": forced})
        found: dict[str, Any] = {"nll": statistics.fmean(told["nll"][:FORCED])}
        if told["best"]:
            found["digits"] = {where: right(told["best"][place], self.digits[where]) for where, place in places.items()}
        return found

    def answered(self, row: Row, where: str) -> int:
        """Right digits of a rival that generates and does not score: the question is the end of its prompt."""
        prompt = [*self.prompt, *self.questions[where]]
        asked = {"do": "generate", "row": row.as_dict(), "prompt": prompt, "tokens": len(self.digits[where])}
        return right(self.workers.ask(row.worker, asked)["tokens"], self.digits[where])

    def measure(self, key: str) -> None:
        """One round."""
        row = self.rows[key]
        asked = {"do": "round", "row": row.as_dict(), "prompt": self.prompt, "tokens": self.given.tokens}
        entry = self.entry(row)
        entry["rounds"].append(self.workers.ask(row.worker, asked))
        self.keep(row, entry)

    def fail(self, key: str, error: str) -> None:
        """A row with its error."""
        row = self.rows[key]
        self.keep(row, self.entry(row) | {"error": error})

    def keep(self, row: Row, entry: dict[str, Any]) -> None:
        """Into the record, and onto the disk, whole or not at all."""
        self.run["rows"][row.key] = entry
        told(f"{row.key}: {summary(entry)}")
        self.write()

    def yardstick(self) -> None:
        """The machine's load and read bandwidth, before every turn of all rows."""
        from kvsieve.bench import measure

        moved, runs = measure.readers()
        self.run["bandwidths"].append(moved / min(time.min for time in measure.interleaved(runs, 5).values()))
        self.run["loads"].append(os.getloadavg()[0])

    def write(self) -> None:
        """The record's file, whole or not at all."""
        if (path := self.given.json) is not None:
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
            aside.replace(path)


def right(said: list[int], digits: list[int]) -> int:
    """How many digits are in their places; the first token is the space before them."""
    return sum(a == b for a, b in zip(said[1:], digits[1:]))


def summary(entry: dict[str, Any]) -> str:
    """A row in progress, on one line."""
    if entry["error"]:
        return f"error: {entry['error']}"
    if not entry["rounds"]:
        return ", ".join(f"{name} {entry[name]}" for name in ("nll", "digits") if name in entry) or "started"
    last = entry["rounds"][-1]
    seconds = ", ".join(f"{what} {last[what]['cpu']:.2f} s" for what in ("prefill", "decode"))
    return f"round {len(entry['rounds'])}: {seconds}, {last['bytes']} bytes"


def told(text: str) -> None:
    """Progress, on standard error: the tables alone are the output."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    from kvsieve import _core
    from kvsieve.bench import report

    return {"cpu": report._cpu(), "instruction_set": _core.isa(), "python": platform.python_version(), "system": platform.system()}


def workers_environment(rival: str) -> dict[str, str]:
    """One thread, no network, and kvsieve where this process has it."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    found = importlib.util.find_spec("kvsieve")
    ours = str(Path(found.origin).parents[1]) if found is not None and found.origin is not None and rival == "kvsieve" else ""
    return {**threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ours}


if __name__ == "__main__":
    sys.exit(main())
