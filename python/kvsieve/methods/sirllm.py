"""SirLLM (Yao et al., ACL 2024, arXiv 2405.12528): keep what surprised the model.

Departures from the published code, and why:

* The score is the one the paper describes, ``-ln p(token | what came before)``. The published code gathers it one place off (each
  token gets its predecessor's probability of repeating itself); ``score="published"`` reproduces that for comparison.
* The newest ``recent`` tokens always stay. The published runs guarantee none, which leaves a generator without its own last words.
* Decay is applied once per turn, at ``end_turn()``.
* Sinks are exempt from the ranking (``score="published"`` ranks them, as published).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvsieve.budget import check_budget, check_choice, check_count, tokens_for
from kvsieve.checks import as_plain, plain_fields, real, told
from kvsieve.errors import PolicyError
from kvsieve.policy.compose import Memory
from kvsieve.policy.evict import EvictionRule
from kvsieve.policy.position import InCache
from kvsieve.policy.specs import EvictionSpec

__all__ = ["SirLLM", "Surprisal"]


@dataclass(frozen=True)
class Surprisal(EvictionRule):
    """The sinks, the newest ``recent`` and the most surprising tokens stay; scores decay by ``decay`` at each end of turn."""

    budget: int | str
    sinks: int = 4
    recent: int | None = None  # type: ignore[assignment]
    decay: float = 1.0
    score: Literal["surprisal", "published"] = "surprisal"
    needs_surprisal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("sinks", self.sinks)
        if self.recent is not None:
            check_count("recent", self.recent)
        decay = real(self.decay)
        if decay is None or not 0.0 < decay <= 1.0:
            raise PolicyError(f"decay must lie in (0, 1], got {told(self.decay)}")
        check_choice("score", self.score, ("surprisal", "published"))
        check_budget(self.budget, sinks=self.sinks, recent=self.recent or 0, name="Surprisal")

    def spec(self, bytes_per_token: int) -> EvictionSpec:
        budget = tokens_for(self.budget, bytes_per_token)
        recent = (budget - self.sinks) // 2 if self.recent is None else self.recent
        if self.score == "published" and self.recent is None:
            recent = 0
        check_budget(budget, sinks=self.sinks, recent=recent, name="Surprisal")
        published = self.score == "published"
        return EvictionSpec("surprisal", budget=budget, sinks=self.sinks, recent=recent, published=published)


@as_plain
def SirLLM(
    budget: int | str,
    sinks: int = 4,
    recent: int | None = None,
    decay: float = 1.0,
    score: Literal["surprisal", "published"] = "surprisal",
) -> Memory:
    """Keep the sinks, the newest ``recent`` tokens, and the most surprising of the rest; distances count residents.

    Scoring a prompt costs its logits, which ``generate`` alone would not compute: they are made in blocks and never held whole.

    Args:
        budget: residents per sequence, in tokens, or in bytes such as ``"64MiB"``.
        sinks: first real tokens of each sequence that are never evicted.
        recent: newest tokens that always stay; half of what the sinks leave by default.
        decay: factor in (0, 1] on every score at each end of turn.
        score: ``"surprisal"``, or ``"published"`` for the score of the published code.

    Raises:
        BudgetError: if the budget does not hold the sinks and the recent tokens.
        PolicyError: for a decay outside (0, 1] or an unknown score.

    >>> SirLLM(1024, decay=0.9)
    SirLLM(budget=1024, sinks=4, decay=0.9)
    """
    evict = Surprisal(budget=budget, sinks=sinks, recent=recent, decay=decay, score=score)
    text = f"SirLLM(budget={budget!r}, sinks={sinks}"
    text += "" if recent is None else f", recent={recent}"
    text += "" if decay == 1.0 else f", decay={decay}"
    text += "" if score == "surprisal" else f", score={score!r}"
    return Memory(evict=evict, position=InCache(), text=text + ")")
