"""Clients of a server that leave at random moments, while conversations go to files and come back.

    python tests/faults/serve_clients.py --answers 1000

Twelve clients of four owners talk to a server with the full cache, whose memory holds a few conversations, whose queue holds a
few requests, and which writes to a folder what leaves memory. One request in five is left, before its answer begins or amid
it. Every answer that arrives must be what the stock model says after the prompt, with every token of that counted; nothing but
429 is an error; and in the end nothing runs, and the memory is within its bound.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kvsieve
import serving
import torch
from kvsieve.serve.service import Service
from serving import CHAT, events, ids, prompt, until

CLIENTS, OWNERS, LEAVES = 12, 4, 0.2
MEMORY = 3 * 2**20
PATIENCE = 0.05
"""Seconds until a client that leaves before its answer has left, at most."""

Told = list[tuple[str, str]]


class Run:
    """What all clients found."""

    def __init__(self, address: str, answers: int) -> None:
        self.address, self.left = address, answers
        self.answers: list[tuple[str, int, str]] = []
        """Prompts, most tokens, and what was said."""
        self.gone, self.refused, self.read_again, self.cached = 0, 0, 0, 0
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def take(self) -> bool:
        """Whether one more answer is to be asked for."""
        with self.lock:
            self.left -= 1
            return self.left >= 0 and not self.wrong

    def add(self, told: Told, most: int, text: str, usage: dict[str, Any]) -> None:
        with self.lock:
            self.answers.append((prompt(*told), most, text))
            self.read_again += usage["kvsieve"]["read_again"]
            self.cached += usage["prompt_tokens_details"]["cached_tokens"]
            if usage["prompt_tokens"] != len(ids(prompt(*told))):
                self.wrong.append(f"{usage['prompt_tokens']} tokens of a prompt that has {len(ids(prompt(*told)))}")


def talk(run: Run, number: int, seed: int) -> None:
    """One client, conversation after conversation."""
    chance = random.Random(f"{seed} {number}")
    while True:
        told: Told = [("system", "All of them know this by heart. " * 3)]
        for _ in range(chance.randint(2, 5)):
            if not run.take():
                return
            told.append(("user", "".join(chance.choices("abcdefgh ", k=chance.choice((5, 40, 200))))))
            try:
                told.append(("assistant", answered(run, number % OWNERS, told, chance)))
            except Exception as error:
                run.wrong.append(f"client {number}: {type(error).__name__}: {error}")
                return


def answered(run: Run, owner: int, told: Told, chance: random.Random) -> str:
    """The answer, once it was waited for."""
    while True:
        stream, leaves, most = chance.random() < 0.5, chance.random() < LEAVES, chance.choice((3, 12, 30))
        asked: dict[str, Any] = {"messages": [{"role": role, "content": said} for role, said in told], "stream": stream}
        asked |= {"temperature": 0, "max_tokens": most, **({"stream_options": {"include_usage": True}} if stream else {})}
        connection = http.client.HTTPConnection(run.address, timeout=120)
        headers = {"Content-Type": "application/json", "X-Session-Key": f"{owner}"}
        try:
            connection.request("POST", CHAT, json.dumps(asked), headers)
            if leaves and not stream:
                time.sleep(chance.random() * PATIENCE)
                run.gone += 1
                continue
            answer = connection.getresponse()
            if answer.status == 429:
                answer.read()
                run.refused += 1
                time.sleep(PATIENCE)
                continue
            if answer.status != 200:
                raise ValueError(f"{answer.status} {answer.read()!r}")
            if leaves:
                answer.readline()
                answer.close()
                run.gone += 1
                continue
            text, usage = streamed(answer.read()) if stream else whole(answer.read())
        finally:
            connection.close()
        run.add(told, most, text, usage)
        return text


def whole(data: bytes) -> tuple[str, dict[str, Any]]:
    body = json.loads(data)
    return str(body["choices"][0]["message"]["content"]), body["usage"]


def streamed(data: bytes) -> tuple[str, dict[str, Any]]:
    *parts, done = events(data)
    if done != "[DONE]":
        raise ValueError(f"a stream ends with {done}")
    *chunks, last = [json.loads(part) for part in parts]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks), last["usage"]


def compared(run: Run, model: Any) -> list[str]:
    """Answers that are not those of the stock model."""
    wrong = []
    for text, most, said in run.answers:
        given = torch.tensor([ids(text)])
        found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False)
        known = serving.tokenizer().decode(found[0, given.shape[1] :], skip_special_tokens=True)
        if known != said:
            wrong.append(f"the model says {known!r}, the server {said!r}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--answers", type=int, default=200, help="answers that are waited for and compared")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, tokenizer = serving.model(), serving.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        limits = {"memory": MEMORY, "sessions": Path(folder), "most": 6, "queue": 8}
        with Service(model, tokenizer, kvsieve.Full(), **limits) as service, serving.serving(service) as address:
            run = Run(address, args.answers)
            clients = [threading.Thread(target=talk, args=(run, number, args.seed)) for number in range(CLIENTS)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            until(lambda: not (service.snapshot().answering or service.snapshot().reading or service.snapshot().queued))
            end = service.snapshot()
    wrong = [*run.wrong, *compared(run, model)]
    wrong += [f"{end.bytes_held} bytes are held, of {MEMORY}"] if end.bytes_held > MEMORY else []
    wrong += [f"{end.failed} failed, {end.errors} errors, {end.unusable} files"] if end.failed + end.errors + end.unusable else []
    counts = {"left": run.gone, "refused": run.refused, "cached": run.cached, "read_again": run.read_again, "loads": end.loads}
    row = {"answers": len(run.answers), **counts, "evictions": end.evictions, "wrong": wrong[:5], "seed": args.seed}
    print(json.dumps(row), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
