"""Calls the public face of kvsieve with wrong arguments: a result or a typed error, and a stream that goes on as if uncalled.

    python tests/faults/fuzz_public.py --calls 100000 --seed 1

Public are the names of `kvsieve`, `kvsieve.methods` and `kvsieve.policy`, and every public method and property of a stream, of its
cache, of a mark, of a bank, and of what these return (:func:`public`). For each of them there is a call that works (:data:`WORKS`),
so an additional one without is told. The first calls are these as they are. Then half of them have one argument replaced by
something hostile, and the other half several. Calls run in child processes, because some errors end one; the call that it died in
stands in a file.

What is wrong is told, one line each, and the exit status is 1:

    RAW      an error that is not kvsieve's own, nor Python's about the number or the names of arguments
    CHANGED  a call was refused, and the stream says something else next than one that was never called
    BROKEN   a call was not refused, and the next one is a raw error
    TEXT     a policy whose text does not say what it is
    DIED     the process ended, or the call took too long
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import decimal
import inspect
import json
import math
import mmap
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvsieve
import numpy as np
import torch
from kvsieve import methods, policy
from kvsieve.errors import KvsieveError
from kvsieve.model.cache import StreamCache

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import tiny  # noqa: E402
from recorded import Words  # noqa: E402
from systems import SYSTEMS, arguments_of  # noqa: E402

SECONDS = 20
"""A call that takes longer counts as one that hangs."""
MEMORY = 8 << 30
PYTHONS = re.compile(
    r"unexpected keyword argument|missing \d+ required|positional arguments? but|multiple values for|unsupported operand type"
)
"""What Python itself says of the number and the names of arguments, and of operators."""
SCENES = ("full", "streaming_llm", "sirllm", "snapkv", "h2o", "lm_infinite", "hip", "quest", "infllm", "longheads", "refresh_kv")
SCENES += ("selective_v", "think_quantized", "memory_bank", "chain", "sirllm_think", "infllm_tiered")
CALLS_OF_A_SCENE = 40


# --------------------------------------------------------------------------------------------------------------- hostile arguments


class Nothing:
    """Has no length, no truth, no number and no text."""

    def __len__(self) -> int:
        raise ZeroDivisionError("no length")

    def __bool__(self) -> bool:
        raise ZeroDivisionError("no truth")

    def __index__(self) -> int:
        raise ZeroDivisionError("no number")


def tensors(of: torch.Tensor) -> list[Callable[[], Any]]:
    """Others in place of token ids or the like."""
    rows, width = (of.shape[0], of.shape[-1]) if of.dim() > 1 else (1, of.numel())
    some = torch.full((rows, 3), 5)
    return [
        lambda: of + tiny.VOCAB,
        lambda: of - tiny.VOCAB,
        lambda: torch.full_like(of, -1) if not of.dtype.is_floating_point else of * math.nan,
        lambda: torch.full_like(of, 2**31 - 1),
        lambda: torch.full(of.shape, 2**63 - 1),
        lambda: torch.full(of.shape, -(2**63)),
        lambda: torch.cat([of, torch.full_like(of[..., :1], tiny.VOCAB)], -1) if of.dim() else of,
        lambda: of.to(torch.int32),
        lambda: of.to(torch.int16),
        lambda: of.to(torch.uint8),
        lambda: of.to(torch.uint16),
        lambda: of.bool(),
        lambda: of.float(),
        lambda: of.double() * math.inf,
        lambda: of.to(torch.complex64),
        lambda: of.to(torch.float8_e5m2),
        lambda: torch.quantize_per_tensor(of.float(), 0.1, 0, torch.qint8),
        lambda: of.to("meta"),
        lambda: of.to_sparse(),
        lambda: of.float().requires_grad_(),
        lambda: torch.nested.nested_tensor([of.flatten().float(), of.flatten().float()[:1]]),
        lambda: of.flatten(),
        lambda: of.flatten()[0] if of.numel() else of,
        lambda: of[None],
        lambda: of[..., :0],
        lambda: of[:0],
        lambda: of.expand(3, *of.shape[1:]) if of.dim() > 1 and of.shape[0] == 1 else of.repeat(2, *(1,) * (of.dim() - 1)),
        lambda: torch.tensor(5).expand(rows, 2**31),
        lambda: torch.tensor(5).expand(2**31, max(width, 1)),
        lambda: torch.tensor(5).expand(2**31),
        lambda: torch.empty(rows, 2**40, device="meta", dtype=torch.int64),
        lambda: some.T,
        lambda: some[:, ::2],
        lambda: torch.nn.Parameter(of.float()),
        lambda: of.numpy() if not of.requires_grad else of,
        lambda: of.tolist(),
        lambda: {"input_ids": of},
        lambda: {"input_ids": of, "attention_mask": None},
        lambda: {"input_ids": of, "attention_mask": torch.zeros_like(of)},
        lambda: {"input_ids": of, "pixel_values": torch.zeros(1, 3, 4, 4)},
        lambda: {"input_ids": None},
        lambda: {},
        lambda: {3: of},
        lambda: {"input_ids": of, "token_type_ids": "x"},
        lambda: {"input_ids": of, "mm_token_type_ids": [0, 1]},
        lambda: (of,),
    ]


OTHERS: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (None, True, False, 0, -1, 1, 2, 7, 64, 10**6, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30)),
    *(lambda v=v: v for v in (0.5, 1.0, -0.0, math.nan, math.inf, -math.inf, 1e308, 1j, decimal.Decimal(3))),
    *(
        lambda v=v: v
        for v in ("", "x", "cpu", "cuda", "3", "64MiB", "1e3MiB", "9" * 400 + "GB", "0.0001B", "\0", "\ud800", "(" * 300)
    ),
    *(lambda v=v: v for v in (b"x", b"", (), (1,), (1, 2), (-1,), ("x",), (None,), (0.5, 1), (True,), ..., int, len, range(2))),
    *(
        lambda v=v: v
        for v in (np.int64(3), np.int32(-1), np.uint8(2), np.int64(2**62), np.float32(0.5), np.float64(0.25), np.bool_(True))
    ),
    *(lambda v=v: v for v in (Path("/"), Path("/nowhere/at all"), Path("new"), Path("x" * 300), "/dev/null", "/dev/full", ".")),
    list,
    dict,
    set,
    object,
    Nothing,
    lambda: [1],
    lambda: [[1]],
    lambda: [0, 0],
    lambda: [2**70],
    lambda: ["a", "a"],
    lambda: ["a", ""],
    lambda: [None],
    lambda: {"a": 1},
    lambda: iter([0]),
    lambda: (i for i in [1]),
    lambda: np.array([0, 1]),
    lambda: np.array(3),
    lambda: np.array([True]),
    lambda: np.array([0.5]),
    lambda: torch.tensor(3),
    lambda: torch.tensor(True),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor([0]),
    lambda: torch.tensor([[0]]),
    lambda: torch.tensor([0, 1]),
    lambda: torch.tensor([5, -9]),
    lambda: torch.empty(2, device="meta"),
    lambda: torch.tensor(0).expand(2**31),
    lambda: torch.eye(2).to_sparse(),
    kvsieve.Full,
    lambda: kvsieve.MemoryBank(),
    lambda: kvsieve.Memory(),
    lambda: policy.KeepAll(),
    lambda: policy.Tiered("1MiB"),
]
ENDLESS = ("max_new_tokens", "max_length", "num_beams")
"""A large number here is no mistake, and takes as long as it says."""
NOT_EVERYWHERE = {
    "Answer",
    "Batch.add",
    "Stream",
    "Stream.evict",
    "Stream.feed",
    "Stream.join",
    "Stream.kept",
    "Stream.pin",
    "Stream.read_twice",
}
NOT_EVERYWHERE |= {"Stream.remember", "Stream.trace", "StreamCache.crop", "load", "model.generate()", "stream"}
"""What some policies refuse, so that it works in some scenes only."""
OF_OTHER_LAYERS = {"get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state", "update_indexer"}
OF_OTHER_LAYERS |= {"has_previous_state"}
"""Of transformers' caches, for layers without attention: no stream has one."""
THEIRS: dict[str, set[int | str]] = {
    "Stream.generate": {"max_new_tokens", "num_beams", "do_sample", "eos_token_id", "logits_processor"},
    "model()": {0, "logits_to_keep", "attention_mask", "position_ids", "use_cache"},
    "model.generate()": {0},
}
"""Arguments that are transformers' own: it, or torch, says what is wrong with them; no id is out of the embedding's range."""


def hostile(value: Any, name: str, rng: random.Random) -> Any:
    """Something else in place of an argument that works: of its kind, or of any."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        try:
            return rng.choice(tensors(value))()
        except Exception:  # torch does not make every one of every kind
            return value.flatten()
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3 and name not in ENDLESS:
        return rng.choice((value + 1, value - 1, -value, value * 64, np.int64(value), np.int32(value), float(value), str(value), 0))
    if isinstance(value, float) and rng.random() < 0.3:
        return rng.choice((-value, value * 1e3, math.nan, math.inf, np.float32(value), np.float64(value), str(value), 0, 1))
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0123456789()=,>|*_abz/-\0 é") + value[at + rng.randrange(2) :]
    found = rng.choice(OTHERS)()
    if name in ENDLESS and isinstance(found, (int, np.integer, float)) and abs(found) > 64:
        return -1
    return found


# ------------------------------------------------------------------------------------------------------------ calls that work


@dataclass
class Work:
    """A call that works: of what, with which arguments, and which of these may be given that are not."""

    key: str
    call: Callable[..., Any]
    arguments: list[Any] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)
    stays: int = 0
    """The first so many arguments are not changed."""


class Scene:
    """A model, a stream that has read a text, and what belongs to them."""

    def __init__(self, name: str, rows: int, backend: str) -> None:
        self.name, self.rows, self.backend, self.model = name, rows, backend, tiny.model()
        self.policy = SYSTEMS[name].of_rows(rows)
        self.stream = kvsieve.stream(self.model, self.policy, backend)
        self.prompt, self.next = tiny.ids(rows, 6, 1), tiny.ids(rows, 4, 2)
        self.before = self.stream.fork()
        self.stream.generate(tiny.ids(rows, 70), max_new_tokens=3, do_sample=False)
        self.bank = kvsieve.MemoryBank(capacity=64, chunk=4, top_k=8)
        self.mark = self.stream.mark()
        self.document: kvsieve.Stream | None = None
        self.finished: kvsieve.Answer | None = None

    def told(self, stream: kvsieve.Stream | None = None) -> Any:
        """What a stream has read, and what it says next."""
        one = self.stream if stream is None else stream
        with one.fork() as fork:
            said = fork.generate(self.next, max_new_tokens=2, do_sample=False)
        return [row.tolist() for row in one.ids], one.pins, said.tolist()

    def close(self) -> None:
        for one in (self.before, self.stream, self.document):
            if one is not None:
                one.close()


def saved(scene: Scene) -> str:
    """The path of a file of this scene's stream."""
    path = f"{scene.name} {scene.rows} {scene.backend}.session"
    if not os.path.exists(path):
        scene.stream.save(path)
    return path


def bank_file() -> str:
    """The path of a bank's file; nobody has it open."""
    if not os.path.exists("real.bank"):
        with kvsieve.MemoryBank("real.bank", capacity=64, chunk=4, top_k=8) as bank:
            bank.ingest(tiny.model(), tiny.ids(1, 30), window=16, backend="cpu")
    return "real.bank"


def banked(scene: Scene) -> kvsieve.MemoryBank:
    """A bank that holds something."""
    if scene.bank.book.shape is None:
        scene.bank.ingest(scene.model, tiny.ids(1, 30), window=16, backend="cpu")
    return scene.bank


def document(scene: Scene) -> kvsieve.Stream:
    if scene.document is None:
        scene.document = scene.before.fork()
        scene.document.feed(tiny.ids(scene.rows, 5, 3))
    return scene.document


def remembers(stream: Any) -> None:
    stream.remember()


def forward(model: Any, ids: Any, cache: Any, **named: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **named)


class Letters:
    """Stands for a tokenizer."""

    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[3 + ord(letter) % 100 for letter in text]])}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): 3 + number % 100 for number in range(128)}


def property_of(thing: Any, name: str) -> Callable[[], Any]:
    return lambda: getattr(thing, name)


def recorded(stream: kvsieve.Stream) -> Callable[..., None]:
    """A recording of nothing."""

    def call(*arguments: Any, **named: Any) -> None:
        with stream.record(*arguments, **named):
            pass

    return call


def attempts(scene: Scene) -> Iterator[Work]:
    """Everything public, and arguments with which it works on this scene, or on another."""
    stream, cache, model, ids, rows = scene.stream, scene.stream.cache, scene.model, scene.prompt, scene.rows
    for system in methods.SYSTEMS:
        yield Work(system.name, system.make, *arguments_of(system))
    yield Work("SirLLM", kvsieve.SirLLM, ["64MiB"], {"sinks": 2, "recent": 4, "decay": 0.5})
    yield Work("LMInfinite", kvsieve.LMInfinite, [22], {"sinks": 2, "middle_top_k": 3, "middle_from_layer": 1, "ceiling": 9})
    yield Work("ThinK", kvsieve.ThinK, [0.5], {"recent": 8, "observe": 8, "flush_every": 4, "skip_layers": (1,), "when": "prefill"})
    yield Work("ThinK", kvsieve.ThinK, [], {"channels": "single", "mode": "zero", "norm_over": "all", "round_to": 8})
    yield Work("Quantized", kvsieve.Quantized, [8], {"group": 16, "residual": 8, "when": "prefill"})
    yield Work("Quantized", kvsieve.Quantized, [], {"key_bits": 4, "value_bits": 0})
    hip = {"block": 4, "sinks": 2, "window": 24, "dense_layers": 1, "refresh": 4, "query_block": 16, "query_stride": 3}
    yield Work("HiP", kvsieve.HiP, [32], {**hip, "representative": "middle", "extend": 64})
    yield Work("InfiniteHiP", kvsieve.InfiniteHiP, ["3k"])
    yield Work("SelectiveV", kvsieve.SelectiveV, [24], {"mass": 0.9})
    infllm = {"blocks": 3, "block": 8, "representatives": 2, "sinks": 4, "query_block": 16, "per_head": True}
    yield Work("InfLLM", kvsieve.InfLLM, [32], {**infllm, "summary": "representatives", "host_budget": "96KiB", "disk": "."})
    bank = {
        "capacity": 192,
        "chunk": 4,
        "top_k": 16,
        "layers": [1],
        "read_only": False,
        "bias": 0.5,
        "distance": 9,
        "per_head": False,
    }
    yield Work("MemoryBank", kvsieve.MemoryBank, [], {**bank, "namespace": "a", "path": None})
    yield Work("Memory", kvsieve.Memory, [policy.KeepAll(), policy.Original(), policy.Dense(), policy.Plain()], {"text": None})
    yield Work("parse", methods.parse, ["streamingllm(24, sinks=2) >> sirllm(24, sinks=0, recent=0)"])
    yield Work("parse", methods.parse, [methods.SYSTEMS[scene.rows % len(methods.SYSTEMS)].small])
    yield Work("parse", methods.parse, ["sirllm(48, sinks=2, recent=8) | think(0.5, skip_layers=(0,))"])
    for name in ("name", "text_name", "page"):
        yield Work(f"System.{name}", property_of(methods.SYSTEMS[1], name))
    yield Work("System", methods.System, [kvsieve.Full, "", "nothing", "full()"])
    yield Work("Capped", policy.Capped, [4])
    yield Work("FixedDistance", policy.FixedDistance, [4])
    yield Work("Rebased", policy.Rebased, [64])
    yield Work("TopKTokens", policy.TopKTokens, [4], {"from_layer": 1})
    yield Work("HeaviestValues", policy.HeaviestValues, [4], {"mass": 0.5, "renormalise": True})
    yield Work("Tiered", policy.Tiered, ["96KiB"], {"disk": ".", "keep": 3, "order": "scores", "decay": 0.5, "background": True})
    yield Work("PrunedAndQuantized", policy.PrunedAndQuantized, [kvsieve.ThinK().storage, kvsieve.Quantized().storage])
    yield Work("Chain", policy.Chain, [(kvsieve.StreamingLLM(24), kvsieve.Full())])
    yield Work("Banked", policy.Banked, [kvsieve.StreamingLLM(24), scene.bank])
    for name in ("Dense", "Fetched", "InCache", "KeepAll", "Original", "Plain"):
        yield Work(name, getattr(policy, name))
    for name in ("memories", "stored_keys", "moves", "compression", "tiers", "selection", "recycling", "heaviest_values"):
        yield Work(f"Policy.{name}", property_of(scene.policy, name))
    for name in ("fetching", "bank", "needs_surprisal"):
        yield Work(f"Policy.{name}", property_of(scene.policy, name))
    yield Work("Policy.specs", scene.policy.specs, [64])
    yield Work("Policy.__or__", lambda a, b: a | b, [kvsieve.StreamingLLM(24), kvsieve.Quantized(8)], stays=1)
    yield Work("Policy.__rshift__", lambda a, b: a >> b, [kvsieve.StreamingLLM(24), kvsieve.Full()], stays=1)
    yield Work("Policy.__rshift__", lambda a, b: a >> b, [kvsieve.StreamingLLM(24), scene.bank], stays=1)

    yield Work("stream", kvsieve.stream, [model, scene.policy, scene.backend])
    yield Work("Stream", kvsieve.Stream, [model, scene.policy], {"backend": scene.backend})
    if scene.policy.bank is None:
        path = saved(scene)
        yield Work("load", kvsieve.load, [path, model, scene.backend], {"tokenizer": None, "bank": None})
        yield Work("Stream.save", stream.save, [path + " 2"], {"tokenizer": None})
    yield Work("Stream.record", recorded(stream), ["a recording", Words()], {"row": 0})
    yield Work("Stream.cache", property_of(stream, "cache"))
    yield Work("Stream.seen", property_of(stream, "seen"))
    yield Work("Stream.ids", property_of(stream, "ids"))
    yield Work("Stream.pins", property_of(stream, "pins"))
    yield Work("Stream.stats", stream.stats)
    yield Work("Stats.as_dict", stream.stats().as_dict)
    yield Work("Stream.kept", stream.kept, [1, 0])
    yield Work("Stream.kept", stream.kept)
    yield Work("Stream.trace", stream.trace)
    mask = torch.ones_like(ids)
    turn = {"attention_mask": mask, "chunk": 4, "unread": None, "pin": False, "token_type_ids": torch.zeros_like(ids)}
    yield Work("Stream.feed", stream.feed, [ids], turn)
    yield Work("Stream.feed", stream.feed, [ids], {"pin": True})
    yield Work("Stream.feed", stream.feed, [{"input_ids": ids, "attention_mask": mask}])
    told = {"max_new_tokens": 2, "do_sample": False}
    yield Work("Stream.generate", stream.generate, [ids], told)
    yield Work("Stream.generate", stream.generate, [ids, mask], {"end_turn": True, "unread": None, "pin": False, **told})
    yield Work("Stream.generate", stream.generate, [], {"inputs": ids, **told, "num_beams": 2})
    yield Work("Stream.generate", stream.generate, [ids], {**told, "eos_token_id": 2, "logits_processor": None})
    yield Work("compile", kvsieve.compile, [model], {"disable": True})
    yield Work("Batch", kvsieve.Batch, [model], {"most": 4})
    yield Work("Batch.add", answered(scene), [stream, ids], {**told, "end_turn": True, "unread": None, "seed": 3})
    yield Work("Answer", answered(scene), [stream, ids], told)
    for name in ("answers", "step", "run"):
        one = kvsieve.Batch(model)
        yield Work(f"Batch.{name}", property_of(one, name) if name == "answers" else getattr(one, name))
    yield Work("Batch.cancel", kvsieve.Batch(model).cancel, [finished(scene)])
    yield Work("Stream.end_turn", stream.end_turn)
    yield Work("Stream.reset", stream.reset)
    yield Work("Stream.remember", stream.remember)
    yield Work("Stream.pin", stream.pin, [68, 70], {"rows": 0})
    yield Work("Stream.pin", stream.pin, [80, 82, [0]])
    yield Work("Stream.unpin", stream.unpin, [3, 9], {"rows": [rows - 1]})
    yield Work("Stream.evict", stream.evict, [60, 62], {"rows": 0})
    yield Work("Stream.evict", stream.evict, [66, 70])
    yield Work("Stream.fork", stream.fork)
    yield Work("Stream.join", scene.before.join, [[document(scene)]], {"canonical": True})
    yield Work("Stream.join", stream.join, [[stream]])
    yield Work("Stream.read_twice", stream.read_twice, [ids, scene.next], {"keep": "both"})
    yield Work("Stream.read_twice", stream.read_twice, [ids, scene.next], {"keep": "second"})
    yield Work("Stream.mark", stream.mark)
    yield Work("Mark.seen", property_of(scene.mark, "seen"))
    yield Work("Mark", type(scene.mark), [scene.mark.stream, scene.mark.state])
    yield Work("Stream.rewind", stream.rewind, [scene.mark])
    yield Work("Stream.close", stream.close)
    yield Work("Stream.__enter__", stream.__enter__)
    yield Work("Stream.__exit__", stream.__exit__, [None, None, None])
    yield Work("Stream.__copy__", copy.copy, [stream], stays=1)
    yield Work("Stream.__deepcopy__", copy.deepcopy, [stream], stays=1)
    yield Work("Stream.__reduce__", lambda one: refused(pickle.dumps, one), [stream], stays=1)

    yield Work("model()", lambda ids, **named: forward(model, ids, cache, **named), [scene.next])
    more = {"logits_to_keep": 1, "attention_mask": None, "position_ids": None, "use_cache": True}
    yield Work("model()", lambda ids, **named: forward(model, ids, cache, **named), [scene.next], more)
    yield Work("model.generate()", lambda ids: model.generate(ids, past_key_values=cache, **told), [scene.next])
    for name in ("batch_size", "is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_recording_past"):
        yield Work(f"StreamCache.{name}", property_of(cache, name))
    yield Work("StreamCache.is_sliding", property_of(cache, "is_sliding"))
    states = torch.zeros(rows, 2, 3, 16)
    yield Work("StreamCache.update", lambda *a: refused(cache.update, *a), [states, states, 0])
    yield Work("StreamCache.crop", cache.crop, [-2])
    yield Work("StreamCache.crop", cache.crop, [torch.tensor(-1)])
    yield Work("StreamCache.reorder_cache", cache.reorder_cache, [torch.arange(rows)])
    yield Work("StreamCache.batch_select_indices", cache.batch_select_indices, [torch.arange(rows)])
    yield Work("StreamCache.batch_select_indices", cache.batch_select_indices, [torch.ones(rows, dtype=torch.bool)])
    yield Work("StreamCache.batch_repeat_interleave", cache.batch_repeat_interleave, [2])
    yield Work("StreamCache.get_seq_length", cache.get_seq_length, [0])
    yield Work("StreamCache.get_mask_sizes", cache.get_mask_sizes, [3, 0])
    yield Work("StreamCache.get_max_length", cache.get_max_length, [0])
    yield Work("StreamCache.get_query_offset", cache.get_query_offset, [0])
    yield Work("StreamCache.activate_past_recording", cache.activate_past_recording)
    yield Work("StreamCache.reset", cache.reset)
    yield Work("StreamCache.early_initialization", cache.early_initialization, [rows, 2, 16, torch.float32, torch.device("cpu")])
    for name in ("offload", "prefetch"):
        yield Work(f"StreamCache.{name}", lambda *a, name=name: refused(getattr(cache, name), *a), [0])
    yield Work("StreamCache.__copy__", copy.copy, [cache], stays=1)
    yield Work("StreamCache.__deepcopy__", copy.deepcopy, [cache], stays=1)
    yield Work("StreamCache.__reduce__", lambda one: refused(pickle.dumps, one), [cache], stays=1)

    held, fresh = banked(scene), kvsieve.MemoryBank(capacity=64, chunk=4, top_k=8)
    yield Work("MemoryBank.load", load_and_close, [bank_file()], {"read_only": True})
    yield Work("MemoryBank.load", load_and_close, [bank_file()], {"top_k": 4, "bias": -1.0, "distance": 3, "namespace": "b"})
    yield Work("MemoryBank.open", fresh.open)
    yield Work("MemoryBank.book", property_of(fresh, "book"))
    yield Work("MemoryBank.stats", held.stats)
    yield Work("MemoryBank.namespace", held.namespace, ["b"])
    yield Work("MemoryBank.namespace", held.namespace, [["b", "c"]])
    yield Work("MemoryBank.like", held.like, [], {"top_k": 4, "per_head": False, "bias": 0.5, "distance": 3, "read_only": True})
    yield Work("MemoryBank.forget", fresh.forget, ["default"])
    yield Work("MemoryBank.ingest", fresh.ingest, [model, tiny.ids(1, 20)], {"window": 16, "backend": "cpu", "namespace": "d"})
    yield Work(
        "MemoryBank.ingest", fresh.ingest, [model, "a text of words"], {"tokenizer": Letters(), "window": 16, "backend": "cpu"}
    )
    yield Work("MemoryBank.ingest", fresh.ingest, [model, tiny.ids(1, 20)[0]], {"window": 16, "backend": "cpu"})
    yield Work("MemoryBank.save", save_bank, [None, "new.bank"])
    yield Work("MemoryBank.close", fresh.close)
    yield Work("MemoryBank.__enter__", fresh.__enter__)
    yield Work("MemoryBank.__exit__", fresh.__exit__, [None, None, None])


def refused(call: Callable[..., Any], *given: Any) -> None:
    """What is refused whatever it is given: that is its result."""
    with contextlib.suppress(KvsieveError):
        call(*given)


def load_and_close(path: Any, **changes: Any) -> None:
    kvsieve.MemoryBank.load(path, **changes).close()


def answered(scene: Scene) -> Callable[..., Any]:
    """A stream's turn in a batch, from its beginning to its end."""

    def call(stream: Any, ids: Any, **asked: Any) -> Any:
        batch = kvsieve.Batch(scene.model)
        answer = batch.add(stream, ids, **asked)
        batch.run()
        return answer.result()

    return call


def finished(scene: Scene) -> kvsieve.Answer:
    """An answer that is over; its scene's, so that it holds nothing once that is closed."""
    if scene.finished is None:
        with kvsieve.stream(scene.model, kvsieve.StreamingLLM(24), scene.backend) as stream:
            batch = kvsieve.Batch(scene.model)
            scene.finished = batch.add(stream, tiny.ids(1, 3), max_new_tokens=1)
            batch.run()
    return scene.finished


def save_bank(tokenizer: Any, path: Any) -> None:
    bank = kvsieve.MemoryBank(path, capacity=64, chunk=4, top_k=8)
    try:
        bank.ingest(tiny.model(), tiny.ids(1, 20), window=16, backend="cpu")
        bank.save(tokenizer=tokenizer)
    finally:
        with contextlib.suppress(KvsieveError):
            bank.close()


def public() -> set[str]:
    """The names of all public calls and properties."""
    records = {"Kept", "Stats", "Channels", "LayerShape", "Packing", "Piece", "Residents", "StorageObservation", "HeadObservation"}
    bases = {"BankRule", "EvictionRule", "FetchedSelection", "PerHeadEviction", "Policy", "PositionRule", "RecycledSelection"}
    bases |= {"SelectionRule", "SparseSelection", "StorageRule"}
    found = {n for n in kvsieve.__all__ if not n.startswith("_")} - {"KvsieveError", "errors", "methods", "policy"}
    found |= set(policy.__all__) | {"parse", "System", "Mark"}
    found -= records | bases
    operators = {"__or__", "__rshift__", "__enter__", "__exit__", "__copy__", "__deepcopy__", "__reduce__"}
    for kind in (kvsieve.Stream, kvsieve.Batch, kvsieve.MemoryBank, policy.Policy, methods.System, kvsieve.Stats):
        found |= {f"{kind.__name__}.{n}" for n, v in vars(kind).items() if is_call(v) and (n[0] != "_" or n in operators)}
    names = {n for n in dir(StreamCache) if n[0] != "_" and is_call(inspect.getattr_static(StreamCache, n))} - OF_OTHER_LAYERS
    found |= {f"StreamCache.{n}" for n in names | {"__copy__", "__deepcopy__", "__reduce__"}}
    return found | {"Mark.seen", "model()"}


def is_call(value: Any) -> bool:
    return callable(value) or isinstance(value, property | classmethod | staticmethod)


# ------------------------------------------------------------------------------------------------------------------ one call


class Fuzzer:
    """Calls, one after the other, and what is wrong with how they end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.scene: Scene | None = None
        self.expected: dict[tuple[str, int, str], Any] = {}
        self.returned: set[str] = set()
        self.numbers = [("full", at) for at in range(len(self.works("full", 1, "cpu")))]
        for name, key in (("hip", "Stream.trace"), ("memory_bank", "Stream.remember")):
            self.numbers += [(name, at) for at, work in enumerate(self.works(name, 1, "cpu")) if work.key == key]

    def works(self, name: str, rows: int, backend: str) -> list[Work]:
        scene = self.scene
        if scene is None or (scene.name, scene.rows, scene.backend) != (name, rows, backend):
            self.forget()
            scene = self.scene = Scene(name, rows, backend)
            if (name, rows, backend) not in self.expected:
                self.expected[name, rows, backend] = scene.told()
        return list(attempts(scene))

    def forget(self) -> None:
        if self.scene is not None:
            self.scene.close()
        self.scene = None

    def one(self, number: int, note: Callable[[str], None]) -> str | None:
        """Makes one call; what is wrong with it."""
        rng = random.Random(f"{self.seed} {number}")
        if number < len(self.numbers):
            name, at = self.numbers[number]
            work = self.works(name, 1, "cpu")[at]
        else:
            lot = random.Random(f"{self.seed} {number // CALLS_OF_A_SCENE}")
            works = self.works(lot.choice(SCENES), lot.choice((1, 1, 2)), lot.choice(("cpu", "cpu", "reference")))
            keys = sorted({work.key for work in works})
            key = rng.choice(keys)
            work = rng.choice([work for work in works if work.key == key])
        arguments, named, changed = list(work.arguments), dict(work.named), set()
        places: list[Any] = [*range(work.stays, len(arguments)), *named]
        if number >= len(self.numbers) and places:
            for place in rng.sample(places, 1 if rng.random() < 0.5 else rng.randint(1, len(places))):
                if isinstance(place, int):
                    arguments[place] = hostile(arguments[place], name_of(work.call, place), rng)
                else:
                    named[place] = hostile(named[place], place, rng)
                changed.add(place)
        told = [*map(short, arguments), *(f"{key}={short(value)}" for key, value in named.items())]
        note(f"{work.key}({', '.join(told)}) in {self.scene.name, self.scene.rows, self.scene.backend}")
        return self.judge(work, arguments, named, changed, rng)

    def judge(self, work: Work, arguments: list[Any], named: dict[str, Any], changed: set[Any], rng: random.Random) -> str | None:
        assert self.scene is not None
        scene = self.scene
        try:
            made = work.call(*arguments, **named)
        except KvsieveError as err:
            if not changed and work.key not in NOT_EVERYWHERE:
                return f"REFUSED {type(err).__name__}: {err}"
            wrong = f"RAW an error of several lines: {err!r}" if "\n" in str(err) else None
        except Exception as err:
            at = where()
            by_python = isinstance(err, TypeError) and PYTHONS.search(str(err))
            wrong = None if by_python else f"RAW {type(err).__name__}: {err} @ {at}"
            theirs = changed & THEIRS.get(work.key, set()) and not at.startswith("kvsieve/")
            if theirs and "out of range in self" not in str(err):
                wrong = None
                if self.expected[scene.name, scene.rows, scene.backend][0] != [row.tolist() for row in scene.stream.ids]:
                    self.forget()  # it failed in the midst of its answer, which is as documented
                    return None
        else:
            return self.finished(work, made, rng)
        if wrong is not None or work.key.split(".")[0] not in ("Stream", "StreamCache", "model()", "model", "load", "stream"):
            return wrong
        key = scene.name, scene.rows, scene.backend
        try:
            now = scene.told()
        except Exception as err:
            self.forget()
            return f"CHANGED {type(err).__name__}: {err}"
        if now != self.expected[key]:
            self.forget()
            return f"CHANGED {now} was {self.expected[key]}"
        return None

    def finished(self, work: Work, made: Any, rng: random.Random) -> str | None:
        """What the call returned can be used, and so can the stream that it changed."""
        assert self.scene is not None
        scene = self.scene
        self.returned.add(work.key)
        try:
            if isinstance(made, policy.Policy):
                return drive(made, rng)
            if isinstance(made, kvsieve.Stream) and made is not scene.stream:
                with contextlib.closing(made):
                    made.generate(scene.next, max_new_tokens=1, do_sample=False)
            if isinstance(made, kvsieve.MemoryBank):
                drive(kvsieve.StreamingLLM(16) >> made, rng)
                made.close()
            if work.key.split(".")[0] in ("Stream", "StreamCache", "model()", "model"):
                rows = len(scene.stream.ids) or scene.rows
                with contextlib.suppress(KvsieveError):
                    scene.stream.generate(tiny.ids(rows, 3), max_new_tokens=1, do_sample=False)
                scene.stream.stats()
                self.forget()
            if scene.policy.bank is not None:
                self.forget()  # what a fork or a batch has read is in the bank, and the stream's next answer may recall it
        except KvsieveError:
            self.forget()
        except Exception as err:
            self.forget()
            return f"BROKEN {type(err).__name__}: {err} @ {where()}"
        return None


def drive(made: policy.Policy, rng: random.Random) -> str | None:
    """A policy says in its text what it is, and a stream runs under it or refuses it."""
    text = repr(made)
    plain = not any(part in text for part in ("object at", "Memory(", "Tiered", "Chain("))
    if plain and repr(methods.parse(text)) != text:
        return f"TEXT {text}"
    if rng.random() < 0.5:
        with kvsieve.stream(tiny.model(), made, "cpu") as stream:
            stream.generate(tiny.ids(1, 40), max_new_tokens=2, do_sample=False)
    return None


def where() -> str:
    """The innermost places of the error that is being handled."""
    import traceback

    frames = traceback.extract_tb(sys.exc_info()[2])
    package = str(Path(kvsieve.__file__).parent)
    ours = [frame for frame in frames if frame.filename.startswith(package)]
    names = [frame.filename.replace(package, "kvsieve") for frame in [*frames[-1:], *reversed(ours[-2:])]]
    return " < ".join(f"{name}:{frame.lineno}" for name, frame in zip(names, [*frames[-1:], *reversed(ours[-2:])]))


def name_of(call: Callable[..., Any], place: int) -> str:
    try:
        names = list(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return ""
    return names[place] if place < len(names) else ""


def short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{str(value.dtype)[6:]}{list(value.shape) if not value.is_nested else ''} {value.layout} {value.device}>"
    if isinstance(value, torch.nn.Module | kvsieve.Stream | Nothing):
        return type(value).__name__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {short(inner)}" for key, inner in value.items()) + "}"
    text = ascii(value)
    return text if len(text) < 120 else text[:120] + "..."


# ------------------------------------------------------------------------------------------------------------------ processes


def child(seed: int, first: int, calls: int, notes: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    with open(notes, "r+b") as file, mmap.mmap(file.fileno(), 4096) as told, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)

        def note(text: str) -> None:
            data = f"{number} {text}".encode()[:4000]
            told[: len(data) + 1] = data + b"\0"

        number = first
        fuzzer = Fuzzer(seed)
        for number in range(first, first + calls):
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            wrong = fuzzer.one(number, note)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if wrong is not None:
                fuzzer.forget()
                last = bytes(told).split(b"\0")[0].decode(errors="replace")
                print(f"{' '.join(wrong.split())[:400]} | {last}", flush=True)
        fuzzer.forget()
        os.chdir("/")
    print("RETURNED", *sorted(name.replace(" ", "_") for name in fuzzer.returned))
    print("DONE", flush=True)


def run(calls: int, seed: int, tell: Callable[[str], None] = print) -> tuple[list[str], set[str]]:
    """Makes `calls` calls; what went wrong, a line each, and what returned something in the last child."""
    wrong, first, returned = [], 0, set[str]()
    with tempfile.NamedTemporaryFile() as notes:
        while first < calls:
            notes.truncate(0)
            notes.truncate(4096)
            asked = {"--child": first, "--calls": calls - first, "--seed": seed, "--notes": notes.name}
            command = [sys.executable, __file__, *(str(word) for pair in asked.items() for word in pair)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            lines = done.stdout.splitlines()
            whole = done.stdout.endswith("DONE\n")
            wrong += [line for line in lines if not line.startswith(("RETURNED", "DONE"))]
            if whole:
                returned = set(lines[-2].split()[1:])
                break
            last = Path(notes.name).read_bytes().split(b"\0")[0].decode(errors="replace")
            if not last:
                raise RuntimeError(f"the child did not begin:\n{done.stderr}")
            wrong.append(f"DIED {done.returncode} {done.stderr.strip().splitlines()[-1:]} | {last}")
            first = int(last.split()[0]) + 1
    for line in wrong:
        tell(line)
    return wrong, returned


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int)
    parser.add_argument("--notes")
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        child(arguments.seed, arguments.child, arguments.calls, arguments.notes)
        return 0
    began = time.perf_counter()
    wrong, returned = run(arguments.calls, arguments.seed)
    print(f"{arguments.calls:,} calls in {time.perf_counter() - began:.0f} s, {len(wrong)} of them wrong")
    print(f"nothing was returned by: {', '.join(sorted(public() - returned)) or 'none'}")
    print(json.dumps({"calls": arguments.calls, "wrong": wrong[:20]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
