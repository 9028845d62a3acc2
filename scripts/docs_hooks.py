"""A hook of mkdocs: what Python's Markdown shows otherwise than the reader should see it.

In docstrings, roles (``:meth:`pin```) become code, and the flags of doctest go. In tables a bar inside of code is written with a
backslash, which GitHub takes away and Python's Markdown leaves.
"""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):<code>~?([^<]+)</code>")
FLAG = re.compile(r"\s*(?:<span class=\"[^\"]*\">)?# doctest: \+SKIP(?:</span>)?")

CELL = re.compile(r"<td.*?</td>", re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    html = FLAG.sub("", ROLE.sub(r"<code>\1</code>", html))
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
