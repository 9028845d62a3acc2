"""What callers pass, and when calls fail: pads of their own, late failures, answers that end like filler, columns and positions."""

from __future__ import annotations

from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, pad_left
from kvsieve.errors import CacheMismatchError, StateError, UnsupportedError
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)


@pytest.mark.parametrize("turns", [1, 2])
def test_processors_see_the_pads_that_were_passed(turns: int) -> None:
    """Not token 0, which a row did not say: it would be punished for it."""
    model, pad = tiny.model(), 5
    rows = [tiny.ids(1, n, n)[0] for n in (12, 7)]
    rows = [torch.where(row < 6, row + 6, row) for row in rows]
    ids, mask = pad_left(rows)
    ids[mask == 0] = pad
    seen: list[list[list[int]]] = []

    class Looks:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids.tolist())
            return scores

    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": pad, "eos_token_id": None}
    model.generate(ids, attention_mask=mask, logits_processor=[Looks()], **how)
    stock, seen = seen, []
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.generate(ids, mask, logits_processor=[Looks()], **how)
        assert seen == stock
        if turns == 2:
            seen.clear()
            more, marks = tiny.ids(2, 3, 1) + 6, torch.ones(2, 3, dtype=torch.long)
            stream.generate(more.clamp(max=tiny.VOCAB - 1), marks, logits_processor=[Looks()], **how)
            assert [row[0] for row in seen[0]] == [stream.ids[0][0], pad]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        got = stream.generate(ids, mask, no_repeat_ngram_size=1, **how)
    for row, text in enumerate(rows):
        alone = model.generate(text[None], attention_mask=torch.ones(1, len(text), dtype=torch.long), no_repeat_ngram_size=1, **how)
        assert got[row, ids.shape[1] :].tolist() == alone[0, len(text) :].tolist()


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=["beams", "samples"])
def test_a_failure_when_the_best_one_is_read_changes_nothing(how: dict[str, Any]) -> None:
    model, prompt, others = tiny.model(), tiny.ids(1, 20), tiny.ids(1, 12, 3)
    how = {"do_sample": False, "max_new_tokens": 4, **how}
    forwards: list[int] = []

    def fail_at(last: int) -> Any:
        forwards.clear()

        def hook(*_: Any) -> None:
            forwards.append(0)
            if len(forwards) == last:
                raise MemoryError("no room")

        return model.model.layers[1].register_forward_pre_hook(hook)

    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.generate(prompt, do_sample=False, max_new_tokens=3)
        mark, before = stream.mark(), stream.ids[0].tolist()
        handle = fail_at(-1)
        stream.generate(others, **how)
        handle.remove()
        count = len(forwards)
        stream.rewind(mark)
        for last in (1, 2, count - 1, count):
            handle = fail_at(last)
            with pytest.raises(MemoryError):
                stream.generate(others, **how)
            handle.remove()
            assert stream.ids[0].tolist() == before
        got = stream.generate(others, do_sample=False, max_new_tokens=4)
        stream.rewind(mark)
        assert torch.equal(stream.generate(others, do_sample=False, max_new_tokens=4), got)


def test_an_answer_that_ends_with_the_pad_token_is_kept_whole() -> None:
    model, prompt = tiny.model(), tiny.ids(1, 40)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "num_beams": 3, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    last = int(model.generate(prompt, attention_mask=mask, pad_token_id=0, **how)[0, -1])
    want = model.generate(prompt, attention_mask=mask, pad_token_id=last, **how)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        got = stream.generate(prompt, mask, pad_token_id=last, **how)
        assert torch.equal(got, want)
        assert stream.ids[0].tolist() == want[0].tolist()


@BACKEND
@pytest.mark.parametrize("keep", [[0, 5], [14], [29], [28, 29], list(range(30)), [29, 28]], ids=str)
def test_scores_do_not_depend_on_which_logits_are_asked_for(keep: list[int], backend: str) -> None:
    model, text, more = tiny.model(), tiny.ids(1, 30), tiny.ids(1, 3, 8)
    found = []
    for wanted in (torch.tensor(keep), 0):
        with kvsieve.stream(model, kvsieve.SirLLM(64), backend) as stream, torch.no_grad():
            logits = model(text, past_key_values=stream.cache, logits_to_keep=wanted).logits
            model(more, past_key_values=stream.cache)
            found.append((logits, torch.tensor(stream.kept()[0].scores)))
    (some, got), (every, want) = found
    torch.testing.assert_close(some, every[:, keep], atol=1e-5, rtol=0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@BACKEND
@pytest.mark.parametrize(
    "positions", [[*range(20), *range(40, 44)], [*range(12), *range(12)], list(range(23, -1, -1))], ids=["gap", "packed", "back"]
)
def test_positions_that_keys_before_rotation_cannot_follow_are_refused(positions: list[int], backend: str) -> None:
    model, text, at = tiny.model(), tiny.ids(1, 24), torch.tensor([positions])
    for policy in (kvsieve.SirLLM(64), kvsieve.LMInfinite(64)):
        with kvsieve.stream(model, policy, backend) as stream, torch.no_grad():
            with pytest.raises(CacheMismatchError, match="leave position_ids out"):
                model(text, position_ids=at, past_key_values=stream.cache)
            assert stream.seen == 0
            want = model(text).logits
            got = model(text, position_ids=torch.arange(24)[None], past_key_values=stream.cache).logits
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@BACKEND
def test_a_row_may_begin_late_in_a_loop_of_ones_own(backend: str) -> None:
    """A left-padded batch, one column at a time."""
    model = tiny.model()
    rows = [tiny.ids(1, 9)[0], tiny.ids(1, 4, 2)[0]]
    ids, mask = pad_left(rows)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with kvsieve.stream(model, kvsieve.StreamingLLM(64), backend) as stream, torch.no_grad():
        for column in range(9):
            logits = model(
                ids[:, column : column + 1],
                attention_mask=mask[:, : column + 1],
                position_ids=at[:, column : column + 1],
                past_key_values=stream.cache,
            ).logits
        for row, text in enumerate(rows):
            torch.testing.assert_close(logits[row, -1], model(text[None]).logits[0, -1], atol=1e-4, rtol=0)


def test_feed_takes_what_a_tokenizer_returns() -> None:
    model, ids = tiny.model(), tiny.ids(1, 9)
    answer = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(**answer)
        stream.feed(answer)
        stream.feed(ids, mm_token_type_ids=torch.zeros_like(ids))
        assert stream.seen == 27
        with pytest.raises(UnsupportedError, match="pixel_values"):
            stream.feed(ids, pixel_values=torch.zeros(1))
        with pytest.raises(UnsupportedError, match="mm_token_type_ids"):
            stream.feed(ids, mm_token_type_ids=torch.ones_like(ids))
        assert stream.seen == 27


@BACKEND
@pytest.mark.parametrize("policy", ["full", "codes"])
def test_inference_mode_around_every_call(policy: str, backend: str) -> None:
    """What is stored under it is written to outside of it, and the other way round."""
    model = tiny.model()
    made = kvsieve.Full() if policy == "full" else kvsieve.Full() | kvsieve.Quantized(8, group=16)

    def turns(mode: bool) -> list[list[int]]:
        found = []
        with kvsieve.stream(model, made, backend) as stream:
            for turn in range(3):
                with torch.inference_mode(mode and turn < 2):
                    stream.generate(tiny.ids(1, 30, turn), do_sample=False, max_new_tokens=5)
                    mark = stream.mark()
                    stream.generate(tiny.ids(1, 7, 9), do_sample=False, max_new_tokens=3, num_beams=2)
                    stream.rewind(mark)
                    stream.end_turn()
                    with stream.fork() as fork:
                        found.append(fork.generate(tiny.ids(1, 4, 8), do_sample=False, max_new_tokens=5)[0].tolist())
        return found

    assert turns(True) == turns(False)


def test_another_setting_of_the_same_weights_is_another_model(tmp_path: Any) -> None:
    with kvsieve.stream(tiny.model(), kvsieve.Full()) as stream:
        stream.feed(tiny.ids(1, 9))
        stream.save(tmp_path / "s.safetensors")
    with pytest.raises(CacheMismatchError, match="weights"):
        kvsieve.load(tmp_path / "s.safetensors", tiny.model(rms_norm_eps=1e-3))
    kvsieve.load(tmp_path / "s.safetensors", tiny.model()).close()


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("policy", ["full", "sirllm", "chain", "h2o"])
def test_ids_of_32_bits_are_ids(policy: str, backend: str) -> None:
    """As the model's own embedding takes them; tokens are scored by them."""
    model, found = tiny.model(), []
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    for dtype in (torch.int64, torch.int32):
        with kvsieve.stream(model, tiny.POLICIES[policy](24), backend) as stream:
            first = forward(model, stream.cache, tiny.ids(2, 20).to(dtype), mask)
            then = forward(
                model, stream.cache, tiny.ids(2, 9, 3).to(dtype), torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], 1)
            )
            last = stream.generate(tiny.ids(2, 5, 4).to(dtype), max_new_tokens=3, do_sample=False)
            found.append([first, then, last, *stream.ids, *(torch.from_numpy(kept.scores) for kept in stream.kept())])
    for wide, narrow in zip(*found):
        torch.testing.assert_close(narrow, wide, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_cache_that_the_model_asks_for_by_itself_is_the_streams(turns: int) -> None:
    """Checkpoints name a cache in their generation settings; a call that names one is refused before anything is read."""
    model, plain = tiny.fresh(), tiny.fresh()
    model.generation_config.cache_implementation = "static"
    settings = GenerationConfig.from_dict(model.generation_config.to_dict())
    with kvsieve.stream(model, kvsieve.Full()) as stream, kvsieve.stream(plain, kvsieve.Full()) as other:
        for turn in range(turns):
            ids = tiny.ids(1, 20, turn)
            want = other.generate(ids, max_new_tokens=4, do_sample=False)
            how = {"generation_config": settings} if turn else {}
            assert torch.equal(stream.generate(ids, max_new_tokens=4, do_sample=False, **how), want)
        before = stream.seen
        for wrong in ({"cache_implementation": "dynamic"}, {"generation_config": GenerationConfig(cache_implementation="dynamic")}):
            with pytest.raises(StateError, match="leave cache_implementation out"):
                stream.generate(tiny.ids(1, 3), max_new_tokens=4, **wrong)
        assert stream.seen == before
        assert model.generation_config.cache_implementation == "static"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_turns_across_the_original_length_are_those_of_transformers_own_cache(kind: str) -> None:
    """What was read before is as it was read; each model is new, for its frequencies remember the longest text."""

    def model() -> Any:
        sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
        torch.manual_seed(0)
        if kind == "dynamic":
            return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, rope_parameters=rope)).eval()
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)], "original_max_position_embeddings": 32}
        longest = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
        return Phi3ForCausalLM(Phi3Config(**sizes, **longest, rope_parameters=rope)).eval()

    first, second = tiny.ids(1, 28, 1), tiny.ids(1, 7, 2)
    stock = model()
    cache = DynamicCache(config=stock.config)
    with torch.no_grad():
        want = [stock(ids, past_key_values=cache).logits for ids in (first, second)]
    ours = model()
    with kvsieve.stream(ours, kvsieve.Full()) as stream, torch.no_grad():
        for ids, logits in zip((first, second), want):
            torch.testing.assert_close(ours(ids, past_key_values=stream.cache).logits, logits, atol=1e-5, rtol=0)
