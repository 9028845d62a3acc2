#!/usr/bin/env bash
# Rewrite the lock file of $PYTHON: 3.10 has its own (the last releases that still support it), later ones share one.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" -m venv "$scratch/venv"
"$scratch/venv/bin/python" scripts/lock.py >"$scratch/lock"
mv "$scratch/lock" "$LOCK"
say "wrote $LOCK"
