"""Every kernel compiles for the GPUs it is meant for, without one; and what the assembler says about it is within bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kvsieve.backends.cuda import nvrtc
from kvsieve.backends.cuda.nvrtc import SOURCES, Module
from kvsieve.backends.cuda.ops.attend import attend_module
from kvsieve.backends.cuda.ops.launch import DTYPES
from kvsieve.errors import BackendError

ARCHS = [80, 90]
DIMS = [64, 96, 128, 256]
SHARED = 48 << 10


def facts(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and static shared memory of each kernel, from the assembler's report."""
    found: dict[str, dict[str, int]] = {}
    for part in log.split("Compiling entry function")[1:]:
        name = re.match(r" '(\w+)'", part)
        numbers = {
            "registers": r"Used (\d+) registers",
            "stored": r"(\d+) bytes spill stores",
            "loaded": r"(\d+) bytes spill loads",
            "shared": r"(\d+) bytes smem",
        }
        assert name is not None, part
        found[name[1]] = {key: int(match[1]) if (match := re.search(p, part)) else 0 for key, p in numbers.items()}
    return found


def build(module: Module, arch: int) -> dict[str, dict[str, int]]:
    """Facts by expression."""
    made = nvrtc.compiled(module, arch)
    assert made.cubin[:4] == b"\x7fELF"
    by_symbol = facts(made.log)
    return {expression: by_symbol[symbol] for expression, symbol in made.symbols.items()}


def attend_modules() -> list[tuple[Module, int]]:
    """Every dtype, head size and frame; with one set of heads, and for the common sizes with every kind of group."""
    out = []
    for arch in ARCHS:
        for dtype in DTYPES:
            for dim in DIMS:
                for raw in (False, True):
                    out.append((attend_module(dtype, dim, dim, 4, raw), arch))
    for dim in (64, 128):
        for group in (1, 3, 8, 16):
            for raw in (False, True):
                out.append((attend_module(torch.bfloat16, dim, dim, group, raw), 90))
    return out


def packed_modules() -> list[tuple[Module, int]]:
    """`attend` over packed blocks: every pair of bits once, and the common ones for every size, frame and kind of group."""
    bf16, out = torch.bfloat16, []
    for bits in ((a, b) for a in (0, 2, 4, 8) for b in (0, 2, 4, 8)):
        out.append((attend_module(bf16, 128, 128, 4, False, bits), 90))
    for bits in ((0, 0), (4, 4)):
        for raw in (False, True):
            out += [(attend_module(bf16, 128, 128, group, raw, bits), 90) for group in (1, 8, 16)]
            out += [(attend_module(dtype, 128, 128, 4, raw, bits), 80) for dtype in DTYPES]
            out += [(attend_module(bf16, dim, dim, 4, raw, bits), 90) for dim in (64, 256)]
    return out


@pytest.mark.parametrize(
    ("module", "arch"),
    [*attend_modules(), *packed_modules()],
    ids=lambda x: x.expressions[0] if isinstance(x, Module) else f"sm_{x}",
)
def test_attend_compiles_without_spills(module: Module, arch: int) -> None:
    (found,) = build(module, arch).values()
    assert found["shared"] <= SHARED
    if re.search(r" (64|128), \1", module.expressions[0]):
        assert (found["stored"], found["loaded"]) == (0, 0)
    assert 0 < found["registers"] <= 255


def other_modules() -> list[Module]:
    names, flags = list(DTYPES.values()), ("false", "true")
    sized = [f"{name}, {dim}, {dim}" for name in names for dim in DIMS]
    dims = [f"{name}, {dim}" for name in names for dim in DIMS]
    return [
        Module("add_values.cu", tuple(f"add_values<{a}{bits}>" for a in dims for bits in ("", ", 0", ", 2", ", 4", ", 8"))),
        Module("page_bounds.cu", tuple(f"page_bounds<{a}>" for a in dims)),
        Module("append.cu", tuple(f"append<{s}>" for s in sized)),
        Module("carry.cu", ("carry",)),
        *(
            Module(
                f"{stem}.cu", tuple(f"{stem}<{a}, {key}, {value}, {thin}>" for key in (0, 4) for value in (0, 2) for thin in flags)
            )
            for stem in ("pack", "unpack")
            for a in names
        ),
        Module("move.cu", tuple(f"move<{s}>" for s in sized)),
        Module("gather.cu", tuple(f"gather<{s}, {back}>" for s in sized for back in flags)),
        Module("merge.cu", ("attention_scores", *(f"merge<{name}, {dim}>" for name in names for dim in DIMS))),
        Module("rotate.cu", ("turns", *(f"rotate<{a}, {b}>" for a in names for b in {a, "float"}))),
        Module("surprisal.cu", tuple(f"surprisal<{name}>" for name in names)),
        Module("top_k.cu", ("top_k",)),
        *search_modules(),
    ]


def search_modules() -> list[Module]:
    """bfloat16 in every size, the other dtypes in one."""
    sizes = [*(("bf16", dim) for dim in DIMS), ("f16", 128), ("float", 128)]
    searches = [
        f"{name}<{a}, {dim}, {n}>" for name in ("hip", "narrow") for a, dim in sizes for n in (1, 2, 4) if n == 4 or dim == 128
    ]
    searches += [f"narrow<{a}, {dim}, {n}, true>" for a, dim in sizes for n in (1, 2, 4) if n == 4 or dim == 128]
    # Those that turn keys take long to compile.
    raw = [("bf16", 128), ("bf16", 256), ("float", 128)]
    searches += [f"hip<{a}, {dim}, 4, true>" for a, dim in raw]
    searches += [f"narrow<{a}, {dim}, 4, {bounds}, true>" for a, dim in raw for bounds in ("false", "true")]
    heads = [(a, dim, n) for a, dim in sizes for n in (1, 2, 3, 4) if n == 4 or (a, dim) == ("bf16", 128)]
    chunks = ("false", "true")
    reads = [f"sparse<{a}, {dim}, {dim}, {n}, {chunk}>" for a, dim, n in heads for chunk in chunks]
    reads += [f"sparse<{a}, {dim}, {dim}, 4, {chunk}, true>" for a, dim in raw for chunk in chunks]
    return [Module("search.cu", tuple(searches)), Module("sparse.cu", tuple(reads))]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("module", other_modules(), ids=lambda m: m.file)
def test_every_other_kernel_compiles(module: Module, arch: int) -> None:
    found = build(module, arch)
    assert set(found) == set(module.expressions)
    for numbers in found.values():
        assert numbers["shared"] <= SHARED
        assert (numbers["stored"], numbers["loaded"]) == (0, 0)


def test_every_file_of_kernels_is_among_these() -> None:
    assert {path.name for path in SOURCES.glob("*.cu")} == {"attend.cu", *(m.file for m in other_modules())}


def test_the_report_is_read_right() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1aPf\n    40 bytes stack frame, 48 bytes spill stores, 108 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 36352 bytes smem, 448 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 26 registers, used 0 barriers\n"
    )
    assert facts(log) == {
        "_Z1aPf": {"registers": 128, "stored": 48, "loaded": 108, "shared": 36352},
        "_Z1bv": {"registers": 26, "stored": 0, "loaded": 0, "shared": 0},
    }


# ---------------------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """An empty cache, and a list of what was compiled."""
    calls: list[Any] = []
    compile_module = nvrtc.compile_module
    monkeypatch.setenv("KVSIEVE_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compile_module", lambda *args: (calls.append(args), compile_module(*args))[1])
    return calls


TOP_K = Module("top_k.cu", ("top_k",))


def test_a_module_is_compiled_once(counted: list[Any], tmp_path: Path) -> None:
    first = nvrtc.compiled(TOP_K, 90)
    assert nvrtc.compiled(TOP_K, 90) == first
    assert len(counted) == 1
    assert nvrtc.compiled(TOP_K, 80) != first
    assert len(counted) == 2
    (held, _) = sorted((tmp_path / "cache").iterdir())
    assert held.suffix == ".cubin", "nothing half-written is left behind"


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json\n123", b"\xff" * 100], ids=range(4))
def test_a_damaged_file_is_compiled_anew(counted: list[Any], tmp_path: Path, damage: bytes) -> None:
    first = nvrtc.compiled(TOP_K, 90)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage)
    assert nvrtc.compiled(TOP_K, 90).cubin == first.cubin
    path.write_bytes(path.read_bytes()[:-1])
    assert nvrtc.compiled(TOP_K, 90).cubin == first.cubin
    assert len(counted) == 3


def test_other_sources_are_other_modules(counted: list[Any], tmp_path: Path) -> None:
    copy = tmp_path / "sources"
    copy.mkdir()
    for path in SOURCES.glob("*.cu*"):
        (copy / path.name).write_bytes(path.read_bytes())
    nvrtc.compiled(TOP_K, 90)
    nvrtc.compiled(TOP_K, 90, copy)
    assert len(counted) == 1, "the sources count, not where they are"
    (copy / "common.cuh").write_text((copy / "common.cuh").read_text() + "// changed\n")
    nvrtc._sources_hash.cache_clear()
    nvrtc.compiled(TOP_K, 90, copy)
    assert len(counted) == 2


def test_without_a_place_to_write_it_still_compiles(counted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVSIEVE_CUDA_CACHE", str(tmp_path / "file" / "below"))
    assert nvrtc.compiled(TOP_K, 90).cubin == nvrtc.compiled(TOP_K, 90).cubin
    assert len(counted) == 2


# ------------------------------------------------------------------------------------------------------ where something is missing


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda stem: ["libkvsieve-has-no-such-library.so"])
    nvrtc._library.cache_clear()
    nvrtc.version.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"pip install nvidia-cuda-nvrtc.*reference"):
            nvrtc.version()
    finally:
        nvrtc._library.cache_clear()
        nvrtc.version.cache_clear()


@pytest.mark.parametrize("arch", [35, 990])
def test_an_architecture_that_nvrtc_does_not_know_is_named(arch: int) -> None:
    with pytest.raises(BackendError, match=rf"{arch // 10}\.{arch % 10}.*reference"):
        nvrtc.compile_module(TOP_K, arch)


def test_a_source_that_does_not_compile_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text("__global__ void bad() { nonsense; }")
    with pytest.raises(BackendError, match="nonsense"):
        nvrtc.compile_module(Module("bad.cu", ("bad",)), 90, tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVSIEVE_CUDA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cache_dir() == tmp_path / "kvsieve" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_dir() == Path.home() / ".cache" / "kvsieve" / "cuda"
