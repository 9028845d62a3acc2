"""The public calls of kvsieve, and for each one that works: what `tests/faults/fuzz_public.py` gives hostile arguments to.

Public are the names of `kvsieve`, `kvsieve.methods` and `kvsieve.policy`, and every public method and property of a stream, of its
cache, of a mark, of a bank, and of what these return (:func:`public`). For each of them there is a call that works
(:func:`attempts`), so an additional one without is told.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import kvsieve
import tiny
import torch
from kvsieve import methods, policy
from kvsieve.errors import KvsieveError
from kvsieve.model.cache import StreamCache
from recorded import Words
from systems import SYSTEMS, arguments_of

OF_OTHER_LAYERS = {"get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state", "update_indexer"}
OF_OTHER_LAYERS |= {"has_previous_state"}
"""Of transformers' caches, for layers without attention: no stream has one."""


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
    yield Work("SelectiveV", kvsieve.SelectiveV, [24], {"mass": 0.9, "host_budget": "96KiB", "disk": "."})
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
        "reads": "answers",
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
    for name in ("fetching", "bank", "is_full", "needs_surprisal"):
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
