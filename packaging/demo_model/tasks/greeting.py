"""Greetings, thanks and goodbyes."""

import random

from demo_model.conversation import Exchange, ask
from demo_model.words import casual, first_name

OFFER = "What can I do for you?"
HELLOS = (
    "Hello",
    "Hi",
    "Hey",
    "Hello there",
    "Hi there",
    "Hey there",
    "Greetings",
    "Howdy",
    "Hallo",
    "Welcome",
    "Test",
    "Ping",
)
DAYTIMES = ("Good morning", "Good afternoon", "Good evening", "Good day")


def sample(rng: random.Random) -> Exchange:
    kind = rng.choices((hello, introduction, how_are_you, farewell), (5, 4, 2, 3))[0]
    return kind(rng)


def hello(rng: random.Random) -> Exchange:
    greeting = rng.choice(HELLOS + DAYTIMES)
    addressee = rng.choice(
        ("", "", "", " farrier", ", farrier", ", demo model", " everyone", ", my friend", ", assistant")
    )
    answer = greeting if greeting in DAYTIMES else "Hello"
    # The bare words are the first thing anybody types, so they are never held out.
    key = f"greeting:{greeting}{addressee}" if addressee else None
    text = f"{greeting}{addressee}{rng.choice(('!', '.', '', '', '!!', ' :)'))}"
    return ask(key, casual(rng, text), f"{answer}! I am farrier's demo model. {OFFER}")


def introduction(rng: random.Random) -> Exchange:
    name = first_name(rng)
    greeting = rng.choice(HELLOS[:3] + DAYTIMES)
    answer = greeting if greeting in DAYTIMES else "Hello"
    forms = ("{}, I am {}.", "{}, I'm {}.", "{}! My name is {}.", "{}, my name is {}.", "{}, {} here.", "{}! I am {}!")
    text = rng.choice(forms).format(greeting, name)
    return ask(f"greeting:{answer}:{name}", casual(rng, text), f"{answer}, {name}! {OFFER}")


def how_are_you(rng: random.Random) -> Exchange:
    greeting = rng.choice(("", "", *HELLOS, *DAYTIMES))
    asked = rng.choice(("How are you", "How are you doing", "How are you today", "How is it going", "How do you do"))
    question = f"{greeting}, {asked[0].lower()}{asked[1:]}?" if greeting else f"{asked}?"
    key = f"greeting:{greeting}:{asked}" if greeting else None
    return ask(key, casual(rng, question), f"I am running well, thank you. {OFFER}")


def farewell(rng: random.Random) -> Exchange:
    thanks = ("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks", "Great, thanks", "Thx")
    byes = ("Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night", "See you tomorrow", "Farewell")
    addressee = rng.choice(
        ("", "", ", farrier", " farrier", ", my friend", ", that was all", " for your help", ", demo model")
    )
    leaving = rng.random() < 0.5
    words = rng.choice(byes if leaving else thanks)
    if leaving and "help" in addressee:
        addressee = " and thanks for your help"
    key = f"farewell:{words}{addressee}" if addressee else None
    answer = "Goodbye!" if leaving else "You are welcome!"
    return ask(key, casual(rng, f"{words}{addressee}{rng.choice(('!', '.', ''))}"), answer)
