#!/usr/bin/env bash
# The seam's and generate's tests on other releases of transformers, against the wheel that `make setup` built.
#
#   test-transformers.sh oldest newest -- ARGS     releases by name; `newest` asks the index, `oldest` is pyproject's bound
#   test-transformers.sh 5.17.0 -- ARGS            or by number; ARGS are pytest's, and choose the tests
#
# A release that is the main environment's own is not run again when it was named by a word: `make test` runs everything on it.
# Every run uses the wheel in .venv and the torch of the main environment.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main="$("$ENV/bin/python" -c 'from importlib.metadata import version; print(version("transformers"))')"
jobs="${PYTEST_JOBS:-$(nproc)}"
declare -A done_already=()
failed=()

make_overlay() {
    local release="$1" overlay="$2"
    [ -e "$overlay/overlay.lock" ] && return
    say "installing transformers $release into $overlay"
    exec 8>"$overlay.lock"
    flock 8
    if [ ! -e "$overlay/overlay.lock" ]; then
        rm -rf "$overlay" "$overlay".new.*
        "$ENV/bin/python" scripts/releases.py overlay "$release" "$overlay.new.$$" ||
            die "cannot install transformers $release; its tests did not run"
        mv -T "$overlay.new.$$" "$overlay"
    fi
    exec 8>&-
}

run_on() {
    local release="$1" overlay="$2" begun=$SECONDS
    shift 2
    PYTHONPATH="$overlay" "$VENV/bin/python" - "$release" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import transformers

wanted, found = sys.argv[1], transformers.__version__
if found != wanted or version("transformers") != wanted:
    sys.exit(f"kvsieve: the tests would run on transformers {found} instead of {wanted}")
hub = version("huggingface-hub")
print(f"kvsieve: transformers {found} from {transformers.__path__[0]}, huggingface-hub {hub}, torch {torch.__version__}", flush=True)
PYTHON
    PYTHONPATH="$overlay" "$VENV/bin/pytest" -n "$jobs" --dist worksteal -p no:cacheprovider "$@" || failed+=("$release")
    say "transformers $release: $((SECONDS - begun)) s"
}

releases=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    releases+=("$1")
    shift
done
[ $# -gt 1 ] && [ ${#releases[@]} -gt 0 ] || die "name releases (oldest, newest or a number such as 5.16.0), then -- and pytest's arguments"
shift

for which in "${releases[@]}"; do
    release="$("$ENV/bin/python" scripts/releases.py resolve "$which")" || die "no release of transformers is called $which"
    if [ "$which" != "$release" ]; then say "the $which release of transformers is $release"; fi
    if [ -n "${done_already[$release]:-}" ]; then continue; fi
    done_already[$release]=yes
    if [ "$release" = "$main" ]; then
        if [ "$which" != "$release" ]; then
            say "transformers $release is the main environment's: \`make test\` runs every test on it, and it is not run twice"
        else
            run_on "$release" "" "$@"
        fi
        continue
    fi
    overlay="$CACHE/transformers-$release-${ENV##*/env-}"
    make_overlay "$release" "$overlay"
    run_on "$release" "$overlay" "$@"
done
[ ${#failed[@]} -eq 0 ] || die "tests fail on transformers ${failed[*]}"
