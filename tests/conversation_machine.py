"""Streams of one policy on one model, and what each should be: how they are opened and told, and what must hold of them.

The base of the state machine in `tests/property/test_machine.py`, which has the rules. What a stream should be says the plain model
of `tests/conversation_model.py`, and the twin that is told what is left.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conversation_model as plainly
import kvsieve
import systems
import tiny
import torch
from conversation_model import FOREVER, Kind, Plain, cut, heard, interrupts, joined
from drive import pad_left, snapshot
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from kvsieve.budget import BLOCK
from kvsieve.errors import KvsieveError, StateError, UnsupportedError
from kvsieve.model.reread import without_last
from kvsieve.runtime.chunks import chunk_of

MOST = 420
"""Tokens of a row, about."""

SMALL = 40
ENDS = list(range(3, 40))
"""Tokens that end a row, where rows are to end."""


def kind_of(make: Callable[[int], Any], tolerance: float) -> Kind:
    """What the parts of a policy say of it."""
    policy = make(1)
    specs = [spec.evict for spec in policy.specs(1)]
    keeps = specs[-1].rule == "keep_all"
    window = (0, FOREVER) if keeps else (specs[0].sinks, specs[0].window) if [s.rule for s in specs] == ["window"] else None
    budget = None if keeps else sum(spec.budget or spec.sinks + spec.window for spec in specs)
    selects = any(memory.roles.select.top_k or type(memory.roles.select).__name__ != "Dense" for memory in policy.memories)
    stores = policy.compression is not None
    stock = keeps and len(specs) == 1 and not (selects or stores)
    codes = "Quantized" in type(policy.compression).__name__
    searches = policy.selection is not None
    return Kind(make, window, budget, selects, searches, stores, policy.bank is not None, stock, codes, tolerance)


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every row of the tables."""
    found = {name: kind_of(system.of_rows, system.tolerance) for name, system in systems.SYSTEMS.items()}
    for name, make in tiny.POLICIES.items():
        found[f"{name}_of_{SMALL}"] = kind_of(lambda rows, make=make: make(SMALL), 1e-4)
    return found


@dataclass
class Live:
    """A stream, and what it should be."""

    stream: kvsieve.Stream
    plain: Plain
    marks: list[tuple[kvsieve.Mark, Plain]] = field(default_factory=list)
    forked: bool = False


def tensors(rows: Any) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.long) for row in rows]


class Streams(RuleBasedStateMachine):
    """Streams of one policy on one model, forks of each other."""

    backend = "cpu"
    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []
        self.folder = Path(tempfile.mkdtemp())
        self.told = 0

    # ------------------------------------------------------------------------------------------------------------- the tools

    @initialize(data=st.data(), rows=st.sampled_from([1, 1, 2]), sliding=st.sampled_from([False, False, False, True]))
    def open(self, data: Any, rows: int, sliding: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.names or kinds())), label="policy")
        self.kind, self.name, self.rows = kinds()[name], name, rows
        self.model = tiny.model("gemma2" if sliding else "llama")
        try:
            stream = kvsieve.stream(self.model, self.kind.make(rows), self.backend)
        except UnsupportedError:
            assert sliding
            self.model = tiny.model()
            stream = kvsieve.stream(self.model, self.kind.make(rows), self.backend)
        self.live = [Live(stream, Plain(self.kind))]
        first = data.draw(st.sampled_from([0, 9, 60, 120, 230]), label="first")
        if first:
            self.feed_(self.live[0], self.text([first - at for at in range(rows)]), None)

    def text(self, lengths: list[int]) -> list[list[int]]:
        """New tokens of each row."""
        self.told += 1
        return [tiny.ids(1, n, 100 * self.told + at)[0].tolist() for at, n in enumerate(lengths)]

    def lengths(self, live: Live, first: int, ragged: int) -> list[int]:
        return [max(first - at * ragged, 1) for at in range(live.plain.rows or self.rows)]

    def of(self, which: int) -> Live:
        return self.live[which % len(self.live)]

    def refused(self, live: Live, change: Callable[[], Any], *allowed: type[KvsieveError]) -> bool:
        """Make a change that may be refused: then nothing may have changed."""
        stream = live.stream
        before, told = snapshot(stream), (stream.seen, stream.pins)
        try:
            change()
        except allowed as err:
            why = str(err)
        else:
            return False
        note(f"refused: {why}")
        after = snapshot(stream)
        assert (stream.seen, stream.pins) == told, f"a call that was refused changed seen or pins: {why}"
        assert before.keys() == after.keys(), f"a call that was refused changed what is held: {why}"
        wrong = [key for key in before if not torch.equal(before[key], after[key])]
        assert not wrong, f"a call that was refused changed {wrong}: {why}"
        return True

    def unread(self, live: Live) -> dict[str, Any]:
        pending = live.plain.pending
        return {} if pending is None else {"unread": torch.tensor(pending)[:, None]}

    def before_a_turn(self, live: Live) -> None:
        """After a caller's own generate nobody knows its newest token."""
        if live.plain.pending is not None:
            assert self.refused(live, lambda: live.stream.feed(torch.full((live.plain.rows, 1), 5)), StateError)

    def chunk_of(self, live: Live, chunk: int | None) -> int:
        return chunk_of(live.stream._engine) if chunk is None else chunk

    # ------------------------------------------------------------------------------------------------------------- reading

    def feed_(self, live: Live, new: list[list[int]], chunk: int | None, stop: tuple[int, int] | None = None) -> None:
        ids, mask = pad_left(tensors(new))
        before, again = self.before(live)
        rows = [a + b for a, b in zip(before, new)]
        pieces = cut(rows, self.chunk_of(live, chunk))
        done = len(pieces)
        if stop is None:
            live.stream.feed(ids, mask, chunk, **self.unread(live))
        else:
            at = (stop[0] - 1) % done + 1
            with interrupts(self.model, at, stop[1]):
                live.stream.feed(ids, mask, chunk, **self.unread(live))
            done = at - 1
        self.has_read(live, pieces[:done], again)
        if stop is not None:
            self.died(live, pieces, done, again)

    def before(self, live: Live) -> tuple[list[list[int]], bool]:
        """What each row reads before new tokens: its last one again, if that comes with them, and what it said."""
        waiting, last = live.plain.waiting or [[] for _ in range(live.plain.rows or self.rows)], self.read_again(live)
        return ([old + said for old, said in zip(last, waiting)], True) if last else (waiting, False)

    def read_again(self, live: Live) -> list[list[int]]:
        """Each row's last token, if the stream will read it again, for a crop took the logits away that score what comes next.

        Whether it can is the stream's to say; what must follow is the plain model's.
        """
        with live.stream.fork() as fork:
            last = [token.tolist() for token in without_last(fork._engine)]
        assert last in ([], [row[-1:] for row in live.plain.read])
        return last

    def died(self, live: Live, pieces: Any, done: int, again: bool) -> None:
        """The forward after ``done`` pieces died. If it was to read last tokens again, they were never taken back."""
        if done or not again:
            live.plain.died(max(map(len, pieces[done])))

    def has_read(self, live: Live, pieces: Any, again: bool) -> None:
        """Some pieces of a prompt, which begins with what was said before, and with the last tokens ``again``."""
        plain = live.plain
        if not pieces:
            return
        if again:
            plain.takes_back()
        plain.reads(pieces)
        plain.unread = [old[len(new) :] for old, new in zip(plain.unread, joined(pieces))]
        plain.pending = None

    def fits(self, live: Live, more: int = 100) -> bool:
        return max((len(row) for row in live.plain.ids), default=0) + more < MOST

    def until_the_end(self, row: list[int]) -> list[int]:
        end = next((at for at, token in enumerate(row) if token in ENDS), len(row) - 1)
        return row[: end + 1]

    def has_said(self, live: Live, pieces: Any, again: bool, said: list[list[int]], forwards: int) -> None:
        """All of a prompt was read, and then so many single tokens of what was said."""
        self.has_read(live, pieces, again)
        steps = [tuple(tuple(row[at : at + 1]) for row in said) for at in range(forwards)]
        if steps:
            live.plain.reads(steps, said=True, group=False)
        live.plain.unread = [row[forwards:] for row in said]

    def whole(self, live: Live, length: int) -> tuple[Any, dict[str, Any]]:
        """What a caller gives to a generate of his own: the whole conversation. Of it, what is new."""
        plain = live.plain
        rows = plain.rows or self.rows
        waiting = plain.waiting or [[] for _ in range(rows)]
        width = max(length, 1 + max(map(len, waiting)))
        fresh = [old + more for old, more in zip(waiting, self.text([width - len(row) for row in waiting]))]
        # As with any cache, what it takes for columns stays: pads of a row that others were longer than.
        columns = live.stream.cache.get_seq_length()
        told = [old + more for old, more in zip(plain.read or [[]] * rows, fresh)]
        ids, mask = (x[:-1, -columns - width :] for x in pad_left(tensors([*told, [0] * (columns + width)])))
        return fresh, {"input_ids": ids, "attention_mask": mask, "past_key_values": live.stream.cache, "do_sample": False}

    def callers_said(self, live: Live, fresh: Any, said: list[list[int]]) -> None:
        """A caller's generate sampled ``said``, of which the stream has not read the last."""
        self.has_said(live, (tuple(map(tuple, fresh)),), False, said, len(said[0]) - 1)
        live.plain.unread, live.plain.pending = [[] for _ in fresh], [row[-1] for row in said]

    # ------------------------------------------------------------------------------------------------------------- what must hold

    @invariant()
    def it_is_what_the_plain_model_says(self) -> None:
        for live in self.live:
            self.check_held(live)

    def check_held(self, live: Live) -> None:
        stream, plain = live.stream, live.plain
        assert [row.tolist() for row in stream.ids] == plain.ids
        assert stream.seen == max((len(row) for row in plain.read), default=0)
        assert [{p for lo, hi in row for p in range(lo, min(hi, 2000))} for row in stream.pins] == plain.pins
        layers = stream._engine.facts.layers
        for at, kept in enumerate(stream.kept(layers[0].index, 0)):
            held, seen = kept.positions.tolist(), len(plain.read[at])
            assert held == sorted(set(held) & set(range(seen)))
            assert not set(held) & plain.gone[at]
            assert {p for p in plain.pins[at] if p < seen} <= set(held)
            if self.kind.window is not None:
                assert held == sorted(plain.held[at])
            elif self.kind.budget is not None:
                assert len(held) <= self.kind.budget + (0 if plain.forced else BLOCK - 1)

    def check_next(self, live: Live, width: int) -> None:
        """What comes next is what it would be in a stream that was told what is left."""
        plain = live.plain
        if not plain.read or not max(map(len, plain.read)):
            return
        probe = [[7 + at + 5 * i for i in range(width)] for at in range(plain.rows)]
        with live.stream.fork() as fork, heard(self.model) as logits:
            fork.feed(torch.tensor(probe), chunk=512, **self.unread(live))
        got = logits[-1]
        rows = [a + b for a, b in zip(plain.waiting, probe)]
        if self.kind.stock and not any(plain.gone):
            for row, (old, new) in enumerate(zip(plain.read, rows)):
                with torch.no_grad():
                    want = self.model(torch.tensor([old + new]), use_cache=False).logits[0, -1]
                assert self.close_to(plain, got[row], want), f"row {row} is not what the stock model says"
        if not plain.exact:
            return
        first = next((e.pieces[0] for e in plain.history if isinstance(e, plainly.Read)), ())
        path = self.folder / "twin.safetensors"
        twin = plainly.replay(self.model, plain, len(first) or self.rows, self.backend, path)
        with twin:
            for layer in live.stream._engine.facts.layers:
                for head in range(layer.num_kv_heads):
                    mine = [kept.positions.tolist() for kept in live.stream.kept(layer.index, head)]
                    assert mine == [kept.positions.tolist() for kept in twin.kept(layer.index, head)], f"layer {layer.index}"
            with heard(self.model) as logits:
                twin.feed(*pad_left(tensors(rows)), chunk=512)
        assert self.close_to(plain, got, logits[-1]), f"{(got - logits[-1]).abs().max() / got.abs().max():.2e} from its twin"

    def close_to(self, plain: Plain, got: torch.Tensor, want: torch.Tensor) -> bool:
        return bool((got - want).abs().max() <= plain.tolerance * want.abs().max())

    def teardown(self) -> None:
        try:
            for live in self.live:
                self.check_next(live, 1)
        finally:
            for live in self.live:
                live.marks = []
                live.stream.close()
            shutil.rmtree(self.folder)
