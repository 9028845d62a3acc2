"""A recording of a stream on disk: one JSON document, whose long columns of numbers are packed.

    format      "kvsieve recording"
    version     1
    policy, model, backend, date    text, for the reader
    tokens      of each position its text; empty where a character ends in a later token
    steps       columns, one number a step: seen (tokens), held (of a head), bytes, full (bytes of a full cache), seconds
    holds       what heads hold: one entry for all heads of all layers, or one a layer where each head holds tokens of its own
        layer       its index in the model; null for all
        heads       H, 1 where all heads are alike
        left        int32 [H, tokens]: the step after which a token was not held any more, -1 where it was held until the end
        again       int32 [n, 4]: head, position, step, and 1 or 0: tokens that came back, or left again
        scores      null, or columns head, step, position, score: from that step on the token had that score
    scores_at   "step", or "end" where only the scores at the end of the recording are known
    reads       null, or what a policy that selects read
        first, newest   tokens that every query reads beside what it selects; null where that is not known
        of          a list of: layer, head (null for all heads of the layer), and columns step, count, ranges: from that step on
                    ``count`` ranges lo..hi of positions were selected; count -1 says that all was read. A range is two
                    numbers, lo - hi of the range before (0 for the first one) and hi - lo

A packed column is the base64 of the zlib-compressed little-endian numbers; :func:`unpack` reads it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvsieve.errors import RecordingError
from kvsieve.files.replace import replacing

__all__ = ["COLUMNS", "FORMAT", "VERSION", "check", "pack", "read", "unpack", "write"]

FORMAT, VERSION = "kvsieve recording", 1

COLUMNS = {"seen": "<i4", "held": "<i4", "bytes": "<f8", "full": "<f8", "seconds": "<f4"}
"""Of the steps, and how their numbers are stored."""

_LANE = {"left": "<i4", "again": "<i4"}
_SCORES = {"head": "<i4", "step": "<i4", "position": "<i4", "score": "<f4"}
_READS = {"step": "<i4", "count": "<i4", "ranges": "<i4"}
_MOST_TOKENS, _MOST_HEADS = 1 << 27, 1 << 20

Numbers = npt.NDArray[Any]


def pack(values: npt.ArrayLike, dtype: str) -> str:
    """``values`` as text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, dtype).tobytes(), 6)).decode("ascii")


def unpack(text: str, dtype: str, most: int) -> Numbers:
    """The numbers of a packed column.

    Args:
        most: numbers that it may have; more are refused before they are unpacked.

    Raises:
        RecordingError: if it is no such column.
    """
    size = np.dtype(dtype).itemsize
    if not isinstance(text, str):
        raise RecordingError("a column of numbers is missing")
    try:
        raw = base64.b64decode(text, validate=True)
        inflating = zlib.decompressobj()
        data = inflating.decompress(raw, most * size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise RecordingError(f"a column of numbers cannot be unpacked: {error}") from error
    if not inflating.eof or inflating.unused_data or len(data) > most * size or len(data) % size:
        raise RecordingError("a column of numbers is cut, or longer than the recording")
    return np.frombuffer(data, dtype)


def write(path: str | os.PathLike[str], recording: Mapping[str, Any]) -> None:
    """Write a recording to ``path``; a file that is there is replaced once the new one is complete.

    Raises:
        SaveError: if it cannot be written.
    """
    document = {"format": FORMAT, "version": VERSION, **recording}
    with replacing(path, "recording") as file:
        file.write(json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii"))
        file.write(b"\n")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recording at ``path``, checked.

    Raises:
        RecordingError: if it is none, is damaged, has another version, or no step.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        raise RecordingError(f"{path} is no recording of a stream: it is not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RecordingError(f"{path} is no recording of a stream; stream.record(FILE, tokenizer) writes one")
    if found.get("version") != VERSION:
        raise RecordingError(
            f"{path} is a recording of version {found.get('version')!r:.40}, this kvsieve reads version {VERSION}; record it again"
        )
    try:
        check(found)
    except RecordingError as error:
        raise RecordingError(f"{path} is a damaged recording: {error}") from error
    if not found["tokens"] or not len(unpack(found["steps"]["seen"], COLUMNS["seen"], _MOST_TOKENS)):
        raise RecordingError(f"{path} holds no step: the stream read nothing while it was recorded")
    return found


def check(found: Mapping[str, Any]) -> None:
    """See that a recording is as the page counts on it to be.

    Raises:
        RecordingError: naming what is wrong.
    """
    for name, kind in (("policy", str), ("model", str), ("backend", str), ("date", str), ("tokens", list), ("steps", dict)):
        if not isinstance(found.get(name), kind):
            raise RecordingError(f"its {name!r} is missing")
    tokens = found["tokens"]
    if not all(isinstance(token, str) for token in tokens):
        raise RecordingError("its 'tokens' are not all text")
    columns = {name: unpack(found["steps"].get(name), dtype, _MOST_TOKENS) for name, dtype in COLUMNS.items()}
    steps, seen = len(columns["seen"]), columns["seen"]
    if any(len(column) != steps for column in columns.values()):
        raise RecordingError("its steps have columns of different lengths")
    if steps and (int(seen[0]) < 0 or bool((np.diff(seen) < 0).any()) or int(seen[-1]) != len(tokens)):
        raise RecordingError(f"its steps do not lead to its {len(tokens)} tokens")
    holds = _list(found.get("holds"), "holds")
    if not holds:
        raise RecordingError("its 'holds' is empty")
    for held in holds:
        _check_held(held, len(tokens), steps)
    if found.get("scores_at") not in ("step", "end"):
        raise RecordingError("its 'scores_at' is missing")
    reads = found.get("reads")
    if reads is not None:
        if not isinstance(reads, dict) or not all(_is_count(reads.get(name), none=True) for name in ("first", "newest")):
            raise RecordingError("its 'reads' cannot be read")
        for lane in _list(reads.get("of"), "reads"):
            _check_lane(lane)
            _check_reads(lane, len(tokens), steps)


def _check_held(held: dict[str, Any], tokens: int, steps: int) -> None:
    heads: Any = held.get("heads")
    if not _is_count(held.get("layer"), none=True) or not _is_count(heads) or not 1 <= heads <= _MOST_HEADS:
        raise RecordingError("its 'holds' name a layer or heads that are none")
    if len(left := unpack(held.get("left", ""), _LANE["left"], heads * tokens)) != heads * tokens:
        raise RecordingError("its 'left' does not have a number for each token and head")
    again = unpack(held.get("again", ""), _LANE["again"], _MOST_TOKENS)
    _within(left, -1, steps, "left")
    if len(again) % 4:
        raise RecordingError("its 'again' is cut")
    for column, most in zip(again.reshape(-1, 4).T, (heads, tokens, steps, 2)):
        _within(column, 0, most, "again")
    scores = held.get("scores")
    if scores is None:
        return
    if not isinstance(scores, dict):
        raise RecordingError("its 'scores' cannot be read")
    columns = {name: unpack(scores.get(name, ""), dtype, _MOST_TOKENS) for name, dtype in _SCORES.items()}
    if len({len(column) for column in columns.values()}) != 1:
        raise RecordingError("its 'scores' have columns of different lengths")
    for name, most in (("head", heads), ("step", steps), ("position", tokens)):
        _within(columns[name], 0, most, "scores")


def _check_lane(lane: dict[str, Any]) -> None:
    if not _is_count(lane.get("layer")) or not _is_count(lane.get("head"), none=True):
        raise RecordingError("its 'reads' name a layer or a head that is none")


def _check_reads(lane: dict[str, Any], tokens: int, steps: int) -> None:
    columns = {name: unpack(lane.get(name, ""), dtype, _MOST_TOKENS) for name, dtype in _READS.items()}
    step, count, ranges = columns["step"], columns["count"], columns["ranges"]
    if len(step) != len(count) or 2 * int(np.maximum(count, 0).sum(dtype=np.int64)) != len(ranges):
        raise RecordingError("its 'reads' have columns of different lengths")
    _within(step, 0, steps, "reads")
    _within(count, -1, tokens + 1, "reads")
    _within(ranges, 0, _MOST_TOKENS, "reads")
    _within(ranges[1::2], 1, _MOST_TOKENS, "reads")
    if bool((np.diff(step) <= 0).any()):
        raise RecordingError("its 'reads' are not in the order of the steps")


def _within(values: Numbers, least: int, most: int, what: str) -> None:
    if len(values) and not (int(values.min()) >= least and int(values.max()) < most):
        raise RecordingError(f"its {what!r} has numbers that do not fit")


def _list(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise RecordingError(f"its {what!r} is missing")
    return value


def _is_count(value: object, none: bool = False) -> bool:
    return (value is None and none) or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31)
