"""Prose of kvsieve's own for the contexts of tasks: sentences without end that hardly repeat, and names for things. No digits."""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["ADJECTIVES", "NOUNS", "sentences", "things", "words"]

_ADJECTIVES = """
amber ancient bitter blue bold brave brisk bronze calm clever cold copper coral crimson crooked curious daring dusty eager
early empty faded famous fancy fierce frozen gentle giant golden grand green happy heavy hidden hollow honest humble icy idle
ivory jolly kind late lively lonely loud lucky marble mellow merry mighty modern narrow noble olive pale patient plain polite
proud purple quick quiet rapid rare restless rough royal rusty scarlet secret shallow sharp shiny silent silver simple sleepy
slow smooth solid spare stable steady stormy strange sturdy sudden sunny tall tame tender thin tidy tiny tough velvet violet
warm wild wise wooden yellow young
"""
_NOUNS = """
acorn anchor apple arrow badger barrel basket beacon bell bench blanket bottle bridge bucket button cabin camel candle canoe
carpet castle cellar chair cherry clock cloud comet compass cradle crane crown curtain desk donkey door dragon drum eagle
engine falcon feather fence fiddle flag flute forest fountain garden gate glove goose hammer harbor harp hedge helmet hill
island jacket jar kettle kite ladder lantern lemon letter lily lizard magnet mantle maple meadow mirror monkey mountain needle
oar orchard otter oven paddle palace parrot pebble pencil pepper piano pigeon pillow planet plum pocket pond puppet rabbit
raven ribbon river rocket saddle sail sandal scarf shovel spoon squirrel stone tailor tower train tunnel turtle umbrella
valley violin wagon walnut whistle willow window
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
_PEOPLE = (
    "the baker",
    "the old sailor",
    "my neighbour",
    "the teacher",
    "a young gardener",
    "the carpenter",
    "her cousin",
    "the librarian",
    "the ferryman",
    "a tired traveller",
    "the painter",
    "the shepherd",
    "his grandmother",
    "the watchmaker",
    "a visitor from the coast",
    "the mayor",
)
_PLACES = (
    "by the river",
    "behind the mill",
    "in the market square",
    "at the edge of the village",
    "on the northern road",
    "near the harbour",
    "in the long valley",
    "under the stone bridge",
    "at the foot of the hill",
    "in the old town hall",
    "beside the railway",
    "in the orchard",
)
_TIMES = (
    "In the early morning",
    "Late in the evening",
    "During the first days of autumn",
    "After the rain",
    "Towards the end of winter",
    "On quiet afternoons",
    "When the fair was over",
    "Before the snow came",
    "In a dry summer",
    "Now and then",
)
_ACTS = (
    "mended the fence and said nothing about it",
    "told a story that nobody quite believed",
    "counted the boats as they came home",
    "wrote a long letter and tore it up again",
    "watched the clouds drift over the fields",
    "carried water to the people in the upper houses",
    "learned how to tie a knot that does not slip",
    "planted beans in straight and careful rows",
    "looked for the path that leads over the hills",
    "waited for a friend who was always late",
    "played a tune that everyone seemed to know",
    "explained why the bridge had to be closed",
    "bought bread, cheese and a little honey",
    "repaired a lamp that had been dark for years",
)
_ENDS = (
    "",
    ", and the dog slept through all of it",
    ", though the wind was cold",
    ", which surprised no one",
    ", while the children laughed",
    ", and later it began to rain",
    ", as it had been done for a long time",
    ", but the door stayed open",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end, a space before each."""
    while True:
        who, where, when = rng.choice(_PEOPLE), rng.choice(_PLACES), rng.choice(_TIMES)
        act, end = rng.choice(_ACTS), rng.choice(_ENDS)
        first = rng.random() < 0.5
        yield f" {when} {who} {act} {where}{end}." if first else f" {who.capitalize()} {act} {where}{end}."


def things(rng: random.Random, count: int) -> list[str]:
    """``count`` names of things, all different, such as "amber lantern"; with two adjectives where one each does not suffice."""
    pairs = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    if count > len(pairs):
        pairs += [f"{first} {pair}" for first in ADJECTIVES[: count // len(pairs) + 1] for pair in pairs]
    return rng.sample(pairs, count)


def words(rng: random.Random, count: int) -> list[str]:
    """``count`` different words: nouns and adjectives where there are enough, else pairs of them such as "amberlantern"."""
    single = [*NOUNS, *ADJECTIVES]
    return rng.sample(single, count) if count <= len(single) else [name.replace(" ", "") for name in things(rng, count)]
