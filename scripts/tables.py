"""The tables of the documentation that are made of recorded results: `python scripts/tables.py` writes them into the pages.

A table stands under a line ``<!-- table NAME: python scripts/tables.py -->`` of its page; a blank line may come between. What is
below the line, up to the first line that is no row, is made of a file under ``benches/record`` by a function of this script. A test
compares every page with what this script makes, and the date of the section with that of the file. `--check` says which pages
differ, and writes none.

To add one: record the JSON with a ``date`` (``2026-11-29``), write a function from what is in it to the rows of a table, put the
marker into the page, and a row into ``TABLES``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benches" / "record"

Rows = Sequence[Sequence[str]]
"""A header, and then the rows: cells as they stand in the page."""

MIB = 2**20


class Table(NamedTuple):
    """One table: the page that it is in, its name there, the file of results it is made of, and how."""

    page: str
    name: str
    record: str
    rows: Callable[[Any], Rows]

    @property
    def marker(self) -> str:
        """The line that it stands under."""
        return f"<!-- table {self.name}: python scripts/tables.py -->"

    @property
    def recorded(self) -> Any:
        """What is in the file of results."""
        return json.loads((RECORDS / self.record).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------- how rows are made


def code(text: str) -> str:
    """A policy as the pages write it."""
    return "`" + text.replace("'", '"') + "`"


def task_scores(record: Any) -> Rows:
    """The mean score of each task and policy."""
    runs = record["runs"]
    policies = list(dict.fromkeys(row["policy"] for run in runs.values() for row in run["summary"]))
    rows = []
    for task, run in runs.items():
        mine = {row["policy"]: row for row in run["summary"]}
        cases = {row["cases"] for row in run["summary"]}
        # A run that was interrupted has not come to every policy.
        scores = [f"{100 * mine[policy]['score']:.0f} %" if policy in mine else "" for policy in policies]
        rows.append([f"`{task}`", "/".join(map(str, sorted(cases))), *scores])
    return [["task", "cases", *map(code, policies)], *rows]


def task_bytes(record: Any) -> Rows:
    """The most bytes of any case, by policy."""
    found: dict[str, tuple[int, int]] = {}
    for run in record["runs"].values():
        for row in run["summary"]:
            held, peak = found.get(row["policy"], (0, 0))
            found[row["policy"]] = max(held, row["bytes_held"]), max(peak, row["peak_bytes"] or 0)
    rows = [[code(policy), f"{held / MIB:.1f}", f"{peak / MIB:,.0f}"] for policy, (held, peak) in found.items()]
    return [["policy", "held, MiB", "peak, MiB"], *rows]


def recall(record: Any) -> Rows:
    """The score of one task by policy, and of players without a model."""
    rows = [[code(row["policy"]), f"{100 * row['score']:.0f} %", f"{row['bytes_held'] / MIB:.1f}"] for row in record["summary"]]
    guessed = [[row["player"], f"{100 * row['score']:.0f} %", ""] for row in record["without_a_model"]]
    return [["policy", "score", "held, MiB"], *rows, *guessed]


def prices(record: Any) -> Rows:
    """What storage formats cost after a prompt, beside the full cache."""
    rows = []
    for row in record["prices"]:
        change = "" if row["name"] == "Full()" else f"{100 * row['change']:+.1f} ± {100 * (row['error'] or 0):.1f} %"
        rows.append([code(row["name"]), f"{row['held']:.2f}", f"{row['perplexity']:.3f}", change])
    return [["policy", "bytes after the prompt", "perplexity", "change"], *rows]


def together(record: Any) -> Rows:
    """Conversations answered together and one by one: tokens a second of all, beside transformers and the bound of reading."""
    rows = []
    for row in record["rows"]:
        rates = row["tokens_a_second"]
        told = [str(row["conversations"]), f"{rates['one_by_one']:.1f}", f"{rates['together']:.1f}", f"{row['times']:.2f}"]
        theirs = rates.get("continuous_batching")
        rows.append([*told, "" if theirs is None else f"{theirs:.1f}", f"{rates['bound']:.1f}"])
    header = ["conversations", "one by one, tokens a second", "together", "times as fast"]
    return [[*header, "transformers' continuous batching", "if only reading were left"], *rows]


def turns(record: Any) -> Rows:
    """The first token of a late turn beside that of an early one, on two servers."""
    rows = []
    for name, server in record["servers"].items():
        wall, cpu, held = (server[key] for key in ("first_token_seconds", "first_token_cpu_seconds", "rss_mib"))
        last = next(key for key in wall if key not in ("turn_5", "times"))
        for what, times in (("CPU time", cpu), ("wall", wall)):
            told = [f"`{name}`", what, f"{times['turn_5']:.2f}", f"{times[last]:.2f}", f"{times['times']:.2f}"]
            rows.append([*told, f"{held['turn_5']:,.0f}", f"{held[last]:,.0f}"])
    header = ["server", "", "first token at turn 5, s", f"at {last.replace('_', ' ')}", "times"]
    return [[*header, "the process holds at turn 5, MiB", f"at {last.replace('_', ' ')}"], *rows]


def load(record: Any) -> Rows:
    """What clients found, and what a server took, under load."""
    usage, steps, statuses = record["usage"], record["step_seconds"], record["statuses"]
    early, late = record["memory"][1], record["memory"][-1]
    first = record["first_token_seconds"]
    return [
        ["what", "measured"],
        ["clients, minutes", f"{record['clients']}, {record['minutes']:g}"],
        ["whole answers", f"{usage['answers']:,}"],
        ["left amid an answer", f"{statuses.get('left', 0):,}"],
        ["status 429", f"{statuses.get('429', 0):,}"],
        ["other errors", f"{record['errors']}"],
        ["a step: median, 99th of a hundred", f"{steps['p50']:.2f} s, {steps['p99']:.2f} s"],
        ["the first token of a stream: median, 99th of a hundred", f"{first['p50']:.1f} s, {first['p99']:.1f} s"],
        ["conversations hold at most, of", f"{record['most_held_mib']:.0f} MiB, {record['memory_limit_mib']:.0f} MiB"],
        ["the process holds early, at the end", f"{early['VmRSS']:,.0f} MiB, {late['VmRSS']:,.0f} MiB"],
        ["tokens of prompts: asked, remembered", f"{usage['prompt']:,}, {usage['cached']:,}"],
    ]


def compiled(record: Any) -> Rows:
    """A whole token by compiled code beside one without, and the products of weights in it."""
    rows = []
    for row in record["rows"]:
        times = [f"{row[f'{name}_ms']:.1f}" for name in ("eager", "compiled", "products", "core_products", "reading")]
        rows.append([code(row["policy"]), *times, f"{row['times']:.2f}", f"{row['bound']:.2f}"])
    alone = ["torch's products alone, ms", "the core's, ms", "reading weights, ms"]
    return [["policy", "eager, ms", "compiled, ms", *alone, "times as fast", "if only reading were left"], *rows]


def widths(record: Any) -> Rows:
    """Whole tokens, prompts and what they cost, by the width of the weights."""
    rows = []
    for row in record["rows"]:
        for width, times in row["times"].items():
            token, read = f"{row[f'{width}_ms']:.1f}", row["prompt_tokens_a_second"][width]
            told = [f"{times:.2f}", f"{read:,.0f}", f"{row['nll'][width]:.3f}", f"{row['weight_bytes'][width] / MIB:,.0f} MiB"]
            rows.append([code(row["policy"]), width, token, *told])
    return [
        ["policy", "weights", "a token, ms", "times as fast", "prompt, tokens a second", "nats a token", "read for a token"],
        *rows,
    ]


def prompts(record: Any) -> Rows:
    """Seconds to the first token of whole prompts, and times as fast as transformers."""
    rows = []
    for row in sorted(record["rows"], key=lambda row: (row["dtype"], row["length"])):
        taken, ours = row["seconds"], [name for name in row["seconds"] if name != "transformers"]
        told = [f"{taken[name]:.1f} ({row['times'][name]:.2f})" for name in ours]
        rows.append([row["dtype"], f"{row['length']:,}", str(row["rounds"]), f"{taken['transformers']:.1f}", *told])
    names = [name for name in record["rows"][0]["seconds"] if name != "transformers"]
    return [["dtype", "tokens", "rounds", "transformers, s", *(f"{code(name)}, s (times as fast)" for name in names)], *rows]


def passkeys(record: Any) -> Rows:
    """The passkeys found, by policy and length; the order is that of the depths."""
    found: dict[tuple[str, str], dict[int, dict[float, bool]]] = {}
    for answer in record["answers"]:
        row = answer["policy"], answer.get("dtype", record["dtype"])
        found.setdefault(row, {}).setdefault(answer["length"], {})[answer["depth"]] = answer["found"]
    lengths = sorted({length for row in found.values() for length in row})

    def cell(depths: dict[float, bool] | None) -> str:
        if depths is None:
            return ""
        marks = "".join("+" if depths[at] else "-" for at in sorted(depths))
        return f"{marks.count('+')} of {len(marks)} `{marks}`"

    rows = [[code(policy), dtype, *(cell(row.get(at)) for at in lengths)] for (policy, dtype), row in found.items()]
    return [["policy", "dtype", *(f"{at:,} tokens" for at in lengths)], *rows]


def perplexities(record: Any) -> Rows:
    """A text under several policies: nats a token, perplexity, the last quarter, and bytes."""
    rows = []
    for row in record["rows"]:
        told = [f"{row['mean']:.3f}", f"{math.exp(row['mean']):.2f}", f"{row['tail']:.3f}"]
        rows.append([code(row["policy"]), *told, f"{row['bytes_held'] / MIB:,.0f} MiB"])
    return [["policy", "nats a token", "perplexity", "last quarter, nats a token", "bytes held"], *rows]


def lookups(record: Any) -> Rows:
    """What each rule of InfLLM found of five passkeys: long windows first, heads summed, all queries of the question."""
    chosen = [row for row in record["rows"] if row["heads"] == "sum" and not row["last_query_of_the_question_alone"]]
    rows = []
    for row in sorted(chosen, key=lambda row: (-row["window"], -row["block"], row["blocks"], row["per_head"])):
        recall = sum(row["recall"]) / len(row["recall"])
        told = [row["summary"], f"{row['window']:,}", str(row["block"]), str(row["blocks"]), "yes" if row["per_head"] else "no"]
        rows.append([*told, f"{recall:.2f}", f"{100 * row['digits']:.0f} %", f"`{row['found']}`"])
    return [["summary", "`window`", "`block`", "`blocks`", "`per_head`", "recall", "digits right", "keys"], *rows]


def long_texts(record: Any) -> Rows:
    """A layer's step of decode over a long text: the range of several runs, of each policy beside attention to all keys."""
    rows, runs = [], [row for row in record["rows"] if "all_ms" in row and "infllm_ms" in row]
    for length in dict.fromkeys(row["length"] for row in runs):
        mine = [row for row in runs if row["length"] == length]
        times = [f"{value(mine, f'{name}_ms', 2)}" for name in ("all", "infllm", "infllm_tiered", "longheads", "refreshkv")]
        fast = [value(mine, f"{name}_times_as_fast", 1) for name in ("infllm", "infllm_tiered", "longheads", "refreshkv")]
        rows.append([f"{length:,}, ms", *times])
        rows.append([f"{length:,}, times as fast", "1", *fast])
    return [["tokens", "`Full()`", "`InfLLM()`", "a quarter in memory", "`LongHeads(4096)`", "`RefreshKV(4096)`"], *rows]


def heaviest_steps(record: Any) -> Rows:
    """A layer's step of decode that adds up the heaviest values, beside one that adds up all."""
    rows = []
    for row in record["rows"]:
        if "times_as_fast" in row:
            kind = "4 bits" if row["benchmark"].endswith("-4]") else "plain"
            rows.append(
                [f"{row['length']:,}", kind, f"{row['all_ms']:.1f}", f"{row['heaviest_ms']:.1f}", f"{row['times_as_fast']:.1f}"]
            )
    return [["tokens", "values", "all values, ms", "100 of each head, ms", "times as fast"], *rows]


def heaviest_tokens(record: Any) -> Rows:
    """Whole tokens with values in memory, and in a file."""
    (row,) = (row for row in record["rows"] if "in_file_ms" in row)
    cells = (("`Full()`", "all"), ("`SelectiveV(100)`", "heaviest"), ("a quarter of the values in memory", "in_file"))
    told = [[what, f"{row[f'{name}_ms']:.1f}", f"{row['bytes_held'][name] / 1e6:.0f}"] for what, name in cells]
    return [["policy", "a token, ms", "held, MB"], *told]


def value(rows: Sequence[Any], name: str, digits: int) -> str:
    """The range of a figure."""
    low, high = (f"{edge(row[name] for row in rows):.{digits}f}" for edge in (min, max))
    return low if low == high else f"{low} to {high}"


def demo(record: Any) -> Rows:
    """What each memory of the demo held, how it read, and what it remembered."""
    (low, high), (since, stop) = record["within_positions"], record["compared_positions"]
    shopped = {row["memory"]: row for row in record["shopping"]}
    within = f"nll to {high:,}" if not low else f"nll {low:,} to {high:,}"
    rows = []
    for row in record["reading"]:
        asked = shopped.get(row["memory"])
        nll = ["" if value is None else f"{value:.3f}" for value in (row["nll_within_trained"], row["nll_compared"])]
        recall = ["", ""] if asked is None else [f"{100 * asked['retention']:.0f} %", f"{asked['correct']} of {asked['asked']}"]
        rows.append([row["memory"], f"{row['bytes_held'] / MIB:.1f}", *nll, *recall])
    header = ["memory", "MiB held", within, f"nll {since:,} to {stop:,}", "item tokens kept", "questions answered"]
    return [header, *rows]


def ms(timed: Any) -> str:
    """A median in milliseconds, to three digits, or whole."""
    return f"{timed['median_ms']:.3g}" if timed["median_ms"] < 1000 else f"{timed['median_ms']:,.0f}"


def decode(record: Any) -> Rows:
    """Whole tokens: times as fast as transformers' full cache, and the limits."""
    rivals = [name for name in ("StaticCache", "QuantizedCache") if any(name in row["times"] for row in record["rows"])]
    ours = {"Full": "`Full()`", "StreamingLLM": None, "LMInfinite": None, "SirLLM": None}
    rows = []
    for row in record["rows"]:
        fast = row["times_as_fast"]
        told = [row["dtype"], f"{row['length']:,}", ms(row["times"]["DynamicCache"])]
        told += [f"{fast[name]:.2f}" if name in fast else "" for name in (*rivals, *ours)]
        rows.append([*told, f"{row['amdahl']:.2f}", f"{row['least_ms']:.3g}", f"{row['ceiling']:.2f}"])
    names = [f"`{name}`" for name in rivals] + [name or f"`{key}`" for key, name in ours.items()]
    return [["dtype", "tokens seen", "`DynamicCache`, ms", *names, "bound", "least, ms", "ceiling"], *rows]


def policies(record: Any) -> Rows:
    """Every policy at every length: bytes, memory of the process, and time."""
    names = list(dict.fromkeys(row["name"] for row in record["rows"]))
    rows = []
    for row in sorted(record["rows"], key=lambda row: (row["dtype"], row["length"], names.index(row["name"]))):
        grown = "" if row["resident_bytes"] is None else f"{(row['resident_bytes'] - row['base_bytes']) / MIB:,.0f}"
        whole = "" if row["resident_bytes"] is None else f"{row['resident_bytes'] / MIB:,.0f}"
        told = [code(row["name"]), f"{row['length']:,}", f"{row['bytes_held'] / MIB:.1f}", whole, grown]
        rows.append([*told, ms(row["times"]["token"]), f"{row['times_as_fast']:.2f}", f"{row['least_ms']:.3g}"])
    header = ["cache", "tokens", "held, MiB", "process, MiB", "of it for the text", "ms a token", "times as fast", "least, ms"]
    return [header, *rows]


def attend(record: Any) -> Rows:
    """One layer's decode attention beside torch: times of others as multiples of ours."""
    rows = []
    for row in record["rows"]:
        case = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']} {row['dtype']}"
        ratios = row["ratios"]
        told = [case, f"{row['length']:,}", ms(row["times"]["post_rope"]), f"{row['gb_per_s']:.1f}", f"{row['of_read']:.2f}"]
        packed = f"{ratios['packed_sdpa']:.1f} x" if "packed_sdpa" in ratios else "inexact"
        best = f"{ratios[row['best']]:.1f} x ({row['best']})"
        rows.append([*told, f"{ratios['generate_default']:.1f} x", packed, best, f"{ratios['pre_rope']:.2f} x"])
    header = ["heads/KV/D, dtype", "tokens", "ours, ms", "GB/s of K and V", "of what one thread reads"]
    return [[*header, "generate's default takes", "packed torch", "best torch", "keys rotated on read"], *rows]


def prefill(record: Any) -> Rows:
    """One layer's attention of a chunk beside torch: times of others as multiples of ours, and windows by the query."""
    rows = []
    for row in record["rows"]:
        case = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']} {row['dtype']}"
        told = [case, f"{row['length']:,}", ms(row["times"]["Full"]), f"{row['ratios']['generate_default']:.2f} x"]
        told += [f"{row['ratios'][row['best']]:.2f} x ({row['best']})"]
        rows.append([*told, *(f"{row['us_per_query'][name]:.1f}" for name in ("Full", "StreamingLLM", "LMInfinite"))])
    header = ["heads/KV/D, dtype", "queries", "`Full()`, ms", "generate's default takes", "best torch"]
    return [[*header, "us a query: `Full()`", "`StreamingLLM`", "`LMInfinite`"], *rows]


def tuned(record: Any) -> Rows:
    """What `kvsieve tune` tried."""
    rows = []
    for row in sorted(record["tried"], key=lambda row: row["nll"]):
        told = [code(row["policy"]), f"{row['nll']:.3f}", f"{math.exp(row['nll']):.2f}", f"{row['bytes_held'] / 1e6:.1f}"]
        rows.append([*told, f"{row['seconds']:.1f}", "yes" if row["fits"] else "no"])
    return [["policy", "nats a token", "perplexity", "held, MB", "seconds", "fits"], *rows]


TABLES = (
    Table("docs/results/demo.md", "demo", "demo.json", demo),
    Table("docs/results/decode.md", "decode", "decode.json", decode),
    Table("docs/results/tasks.md", "task-scores", "tasks.json", task_scores),
    Table("docs/results/tasks.md", "task-bytes", "tasks.json", task_bytes),
    Table("docs/results/tasks.md", "grocery-recall", "grocery.json", recall),
    Table("docs/results/decode.md", "policies", "policies.json", policies),
    Table("docs/results/packing.md", "packing-heads-of-128", "packing-heads-of-128.json", prices),
    Table("docs/results/decode.md", "together", "together.json", together),
    Table("docs/results/serving.md", "turns", "turns.json", turns),
    Table("docs/results/serving.md", "load", "load.json", load),
    Table("docs/results/decode.md", "weights", "weights.json", widths),
    Table("docs/results/attention.md", "prompts", "prompts.json", prompts),
    Table("docs/results/decode.md", "compiled", "compiled.json", compiled),
    Table("docs/results/attention.md", "attend", "attend.json", attend),
    Table("docs/results/attention.md", "prefill", "prefill.json", prefill),
    Table("docs/results/passkey.md", "passkey-five-depths", "passkey.json", passkeys),
    Table("docs/results/fetching.md", "infllm-lookup", "infllm-lookup.json", lookups),
    Table("docs/results/fetching.md", "long-text", "long-text.json", long_texts),
    Table("docs/policies/selective-v.md", "selective-v-steps", "selective-v.json", heaviest_steps),
    Table("docs/policies/selective-v.md", "selective-v-tokens", "selective-v.json", heaviest_tokens),
    Table("docs/results/fetching.md", "infllm-perplexity", "perplexity-32k.json", perplexities),
)


# ---------------------------------------------------------------------------------------------------------------------------- pages


def written(rows: Rows) -> list[str]:
    """A table as lines of Markdown; bars inside of cells are escaped."""
    header, *others = rows
    if any(len(row) != len(header) for row in others):
        raise ValueError(f"a row has other cells than the header {header}")

    def line(cells: Sequence[str]) -> str:
        inner = " | ".join(cell.replace("|", "\\|") for cell in cells)
        return re.sub(r"\|  (?=\|)", "| ", f"| {inner} |")

    return [line(header), "|" + "---|" * len(header), *map(line, others)]


def placed(text: str, table: Table) -> str:
    """A page with the table made anew. Raises ValueError where it has no line for it, or several."""
    lines = text.split("\n")
    if lines.count(table.marker) != 1:
        raise ValueError(f"{table.page} must have the line {table.marker} once")
    first = lines.index(table.marker) + 1
    first += not lines[first].strip()
    last = first
    while last < len(lines) and lines[last].startswith("|"):
        last += 1
    return "\n".join([*lines[:first], *written(table.rows(table.recorded)), *lines[last:]])


def section(text: str, table: Table) -> str:
    """What stands above the table in its section of the page: it says when, where and how."""
    return text.partition(table.marker)[0].rpartition("\n## ")[2]


def main(arguments: Sequence[str]) -> int:
    changed = []
    for page in dict.fromkeys(table.page for table in TABLES):
        path = ROOT / page
        before = after = path.read_text(encoding="utf-8")
        for table in TABLES:
            after = placed(after, table) if table.page == page else after
        if after != before:
            changed.append(page)
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    print("\n".join(changed) or "every table is the recorded one")
    return int(bool(changed) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
