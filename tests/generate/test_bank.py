"""A bank at the end of a policy, with a model: what it changes, what it is filled by, whose it is, and what goes with it."""

from __future__ import annotations

from pathlib import Path

import kvsieve
import pytest
import tiny
import torch
from bank_cases import WINDOW, bank_of, numbers, opened, window, written
from drive import forward, forwards, pad_left
from kvsieve.errors import CacheMismatchError, StateError, UnsupportedError
from kvsieve.methods.parser import parse
from kvsieve.policy import FixedDistance, KeepAll
from kvsieve.runtime.bank import Banking
from tiny import BACKENDS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)
CHAIN = "streamingllm(12, sinks=2) >> sirllm(12, sinks=0, recent=0)"


# ------------------------------------------------------------------------------------------------------------------- definition


@BACKEND
def test_a_bank_that_is_empty_or_off_changes_nothing(backend: str) -> None:
    """Bit for bit what a stream gives that reads no bank, and what the window alone gives up to how keys are stored."""
    model, ids, found = tiny.model(), tiny.ids(1, 90), []
    for bank in (bank_of(bias=-float("inf")), bank_of(read_only=True)):
        with opened(bank, backend) as stream:
            found.append(forwards(model, stream.cache, ids, [60, 1]))
            assert stream.stats().stored_keys == "pre_rope"
    assert torch.equal(*found)
    with kvsieve.stream(model, window(), backend) as stream:
        want = forwards(model, stream.cache, ids, [60, 1])
    torch.testing.assert_close(found[0], want, atol=1e-4 * float(want.abs().max()), rtol=0)


@BACKEND
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "glm4"])
def test_a_bank_that_is_read_whole_is_a_memory_that_keeps_everything_at_one_distance(family: str, backend: str) -> None:
    """The chain is attention by planner and kernels, which know nothing of banks: sinks, caps, partial rotary alike."""
    if family != "llama" and backend == "reference":
        pytest.skip("the other families on one backend")
    model, ids = tiny.model(family), tiny.ids(2, 130)
    bank = bank_of(chunk=1, top_k=4096, capacity=4096, namespace=["a", "b"])
    with kvsieve.stream(model, window() >> bank, backend) as stream:
        got = forwards(model, stream.cache, ids, [60, 1, 1, 40, 1])
        assert written(bank, "a") == 130 - WINDOW
    chain = window() >> kvsieve.Memory(evict=KeepAll(), position=FixedDistance(WINDOW - 1))
    with kvsieve.stream(model, chain, backend) as stream:
        want = forwards(model, stream.cache, ids, [60, 1, 1, 40, 1])
    torch.testing.assert_close(got, want, atol=2e-4 * float(want.abs().max()), rtol=0)


@BACKEND
def test_backends_agree_where_chunks_are_found(backend: str) -> None:
    model, ids, found = tiny.model(), tiny.ids(1, 150), []
    for name in ("reference", backend):
        with opened(bank_of(bias=0.7), name) as stream:
            found.append(forwards(model, stream.cache, ids, [110, 1, 1, 30, 1]))
    torch.testing.assert_close(*found, atol=2e-4 * float(found[0].abs().max()), rtol=0)


def test_heads_find_chunks_of_their_own_or_the_same_ones() -> None:
    ids = tiny.ids(1, 120)
    for heads in (1, 2):
        model, logits = tiny.fresh(num_key_value_heads=heads), []
        for per_head in (True, False):
            with kvsieve.stream(model, window() >> bank_of(per_head=per_head, top_k=8)) as stream:
                logits.append(forwards(model, stream.cache, ids, [100, 20]))
        assert torch.equal(*logits) == (heads == 1), "one head chooses for all"


def test_a_forward_does_not_find_its_own_tokens() -> None:
    """The first forward over any text is that of a bank that is off; the next one finds what the first one left."""
    model, ids = tiny.model(), tiny.ids(1, 120)
    logits = []
    for bias in (0.0, -float("inf")):
        with opened(bank_of(bias=bias)) as stream:
            logits.append(forwards(model, stream.cache, ids, [100, 20]))
    assert torch.equal(logits[0][:, :100], logits[1][:, :100])
    assert not torch.allclose(logits[0][:, 100:], logits[1][:, 100:])


@BACKEND
@pytest.mark.parametrize("chunk", [90, 16])
def test_a_text_that_is_fed_reads_no_bank_where_answers_do(chunk: int, backend: str) -> None:
    """It is read as by a bank that is off; a turn, its prompt among it, is answered as by one that every query reads."""
    text, question = tiny.ids(1, 90), tiny.ids(1, 7, 1)
    streams = [opened(bank_of(**how), backend) for how in ({"reads": "answers"}, {"bias": -float("inf")}, {})]
    held = []
    for stream in streams:
        stream.feed(text, chunk=chunk)
        stores, runs = stream._engine.stores.values(), stream._engine.blocks.planner.runs(0, 0)
        held.append(torch.cat([x.flatten() for store in stores for x in store.read(runs)]))
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[0], held[2]) == (chunk == 90), "what a forward reads itself is not found by it"
    some, off, _ = streams
    banking = next(part for part in off._engine.parts if isinstance(part, Banking))
    banking.rule = banking.rule.like(bias=0.0)  # type: ignore[attr-defined]
    answers = [stream.generate(question, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
               for stream in (some, off)]  # fmt: skip
    assert all(torch.equal(*steps) for steps in zip(*(answer.logits for answer in answers)))
    nothing = bank_of(bias=-float("inf"))
    with opened(nothing, backend) as stream:
        stream.feed(text, chunk=chunk)
        unread = stream.generate(question, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert not torch.equal(unread.logits[0], answers[0].logits[0]), "the answer reads the bank"
    for stream in streams:
        stream.close()


def test_a_bias_moves_the_answer_from_the_window_to_the_bank() -> None:
    model, ids, logits = tiny.model(), tiny.ids(1, 100), []
    for bias in (-float("inf"), -60.0, -2.0, 0.0):
        with opened(bank_of(bias=bias)) as stream:
            logits.append(forwards(model, stream.cache, ids, [99, 1])[:, -1])
    off = [float((found - logits[0]).norm()) for found in logits]
    assert off[1] < 1e-3 * off[2]
    assert off[2] < off[3]


# ------------------------------------------------------------------------------------------------------------------- what is held


@BACKEND
@pytest.mark.parametrize("policy", ["streamingllm(24, sinks=2)", "sirllm(24, sinks=2, recent=4)", "lminfinite(23, sinks=2)", CHAIN])
def test_what_is_evicted_is_in_the_bank_once_and_nothing_else_is(policy: str, backend: str) -> None:
    """Every key that a stream without a budget holds is in the bank or still held."""
    model, ids = tiny.model(), tiny.ids(1, 90)
    bank = bank_of(bias=-float("inf"))
    with kvsieve.stream(model, parse(policy) >> bank, backend) as stream:
        for piece in ids.split([50, 1, 1, 20, 1, 17], dim=1):
            forward(model, stream.cache, piece)
            resident = stream._engine.blocks.resident
            assert written(bank) + resident == stream.seen
        stream.end_turn()
        assert written(bank) + stream._engine.blocks.resident == 90
        planner = stream._engine.planner
        runs = [run for memory in range(planner.num_memories) for run in planner.runs(memory, 0)]
        left = stream._engine.stores[0].read(runs)[0].transpose(0, 1).flatten(1)
    with kvsieve.stream(model, kvsieve.Memory(position=FixedDistance(0)), backend) as stream:
        forward(model, stream.cache, ids)
        every = stream._engine.stores[0].read(stream._engine.planner.runs(0, 0))[0].transpose(0, 1).flatten(1)
    # Keys of the first layer depend on the token alone: of each there are as many.
    both = torch.cat([numbers(bank), left])
    assert len(both) == 90
    assert torch.equal(*((torch.cdist(every, keys) < 1e-3).sum(1) for keys in (both, every)))
    if policy.startswith("streamingllm(24"):
        torch.testing.assert_close(numbers(bank), every[2 : 2 + 90 - WINDOW], atol=1e-4, rtol=0)


def test_the_oldest_tokens_go_first_and_numbers_stay() -> None:
    bank = bank_of(capacity=32)
    with opened(bank) as stream:
        for piece in tiny.ids(1, 150).split(10, dim=1):
            stream.feed(piece)
            stats = bank.stats()
            assert stats.tokens <= 32
    (space,) = stats.namespaces.values()
    assert (space.written, space.first) == (150 - WINDOW, 150 - WINDOW - space.tokens)
    assert (stats.tokens, stats.capacity) == (space.tokens, 32)
    assert 28 < space.tokens <= 32
    assert stats.bytes_held >= space.tokens * stream._engine.facts.bytes_per_token


def test_read_only_never_grows(tmp_path: Path) -> None:
    path = tmp_path / "a.bank"
    with bank_of(path=path) as bank:
        bank.ingest(tiny.model(), tiny.ids(1, 80), window=WINDOW)
    before = path.read_bytes()
    reader = kvsieve.MemoryBank.load(path, read_only=True)
    with opened(reader) as stream, opened(reader) as other:
        for one in (stream, other):
            one.feed(tiny.ids(1, 100))
        assert written(reader) == 80
        with pytest.raises(StateError, match="read-only"):
            stream.remember()
    with pytest.raises(StateError, match="read-only"):
        reader.ingest(tiny.model(), tiny.ids(1, 9))
    reader.close()
    assert path.read_bytes() == before


@BACKEND
def test_a_forward_that_dies_leaves_the_bank(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.model(), tiny.ids(1, 90)
    bank, answers = bank_of(), []
    with opened(bank, backend) as stream:
        forward(model, stream.cache, ids[:, :60])
        before = written(bank)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].mlp, "forward", lambda x: (_ for _ in ()).throw(MemoryError("none left")))
            with pytest.raises(MemoryError):
                forward(model, stream.cache, ids[:, 60:])
        assert written(bank) == before
        answers.append(forward(model, stream.cache, ids[:, 60:]))
    with opened(bank_of(), backend) as stream:
        answers.append(forwards(model, stream.cache, ids, [60, 30])[:, 60:])
    assert torch.equal(*answers)


@BACKEND
def test_marks_and_crops_store_nothing_twice(backend: str) -> None:
    model, ids = tiny.model(), tiny.ids(1, 120)
    bank = bank_of()
    with opened(bank, backend) as stream:
        forward(model, stream.cache, ids[:, :60])
        mark, held = stream.mark(), numbers(bank)
        want = forwards(model, stream.cache, ids[:, 60:], [30, 1])
        after = numbers(bank)
        for _ in range(2):
            stream.rewind(mark)
            assert torch.equal(numbers(bank), held)
            assert torch.equal(forwards(model, stream.cache, ids[:, 60:], [30, 1]), want)
            assert torch.equal(numbers(bank), after)
        with pytest.raises(StateError, match=r"cannot forget 3 tokens.*at most 0 can be forgotten"):
            stream.cache.crop(-3)
        with pytest.raises(StateError, match="cannot forget"):
            stream.cache.crop(-120)
        assert torch.equal(numbers(bank), after)
    with opened(bank_of(), backend) as stream:
        forward(model, stream.cache, ids[:, :20])
        stream.cache.crop(-5)
        got = forwards(model, stream.cache, ids[:, 15:], [45, 30, 1])[:, 45:]
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)


def test_a_fork_remembers_for_itself() -> None:
    model, ids = tiny.model(), tiny.ids(1, 120)
    bank = bank_of()
    with opened(bank) as stream:
        stream.feed(ids[:, :60])
        held = numbers(bank)
        with stream.fork() as fork:
            forwards(model, fork.cache, ids[:, 60:], [30, 1])
            assert torch.equal(numbers(bank), held)
            part = fork._engine.parts.the(Banking)
            assert part.rows[0].entries.written == 120 - WINDOW
            with pytest.raises(StateError, match="a fork leaves the bank"):
                fork.remember()
            with pytest.raises(UnsupportedError, match="belongs to a fork"):
                fork.save("never.safetensors")
        stream.feed(ids[:, 60:])
        assert written(bank) == 120 - WINDOW
        assert torch.equal(numbers(bank)[: len(held)], held)


def test_pinned_tokens_stay_and_the_others_are_remembered() -> None:
    bank = bank_of()
    with opened(bank) as stream:
        stream.pin(30, 36)
        for piece in tiny.ids(1, 60).split(10, dim=1):
            stream.feed(piece)
            assert written(bank) + stream._engine.blocks.resident == stream.seen
        assert {*range(30, 36)} <= {*stream.kept()[0].positions.tolist()}


def test_a_bank_that_cannot_be_filled_is_said_at_every_later_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(bank_of()) as stream:
        stream.feed(tiny.ids(1, 20))
        with monkeypatch.context() as patched:
            patched.setattr("kvsieve.bank.entries.Segment.write", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
            with pytest.raises(MemoryError):
                stream.feed(tiny.ids(1, 20))
        with pytest.raises(StateError, match="filling the bank failed"):
            stream.feed(tiny.ids(1, 20))
        stream.reset()
        stream.feed(tiny.ids(1, 40))


def test_tokens_that_are_evicted_by_name_are_not_remembered() -> None:
    bank = bank_of()
    with opened(bank) as stream:
        stream.feed(tiny.ids(1, 20))
        stream.evict(4, 12)
        assert written(bank) == 0
        stream.feed(tiny.ids(1, 40, 1))
        assert written(bank) + stream._engine.blocks.resident == 60 - 8


# ------------------------------------------------------------------------------------------------------------------- namespaces


@BACKEND
def test_rows_and_users_never_see_each_others_entries(backend: str) -> None:
    """Both have read the same words, with other answers after them: each row of a batch gives what it gives alone."""
    model, needle = tiny.model(), tiny.ids(1, 20, 5)
    texts = {name: torch.cat([tiny.ids(1, 30, 6), needle, tiny.ids(1, 6, at)], 1) for at, name in enumerate(("ann", "bob"), 10)}
    bank = bank_of()
    for name, text in texts.items():
        assert bank.ingest(model, text, namespace=name, window=WINDOW, backend=backend) == text.shape[1]
    other = bank_of()
    other.ingest(model, texts["ann"], namespace="ann", window=WINDOW, backend=backend)
    asked = torch.cat([tiny.ids(1, 8, 7), needle], 1)

    def ask(bank: kvsieve.MemoryBank, *names: str) -> torch.Tensor:
        with opened(bank.namespace(names).like(read_only=True), backend) as stream:
            return forward(model, stream.cache, asked.expand(len(names), -1))[:, -1]

    alone = {name: ask(bank, name) for name in texts}
    assert not torch.allclose(alone["ann"], alone["bob"])
    assert torch.equal(ask(other, "ann"), alone["ann"])
    assert not torch.allclose(ask(other, "bob"), alone["bob"])
    for names in (("ann", "bob"), ("bob", "ann")):
        got = ask(bank, *names)
        torch.testing.assert_close(got, torch.cat([alone[name] for name in names]), atol=1e-4 * float(got.abs().max()), rtol=0)


def test_padded_rows_write_to_namespaces_of_their_own() -> None:
    model, rows = tiny.model(), [tiny.ids(1, n, n)[0] for n in (90, 57)]
    ids, mask = pad_left(rows)
    both = bank_of(namespace=["a", "b"], bias=-float("inf"))
    with opened(both) as stream:
        forwards(model, stream.cache, ids, [60, 1], mask)
    for name, text in zip("ab", rows):
        alone = bank_of(bias=-float("inf"))
        with opened(alone) as stream:
            forwards(model, stream.cache, text[None], [40, 1])
        torch.testing.assert_close(numbers(both, name), numbers(alone), atol=1e-4, rtol=0)


def test_a_batch_needs_a_name_for_each_row() -> None:
    bank = bank_of()
    for names, rows in (("a", 2), (["a", "b"], 1), (["a", "b"], 3)):
        with opened(bank.namespace(names)) as stream, pytest.raises(CacheMismatchError, match="name one for each"):
            stream.feed(tiny.ids(rows, 9))
    with opened(bank) as stream:
        out = tiny.model().generate(tiny.ids(1, 40), past_key_values=stream.cache, num_beams=2, max_new_tokens=3, do_sample=False)
        assert out.shape[0] == 1
    assert bank.book.names == ["default"]


def test_a_namespace_has_one_writing_stream() -> None:
    bank = bank_of()
    with opened(bank) as stream:
        with pytest.raises(StateError, match="written by another stream"):
            opened(bank)
        with pytest.raises(StateError, match="written by another stream"):
            bank.ingest(tiny.model(), tiny.ids(1, 9))
        with pytest.raises(StateError, match="written by another stream"):
            bank.forget("default")
        with opened(bank.namespace("other")) as beside:
            beside.feed(tiny.ids(1, 60))
        stream.feed(tiny.ids(1, 70))
    with opened(bank) as stream:
        stream.feed(tiny.ids(1, 9))
    assert {name: space.written for name, space in bank.stats().namespaces.items()} == {"other": 36, "default": 46}
    bank.forget("other")
    assert bank.book.names == ["default"]


# ---------------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_held_as_they_are(dtype: torch.dtype) -> None:
    model, bank = tiny.model(dtype=dtype), bank_of()
    with kvsieve.stream(model, window() >> bank, "cpu") as stream:
        stream.feed(tiny.ids(1, 60))
        logits = forward(model, stream.cache, tiny.ids(1, 1, 9))
        assert logits.isfinite().all()
    assert bank.book.entries("default").pieces[0].segment.keys[0].dtype == dtype


def test_bytes_of_the_bank_are_counted() -> None:
    bank = bank_of()
    with opened(bank) as stream:
        stream.feed(tiny.ids(1, 150))
        stats, stored = stream.stats(), sum(layer.bytes_held for layer in stream.stats().layers)
        assert stats.bytes_held == stored + bank.stats().bytes_held
        assert stats.bytes_full == 150 * stream._engine.facts.bytes_per_token


def test_joining_is_refused() -> None:
    with opened(bank_of()) as stream:
        stream.feed(tiny.ids(1, 9))
        with stream.fork() as one, stream.fork() as other:
            for fork in (one, other):
                fork.feed(tiny.ids(1, 5))
            with pytest.raises(UnsupportedError):
                stream.join([one, other])


def test_models_whose_keys_cannot_be_moved_are_refused() -> None:
    model = tiny.fresh(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedError, match="cannot re-place"):
        kvsieve.stream(model, window() >> bank_of())


def test_a_mark_from_before_the_first_token_has_the_bank_as_it_was() -> None:
    """Also what the bank held for others before."""
    bank = kvsieve.MemoryBank(chunk=4, top_k=8)
    with kvsieve.stream(tiny.model(), kvsieve.StreamingLLM(24, sinks=2) >> bank) as stream:
        mark = stream.mark()
        said = []
        for _ in range(2):
            said.append(stream.generate(tiny.ids(1, 90, 3), max_new_tokens=6, do_sample=False).tolist())
            held = bank.stats().tokens
            assert held > 20
            stream.rewind(mark)
            assert bank.stats().tokens == 0
        assert said[0] == said[1]
        stream.feed(tiny.ids(1, 90, 3))
        stream.remember()
        held, mark = bank.stats().tokens, stream.mark()
        stream.feed(tiny.ids(1, 90, 4))
        assert bank.stats().tokens > held
        stream.rewind(mark)
        assert bank.stats().tokens == held
