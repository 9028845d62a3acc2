"""SirLLM (Yao et al., ACL 2024, arXiv 2405.12528): keep what surprised the model.

Departures from the published code, and why:

* The score is the one the paper describes, ``-ln p(token | what came before)``. The published code gathers it one place off (each
  token gets its predecessor's probability of repeating itself); ``score="published"`` reproduces that for comparison.
* The newest ``recent`` tokens always stay. The published runs guarantee none, which leaves a generator without its own last words.
* Decay is applied once per turn, at ``end_turn()``.
* Sinks are exempt from the ranking (``score="published"`` ranks them, as published).
"""

from __future__ import annotations

from typing import Literal

from kvsieve.roles import Memory, Slots, Surprisal

__all__ = ["SirLLM"]


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
        sinks: first real tokens of each sequence that are never let go.
        recent: newest tokens that always stay; half of what the sinks leave by default.
        decay: factor in (0, 1] on every score at each end of turn.
        score: ``"surprisal"``, or ``"published"`` for the score of the published code.

    Raises:
        BudgetError: if the budget does not hold the sinks and the recent tokens.
        PolicyError: for a decay outside (0, 1] or an unknown score.

    >>> SirLLM(1024, decay=0.9)
    SirLLM(budget=1024, sinks=4, decay=0.9)
    """
    retain = Surprisal(budget=budget, sinks=sinks, recent=recent, decay=decay, score=score)
    text = f"SirLLM(budget={budget!r}, sinks={sinks}"
    text += "" if recent is None else f", recent={recent}"
    text += "" if decay == 1.0 else f", decay={decay}"
    text += "" if score == "surprisal" else f", score={score!r}"
    return Memory(retain=retain, place=Slots(), text=text + ")")
