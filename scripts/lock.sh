#!/usr/bin/env bash
# Rewrite the lock file of $PYTHON: 3.10 has its own (the last releases that still support it), later ones share one, and so do
# the packages that build the documentation, and those of the extra `ray`.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" -m venv "$scratch/venv"
# A recent pip resolves from the index's metadata; older ones download every wheel (several GB) for a dry run.
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.3'
"$scratch/venv/bin/python" scripts/lock.py >"$scratch/lock"
mv "$scratch/lock" "$LOCK"
say "wrote $LOCK"
if [ "$LOCK" = requirements.lock ]; then
    "$scratch/venv/bin/python" scripts/lock.py docs >"$scratch/docs.lock"
    mv "$scratch/docs.lock" requirements-docs.lock
    say "wrote requirements-docs.lock"
    "$scratch/venv/bin/python" scripts/lock.py ray >"$scratch/ray.lock"
    mv "$scratch/ray.lock" requirements-ray.lock
    say "wrote requirements-ray.lock"
fi
