"""A hook of mkdocs: what follows from the registry of systems, and what Python's Markdown shows otherwise than it should be seen.

The menu's pages of policies, the reference of their constructors, and their table in `policies/index.md` are made of the rows of
`methods/registry.py` and the head of each page, so that a system is added by its row and its page. The sources are read, not
imported: neither torch nor the compiled core is needed.

In docstrings, roles (``:meth:`pin```) become code, and the flags of doctest go. In tables a bar inside of code is written with a
backslash, which GitHub takes away and Python's Markdown leaves.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
REGISTRY = ROOT / "python" / "kvsieve" / "methods" / "registry.py"
PAGES = ROOT / "docs" / "policies"

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):<code>~?([^<]+)</code>")
FLAG = re.compile(r"\s*(?:<span class=\"[^\"]*\">)?# doctest: \+SKIP(?:</span>)?")

MARK = re.compile(r"^\*\(The site has (the constructors|the table of all policies) here, made of .*\)\*$", re.MULTILINE)
COLUMNS = ("keeps", "position", "memory")

CELL = re.compile(r"<td.*?</td>", re.DOTALL)


class Row(NamedTuple):
    """A system: its constructor's name and module, where it was published, and the file name of its page."""

    name: str
    module: str
    paper: str
    page: str


def systems() -> list[Row]:
    """The rows of the registry, in its order."""
    tree = ast.parse(REGISTRY.read_text(encoding="utf-8"))
    module = {name.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    (table,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SYSTEMS"]
    rows = []
    for call in table.elts:
        name, paper = call.args[0].id, ast.literal_eval(call.args[1])
        page = module[name].rpartition(".")[2].replace("_", "-") + ".md"
        rows.append(Row(name, module[name], paper.partition(", arXiv")[0], page))
    return rows


def head(page: str) -> dict[str, str]:
    """What a page says of its policy in the table: the lines of the comment under its title."""
    lines = re.match(r"# [^\n]*\n\n<!--\n(.*?)-->", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)
    return dict(line.split(": ", 1) for line in lines[1].splitlines()) if lines else {}


def reference() -> str:
    """The constructors, for mkdocstrings."""
    options = "    options:\n      heading: kvsieve.{0}\n      toc_label: {0}\n"
    return "\n".join(f"::: {row.module}.{row.name}\n{options.format(row.name)}" for row in systems())


def table() -> str:
    """The table of policies."""
    lines = ["| policy | paper | keeps | position | memory |", "|---|---|---|---|---|"]
    for row in systems():
        cells = [f"[`{row.name}`]({row.page})", row.paper, *(head(row.page)[column] for column in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    for entry in config["nav"]:
        if "Policies" in entry:
            entry["Policies"] += [f"policies/{row.page}" for row in systems()]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARK.sub(lambda mark: {"the constructors": reference, "the table of all policies": table}[mark[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    html = FLAG.sub("", ROLE.sub(r"<code>\1</code>", html))
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
