"""RefreshKV (Xu et al., ACL 2025, arXiv 2411.05787; first published as Recycled Attention).

Departures from the paper, and why:

* Tokens that were read at partial steps are never lost: the paper's pseudocode takes them from the end of the set at the next full
  step, which drops some where more of them came than the set holds.
* Pooling makes plateaus, so equal scores are the rule: tokens are ordered by pooled score, then by their own, then by age.
* Queries are compared before RoPE: after it the cosine falls with the distance, whatever the content. The paper does not say.
* A text that the budget holds is read whole; the first token beyond it takes a full step.
* Forwards over several tokens are full steps, whenever they come: a second turn is read as the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsieve.budget import check_count
from kvsieve.checks import as_plain, plain_fields, real, told
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.select import RecycledSelection

if TYPE_CHECKING:
    import torch

__all__ = ["RefreshKV", "RefreshSelection"]


@dataclass(frozen=True)
class RefreshSelection(RecycledSelection):
    """Heads read the tokens with the highest attention scores at the last full step, max-pooled over ``kernel`` neighbours; see
    :func:`kvsieve.RefreshKV`.
    """

    budget: int = 2048
    stride: int = 10
    similarity: float | None = 0.85
    kernel: int = 7

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("budget", "stride", "kernel"):
            check_count(name, getattr(self, name), least=1)
        if self.kernel % 2 == 0:
            raise PolicyError(f"kernel must be odd, so that it has a middle, got {self.kernel}")
        limit = self.similarity
        if limit is not None and real(limit) is None:
            raise PolicyError(f"similarity must be a number, or None for a fixed schedule, got {told(limit)}")

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        raw = scores.float().nan_to_num(0.0).contiguous()
        pooled = torch.nn.functional.max_pool1d(raw, self.kernel, stride=1, padding=self.kernel // 2)
        # Bits of floats that are not negative are ordered as they are: one number for both scores.
        keys = (pooled.view(torch.int32).long() << 32) | raw.view(torch.int32).long()
        count = min(self.budget, keys.shape[1])
        least = keys.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
        above, equal = keys > least, keys == least
        # Of those that are equal to the last one chosen, the first.
        chosen = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
        # Their numbers, without asking a GPU how many there are.
        numbers = torch.arange(1, count + 1, device=keys.device).repeat(len(keys), 1)
        tokens = torch.searchsorted(chosen.cumsum(1), numbers)
        best_first = keys.gather(1, tokens).sort(dim=1, descending=True, stable=True).indices
        order = torch.arange(count - 1, -1, -1, device=keys.device).expand_as(best_first)
        return tokens, torch.empty_like(tokens).scatter_(1, best_first, order)


@as_plain
def RefreshKV(budget: int, stride: int = 10, similarity: float | None = 0.85, kernel: int = 7) -> Memory:
    """Keep every token; at most steps each KV head of each layer reads the ``budget`` tokens that it attended to most at the
    layer's last full step, and what came since.

    A prompt is read whole, and its last token chooses. From then on every ``stride``-th token may take a full step, which reads
    everything and chooses anew: always, if ``similarity`` is None; else in the layers whose mean query, before RoPE, has changed.
    A text of ``budget`` tokens or fewer is read whole, exactly. Nothing is freed. On ``cuda`` no
    token may be compressed.

    Args:
        budget: tokens that a head reads before the newest one, at partial steps. The paper's is an eighth of the prompt.
        stride: generated tokens between two steps that may be full.
        similarity: a layer takes a full step if the cosine of its mean query with that of its last full step is not above this;
            None for a full step of all layers. The paper has 0.85 for Llama 3.1 8B and 0.95 for Qwen2 7B.
        kernel: tokens that share the highest score among them; odd.

    Raises:
        PolicyError: for counts that are none, an even kernel, or a similarity that is no number.

    >>> RefreshKV(2048)
    RefreshKV(budget=2048)
    """
    select = RefreshSelection(budget, stride, similarity, kernel)
    plain = vars(RefreshSelection())
    changed = {name: value for name, value in vars(select).items() if name == "budget" or value != plain[name]}
    text = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return Memory(select=select, text=f"RefreshKV({text})")
