"""A chat of many turns whose client sends everything again: `kvsieve serve` beside `transformers serve`.

    python benches/serve_turns.py --turns 50 --policy "sirllm(1024)" --out serve-turns.json

Both servers are processes of their own, on this machine's own address, and read the same folder, with float32 weights. Answers
are streamed and greedy; each is sent back with the next question. Noted of every turn are the seconds until the first token, the
CPU time that all threads of the server took until then (in the system's ticks of 10 ms), and what the process holds. Then a
stream of the library reads the chat, cut as the server cuts it: what it says must be what the server said. `transformers serve`
remembers nothing between requests, so it is asked the first five and the last five turns of the same chat. JSON goes to standard
output.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import kvsieve
import torch
from kvsieve.evals.models import load_model
from kvsieve.serve.prompts import render
from kvsieve.serve.service import CHUNK
from kvsieve.serve.texts import Texts, segments

SYSTEM = "You are a helpful guide to a small town on the coast."
QUESTIONS = (
    "Tell me about the sea near this town.",
    "Who lived here a hundred years ago, and what did they do?",
    "What do people eat in winter, and where do they buy it?",
    "Which of these things would you show to a visitor, and why?",
    "What did I ask you first?",
)

Messages = list[dict[str, str]]

SOME = 5
"""Turns whose median is told, early and late."""


def save(model: Any, folder: str) -> None:
    """A folder that any loader reads: weights of a GGUF file are written as they are used."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made = type(model)(config).to(model.dtype)
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    made.save_pretrained(folder)


def cpu_seconds(process: int) -> float:
    """What all threads of a process have taken."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, log: Path) -> Iterator[int]:
    """The number of a process that answers at ``port``; it ends afterwards."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server:
        try:
            until = time.monotonic() + 300
            while True:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} does not answer: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            server.kill()


def asked(messages: Messages, model: str, new: int, port: int, process: int) -> tuple[str, dict[str, Any]]:
    """An answer, and what it took."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"model": model, "messages": messages, "max_tokens": new, "temperature": 0, "stream": True}
    began, taken, text, first, cpu = time.monotonic(), cpu_seconds(process), "", 0.0, 0.0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read(2000)!r}")
    for line in answer:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        for choice in json.loads(line.removeprefix(b"data: ")).get("choices", ()):
            if said := choice["delta"].get("content"):
                if not text:
                    first, cpu = time.monotonic() - began, cpu_seconds(process) - taken
                text += said
    connection.close()
    row = {"first_token_seconds": round(first, 4), "first_token_cpu_seconds": round(cpu, 3), "rss_mib": resident_mib(process)}
    return text, row


def chat(name: str, model: str, turns: int, new: int, port: int, process: int) -> tuple[Messages, list[dict[str, Any]]]:
    """So many turns: all messages, and what each turn took."""
    messages: Messages = [{"role": "system", "content": SYSTEM}]
    rows = []
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": f"{turn}. {QUESTIONS[turn % len(QUESTIONS)]}"})
        text, row = asked(messages, model, new, port, process)
        messages.append({"role": "assistant", "content": text})
        rows.append({"turn": turn, **row})
        print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return messages, rows


def again(name: str, model: str, told: Messages, new: int, port: int, process: int) -> list[dict[str, Any]]:
    """The first and the last five turns of a chat that was had already: what each takes a server that remembers nothing."""
    count, rows = len(told) // 2, []
    for turn in range(1, count + 1):
        if SOME < turn <= count - SOME:
            continue
        _, row = asked(told[: 2 * turn], model, new, port, process)
        rows.append({"turn": turn, **row})
        print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def own_answers(model: Any, tokenizer: Any, policy: Any, told: Messages, new: int, chunk: int) -> tuple[list[str], int]:
    """What a stream of the library says to the same questions, and how many tokens it has seen."""
    texts, found, covered = Texts(tokenizer), list[str](), 0
    with kvsieve.stream(model, policy) as stream:
        transcript, nothing = stream._engine.transcript, [torch.zeros(0, dtype=torch.int64)]
        for at in range(2, len(told), 2):
            prompt = render(tokenizer, told[:at], None, {})
            # What was said and not read is read with what is new, as the server does.
            unread = transcript.rows[0].unread.tolist() if stream.seen else []
            if unread:
                transcript.say(nothing)
            parts = segments(texts, prompt.text, covered, unread, prompt.boundaries)
            for part in parts:
                ids = part.ids[:-1] if part is parts[-1] else part.ids
                for lo in range(0, len(ids), chunk):
                    stream.feed(torch.tensor([ids[lo : lo + chunk]]), chunk=chunk)
            said = stream.generate(torch.tensor([parts[-1].ids[-1:]]), max_new_tokens=new, do_sample=False)[0, 1:].tolist()
            if said[-1] in tokenizer.all_special_ids:
                transcript.say(nothing)
                said.pop()
            tail = [token for part in parts for token in part.ids]
            found.append(texts.said(tail, said) or "")
            covered = len(prompt.text) + len(found[-1])
        return found, stream.seen


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Turn 5 and the last one, each the median of it and the four before it."""
    last, found = rows[-1]["turn"], dict[str, Any]()
    for name in ("first_token_seconds", "first_token_cpu_seconds"):
        early, late = (round(statistics.median(row[name] for row in some), 4) for some in (rows[:SOME], rows[-SOME:]))
        found[name] = {f"turn_{SOME}": early, f"turn_{last}": late, "times": round(late / early, 3)}
    found["rss_mib"] = {f"turn_{row['turn']}": row["rss_mib"] for row in (rows[SOME - 1], rows[-1])}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="sirllm(1024)")
    parser.add_argument("--turns", type=int, default=50, help="at least ten")
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model)
    policy, found = kvsieve.methods.parse(args.policy), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place) / "model")
        save(model, folder)
        tokenizer.save_pretrained(folder)
        port, options = free_port(), ["--policy", args.policy, "--memory", "1GiB", "--chunk", str(args.chunk), "--threads", "1"]
        ours = [sys.executable, "-m", "kvsieve.cli", "serve", "--model", folder, "--port", str(port), *options]
        with serving(ours, port, Path(place) / "ours.log") as process:
            told, rows = chat("kvsieve", "model", args.turns, args.new, port, process)
        answers, seen = own_answers(model, tokenizer, policy, told, args.new, args.chunk)
        equal = [mine == theirs["content"] for mine, theirs in zip(answers, told[2::2])]
        found["kvsieve serve"] = {
            **summary(rows),
            "answers_equal_to_a_stream": f"{sum(equal)} of {args.turns}",
            "seen": seen,
            "turns": rows,
        }
        if not args.alone:
            port = free_port()
            start = "from transformers.cli.transformers import app; app()"
            theirs = [sys.executable, "-c", start, "serve", folder, "--device", "cpu", "--dtype", "float32", "--port", str(port)]
            with serving(theirs, port, Path(place) / "theirs.log") as process:
                rows = again("transformers", folder, told, args.new, port, process)
            found["transformers serve"] = {**summary(rows), "turns": rows}
    result = {
        "date": str(date.today()), "machine": platform.processor() or platform.machine(), "model": args.model,
        "policy": args.policy, "new": args.new, "chunk": args.chunk, "threads": 1, "load": os.getloadavg()[0], "servers": found,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
