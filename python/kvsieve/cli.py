"""The `kvsieve` command: see a bounded memory at work, run a model with one, measure it, draw what it reads, look at this machine.

torch and transformers are imported by the command that needs them, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.errors import BackendError, KvsieveError
from kvsieve.methods.registry import SYSTEMS

__all__ = ["main"]

_BEGAN = time.perf_counter()
_MODEL = "smollm2, a local model folder, or a GGUF file"
_POLICIES = "known: " + ", ".join(system.text_name for system in SYSTEMS)
_BACKENDS = ("reference", "cpu", "cuda")
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 when the user has to change something."""
    # Waiting threads must sleep: torch's spin by default, and on a machine that is shared they starve the ones that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KvsieveError as error:
        print(f"kvsieve: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"kvsieve: {where}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("kvsieve: interrupted", file=sys.stderr)
        return 130
    return 2


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from kvsieve import __version__

        print(f"kvsieve {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvsieve", description="a KV cache with a budget around any generate loop")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_view(commands)
    _add_bench(commands)
    info = commands.add_parser("info", help="versions, instruction set, and the backends that can run here")
    info.add_argument("--json", action="store_true", help="print JSON instead of lines")
    info.set_defaults(run=_info)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="keep a shopping list and read a long text, with and without a budget (about 3 minutes)"
    )
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the report, picture and page")
    demo.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    demo.add_argument(
        "--seconds", type=_positive, default=180, help="time for the whole; what is read is chosen to fit; default: 180"
    )
    demo.add_argument("--tokens", type=_positive, help="how much of the text every memory reads, however long that takes")
    demo.add_argument("--budget", type=_positive, default=1024, help="tokens that a bounded memory may hold")
    demo.add_argument("--dialogues", type=_positive, help="shopping lists; default: as many as half a minute allows, at most 4")
    demo.add_argument("--chunk", type=_positive, default=512, help="tokens per forward pass")
    demo.add_argument("--seed", type=_whole, default=0, help="seed of the dialogues")
    demo.add_argument("--quick", action="store_true", help="a fraction of everything, to see that it runs")
    _add_machine(demo, dtype_help="default: the faster of float32 and bfloat16 here")
    demo.set_defaults(run=_demo)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a prompt with a bounded memory")
    generate.add_argument("--model", required=True, help=_MODEL)
    generate.add_argument("--policy", required=True, help=f'for example "sirllm(budget=1024, decay=0.9)"; {_POLICIES}')
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="a file with the text to continue")
    generate.add_argument("--max-new-tokens", type=_positive, required=True, help="tokens to generate")
    generate.add_argument("--json", type=_output, help="also write prompt, text and stats to this file")
    _add_machine(generate, dtype_help="default: float32")
    generate.set_defaults(run=_generate)


def _add_eval(commands: Any) -> None:
    evals = commands.add_parser("eval", help="what a policy costs in quality")
    tasks = evals.add_subparsers(required=True, metavar="task")
    packing = tasks.add_parser("packing", help="perplexity after a prompt whose keys and values were compressed")
    packing.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    packing.add_argument("--windows", type=_positive, default=4, help="ranges of the text")
    packing.add_argument("--prompt", type=_positive, default=4000, help="tokens before compression")
    packing.add_argument("--continuation", type=_positive, default=1000, help="tokens to predict")
    packing.add_argument("--only", help="only policies with this in their name, and the full cache")
    packing.add_argument("--json", type=_output, help="also write everything to this file, after every policy")
    packing.add_argument("--quick", action="store_true", help="one ratio of each kind")
    _add_machine(packing, dtype_help="default: float32")
    packing.set_defaults(run=_eval_packing)
    search = tasks.add_parser("search", help="perplexity of reading only what is selected, and of windows that read as much")
    search.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    search.add_argument("--windows", type=_positive, default=4, help="ranges of the text, read as one batch")
    search.add_argument("--length", nargs="+", type=_positive, default=[4000, 7700], help="tokens of the prompt")
    search.add_argument("--continuation", type=_positive, default=256, help="tokens to predict one by one")
    search.add_argument(
        "--prompt", nargs="+", choices=("dense", "own"), default=["dense", "own"], help="read it by the full cache, or the policy"
    )
    what = search.add_mutually_exclusive_group()
    what.add_argument("--policy", nargs="+", help='only these, for example "hip(512, block=8)"; and the full cache')
    what.add_argument("--sweep", action="store_true", help="HiP's arguments, one at a time")
    search.add_argument("--only", nargs="+", default=[], help="only policies with one of these in their name, and the full cache")
    search.add_argument("--json", type=_output, help="also write everything to this file, after every policy")
    search.add_argument("--quick", action="store_true", help="one budget")
    _add_machine(search, dtype_help="default: float32")
    search.set_defaults(run=_eval_search)
    perplexity = tasks.add_parser("perplexity", help="perplexity of a text as it streams through a policy, by position")
    perplexity.add_argument("--model", default="smollm2", help=f"{_MODEL}; default: smollm2")
    perplexity.add_argument("--policy", nargs="+", required=True, help=f'for example "full()" "streamingllm(1024)"; {_POLICIES}')
    perplexity.add_argument("--text", type=Path, help="a text file to read; default: Python's own reference pages")
    perplexity.add_argument("--length", type=_positive, default=8192, help="tokens of it; default: 8,192")
    perplexity.add_argument("--chunk", type=_positive, default=512, help="tokens of a forward; default: 512")
    perplexity.add_argument("--bucket", type=_positive, default=1024, help="tokens of a point of the curve; default: 1,024")
    perplexity.add_argument("--json", type=_output, help="also write everything to this file, after every policy; replaces it")
    perplexity.add_argument("--resume", action="store_true", help="policies that the file of --json holds are not read again")
    _add_machine(perplexity, dtype_help="default: float32")
    perplexity.set_defaults(run=_eval_perplexity)
    passkey = tasks.add_parser("passkey", help="passkey retrieval: five digits at several depths of a long text")
    passkey.add_argument("--policy", nargs="*", help="policies that read the text; default: full(), HiP, Quest, StreamingLLM")
    passkey.add_argument("--dense", nargs="*", help="policies that take over what the full cache has read; default: HiP, Quest")
    passkey.add_argument("--length", nargs="+", type=_positive, default=[4000, 7500], help="tokens of the text")
    passkey.add_argument("--depths", type=_positive, default=10, help="depths of the passkey in each text")
    passkey.add_argument("--seed", type=_whole, default=0, help="seed of texts and keys")
    passkey.add_argument("--json", type=_output, help="also write everything to this file, after every policy")
    _add_machine(passkey, dtype_help="default: float32")
    passkey.set_defaults(run=_eval_passkey)


def _add_view(commands: Any) -> None:
    view = commands.add_parser("view", help="pictures of what a policy does")
    pictures = view.add_subparsers(required=True, metavar="picture")
    trace = pictures.add_parser("trace", help="which positions of a text a policy selects, step by step")
    trace.add_argument("--model", default="smollm2", help=_MODEL)
    trace.add_argument("--policy", default="hip(512)", help='one that selects, for example "hip(512)"')
    trace.add_argument("--prompt-file", type=Path, help="a file with the text to read; default: Python's own reference pages")
    trace.add_argument("--tokens", type=_positive, default=4000, help="how much of it to read; default: 4,000")
    trace.add_argument("--max-new-tokens", type=_positive, default=32, help="steps")
    trace.add_argument("--out", type=Path, default=Path("out/trace.png"), help="the picture; numbers go beside it, as .json")
    _add_machine(trace, dtype_help="default: float32")
    trace.set_defaults(run=_view_trace)


def _add_bench(commands: Any) -> None:
    from kvsieve.bench import DTYPES

    bench = commands.add_parser("bench", help="measure the kernels here, beside torch and what the memory allows")
    tables = bench.add_subparsers(dest="table", required=True, metavar="table")
    for table, what in (
        ("attend", "one layer's decode attention: ours, generate's own, the best that torch can do"),
        ("decode", "whole tokens of a model of SmolLM2-135M's shape, full cache and budgets"),
        ("search", "one layer's decode attention over a long text: HiP and InfiniteHiP beside all keys"),
        ("prefill", "one layer's attention of a chunk of queries; windows, whose time is linear"),
    ):
        one = tables.add_parser(table, help=what)
        if table != "decode":
            one.add_argument("--shape", nargs="+", metavar="H/KV/D", help="heads/kv heads/head size; default: 9/3/64 32/8/128")
        one.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="element types")
        one.add_argument("--length", nargs="+", type=_positive, help="tokens")
        one.add_argument("--rounds", type=_positive, help="rounds of each case; default: 9, with --quick 5")
        one.add_argument(
            "--threads", type=_positive, default=1, help="default: 1, pinned, in CPU time; more are measured in wall time"
        )
        one.add_argument("--json", type=_output, help="also write everything to this file, after every row")
        one.add_argument("--quick", action="store_true", help="two lengths and five rounds")
    bench.set_defaults(run=_bench)


def _add_machine(parser: argparse.ArgumentParser, *, dtype_help: str) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help=dtype_help)
    parser.add_argument("--threads", type=_positive, help="CPU threads for torch; default: torch's own choice")
    parser.add_argument("--backend", help=f"{', '.join(_BACKENDS)}; default: the fastest that can run here")


def _read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KvsieveError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _output(text: str) -> Path:
    """A file that can be written when the work is done, as far as that can be known before."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} into")
    return path


def _whole(text: str) -> int:
    try:
        return int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _demo(arguments: argparse.Namespace) -> int:
    _need_torch(arguments.threads)
    from kvsieve.demo import Settings, run

    settings = Settings(
        out=arguments.out,
        text=arguments.text,
        seconds=float(arguments.seconds),
        tokens=arguments.tokens,
        budget=arguments.budget,
        dialogues=arguments.dialogues,
        chunk=arguments.chunk,
        seed=arguments.seed,
        dtype=arguments.dtype,
        threads=arguments.threads,
        backend=arguments.backend,
    )
    run(settings.quick() if arguments.quick else settings, _BEGAN)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    prompt = arguments.prompt if arguments.prompt_file is None else _read_prompt(arguments.prompt_file)
    if not prompt:
        raise KvsieveError("the prompt is empty; give at least one character")
    _need_torch(arguments.threads)
    import torch

    import kvsieve
    from kvsieve.evals.models import load_model
    from kvsieve.methods import parse
    from kvsieve.view.typist import held, print_while_generating

    policy = parse(arguments.policy)
    model, tokenizer = load_model(arguments.model, getattr(torch, arguments.dtype or "float32"))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with kvsieve.stream(model, policy, backend=arguments.backend) as stream:
        text = print_while_generating(stream, tokenizer, ids, max_new_tokens=arguments.max_new_tokens)
        stats = stream.stats()
    print(f"\n[{stats.policy} on {stats.backend}: {stats.seen:,} tokens seen, {stats.resident:,} resident, {held(stats)}]")
    if arguments.json is not None:
        report = {"prompt": prompt, "text": text, "stats": stats.as_dict()}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _eval_packing(arguments: argparse.Namespace) -> int:
    _need_torch(arguments.threads)
    from kvsieve.evals.packing_nll import Settings, run

    settings = Settings(
        text=arguments.text,
        windows=arguments.windows,
        prompt=arguments.prompt,
        continuation=arguments.continuation,
        only=arguments.only,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        backend=arguments.backend,
        quick=arguments.quick,
    )
    run(settings)
    return 0


def _eval_search(arguments: argparse.Namespace) -> int:
    _need_torch(arguments.threads)
    from kvsieve.evals.search_nll import Settings, run

    settings = Settings(
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
        backend=arguments.backend,
        quick=arguments.quick,
    )
    run(settings)
    return 0


def _eval_perplexity(arguments: argparse.Namespace) -> int:
    _need_torch(arguments.threads)
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


def _eval_passkey(arguments: argparse.Namespace) -> int:
    _need_torch(arguments.threads)
    from kvsieve.evals.passkey import Settings, run

    settings = Settings(
        policies=Settings.policies if arguments.policy is None else tuple(arguments.policy),
        dense=Settings.dense if arguments.dense is None else tuple(arguments.dense),
        lengths=tuple(arguments.length),
        depths=arguments.depths,
        seed=arguments.seed,
        dtype=arguments.dtype or "float32",
        json=arguments.json,
        backend=arguments.backend,
    )
    run(settings)
    return 0


def _view_trace(arguments: argparse.Namespace) -> int:
    _need_torch(arguments.threads)
    from kvsieve.evals.reads import Settings, run

    settings = Settings(
        model=arguments.model,
        policy=arguments.policy,
        out=arguments.out,
        text=arguments.prompt_file,
        tokens=arguments.tokens,
        max_new_tokens=arguments.max_new_tokens,
        dtype=arguments.dtype or "float32",
        backend=arguments.backend,
    )
    run(settings)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from kvsieve.bench import Options
    from kvsieve.bench.run import run

    options = Options.of(
        arguments.table,
        shapes=getattr(arguments, "shape", None),
        dtypes=arguments.dtype,
        lengths=arguments.length,
        rounds=arguments.rounds,
        threads=arguments.threads,
        json=arguments.json,
        quick=arguments.quick,
    )
    _need_torch(None)
    run(options)
    return 0


def _need_torch(threads: int | None) -> None:
    for need in ("torch", "transformers"):
        if importlib.util.find_spec(need) is None:
            raise BackendError(f"{need} is not installed; pip install {need}")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _info(arguments: argparse.Namespace) -> int:
    versions, instruction_set, backends = _versions(), _instruction_set(), _backends()
    if arguments.json:
        facts = {"versions": versions, "instruction_set": instruction_set, "backends": backends}
        print(json.dumps(facts, indent=2))
        return 0
    for name, version in versions.items():
        print(f"{name:<18}{version or 'not installed'}")
    print(f"{'instruction set':<18}{instruction_set or 'unknown: the compiled core is missing'}")
    for name, missing in backends.items():
        print(f"{name + ' backend':<18}{'available' if missing is None else missing}")
    return 0


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = {name: version(name) for name in ("kvsieve", "torch", "transformers")}
    return {**found, "python": platform.python_version()}


def _instruction_set() -> str | None:
    try:
        from kvsieve import _core
    except ImportError:
        return None
    return str(_core.isa())


def _backends() -> dict[str, str | None]:
    """For each backend `None` when it can run here, else what is missing and how to get it."""
    if importlib.util.find_spec("torch") is None:
        return dict.fromkeys(_BACKENDS, "torch is not installed; pip install torch")
    return {name: _missing(name) for name in _BACKENDS}


def _missing(backend: str) -> str | None:
    try:
        from kvsieve import backends

        backends.get(backend)
    except BackendError as error:
        return str(error)
    except ImportError as error:
        return f"{error}; pip install --force-reinstall kvsieve"
    return None


if __name__ == "__main__":
    sys.exit(main())
