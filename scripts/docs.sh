#!/usr/bin/env bash
# Build the documentation, strictly: a link or an anchor that leads nowhere is an error. Needs no network once its packages are here.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "$PYTHON_ID" in
    cpython-310\ *) die "requirements-docs.lock is for Python 3.11 and later; PYTHON=python3.11 make docs" ;;
esac

make_docs_env() {
    [ -e "$DOCS_ENV/complete" ] && return
    say "installing what builds the documentation into $DOCS_ENV (once)"
    rm -rf "$DOCS_ENV" "$DOCS_ENV".new.*
    local new="$DOCS_ENV.new.$$"
    "$PYTHON" -m venv "$new" || die "cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps -r requirements-docs.lock
    touch "$new/complete"
    mv -T "$new" "$DOCS_ENV"
}

if [ ! -e "$DOCS_ENV/complete" ]; then
    exec 8>"$DOCS_ENV.lock"
    flock 8
    make_docs_env
    exec 8>&-
fi
export NO_MKDOCS_2_WARNING=1  # a notice about a successor
PATH="$DOCS_ENV/bin:$PATH" "$DOCS_ENV/bin/python" -m mkdocs "${1:-build}" --strict "${@:2}"
