"""The tables of docs/results/peers.md, made of a record and of nothing else."""

from __future__ import annotations

import math
import statistics
from itertools import takewhile
from typing import Any

__all__ = ["page_tables", "placed", "run_table"]

HEAD = (
    "rival",
    "cache",
    "weights",
    "arithmetic",
    "stored in",
    "prefill, tokens/s",
    "decode, ms",
    "bound, ms",
    "held, MiB",
    "peak, MiB",
    "perplexity",
    "digits near, far",
    "agrees",
)
REFERENCE = "transformers / DynamicCache / F32 / float32 / float32"
NAMES = {"quanto": "transformers", "openvino": "OpenVINO GenAI", "llamacpp": "llama.cpp"}
EMPTY = "–"


def page_tables(record: dict[str, Any]) -> str:
    """Every run's table, the shortest prompt first."""
    return "\n".join(run_table(record["runs"][name]) for name in sorted(record["runs"], key=int))


def placed(page: str, record: dict[str, Any]) -> str:
    """``page`` with each run's table between its marks, ``<!-- prompt 2000 -->`` and ``<!-- end -->``.

    Raises `ValueError` for a run that has no place there.
    """
    for name in sorted(record["runs"], key=int):
        begin, end = f"<!-- prompt {name} -->\n", "<!-- end -->\n"
        if begin not in page:
            raise ValueError(f"it has no line {begin.strip()}")
        before, rest = page.split(begin, 1)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"it has no line {end.strip()} after {begin.strip()}")
        page = f"{before}{begin}\n{run_table(record['runs'][name])}\n{end}{after}"
    return page


def run_table(run: dict[str, Any]) -> str:
    """One run: the table, the errors of rows that failed, and what the numbers belong to."""
    rows = run["rows"]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells(entry, run)) + " |" for entry in rows.values()]
    failed = [f"* {described(entry)} failed: `{entry['error'].replace('`', '')}`" for entry in rows.values() if entry["error"]]
    return "\n".join([*lines, "", *failed, *([""] if failed else []), facts(run)]) + "\n"


def described(entry: dict[str, Any]) -> str:
    """A row in words."""
    rival = NAMES.get(entry["rival"], entry["rival"])
    return f"{rival}, {entry['name']}, weights {entry['weights']}, {entry['compute']}, stored in {entry['cache']}"


def cells(entry: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """The cells of a row; a figure that there is not is a dash."""
    rounds, settings = entry["rounds"], run["settings"]
    name = (
        f"`{entry['name']}`"
        if entry["rival"] in ("kvsieve", "transformers", "kvpress") and "no press" not in entry["name"]
        else entry["name"]
    )
    found = [
        NAMES.get(entry["rival"], entry["rival"]),
        name.replace("|", "\\|"),
        entry["weights"],
        entry["compute"],
        entry["cache"],
    ]
    if rounds:
        prefill, decode = (statistics.median(one[what]["cpu"] for one in rounds) for what in ("prefill", "decode"))
        held, peak = (statistics.median(one[what] for one in rounds) for what in ("bytes", "peak"))
        found += [f"{settings['prompt'] / prefill:,.0f}", f"{1e3 * decode / settings['tokens']:.1f}", bound(entry, held, run)]
        found += [f"{held / 2**20:.1f}", f"{peak / 2**20:,.0f}"]
    else:
        found += [EMPTY] * 5
    found.append(f"{math.exp(entry['nll']):.2f}" if "nll" in entry else EMPTY)
    digits = entry.get("digits", {})
    found.append(f"{digits['near']}, {digits['far']}" if len(digits) == 2 else EMPTY)
    return [*found, agreement(entry, run)]


def bound(entry: dict[str, Any], held: float, run: dict[str, Any]) -> str:
    """Milliseconds that reading all weights and the whole cache once takes at the bandwidth that one thread had."""
    return f"{1e3 * (entry['weights_bytes'] + held) / statistics.median(run['bandwidths']):.1f}"


def agreement(entry: dict[str, Any], run: dict[str, Any]) -> str:
    """How many of the first tokens, decoded greedily, are those of transformers' full cache in float32."""
    reference = run["rows"].get(REFERENCE, {"rounds": []})["rounds"]
    if not entry["rounds"] or not reference:
        return EMPTY
    both = zip(entry["rounds"][0]["tokens"], reference[0]["tokens"])
    return f"{sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))}/{run['settings']['tokens']}"


def facts(run: dict[str, Any]) -> str:
    """Versions, machine, rounds."""
    rows, machine = run["rows"].values(), run["machine"]
    versions = {f"{name} {version}": None for entry in rows for name, version in entry.get("versions", {}).items()}
    rounds = sorted({len(entry["rounds"]) for entry in rows if entry["rounds"]})
    lines = [f"{machine['cpu']} ({machine['instruction_set']}), Python {machine['python']}: {', '.join(versions)}."]
    if rounds:
        many = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        loads, widths = run["loads"], run["bandwidths"]
        lines.append(
            f"Medians of {many} interleaved rounds of {run['settings']['tokens']} tokens; "
            f"load {min(loads):.1f} to {max(loads):.1f}; one thread read {min(widths) / 1e9:.1f} to {max(widths) / 1e9:.1f} GB/s."
        )
    other = [described(entry) for entry in rows if entry.get("same_ids") is False]
    lines.append(f"Other token ids: {'; '.join(other)}." if other else "Every tokenizer that could be asked gives the same ids.")
    return "\n".join(lines)
