"""The prompts: distinct texts of an exact number of tokens, the same in every run.

A prompt is known by its number. Servers that keep prefixes would answer a prompt that they have seen faster, so every
measurement takes numbers of its own, and texts with different numbers differ from their first words on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

# fmt: off
_NAMES = (
    "Marta", "Anders", "Priya", "Tobias", "Ingrid", "Kwame", "Lucia", "Dmitri", "Aiko", "Samuel", "Fatima",
    "Henrik", "Rosa", "Malik", "Elena", "Jonas", "Nadia", "Oscar", "Yuki", "Clara", "Victor", "Amara", "Felix",
    "Leila", "Hugo", "Sofia", "Ravi", "Greta", "Pablo", "Hannah", "Idris", "Celeste", "Bruno", "Talia", "Magnus",
    "Zara",
)
_FAMILIES = (
    "Lindqvist", "Okafor", "Moreau", "Petrov", "Tanaka", "Alvarez", "Schmidt", "Haddad", "Novak", "Silva",
    "Eriksen", "Mbeki", "Rossi", "Keller", "Farouk", "Larsen", "Castillo", "Banerjee", "Dubois", "Horvat",
    "Nakamura", "Osei", "Weber", "Ferreira", "Kowalski", "Mahfouz", "Jansen", "Ivanova", "Sato", "Romero",
)
_TRADES = (
    "baker", "carpenter", "teacher", "sailor", "gardener", "clockmaker", "surgeon", "farmer", "painter",
    "librarian", "fisherman", "blacksmith", "weaver", "astronomer", "beekeeper", "printer", "miller", "potter",
    "locksmith", "geologist",
)
_PLACES = (
    "Lisbon", "Bergen", "Nairobi", "Kyoto", "Valencia", "Tallinn", "Cusco", "Marseille", "Hanoi", "Gdansk", "Tunis",
    "Quebec", "Galway", "Izmir", "Malaga", "Turku", "Ghent", "Leipzig", "Porto", "Salta",
)
# fmt: on
_THINGS = (
    "an old map",
    "a broken lantern",
    "a box of letters",
    "a silver whistle",
    "a torn photograph",
    "a wooden bird",
    "an unsigned will",
    "a bag of seeds",
    "a rusted key",
    "a brass compass",
    "a folded sail",
    "a jar of blue sand",
    "a cracked mirror",
    "a red notebook",
)
_DEEDS = (
    "walked down to the harbour to ask about the weather",
    "opened the shop an hour late and said nothing about it",
    "wrote a long letter and then burned it in the stove",
    "counted the coins twice before closing the drawer",
    "met a stranger who seemed to know the whole story",
    "climbed the tower to look at the fields after the rain",
    "sat by the window until the last train had gone",
    "asked the neighbours what they remembered of that winter",
    "found the gate open and the dog asleep in the yard",
    "read the first page aloud to everyone in the kitchen",
)

# Numbers whose greedy continuation by the starter model ends before 128 tokens. The first 120 were tried.
_END_EARLY = frozenset((12, 37, 46, 55, 82))


class Prompts:
    """Makes prompts of a model's tokens. One thread at a time."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the model's, with its `tokenizer.json`."""
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def make(self, number: int, tokens: int) -> str:
        """The text with this number, of exactly so many tokens, which encode to themselves again."""
        for attempt in range(100):
            text = self._cut(_story(random.Random(f"{number} {attempt}"), tokens), tokens)
            if text is not None:
                return text
        raise ValueError(f"No text of {tokens} tokens with the number {number}")

    def series(self, first: int, tokens: int) -> Iterator[str]:
        """The texts from the number `first` on, without those that end early, for ever."""
        return (self.make(number, tokens) for number in count(first) if number not in _END_EARLY)

    def _cut(self, text: str, tokens: int) -> str | None:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
        cut: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        same = self._tokenizer.encode(cut, add_special_tokens=False).ids == ids
        return cut if same and len(ids) == tokens else None


def _story(chance: random.Random, tokens: int) -> str:
    name, family = chance.choice(_NAMES), chance.choice(_FAMILIES)
    sentences = [
        f"{name} {family}, the {chance.choice(_TRADES)} of {chance.choice(_PLACES)}, had kept "
        f"{chance.choice(_THINGS)} for {chance.randint(3, 60)} years."
    ]
    # A word is a token or more, and a sentence has more than ten: enough to cut from.
    for _ in range(tokens // 10 + 1):
        who = chance.choice((name, "The " + chance.choice(_TRADES), "Old " + chance.choice(_NAMES)))
        when = chance.choice(("One morning", "That evening", "In the spring", "Years later", "On the third day"))
        sentences.append(f"{when}, {who[0].lower() + who[1:] if who != name else who} {chance.choice(_DEEDS)}.")
    return " ".join(sentences)
