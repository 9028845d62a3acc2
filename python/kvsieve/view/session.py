"""A session file as a recording of one step: the moment at which the stream was saved."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvsieve.errors import CacheMismatchError, KvsieveError, RecordingError
from kvsieve.files.recording_file import COLUMNS, check, pack
from kvsieve.files.tensor_file import TensorFile, opened
from kvsieve.model import fingerprint
from kvsieve.recording import pieces
from kvsieve.session import KIND

__all__ = ["recording_of"]


def recording_of(path: Path, model: str | None) -> dict[str, Any]:
    """What the first row of a saved stream held, as :func:`kvsieve.files.recording_file.read` returns a recording.

    Args:
        path: a file that `stream.save` wrote.
        model: whose tokenizer turns its ids into text, as of `--model`; None shows their numbers.

    Raises:
        SessionError: if the file is damaged, is no session file, or has another format.
        RecordingError: if the stream had read nothing.
        CacheMismatchError: if it was saved with another tokenizer.
    """
    with opened(path, KIND) as file:
        if not file.header.get("seen"):
            raise RecordingError(f"{path} holds no token: the stream was saved before it read any")
        try:
            found = _moment(file, path, model)
            check(found)
        except RecordingError as error:
            raise file.error(str(error)) from error
        except (KvsieveError, OSError):
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise file.error(f"{type(error).__name__}: {error}") from error
    return found


def _moment(file: TensorFile, path: Path, model: str | None) -> dict[str, Any]:
    header = file.header
    ids: list[int] = file.tensor("transcript/ids.0").tolist()
    if len(ids) != header["seen"][0]:
        raise file.error(f"it has seen {header['seen'][0]} tokens and knows {len(ids)}")
    holds = _per_head(file, len(ids)) or [_shared(file, len(ids))]
    sizes = [file.num_bytes(name) for name in file.names if not name.startswith(("transcript/", "positions.", "scores."))]
    full = sum(header["seen"]) * sum(
        heads * (keys + values) * _SIZES.get(dtype, 2) for _, heads, keys, values, dtype in header["model"][2]
    )
    held = max(int(one["mask"].sum(1).max(initial=0)) for one in holds)
    numbers: dict[str, float] = {"seen": len(ids), "held": held, "bytes": sum(sizes), "full": full, "seconds": float("nan")}
    saved = datetime.fromtimestamp(os.stat(path).st_mtime, timezone.utc)
    return {
        "policy": header["policy"],
        "model": header["model"][0],
        "backend": "none (a session file)",
        "date": saved.strftime("%Y-%m-%d %H:%M UTC"),
        "tokens": _text(ids, model, header["tokenizer"], path),
        "steps": {name: pack([numbers[name]], dtype) for name, dtype in COLUMNS.items()},
        "holds": [_packed(one) for one in holds],
        "scores_at": "step",
        "reads": None,
    }


_SIZES = {"torch.float64": 8, "torch.float32": 4}
"""Bytes of a number; 2 of all others."""


def _text(ids: list[int], model: str | None, saved_with: str | None, path: Path) -> list[str]:
    if model is None:
        return [f"{token} " for token in ids]
    from kvsieve.evals.models import load_model

    _, tokenizer = load_model(model)
    if saved_with not in (None, fingerprint.tokenizer(tokenizer)):
        raise CacheMismatchError(f"{path} was saved with another tokenizer than that of {model}, whose ids mean other text")
    return pieces(tokenizer, ids)


def _shared(file: TensorFile, seen: int) -> dict[str, Any]:
    names = sorted(name for name in file.names if name.startswith("positions.") and name.endswith(".0"))
    positions = [_positions(file, name, seen) for name in names]
    scores = [file.tensor(name.replace("positions.", "scores.")).numpy() for name in names]
    mask = np.zeros((1, seen), bool)
    mask[0, np.concatenate(positions)] = True
    return {"layer": None, "mask": mask, "positions": np.concatenate(positions), "scores": np.concatenate(scores)}


def _per_head(file: TensorFile, seen: int) -> list[dict[str, Any]]:
    """One entry a layer, where each head chose for itself; else none."""
    found = []
    start = "head_eviction/chosen."
    for name in file.names:
        layer, _, row = name.removeprefix(start).partition(".")
        if name.startswith(start) and row == "0" and layer.isdigit():
            since = file.header["parts"]["head_eviction"]["rows"][0][0]
            chosen = _positions(file, name, seen)
            mask = np.zeros((len(chosen), seen), bool)
            np.put_along_axis(mask, chosen, True, 1)
            mask[:, since:] = True
            found.append({"layer": int(layer), "mask": mask, "positions": None})
    return sorted(found, key=lambda one: int(one["layer"]))


def _positions(file: TensorFile, name: str, seen: int) -> npt.NDArray[np.int64]:
    found = file.tensor(name).numpy()
    if found.size and not (found.min() >= 0 and found.max() < seen):
        raise file.error(f"its {name!r} has positions that are none of its {seen} tokens")
    return np.asarray(found, np.int64)


def _packed(one: dict[str, Any]) -> dict[str, Any]:
    """What is not held left before, at the only step there is."""
    mask, scores = one["mask"], None
    if one["positions"] is not None and np.isfinite(one["scores"]).any():
        there = np.isfinite(one["scores"])
        none = np.zeros(int(there.sum()))
        at, values = one["positions"][there], one["scores"][there]
        scores = {"head": pack(none, "<i4"), "step": pack(none, "<i4"), "position": pack(at, "<i4"), "score": pack(values, "<f4")}
    left = pack(np.where(mask, -1, 0), "<i4")
    return {"layer": one["layer"], "heads": len(mask), "left": left, "again": pack([], "<i4"), "scores": scores}
