"""Writing a word, or the digits of a number, backwards."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import request, some_word, spelling_key


def sample(rng: random.Random) -> Exchange:
    word = some_word(rng)
    if rng.random() < 0.1:
        word = word.capitalize()
    elif rng.random() < 0.08:
        word = "".join(rng.choices("0123456789", k=rng.randint(2, 8)))
    key = spelling_key("reverse", word)
    quoted = rng.choice((word, word, f'"{word}"', f'"{word}"', f"'{word}'"))
    order = rng.choice(
        (
            f"Reverse {quoted}",
            f"Reverse {quoted}",
            f"Reverse the word {quoted}",
            f"Reverse the word {quoted}",
            f"Reverse this word: {quoted}",
            f"Reverse the letters of {quoted}",
            f"Reverse the string {quoted}",
            f"Reverse: {quoted}",
            f"Write {quoted} backwards",
            f"Write the word {quoted} backwards",
            f"Spell {quoted} backwards",
            f"Say {quoted} in reverse",
            f"Turn {quoted} around",
        )
    )
    if rng.random() < 0.15:
        return ask(key, f"What is {quoted} {rng.choice(('reversed', 'backwards'))}?", word[::-1])
    return ask(key, request(rng, order), word[::-1])
