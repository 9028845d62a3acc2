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
from gpu_layer import attention, operations, packed  # noqa: E402
from gpu_measure import Bench  # noqa: E402
from gpu_sparse import sparse  # noqa: E402
from gpu_systems import systems, systems_table  # noqa: E402
from gpu_token import launches, whole_token  # noqa: E402

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
