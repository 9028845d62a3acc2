"""What README.md and the pages under docs/ say is true: their code runs, on a tiny model, and their commands, defaults, policies
and links are those of the code.

A page is one session: its Python blocks run in order and share their variables. A block that cannot run here begins with a line
that the reader sees, ``# not run: needs a GPU``; there are few of them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvsieve
import pages
import pytest
import tiny
import torch
from kvsieve import cli
from kvsieve.methods import SYSTEMS
from kvsieve.model import support
from pages import Block, Letters
from transformers import AutoModelForCausalLM, AutoTokenizer

REASONS = {"needs a GPU", "needs a network"}
RUN = [page for page in pages.PAGES if pages.blocks(page, "python")]
RESULTS = sorted((pages.ROOT / "docs" / "results").glob("*.md"))
POLICY_PAGES = sorted((pages.ROOT / "docs" / "policies").glob("*.md"))


def by_name(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("page", paths, ids=pages.name)


# --------------------------------------------------------------------------------------------------------------------------- code


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages write into a folder of their own, and load a tiny model by whatever name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: tiny.model())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: Letters())


@contextlib.contextmanager
def stream_for(block: Block, scope: dict[str, Any]) -> Iterator[None]:
    """The open stream that a block speaks of without opening one."""
    if not block.needs("stream"):
        yield
        return
    with kvsieve.stream(scope["model"], kvsieve.SirLLM(budget=1024)) as stream:
        scope["stream"] = stream
        yield


def run(page: Path, scope: dict[str, Any] | None = None) -> dict[str, Any]:
    """The variables of ``page`` after its Python blocks. Its model is its own: a page may change it."""
    tokenizer = Letters()
    scope = {} if scope is None else scope
    scope |= {"kvsieve": kvsieve, "model": copy.deepcopy(tiny.model()), "tokenizer": tokenizer}
    scope |= {"inputs": tokenizer("Hello!", "pt"), "question": tokenizer("And then?", "pt")}
    for block in pages.blocks(page, "python"):
        code = block.compiled()
        if block.reason is None:
            with stream_for(block, scope):
                exec(code, scope)
    return scope


@by_name(RUN)
def test_the_code_of_a_page_runs(page: Path) -> None:
    run(page)


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    skipped = [block for page in RUN for block in pages.blocks(page, "python") if block.reason is not None]
    assert {block.reason for block in skipped} <= REASONS
    assert len(skipped) <= 4, [block.where for block in skipped]


def test_every_block_names_its_language() -> None:
    unnamed = [block.where for page in pages.PAGES for block in pages.blocks(page, "") if "import " in block.text]
    assert not unnamed
    known = {"", "python", "sh", "text"}
    for page in pages.PAGES:
        assert set(re.findall(r"^```(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= known


def test_the_rules_of_ones_own_keep_what_the_guide_says() -> None:
    first, second, *_ = pages.blocks(pages.ROOT / "docs" / "guides" / "own-policy.md", "python")
    scope: dict[str, Any] = {"kvsieve": kvsieve}
    exec(first.compiled(), scope)
    with kvsieve.stream(tiny.model(), scope["policy"]) as stream:
        stream.feed(tiny.ids(1, 900))
        kept = stream.kept()[0].positions
        assert len(kept) <= 512 + 63
        assert kept[:4].tolist() == [0, 1, 2, 3]
    exec(second.compiled(), scope)
    with kvsieve.stream(tiny.model(), scope["policy"]) as stream:
        stream.feed(tiny.ids(1, 900))
        heads = [stream.kept(layer=1, head=head)[0].positions.tolist() for head in range(2)]
        assert heads[0] != heads[1]
        assert all(len(k) == 512 and k[-64:] == list(range(836, 900)) for k in heads)


# ----------------------------------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> list[str]:
    """Lines of shell blocks, and commands in the prose."""
    lines = [line.split("#")[0].strip() for block in pages.blocks(page, "sh") for line in block.text.splitlines()]
    return [line for line in lines if line] + [code for code in pages.inline_code(page) if re.match(r"(kvsieve|make) [a-z]", code)]


def targets() -> set[str]:
    makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@by_name([page for page in pages.PAGES if commands(page)])
def test_commands_exist_and_take_these_arguments(page: Path, tmp_path: Path) -> None:
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            named = [word for word in arguments if "=" not in word and not word.startswith("-")]
            assert set(named) <= targets(), command
        elif program == "kvsieve" and "..." not in arguments:
            parse([str(tmp_path / "file") if word == "FILE" else word for word in arguments])
        elif program not in ("kvsieve", "pip"):
            pytest.fail(f"{pages.name(page)}: {command}")


def parse(arguments: list[str]) -> None:
    """The command line takes ``arguments``. A command that is only named, without its arguments, has a help text."""
    if all(re.fullmatch(r"[a-z]+", word) for word in arguments):
        with pytest.raises(SystemExit) as shown:
            cli._parser().parse_args([*arguments, "--help"])
        assert shown.value.code == 0, arguments
        return
    try:
        cli._parser().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"kvsieve {shlex.join(arguments)}")


@by_name(pages.PAGES)
def test_files_that_are_named_exist(page: Path) -> None:
    pattern = re.compile(r"(?:tests|benches|python|docs|scripts|examples|rust|cuda)/[\w./-]+\.(?:py|md|rs|sh|yml|toml)")
    named = {found for code in pages.inline_code(page) for found in pattern.findall(code)}
    assert not [path for path in named if not (pages.ROOT / path).exists() and not path.startswith("cuda/")]


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page.name != "log.md"], ids=pages.name)
def test_modules_that_are_named_exist(page: Path) -> None:
    """A page may leave out the folders above: `model/hooks.py`. The log tells of files as they were."""
    known = [
        path.as_posix()
        for folder in ("python", "tests", "benches", "scripts", "examples", "rust")
        for path in (pages.ROOT / folder).rglob("*.*")
    ]
    named = {code for code in pages.inline_code(page) if re.fullmatch(r"[\w/]+\.(?:py|rs|cu|cuh)", code)}
    named = {code.removeprefix("cuda/") for code in named}
    assert not [code for code in named if not any(f"/{path}".endswith(f"/{code}") for path in known)]


# ----------------------------------------------------------------------------------------------------------------------- policies


def constructors() -> dict[str, Any]:
    """The public policies, by name."""
    return {system.make.__name__: system.make for system in SYSTEMS}


def page_of(policy: str) -> Path:
    """The page whose title or parameters are the policy's: `LMInfinite` is in lm-infinite.md."""
    plain = {path.stem.replace("-", ""): path for path in (pages.ROOT / "docs" / "policies").glob("*.md")}
    return plain[policy.lower()]


def parameters(page: Path) -> dict[str, str]:
    """Name and default of each row of the page's table of parameters."""
    for header, *rows in pages.tables(page):
        if header[:2] == ["parameter", "default"]:
            return {row[0].strip("`"): row[1].strip("`") for row in rows}
    return {}


@pytest.mark.parametrize("policy", sorted(constructors()))
def test_a_policys_page_has_its_parameters_and_their_defaults(policy: str) -> None:
    signature = inspect.signature(constructors()[policy]).parameters.values()
    shown = {p.name: "required" if p.default is p.empty else repr(p.default).replace("'", '"') for p in signature}
    assert parameters(page_of(policy)) == shown
    text = page_of(policy).read_text(encoding="utf-8")
    for heading in ("## When to use it", "## Parameters", "## Memory", "## Cost", "## Limits", "## Composition"):
        assert heading in text, heading


def test_the_registry_feeds_the_menu_the_tables_and_the_reference() -> None:
    hooks = pages.load("scripts/docs_hooks.py")
    assert [(system.name, system.paper) for system in hooks.systems()] == [(system.name, system.paper) for system in SYSTEMS]
    menu: list[dict[str, Any]] = []
    hooks.on_config({"nav": [{"Quickstart": "index.md"}, {"Policies": menu}]})
    reference = hooks.completed(pages.read("docs/reference/policies.md"), "reference/policies.md")
    index = hooks.completed(pages.read("docs/policies/index.md"), "policies/index.md")
    for policy in constructors():
        page = page_of(policy)
        assert {policy: f"policies/{page.name}"} in menu
        assert re.search(rf"::: kvsieve\.methods\.\w+\.{policy}$", reference, re.MULTILINE), policy
        assert f"[`{policy}`]({page.name})" in index, policy
    table = "\n".join(line for line in pages.README.read_text(encoding="utf-8").splitlines() if line.startswith("| [`"))
    named = re.findall(r"\[`(\w+)(?:\(\w*\))?`\]\(([\w/.-]+)\)", table)
    # A new system's row may wait; none of these may go.
    assert len(named) >= 16
    assert not [name for name, target in named if pages.ROOT / target != page_of(name)]


def test_a_system_without_a_row_of_its_own_gets_one() -> None:
    hooks = pages.load("scripts/docs_hooks.py")
    text = pages.read("docs/policies/index.md")
    (row,) = [line for line in text.splitlines() if line.startswith("| [`H2O`]")]
    found = hooks.completed(text.replace(row + "\n", ""), "policies/index.md")
    (made,) = [line for line in found.splitlines() if line.startswith("| [`H2O`]")]
    assert "Zhang et al., NeurIPS 2023" in made
    assert "KV head" in made
    assert len([line for line in hooks.completed(text, "policies/index.md").splitlines() if line.startswith("| [`H2O`]")]) == 1


def is_policy(code: str) -> bool:
    """Whether ``code`` is a whole policy with its arguments, such as ``SirLLM(1024) | ThinK(0.4)``."""
    part = rf"(?:{'|'.join(constructors())})\((?:[^()]|\([^()]*\))*\)"
    return re.fullmatch(rf"{part}(?: (?:\||>>) {part})*", code) is not None and not re.search(
        r"\((budget|window|ratio|bits|preset|path|context)\)", code
    )


@by_name([page for page in pages.PAGES if any(map(is_policy, pages.inline_code(page)))])
def test_policies_that_are_named_can_be_built(page: Path) -> None:
    for code in filter(is_policy, pages.inline_code(page)):
        kvsieve.methods.parse(code)


def test_the_table_of_what_goes_together() -> None:
    """Every cell of the table in policies/index.md, tried."""
    made = {
        "Full": ["full()"],
        "StreamingLLM": ["streamingllm(512)"],
        "LMInfinite": ["lminfinite(508)"],
        "SirLLM": ["sirllm(512)"],
        "SnapKV, H2O": ["snapkv(512)", "h2o(512)"],
        "storage: ThinK, Quantized": ["{} | think()", "{} | quantized()"],
        "selection: HiP, InfiniteHiP, Quest": ["{} | hip()", "{} | infinitehip()", "{} | quest()"],
        "RefreshKV": ["{} | refreshkv(512)"],
        "SelectiveV": ["{} | selectivev()"],
        "first in a chain": ["{} >> streamingllm(512)"],
        "later in a chain": ["streamingllm(512) >> {}"],
    }
    header, *rows = next(t for t in pages.tables(page_of("index")) if t[0][0] == "evicts or keeps")
    for name, *answers in rows:
        for column, answer in zip(header[1:], answers):
            for policy in made[name]:
                for how in made[column]:
                    with contextlib.nullcontext() if answer.startswith("yes") else pytest.raises(kvsieve.errors.PolicyError):
                        kvsieve.methods.parse(how.format(policy))
    for refused in (
        "lminfinite(508, middle_top_k=8) | think()",
        "lminfinite(508, middle_top_k=8) >> full()",
        "sirllm(512) | hip(extend=True)",
        "sirllm(512) | quest(extend=True)",
        "sirllm(512) | infllm()",
    ):
        with pytest.raises(kvsieve.errors.PolicyError):
            kvsieve.methods.parse(refused)


# ------------------------------------------------------------------------------------------------------------------------ status


def test_families_and_versions_are_those_that_are_tested() -> None:
    status = pages.prose(pages.ROOT / "docs" / "status.md")
    families = re.search(r"## Model families\n\n(.*?),\sas tiny", status, re.DOTALL)
    assert families is not None
    assert set(re.split(r",\s", families[1])) == set(tiny.FAMILIES)
    readme = pages.README.read_text(encoding="utf-8")
    assert f"{len(tiny.FAMILIES)} families" in readme
    for text in (readme, status):
        assert support.OLDEST in text
        assert support.NEWEST in text
        assert torch.__version__.split("+")[0].rpartition(".")[0] in text


# ------------------------------------------------------------------------------------------------------------------------ figures


@by_name([page for page in RESULTS if page.stem != "index"])
def test_every_table_of_results_says_when_where_and_how(page: Path) -> None:
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        if "|---" in section:
            assert re.search(r"^Recorded \d+ \w+ \d{4} on\s\[machine [ABC]\]", section, re.MULTILINE), section[:40]
            assert re.search(r"by\s`(kvsieve|make|pytest|cargo|python) ", section), section[:40]


def test_figures_outside_of_the_results_are_quoted_from_there() -> None:
    known = {tuple(row) for page in RESULTS for table in pages.tables(page) for row in table}
    quoted = 0
    for page in [*POLICY_PAGES, pages.README]:
        for header, *rows in pages.tables(page):
            if tuple(header) in known:
                quoted += len(rows)
                assert not [row for row in rows if tuple(row) not in known], pages.name(page)
    assert quoted > 30


def test_the_figures_are_made_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make figures` makes the committed files, to the byte, and none of them lacks its record."""
    monkeypatch.syspath_prepend(str(pages.ROOT / "scripts"))
    import figures

    for figure in figures.FIGURES:
        for theme in figures.THEMES:
            made = (figures.ASSETS / f"{figure.name}-{theme}.svg").read_text(encoding="utf-8")
            assert made == figures.made(figure, theme), "run make figures"
    drawn = {f"{figure.name}-{theme}.svg" for figure in figures.FIGURES for theme in figures.THEMES}
    assert {path.name for path in figures.ASSETS.glob("*.svg")} == drawn


# -------------------------------------------------------------------------------------------------------------------- form, links


def test_the_readme_is_short() -> None:
    lines = pages.README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 132]


@by_name([page for page in pages.PAGES if pages.links(page)])
def test_links_lead_somewhere(page: Path) -> None:
    """The site's build checks this for docs/ by its own rules; this one knows README.md, and the files as they lie on disk."""
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or there.suffix != ".md" or anchor in pages.anchors(there), target


def test_every_page_is_in_the_menu() -> None:
    menu = pages.read("mkdocs.yml") + "".join(f" {system.page}\n" for system in pages.load("scripts/docs_hooks.py").systems())
    docs = pages.ROOT / "docs"
    assert not [path for path in docs.rglob("*.md") if f" {path.relative_to(docs).as_posix()}\n" not in menu]
