"""Many turns whose client sends everything again: what a service reads, how long the first token takes, what it holds.

    python benches/serve_turns.py --turns 50 --policy "sirllm(1024)" --out serve-turns.json

The service is used without HTTP. Beside it the same turns are answered by one that remembers nothing: its first tokens wait for the
whole history. JSON goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import kvsieve
import torch
from kvsieve.evals.models import load_model
from kvsieve.serve.jobs import Job, Token, Usage
from kvsieve.serve.service import CHUNK, Service

QUESTIONS = (
    "Tell me about the sea near this town.",
    "Who lived here a hundred years ago, and what did they do?",
    "What do people eat in winter, and where do they buy it?",
    "Which of these things would you show to a visitor, and why?",
    "What did I ask you first?",
)


class Times:
    """A sink that knows when the first token came."""

    def __init__(self) -> None:
        self.asked, self.first = time.perf_counter(), 0.0
        self.ids: list[int] = []
        self.usage: Usage | None = None
        self.error: Exception | None = None
        self.over = threading.Event()

    def begin(self, usage: Usage) -> None:
        """Nothing."""

    def token(self, choice: int, token: Token) -> None:
        self.first = self.first or time.perf_counter() - self.asked
        self.ids.append(token.id)

    def end(self, choice: int, reason: str, usage: Usage) -> None:
        self.usage = usage
        self.over.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.over.set()


def resident_bytes() -> int:
    """Of this process, as the system counts them."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def prompt(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, tuple[int, ...], int]:
    """A chat as text, where its messages end, and where its newest answer begins."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ends = [len(tokenizer.apply_chat_template(messages[:count], tokenize=False)) for count in range(1, len(messages) + 1)]
    return text, tuple(ends), ends[-3] if len(ends) > 2 else 0


def turns(service: Service, tokenizer: Any, count: int, new: int, owners: bool) -> list[dict[str, Any]]:
    """So many turns; with ``owners`` each is somebody else's, for whom nothing is remembered."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "You are a helpful guide to a small town on the coast."}]
    rows = []
    for turn in range(1, count + 1):
        messages.append({"role": "user", "content": f"{turn}. {QUESTIONS[turn % len(QUESTIONS)]}"})
        text, ends, answered = prompt(tokenizer, messages)
        heard = Times()
        options = {"max_new_tokens": new, "do_sample": False}
        service.submit(Job(f"{turn}" if owners else "client", text, ends, answered, options), heard)
        heard.over.wait()
        if heard.error is not None:
            raise heard.error
        assert heard.usage is not None
        messages.append({"role": "assistant", "content": tokenizer.decode(heard.ids, skip_special_tokens=True)})
        used = heard.usage
        rows.append({
            "turn": turn, "first_token_seconds": round(heard.first, 4), "prompt": used.prompt, "read": used.read,
            "resident": used.resident, "bytes_held": service.snapshot().bytes_held, "process_bytes": resident_bytes(),
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def around(rows: list[dict[str, Any]], turn: int) -> float:
    """The median of the first tokens of a turn and the four before it."""
    return round(statistics.median(row["first_token_seconds"] for row in rows[max(turn - 5, 0) : turn]), 4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="sirllm(1024)")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--again", type=int, default=0, help="so many turns of a service that remembers nothing as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    policy, found = kvsieve.methods.parse(args.policy), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("remembered", args.turns), ("read_again", args.again)):
            place = Path(folder) / name
            with Service(model, tokenizer, policy, memory=4 << 30, sessions=place, chunk=args.chunk) as service:
                found[name] = turns(service, tokenizer, count, args.new, name == "read_again")
    rows = found["remembered"]
    result = {
        "model": args.model, "policy": repr(policy), "new": args.new, "chunk": args.chunk, "threads": args.threads,
        "load": os.getloadavg()[0],
        "first_token_turn_5": around(rows, 5), f"first_token_turn_{args.turns}": around(rows, args.turns),
        **found,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
