#!/usr/bin/env bash
# The tests of `kvsieve serve --ray`, with Ray beside the environment: it is large (360 MB), and nothing else needs it.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "$PYTHON_ID" in
    cpython-310\ *) die "requirements-ray.lock is for Python 3.11 and later; PYTHON=python3.11 make test-ray" ;;
esac

overlay="$CACHE/ray-$(cat requirements-ray.lock | hash16)-${ENV##*/env-}"
if [ ! -e "$overlay/complete" ]; then
    exec 8>"$overlay.lock"
    flock 8
    if [ ! -e "$overlay/complete" ]; then
        say "installing Ray into $overlay (once)"
        rm -rf "$overlay" "$overlay".new.*
        "$ENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile --no-deps \
            --target "$overlay.new.$$" -r requirements-ray.lock
        touch "$overlay.new.$$/complete"
        mv -T "$overlay.new.$$" "$overlay"
    fi
    exec 8>&-
fi
PYTHONPATH="$overlay" "$VENV/bin/pytest" -p no:cacheprovider tests/serve/test_ray.py "$@"
