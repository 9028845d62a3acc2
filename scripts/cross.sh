#!/usr/bin/env bash
# The core on 64-bit ARM: clippy always; its kernel tests too where an emulator and a cross linker are installed.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

target=aarch64-unknown-linux-gnu
libdir="$(rustc --print target-libdir --target "$target")"
[ -d "$libdir" ] || die "no standard library for $target; rustup target add $target (it comes from static.rust-lang.org)"
cargo clippy --quiet --locked -p kvsieve-core --lib --target "$target" -- -D warnings
say "compiled for $target without a warning"

if command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null; then
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
    cargo test --release --locked -p kvsieve-core --lib --target "$target" "$@" -- kernels:: fork:: pins:: rope:: select:: storage:: arena::
else
    say "no test ran: that takes qemu-aarch64 and aarch64-linux-gnu-gcc; on Debian: apt-get install qemu-user gcc-aarch64-linux-gnu"
fi
