#!/usr/bin/env bash
# What kvsieve depends on: licences, sources and advisories of packages, and the unsafe blocks of its own. What cannot be asked here is
# said to be skipped; nothing is installed.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

status=0
"$VENV/bin/python" scripts/licences.py || status=1

blocks=$(grep -rhE 'unsafe (\{|impl )' rust/*/src | grep -cvE '^\s*//' || true)
vectors=$(grep -hE 'unsafe (\{|impl )' rust/kvsieve-core/src/kernels/simd/{avx2,avx512,neon}.rs | wc -l)
say "unsafe: $blocks blocks and impls, each with its reason (clippy refuses one without); $vectors, in the vector types, share one a file"

if cargo deny --version >/dev/null 2>&1; then
    cargo deny --locked check licenses bans sources || status=1
    # Advisories lie in a repository of their own.
    cargo deny --locked check advisories || say "advisories of Rust packages: not asked, or not well; see above"
else
    say "skipped: bans, sources and advisories of Rust packages; cargo install --locked cargo-deny"
fi

if "$VENV/bin/python" -m pip_audit --version >/dev/null 2>&1; then
    "$VENV/bin/python" scripts/advisories.py requirements.lock || status=1
else
    say "skipped: advisories of Python packages; $VENV/bin/python -m pip install pip-audit"
fi
exit $status
