"""Everything there is to know about kvsieve on an NVIDIA GPU, in one command of less than eight minutes: `make gpu`.

    python benches/gpu.py --wheel dist/kvsieve-*.whl        # on the machine with the GPU; needs torch, transformers, CuPy, pytest

Parity first, then times, then compute-sanitizer where it is installed. Every section is caught and reported by itself, and the
record is rewritten after each: `benches/record/gpu-<name>-<date>.json`. Ratios are of one run. Bandwidths of attention count keys
and values once; a copy's counts what it reads and what it writes. `--dry` walks through all of it on the CPU, under the emulator of
the tests, in small sizes: nothing it prints is a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from gpu_fetching import fetching, host  # noqa: E402
from gpu_measure import Bench, Dense, caught, rope  # noqa: E402
from gpu_sparse import sparse  # noqa: E402
from gpu_systems import systems, systems_table  # noqa: E402

Section = Callable[[Bench], dict[str, Any]]

# ------------------------------------------------------------------------------------------------------------------------- sections


def about(b: Bench) -> dict[str, Any]:
    import kvsieve
    import torch
    import transformers
    from kvsieve.backends.cuda import nvrtc

    found: dict[str, Any] = {
        "kvsieve": kvsieve.__version__,
        "wheel": str(Path(kvsieve.__file__).parent),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "nvrtc": ".".join(map(str, nvrtc.version())),
        "dry": b.dry,
    }
    if not b.dry:
        import cupy

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cupy": cupy.__version__,
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
    return found


def copy_bandwidth(b: Bench) -> dict[str, Any]:
    import torch

    count = 1 << 12 if b.dry else 1 << 30
    source, to = torch.empty(count, dtype=torch.uint8, device=b.device), torch.empty(count, dtype=torch.uint8, device=b.device)
    taken = b.microseconds(lambda i: to.copy_(source), inner=4)
    return {"gb_per_s": round(2 * count / taken["us"] / 1e3, 1), "bytes_copied": count, **taken}


def parity(b: Bench) -> dict[str, Any]:
    if b.dry:
        import kernel_cases

        kernel_cases.top_k(b.device)
        return {"passed": 1, "failed": 0, "note": "dry: one case"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--maxfail=20",
    ]
    try:
        import xdist

        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if xdist else []
    except ImportError:
        pass
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(240, max(30, b.left - 60)))
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    }
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    found = {**counts, "failures": failures, "returncode": done.returncode}
    if done.returncode:
        found["error"] = done.stdout[-6000:] + done.stderr[-2000:]
    return found


def sanitizer(b: Bench) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in [Path("/usr/local/cuda/bin/compute-sanitizer")] if p.exists()), None
    )
    if tool is None or b.dry:
        return {"note": "compute-sanitizer is not installed here" if tool is None else "dry"}
    found: dict[str, Any] = {}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(75, max(20, b.left - 60)))
            found[kind] = {"returncode": done.returncode, "clean": done.returncode == 0, "end": done.stdout[-1500:]}
        except subprocess.TimeoutExpired:
            found[kind] = {"clean": None, "end": "not finished in time"}
    if any(one["clean"] is False for one in found.values()):
        found["error"] = "compute-sanitizer found something, or the small cases failed under it"
    return found


def small() -> None:
    """The small cases alone, for compute-sanitizer."""
    import kernel_cases
    import piece_cases
    import raw_cases
    import search_cases
    import telling_cases
    import torch
    from kvsieve.backends.cuda import launcher

    launcher.require()
    for case in (kernel_cases.CASES[1], kernel_cases.CASES[3], kernel_cases.CASES[-4]):
        kernel_cases.attend(case, torch.device("cuda", 0))
    for run in kernel_cases.every(torch.device("cuda", 0)).values():
        run()
    piece_cases.pieces(piece_cases.CASES[0], torch.device("cuda", 0))
    search_cases.uneven(torch.device("cuda", 0))
    for told in (telling_cases.TOLD[1], telling_cases.TOLD[-1]):
        telling_cases.told(told, torch.device("cuda", 0))
    for added in (telling_cases.ADDED[0], telling_cases.ADDED[-1]):
        telling_cases.add_values(added, torch.device("cuda", 0))
    telling_cases.page_bounds(torch.float32, 16, torch.device("cuda", 0))
    raw_cases.layer("infinite", "placed", torch.device("cuda", 0))
    raw_cases.layer("hip", "consecutive", torch.device("cuda", 0))
    telling_cases.quest_layer(3, torch.float32, 16, torch.device("cuda", 0))
    stages = {"stages": ((4, 640), (2, 300)), "refresh": (1, 1)}
    for rule in (search_cases.hip(budget=150, block=1), search_cases.infinite(**stages)):
        search_cases.one_query(rule, 2600, torch.device("cuda", 0))
    torch.cuda.synchronize()
    print("small cases passed")


def attention(b: Bench) -> dict[str, Any]:
    """Dense decode attention of one layer, a query of each head over everything, against torch's and a copy of the same bytes."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    flex = flex_attention if b.dry else torch.compile(flex_attention, dynamic=False)
    rows: dict[str, Any] = {}
    for length in b.lengths:
        row = rows[str(length)] = {}
        with caught(row, "kvsieve rotated"):
            attention_rotated(b, length, flex, row)
        with caught(row, "kvsieve raw"):
            attention_raw(b, length, row)
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def attention_rotated(b: Bench, length: int, flex: Any, row: dict[str, Any]) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    held = Dense(b, length, raw=False)
    row["bytes"], row["layers_rotated_through"] = held.bytes, len(held.stores)
    dense = [[x[None] for x in store.read(held.runs)] for store in held.stores]
    want = sdpa(held.q, *dense[-1], enable_gqa=True).transpose(1, 2).float()
    row["error_against_sdpa"] = error = float((held.out.float() - want).norm() / want.norm())
    assert error < 1e-2, f"attention over {length} tokens is {error:.3f} off"
    to = [torch.empty_like(x) for x in dense[0]]
    runs: dict[str, tuple[Callable[[int], Any], int]] = {
        "kvsieve rotated": (held.attend, 1),
        "sdpa": (lambda i: sdpa(held.q, *dense[i % len(dense)], enable_gqa=True), 1),
        "flex": (lambda i: flex(held.q, *dense[i % len(dense)], enable_gqa=True), 1),
        "copy": (lambda i: [t.copy_(x) for t, x in zip(to, dense[i % len(dense)])], 2),
    }
    for name, (run, times) in runs.items():
        with caught(row, name):
            taken = b.microseconds(run)
            row[name] = {**taken, "gb_per_s": round(times * held.bytes / taken["us"] / 1e3, 1)}


def attention_raw(b: Bench, length: int, row: dict[str, Any]) -> None:
    held = Dense(b, length, raw=True)
    if length <= 32 << 10:
        row["raw_error"] = error = raw_error(b, held)
        assert error < 2e-2, f"raw keys over {length} tokens are {error:.3f} off"
    taken = b.microseconds(held.attend)
    row["kvsieve raw"] = {**taken, "gb_per_s": round(held.bytes / taken["us"] / 1e3, 1)}
    row["raw_over_rotated"] = round(taken["us"] / row["kvsieve rotated"]["us"], 3)


def raw_error(b: Bench, held: Dense) -> float:
    """Against rotating all keys first: in a memory that lost nothing, slots are positions."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    k, v = (x.float() for x in held.stores[-1].read(held.runs))
    turn, at = rope(b.dim), torch.arange(k.shape[1], device=b.device)
    k, q = turn.rotate(k, at), turn.rotate(held.q[0].float(), at[-1:])
    want = sdpa(q[None], k[None], v[None], enable_gqa=True).transpose(1, 2)
    return float((held.out.float() - want).norm() / want.norm())


def packed(b: Bench) -> dict[str, Any]:
    """Decode attention of one layer over packed tokens, against the same tokens as they came."""
    import torch
    from kvsieve.methods.think import num_kept_channels
    from kvsieve.policy.storage import Packing

    length = 300 if b.dry else 64 << 10
    group = 16 if b.dry else 32
    whole = b.dim
    formats: dict[str, tuple[Packing, bool]] = {
        "plain": (Packing(whole), False),
        "thin 0.5": (Packing(num_kept_channels(whole, 0.5, "pairs")), False),
        "thin 0.4": (Packing(num_kept_channels(whole, 0.4, "pairs")), False),
        "8 bits": (Packing(whole, 8, 8, group), False),
        "4 bits": (Packing(whole, 4, 4, group), False),
        "2 bits": (Packing(whole, 2, 2, group), False),
        "thin 0.5, 4 bits": (Packing(num_kept_channels(whole, 0.5, "pairs"), 4, 4, group), False),
        "plain, raw": (Packing(whole), True),
        "thin 0.5, raw": (Packing(num_kept_channels(whole, 0.5, "pairs")), True),
        "4 bits, raw": (Packing(whole, 4, 4, group), True),
    }
    rows: dict[str, Any] = {"length": length, "of": b.dim}
    for name, (packing, raw) in formats.items():
        with caught(rows, name):
            held = Dense(b, length, raw)
            if not name.startswith("plain"):
                pack_all(b, held, packing)
            rows[name] = packed_row(b, held, raw)
            base = rows.get("plain, raw" if raw else "plain", {}).get("us")
            if base:
                rows[name]["times_as_fast_as_plain"] = round(base / rows[name]["us"], 3)
        if not b.dry:
            torch.cuda.empty_cache()
    return rows


def pack_all(b: Bench, held: Dense, packing: Any) -> None:
    """Pack all but the newest 64 tokens, and plan the next one."""
    import torch
    from kvsieve.methods import think

    queries = torch.randn(b.heads, 32, b.dim)
    keys = held.stores[0].read(held.runs[:2])[0].cpu()
    channels = think.heaviest_channels(queries, keys, packing.key_kept, "pairs", rope(b.dim))
    moves = held.planner.pack(0, (held.length - 64) // 64 * 64, 64)
    in_use, packed_in_use = held.planner.blocks_in_use(), held.planner.packed_in_use()
    for store in held.stores:
        store.set_packing(packing)
        store.pack(moves, channels)
        store.free_unused(in_use, packed_in_use)
    held.step = held.planner.begin([1], 1, True, False)
    for store in held.stores:
        held.out = store.run(held.q, held.k, held.v, held.step, held.call)
    held.planner.commit()
    held.runs = held.planner.runs(0, 0)


def packed_row(b: Bench, held: Dense, raw: bool) -> dict[str, Any]:
    """Error against attention over what is stored, read back at full width; then the time."""
    store = held.stores[-1]
    k, v = (x.float() for x in store.read(held.runs))
    q = held.q[0].float()
    if raw:
        import torch

        turn, at = rope(b.dim), torch.arange(k.shape[1], device=b.device)
        k, q = turn.rotate(k, at), turn.rotate(q, at[-1:])
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    want = sdpa(q[None], k[None], v[None], enable_gqa=True).transpose(1, 2)
    error = float((held.out.float() - want).norm() / want.norm())
    assert error < 2e-2, f"{error:.3f} off"
    taken = b.microseconds(held.attend)
    size = store.bytes_held
    return {**taken, "bytes": size, "gb_per_s": round(size / taken["us"] / 1e3, 1), "relative_error": error}


def operations(b: Bench) -> dict[str, Any]:
    """The other kernels, once each in a size that decoding with a budget of 4,096 meets."""
    import torch
    from kvsieve.backends.cuda.buffers import DeviceRuns
    from kvsieve.backends.runs import columns
    from kvsieve.policy.storage import Packing
    from operations import ops

    held = Dense(b, b.budget, raw=True)
    store, frequencies = held.stores[0], rope(b.dim).inv_freq.to(b.device)
    buffer, table = held.backend.context.plan(held.step, b.device).buffer, store.table
    moves = torch.tensor([[i, i, 1, 63] for i in range(b.budget // 64)], dtype=torch.int32, device=b.device)
    runs = torch.tensor([[i, 0, 64, 64 * i] for i in range(b.budget // 64)], dtype=torch.int32, device=b.device)
    k, _ = ops.gather(table, runs, b.budget, b.kv_heads, b.dim, b.dim, b.dtype)
    at, turned = torch.arange(b.budget, device=b.device), torch.empty(b.budget, b.dim, device=b.device)
    logits = torch.randn(1, 500 if b.dry else 128256, device=b.device).to(b.dtype)
    mine = Dense(b, b.budget, raw=False)
    pack_all(b, mine, Packing(b.dim, 4, 4, 16 if b.dry else 32))
    codes, half = mine.stores[0], b.budget // 128
    again = torch.tensor([[i, i, 0, 64] for i in range(half)], dtype=torch.int32, device=b.device)
    each, read_runs = torch.arange(half + 1, dtype=torch.int32, device=b.device), DeviceRuns(columns(mine.runs), b.device)
    packing = codes._packed.format
    scores = torch.randn(b.heads, 1000 if b.dry else 131072, device=b.device)
    token = torch.tensor([7], device=b.device)
    part = torch.randn(1, b.heads, 49, b.dim, device=b.device)
    sizes = (b.kv_heads, b.dim, b.dim, b.dtype)
    runs_of: dict[str, Callable[[int], Any]] = {
        "append, 1 token": lambda i: ops.append(held.k, held.v, table, buffer.appends, buffer.counts, 1),
        f"attend, {b.budget} raw keys": held.attend,
        "merge, 49 parts": lambda i: ops.merge(part, part[..., 0].contiguous(), None, b.dtype),
        f"move, {len(moves)} of 63 tokens": lambda i: ops.move(table, moves, *sizes),
        f"pack to 4 bits, {64 * half} tokens": lambda i: ops.pack(
            table, codes._packed.table.tensor, again, each, *sizes, packing, False
        ),
        f"read back from 4 bits, {b.budget} tokens": lambda i: codes._read(read_runs),
        f"gather, {b.budget} tokens": lambda i: ops.gather(table, runs, b.budget, *sizes),
        f"rotate, {b.budget} tokens": lambda i: ops.rotate(k, at, frequencies, 1),
        f"rotations, {b.budget} positions": lambda i: ops.rotations(at, None, frequencies, turned),
        f"surprisal, 1 x {logits.shape[1]}": lambda i: ops.surprisal(logits, token),
        f"top_k, 256 of {b.heads} x {scores.shape[1]}": lambda i: ops.top_k(scores, 256),
        f"torch.topk, 256 of {b.heads} x {scores.shape[1]}": lambda i: torch.topk(scores, 256),
    }
    rows: dict[str, Any] = {}
    for name, run in runs_of.items():
        with caught(rows, name):
            rows[name] = b.microseconds(run)
    return rows


def launches(b: Bench) -> dict[str, Any]:
    """What launching costs: one layer's step (append, attend, merge) over 64 tokens, where the GPU has nothing else to do."""
    held = Dense(b, 64, raw=False)
    store = held.stores[0]

    def run(i: int = 0) -> Any:
        return store.run(held.q, held.k, held.v, held.step, held.call)

    eager = b.wall(run, 400)
    graph = b.microseconds(run, inner=32)
    return {"eager_us_per_layer": round(eager, 2), "graph_us_per_layer": round(graph["us"], 2)}


def whole_token(b: Bench) -> dict[str, Any]:
    """A token of a Llama-8B shape with random weights: transformers' full cache, ours, and bounded memories from 8k to 1M seen."""
    import kvsieve
    import torch
    from kvsieve.graphs import GraphDecoder
    from transformers import DynamicCache

    model = llama(b)
    rows: dict[str, Any] = {"weights_gib": round(sum(p.nbytes for p in model.parameters()) / 2**30, 2)}
    token = torch.full((1, 1), 7, device=b.device)
    tokens = 1 if b.dry else 16

    def decode(cache: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return model(input_ids=token, past_key_values=cache, use_cache=True).logits

        return run

    for length in b.lengths[:1] if b.dry else [8 << 10, 128 << 10]:
        with caught(rows, f"transformers {length}"):
            cache = DynamicCache(config=model.config)
            for index in range(model.config.num_hidden_layers):
                cache.update(*past(b, length, index), index)
            rows[f"transformers {length}"] = {"us": round(b.wall(decode(cache), tokens), 1)}
            del cache
    budget = b.budget
    made: dict[str, Any] = {
        "Full": kvsieve.Full(),
        "StreamingLLM": kvsieve.StreamingLLM(budget),
        "LMInfinite": kvsieve.LMInfinite(budget - 4, sinks=4),
        "SirLLM": kvsieve.SirLLM(budget),
        "ThinK": kvsieve.ThinK(0.5),
        "Quantized": kvsieve.Quantized(4, group=16 if b.dry else 32),
    }
    for name, policy in made.items():
        bounded = name in ("StreamingLLM", "LMInfinite", "SirLLM")
        for seen in b.lengths if bounded else b.lengths[:1] if b.dry else [8 << 10, 128 << 10]:
            if b.left < 30:
                rows[f"{name} {seen}"] = {"error": "no time left"}
                continue
            with caught(rows, f"{name} {seen}"), kvsieve.stream(model, policy, "cuda") as stream:
                before = 0 if b.dry else torch.cuda.memory_allocated()
                count = min(seen, budget) if bounded else seen
                fill(b, stream, [*range(4), *range(seen - count + 4, seen)], seen)
                if stream.policy.compression is not None:
                    pack_filled(b, stream)
                row = rows[f"{name} {seen}"] = {"resident": stream.stats().resident, "bytes_reported": stream.stats().bytes_held}
                if not b.dry:
                    row["bytes_allocated"] = torch.cuda.memory_allocated() - before
                row["eager_us"] = round(b.wall(decode(stream.cache), tokens), 1)
                decoder = GraphDecoder(stream)
                row["graph_us"] = round(b.wall(lambda d=decoder: d.step(token), 2 * tokens), 1)
                decoder.finish()
                row["captures"] = decoder.captures
                del decoder
    rows["summary"] = summary(rows, b)
    return rows


def summary(rows: dict[str, Any], b: Bench) -> dict[str, Any]:
    """The ratios that are asked for."""
    found: dict[str, Any] = {}
    first, last, long = b.lengths[0], b.lengths[-1], b.lengths[0] if b.dry else 128 << 10
    stock = rows.get(f"transformers {long}", {}).get("us")
    for name in ("Full", "StreamingLLM", "LMInfinite", "SirLLM", "ThinK", "Quantized"):
        times = {seen: rows.get(f"{name} {seen}", {}).get("graph_us") for seen in (first, last, long)}
        if times[first] and times[last]:
            found[f"{name}: time at {last} seen over {first}, graph"] = round(times[last] / times[first], 3)
        if stock and times[long]:
            found[f"{name}: times as fast as transformers' full cache at {long}, graph"] = round(stock / times[long], 2)
    return found


def llama(b: Bench) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    if b.dry:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(
        **shape,
        num_attention_heads=b.heads,
        num_key_value_heads=b.kv_heads,
        head_dim=b.dim,
        max_position_embeddings=2 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    with b.device:
        model = LlamaForCausalLM._from_config(config, dtype=b.dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


def past(b: Bench, length: int, seed: int) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator(b.device).manual_seed(seed)
    shape = (1, b.kv_heads, length, b.dim)
    return tuple(torch.randn(shape, generator=generator, device=b.device, dtype=b.dtype) for _ in "kv")  # type: ignore[return-value]


def fill(b: Bench, stream: Any, positions: list[int], seen: int) -> None:
    """Put tokens into a stream as if it had seen ``seen``."""
    engine = stream._engine
    engine.begin_at(seen, [(seen, [(positions, [float(p % 97) for p in positions])])])
    for layer in engine.facts.layers:
        k, v = past(b, len(positions), layer.index)
        store = engine.make_store(layer.index, k, v)
        store.write(engine.planner.runs(0, 0), k[0], v[0])


def pack_filled(b: Bench, stream: Any) -> None:
    """Pack what a filled stream holds, by random queries."""
    import torch
    from kvsieve.runtime.compression import Compression
    from kvsieve.runtime.part import Forward

    engine = stream._engine
    compression = engine.parts.the(Compression)
    width = max(compression.rule.observe, 2)
    for layer in engine.facts.layers:
        compression.observe(layer.index, torch.randn(1, b.heads, width, b.dim, device=b.device).to(b.dtype), [width])
    compression.commit(Forward([width], width, [0]))()
    compression.compress(prompt_ended=True)
    engine.blocks.free_unused()


# -------------------------------------------------------------------------------------------------------------- running and telling


SECTIONS: list[tuple[str, Section]] = [
    ("about", about),
    ("copy", copy_bandwidth),
    ("parity", parity),
    ("attention", attention),
    ("packed", packed),
    ("sparse", sparse),
    ("fetching", fetching),
    ("host", host),
    ("systems", systems),
    ("launches", launches),
    ("operations", operations),
    ("whole_token", whole_token),
    ("sanitizer", sanitizer),
]


def run_sections(b: Bench, to: Path, only: list[str]) -> dict[str, Any]:
    """Every section in turn; the record is on disk after each."""
    record: dict[str, Any] = {}
    for name, section in SECTIONS:
        if only and name not in only and name != "about":
            continue
        begin = time.monotonic()
        print(f"-- {name}", flush=True)
        if b.left < 15 and name != "about":
            record[name] = {"error": "no time left"}
        else:
            try:
                record[name] = section(b)
            except Exception:
                record[name] = {"error": traceback.format_exc()[-6000:]}
        record[name]["seconds"] = round(time.monotonic() - begin, 1)
        gpu = re.sub(r"[^a-z0-9]+", "-", str(record.get("about", {}).get("gpu", "dry" if b.dry else "unknown")).lower()).strip("-")
        path = to / f"gpu-{gpu}-{datetime.date.today().isoformat()}.json"
        to.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record), f"\n{path}", sep="\n")
    return record


def errors(record: Any, at: str = "") -> list[str]:
    """Where in the record something failed."""
    if not isinstance(record, dict):
        return []
    found = [f"{at}: {str(record['error']).strip().splitlines()[-1]}"] if record.get("error") else []
    return found + [line for key, value in record.items() for line in errors(value, f"{at}/{key}")]


def table(record: dict[str, Any]) -> str:
    """The record as tables."""
    dry = ["", "A REHEARSAL ON THE CPU: no number below is a measurement."] if record.get("about", {}).get("dry") else []
    lines = [*dry, "", json.dumps(record.get("about", {})), f"copy {record.get('copy', {}).get('gb_per_s')} GB/s", ""]
    lines += ["| attention over | kvsieve | raw | sdpa | flex | copy |", "|---|---|---|---|---|---|"]
    for length, row in record.get("attention", {}).items():
        if isinstance(row, dict):
            cells = (row.get(name, {}) for name in ("kvsieve rotated", "kvsieve raw", "sdpa", "flex", "copy"))
            texts = (f"{c['us']:.1f} us, {c['gb_per_s']} GB/s" if "us" in c else "failed" for c in cells)
            lines.append(f"| {length} | {' | '.join(texts)} |")
    lines += ["", "| packed | us | bytes | times as fast as plain |", "|---|---|---|---|"]
    for name, row in record.get("packed", {}).items():
        if isinstance(row, dict):
            lines.append(
                f"| {name} | {' | '.join(str(row.get(key, 'failed')) for key in ('us', 'bytes', 'times_as_fast_as_plain'))} |"
            )
    lines += [
        "",
        "| sparse over | dense us | search | choice stands us | by its schedule us | at every step us | chunk, times as fast |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for length, row in record.get("sparse", {}).items():
        for name in ("HiP", "InfiniteHiP") if isinstance(row, dict) else ():
            mine, dense = row.get(name, {}), row.get("dense", {}).get("us", "failed")
            cells = (mine.get("choice stands", {}).get("us", "failed"), mine.get("scheduled"), mine.get("every_step"))
            fast = row.get("chunk", {}).get(f"{name}_times_as_fast")
            lines.append(f"| {length} | {dense} | {name} | {' | '.join(map(str, cells))} | {fast} |")
    lines += systems_table(record)
    lines += ["", "| operation | us |", "|---|---|"]
    lines += [
        f"| {name} | {row['us']:.1f} |"
        for name, row in record.get("operations", {}).items()
        if isinstance(row, dict) and "us" in row
    ]
    lines += [
        "",
        f"launches: {json.dumps(record.get('launches', {}))}",
        "",
        "| whole token | us | eager us | graph us | bytes |",
        "|---|---|---|---|---|",
    ]
    for name, row in record.get("whole_token", {}).items():
        if isinstance(row, dict) and name != "summary":
            cells = (str(row.get(key, "")) for key in ("us", "eager_us", "graph_us", "bytes_reported"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", json.dumps(record.get("whole_token", {}).get("summary", {}), indent=1), ""]
    parity_row = {k: v for k, v in record.get("parity", {}).items() if k != "error"}
    lines += [f"parity: {json.dumps(parity_row)}", *(f"FAILED {line}" for line in errors(record))]
    return "\n".join(lines)


def from_wheel(wheel: str, arguments: list[str]) -> int:
    """Run again with the wheel's kvsieve in front of any other."""
    with tempfile.TemporaryDirectory() as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
        subprocess.run(pip, check=True)
        path = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run([sys.executable, __file__, *arguments], env={**os.environ, "PYTHONPATH": path}).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", help="the built wheel to measure; default: the kvsieve that is installed")
    parser.add_argument("--seconds", type=float, default=450, help="stop starting things after so many (default: 450)")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "record", help="where the record goes")
    parser.add_argument("--only", nargs="*", default=[], choices=[name for name, _ in SECTIONS], help="these sections only")
    parser.add_argument("--dry", action="store_true", help="on the CPU, under the emulator, in small sizes: a rehearsal")
    parser.add_argument("--small", action="store_true", help="the small cases only, for compute-sanitizer")
    chosen = parser.parse_args(arguments)
    if chosen.wheel:
        given = list(sys.argv[1:] if arguments is None else arguments)
        at = given.index("--wheel")
        return from_wheel(chosen.wheel, given[:at] + given[at + 2 :])
    if not chosen.dry:
        import torch

        if not torch.cuda.is_available():
            print(
                "benches/gpu.py needs an NVIDIA GPU that torch can use; none here, nothing ran (--dry rehearses)", file=sys.stderr
            )
            return 1
    if chosen.small:
        small()
        return 0
    with rehearsing() if chosen.dry else nullcontext():
        record = run_sections(Bench(chosen.dry, chosen.seconds), chosen.out, chosen.only)
    return 1 if errors(record) else 0


@contextmanager
def rehearsing() -> Iterator[None]:
    """The emulator in the place of a GPU, and replays that run again what they would have captured."""
    import emulator

    with emulator.emulated(emulator.Emulator(processors=4)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


if __name__ == "__main__":
    sys.exit(main())
