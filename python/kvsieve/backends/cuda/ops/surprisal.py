"""How surprising tokens were."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from kvsieve.backends.cuda.ops.declare import Shaped, operation, require
from kvsieve.backends.cuda.ops.launch import DTYPES, Argument, module, start

__all__ = ["Surprisal", "surprisal"]


class Surprisal(NamedTuple):
    """``logsumexp(logits) - logits[ids]``: float32 ``[n]`` in nats, of ``[n, V]`` and int64 ``[n]``. An id outside V gives nan."""

    logits: Annotated[torch.Tensor, Shaped(("n", "vocabulary"), any_stride=True)]
    ids: Annotated[torch.Tensor, Shaped(("n",), torch.int64, any_stride=True)]

    def check(self) -> None:
        logits, ids = self.logits, self.ids
        require(logits.shape[1] > 0, f"logits must be [n, vocabulary], got {tuple(logits.shape)}")
        require(logits.dtype in DTYPES, f"surprisal takes {', '.join(map(str, DTYPES))}, got {logits.dtype}")
        require(ids.shape == logits.shape[:1], f"{tuple(ids.shape)} ids for {logits.shape[0]} rows")

    def outputs(self) -> torch.Tensor:
        return self.logits.new_empty((self.logits.shape[0],), dtype=torch.float32)

    def launch(self) -> torch.Tensor:
        out, logits, ids = self.outputs(), self.logits, self.ids.contiguous()
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        args: list[Argument] = [logits.data_ptr(), logits.stride(0), logits.shape[1], ids.data_ptr(), out]
        start(module("surprisal", "surprisal", logits.dtype), (logits.shape[0], 1, 1), args, logits.device)
        return out


surprisal = operation(Surprisal)
