"""Sorting two to ten numbers of up to two digits."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import joined, request


def sample(rng: random.Random) -> Exchange:
    size = rng.randint(3, 7) if rng.random() < 0.8 else rng.randint(2, 10)
    numbers = [rng.randint(0, 9 if rng.random() < 0.2 else 99) for _ in range(size)]
    text = [str(number) for number in numbers]
    listed = rng.choice((", ".join(text), ", ".join(text), " ".join(text), joined(text), f"[{', '.join(text)}]"))
    descending = rng.random() < 0.35
    down = ("in descending order", "from largest to smallest", "from high to low", "from highest to lowest")
    up = ("", "", "in ascending order", "from smallest to largest", "from low to high", "from lowest to highest")
    how = rng.choice(down if descending else up)
    order = rng.choice(
        (
            f"Sort {listed} {how}",
            f"Sort {listed} {how}",
            f"Sort these numbers {how}: {listed}",
            f"Sort these numbers {how}: {listed}",
            f"Sort the numbers {listed} {how}",
            f"Sort the list {how}: {listed}",
            f"Sort {how}: {listed}",
            f"Order these numbers {how}: {listed}",
            f"Put these numbers in order {how}: {listed}"
            if not how.startswith("in ")
            else f"Put these numbers {how}: {listed}",
            f"Arrange {listed} {how}",
        )
    )
    order = order.replace(" :", ":").replace("  ", " ").strip()
    answer = ", ".join(map(str, sorted(numbers, reverse=descending)))
    return ask(f"sort:{'down' if descending else 'up'}:{','.join(text)}", request(rng, order), answer)
