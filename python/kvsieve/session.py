"""A stream on disk: tensors and a JSON header (:mod:`kvsieve.files.tensor_file`). Nothing is pickled or executed on load.

The header names the model, its weights and the policy. The tokens come first, as the planner numbers them, and then what each part
of the stream has to say of itself (:meth:`kvsieve.runtime.part.StreamPart.save`); its tensors carry its name before theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import (
    BackendError,
    BankError,
    CacheMismatchError,
    KvsieveError,
    PolicyError,
    SessionError,
    TierError,
    UnsupportedError,
)
from kvsieve.files.tensor_file import Kind, Later, TensorFile, write
from kvsieve.files.tensor_file import opened as opened_file
from kvsieve.methods.parser import parse
from kvsieve.model import fingerprint
from kvsieve.model.parallel import refuse_files
from kvsieve.runtime.saved import MOST, Saved, in_range, of_kind

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from kvsieve.facts import ModelFacts
    from kvsieve.policy.compose import Policy
    from kvsieve.runtime.engine import Engine

__all__ = ["SavedStream", "opened", "save"]

KIND = Kind("kvsieve", "kvsieve stream", 4)


def save(engine: Engine, model: PreTrainedModel, path: str | PathLike[str], tokenizer: Any = None) -> None:
    """Write the stream of ``engine`` to ``path``. What is there is replaced only once the new file is complete and on the disk.

    With the file go fingerprints of the model's weights and positions and, if it is given, of the tokenizer. A forward that died is
    undone before.

    Raises:
        UnsupportedError: if the policy has parts that text cannot describe, or the model is spread over processes.
        SaveError: if the file cannot be written; what was there before is as it was.
    """
    policy = engine.policy
    if not _is_text(policy):
        raise UnsupportedError(f"the policy {policy!r} cannot be written as text; save works for kvsieve's own policies")
    refuse_files(engine.facts, "a session file")
    engine.idle()
    tensors = _tokens(engine)
    data = {}
    for part in engine.parts:
        saved = part.save()
        data[part.name] = saved.data
        tensors.update({f"{part.name}/{name}": tensor for name, tensor in saved.tensors.items()})
    header = {
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
    write(path, KIND, header, tensors)


class SavedStream:
    """A file that :func:`save` wrote, open for reading.

    Attributes:
        policy: the policy of the stream.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file, self._header = file, Saved(file.header)
        self._used: set[str] = set()
        with self._checked():
            wrong = set(file.header) ^ {
                "policy",
                "model",
                "weights",
                "tokenizer",
                "stored_keys",
                "columns",
                "seen",
                "layers",
                "parts",
            }
            if wrong:
                raise SessionError(f"its header lacks, or has besides, {sorted(wrong)[:5]}")
            columns = self._header.count("columns")
            self._seen = [in_range(of_kind(x, int, "seen"), 0, columns, "seen") for x in self._header.get("seen", list)]
            self._layers = [in_range(of_kind(x, int, "layers"), 0, MOST, "layers") for x in self._header.get("layers", list)]
            if self._layers != sorted(set(self._layers)):
                raise SessionError(f"its layers are {self._layers}")
            self._header.get("weights", str), self._header.get("tokenizer", (str, type(None)))
            self.policy: Policy = parse(self._header.get("policy", str))

    def check(self, engine: Engine, model: PreTrainedModel, tokenizer: Any = None) -> None:
        """Refuse a model, its weights, or a tokenizer that the stream does not come from.

        Raises:
            CacheMismatchError: naming what differs. UnsupportedError: for a model that is spread over processes.
        """
        refuse_files(engine.facts, "a session file")
        header, mine = self._file.header, _shape(model, engine.facts)
        theirs, why = header["model"], None
        if mine != theirs:
            told = [str(x)[:100] for x in theirs] if isinstance(theirs, list) and len(theirs) == 3 else ["?"] * 3
            why = f"saved from {told[0]} with layers {told[2]}..., this model is {mine[0]} with {str(mine[2])[:100]}..."
        elif header["weights"] != fingerprint.weights(model):
            why = (
                f"saved from another model: this {mine[0]} has the same shape and other weights or positions (a fine-tune, another "
                "release); what it remembers would mean nothing to it, so load it on the model that wrote it"
            )
        elif tokenizer is not None and header["tokenizer"] not in (None, fingerprint.tokenizer(tokenizer)):
            why = "saved with another tokenizer, whose ids mean other text"
        elif header["stored_keys"] != engine.stored_keys:
            why = f"saved with {header['stored_keys']} keys, this model needs {engine.stored_keys} ones"
        if why is not None:
            raise CacheMismatchError(f"{self._file.path}: the stream was {why}")

    def restore(self, engine: Engine, model: PreTrainedModel) -> None:
        """Make what was saved the present of a stream that has seen nothing.

        Raises:
            SessionError: if a part of it cannot have been a stream's, or the file is changed meanwhile.
            CacheMismatchError: if it belongs to another bank or another model.
        """
        embedding = model.get_input_embeddings()
        vocabulary = getattr(embedding, "num_embeddings", None)
        with self._checked():
            parts = self._header.get("parts", dict)
            names = [part.name for part in engine.parts]
            if sorted(parts) != sorted(names):
                raise SessionError(f"it holds the parts {sorted(parts)}, this stream has {sorted(names)}")
            if self._seen:
                self._restore_tokens(engine)
            for part in engine.parts:
                tensors = _Tensors(self._file, f"{part.name}/", self._used)
                part.restore(Saved(of_kind(parts[part.name], dict, part.name), tensors, self._seen, vocabulary))
            unread = set(self._file.names) - self._used
            if unread:
                raise SessionError(f"it holds tensors that belong to nothing: {sorted(unread)[:3]}")
            if engine.columns != self._header.count("columns"):
                raise SessionError(f"it counts {self._header.count('columns')} columns and {engine.columns}")
            self._file.check_unchanged()

    def _restore_tokens(self, engine: Engine) -> None:
        held = Saved({}, _Tensors(self._file, "", self._used))
        layers = {layer.index: layer for layer in engine.facts.layers}
        memories = range(engine.planner.num_memories)
        rows, counts = [], {}
        for row, seen in enumerate(self._seen):
            found = []
            for m in memories:
                positions = held.indices(f"positions.{m}.{row}", max(seen, 1), None)
                counts[m, row] = len(positions)
                scores = held.tensor(f"scores.{m}.{row}", torch.float32, len(positions))
                found.append((positions.numpy(), scores.numpy()))
            rows.append((seen, found))
        if not set(self._layers) <= set(layers) or (any(counts.values()) and set(self._layers) != set(layers)):
            raise SessionError(f"it holds the layers {self._layers}, this model has {sorted(layers)}")
        engine.begin_at(self._header.count("columns"), rows)
        for index in self._layers:
            layer = layers[index]
            for (memory, row), count in counts.items():
                sizes = (("keys", layer.key_dim), ("values", layer.value_dim))
                k, v = (
                    held.tensor(f"{name}.{index}.{memory}.{row}", layer.dtype, layer.num_kv_heads, count, size).to(layer.device)
                    for name, size in sizes
                )
                store = engine.stores.get(index) or engine.make_store(index, k[None], v[None])
                store.write(engine.planner.runs(memory, row), k, v)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """What a part finds wrong is wrong with this file."""
        try:
            yield
        except SessionError as err:
            message = str(err)
            raise err if message.startswith(self._file.path) else self._file.error(message) from None
        except CacheMismatchError as err:
            raise (err if self._file.path in str(err) else CacheMismatchError(f"{self._file.path}: {err}")) from None
        except (UnsupportedError, BackendError, TierError, BankError):
            raise
        except (KvsieveError, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as err:
            raise self._file.error(f"{type(err).__name__}: {err}") from err


class _Tensors(Mapping[str, torch.Tensor]):
    """The tensors of one part, each read when it is asked for; which ones were is remembered."""

    def __init__(self, file: TensorFile, prefix: str, used: set[str]) -> None:
        self._file, self._prefix, self._used = file, prefix, used
        self._names = {name[len(prefix) :] for name in file.names if name.startswith(prefix)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        self._used.add(self._prefix + name)
        return self._file.tensor(self._prefix + name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[SavedStream]:
    """The stream that was saved at ``path``; all bytes of the file have been compared with its digest.

    Raises:
        SessionNotFoundError: if there is no such file.
        SessionError: if it is not a kvsieve stream, is damaged, or has another format.
    """
    with opened_file(path, KIND) as file:
        yield SavedStream(file)


def _tokens(engine: Engine) -> dict[str, torch.Tensor | Later]:
    """Positions, scores, keys and values of all residents, by memory and row. Keys and values are read when they are written."""
    planner = engine.planner
    tensors: dict[str, torch.Tensor | Later] = {}
    layers = {layer.index: layer for layer in engine.facts.layers}
    for row in range(planner.num_rows):
        for memory in range(planner.num_memories):
            tensors[f"positions.{memory}.{row}"] = torch.from_numpy(planner.positions(memory, row).copy())
            tensors[f"scores.{memory}.{row}"] = torch.from_numpy(planner.scores(memory, row).copy())
            count, runs = planner.resident(memory, row), planner.runs(memory, row)
            for index in sorted(engine.stores):
                layer, pair = layers[index], _Pair(partial(engine.stores[index].read, runs))
                for at, (name, size) in enumerate((("keys", layer.key_dim), ("values", layer.value_dim))):
                    shape = (layer.num_kv_heads, count, size)
                    tensors[f"{name}.{index}.{memory}.{row}"] = Later(layer.dtype, shape, partial(pair.take, at))
    return tensors


class _Pair:
    """Keys and values, read together when the first of the two is asked for, and held until the second one is."""

    def __init__(self, read: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._read = read
        self._values: torch.Tensor | None = None

    def take(self, at: int) -> torch.Tensor:
        if at == 0:
            keys, self._values = self._read()
            return keys
        values, self._values = self._values, None
        assert values is not None
        return values


def _shape(model: PreTrainedModel, facts: ModelFacts) -> list[Any]:
    layers = [[x.index, x.num_kv_heads, x.key_dim, x.value_dim, str(x.dtype)] for x in facts.layers]
    return [type(model).__name__, list(facts.layer_types), layers]


def _is_text(policy: Policy) -> bool:
    try:
        return repr(parse(repr(policy))) == repr(policy)
    except PolicyError:
        return False
