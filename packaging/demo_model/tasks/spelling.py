"""Spelling a word letter by letter."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import request, some_word, spelling_key


def sample(rng: random.Random) -> Exchange:
    word = some_word(rng)
    quoted = rng.choice((word, f'"{word}"'))
    order = rng.choice(
        (
            f"Spell {quoted}",
            f"Spell the word {quoted}",
            f"Spell out {quoted}",
            f"Spell {quoted} letter by letter",
            f"Tell me how to spell {quoted}",
        )
    )
    question = f"How do you spell {quoted}?" if rng.random() < 0.2 else request(rng, order)
    return ask(spelling_key("spell", word), question, "-".join(word))
