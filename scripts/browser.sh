#!/usr/bin/env bash
# See that there is a browser for the tests of `kvsieve view`'s page: one that is there, or Debian's chromium where this user may
# install packages. Prints its path; says what is missing and exits with 1 where there is none and none can be had.
set -euo pipefail

find_one() {
    local name
    for name in "${KVSIEVE_BROWSER:-}" chromium chromium-browser google-chrome google-chrome-stable; do
        if [ -n "$name" ] && command -v "$name"; then return 0; fi
    done
    return 1
}

find_one && exit
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "kvsieve: no chromium or google-chrome on PATH, and no right to install one; on Debian: apt-get install chromium" >&2
    exit 1
fi
echo "kvsieve: installing chromium with apt-get, once" >&2
export DEBIAN_FRONTEND=noninteractive
for call in "-o Acquire::Retries=3 update" "install -y --no-install-recommends chromium"; do
    # shellcheck disable=SC2086
    timeout 300 apt-get $call >&2 </dev/null
done
find_one
