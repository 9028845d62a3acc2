#!/usr/bin/env bash
# The core's own tests where every access to memory is checked: by Miri (what is not SIMD), AddressSanitizer or valgrind, whichever
# there is. The first argument names one; without it the first that is installed runs.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Everything that handles raw memory without vector instructions, and whatever decides what lies where.
PLAIN=(block:: budget:: evict:: fork:: pins:: plan position:: rank:: select:: storage:: all::arena all::machine all::step)

has() {
    case "$1" in
        miri) cargo +nightly miri --version >/dev/null 2>&1 ;;
        address) cargo +nightly --version >/dev/null 2>&1 ;;
        valgrind) command -v valgrind >/dev/null ;;
        *) die "no checker $1: miri, address or valgrind" ;;
    esac
}

tool="${1:-}"
if [ -z "$tool" ]; then
    for one in miri address valgrind; do has "$one" && { tool=$one; break; }; done
    [ -n "$tool" ] || die "neither a nightly toolchain (rustup toolchain install nightly --component miri) nor valgrind is installed"
else
    has "$tool" || die "$tool is not installed; miri and address need rustup's nightly, valgrind is a package of Debian"
fi
say "checking by $tool"
target="$(rustc -vV | sed -n 's/^host: //p')"
export CARGO_TARGET_DIR="$CARGO_TARGET_DIR/$tool" PROPTEST_CASES="${PROPTEST_CASES:-8}" KVSIEVE_ISA=portable
case "$tool" in
    miri) MIRIFLAGS="-Zmiri-disable-isolation" cargo +nightly miri test --locked -p kvsieve-core --lib -- "${PLAIN[@]}" ;;
    address) # all of them, on every instruction set; one asks for 2^60 bytes and must be
        # refused, and what a fork leaves to its children is never freed
        unset KVSIEVE_ISA
        ASAN_OPTIONS="allocator_may_return_null=1:detect_leaks=0" RUSTFLAGS="-Zsanitizer=address" \
            cargo +nightly test --locked -p kvsieve-core --lib --target "$target"
        ;;
    valgrind)
        CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite" \
            cargo test --locked -p kvsieve-core --lib -- --test-threads=1 "${PLAIN[@]}"
        ;;
esac
