"""The documentation as the tests read it: pages, their code blocks, tables and links, and what stands for a model's tokenizer."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = "# not run: "
"""The first line of a block that is not executed; the reason follows, and the reader sees both."""

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the line of the page on which the text begins."""

    page: Path
    language: str
    text: str
    line: int

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        first = self.text.partition("\n")[0]
        return first.removeprefix(NOT_RUN) if first.startswith(NOT_RUN) else None

    @property
    def where(self) -> str:
        """The page and line, as text."""
        return f"{name(self.page)}:{self.line}"

    def compiled(self) -> Any:
        """Its code, with the lines of the page."""
        return compile("\n" * (self.line - 1) + self.text, str(self.page), "exec")

    def needs(self, variable: str) -> bool:
        """Whether the code reads ``variable`` and never gives it a value."""
        found = {True: False, False: False}
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Name) and node.id == variable:
                found[isinstance(node.ctx, ast.Load)] = True
        return found[True] and not found[False]


def name(page: Path) -> str:
    """The page's path inside of the repository."""
    return page.relative_to(ROOT).as_posix()


def read(path: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def load(path: str) -> Any:
    """A script of the repository, as a module."""
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of ``page`` in those languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = (Block(page, m[1], m[2], text[: m.start()].count("\n") + 2) for m in _BLOCK.finditer(text))
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page without its blocks, line by line where it was."""
    return _BLOCK.sub(lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"))


def cells(row: str) -> list[str]:
    """The cells of a row of a table; a bar after a backslash belongs to its cell."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def tables(page: Path) -> Iterator[list[list[str]]]:
    """The tables of ``page``: rows of cells, the header first, without the line of dashes."""
    table: list[list[str]] = []
    for line in [*prose(page).splitlines(), ""]:
        if line.startswith("|"):
            if not re.fullmatch(r"[|\s:-]+", line):
                table.append(cells(line))
        elif table:
            yield table
            table = []


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks in the prose."""
    return [code.replace("\\|", "|") for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def links(page: Path) -> list[str]:
    """The targets of the page's links and pictures that are not on the web."""
    text = prose(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [target for target in found if not re.match(r"[a-z]+://", target)]


class Letters:
    """Stands for a tokenizer: one token a letter."""

    padding_side = "left"
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __call__(
        self, text: str | list[str], return_tensors: str | None = None, padding: bool = False, add_special_tokens: bool = True
    ) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        assert padding or len({len(one) for one in texts}) == 1, "texts of unlike length need padding=True"
        width = max(len(one) for one in texts)
        ids, mask = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(2))
        for row, one in enumerate(texts):
            ids[row, width - len(one) :] = torch.tensor([3 + ord(letter) % (tiny.VOCAB - 3) for letter in one])
            mask[row, width - len(one) :] = 1
        made = {"input_ids": ids, "attention_mask": mask}
        if return_tensors == "pt":
            return made
        return {name: x[0].tolist() if isinstance(text, str) else x.tolist() for name, x in made.items()}

    chat_template = "of test pages"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        text = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
        return text + "<assistant>" * add_generation_prompt

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return "".join(chr(97 + int(one) % 26) for one in ids)

    def batch_decode(self, rows: torch.Tensor) -> list[str]:
        return [self.decode(row) for row in rows]

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + at): at for at in range(26)}
