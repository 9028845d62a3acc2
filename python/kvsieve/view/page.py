"""One self-contained page of a recording: `page.html`, with its style, its script and the recording inside.

Nothing of a recording is ever read as HTML or as a script: it lies in the page as JSON whose angle brackets are escaped, the script
writes it as text, and the page's own policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

__all__ = ["page"]

_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def page(recording: Mapping[str, Any], *, title: str = "") -> str:
    """The page of a recording, as :func:`kvsieve.files.recording_file.read` returns it."""
    template, style, script = (_part(f"page.{kind}") for kind in ("html", "css", "js"))
    policy = f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; form-action 'none'"
    values = {
        "@CSP@": policy,
        "@TITLE@": escape(title or f"{recording['policy']}: a recording of kvsieve"),
        "@STYLE@": style,
        "@RECORDING@": json.dumps(recording, ensure_ascii=True, allow_nan=False).translate(_ESCAPED),
        "@SCRIPT@": script,
    }
    # Split, and not replaced: what is put in may hold such a name.
    for name, value in values.items():
        before, _, after = template.partition(name)
        values[name], template = before + value, after
    return "".join(values.values()) + template


def _part(name: str) -> str:
    return (files("kvsieve.view") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"
