"""A stream on disk: one safetensors file, plain tensors and a JSON header. Nothing is pickled, nothing is executed on load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.backends.base import AttendCall
from kvsieve.errors import CacheMismatchError, KvsieveError, PolicyError, UnsupportedError
from kvsieve.methods.parser import parse
from kvsieve.model import fingerprint
from kvsieve.runtime.head_eviction import LayerState, RowState
from kvsieve.runtime.transcript import Ids, Row, TranscriptState

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.engine import Engine
    from kvsieve.runtime.head_eviction import Observer
    from kvsieve.streams import Stream

__all__ = ["load", "save"]

VERSION = 2
# How a file names the keys that it holds.
_FRAMES = {"post_rope": "rotated", "pre_rope": "raw"}


def _fingerprint(stream: Stream) -> list[Any]:
    facts = stream._engine.facts
    layers = [[x.index, x.num_kv_heads, x.key_dim, x.value_dim, str(x.dtype)] for x in facts.layers]
    return [type(stream.model).__name__, list(facts.layer_types), layers]


def _is_text(policy: Policy) -> bool:
    try:
        return repr(parse(repr(policy))) == repr(policy)
    except PolicyError:
        return False


def save(stream: Stream, path: str | PathLike[str], tokenizer: Any = None) -> None:
    """Write ``stream`` to ``path``. An existing file is replaced only once the new one is complete.

    With the file go fingerprints of the model's weights and positions and, if it is given, of the tokenizer.

    Raises:
        UnsupportedError: if the policy has parts that text cannot describe.
    """
    from safetensors.torch import save_file

    engine = stream._engine
    if not _is_text(stream.policy):
        raise UnsupportedError(f"the policy {stream.policy!r} cannot be written as text; save works for kvsieve's own policies")
    planner = engine.planner
    tensors: dict[str, torch.Tensor] = {}
    memories = range(len(stream.policy.memories))
    for row in range(planner.num_rows):
        for memory in memories:
            tensors[f"positions.{memory}.{row}"] = torch.from_numpy(planner.positions(memory, row).copy())
            tensors[f"scores.{memory}.{row}"] = torch.from_numpy(planner.scores(memory, row).copy())
            runs = planner.runs(memory, row)
            for index, store in engine.stores.items():
                k, v = store.read(runs)
                tensors[f"keys.{index}.{memory}.{row}"] = k.contiguous()
                tensors[f"values.{index}.{memory}.{row}"] = v.contiguous()
    for row, told in enumerate(engine.transcript.rows):
        tensors[f"ids.{row}"], tensors[f"unread.{row}"] = told.ids.tensor(), told.unread.contiguous()
    if engine.scorer is not None and engine.scorer.tail is not None:
        tensors["tail"] = engine.scorer.tail.contiguous()
    if engine.packer is not None:
        tensors.update(engine.packer.tensors(planner, engine.stores))
    if engine.observer is not None:
        tensors.update(_observed(engine.observer))
    tensors.update(engine.sliding.tensors())
    header = {
        "version": VERSION,
        "policy": repr(stream.policy),
        "model": _fingerprint(stream),
        "weights": fingerprint.weights(stream.model),
        "tokenizer": None if tokenizer is None else fingerprint.tokenizer(tokenizer),
        "frame": _FRAMES[engine.stored_keys],
        "columns": engine.transcript.columns,
        "pads": [row.pads for row in engine.transcript.rows],
        "foreign": engine.transcript.foreign,
        "evicted_at": engine.evicted_at,
        "seen": [planner.seen(row) for row in range(planner.num_rows)],
        "layers": sorted(engine.stores),
        "offsets": engine._offsets,
        "sliding": engine.sliding.header(),
        "pins": engine.pins(),
        "early": planner.early(),
    }
    if engine.packer is not None:
        header["packed"] = [planner.num_packed(row) for row in range(planner.num_rows)]
        header["reading"] = engine.packer.reading
    if engine.observer is not None:
        header["since"] = [row.since for row in engine.observer.rows]
        header["calls"] = {str(layer): [call.scale, call.softcap] for layer, call in engine.observer.calls.items()}
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"kvsieve": json.dumps(header)})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | PathLike[str], model: PreTrainedModel, backend: str | None = None, *, tokenizer: Any = None) -> Stream:
    """Open the stream saved at ``path`` on ``model``; it goes on where it was.

    Args:
        path: a file written by :meth:`Stream.save`.
        model: the same model; its layers, heads, dtype, weights and positions are compared with the file's.
        backend: as for :func:`kvsieve.stream`.
        tokenizer: compared with the one that was given to :meth:`Stream.save`, if both were.

    Raises:
        CacheMismatchError: if the file was written for another model, for other weights, or with another tokenizer.
        KvsieveError: if the file is not a kvsieve stream.
    """
    from safetensors import SafetensorError, safe_open

    from kvsieve.streams import Stream

    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as err:
        raise KvsieveError(f"{path} is not a kvsieve stream: {err}") from None
    with opened as file:
        text = (file.metadata() or {}).get("kvsieve")
        if text is None:
            raise KvsieveError(f"{path} is not a kvsieve stream: it has no kvsieve header")
        header = json.loads(text)
        if header["version"] != VERSION:
            raise KvsieveError(f"{path} was written in format {header['version']}; this kvsieve reads format {VERSION}")
        stream = Stream(model, parse(header["policy"]), backend)
        try:
            _check_model(stream, header, tokenizer)
            _restore(stream, header, file)
        except BaseException:
            stream.close()
            raise
    return stream


def _check_model(stream: Stream, header: dict[str, Any], tokenizer: Any) -> None:
    mine, theirs = _fingerprint(stream), header["model"]
    if mine != theirs:
        raise CacheMismatchError(
            f"the stream was saved from {theirs[0]} with layers {theirs[2][:1]}..., this model is {mine[0]} with {mine[2][:1]}..."
        )
    if header["weights"] != fingerprint.weights(stream.model):
        raise CacheMismatchError(
            f"the stream was saved from another model: this {mine[0]} has the same shape and other weights or positions (a "
            "fine-tune, another release); what it remembers would mean nothing to it, so load it on the model that wrote it"
        )
    if None not in (tokenizer, header["tokenizer"]) and header["tokenizer"] != fingerprint.tokenizer(tokenizer):
        raise CacheMismatchError("the stream was saved with another tokenizer, whose ids mean other text")


def _restore(stream: Stream, header: dict[str, Any], file: Any) -> None:
    engine, names = stream._engine, set(file.keys())
    if header["frame"] != _FRAMES[engine.stored_keys]:
        raise CacheMismatchError(f"the stream was saved with {header['frame']} keys, this model needs {engine.stored_keys} ones")
    engine.sliding.restore(header["sliding"], file.get_tensor)
    for row, start, stop, add in header.get("early", []):
        rows_named = None if row is None else [row]
        if add:
            engine.planner.pin(rows_named, start, stop, False)
        else:
            engine.planner.unpin(rows_named, start, stop)
    if not header["seen"]:
        return
    memories = range(len(stream.policy.memories))
    rows = [
        (
            seen,
            [(file.get_tensor(f"positions.{m}.{row}").tolist(), file.get_tensor(f"scores.{m}.{row}").tolist()) for m in memories],
        )
        for row, seen in enumerate(header["seen"])
    ]
    told = [
        Row(Ids().append(file.get_tensor(f"ids.{row}")), file.get_tensor(f"unread.{row}"), tuple((lo, hi) for lo, hi in pads))
        for row, pads in enumerate(header["pads"])
    ]
    engine.restore(header["columns"], rows, TranscriptState(header["columns"], tuple(told), header["foreign"]))
    for index in header["layers"]:
        for row in range(len(rows)):
            for memory in memories:
                k, v = (
                    file.get_tensor(f"{name}.{index}.{memory}.{row}").to(engine._layers[index].device)
                    for name in ("keys", "values")
                )
                if index not in engine.stores:
                    engine.make_store(index, k[None], v[None])
                engine.stores[index].write(engine.planner.runs(memory, row), k, v)
    if engine.packer is not None and "packed" in header:
        saved = {name: file.get_tensor(name) for name in names if name.startswith(("channels.", "pairs.", "watched."))}
        engine.restore_packed(header["packed"], header["reading"], saved)
    if engine.observer is not None:
        _restore_observed(engine, header, file)
    for row, ranges in enumerate(header.get("pins", [])):
        if ranges:
            engine.planner.set_pins(row, [(start, stop) for start, stop in ranges], engine.observer is not None)
    engine._offsets, engine.evicted_at = header["offsets"], header["evicted_at"]
    if engine.scorer is not None and "tail" in names:
        engine.scorer.tail = file.get_tensor("tail")


def _observed(observer: Observer) -> dict[str, torch.Tensor]:
    """What heads chose and looked at, as tensors of their own."""
    tensors: dict[str, torch.Tensor] = {}
    for row, state in enumerate(observer.rows):
        for layer, held in state.layers.items():
            tensors[f"chosen.{layer}.{row}"] = held.chosen.clone()
            if held.queries:
                tensors[f"queries.{layer}.{row}"] = torch.cat(held.queries, 1)
            if held.mass is not None:
                tensors[f"mass.{layer}.{row}"] = held.mass.clone(memory_format=torch.contiguous_format)
    for layer, call in observer.calls.items():
        if call.sink_logits is not None:
            tensors[f"sinks.{layer}"] = call.sink_logits.detach().clone()
    return tensors


def _restore_observed(engine: Engine, header: dict[str, Any], file: Any) -> None:
    names, observer = set(file.keys()), engine.observer
    assert observer is not None

    def get(name: str, layer: int) -> torch.Tensor | None:
        return file.get_tensor(name).to(engine._layers[layer].device) if name in names else None

    for name, (scale, softcap) in header["calls"].items():
        observer.calls[int(name)] = AttendCall(scale, softcap, get(f"sinks.{name}", int(name)))
    observer.rows = []
    for row, since in enumerate(header["since"]):
        layers = {}
        for layer in observer.calls:
            if f"chosen.{layer}.{row}" in names:
                queries = get(f"queries.{layer}.{row}", layer)
                chosen = file.get_tensor(f"chosen.{layer}.{row}")
                pieces = () if queries is None else (queries,)
                layers[layer] = LayerState(chosen, pieces, get(f"mass.{layer}.{row}", layer))
        observer.rows.append(RowState(since, layers))
