"""`kvsieve eval` and `kvsieve tune`: their arguments, and what they run. torch is imported by what is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvsieve.arguments import MODEL, POLICIES, add_machine, need_torch, output, positive, whole
from kvsieve.budget import parse_bytes
from kvsieve.errors import BudgetError, KvsieveError
from kvsieve.evals.task import Task
from kvsieve.evals.tasks import TASKS

__all__ = ["add_eval", "add_tune"]

_POLICY = f'for example "full()" "streamingllm(1024)"; {POLICIES}'


def add_eval(commands: Any) -> None:
    """Adds the command to those of ``commands``, what `argparse` calls its subparsers."""
    evals = commands.add_parser("eval", help="what a policy costs in quality")
    tasks = evals.add_subparsers(required=True, metavar="task")
    packing = tasks.add_parser(
        "packing", help="perplexity of what follows a prompt, beside the full cache: what storage formats cost"
    )
    packing.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    packing.add_argument(
        "--policy", nargs="+", action="extend", help='only these, for example "think(0.4)" "quantized(4)"; and the full cache'
    )
    packing.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    packing.add_argument("--windows", type=positive, default=4, help="ranges of the text")
    packing.add_argument("--prompt", type=positive, default=4000, help="tokens before compression")
    packing.add_argument("--continuation", type=positive, default=1000, help="tokens to predict")
    packing.add_argument("--only", help="only policies with this in their name, and the full cache")
    packing.add_argument("--json", type=output, help="also write everything to this file, after every policy; replaces it")
    packing.add_argument("--resume", action="store_true", help="policies that the file of --json holds are not read again")
    packing.add_argument("--quick", action="store_true", help="one ratio of each kind")
    add_machine(packing, dtype_help="default: float32")
    packing.set_defaults(run=_eval_packing)
    search = tasks.add_parser("search", help="perplexity of reading only what is selected, and of windows that read as much")
    search.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    search.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    search.add_argument("--windows", type=positive, default=4, help="ranges of the text, read as one batch")
    search.add_argument("--length", nargs="+", type=positive, default=[4000, 7700], help="tokens of the prompt")
    search.add_argument("--continuation", type=positive, default=256, help="tokens to predict one by one")
    search.add_argument(
        "--prompt", nargs="+", choices=("dense", "own"), default=["dense", "own"], help="read it by the full cache, or the policy"
    )
    what = search.add_mutually_exclusive_group()
    what.add_argument("--policy", nargs="+", help='only these, for example "hip(512, block=8)"; and the full cache')
    what.add_argument("--sweep", action="store_true", help="HiP's arguments, one at a time")
    search.add_argument("--only", nargs="+", default=[], help="only policies with one of these in their name, and the full cache")
    search.add_argument("--json", type=output, help="also write everything to this file, after every policy; replaces it")
    search.add_argument("--resume", action="store_true", help="rows that the file of --json holds are not measured again")
    search.add_argument("--quick", action="store_true", help="one budget")
    add_machine(search, dtype_help="default: float32")
    search.set_defaults(run=_eval_search)
    perplexity = tasks.add_parser("perplexity", help="perplexity of a text as it streams through a policy, by position")
    perplexity.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    perplexity.add_argument("--policy", nargs="+", action="extend", required=True, help=_POLICY)
    perplexity.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    perplexity.add_argument("--length", type=positive, default=8192, help="tokens of it; default: 8,192")
    perplexity.add_argument("--chunk", type=positive, default=512, help="tokens of a forward; default: 512")
    perplexity.add_argument("--bucket", type=positive, default=1024, help="tokens of a point of the curve; default: 1,024")
    perplexity.add_argument("--json", type=output, help="also write everything to this file, after every policy; replaces it")
    perplexity.add_argument("--resume", action="store_true", help="policies that the file of --json holds are not read again")
    add_machine(perplexity, dtype_help="default: float32")
    perplexity.set_defaults(run=_eval_perplexity)
    for task in TASKS.values():
        _add_task(tasks, task)


def _add_task(tasks: Any, task: Task) -> None:
    """A task of the harness. Passkey retrieval has a second way to run, at set depths of one text."""
    parser = tasks.add_parser(task.name, help=task.summary, description=f"{task.summary}. {task.metric}. {task.source}.")
    both = task.name == "passkey"
    parser.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    parser.add_argument(
        "--policy",
        nargs="*" if both else "+",
        action="extend",
        required=not both,
        help=_POLICY,
    )
    parser.add_argument(
        "--length", nargs="+", action="extend", type=_lengths, help="tokens of a case, for example 2048 or 2048,4096; default: 2048"
    )
    if both:
        parser.add_argument("--dense", nargs="*", help="without --cases: policies that take over what the full cache has read")
        parser.add_argument(
            "--ingest", nargs="+", help="without --cases: policies that end with a bank, which reads the text before"
        )
        parser.add_argument("--depths", type=positive, help="without --cases: depths of one text, read once; default: 10")
        cases_help = "texts of each length, a key in each; without it, one text at --depths depths"
    else:
        cases_help = "cases of each length; default: 10"
    parser.add_argument("--cases", type=positive, default=None if both else 10, help=cases_help)
    parser.add_argument("--seed", type=whole, default=0, help="seed of the cases; default: 0")
    parser.add_argument("--chunk", type=positive, default=512, help="most tokens that a stream is given at a time; default: 512")
    parser.add_argument("--json", type=output, help="also write everything to this file, after every case; replaces it")
    parser.add_argument("--resume", action="store_true", help="cases that the file of --json holds are not run again")
    add_machine(parser, dtype_help="default: float32")
    parser.set_defaults(run=_eval_passkey if both else _eval_task, task=task.name)


def _lengths(text: str) -> tuple[int, ...]:
    """`2048`, or `2048,4096`."""
    return tuple(positive(part) for part in text.split(","))


def _eval_packing(arguments: argparse.Namespace) -> int:
    need_torch(arguments.threads)
    from kvsieve.evals.packing_nll import Settings, run

    if arguments.policy and (arguments.only or arguments.quick):
        raise KvsieveError("--only and --quick choose among the policies that are compared without --policy; leave one of them out")
    settings = Settings(
        model=arguments.model,
        policies=tuple(arguments.policy or ()),
        text=arguments.text,
        windows=arguments.windows,
        prompt=arguments.prompt,
        continuation=arguments.continuation,
        only=arguments.only,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        resume=arguments.resume,
        backend=arguments.backend,
        quick=arguments.quick,
    )
    run(settings)
    return 0


def _eval_search(arguments: argparse.Namespace) -> int:
    need_torch(arguments.threads)
    from kvsieve.evals.search_nll import Settings, run

    settings = Settings(
        model=arguments.model,
        text=arguments.text,
        windows=arguments.windows,
        lengths=tuple(arguments.length),
        continuation=arguments.continuation,
        prompts=tuple(dict.fromkeys(arguments.prompt)),
        policies=tuple(arguments.policy or ()),
        sweep=arguments.sweep,
        only=tuple(arguments.only),
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        resume=arguments.resume,
        backend=arguments.backend,
        quick=arguments.quick,
    )
    run(settings)
    return 0


def _eval_perplexity(arguments: argparse.Namespace) -> int:
    need_torch(arguments.threads)
    from kvsieve.evals.perplexity import Settings, run

    settings = Settings(
        policies=tuple(arguments.policy),
        model=arguments.model,
        text=arguments.text,
        length=arguments.length,
        chunk=arguments.chunk,
        bucket=arguments.bucket,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        resume=arguments.resume,
        backend=arguments.backend,
    )
    run(settings)
    return 0


def _eval_task(arguments: argparse.Namespace) -> int:
    need_torch(arguments.threads)
    from kvsieve.evals.harness import Settings, run

    settings = Settings(
        task=arguments.task,
        policies=tuple(arguments.policy or ()),
        model=arguments.model,
        lengths=_flat(arguments.length) or Settings.lengths,
        cases=arguments.cases,
        seed=arguments.seed,
        chunk=arguments.chunk,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        resume=arguments.resume,
        backend=arguments.backend,
    )
    run(settings)
    return 0


def _eval_passkey(arguments: argparse.Namespace) -> int:
    if arguments.cases is not None:
        if arguments.dense is not None or arguments.ingest is not None or arguments.depths is not None:
            raise KvsieveError("--dense, --ingest and --depths are of one text at several depths; leave them or --cases out")
        return _eval_task(arguments)
    if arguments.resume:
        raise KvsieveError("--resume goes on with cases: say how many by --cases")
    need_torch(arguments.threads)
    from kvsieve.evals.passkey import Settings, run

    ingested = tuple(arguments.ingest or ())
    settings = Settings(
        policies=(() if ingested else Settings.policies) if arguments.policy is None else tuple(arguments.policy),
        dense=(() if ingested else Settings.dense) if arguments.dense is None else tuple(arguments.dense),
        ingested=ingested,
        lengths=_flat(arguments.length) or Settings.lengths,
        depths=arguments.depths or Settings.depths,
        seed=arguments.seed,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        backend=arguments.backend,
        model=arguments.model,
    )
    run(settings)
    return 0


def _flat(lengths: list[tuple[int, ...]] | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(length for some in lengths or () for length in some))


def add_tune(commands: Any) -> None:
    """The command `tune`."""
    tune = commands.add_parser("tune", help="find the policy for a text and a model of yours within a budget of bytes")
    tune.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    tune.add_argument("--text", type=Path, help="a text file like those that will be read; default: Python's own reference pages")
    tune.add_argument("--bytes", type=_bytes, required=True, help="most bytes of keys and values, for example 100MB or 64MiB")
    tune.add_argument("--seconds", type=positive, default=600, help="time; what is read is chosen to fit; default: 600")
    tune.add_argument("--length", type=positive, help="tokens of the text; default: as many as the time allows")
    tune.add_argument("--policy", nargs="+", action="extend", default=[], help=f"try these too; {_POLICY}")
    tune.add_argument("--chunk", type=positive, default=256, help="tokens of a forward; default: 256")
    tune.add_argument("--json", type=output, help="also write everything to this file, after every candidate; replaces it")
    tune.add_argument("--resume", action="store_true", help="candidates that the file of --json holds are not tried again")
    tune.add_argument("--plot", type=output, help="a picture (PNG) of quality against bytes")
    add_machine(tune, dtype_help="default: float32")
    tune.set_defaults(run=_tune)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tune(arguments: argparse.Namespace) -> int:
    need_torch(arguments.threads)
    from kvsieve.evals.tune import Settings, run

    settings = Settings(
        bytes=arguments.bytes,
        model=arguments.model,
        text=arguments.text,
        seconds=float(arguments.seconds),
        policies=tuple(arguments.policy),
        length=arguments.length,
        chunk=arguments.chunk,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        resume=arguments.resume,
        plot=arguments.plot,
        backend=arguments.backend,
    )
    run(settings)
    return 0
