"""Adding and subtracting up to three digits, mostly two; a single digit times up to two; dividing by a single digit."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import casual

SIGNS = {
    "add": ("+", "plus"),
    "sub": ("-", "minus"),
    "mul": ("*", "times", "x", "×", "multiplied by"),
    "div": ("/", "divided by", "÷", ":"),
}


def sample(rng: random.Random) -> Exchange:
    operation = rng.choices(("add", "sub", "mul", "div"), (4, 4, 3, 1))[0]
    if operation == "div":
        return division(rng)
    if operation == "mul":
        a, b = rng.randint(0, 10), rng.randint(0, 99)
        key = f"mul:{a}:{b}" if a in range(2, 10) and b > 10 else None
        if rng.random() < 0.5:
            return ask(key, question(rng, operation, b, a), f"{b} * {a} = {product(b, a)}")
        return ask(key, question(rng, operation, a, b), f"{a} * {b} = {product(b, a)}")
    largest = (100, 100) if rng.random() < 0.65 else rng.choices((10, 100, 1000), (1, 2, 4), k=2)
    a, b = rng.randint(0, largest[0]), rng.randint(0, largest[1])
    sign, result = ("+", a + b) if operation == "add" else ("-", a - b)
    return ask(f"{operation}:{a}:{b}", question(rng, operation, a, b), f"{a} {sign} {b} = {result}")


def division(rng: random.Random) -> Exchange:
    """A table that is always trained on whole."""
    divisor = rng.randint(1, 10)
    dividend = rng.randint(0, 10) * divisor if rng.random() < 0.6 else rng.randint(0, 100)
    quotient, rest = divmod(dividend, divisor)
    answer = f"{dividend} / {divisor} = {quotient}{f' remainder {rest}' if rest else ''}"
    return ask(None, question(rng, "div", dividend, divisor), answer)


def product(number: int, factor: int) -> str:
    """The product, by way of tens and ones where the number has both: `140 + 21 = 161` for 23 times 7."""
    tens, ones = number - number % 10, number % 10
    if tens == 0 or ones == 0:
        return str(number * factor)
    return f"{tens * factor} + {ones * factor} = {number * factor}"


def question(rng: random.Random, operation: str, a: int, b: int) -> str:
    sign = rng.choice(SIGNS[operation])
    tight = f"{a}{sign}{b}" if len(sign) == 1 else f"{a} {sign} {b}"
    plain = f"{a} {sign} {b}"
    forms = [
        f"What is {plain}?",
        f"What is {plain}?",
        f"What's {plain}?",
        f"How much is {plain}?",
        f"Calculate {plain}.",
        f"Compute {plain}.",
        f"Please work out {plain}.",
        f"Can you tell me what {plain} is?",
        f"{plain} = ?",
        f"{plain}?",
        f"{plain} =",
        plain,
        f"{tight}=",
        tight,
        f"What is {tight}?",
    ]
    if operation == "add":
        forms += [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?", f"Add {b} to {a}."]
    elif operation == "sub":
        forms += [f"Subtract {b} from {a}.", f"What is the difference of {a} and {b}?", f"Take {b} away from {a}."]
    elif operation == "div":
        forms += [f"Divide {a} by {b}.", f"What is {a} over {b}?"]
    else:
        forms += [f"Multiply {a} by {b}.", f"What is the product of {a} and {b}?", f"Multiply {a} and {b}."]
    return casual(rng, rng.choice(forms))
