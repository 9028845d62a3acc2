"""Pieces of an answer are its text: characters whole, stop strings never, whatever the tokens are."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvsieve.serve.detokenize import MOST_TOGETHER, Pieces, Stops, text_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@functools.cache
def tokenizer(kind: str) -> Any:
    """Of bytes as GPT-2 writes them, with a few that are joined across characters; or SentencePiece's words and bytes."""
    if kind == "bytes":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        # "é" ends in A9 and "ã" begins with C3: a token that ends one character and begins the next
        joined = [("\u0123", "\u0123"), ("©", "Ã"), ("Ġ", "t")]
        vocabulary = {"<s>": 0, "</s>": 1} | {letter: at for at, letter in enumerate(letters, 2)}
        joined = [(a, b) for a, b in joined if a in vocabulary and b in vocabulary]
        vocabulary |= {a + b: len(vocabulary) + at for at, (a, b) in enumerate(joined)}
        made = Tokenizer(models.BPE(vocabulary, joined))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", ".", "é"]
        made = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def pieces(kind: str, ids: list[int]) -> list[str]:
    made = Pieces(tokenizer(kind))
    return [*(made.push(one) for one in ids), made.end()]


@given(ids=st.lists(st.integers(0, 258), max_size=50))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_bytes_are_the_text(ids: list[int]) -> None:
    assert "".join(pieces("bytes", ids)) == text_of(tokenizer("bytes"), ids)


@pytest.mark.parametrize("kind", ["bytes", "words"])
@given(text=TEXTS, special=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_text_are_the_text_and_whole_characters(kind: str, text: str, special: int) -> None:
    ids = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    ids.insert(min(special, len(ids)), tokenizer(kind).bos_token_id) if kind == "bytes" else None
    found = pieces(kind, ids)
    whole = text_of(tokenizer(kind), ids)
    assert "".join(found) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in found)


def test_a_piece_comes_with_the_token_that_completes_it() -> None:
    ids = tokenizer("bytes")("a €é.", add_special_tokens=False)["input_ids"]
    assert pieces("bytes", ids) == ["a", " ", "", "", "€", "", "é", ".", ""]


def test_a_space_before_a_word_is_kept_after_a_special_token() -> None:
    words = tokenizer("words")
    a, ends = words.convert_tokens_to_ids(["▁a", "</s>"])
    assert pieces("words", [a, ends, a]) == ["a", "", " a", ""]
    assert pieces("words", [a] * 40) == ["a", *[" a"] * 39, ""], "however many came before"


def test_the_first_word_has_the_space_that_it_has_behind_the_prompt() -> None:
    words = tokenizer("words")
    a, b = words.convert_tokens_to_ids(["▁a", "▁b"])
    assert Pieces(words).push(b) == "b"
    behind = Pieces(words, [a, words.eos_token_id])
    assert [behind.push(b), behind.push(a), behind.end()] == [" b", " a", ""]


def test_what_never_becomes_a_character_is_delivered_in_the_end() -> None:
    letters = tokenizer("bytes").get_vocab()
    half = letters[pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é")[0][0][0]]
    assert pieces("bytes", [half]) == ["", "\ufffd"]
    found = pieces("bytes", [half] * 3 * MOST_TOGETHER)
    assert "".join(found) == "\ufffd" * 3 * MOST_TOGETHER
    assert any(found[:-1]), "it is not waited for for ever"


def stopped(strings: list[str], parts: list[str]) -> tuple[list[str], str | None]:
    stops = Stops(strings)
    return [*(stops.push(part) for part in parts), stops.end()], stops.hit


@given(text=st.text("ab.", max_size=30), strings=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=4), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_text_is_cut_before_the_first_stop_string_however_it_comes(text: str, strings: list[str], data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parts = [text[lo:hi] for lo, hi in zip([0, *cuts], [*cuts, len(text)])]
    delivered, hit = stopped(strings, parts)
    firsts = [text.find(string) for string in strings if string in text]
    # In parts the string that is complete first wins; in whole the one that begins first.
    ends = [min((text[:end].find(s) for s in strings if s in text[:end]), default=None) for end in range(len(text) + 1)]
    assert (hit is not None) == bool(firsts)
    assert text.startswith("".join(delivered))
    if not firsts:
        assert "".join(delivered) == text
    else:
        assert len("".join(delivered)) in {end for end in ends if end is not None}
        assert not any(string in "".join(delivered) for string in strings)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert stopped(["</end>", "###"], ["one <", "/e", "lse ##", "# two"]) == (["one ", "", "</else ", "", ""], "###")
    assert stopped(["</end>"], ["one </en"]) == (["one ", "</en"], None)
    assert stopped([], ["one", " two"]) == (["one", " two", ""], None)
