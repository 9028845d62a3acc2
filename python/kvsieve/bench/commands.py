"""`kvsieve bench`: its arguments, and what they run. torch is imported by what is run."""

from __future__ import annotations

import argparse
from typing import Any

from kvsieve.arguments import MODEL, add_speed, need_torch, output, positive
from kvsieve.arguments import POLICIES as KNOWN
from kvsieve.bench.options import DTYPES, POLICIES, WHOLE, Options

__all__ = ["add_bench"]

_TABLES = (
    ("attend", "one layer's decode attention: ours, generate's own, the best that torch can do"),
    ("decode", "whole tokens of a model, transformers' caches, ours and budgets; what attention and eviction could gain at most"),
    ("search", "one layer's decode attention over a long text: HiP and InfiniteHiP beside all keys"),
    ("prefill", "one layer's attention of a chunk of queries; windows, whose time is linear"),
    (
        "policies",
        "time a token, bytes held and memory of the process against length, for every policy, beside transformers' caches",
    ),
)


def add_bench(commands: Any) -> None:
    """Adds the command to those of ``commands``, what `argparse` calls its subparsers."""
    bench = commands.add_parser("bench", help="measure the kernels here, beside torch and what the memory allows")
    tables = bench.add_subparsers(dest="table", required=True, metavar="table")
    for table, what in _TABLES:
        one = tables.add_parser(table, help=what, description=what)
        if table in WHOLE:
            one.add_argument("--model", help=f"{MODEL}; default: SmolLM2-135M's shape with random weights")
        else:
            one.add_argument("--shape", nargs="+", metavar="H/KV/D", help="heads/kv heads/head size; default: 9/3/64 32/8/128")
        if table == "decode":
            add_speed(one)
        if table == "policies":
            one.add_argument("--policy", nargs="+", action="extend", help=f"default: {' '.join(map(repr, POLICIES))}; {KNOWN}")
        one.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="element types")
        one.add_argument("--length", nargs="+", type=positive, help="tokens")
        one.add_argument("--rounds", type=positive, help="rounds of each case; default: 9, with --quick 5")
        one.add_argument(
            "--threads", type=positive, default=1, help="default: 1, pinned, in CPU time; more are measured in wall time"
        )
        one.add_argument("--json", type=output, help="also write everything to this file, after every row; replaces it")
        one.add_argument("--resume", action="store_true", help="rows that the file of --json holds are not measured again")
        one.add_argument("--plot", type=output, help="a picture of the table, .png or .svg")
        one.add_argument("--quick", action="store_true", help="two lengths and five rounds")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    options = Options.of(
        arguments.table,
        shapes=getattr(arguments, "shape", None),
        dtypes=arguments.dtype,
        lengths=arguments.length,
        rounds=arguments.rounds,
        threads=arguments.threads,
        json=arguments.json,
        resume=arguments.resume,
        plot=arguments.plot,
        model=getattr(arguments, "model", None),
        policies=getattr(arguments, "policy", None),
        weights=getattr(arguments, "weights", None),
        compiled=getattr(arguments, "compile", False),
        quick=arguments.quick,
    )
    need_torch(None)
    from kvsieve.bench.run import run

    run(options)
    return 0
