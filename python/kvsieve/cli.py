"""The `kvsieve` command: see a bounded memory at work, run or serve a model with one, measure it, draw what it reads.

torch and transformers are imported by the command that needs them, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
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

from kvsieve.arguments import BACKENDS as _BACKENDS
from kvsieve.arguments import MODEL as _MODEL
from kvsieve.arguments import POLICIES as _POLICIES
from kvsieve.arguments import add_machine as _add_machine
from kvsieve.arguments import add_speed as _add_speed
from kvsieve.arguments import need_torch as _need_torch
from kvsieve.arguments import output as _output
from kvsieve.arguments import positive as _positive
from kvsieve.arguments import whole as _whole
from kvsieve.bench.commands import add_bench as _add_bench
from kvsieve.chat import add_chat as _add_chat
from kvsieve.errors import BackendError, KvsieveError
from kvsieve.evals.commands import add_eval as _add_eval
from kvsieve.evals.commands import add_tune as _add_tune
from kvsieve.files.replace import replacing, target_of
from kvsieve.serve.commands import add_serve as _add_serve
from kvsieve.view.commands import add_view as _add_view

__all__ = ["main"]

_BEGAN = time.perf_counter()


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
    _add_chat(commands)
    _add_serve(commands)
    _add_eval(commands)
    _add_tune(commands)
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
    generate.add_argument("--record", type=_output, metavar="FILE", help="record what is held at every step, for kvsieve view FILE")
    _add_machine(generate, dtype_help="default: float32")
    _add_speed(generate)
    generate.set_defaults(run=_generate)


def _read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KvsieveError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


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
    import kvsieve
    from kvsieve.loading import check_asked, load_asked
    from kvsieve.methods import parse
    from kvsieve.view.typist import held, print_while_generating

    policy = parse(arguments.policy)
    check_asked(arguments)
    if arguments.json is not None:
        target_of(arguments.json, "report")  # what cannot be written is said before the model is loaded
    model, tokenizer = load_asked(arguments)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with kvsieve.stream(model, policy, backend=arguments.backend) as stream:
        recording = contextlib.nullcontext() if arguments.record is None else stream.record(arguments.record, tokenizer)
        with recording:
            text = print_while_generating(stream, tokenizer, ids, max_new_tokens=arguments.max_new_tokens)
        stats = stream.stats()
    print(f"\n[{stats.policy} on {stats.backend}: {stats.seen:,} tokens seen, {stats.resident:,} resident, {held(stats)}]")
    if arguments.json is not None:
        report = {"prompt": prompt, "text": text, "stats": stats.as_dict()}
        with replacing(arguments.json, "report") as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
    return 0


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
