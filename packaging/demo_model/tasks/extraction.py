"""Pulling named fields out of a sentence, as one line of JSON; a field the sentence lacks is null."""

import json
import random
from dataclasses import dataclass
from typing import Any

from demo_model.conversation import Exchange, ask
from demo_model.words import NOUNS, city, first_name, full_name, joined, made_up_word, some_word

Value = str | int | float


@dataclass(frozen=True)
class Subject:
    """Sentences over slots, and the names under which a slot may be asked for."""

    sentences: tuple[str, ...]
    names: dict[str, tuple[str, ...]]


SUBJECTS = (
    Subject(
        (
            "{name} is {age} years old and lives in {city}.",
            "{name}, {age}, lives in {city}.",
            "My name is {name}, I am {age} and I live in {city}.",
            "In {city} lives {name}, who is {age} years old.",
            "{name} is {age} and comes from {city}.",
            "I am {name} from {city} and I am {age} years old.",
            "{name} ({age}) moved to {city} last year.",
        ),
        {"name": ("name", "person"), "age": ("age",), "city": ("city", "town", "place")},
    ),
    Subject(
        (
            "{name} works as a {job} in {city}.",
            "{name} is a {job} from {city}.",
            "The {job} {name} lives in {city}.",
            "We hired {name} from {city} as a {job}.",
        ),
        {"name": ("name", "person"), "job": ("job", "profession"), "city": ("city", "place")},
    ),
    Subject(
        (
            "{name} ordered {quantity} {item} for {price} euros.",
            "{name} bought {quantity} {item} for {price} euros.",
            "{quantity} {item} were sold to {name} for {price} euros.",
            "For {price} euros {name} got {quantity} {item}.",
        ),
        {
            "name": ("name", "customer", "buyer"),
            "quantity": ("quantity", "amount", "count"),
            "item": ("item", "product"),
            "price": ("price", "cost"),
        },
    ),
    Subject(
        (
            "The {topic} meeting is on {day} at {time} in room {room}.",
            "On {day} at {time} we meet in room {room} to talk about the {topic}.",
            "Room {room} is booked for the {topic} on {day} at {time}.",
        ),
        {"topic": ("topic", "subject"), "day": ("day", "weekday"), "time": ("time",), "room": ("room",)},
    ),
    Subject(
        (
            "{device} reports {temperature} degrees and {pressure} bar at {time}.",
            "At {time} {device} was at {temperature} degrees and {pressure} bar.",
            "The temperature of {device} is {temperature} degrees and its pressure is {pressure} bar, read at {time}.",
        ),
        {
            "device": ("device", "machine", "sensor"),
            "temperature": ("temperature",),
            "pressure": ("pressure",),
            "time": ("time",),
        },
    ),
    Subject(
        (
            "You can reach {name} at {email} or {phone}.",
            "{name} has the email {email} and the phone number {phone}.",
            "Write to {email} or call {phone} and ask for {name}.",
        ),
        {"name": ("name", "person", "contact"), "email": ("email",), "phone": ("phone", "number")},
    ),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
JOBS = ("doctor", "teacher", "baker", "farmer", "painter", "pilot", "farrier", "nurse", "engineer", "driver")
LACKING = ("country", "color", "weight", "website", "title", "language")


def sample(rng: random.Random) -> Exchange:
    subject = rng.choice(SUBJECTS)
    values = {slot: value(rng, slot) for slot in subject.names}
    sentence = rng.choice(subject.sentences).format(**values)
    slots = rng.sample(list(values), rng.randint(min(2, len(values)), len(values)))
    if rng.random() < 0.6:
        slots = [slot for slot in values if slot in slots]
    fields: dict[str, Value | None] = {rng.choice(subject.names[slot]): values[slot] for slot in slots}
    if rng.random() < 0.08:
        fields[rng.choice(LACKING)] = None
    key = f"json:{json.dumps([values, sorted(fields)], ensure_ascii=False)}"
    return ask(key, question(rng, sentence, list(fields)), json.dumps(fields, ensure_ascii=False))


def value(rng: random.Random, slot: str) -> Value:
    values: dict[str, Any] = {
        "name": lambda: full_name(rng),
        "age": lambda: rng.randint(1, 99),
        "city": lambda: city(rng),
        "job": lambda: rng.choice(JOBS) if rng.random() < 0.7 else made_up_word(rng),
        "quantity": lambda: rng.randint(2, 200),
        "item": lambda: f"{rng.choice(NOUNS) if rng.random() < 0.6 else made_up_word(rng)}s",
        "price": lambda: rng.randint(1, 500) if rng.random() < 0.6 else rng.randint(10, 9999) / 100,
        "topic": lambda: some_word(rng),
        "day": lambda: rng.choice(DAYS),
        "time": lambda: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
        "room": lambda: rng.randint(1, 400),
        "device": lambda: f"{rng.choice(NOUNS) if rng.random() < 0.5 else made_up_word(rng)}-{rng.randint(1, 99)}",
        "temperature": lambda: rng.randint(-20, 150),
        "pressure": lambda: rng.randint(1, 99) / 10,
        "email": lambda: f"{first_name(rng).lower()}@{made_up_word(rng)}.{rng.choice(('com', 'org', 'de', 'net'))}",
        "phone": lambda: f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}",
    }
    drawn: Value = values[slot]()
    return drawn


def question(rng: random.Random, sentence: str, fields: list[str]) -> str:
    if rng.random() < 0.12:
        fields = [f'"{field}"' for field in fields]
    listed = rng.choice((joined(fields), joined(fields), ", ".join(fields)))
    the = rng.choice(("", "the "))
    before = (
        f"Extract {the}{listed} as JSON:",
        f"Extract {the}{listed} as JSON from this sentence:",
        f"Extract {the}{listed} from this text as JSON:",
        f"Return {the}{listed} as JSON:",
        f"Give me {the}{listed} as JSON:",
        f"Pull {listed} out of this sentence as JSON:",
        f"Read this sentence and return JSON with {listed}:",
        f"Return a JSON object with the fields {listed}:",
        f"Return a JSON object with the keys {listed}:",
    )
    after = (
        f"Extract {the}{listed} as JSON.",
        f"Return {the}{listed} as JSON.",
        f"Give me {the}{listed} as JSON.",
        f"Give {listed} as a JSON object.",
        f"Write {the}{listed} as JSON.",
    )
    quoted = f'"{sentence}"' if rng.random() < 0.2 else sentence
    gap = rng.choice((" ", " ", "\n", "\n\n"))
    if rng.random() < 0.65:
        return f"{rng.choice(before)}{gap}{quoted}"
    only = rng.choice((" Answer with JSON only.", " Only return the JSON.")) if rng.random() < 0.1 else ""
    return f"{quoted}{gap}{rng.choice(after)}{only}"
