"""kill -9 at random moments of a process that saves without end.

    python tests/faults/save_kill.py --kills 200

A child writes one file over and over again and is killed. The file must then be a whole one, no older than the last that was seen
whole. What a kill leaves beside it is a `.partial`, which nobody reads; at least one must, or no kill came in the midst of a save.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kvsieve.files import tensor_file

KIND = tensor_file.Kind("test", "test file", 3)
TENSORS, SIZE, LONGEST = 16, 4096, 0.03


def write(path: Path, number: int) -> None:
    tensors: dict[str, Any] = {str(at): torch.full((SIZE,), float(number)) for at in range(TENSORS)}
    tensor_file.write(path, KIND, {"number": number}, tensors)


def run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """What was found: saves that were seen whole, and what was wrong. On a busy machine there are more kills, until half as many
    saves as were asked for were seen."""
    path, lot, newest, wrong = folder / "file", random.Random(seed), 0, []
    write(path, 0)
    kill = 0
    while kill < kills or newest <= kills // 2:
        kill += 1
        child = os.fork()
        if not child:
            try:
                for number in range(newest + 1, 10**9):
                    write(path, number)
            finally:
                os._exit(1)
        time.sleep(lot.random() * LONGEST)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            wrong.append(f"kill {kill}: the child ended by itself")
            break
        with tensor_file.opened(path, KIND) as file:
            number = file.header["number"]
            whole = len(file.names) == TENSORS and all(
                torch.equal(file.tensor(name), torch.full((SIZE,), float(number))) for name in file.names
            )
            if number < newest or not whole:
                wrong.append(f"kill {kill}: the file of {number} after that of {newest}, {'whole' if whole else 'not whole'}")
        newest = number
    left = [found.name for found in folder.iterdir() if found != path]
    wrong += [f"{name} is left" for name in left if not name.endswith(".partial")]
    if not left:
        wrong.append("no kill came in the midst of a save")
    return {"kills": kill, "saves": newest, "partial": len(left), "wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=6)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        row = run(args.kills, args.seed, Path(folder))
    print(json.dumps(row), flush=True)
    return 1 if row["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
