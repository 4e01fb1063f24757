"""Questions that are beyond the model; it says so instead of making something up."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import NOUNS, casual, city, full_name, made_up_word

ANSWER = (
    "That is beyond me: I am only a very small demo model. "
    "I can do arithmetic with small numbers, reverse and spell words, "
    "count, sort numbers, convert units, and pull fields out of a sentence as JSON."
)
FORMS = (
    "What is the capital of {city}?",
    "Who wrote {noun}?",
    "Who is {name}?",
    "Who was {name}?",
    "Where is {city}?",
    "What is the weather in {city}?",
    "What is the weather like in {city} today?",
    "How do I get to {city}?",
    "Tell me about {city}.",
    "Tell me about {name}.",
    "Tell me a story about a {noun}.",
    "Tell me a joke about a {noun}.",
    "Tell me a joke.",
    "Write a poem about the {noun}.",
    "Write a song about a {noun}.",
    "Write an essay about {noun}s.",
    "Write a Python function that prints {noun}.",
    "Write code for a {noun}.",
    "Explain the {noun} to me.",
    "Explain {noun}s.",
    "Explain how a {noun} works.",
    "Why is the {noun} {adjective}?",
    "What is a {noun}?",
    "What is the meaning of {noun}?",
    "What is the meaning of life?",
    "What does {noun} mean?",
    "How do I make a {noun}?",
    "How does a {noun} work?",
    "How old is {name}?",
    "Translate {noun} into {language}.",
    "Translate this into {language}: the {noun} is {adjective}.",
    "What is {noun} in {language}?",
    "Do you speak {language}?",
    "Do you like {noun}s?",
    "Should I buy a {noun}?",
    "Recommend a good {noun}.",
    "Summarize the history of {city}.",
    "When was {city} founded?",
    "What do you think about {noun}s?",
    "Give me a recipe with {noun}s.",
    "Which {noun} is the best?",
    "What day is it today?",
    "What time is it in {city}?",
    "Is it raining?",
    "Is it raining in {city}?",
    "Is {name} {adjective}?",
    "Can you fly?",
    "{noun}",
    "{made_up}",
    "{made_up} {noun} {made_up}",
    "{noun}?",
    "Say something in {language}.",
    "Explain {made_up} {noun}s.",
    "What is {made_up}?",
    "Sing a song.",
    "Write a haiku.",
    "Write a haiku about {noun}s.",
    "Write a story.",
    "Tell me a story.",
    "Tell me something.",
    "Play {noun}.",
    "Open the {noun}.",
    "What is {large} {sign} {large}?",
    "What is {large} {sign} {small}?",
    "What is {small} {sign} {large}?",
    "{large} {sign} {large}",
    "Calculate {large} {sign} {small}.",
    "Convert {small} {odd_unit} to {odd_unit}.",
    "Convert {small} {odd_unit} to {unit}.",
    "Convert {small} {unit} to {odd_unit}.",
    "How many {odd_unit} are {small} {unit}?",
    "How many {unit} are {small} {odd_unit}?",
    "{small} {unit} in {odd_unit}?",
    "What is {small} {unit} in {odd_unit}?",
)
ODD_UNITS = (
    "miles",
    "pounds",
    "gallons",
    "yards",
    "ounces",
    "acres",
    "pints",
    "stone",
    "knots",
    "light years",
    "dollars",
    "yen",
)
UNITS = ("km", "kilometers", "meters", "m", "kg", "kilograms", "grams", "liters", "cm", "centimeters", "euros", "hours")
LANGUAGES = ("German", "French", "Spanish", "Italian", "Polish", "Dutch", "Japanese", "Chinese", "Latin", "Greek")
ADJECTIVES = ("blue", "green", "red", "round", "big", "small", "old", "new", "cold", "warm", "heavy", "good")


def sample(rng: random.Random) -> Exchange:
    filling = {
        "city": city(rng),
        "name": full_name(rng),
        "noun": rng.choice(NOUNS) if rng.random() < 0.6 else made_up_word(rng),
        "made_up": made_up_word(rng),
        "large": rng.randint(1001, 10 ** rng.randint(4, 8)),
        "small": rng.randint(1, 1000),
        "sign": rng.choice(("+", "-", "*", "/", "plus", "minus", "times")),
        "odd_unit": rng.choice(ODD_UNITS),
        "unit": rng.choice(UNITS),
        "language": rng.choice(LANGUAGES),
        "adjective": rng.choice(ADJECTIVES),
    }
    form = rng.choice(FORMS)
    text = form.format(**filling)
    return ask(f"scope:{text}" if "{" in form else None, casual(rng, text), ANSWER)
