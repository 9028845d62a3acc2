# Where things live, and the hashes that say whether they are fresh. Sourced by the other scripts; bash only.
#
#   $KVSIEVE_CACHE/env-<hash>/     third-party packages; keyed by Python and lock files, shared by all clones
#   $KVSIEVE_CACHE/docs-<hash>/    what builds the documentation; keyed by Python and requirements-docs.lock
#   $KVSIEVE_CACHE/target-<hash>/  cargo's build outputs; keyed by rustc and Cargo.lock, shared by all clones
#   $KVSIEVE_CACHE/emulator/       CUDA kernels as g++ compiles them for the tests; keyed by what they include
#   $KVSIEVE_CACHE/mypy/           mypy's; it knows by itself what is fresh
#   $KVSIEVE_CACHE/bytecode/       Python's, where the caller wants none beside the sources; Python knows what is fresh
#   .venv/                         this clone's thin layer over env-<hash>: kvsieve's own wheel and console scripts

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

PYTHON="${PYTHON:-python3}"
CACHE="${KVSIEVE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvsieve}"
mkdir -p "$CACHE"
CACHE="$(cd "$CACHE" && pwd -P)"
VENV="$ROOT/.venv"

# Tracked by pyo3's build script: an activated environment would make cargo rebuild what it has already built.
unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME

# Packages are installed without bytecode: the first process that imports a module compiles it, for all that follow. Without that,
# every process of a test run compiles torch and transformers anew, which takes it twice as long as everything else in an import.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$CACHE/bytecode}"
fi

die() { printf 'kvsieve: %s\n' "$*" >&2; exit 1; }
say() { printf 'kvsieve: %s\n' "$*" >&2; }
hash16() { sha256sum | cut -c1-16; }

command -v "$PYTHON" >/dev/null || die "no $PYTHON on PATH; set PYTHON to a Python of 3.10 or newer"
command -v cargo >/dev/null || die "no cargo on PATH; install Rust (see rust-version in Cargo.toml)"
command -v flock >/dev/null || die "no flock on PATH; apt-get install util-linux"

# The interpreter under any virtual environment that happens to be active: `.venv` may have to be made anew.
PYTHON="$("$PYTHON" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')"
PYTHON_ID="$("$PYTHON" -c 'import platform, sys
print(sys.implementation.cache_tag, platform.machine(), sys.version.split()[0], sys.base_prefix)
assert sys.version_info >= (3, 10), "kvsieve needs Python 3.10 or newer"')"

case "$PYTHON_ID" in
    cpython-310\ *) LOCK=requirements-3.10.lock ;;
    *) LOCK=requirements.lock ;;
esac

ENV="$CACHE/env-$({ printf '%s\n' "$PYTHON_ID"; cat "$LOCK" requirements-model.lock; } | hash16)"
DOCS_ENV="$CACHE/docs-$({ printf '%s\n' "$PYTHON_ID"; cat requirements-docs.lock; } | hash16)"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$CACHE/target-$({ rustc -vV; cat Cargo.lock; } | hash16)}"
export PYO3_PYTHON="$ENV/bin/python"
# What mypy found out about torch and the rest is true in every clone.
export MYPY_CACHE_DIR="$CACHE/mypy"

# How maturin links a wheel for others. On Linux zig links against the symbols of glibc 2.17 (2012), whatever glibc this
# machine has, so that the wheel installs on every Linux that torch runs on; the compiler is rustc in either case.
WHEEL_ARGS=()
if [ "$(uname -s)" = Linux ]; then WHEEL_ARGS=(--zig --compatibility manylinux_2_17); fi
export CARGO_ZIGBUILD_PYTHON_PATH="$ENV/bin/python"

# Hold the target folder, for as long as this shell and what it runs: others may build in it beside us, but none from other sources.
claim_target() {
    mkdir -p "$CARGO_TARGET_DIR"
    exec 7>"$CARGO_TARGET_DIR/.kvsieve.lock"
    local status
    while flock -s 7; do
        status=0
        "$PYTHON" scripts/target_sources.py check "$CARGO_TARGET_DIR" || status=$?
        [ "$status" != 0 ] || return 0
        [ "$status" = 3 ] || die "cannot tell which sources $CARGO_TARGET_DIR was built from"
        flock 7
        "$PYTHON" scripts/target_sources.py claim "$CARGO_TARGET_DIR"
    done
}

# One hash over the names and contents of everything that ends up in the wheel.
sources_hash() {
    local here=()
    for path in Cargo.toml Cargo.lock pyproject.toml README.md LICENSE rust-toolchain.toml rust python cuda; do
        if [ -e "$path" ]; then here+=("$path"); fi
    done
    {
        printf '%s\n' "$ENV" "${RUSTFLAGS:-}" "${WHEEL_ARGS[*]}"
        find -H "${here[@]}" -type f -not -path '*/__pycache__/*' -not -name '*.so' -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum
    } | hash16
}
