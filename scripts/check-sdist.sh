#!/usr/bin/env bash
# What `pip install kvsieve` does where no wheel fits: unpack the sdist elsewhere, build a wheel of it, and use that wheel.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

"$ENV/bin/maturin" sdist --out "$scratch" >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; die "the sdist was not made"; }
# The environment's maturin stands in for the one that build isolation would download; cargo's outputs are this project's.
PATH="$ENV/bin:$PATH" "$ENV/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$scratch/wheel" "$scratch"/kvsieve-*.tar.gz
"$ENV/bin/python" -m pip install --quiet --no-deps --no-index --target "$scratch/site" "$scratch"/wheel/*.whl
(cd "$scratch" && PYTHONPATH="$scratch/site" "$ENV/bin/python" - "$scratch/site" "$VENV"/wheel/*.whl <<'PYTHON'
import sys
import zipfile
from pathlib import Path

import kvsieve
import torch

site, ours = Path(sys.argv[1]), sys.argv[2]
assert Path(kvsieve.__file__).is_relative_to(site), kvsieve.__file__
with zipfile.ZipFile(ours) as archive:
    names = {name for name in archive.namelist() if name.startswith("kvsieve/")}
found = {path.relative_to(site).as_posix() for path in (site / "kvsieve").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
assert found == names, sorted(found ^ names)
print(f"kvsieve {kvsieve.__version__}: the wheel of the sdist holds the same {len(names)} files, and imports beside torch {torch.__version__}")
PYTHON
)
