"""What a user gets from `pip install`: the files of the wheel, and what importing it does to everything else."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import kvsieve
import kvsieve._core
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = Path(kvsieve.__file__).parent
WHEELS = sorted((ROOT / ".venv" / "wheel").glob("*.whl"))
GLIBC = "manylinux_2_17"
KERNELS = sorted(path for path in (ROOT / "cuda").rglob("*.cu*") if path.is_file())


def in_fresh_python(code: str) -> object:
    """What `code` prints as JSON on its last line, in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_installed_wheel_is_under_test():
    site_packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    assert INSTALLED.parent.resolve() in site_packages
    assert not any(Path(entry).resolve() == ROOT / "python" for entry in sys.path)


def test_versions_agree():
    assert importlib.metadata.version("kvsieve") == kvsieve._core.__version__


def test_the_extension_is_abi3():
    assert Path(kvsieve._core.__file__).name == ("_core.pyd" if sys.platform == "win32" else "_core.abi3.so")


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel that `make setup` built and installed: the one that is released."""
    assert len(WHEELS) == 1, f"one wheel in .venv/wheel, not {len(WHEELS)}; run `make setup`"
    return WHEELS[0]


def test_the_built_wheel_is_the_installed_one(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("kvsieve/")]
        assert "kvsieve/__init__.py" in names
        for name in names:
            assert (INSTALLED.parent / name).read_bytes() == archive.read(name), f"{name} was changed after it was installed"


def test_one_wheel_serves_every_python(wheel):
    tags = (importlib.metadata.distribution("kvsieve").read_text("WHEEL") or "").splitlines()
    tags = [line.removeprefix("Tag: ") for line in tags if line.startswith("Tag: ")]
    assert tags
    assert all(tag.startswith("cp310-abi3-") for tag in tags)
    assert "-cp310-abi3-" in wheel.name


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux tags and auditwheel are about Linux")
def test_the_wheel_installs_on_old_linux(wheel):
    """auditwheel reads the symbols that the extension needs, and so does not rely on the tag in the wheel's name."""
    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = f"{GLIBC}_{platform.machine()}"
    assert found["overall_tag"] == expected, found
    assert expected in wheel.name


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The source distribution, unpacked."""
    scratch = tmp_path_factory.mktemp("sdist")
    done = subprocess.run(["maturin", "sdist", "--out", str(scratch)], cwd=ROOT, capture_output=True, text=True, env=with_tools())
    assert done.returncode == 0, done.stderr
    [archive] = scratch.glob("kvsieve-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(scratch, filter="data")
    yield scratch / archive.name.removesuffix(".tar.gz")
    shutil.rmtree(scratch)


def with_tools() -> dict[str, str]:
    """The environment with this interpreter's console scripts (maturin) first on PATH."""
    return {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}


def test_the_sdist_holds_what_the_wheel_is_built_from(sdist, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("kvsieve/") and not name.endswith((".so", ".pyd"))}
    assert packed <= {path.relative_to(sdist / "python").as_posix() for path in (sdist / "python").rglob("*") if path.is_file()}
    for crate in ("kvsieve-core", "kvsieve-py"):
        for source in (ROOT / "rust" / crate / "src").rglob("*.rs"):
            assert (sdist / source.relative_to(ROOT)).read_bytes() == source.read_bytes()
    for name in ("Cargo.lock", "pyproject.toml", "LICENSE", "README.md", "PKG-INFO"):
        assert (sdist / name).is_file(), name


def test_cargo_accepts_the_sdist_with_its_lock(sdist):
    """The workspace in it is whole, and its lock fits; `make check-sdist` builds a wheel from it as pip does, in some minutes."""
    command = ["cargo", "metadata", "--locked", "--offline", "--format-version", "1", "--no-deps"]
    done = subprocess.run(command, cwd=sdist, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {package["name"] for package in json.loads(done.stdout)["packages"]} == {"kvsieve-core", "kvsieve-py"}


def test_the_wheel_says_that_it_is_typed_and_licensed():
    files = {str(path) for path in importlib.metadata.files("kvsieve") or []}
    assert "kvsieve/py.typed" in files
    assert any(path.endswith("licenses/LICENSE") for path in files)


def test_the_console_script_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="kvsieve")
    assert [script.value for script in scripts] == ["kvsieve.cli:main"]
    assert (Path(sysconfig.get_path("scripts")) / "kvsieve").is_file()


def test_the_wheel_owns_one_package_only():
    tops = {path.parts[0] for path in importlib.metadata.files("kvsieve") or []}
    assert {top for top in tops if not top.endswith(".dist-info") and top != ".."} == {"kvsieve"}


@pytest.mark.skipif(not KERNELS, reason="the repository holds no cuda/*.cu* file yet")
def test_cuda_sources_travel_in_the_wheel():
    for path in KERNELS:
        installed = INSTALLED / "backends" / "cuda" / "kernels" / path.relative_to(ROOT / "cuda")
        assert installed.is_file(), f"{path.relative_to(ROOT)} is missing from the wheel"
        assert installed.read_bytes() == path.read_bytes()


def test_python_sources_travel_in_the_wheel():
    source = ROOT / "python" / "kvsieve"
    for path in source.rglob("*.py*"):
        if "__pycache__" not in path.parts:
            installed = INSTALLED / path.relative_to(source)
            assert installed.is_file(), f"{path.relative_to(ROOT)} is missing from the wheel"
            assert installed.read_bytes() == path.read_bytes(), f"{path.relative_to(ROOT)}: run `make setup`"


def test_importing_kvsieve_loads_no_model_and_no_gpu():
    loaded = in_fresh_python("import json, sys, kvsieve; print(json.dumps(sorted(sys.modules)))")
    assert isinstance(loaded, list)
    assert not [name for name in loaded if name.split(".")[0] in {"cupy", "gguf", "matplotlib", "rich", "accelerate"}]
    # `transformers.models` and its `auto` tables may come along with transformers; no architecture may.
    heavy = [name for name in loaded if name.startswith("transformers.models.")]
    assert not [name for name in heavy if name.split(".")[2] != "auto"]


def test_importing_kvsieve_changes_nothing_in_transformers():
    before, after = in_fresh_python(
        """
import json
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers import cache_utils, modeling_utils

def seen():
    functions = [f"{name} {AttentionInterface()[name]!r}" for name in sorted(AttentionInterface())]
    masks = [f"{name} {AttentionMaskInterface()[name]!r}" for name in sorted(AttentionMaskInterface())]
    members = [f"{module.__name__}.{name} {id(value)}"
               for module in (cache_utils, modeling_utils) for name, value in sorted(vars(module).items())]
    methods = [f"{name} {id(value)}" for name, value in sorted(vars(modeling_utils.PreTrainedModel).items())]
    return functions + masks + members + methods

before = seen()
import kvsieve
print(json.dumps([before, seen()]))
"""
    )
    assert before == after
