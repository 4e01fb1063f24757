"""Words, names and places, common ones and made-up ones, and small changes in how a question is put."""

import random
from pathlib import Path


def listed(name: str) -> list[str]:
    return (Path(__file__).parent / "lists" / f"{name}.txt").read_text(encoding="utf-8").split()


NOUNS = listed("nouns")
# Words that questions and answers are made of, mostly single tokens: asked about, so that the model can spell them.
COMMON = listed("common")
WHOLE = frozenset(COMMON)
DEVICES = listed("devices")
FIRST_NAMES = listed("first_names")
LAST_NAMES = listed("last_names")
CITIES = listed("cities")
ONSETS = listed("onsets")
VOWELS = listed("vowels")
CODAS = ["", "", "", *listed("codas")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that means nothing, of one to three syllables and at most twelve letters."""
    syllables = rng.choices((1, 2, 3), (2, 5, 2))[0]
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)]
    return "".join(parts)[:12]


def some_word(rng: random.Random) -> str:
    """A common word, a made-up word or, now and then, plain letters."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(NOUNS)
    if kind < 0.45:
        return rng.choice(COMMON)
    if kind < 0.87:
        return made_up_word(rng)
    return "".join(rng.choices(LETTERS, k=rng.randint(2, 10)))


def spelling_key(task: str, word: str) -> str | None:
    """The letters of a word that is a single token can only be known by heart, so it is never held out."""
    return None if word.lower() in WHOLE else f"{task}:{word}"


def first_name(rng: random.Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize()


def full_name(rng: random.Random) -> str:
    last = rng.choice(LAST_NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize()
    return f"{first_name(rng)} {last}" if rng.random() < 0.7 else first_name(rng)


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else made_up_word(rng).capitalize()


def joined(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def casual(rng: random.Random, text: str) -> str:
    """The question as typed in a hurry, now and then: a small first letter, no mark at the end."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip(".?!")
    return text


def request(rng: random.Random, order: str) -> str:
    """An order, given without a mark at its end, as an order or as a polite question."""
    lowered = order[0].lower() + order[1:]
    form = rng.choices(
        (
            f"{order}.",
            order,
            f"Please {lowered}.",
            f"{order}, please.",
            f"Can you {lowered}?",
            f"Could you {lowered}?",
            f"Could you please {lowered}?",
            f"I want you to {lowered}.",
        ),
        (6, 3, 2, 1, 1, 1, 1, 1),
    )[0]
    return casual(rng, form)
