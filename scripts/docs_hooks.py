"""Hooks of mkdocs: what the registry of published systems says, and what Python's Markdown shows otherwise than it should.

The menu's policies and their reference come from the registry; so do rows of the table of policies that nobody has written by hand.
Its source is read, never imported: neither torch nor the compiled core is needed.

In docstrings, roles (``:meth:`pin```) become code, and the flags of doctest go. In tables a bar inside of code is written with a
backslash, which GitHub takes away and Python's Markdown leaves.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

METHODS = Path(__file__).resolve().parents[1] / "python" / "kvsieve" / "methods"

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):<code>~?([^<]+)</code>")
FLAG = re.compile(r"\s*(?:<span class=\"[^\"]*\">)?# doctest: \+SKIP(?:</span>)?")

CELL = re.compile(r"<td.*?</td>", re.DOTALL)


class System(NamedTuple):
    """A row of the registry: public name, file without its ending, paper, and what its constructor's docstring says first."""

    name: str
    module: str
    paper: str
    summary: str

    @property
    def page(self) -> str:
        return f"policies/{self.module.replace('_', '-')}.md"


def systems() -> list[System]:
    """The rows of the registry, in its order."""
    tree = ast.parse((METHODS / "registry.py").read_text(encoding="utf-8"))
    files = {
        name.name: node.module.rpartition(".")[2]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
    }
    table = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SYSTEMS")
    assert isinstance(table.value, ast.Tuple)
    found = []
    for row in table.value.elts:
        assert isinstance(row, ast.Call)
        name, paper = ast.unparse(row.args[0]), ast.literal_eval(row.args[1])
        found.append(System(name, files[name], paper, _summary(files[name], name)))
    return found


def _summary(module: str, name: str) -> str:
    tree = ast.parse((METHODS / f"{module}.py").read_text(encoding="utf-8"))
    made = next(node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
    return re.sub(r"``", "`", (ast.get_docstring(made) or "").split("\n\n")[0].replace("\n", " ").rstrip("."))


def on_config(config: Any) -> Any:
    """The menu's policies, after what stands there already."""
    (policies,) = (entry["Policies"] for entry in config["nav"] if "Policies" in entry)
    policies += [{system.name: system.page} for system in systems()]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return completed(markdown, page.file.src_uri)


def completed(markdown: str, source: str) -> str:
    """A page with what it takes from the registry."""
    if source == "reference/policies.md":
        blocks = [
            f"::: kvsieve.methods.{s.module}.{s.name}\n    options:\n      heading: kvsieve.{s.name}\n      toc_label: {s.name}\n"
            for s in systems()
        ]
        return markdown.replace("<!-- systems -->", "\n".join(blocks))
    if source == "policies/index.md":
        link = {s.name: f"[`{s.name}`]({s.page.removeprefix('policies/')})" for s in systems()}
        rows = [f"| {link[s.name]} | {s.paper} | {s.summary} | | |" for s in systems() if link[s.name] not in markdown]
        first, rest = markdown.split("\n\n*Position*", 1)
        return "\n".join([first, *rows]) + "\n\n*Position*" + rest
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    html = FLAG.sub("", ROLE.sub(r"<code>\1</code>", html))
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
