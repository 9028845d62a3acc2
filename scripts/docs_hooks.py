"""A hook of mkdocs: roles in docstrings (``:meth:`pin```), which Markdown does not know, are shown as code."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(r"<code>\1</code>", html)
