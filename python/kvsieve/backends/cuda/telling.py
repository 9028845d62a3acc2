"""A layer's store, where attention tells more than its output: log-sum-exps, what each key got, and what follows from these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvsieve.backends.attention_scores import highest_of_prefill, of_items, of_prefill
from kvsieve.backends.cuda.head_sets import attend_sets
from kvsieve.backends.cuda.heaviest_values import Scored, heaviest
from kvsieve.backends.cuda.ops.attend import HIGHEST, LOGITS, SUMMED
from kvsieve.backends.cuda.store import CudaStore, Keys
from kvsieve.backends.heaviest_values import of_rows
from kvsieve.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvsieve._core import Step
    from kvsieve.backends.base import AttendCall, HeadSets
    from kvsieve.backends.cuda.plan import Plan
    from kvsieve.policy.select import HeaviestValues

__all__ = ["TellingStore"]


class TellingStore(CudaStore):
    """One layer's blocks, and all that is asked of attention to them."""

    def run_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(q, k, v)
        plan = self._readable(step)
        if not step.has_spans:
            lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
            out = self._prefill(q, k, v, plan, call, lse)
            self._append(k, v, plan)
            return out, lse
        self._append(k, v, plan)
        sinks = call.sinks
        out, found, _ = self.attend_spans(q, plan, call, sinks, with_lse=True)
        assert found is not None
        lse = found.transpose(1, 2)
        if sinks is not None:  # the kernel tells it without them
            lse = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sinks[None, :, None]))
        return out, lse

    def run_with_scores(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, call: AttendCall
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        self._check(q, k, v)
        if not step.has_spans:
            scores = of_prefill(self, q, k, step, call)
            return self.run(q, k, v, step, call), scores
        self._append(k, v, self._readable(step))
        out, _, items = self.attend_with_scores(q, step, call)
        return out, of_items(items, step)

    def attend_with_scores(
        self, q: torch.Tensor, step: Step, call: AttendCall, told: int = SUMMED
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Attention of a step whose tokens are stored, and the probability of every key.

        Returns:
            out ``[B, q, H, Dv]``; lse float32 ``[B, q, H]``; for each item (``row * q + query``) float32 ``[Hkv, keys in the order
            of the spans]``, summed over the query heads of a group, or the highest of them.
        """
        plan = self._readable(step)
        keys, starts = self._keys(plan, told)
        out, lse, scores = self.attend_spans(q, plan, call, call.sinks, keys, with_lse=True)
        assert lse is not None
        assert scores is not None
        return out, lse, list(torch.split(scores, np.diff(starts).tolist(), 1))

    def _keys(self, plan: Plan, told: int) -> tuple[Keys, npt.NDArray[np.int64]]:
        if plan.key_starts is None:
            raise ShapeError("this step is for prefill: it has no spans")
        return Keys(plan.upload(plan.key_starts), int(plan.key_starts[-1]), told), plan.key_starts

    def run_with_sets(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        sets: Sequence[HeadSets | None],
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """As the protocol says.

        Raises:
            BackendError: if a row with sets has compressed tokens.
            UnsupportedError: for pre-RoPE keys.
        """
        if step.stored_keys == "pre_rope":
            raise UnsupportedError("sets of each head are read where keys were rotated; these are stored pre-RoPE")
        self._check(q, k, v)
        plan, value_dim = self._readable(step), self._shape[2]
        asked = None if all(mine is None for mine in sets) else plan.residents()
        whole = [mine is None and count > 0 for mine, count in zip(sets, step.new_lens)]
        scores: list[torch.Tensor | None] = [None] * q.shape[0]
        if not step.has_spans:
            scores = highest_of_prefill(self, q, k, step, call, [not mine for mine in whole])
            out = self.run(q, k, v, step, call)
        else:
            self._append(k, v, plan)
            out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], value_dim)
            if any(whole):
                out, _, items = self.attend_with_scores(q, step, call, HIGHEST)
                scores = [items[(row + 1) * q.shape[2] - 1] if mine else None for row, mine in enumerate(whole)]
        if asked is not None:
            asked.residents = asked.residents._replace(blocks=self.table)
            answer = attend_sets(q, sets, asked, (self._shape[0], value_dim), call)
            for row in (row for row, mine in enumerate(sets) if mine is not None):
                out[row, -1] = answer[row]
        return out, scores

    def run_heaviest(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        call: AttendCall,
        rule: HeaviestValues,
        rows: Sequence[bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(q, k, v)
        if not step.has_spans:
            # A row's single token beside another row's prompt: rare, and much else is to be done then.
            found = of_rows(self, (q, k, v), step, call, rule, rows)
            return found.put_in(self.run(q, k, v, step, call))
        plan = self._readable(step)
        self._append(k, v, plan)
        if all(one or not count for one, count in zip(rows, step.new_lens)):
            out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], self._shape[2])
        else:
            out = self.attend_spans(q, plan, call, call.sinks)[0]
        masses = torch.full((q.shape[0], q.shape[1]), torch.nan, device=q.device)
        named = [row for row, one in enumerate(rows) if one]
        if not named:
            return out, masses
        for row, answer, mass in zip(named, *heaviest(self._scored(q, plan, call), plan, call.sinks, rule, named)):
            out[row, -1], masses[row] = answer, mass
        return out, masses

    def _scored(self, q: torch.Tensor, plan: Plan, call: AttendCall) -> Scored:
        """Every key's logits; no value is read."""
        keys, starts = self._keys(plan, LOGITS)
        _, lse, logits = self.attend_spans(q, plan, call, keys=keys, with_lse=True)
        assert lse is not None
        assert logits is not None
        buffer, packed = plan.buffer, self._packed
        held = (None, None) if packed is None else (packed.table.tensor, packed.format)
        where = (self.table, buffer.starts, buffer.spans, self._shape[0], self._shape[2], self.dtype, *held)
        return Scored(lse, logits, starts, where)
