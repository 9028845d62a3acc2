"""Calls of tools found in text, however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvsieve.serve.tool_calls import CLOSES, OPENS, Call, finder_of

HERMES = "{%- if tools %}<tools>{{ tools }}</tools> answer with <tool_call></tool_call>{% endif %}"
LLAMA = '<|start_header_id|>system<|end_header_id|> Respond in the format {"name": function name, "parameters": dictionary}.'
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("tide", "wind")]
TIDE = Call("tide", '{"at": "Brest é"}')
SAID = '{"name": "tide", "arguments": {"at": "Brest é"}}'

Row = tuple[str, str, str, list[Call]]

CASES: list[Row] = [
    (HERMES, SAID, SAID, []),
    (HERMES, f"{OPENS}\n{SAID}\n{CLOSES}", "", [TIDE]),
    (HERMES, f"Well.\n\n{OPENS}{SAID}{CLOSES}\n{OPENS}{SAID}{CLOSES}", "Well.", [TIDE, TIDE]),
    (HERMES, f"{OPENS}[{SAID}, {SAID}]{CLOSES}", "", [TIDE, TIDE]),
    (HERMES, f"{OPENS}{SAID}", "", [TIDE]),
    (HERMES, f'{OPENS}{{"name": "wind"}}{CLOSES}', "", [Call("wind", "{}")]),
    (HERMES, f'{OPENS}{{"name": "tide", "arguments": {json.dumps(TIDE.arguments)}}}{CLOSES}', "", [TIDE]),
    (HERMES, f"a {OPENS}tide(Brest){CLOSES} b", f"a {OPENS}tide(Brest){CLOSES} b", []),
    (HERMES, f"a {OPENS}{SAID[:-3]}", f"a {OPENS}{SAID[:-3]}", []),
    (HERMES, f"{OPENS}" + "[" * 5000, f"{OPENS}" + "[" * 5000, []),
    (HERMES, f'{OPENS}{{"name": 3, "arguments": {{}}}}{CLOSES}', f'{OPENS}{{"name": 3, "arguments": {{}}}}{CLOSES}', []),
    (HERMES, "1 < 2 <tool_ca", "1 < 2 <tool_ca", []),
    (HERMES, "ends with space \n", "ends with space \n", []),
    (LLAMA, SAID.replace("arguments", "parameters"), "", [TIDE]),
    (LLAMA, " " + SAID, "", [TIDE]),
    (LLAMA, SAID.replace("tide", "fish"), SAID.replace("tide", "fish"), []),
    (LLAMA, "At noon: " + SAID, "At noon: " + SAID, []),
    (LLAMA, SAID[:-1], SAID[:-1], []),
    (LLAMA, "{}", "{}", []),
    (LLAMA, "", "", []),
]


def found(template: str, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    finder = finder_of(template, TOOLS)
    assert finder is not None
    steps = [*(finder.push(piece) for piece in pieces), finder.end()]
    return "".join(text for text, _ in steps), [call for _, calls in steps for call in calls]


@pytest.mark.parametrize(("template", "said", "text", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 100_000])
def test_calls_are_found(template: str, said: str, text: str, calls: list[Call], size: int) -> None:
    assert found(template, [said[at : at + size] for at in range(0, len(said), size)]) == (text, calls)


PARTS = st.sampled_from([OPENS, CLOSES, SAID, "<", "tool_call", ">", " ", "\n", "words", "{", "}", "[", "]", ","])


@given(st.lists(PARTS, max_size=12), st.sampled_from([HERMES, LLAMA]), st.data())
def test_pieces_do_not_matter_and_nothing_is_lost(parts: list[str], template: str, data: st.DataObject) -> None:
    said = "".join(parts)
    whole = found(template, [said])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=6)))
    assert found(template, [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)])]) == whole
    if not whole[1]:
        assert whole[0] == said


def test_text_is_told_as_soon_as_it_cannot_be_a_call() -> None:
    finder = finder_of(HERMES, TOOLS)
    assert finder is not None
    assert finder.push("It is <b>noon</b>, <tool") == ("It is <b>noon</b>,", [])
    assert finder.push("s>") == (" <tools>", [])
    bare = finder_of(LLAMA, TOOLS)
    assert bare is not None
    assert [bare.push(piece)[0] for piece in (" ", "At", " {")] == ["", " At", " {"]


def test_calls_are_looked_for_where_a_template_and_a_client_know_tools() -> None:
    assert finder_of(HERMES, None) is None
    assert finder_of(HERMES, []) is None
    assert finder_of("{{ messages }}", TOOLS) is None
