"""Rock, paper, scissors against a player who prefers one move: what does a memory keep of how somebody plays?

After SirLLM's game, Yao et al., ACL 2024, arXiv 2405.12528, whose models hardly beat a player who never changes the move; so
players without a model are asked as well. The player's moves are drawn anew for each case, with the published probabilities. The
model's own moves in the text are drawn evenly, so that every policy reads the same text.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvsieve.evals.task import Case, Question, Task, encode, first_line, largest, opening, rng

__all__ = ["TASK"]

NAME = "rps"
MOVES = ("rock", "paper", "scissors")
"""Each is beaten by the next."""
PREFERENCE = (0.5, 0.3, 0.2)
"""Probabilities of the player's favourite move, of the one that beats it, and of the third."""
MOST = 32
"""Questions of a case; they come evenly in the second half of the rounds."""


def beating(move: str) -> str:
    """The move that wins against ``move``."""
    return MOVES[(MOVES.index(move) + 1) % len(MOVES)]


def build(tokenizer: Any, length: int, seed: int, index: int) -> Case:
    """A game whose player prefers move number ``index`` modulo three, and after some rounds the question what to play next."""
    draw = rng(NAME, seed, index)
    favourite = index % len(MOVES)
    likely = MOVES[favourite:] + MOVES[:favourite]
    most = max(length // 4, 2)  # a round has more tokens than four
    theirs = draw.choices(likely, PREFERENCE, k=most + 1)
    ours = draw.choices(MOVES, k=most)
    first = encode(tokenizer, "User: Let us play rock, paper, scissors, as many rounds as you like. First round!\n")
    rounds = {
        (our, their): encode(tokenizer, f"Assistant: I play {our}.\nUser: I played {their}. Next round!\n")
        for our in MOVES
        for their in MOVES
    }
    asked = encode(tokenizer, "Assistant: I play")
    options = tuple(encode(tokenizer, f" {move}") for move in MOVES)
    longest = max(map(len, options))

    def question(after: int) -> Question:
        counts = Counter(theirs[:after])
        expected = max(MOVES, key=lambda move: counts[move])
        guesses = {**{f"always {move}": move for move in MOVES}, "counting": beating(expected)}
        return Question(asked, (beating(theirs[after]),), longest, options=options, after=after, guesses=tuple(guesses.items()))

    def made(count: int) -> Case:
        turns = [rounds[pair] for pair in zip(ours[:count], theirs[:count])]
        late = count - count // 2
        some = min(late, MOST)
        after = [count - late + 1 + (late - 1) * number // max(some - 1, 1) for number in range(some)]
        turns[0] = (*opening(tokenizer), *first, *turns[0])
        return Case(tuple(turns), tuple(map(question, after)))

    return largest(NAME, length, made)


TASK = Task(
    name=NAME,
    summary="rock, paper, scissors against a player who prefers one move (after SirLLM)",
    metric="share of up to 32 rounds won by the most probable of three moves, by mean log-probability a token",
    source="after SirLLM, Yao et al., ACL 2024, arXiv 2405.12528",
    build=build,
    score=first_line,
)
