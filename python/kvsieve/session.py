"""A stream on disk: one safetensors file, plain tensors and a JSON header. Nothing is pickled, nothing is executed on load.

The header names the model, its weights and the policy. The tokens come first, as the planner numbers them, and then what each part
of the stream has to say of itself (:meth:`kvsieve.runtime.part.StreamPart.save`); its tensors carry its name before theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import CacheMismatchError, KvsieveError, PolicyError, UnsupportedError
from kvsieve.methods.parser import parse
from kvsieve.model import fingerprint
from kvsieve.runtime.part import Saved

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from kvsieve.facts import ModelFacts
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.engine import Engine

__all__ = ["SavedStream", "opened", "save"]

VERSION = 3


def save(engine: Engine, model: PreTrainedModel, path: str | PathLike[str], tokenizer: Any = None) -> None:
    """Write the stream of ``engine`` to ``path``. An existing file is replaced only once the new one is complete.

    With the file go fingerprints of the model's weights and positions and, if it is given, of the tokenizer.

    Raises:
        UnsupportedError: if the policy has parts that text cannot describe.
    """
    from safetensors.torch import save_file

    policy = engine.policy
    if not _is_text(policy):
        raise UnsupportedError(f"the policy {policy!r} cannot be written as text; save works for kvsieve's own policies")
    tensors = _tokens(engine)
    data = {}
    for part in engine.parts:
        saved = part.save()
        data[part.name] = saved.data
        tensors.update({f"{part.name}/{name}": tensor for name, tensor in saved.tensors.items()})
    tensors = _apart(tensors)
    header = {
        "version": VERSION,
        "policy": repr(policy),
        "model": _shape(model, engine.facts),
        "weights": fingerprint.weights(model),
        "tokenizer": None if tokenizer is None else fingerprint.tokenizer(tokenizer),
        "stored_keys": engine.stored_keys,
        "columns": engine.columns,
        "seen": engine.blocks.seen,
        "layers": sorted(engine.stores),
        "parts": data,
    }
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"kvsieve": json.dumps(header)})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


class SavedStream:
    """A file that :func:`save` wrote, open for reading.

    Attributes:
        policy: the policy of the stream.
    """

    def __init__(self, header: dict[str, Any], file: Any) -> None:
        self._header, self._file = header, file
        self.policy: Policy = parse(header["policy"])

    def check(self, engine: Engine, model: PreTrainedModel, tokenizer: Any = None) -> None:
        """Refuse a model, its weights, or a tokenizer that the stream does not come from.

        Raises:
            CacheMismatchError: naming what differs.
        """
        header, mine = self._header, _shape(model, engine.facts)
        theirs = header["model"]
        if mine != theirs:
            raise CacheMismatchError(
                f"the stream was saved from {theirs[0]} with layers {theirs[2][:1]}..., this model is {mine[0]} with "
                f"{mine[2][:1]}..."
            )
        if header["weights"] != fingerprint.weights(model):
            raise CacheMismatchError(
                f"the stream was saved from another model: this {mine[0]} has the same shape and other weights or positions (a "
                "fine-tune, another release); what it remembers would mean nothing to it, so load it on the model that wrote it"
            )
        if None not in (tokenizer, header["tokenizer"]) and header["tokenizer"] != fingerprint.tokenizer(tokenizer):
            raise CacheMismatchError("the stream was saved with another tokenizer, whose ids mean other text")
        if header["stored_keys"] != engine.stored_keys:
            raise CacheMismatchError(
                f"the stream was saved with {header['stored_keys']} keys, this model needs {engine.stored_keys} ones"
            )

    def restore(self, engine: Engine) -> None:
        """Make what was saved the present of a stream that has seen nothing."""
        header, names = self._header, list(self._file.keys())
        if header["seen"]:
            self._restore_tokens(engine)
        for part in engine.parts:
            prefix = f"{part.name}/"
            tensors = {name[len(prefix) :]: self._file.get_tensor(name) for name in names if name.startswith(prefix)}
            part.restore(Saved(header["parts"][part.name], tensors))

    def _restore_tokens(self, engine: Engine) -> None:
        header, get = self._header, self._file.get_tensor
        memories = range(engine.planner.num_memories)
        rows = []
        for row, seen in enumerate(header["seen"]):
            held = [(get(f"positions.{m}.{row}").tolist(), get(f"scores.{m}.{row}").tolist()) for m in memories]
            rows.append((seen, held))
        engine.begin_at(header["columns"], rows)
        devices = {layer.index: layer.device for layer in engine.facts.layers}
        for index in header["layers"]:
            for row in range(len(rows)):
                for memory in memories:
                    k, v = (get(f"{name}.{index}.{memory}.{row}").to(devices[index]) for name in ("keys", "values"))
                    store = engine.stores.get(index) or engine.make_store(index, k[None], v[None])
                    store.write(engine.planner.runs(memory, row), k, v)


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[SavedStream]:
    """The stream that was saved at ``path``.

    Raises:
        KvsieveError: if the file is not a kvsieve stream, or one of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        found = safe_open(path, framework="pt")
    except SafetensorError as err:
        raise KvsieveError(f"{path} is not a kvsieve stream: {err}") from None
    with found as file:
        text = (file.metadata() or {}).get("kvsieve")
        if text is None:
            raise KvsieveError(f"{path} is not a kvsieve stream: it has no kvsieve header")
        header = json.loads(text)
        if header["version"] != VERSION:
            raise KvsieveError(f"{path} was written in format {header['version']}; this kvsieve reads format {VERSION}")
        yield SavedStream(header, file)


def _tokens(engine: Engine) -> dict[str, torch.Tensor]:
    """Positions, scores, keys and values of all residents, by memory and row."""
    planner, tensors = engine.planner, {}
    for row in range(planner.num_rows):
        for memory in range(planner.num_memories):
            tensors[f"positions.{memory}.{row}"] = torch.from_numpy(planner.positions(memory, row).copy())
            tensors[f"scores.{memory}.{row}"] = torch.from_numpy(planner.scores(memory, row).copy())
            runs = planner.runs(memory, row)
            for index, store in engine.stores.items():
                k, v = store.read(runs)
                tensors[f"keys.{index}.{memory}.{row}"] = k.contiguous()
                tensors[f"values.{index}.{memory}.{row}"] = v.contiguous()
    return tensors


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without shared memory, which rows that were one row have, and a file must not."""
    found: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in known else tensor
        known.add(storage)
    return found


def _shape(model: PreTrainedModel, facts: ModelFacts) -> list[Any]:
    layers = [[x.index, x.num_kv_heads, x.key_dim, x.value_dim, str(x.dtype)] for x in facts.layers]
    return [type(model).__name__, list(facts.layer_types), layers]


def _is_text(policy: Policy) -> bool:
    try:
        return repr(parse(repr(policy))) == repr(policy)
    except PolicyError:
        return False
