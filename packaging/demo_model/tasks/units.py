"""Converting units: powers of ten both ways, time, dozens, feet, and degrees Celsius to Fahrenheit."""

import random
from decimal import Decimal

from demo_model.conversation import Exchange, ask
from demo_model.tasks.arithmetic import product
from demo_model.words import request

# From the larger unit to the smaller, as (plural, symbol or None).
POWERS_OF_TEN = (
    (("kilometers", "km"), ("meters", "m"), 3),
    (("meters", "m"), ("centimeters", "cm"), 2),
    (("meters", "m"), ("millimeters", "mm"), 3),
    (("centimeters", "cm"), ("millimeters", "mm"), 1),
    (("kilograms", "kg"), ("grams", "g"), 3),
    (("grams", "g"), ("milligrams", "mg"), 3),
    (("tonnes", "t"), ("kilograms", "kg"), 3),
    (("liters", "l"), ("milliliters", "ml"), 3),
    (("seconds", "s"), ("milliseconds", "ms"), 3),
    (("kilowatts", "kW"), ("watts", "W"), 3),
    (("euros", None), ("cents", None), 2),
)
FACTORS = (
    (("hours", "h"), ("minutes", "min"), 60),
    (("minutes", "min"), ("seconds", "s"), 60),
    (("days", None), ("hours", "h"), 24),
    (("weeks", None), ("days", None), 7),
    (("years", None), ("months", None), 12),
    (("feet", "ft"), ("inches", "in"), 12),
    (("dozen", None), ("pieces", None), 12),
)
Unit = tuple[str, str | None]


def sample(rng: random.Random) -> Exchange:
    kind = rng.choices((power_of_ten, factor, temperature), (5, 4, 5))[0]
    return kind(rng)


def power_of_ten(rng: random.Random) -> Exchange:
    large, small, power = rng.choice(POWERS_OF_TEN)
    value = Decimal(rng.randint(1, 999))
    if rng.random() < 0.4:
        value = value.scaleb(-1)
    if rng.random() < 0.4:
        # The other way round: the value is at least a hundredth of the larger unit.
        value = Decimal(rng.randint(1, 999)) * Decimal(10) ** rng.randint(max(0, power - 2), power)
        large, small, power = small, large, -power
    return conversion(rng, value, large, small, plain(value.scaleb(power)))


def factor(rng: random.Random) -> Exchange:
    large, small, by = rng.choice(FACTORS)
    value = rng.randint(1, 99)
    if rng.random() < 0.25 and value < 13:
        # Dividing is only asked of small tables, which are always trained on.
        return conversion(rng, Decimal(value * by), small, large, str(value), table=True)
    if value < 11 or value % 10 == 0:
        return conversion(rng, Decimal(value), large, small, str(value * by), table=True)
    return conversion(rng, Decimal(value), large, small, product(value, by))


def temperature(rng: random.Random) -> Exchange:
    """A table of whole degrees that is always trained on whole; its answers go by way of `2 n - n / 5 + 32`."""
    celsius = Decimal(rng.randint(-40, 120))
    twice, fifth = celsius * 2, celsius / 5
    sign = "+" if celsius < 0 else "-"
    work = f"{plain(twice)} {sign} {plain(abs(fifth))} + 32 = {plain(twice - fifth)} + 32 = {plain(twice - fifth + 32)}"
    names = (("degrees Celsius", "°C"), ("degrees Fahrenheit", "°F"))
    short = rng.random() < 0.3
    source, target = ("Celsius", "Fahrenheit") if short else (rng.choice(names[0]), rng.choice(names[1]))
    return ask(None, question(rng, plain(celsius), source, target), f"{plain(celsius)} °C = {work} °F")


def conversion(
    rng: random.Random, value: Decimal, source: Unit, target: Unit, work: str, table: bool = False
) -> Exchange:
    key = None if table else f"units:{plain(value)}:{source[0]}:{target[0]}"
    symbols = rng.random() < 0.4
    asked = (source[1] if symbols else None) or named(source[0], value), (target[1] if symbols else None) or target[0]
    answer = f"{plain(value)} {named(source[0], value)} = {work} {named(target[0], Decimal(work.split()[-1]))}"
    return ask(key, question(rng, plain(value), *asked), answer)


def named(plural: str, value: Decimal) -> str:
    if value != 1:
        return plural
    return {"feet": "foot", "inches": "inch", "dozen": "dozen"}.get(plural, plural.removesuffix("s"))


def question(rng: random.Random, value: str, source: str, target: str) -> str:
    order = rng.choice((f"Convert {value} {source} to {target}", f"Convert {value} {source} into {target}"))
    forms = (
        f"How many {target} are {value} {source}?",
        f"How many {target} are in {value} {source}?",
        f"What is {value} {source} in {target}?",
        f"{value} {source} in {target}?",
        f"{value} {source} to {target}",
        f"{value} {source} in {target}",
    )
    return request(rng, order) if rng.random() < 0.5 else rng.choice(forms)


def plain(value: Decimal) -> str:
    """Digits without an exponent and without trailing zeros after the point."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
