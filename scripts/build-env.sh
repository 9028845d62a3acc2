#!/usr/bin/env bash
# Run a command with the shared CARGO_TARGET_DIR, and with the interpreter that pyo3's build script is to ask.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ "${1:-}" = cargo ]; then claim_target; fi
exec "$@"
