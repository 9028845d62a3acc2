"""What a bank is given and what lasts of it, with a model: texts that are ingested, files of banks, sessions with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from bank_cases import WINDOW, bank_of, numbers, opened, window, written
from drive import forwards
from kvsieve.errors import CacheMismatchError, PolicyError, StateError
from pages import Letters
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


# --------------------------------------------------------------------------------------------------------------------- ingesting


@BACKEND
def test_a_text_is_ingested_to_its_last_token(backend: str) -> None:
    model, bank = tiny.model(), bank_of()
    text = "The sea is wide, and those who cross it tell of it. " * 2
    tokenizer: Any = Letters()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert bank.ingest(model, ids[0], window=WINDOW, backend=backend) == ids.shape[1]
    (space,) = bank.stats().namespaces.values()
    assert (space.tokens, space.pending) == (ids.shape[1], 0)
    two = bank_of()
    with kvsieve.stream(model, kvsieve.StreamingLLM(WINDOW) >> two.like(bias=-float("inf")), backend) as stream:
        assert two.ingest(stream, ids) == ids.shape[1]
        assert stream.seen == 0
        assert two.ingest(stream, ids) == ids.shape[1]
    torch.testing.assert_close(numbers(two)[: ids.shape[1]], numbers(bank)[: ids.shape[1]], atol=1e-5, rtol=0)
    with pytest.raises(PolicyError, match="needs a tokenizer"):
        bank.ingest(model, text)
    with opened(bank_of()) as stream, pytest.raises(StateError, match="no bank, or another one"):
        bank.ingest(stream, ids)


def test_what_a_conversation_leaves_is_remembered() -> None:
    bank = bank_of()
    with opened(bank) as stream:
        out = stream.generate(tiny.ids(1, 50), max_new_tokens=8, do_sample=False)
        seen, evicted = stream.seen, written(bank)
        assert evicted == seen - WINDOW
        stream.remember()
        assert (written(bank), stream.seen) == (seen, 0)
        assert bank.stats().namespaces["default"].pending == 0
        again = stream.generate(tiny.ids(1, 50), max_new_tokens=8, do_sample=False)
        assert out.shape == again.shape
        assert written(bank) == seen + evicted
    with kvsieve.stream(tiny.model(), kvsieve.Full() >> bank.namespace("all").like(distance=40)) as stream:
        stream.feed(tiny.ids(1, 70))
        assert written(bank, "all") == 0
        stream.remember()
        assert written(bank, "all") == 70
    with kvsieve.stream(tiny.model(), window()) as stream, pytest.raises(StateError, match="has no bank"):
        stream.remember()


# ------------------------------------------------------------------------------------------------------------------- persistence


@BACKEND
def test_a_bank_that_was_saved_gives_the_same_logits(tmp_path: Path, backend: str) -> None:
    model, path, found = tiny.model(), tmp_path / "a.bank", []
    with bank_of(path=path, capacity=64) as bank:
        bank.ingest(model, tiny.ids(1, 150), window=WINDOW, backend=backend)
        bank.ingest(model, tiny.ids(1, 51, 4), window=WINDOW, backend=backend)
        with opened(bank.namespace("other"), backend) as stream:
            stream.feed(tiny.ids(1, 33))
        with opened(bank.like(read_only=True), backend) as stream:
            found.append(forwards(model, stream.cache, tiny.ids(1, 40, 2), [30, 1]))
        stats = bank.stats()
    loaded = kvsieve.MemoryBank.load(path, top_k=16)
    assert loaded.stats().namespaces == stats.namespaces
    assert (loaded.chunk, loaded.capacity) == (4, 64)
    with opened(loaded.like(read_only=True), backend) as stream:
        found.append(forwards(model, stream.cache, tiny.ids(1, 40, 2), [30, 1]))
    assert torch.equal(*found)
    loaded.close()


def test_a_bank_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    with bank_of(path=path, layers=[1]) as bank:
        bank.ingest(tiny.model(), tiny.ids(1, 40), window=WINDOW, tokenizer=Vocabulary("abc"))
        assert [layer.index for layer in bank.book.shape.layers] == [1]  # type: ignore[union-attr]
    bank = kvsieve.MemoryBank.load(path)
    for other, said in (
        (tiny.model(seed=1), "other weights or configuration"),
        (tiny.model(dtype=torch.bfloat16), "the bank holds"),
        (tiny.model("mistral"), "other model class"),
        (tiny.model(rms_norm_eps=1e-3), "other weights or configuration"),
        (tiny.fresh(rope_parameters={"rope_type": "default", "rope_theta": 5e4}), "other rotary positions"),
    ):
        with pytest.raises(CacheMismatchError, match=said):
            kvsieve.stream(other, window() >> bank)
    with pytest.raises(CacheMismatchError, match="other tokenizer"):
        bank.ingest(tiny.model(), tiny.ids(1, 40), tokenizer=Vocabulary("abd"))
    bank.ingest(tiny.model(), tiny.ids(1, 40), tokenizer=Vocabulary("abc"))
    bank.close()
    with pytest.raises(PolicyError, match="are no full-attention layers"):
        kvsieve.stream(tiny.model(), window() >> bank_of(layers=[1, 9]))


class Vocabulary:
    """As much of a tokenizer as its fingerprint looks at."""

    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, letters: str) -> None:
        self.letters = letters

    def get_vocab(self) -> dict[str, int]:
        return {letter: at for at, letter in enumerate(self.letters)}


@BACKEND
def test_a_session_goes_on_with_its_bank(tmp_path: Path, backend: str) -> None:
    model, file, bank = tiny.model(), tmp_path / "a.safetensors", bank_of()
    with opened(bank, backend) as stream:
        forwards(model, stream.cache, tiny.ids(1, 75), [60, 1])
        stream.save(file)
        mark = stream.mark()
        want = forwards(model, stream.cache, tiny.ids(1, 20, 3), [1])
        stream.rewind(mark)
    with pytest.raises(CacheMismatchError, match=r"51 tokens had been written.*now it is 0"):
        kvsieve.load(file, model, backend)
    with kvsieve.load(file, model, backend, bank=bank) as stream:
        got = forwards(model, stream.cache, tiny.ids(1, 20, 3), [1])
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)
    with pytest.raises(CacheMismatchError, match=r"51 tokens had been written.*now it is 71"):
        kvsieve.load(file, model, backend, bank=bank)
    assert not bank.book._writers
    with kvsieve.stream(model, window(), backend) as stream:
        stream.feed(tiny.ids(1, 9))
        stream.save(file)
    with pytest.raises(PolicyError, match="has no bank"):
        kvsieve.load(file, model, backend, bank=bank)


def test_a_session_finds_its_banks_file(tmp_path: Path) -> None:
    model, file, path = tiny.model(), tmp_path / "a.safetensors", tmp_path / "a.bank"
    with bank_of(path=path) as bank, opened(bank) as stream:
        stream.feed(tiny.ids(1, 75))
        stream.save(file)
    with kvsieve.load(file, model) as stream:
        loaded: Any = stream.policy.bank
        assert written(loaded) == 75 - WINDOW
        with pytest.raises(StateError, match="a stream writes it"):
            loaded.close()
    loaded.close()
    path.unlink()
    with pytest.raises(CacheMismatchError, match="now it is 0"):
        kvsieve.load(file, model)
