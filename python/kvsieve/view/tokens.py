"""A page that shows what a memory forgot: faded where a token is gone, coloured by score where it stays.

One file, no script, no external resource; it reads in light and dark and in print, and a forgotten token is struck
lightly as well as faded, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["NUM_LEVELS", "TokenMark", "TokenSection", "score_edges", "tokens_page"]

NUM_LEVELS = 5


@dataclass(frozen=True)
class TokenMark:
    """One token of the text: is it resident, with which score (nan: the policy has none), is it worth finding."""

    text: str
    position: int
    kept: bool
    score: float = math.nan
    marked: bool = False


@dataclass(frozen=True)
class TokenSection:
    """One memory's view of a text."""

    title: str
    caption: str
    tokens: Sequence[TokenMark]


def score_edges(scores: Sequence[float], levels: int = NUM_LEVELS) -> list[float]:
    """The `levels - 1` inner quantiles that split the finite `scores` into equally full levels; `[]` for none."""
    finite = sorted(score for score in scores if math.isfinite(score))
    if not finite:
        return []
    return [finite[min(len(finite) - 1, len(finite) * i // levels)] for i in range(1, levels)]


def tokens_page(
    sections: Sequence[TokenSection], *, title: str, intro: str = "", unit: str = "nats", marked: str = "marked"
) -> str:
    """A self-contained HTML page with one section a memory.

    All text is escaped. A token is a `span` of class `t`, plus `kept` or `gone`, plus `s0` to `s4` for the level of a
    kept token's score within its section, plus `mark` for tokens to look for, which the legend calls `marked`.
    """
    nav = "".join(f'<li><a href="#m{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections))
    body = "\n".join(_section(i, section, unit) for i, section in enumerate(sections))
    return _PAGE.format(title=escape(title), intro=escape(intro), nav=nav, body=body, style=_STYLE, legend=_legend(unit, marked))


def _section(index: int, section: TokenSection, unit: str) -> str:
    edges = score_edges([token.score for token in section.tokens if token.kept])
    num_kept = sum(token.kept for token in section.tokens)
    spans = "".join(_span(token, edges, unit) for token in section.tokens)
    return (
        f'<section id="m{index}"><h2>{escape(section.title)}</h2>'
        f"<p>{escape(section.caption)} <b>{num_kept:,} of {len(section.tokens):,}</b> tokens are resident.</p>"
        f'<div class="text">{spans}</div></section>'
    )


def _span(token: TokenMark, edges: Sequence[float], unit: str) -> str:
    classes = ["t", "kept" if token.kept else "gone"]
    hint = f"position {token.position:,}"
    if token.kept and math.isfinite(token.score):
        classes.append(f"s{bisect_right(edges, token.score)}")
        hint += f", score {token.score:.2f} {unit}"
    if not token.kept:
        hint += ", forgotten"
    if token.marked:
        classes.append("mark")
    return f'<span class="{" ".join(classes)}" title="{escape(hint)}">{escape(token.text)}</span>'


def _legend(unit: str, marked: str) -> str:
    levels = "".join(f'<span class="t kept s{i}">&nbsp;{i + 1}&nbsp;</span>' for i in range(NUM_LEVELS))
    return (
        '<span><span class="t gone">forgotten</span></span>'
        '<span><span class="t kept">kept</span> without a score</span>'
        f"<span>kept, score from low to high ({escape(unit)}, fifths of each section): {levels}</span>"
        f'<span><span class="t kept mark">{escape(marked)}</span></span>'
    )


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1a1a;--dim:#595959;--line:#d0d0d0;--mark:#b3261e;
--k:#e8e8e8;--s0:#e3eef9;--s1:#c6dff2;--s2:#9dcae8;--s3:#fdd49e;--s4:#fdae6b}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#ececec;--dim:#a0a0a0;--line:#3a3d42;--mark:#ff8a80;
--k:#34373c;--s0:#1d2b3a;--s1:#1f3f5b;--s2:#23597f;--s3:#7a4a12;--s4:#a3560c}}
body{background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;
padding:0 1rem}
a{color:inherit}h1{font-size:1.6rem;margin-bottom:.3rem}h2{font-size:1.2rem;margin:2rem 0 .2rem}
p,ul{margin:.3rem 0 .8rem;color:var(--dim)}p b{color:var(--fg)}nav ul{display:flex;flex-wrap:wrap;gap:0 1.5rem;
padding:0;list-style:none}
.legend{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem;border:1px solid var(--line);border-radius:.4rem;
padding:.6rem .8rem;font-size:.9rem;position:sticky;top:0;background:var(--bg)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.75 ui-monospace,monospace;border:1px solid var(--line);
border-radius:.4rem;padding:.8rem}
.t{border-radius:.2rem;padding:.1em 0}.t:hover{outline:1px solid var(--fg)}
.gone{opacity:.38;text-decoration:line-through;text-decoration-thickness:1px}
.kept{background:var(--k)}.s0{background:var(--s0)}.s1{background:var(--s1)}.s2{background:var(--s2)}
.s3{background:var(--s3)}.s4{background:var(--s4)}
.mark{opacity:1;border-bottom:3px solid var(--mark)}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><p>{intro}</p><nav><ul>{nav}</ul></nav><div class="legend">{legend}</div>
{body}
</body></html>
"""
