"""Models whose layers slide over a window beside full ones: everything a stream does holds for both kinds of layers.

The right values are the stock model's over the whole text of one row, without a stream.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kvsieve
import pytest
import tiny
import torch
from drive import forward, forwards, greedy, pad_left, same_memory, snapshot, solo
from kvsieve.errors import CacheMismatchError, UnsupportedModelError

HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
MIXES: dict[str, Any] = {
    "gemma2": lambda **changes: tiny.model("gemma2", **changes),
    "gemma3": lambda **changes: tiny.model("gemma3", **changes),
    "gpt_oss": lambda **changes: tiny.model("gpt_oss", **changes),
    "cohere2": lambda **changes: tiny.model("cohere2", **changes),
    "ministral": lambda **changes: tiny.model("ministral", **changes),
    # Here the sliding layer comes last.
    "qwen2": lambda **changes: tiny.model(
        "qwen2", **{"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 24, **changes}
    ),
}
FAMILY = pytest.mark.parametrize("family", list(MIXES))
BACKEND = pytest.mark.parametrize("backend", tiny.BACKENDS)
ROOMY = {name: tiny.POLICIES[name](1024) for name in ("full", "streaming", "sirllm", "snapkv")}
POLICY = pytest.mark.parametrize("policy", list(ROOMY))


def longer(texts: list[torch.Tensor], *parts: Any) -> list[torch.Tensor]:
    """Each row's text and what came after it."""
    tensors = [[torch.as_tensor(part[row], dtype=torch.long) for part in parts] for row in range(len(texts))]
    return [torch.cat([text, *rest]) for text, rest in zip(texts, tensors)]


@torch.no_grad()
def stock(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


# ----------------------------------------------------------------------------------------------------------------- the arithmetic


@BACKEND
@FAMILY
@pytest.mark.parametrize("window", [1, 2, 5, 24, 4096])
def test_logits_are_the_stock_models(family: str, backend: str, window: int) -> None:
    model, ids = MIXES[family](sliding_window=window), tiny.ids(1, 32)
    want = stock(model, ids)
    for chunks in ([32], [25, 1, 1, 5], [1]):
        with kvsieve.stream(model, kvsieve.Full(), backend) as stream:
            close(forwards(model, stream.cache, ids, chunks), want)


@FAMILY
def test_a_prompt_longer_than_one_piece(family: str) -> None:
    model, ids = MIXES[family](), tiny.ids(2, 1100)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        close(forwards(model, stream.cache, ids, [1090, 1]), stock(model, ids))


@FAMILY
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whichever_attention_the_model_has(family: str, attention: str) -> None:
    model = copy.deepcopy(MIXES[family]())
    if attention == "sdpa" and not model._supports_sdpa:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            model.set_attn_implementation(attention)
        return
    model.set_attn_implementation(attention)
    ids = tiny.ids(2, 60)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        close(forwards(model, stream.cache, ids, [40, 1, 5]), stock(model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    # Of four experts all: which two are asked may depend on the last bit, and then everything does.
    experts = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}
    model, ids = MIXES[family](dtype=dtype, **experts), tiny.ids(2, 60)
    exact, rounded = stock(MIXES[family](**experts), ids), stock(model, ids)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        got = forwards(model, stream.cache, ids, [40, 1, 5])
    assert float((got.float() - exact).abs().max()) < 2 * float((rounded.float() - exact).abs().max())


# ------------------------------------------------------------------------------------------------------------------------- rows


@FAMILY
@pytest.mark.parametrize(("policy", "window"), [*((policy, 24) for policy in ROOMY), ("full", 4096), ("sirllm", 4096)])
def test_padded_rows_over_three_turns_answer_as_alone(family: str, policy: str, window: int) -> None:
    model = MIXES[family](sliding_window=window)
    texts = [tiny.ids(1, 30, 1)[0], tiny.ids(1, 10, 2)[0], tiny.ids(1, 55, 3)[0]]
    turns = [[tiny.ids(1, n, 7 * n + row)[0] for row, n in enumerate(lens)] for lens in ((3, 40, 11), (26, 1, 9))]
    with kvsieve.stream(model, ROOMY[policy]) as stream:
        said = stream.generate(*pad_left(texts), **HOW)[:, 55:].tolist()
        assert said == solo(model, texts)
        for new in turns:
            texts = longer(texts, said, new)
            batch, mask = pad_left(new)
            said = stream.generate(batch, mask, **HOW)[:, batch.shape[1] :].tolist()
            assert said == solo(model, texts)


@FAMILY
def test_padded_rows_read_in_pieces(family: str) -> None:
    model, rows = MIXES[family](), [tiny.ids(1, 61, 1)[0], tiny.ids(1, 20, 2)[0]]
    more = [tiny.ids(1, 2, 3)[0], tiny.ids(1, 33, 4)[0]]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(*pad_left(rows), chunk=7)
        stream.feed(*pad_left(more), chunk=5)
        question = tiny.ids(2, 4, 5)
        said = stream.generate(question, **HOW)[:, 4:].tolist()
    assert said == solo(model, longer(rows, more, question))


@FAMILY
def test_a_padded_batch_of_model_generate(family: str) -> None:
    model, rows = MIXES[family](), [tiny.ids(1, 61, 1)[0], tiny.ids(1, 20, 2)[0]]
    batch, mask = pad_left(rows)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        said = model.generate(batch, attention_mask=mask, past_key_values=stream.cache, **{**HOW, "max_new_tokens": 30})
    assert said[:, 61:].tolist() == solo(model, rows, 30)


@FAMILY
def test_rows_that_stop_early_hold_what_they_said(family: str) -> None:
    model, rows, more = MIXES[family](), [tiny.ids(1, 30, 1)[0], tiny.ids(1, 41, 2)[0]], tiny.ids(2, 5, 3)
    long = solo(model, rows, 12)
    ends = next((t, long[0].index(t)) for t in long[0] if t not in long[1])
    said = [long[0][: ends[1] + 1], long[1]]
    batch, mask = pad_left(rows)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.generate(batch, mask, do_sample=False, max_new_tokens=12, eos_token_id=ends[0], pad_token_id=0)
        assert stream.generate(more, **HOW)[:, 5:].tolist() == solo(model, longer(rows, said, more))


@FAMILY
def test_rows_are_repeated_selected_and_reordered(family: str) -> None:
    model, prefix = MIXES[family](), tiny.ids(1, 40)
    questions = [tiny.ids(1, n, n)[0] for n in (8, 3, 12)]
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(prefix)
        stream.cache.batch_repeat_interleave(3)
        batch, mask = pad_left(questions)
        said = stream.generate(batch, mask, **HOW)[:, 12:].tolist()
        texts = longer([prefix[0]] * 3, questions)
        assert said == solo(model, texts)
        texts = longer(texts, said)
        stream.cache.reorder_cache(torch.tensor([2, 0, 0]))
        stream.cache.batch_select_indices(torch.tensor([0, 2]))
        more = tiny.ids(2, 30, 9)
        assert stream.generate(more, **HOW)[:, 30:].tolist() == solo(model, longer([texts[2], texts[0]], more))


@FAMILY
def test_beams(family: str) -> None:
    model, ids = MIXES[family](), tiny.ids(2, 40)
    want = greedy(model, ids, 8, num_beams=3)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        assert torch.equal(greedy(model, ids, 8, num_beams=3, past_key_values=stream.cache), want)


# ------------------------------------------------------------------------------------------------------------------ going back


@FAMILY
@POLICY
def test_crop_is_exact_or_changes_nothing(family: str, policy: str) -> None:
    model, text, more = MIXES[family](), tiny.ids(1, 60), tiny.ids(1, 8, 2)
    for read, back in ((60, 10), (60, 1), (60, 60), (23, 23), (23, 12), (24, 12), (1, 1), (12, 3)):
        with kvsieve.stream(model, ROOMY[policy]) as stream:
            stream.feed(text[:, :read])
            before = snapshot(stream)
            # Of a window of 24 tokens, 23 stay: 23 tokens are still whole, of 24 one has gone.
            if read <= 23 or back == read:
                stream.cache.crop(-back)
                left = read - back
            else:
                with pytest.raises(CacheMismatchError, match=r"sliding window of 24 tokens .*stream\.mark\(\)"):
                    stream.cache.crop(-back)
                after, left = snapshot(stream), read
                assert all(torch.equal(before[name], after[name]) for name in before)
                assert before.keys() == after.keys()
            assert [layer.get_seq_length() for layer in stream.cache.layers] == [left] * 3
            want = solo(model, [torch.cat([text[0, :left], more[0]])])
            assert stream.generate(more, **HOW)[:, 8:].tolist() == want


@FAMILY
@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_what_is_being_verified_can_be_taken_back(family: str, policy: str) -> None:
    model, text = MIXES[family](), tiny.ids(1, 80)
    with kvsieve.stream(model, ROOMY[policy]) as stream:
        stream.cache.activate_past_recording()
        forward(model, stream.cache, text[:, :50])
        for lo, keep, width in ((50, 3, 9), (53, 0, 4), (53, 8, 8), (61, 1, 12)):
            # What was proposed differs from what comes next.
            candidates = torch.cat([text[:, lo : lo + keep], tiny.ids(1, width - keep, lo)], 1)
            forward(model, stream.cache, candidates)
            stream.cache.crop(keep - width)
        close(forward(model, stream.cache, text[:, 62:]), stock(model, text)[:, 62:])


@FAMILY
@pytest.mark.parametrize("policy", ["full", "streaming", "sirllm", "snapkv"])
def test_prompt_lookup_over_turns(family: str, policy: str) -> None:
    model, ids = MIXES[family](), tiny.ids(1, 20).repeat(1, 3)
    want = solo(model, [ids[0]], 20)
    with kvsieve.stream(model, ROOMY[policy]) as stream:
        said = stream.generate(ids, do_sample=False, max_new_tokens=20, prompt_lookup_num_tokens=4)[:, 60:]
        assert said.tolist() == want
        more = tiny.ids(1, 9, 3)
        assert stream.generate(more, **HOW)[:, 9:].tolist() == solo(model, [torch.cat([ids[0], said[0], more[0]])])


@FAMILY
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_died_is_undone(family: str, error: type[BaseException]) -> None:
    model, ids = MIXES[family](), tiny.ids(2, 70)

    def die(*_: Any) -> None:
        raise error

    with kvsieve.stream(model, kvsieve.Full()) as stream:
        forward(model, stream.cache, ids[:, :40])
        held = snapshot(stream)
        hook = model.model.layers[-1].mlp.register_forward_pre_hook(die)
        with pytest.raises(error):
            forward(model, stream.cache, tiny.ids(2, 30, 8))
        hook.remove()
        with stream.fork() as child:
            after = snapshot(child)
        assert held.keys() == after.keys()
        assert [name for name in held if not torch.equal(held[name], after[name])] == []
        close(forward(model, stream.cache, ids[:, 40:]), stock(model, ids)[:, 40:])


# ------------------------------------------------------------------------------------------------------- forks, marks, files


@FAMILY
@POLICY
def test_forks_marks_and_files_go_on_alike(family: str, policy: str, tmp_path: Path) -> None:
    model, rows = MIXES[family](), [tiny.ids(1, 50, 1)[0], tiny.ids(1, 19, 2)[0]]
    with kvsieve.stream(model, ROOMY[policy]) as stream:
        said = stream.generate(*pad_left(rows), **HOW)[:, 50:].tolist()
        more = [tiny.ids(1, 9, 3)[0], tiny.ids(1, 30, 4)[0]]
        want = solo(model, longer(rows, said, more))
        mark, held = stream.mark(), snapshot(stream)
        stream.save(tmp_path / "stream.safetensors")
        with stream.fork() as child, kvsieve.load(tmp_path / "stream.safetensors", model) as loaded:
            assert same_memory(stream, child)
            assert same_memory(stream, loaded)
            for one in (child, loaded, copy.deepcopy(stream)):
                assert one.generate(*pad_left(more), **HOW)[:, 30:].tolist() == want
        after = snapshot(stream)
        assert all(torch.equal(held[name], after[name]) for name in held)
        for _ in range(2):
            assert stream.generate(*pad_left(more), **HOW)[:, 30:].tolist() == want
            stream.rewind(mark)


def test_a_file_for_another_window_is_refused(tmp_path: Path) -> None:
    model, other = MIXES["gemma3"](), MIXES["gemma3"](sliding_window=25)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.feed(tiny.ids(1, 40))
        stream.save(tmp_path / "stream.safetensors")
    with pytest.raises(CacheMismatchError):
        kvsieve.load(tmp_path / "stream.safetensors", other)


@FAMILY
def test_a_stream_that_has_seen_nothing_is_saved(family: str, tmp_path: Path) -> None:
    model = MIXES[family]()
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        stream.save(tmp_path / "stream.safetensors")
    ids = tiny.ids(1, 30)
    with kvsieve.load(tmp_path / "stream.safetensors", model) as stream:
        assert stream.generate(ids, **HOW)[:, 30:].tolist() == solo(model, [ids[0]])


# ----------------------------------------------------------------------------------------------------------------- torch's modes


@FAMILY
def test_inference_mode_and_normal_mode_take_turns(family: str) -> None:
    model, ids = MIXES[family](), tiny.ids(2, 70)
    with kvsieve.stream(model, kvsieve.Full()) as stream:
        with torch.inference_mode():
            one = model(ids[:, :40], past_key_values=stream.cache).logits.clone()
        two = forward(model, stream.cache, ids[:, 40:45])
        with torch.inference_mode():
            three = model(ids[:, 45:], past_key_values=stream.cache).logits.clone()
        stream.cache.reorder_cache(torch.tensor([1, 0]))
        four = forward(model, stream.cache, tiny.ids(2, 3, 9))
    close(torch.cat([one, two, three], 1), stock(model, ids))
    close(four, stock(model, torch.cat([ids[[1, 0]], tiny.ids(2, 3, 9)], 1))[:, 70:])


# -------------------------------------------------------------------------------------------------------------- what is held


@FAMILY
def test_bytes_are_those_of_the_window(family: str) -> None:
    model = MIXES[family]()
    with kvsieve.stream(model, kvsieve.StreamingLLM(32, sinks=2)) as stream:
        stream.feed(tiny.ids(1, 300), chunk=300)
        stream.generate(tiny.ids(1, 5), **HOW)
        sliding = sum(kind == "sliding_attention" for kind in stream._engine.facts.layer_types)
        a_token = 2 * 2 * 16 * 4
        held = stream._engine.bytes_of_parts
        assert 23 * sliding * a_token <= held <= 24 * sliding * a_token
        assert stream.stats().bytes_held == held + sum(store.bytes_held for store in stream._engine.stores.values())
        stream.reset()
        assert stream.stats().bytes_held == 0


# ------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("layer", "window", "says"), [(1, 24, "slides over 24 .* says full attention"), (0, 12, "slides over 12 .* says 24")]
)
def test_a_layer_that_slides_against_its_configuration_is_refused(layer: int, window: int, says: str) -> None:
    model = copy.deepcopy(MIXES["ministral"]())
    model.model.layers[layer].self_attn.sliding_window = window
    with pytest.raises(UnsupportedModelError, match=says), kvsieve.stream(model, kvsieve.Full()) as stream:
        forward(model, stream.cache, tiny.ids(1, 8))
