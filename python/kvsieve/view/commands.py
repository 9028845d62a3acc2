"""`kvsieve view`: a recording as a page, and the picture of what a policy reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsieve.arguments import MODEL, add_machine, need_torch, output, positive
from kvsieve.errors import KvsieveError

__all__ = ["add_view"]


class _Pictures(argparse._SubParsersAction):  # type: ignore[type-arg]
    """What is no name of a picture is a file to be shown: `kvsieve view FILE`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choices = None  # type: ignore[assignment]

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words: Sequence[Any] = values if values[0] in self._name_parser_map else ["file", *values]
        super().__call__(parser, namespace, words, option_string)


def add_view(commands: Any) -> None:
    """The command and its arguments."""
    view = commands.add_parser(
        "view",
        help="pages and pictures of what a policy does",
        description="kvsieve view FILE makes a page of a recording or a session file, kvsieve view trace draws a picture.",
    )
    pictures = view.add_subparsers(action=_Pictures, required=True, metavar="FILE | trace", dest="picture")
    file = pictures.add_parser("file", prog="kvsieve view", help="a page of FILE, which may be named alone: kvsieve view FILE")
    file.add_argument("file", type=Path, metavar="FILE", help="a recording (stream.record, generate --record) or a session file")
    file.add_argument("--out", type=output, help="the page; default: FILE with .html at its end")
    file.add_argument("--open", action="store_true", help="open the page in the browser")
    file.add_argument("--model", help=f"of a session file, whose ids it turns into text: {MODEL}")
    file.set_defaults(run=_view_file)
    trace = pictures.add_parser("trace", help="which positions of a text a policy selects, step by step")
    trace.add_argument("--model", default="smollm2", help=MODEL)
    trace.add_argument("--policy", default="hip(512)", help='one that selects, for example "hip(512)"')
    trace.add_argument("--prompt-file", type=Path, help="a file with the text to read; default: Python's own reference pages")
    trace.add_argument("--tokens", type=positive, default=4000, help="how much of it to read; default: 4,000")
    trace.add_argument("--max-new-tokens", type=positive, default=32, help="steps")
    trace.add_argument("--out", type=Path, default=Path("out/trace.png"), help="the picture; numbers go beside it, as .json")
    add_machine(trace, dtype_help="default: float32")
    trace.set_defaults(run=_view_trace)


def _view_file(arguments: argparse.Namespace) -> int:
    from kvsieve.files.recording_file import read
    from kvsieve.files.replace import replacing
    from kvsieve.view.page import page

    file: Path = arguments.file
    out: Path = arguments.out or file.with_suffix(".html")
    if out.exists() and out.samefile(file):
        raise KvsieveError(f"the page would replace {file}; name another with --out")
    if _is_session(file):
        need_torch(None)
        from kvsieve.view.session import recording_of

        recording = recording_of(file, arguments.model)
    else:
        recording = read(file)
        if arguments.model is not None:
            raise KvsieveError(f"{file} is a recording, which holds its text; --model is of a session file")
    with replacing(out, "page") as opened:
        opened.write(page(recording, title=f"{recording['policy']}: {file.name}").encode())
    print(f"{out}: {len(recording['tokens']):,} tokens, {out.stat().st_size / 1e6:.1f} MB")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(out.resolve().as_uri()):
            raise KvsieveError(f"found no browser to open {out} with; open it yourself")
    return 0


def _is_session(file: Path) -> bool:
    """Whether it begins as a safetensors file does: the length of a header, and the header."""
    with file.open("rb") as opened:
        return opened.read(10)[8:] == b'{"'


def _view_trace(arguments: argparse.Namespace) -> int:
    need_torch(arguments.threads)
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
