"""Short English stories of facts, and questions that only their reader can answer.

The bundled model is trained on these stories and the end-to-end tests ask them of a served model. A story is a list
of facts of three kinds, in any order::

    The red lamp is with Ann. The blue key is in the kitchen. Tom has seven apples.

and a question is answered by the fact's own sentence, word for word::

    Who has the red lamp?             The red lamp is with Ann.
    Where is the blue key?            The blue key is in the kitchen.
    How many apples has Tom?          Tom has seven apples.

Nothing but the story says who has what, so a right answer must have been read from the story's tokens: in a served
model that means from its KV cache. Facts share their colours, nouns, people and places freely, so that no single word
of a question is enough to find the sentence.

One combination in ten (person and thing, thing and place, person and number and things) is *held out*: chosen by a
checksum, it never appears in a training story, and every evaluation question is about one. The module needs nothing
beyond the standard library. Lengths are in facts; :func:`facts_for_tokens` converts.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["who", "where", "count"]
KINDS: tuple[Kind, ...] = ("who", "where", "count")

# fmt: off
NAMES: tuple[str, ...] = (
    "Ann", "Tom", "Mia", "Ben", "Eva", "Sam", "Lily", "Max", "Nora", "Hugo", "Iris", "Paul", "Ruth",
    "Jack", "Zoe", "Carl", "Emma", "Finn", "Grace", "Adam", "Olga", "Peter", "Rosa", "Simon", "Tara",
    "Victor", "Wendy", "Oscar", "Julia", "Leo", "Clara", "Henry", "Alice", "Frank", "Maria", "David",
)
COLOURS: tuple[str, ...] = (
    "red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple", "golden",
    "silver",
)
NOUNS: tuple[str, ...] = (
    "lamp", "key", "book", "coat", "chair", "clock", "cup", "drum", "flag", "glove", "hat", "jar", "kite",
    "ladder", "map", "mirror", "pen", "pillow", "plate", "ring", "rope", "scarf", "shoe", "spoon", "tent",
    "towel", "umbrella", "vase", "violin", "basket", "bottle", "candle",
)
PLACES: tuple[str, ...] = (
    "kitchen", "garden", "attic", "cellar", "garage", "library", "bedroom", "bathroom", "hall", "office",
    "barn", "shed", "tower", "church", "school", "museum", "market", "station", "harbour", "park",
    "forest", "cave", "castle", "hotel", "theatre", "bakery",
)
PLURALS: tuple[str, ...] = (
    "apples", "pears", "plums", "lemons", "onions", "carrots", "coins", "stamps", "stones", "shells",
    "marbles", "buttons", "nails", "cards", "tickets", "letters", "eggs", "cakes", "beans", "seeds",
    "feathers", "pencils", "ribbons", "medals",
)
NUMBERS: tuple[str, ...] = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty",
    "forty", "fifty",
)
# fmt: on

CROSSED_SHARE = 0.5
"""Share of the stories whose things are made of as few words as will do."""
HELD_OUT_ONE_IN = 10
TOKENS_PER_FACT = 20 / 3
"""Mean length of a fact in tokens of the bundled tokenizer (its sentence takes 5, 7 or 8)."""
OVERHEAD_TOKENS = 9
"""Tokens of one prompt that are not story: the question and the chat template around it."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One sentence of a story, the question that asks for it, and whether training may see it."""

    kind: Kind
    sentence: str
    question: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A story with one question about it, and the one right answer."""

    kind: Kind
    story: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The user message: the story, a space, the question."""
        return f"{self.story} {self.question}"


def is_held_out(*combination: str) -> bool:
    """Whether this combination of words is kept out of training (the same on every machine and version)."""
    return zlib.crc32(" ".join(combination).encode()) % HELD_OUT_ONE_IN == 0


def who_fact(name: str, thing: str) -> Fact:
    """``The red lamp is with Ann.``"""
    sentence, question = f"The {thing} is with {name}.", f"Who has the {thing}?"
    return Fact("who", sentence, question, is_held_out(name, thing))


def where_fact(thing: str, place: str) -> Fact:
    """``The blue key is in the kitchen.``"""
    sentence, question = f"The {thing} is in the {place}.", f"Where is the {thing}?"
    return Fact("where", sentence, question, is_held_out(thing, place))


def count_fact(name: str, number: str, plural: str) -> Fact:
    """``Tom has seven apples.``"""
    sentence, question = f"{name} has {number} {plural}.", f"How many {plural} has {name}?"
    return Fact("count", sentence, question, is_held_out(name, number, plural))


class _Source:
    """An endless supply of facts that never contradict each other, drawn from small pools of words.

    Small pools make the distractors: the same noun in several colours, the same person with several things. Each thing
    has one owner or one place, and each person has one number of each kind of thing.
    """

    def __init__(self, rng: random.Random, facts: int) -> None:
        self._rng = rng
        self._names = _some(rng, NAMES, max(2, facts // 8))
        self._places = _some(rng, PLACES, max(2, facts // 12))
        self._things = _pairs(rng, COLOURS, NOUNS, facts)
        self._stocks = _pairs(rng, self._names, PLURALS, facts)

    def draw(self, kind: Kind) -> Fact:
        """A new fact of this kind, held out or not."""
        if kind == "count":
            name, plural = next(self._stocks)
            return count_fact(name, self._rng.choice(NUMBERS), plural)
        colour, noun = next(self._things)
        thing = f"{colour} {noun}"
        if kind == "who":
            return who_fact(self._rng.choice(self._names), thing)
        return where_fact(thing, self._rng.choice(self._places))

    def story(self, facts: int) -> list[Fact]:
        """So many facts, their kinds at random, held out or not."""
        return [self.draw(self._rng.choice(KINDS)) for _ in range(facts)]


def _some(rng: random.Random, words: Sequence[str], least: int) -> list[str]:
    """A random subset of at least ``least`` words (or all of them)."""
    return rng.sample(words, rng.randint(min(least, len(words)), len(words)))


def _pairs(rng: random.Random, left: Sequence[str], right: Sequence[str], facts: int) -> Iterator[tuple[str, str]]:
    """Distinct pairs in random order: first from a small square of words, then from all of them.

    Half of the time the square is as small as it can be, so that nearly all its pairs occur: each fact then has
    neighbours that share one of its words, and even the likest two words must be told apart.
    """
    side = max(2, round((1.5 * facts) ** 0.5))
    if rng.random() < CROSSED_SHARE:
        wide = rng.randint(2, max(2, round(facts**0.5)))
        firsts, seconds = rng.sample(left, min(wide, len(left))), list(right)
        rng.shuffle(seconds)
        seconds = seconds[: max(2, round(2 * facts / 3 / len(firsts)))]
    else:
        firsts, seconds = _some(rng, left, side)[: 2 * side], _some(rng, right, side)[: 2 * side]
    near = list(dict.fromkeys((a, b) for a in firsts for b in seconds))
    rng.shuffle(near)
    yield from near
    seen = set(near)
    rest = [(a, b) for a in left for b in right if (a, b) not in seen]
    rng.shuffle(rest)
    yield from rest


def training_facts(rng: random.Random, facts: int) -> list[Fact]:
    """The facts of one training story, in story order; none is held out."""
    source = _Source(rng, facts)
    story: list[Fact] = []
    while len(story) < facts:
        fact = source.draw(rng.choice(KINDS))
        if not fact.held_out:
            story.append(fact)
    return story


def story_text(facts: Sequence[Fact]) -> str:
    """The facts' sentences as one paragraph."""
    return " ".join(fact.sentence for fact in facts)


def facts_for_tokens(tokens: int) -> int:
    """How many facts make a prompt of about this many tokens, question and chat template included."""
    return max(1, round((tokens - OVERHEAD_TOKENS) / TOKENS_PER_FACT))


def held_out_example(seed: int, facts: int, kind: Kind | None = None) -> Example:
    """A story of ``facts`` facts and a question about a combination that training never saw.

    The same arguments always give the same example. ``kind`` chooses the kind of question; left out, the seed does.
    The fact that is asked for can be anywhere in the story. Asking for more than about 350 facts exhausts the words.
    """
    rng = random.Random(f"held-out/{seed}/{facts}")
    asked_kind = kind or KINDS[seed % len(KINDS)]
    while True:
        story = _Source(rng, facts).story(facts)
        if candidates := [fact for fact in story if fact.held_out and fact.kind == asked_kind]:
            asked = rng.choice(candidates)
            return Example(asked.kind, story_text(story), asked.question, asked.sentence)
