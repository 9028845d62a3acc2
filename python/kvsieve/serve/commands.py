"""`kvsieve serve`: its arguments, and what they start. torch and what HTTP needs are imported once the arguments are right."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvsieve.arguments import MODEL, POLICIES, add_machine, add_speed, need_torch, positive, seconds, size
from kvsieve.errors import ArgumentError, BackendError
from kvsieve.serve.building import Plan

__all__ = ["add_serve"]

KEY = "KVSIEVE_API_KEY"
NEEDS = ("fastapi", "uvicorn", "prometheus_client")
RAY = "kvsieve serve --ray needs Ray Serve; pip install 'kvsieve[ray]'"


def add_serve(commands: Any) -> None:
    """Adds the command to those of ``commands``, what `argparse` calls its subparsers."""
    serve = commands.add_parser("serve", help="answer OpenAI's chat completions, with conversations that are remembered")
    serve.add_argument("--model", default="smollm2", help=f"{MODEL}; default: smollm2")
    serve.add_argument("--name", help="what clients call the model; default: the name of its folder or file")
    serve.add_argument("--policy", default="sirllm(4096)", help=f'of each conversation; default: "sirllm(4096)"; {POLICIES}')
    memory = serve.add_argument_group("memory")
    memory.add_argument("--memory", type=size, default="2GiB", help="bytes of all conversations in memory; default: 2GiB")
    memory.add_argument(
        "--sessions",
        metavar="DIR|URL",
        help="folder for conversations that leave the memory, or outlive it; s3://..., file://...: one that several servers share",
    )
    memory.add_argument("--disk", type=size, default="20GiB", help="bytes of the session files; default: 20GiB")
    memory.add_argument("--durable", action="store_true", help="an answer ends once its conversation is in a file")
    memory.add_argument(
        "--public",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a system prompt that is read at start, and shared by all clients; .json: messages, and tools",
    )
    several = serve.add_argument_group("several replicas")
    several.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="replicas by Ray Serve, which share --sessions; on this machine, or in the cluster at ADDRESS (auto: one that runs)",
    )
    several.add_argument(
        "--replicas", type=_replicas, metavar="N|MIN-MAX", help="with --ray: how many, or as many as the load asks for; default: 2"
    )
    work = serve.add_argument_group("work")
    work.add_argument("--most", type=positive, default=32, help="answers that are said at a time; default: 32")
    work.add_argument("--queue", type=positive, default=256, help="requests that may wait; default: 256")
    work.add_argument("--chunk", type=positive, help="tokens of a prompt between two tokens of the others; default: 128")
    work.add_argument("--longest", type=positive, help="most tokens of a conversation; default: no limit")
    work.add_argument("--max-new-tokens", type=positive, default=1024, help="of an answer, if a client does not say; default: 1024")
    work.add_argument("--timeout", type=seconds, default=600.0, help="seconds until an answer is cut; 0: never; default: 600")
    work.add_argument("--grace", type=seconds, default=10.0, help="seconds that answers have when the server ends; default: 10")
    door = serve.add_argument_group("access")
    door.add_argument("--host", default="127.0.0.1", help="another address than this machine's own needs a key; default: 127.0.0.1")
    door.add_argument("--port", type=_port, default=8000, help="default: 8000; 0: a free one")
    door.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"a key a line; {KEY} holds one, too")
    door.add_argument("--body", type=size, default="8MiB", help="most bytes of a request; default: 8MiB")
    door.add_argument("--access-log", action="store_true", help="a line for each request: address, path, status")
    serve.add_argument("--device", default="cpu", help="where the model runs, as torch names it: cpu, cuda, cuda:1; default: cpu")
    add_machine(serve, dtype_help="default: float32")
    add_speed(serve)
    serve.set_defaults(run=_run)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {text!r}")
    return int(text)


def _replicas(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    if least.isdecimal() and (most if dash else "1").isdecimal():
        found = int(least), int(most if dash else least)
        if 1 <= found[0] <= found[1]:
            return found
    raise argparse.ArgumentTypeError(f"must be a number as 2, or two as 1-4, got {text!r}")


def _keys(file: Path | None) -> tuple[str, ...]:
    """The keys of the file, and that of the environment.

    Raises:
        ArgumentError: for a file without a key.
    """
    found = [os.environ[KEY]] if os.environ.get(KEY) else []
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ArgumentError(f"{file} is not UTF-8 text") from error
        told = [line for line in lines if line and not line.startswith("#")]
        if not told:
            raise ArgumentError(f"{file} holds no key; write one a line")
        found += told
    return tuple(found)


def _run(arguments: argparse.Namespace) -> int:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"kvsieve serve needs {', '.join(missing)}; pip install 'kvsieve[serve]'")
    if arguments.ray is not None and importlib.util.find_spec("ray") is None:
        raise BackendError(RAY)
    need_torch(arguments.threads)
    from kvsieve.loading import check_asked
    from kvsieve.methods import parse
    from kvsieve.serve.access import Access
    from kvsieve.serve.running import bound
    from kvsieve.serve.shared import file_system, store_url
    from kvsieve.serve.store import is_url

    if arguments.durable and arguments.sessions is None:
        raise ArgumentError("--durable needs a folder: --sessions DIR")
    if arguments.replicas is not None and arguments.ray is None:
        raise ArgumentError("--replicas is for --ray; without it one process serves")
    if arguments.ray is not None and ":" in arguments.device:
        raise ArgumentError(f"Ray gives each replica a GPU of its own: --device cuda, not {arguments.device}")
    keys = _keys(arguments.api_key_file)
    opened = Access(keys)
    policy = parse(arguments.policy)
    if arguments.ray is None:
        _check_device(arguments.device)
    check_asked(arguments, here=arguments.ray is None)
    plan = _plan(arguments, keys)
    if arguments.ray is not None:
        plan = replace(plan, sessions=store_url(plan.sessions), durable=True)
    if plan.sessions is not None and is_url(plan.sessions):
        file_system(plan.sessions)
    # The address is taken before the model is loaded, which takes longer than to say that another has it.
    with bound(arguments.host, arguments.port, keys=not opened.open) as socket:
        if arguments.ray is None:
            _serve(arguments, plan, policy, socket)
            return 0
        at = socket.getsockname()[:2]
    _serve_replicas(arguments, plan, policy, at)
    return 0


def _check_device(name: str) -> None:
    """Something can lie there.

    Raises:
        BackendError: if not.
    """
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise BackendError(f"cannot run a model on the device {name}: {said[:200]}") from error


def _plan(arguments: argparse.Namespace, keys: tuple[str, ...]) -> Plan:
    return Plan(
        model=arguments.model,
        name=arguments.name or _name(arguments.model),
        policy=arguments.policy,
        memory=arguments.memory,
        dtype=arguments.dtype or "float32",
        weights=arguments.weights,
        compile=arguments.compile,
        device=arguments.device,
        backend=arguments.backend,
        sessions=arguments.sessions,
        disk=arguments.disk,
        durable=arguments.durable,
        public=tuple((str(file), file.read_bytes()) for file in arguments.public),
        most=arguments.most,
        queue=arguments.queue,
        chunk=arguments.chunk,
        longest=arguments.longest,
        keys=keys,
        max_new_tokens=arguments.max_new_tokens,
        seconds=arguments.timeout or None,
        body=arguments.body,
    )


def _serve(arguments: argparse.Namespace, plan: Plan, policy: Any, socket: Any) -> None:
    from kvsieve.serve.running import Server, address_of

    service, app = plan.open()
    service.start()
    try:
        ready = f"{plan.name} under {policy!r}: {address_of(*socket.getsockname()[:2])} (Ctrl-C ends)"
        Server(app, service, grace=arguments.grace, ready=ready, access_log=arguments.access_log).run([socket])
    finally:
        service.close(0)


def _serve_replicas(arguments: argparse.Namespace, plan: Plan, policy: Any, at: tuple[str, int]) -> None:
    # Replicas have folders of their own that they work in.
    model = plan.model if plan.model == "smollm2" else str(Path(plan.model).expanduser().absolute())
    if arguments.ray == "local" and model != "smollm2" and not Path(model).exists():
        raise ArgumentError(f"no model at {model}")
    try:
        from kvsieve.serve.ray_app import run
    except ImportError as error:
        raise BackendError(f"{RAY} ({error})") from error
    least, most = replicas = arguments.replicas or (2, 2)
    run(
        replace(plan, model=model),
        arguments.ray,
        replicas,
        at,
        ready=f"{plan.name} under {policy!r}, {least if least == most else f'{least} to {most}'} replicas",
        grace=arguments.grace,
        threads=arguments.threads,
        access_log=arguments.access_log,
    )


def _name(model: str) -> str:
    """A folder's name, or a file's without what says that it is GGUF."""
    return Path(model).expanduser().resolve().name.removesuffix(".gguf")
