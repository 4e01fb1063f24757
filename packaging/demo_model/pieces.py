"""Counts which pieces of text are the most frequent, to fill the vocabulary with.

    python -m demo_model.pieces > demo_model/lists/pieces.txt

The list is kept, so that a later change of the tasks does not move the ids under the trained weights.
"""

import random
import re
from collections import Counter

from tokenizers import pre_tokenizers

from demo_model import words
from demo_model.dialogue import training_conversation
from demo_model.template import render
from demo_model.tokenizer import CONTROL, MARKUP, splitter

SEED = 0
CONVERSATIONS = 20_000
PIECES = 695
# Always spelled, because reversing, spelling and copying are about them.
BACKWARDS = {word[::-1] for word in (*words.NOUNS, *words.COMMON)} - words.WHOLE
SPELLED = {*words.NOUNS, *words.DEVICES, *words.FIRST_NAMES, *words.LAST_NAMES, *words.CITIES, *BACKWARDS}


def frequent_pieces() -> list[str]:
    rng = random.Random(SEED)
    split = splitter()
    markup = re.compile("|".join(map(re.escape, (*CONTROL, *MARKUP))))
    counts: Counter[str] = Counter()
    for _ in range(CONVERSATIONS):
        conversation = training_conversation(rng)
        for text in markup.split(render(conversation.messages, conversation.tools)):
            counts.update(pieces_of(split, text))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    spelled = {piece.lower() for word in SPELLED for piece in pieces_of(split, word)}
    whole = [piece for piece in counts if piece not in alphabet and piece.lstrip("Ġ").lower() not in spelled]
    return sorted(whole, key=lambda piece: (-counts[piece], piece))[:PIECES]


def pieces_of(split: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in split.pre_tokenize_str(text)]


if __name__ == "__main__":
    print("\n".join(frequent_pieces()))
