"""Counting up and down, in steps, and counting the letters of a word or the things in a list."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import NOUNS, casual, joined, made_up_word, request, some_word, spelling_key


def sample(rng: random.Random) -> Exchange:
    kind = rng.choices((count_range, count_letters, count_things), (5, 3, 2))[0]
    return kind(rng)


def count_range(rng: random.Random) -> Exchange:
    step = 1 if rng.random() < 0.7 else rng.choice((2, 3, 5, 10))
    terms = rng.randint(3, 15) if rng.random() < 0.88 else rng.randint(16, 100)
    low = rng.choice((0, 1, rng.randint(0, 100)))
    high = low + step * (terms - 1)
    numbers = list(range(low, high + 1, step))
    by = "" if step == 1 else rng.choice((f" by {step}", f" in steps of {step}", f" by {step}s", f" in {step}s"))
    if rng.random() < 0.3:
        first, last, order = (
            high,
            low,
            rng.choice((f"Count down from {high} to {low}", f"Count backwards from {high} to {low}")),
        )
        numbers.reverse()
    else:
        first, last = low, high
        order = rng.choice(
            (f"Count from {low} to {high}", f"Count from {low} up to {high}", f"Count up from {low} to {high}")
        )
        if low == 1 and step == 1:
            order = rng.choice((order, f"Count to {high}"))
    return ask(f"count:{first}:{last}:{step}", request(rng, order + by), ", ".join(map(str, numbers)))


def count_letters(rng: random.Random) -> Exchange:
    word = some_word(rng)
    quoted = rng.choice((word, f'"{word}"', f'"{word}"'))
    forms = (
        f"How many letters are in {quoted}?",
        f"How many letters are in the word {quoted}?",
        f"How many letters does {quoted} have?",
        f"How many letters does the word {quoted} have?",
        f"Count the letters in {quoted}.",
        f"Count the letters of {quoted}.",
        f"How long is the word {quoted}?",
    )
    return ask(spelling_key("letters", word), casual(rng, rng.choice(forms)), f'"{word}" has {len(word)} letters.')


def count_things(rng: random.Random) -> Exchange:
    things = [rng.choice(NOUNS) if rng.random() < 0.7 else made_up_word(rng) for _ in range(rng.randint(2, 9))]
    listed = rng.choice((joined(things), ", ".join(things)))
    forms = (
        f"How many things are in this list: {listed}?",
        f"How many words are in this list: {listed}?",
        f"Count the things in this list: {listed}.",
        f"Count the words: {listed}.",
        f"How many items are there: {listed}?",
        f"How many items are in this list? {listed}",
    )
    return ask(f"things:{','.join(things)}", casual(rng, rng.choice(forms)), f"There are {len(things)}.")
