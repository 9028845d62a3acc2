"""Every published system, one row each. The rows feed the public names, the parser of policy texts, the command line's help, the
pages of the documentation and the table of the tests; nothing else names a system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvsieve.methods.full import Full
from kvsieve.methods.h2o import H2O
from kvsieve.methods.hip import HiP
from kvsieve.methods.infinite_hip import InfiniteHiP
from kvsieve.methods.infllm import InfLLM
from kvsieve.methods.lm_infinite import LMInfinite
from kvsieve.methods.longheads import LongHeads
from kvsieve.methods.memory_bank import MemoryBank
from kvsieve.methods.quantized import Quantized
from kvsieve.methods.quest import Quest
from kvsieve.methods.refresh_kv import RefreshKV
from kvsieve.methods.selective_v import SelectiveV
from kvsieve.methods.sirllm import SirLLM
from kvsieve.methods.snapkv import SnapKV
from kvsieve.methods.streaming_llm import StreamingLLM
from kvsieve.methods.think import ThinK
from kvsieve.policy.bank import BankRule
from kvsieve.policy.compose import Policy

__all__ = [
    "H2O",
    "Full",
    "HiP",
    "InfLLM",
    "InfiniteHiP",
    "LMInfinite",
    "LongHeads",
    "MemoryBank",
    "Quantized",
    "Quest",
    "RefreshKV",
    "SelectiveV",
    "SirLLM",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
]


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        make: the constructor. Its name is the public one, ``kvsieve.<name>``.
        paper: where it was published; empty for the baseline.
        does: what it decides: which tokens are evicted, which are selected to be read, how they are stored; that
            evicted ones can be found again; or nothing.
        small: a text of it so small that a few hundred tokens put it to work; what the tests drive.
    """

    make: Callable[..., Policy | BankRule]
    paper: str
    does: Literal["evicts", "selects", "stores", "recalls", "nothing"]
    small: str

    @property
    def name(self) -> str:
        """The public name."""
        return self.make.__name__

    @property
    def text_name(self) -> str:
        """The name in texts of policies, in lower case and without underscores."""
        return self.name.lower()

    @property
    def page(self) -> str:
        """The name of its page in the documentation, ``policies/<page>.md``: that of its file here, with hyphens."""
        return self.make.__module__.rsplit(".", 1)[1].replace("_", "-")


SYSTEMS: tuple[System, ...] = (
    System(Full, "", "nothing", "full()"),
    System(StreamingLLM, "Xiao et al., ICLR 2024, arXiv 2309.17453", "evicts", "streamingllm(40, sinks=2)"),
    System(LMInfinite, "Han et al., NAACL 2024, arXiv 2308.16137", "evicts", "lminfinite(38, sinks=2)"),
    System(SirLLM, "Yao et al., ACL 2024, arXiv 2405.12528", "evicts", "sirllm(48, sinks=2, recent=8)"),
    System(SnapKV, "Li et al., NeurIPS 2024, arXiv 2404.14469", "evicts", "snapkv(48, observe=8, kernel=3)"),
    System(H2O, "Zhang et al., NeurIPS 2023, arXiv 2306.14048", "evicts", "h2o(48, recent=8, sinks=2)"),
    System(ThinK, "Xu et al., ICLR 2025, arXiv 2407.21018", "stores", "think(0.5, recent=8, observe=8)"),
    System(Quantized, "after KIVI, Liu et al., ICML 2024, arXiv 2402.02750", "stores", "quantized(8, group=16, residual=8)"),
    System(
        HiP,
        "Lee et al., ICLR 2025, arXiv 2406.09827",
        "selects",
        "hip(32, block=4, sinks=2, window=24, dense_layers=1, refresh=4, query_block=16, query_stride=3)",
    ),
    System(
        InfiniteHiP,
        "Lee et al., 2025, arXiv 2502.08910",
        "selects",
        "infinitehip(stages=((16, 96), (4, 48), (2, 24)), refresh=(8, 4, 2), sinks=2, window=24, wide=32, wide_layers=1, "
        "query_block=16, query_stride=3)",
    ),
    System(
        Quest,
        "after Tang et al., ICML 2024, arXiv 2406.10774",
        "selects",
        "quest(32, sinks=0, window=64, query_block=16, query_stride=3)",
    ),
    System(RefreshKV, "Xu et al., ACL 2025, arXiv 2411.05787", "selects", "refreshkv(48, stride=3, similarity=0.9, kernel=3)"),
    System(SelectiveV, "after Lin et al., 2025, arXiv 2501.13629", "selects", "selectivev(24)"),
    System(
        InfLLM,
        "Xiao et al., NeurIPS 2024, arXiv 2402.04617",
        "selects",
        "infllm(window=32, blocks=3, block=8, representatives=2, sinks=4, query_block=16)",
    ),
    System(LongHeads, "Lu et al., Findings of EMNLP 2024, arXiv 2402.10685", "selects", "longheads(96, chunk=16)"),
    System(
        MemoryBank,
        "after LongMem, Wang et al., NeurIPS 2023, arXiv 2306.07174",
        "recalls",
        "streamingllm(40, sinks=2) >> memorybank(capacity=192, chunk=4, top_k=16)",
    ),
)
"""In the order in which they are listed to a reader."""
