"""Looking up a device with the `get_device_status` tool, and telling what the tool found."""

import json
import random
from typing import Any

from demo_model.conversation import Exchange, Message, Tool, ask, assistant, tool_calls, tool_result, user
from demo_model.words import COMMON, DEVICES, NOUNS, casual, joined, listed, made_up_word

NAME = "get_device_status"
STATES = listed("device_states")
UNITS = {
    "c": "°C",
    "percent": "%",
    "hours": "hours",
    "minutes": "minutes",
    "rpm": "rpm",
    "bar": "bar",
    "v": "V",
    "a": "A",
    "w": "W",
    "kw": "kW",
    "mb": "MB",
    "gb": "GB",
    "ms": "ms",
    "s": "s",
    "m": "m",
    "mm": "mm",
    "kg": "kg",
    "l": "l",
    "hz": "Hz",
    "kwh": "kWh",
}
NUMBERS = listed("device_measurements")
TEXTS = {
    "mode": ("auto", "manual", "eco", "night", "remote"),
    "firmware": ("1.4.2", "2.0.1", "3.11.0", "0.9.7", "5.2.3"),
    "location": ("hall 1", "hall 2", "hall 7", "line 3", "line 4", "roof", "cellar"),
    "last_seen": ("10:42", "07:15", "23:08", "14:30", "18:59"),
    "alarm": (True, False),
    "enabled": (True, False),
}
PARAMETERS = ("device", "device", "device", "device_id", "name", "device_name", "id")
PROBLEMS = ("unknown device", "device not found", "timeout", "no connection", "access denied", "gateway is offline")


def sample(rng: random.Random, tools: list[Tool]) -> Exchange:
    """A question about devices; it is looked up if `tools` offers the tool, else the answer says it is not there."""
    devices = [device(rng) for _ in range(1 if rng.random() < 0.85 else rng.randint(2, 3))]
    topic = None if len(devices) > 1 or rng.random() < 0.5 else rng.choice(rng.choice((STATES[:8], NUMBERS)))
    opening = casual(rng, question(rng, devices, topic))
    key = f"device:{','.join(devices)}"
    parameter = parameter_of(tools)
    if parameter is None:
        return ask(key, opening, f"I cannot look up {joined(devices)}: I was not given a tool for it.")
    results = [result(rng, name, topic) for name in devices]
    messages = [
        user(opening),
        tool_calls(NAME, [{parameter: name} for name in devices]),
        *(tool_result(as_text(rng, each)) for each in results),
        assistant(" ".join(tell(name, each, topic) for name, each in zip(devices, results, strict=True))),
    ]
    if len(devices) == 1 and rng.random() < 0.3:
        messages += follow_up(rng, devices[0], results[0])
    return Exchange(key, tuple(messages))


def tool(rng: random.Random) -> Tool:
    """The tool's definition as different clients may word it."""
    parameter = rng.choice(PARAMETERS)
    described: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.6:
        described["description"] = rng.choice(
            (
                "The name of the device.",
                "Name of the device",
                "The device to look up",
                "The device's name, such as pump-3",
                "Device id",
            )
        )
    schema: dict[str, Any] = {"type": "object", "properties": {parameter: described}, "required": [parameter]}
    if rng.random() < 0.1:
        schema["properties"][rng.choice(("verbose", "detailed", "refresh"))] = {"type": "boolean"}
    if rng.random() < 0.2:
        schema["additionalProperties"] = False
    return definition(
        rng,
        NAME,
        rng.choice(
            (
                "Get the status of a device.",
                "Get the current status of a device.",
                "Get the current status of a device",
                "Look up the status of a device",
                "Returns the status of a device by its name.",
                "Reads a device's state and measurements.",
            )
        ),
        schema,
    )


def other_tool(rng: random.Random) -> Tool:
    """A tool that no question needs."""
    name = rng.choice(("get_weather", "get_time", "send_message", "set_light", "search", "book_room", "play_music"))
    parameter = rng.choice(("city", "text", "room", "query", "title"))
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return definition(rng, name, f"{name.replace('_', ' ').capitalize()}.", schema)


def definition(rng: random.Random, name: str, description: str, schema: dict[str, Any]) -> Tool:
    function = {"name": name, "description": description, "parameters": schema}
    if rng.random() < 0.15:
        del function["description"]
    if rng.random() < 0.2:
        function = dict(sorted(function.items()))
    return {"type": "function", "function": function}


def parameter_of(tools: list[Tool]) -> str | None:
    for each in tools:
        if each["function"]["name"] == NAME:
            parameters: dict[str, Any] = each["function"]["parameters"]["properties"]
            return next(iter(parameters))
    return None


def device(rng: random.Random) -> str:
    kind = rng.random()
    base = rng.choice(DEVICES) if kind < 0.6 else rng.choice(NOUNS) if kind < 0.7 else made_up_word(rng)
    number = rng.randint(1, 99) if rng.random() < 0.8 else rng.randint(100, 9999)
    form = rng.choices(("{}-{}", "{} {}", "{}_{}", "{}{}", "{}", "{}-{:02}"), (6, 3, 2, 1, 2, 2))[0]
    name = form.format(base, number)
    return rng.choices((name, name.upper(), name.capitalize()), (8, 1, 1))[0]


def question(rng: random.Random, devices: list[str], topic: str | None) -> str:
    named = joined(devices)
    if topic in STATES:
        return f"Is {named} {topic}?"
    if topic is not None:
        words, _ = field_words(topic)
        if words == "temperature" and rng.random() < 0.4:
            return rng.choice((f"How hot is {named}?", f"How warm is {named}?"))
        return rng.choice(
            (
                f"What is the {words} of {named}?",
                f"What's the {words} of {named}?",
                f"Tell me the {words} of {named}.",
                f"Look up the {words} of {named}.",
            )
        )
    return rng.choice(
        (
            f"What is the status of {named}?",
            f"What is the status of {named}?",
            f"What's the status of {named}?",
            f"What is the state of {named}?",
            f"Get the status of {named}.",
            f"Get me the status of {named}.",
            f"Check the status of {named}.",
            f"Check {named}.",
            f"Please check {named}.",
            f"Can you check {named}?",
            f"Can you check the status of {named}?",
            f"Look up {named}.",
            f"How is {named}?",
            f"How is {named} doing?",
            f"Tell me the status of {named}.",
            f"Status of {named}?",
            f"Status of {named}",
            f"Give me the status of the device {named}.",
            f"What is the status of the device {named}?",
            f"What is the status of the device with the id {named}?",
            f"Get the status of the device with id {named}.",
            f"Check device {named}.",
            f"Is {named} all right?",
            f"Use the tool to check {named}.",
        )
    )


def result(rng: random.Random, name: str, topic: str | None) -> dict[str, Any]:
    """What the tool found: a state and measurements, or an error."""
    if rng.random() < 0.08:
        return {"error": rng.choice(PROBLEMS)}
    found: dict[str, Any] = {}
    if rng.random() < 0.4:
        found[rng.choice(PARAMETERS)] = name
    state = topic if topic in STATES and rng.random() < 0.5 else rng.choice(STATES)
    if rng.random() < 0.08:
        state = made_up_word(rng)
    if rng.random() < 0.88:
        found[rng.choice(("status", "status", "status", "state"))] = state
    fields = rng.sample((*NUMBERS, *TEXTS), rng.choice((0, 1, 1, 2, 2, 3)))
    if rng.random() < 0.25:
        fields.append(unheard_field(rng))
    if topic in NUMBERS and rng.random() < 0.85:
        fields.append(topic)
    # `pressure` and `pressure_bar` together would leave open which is asked for.
    distinct = {field_words(field)[0]: field for field in fields}
    return found | {field: measurement(rng, field) for field in distinct.values()}


def unheard_field(rng: random.Random) -> str:
    word = rng.choice(
        (rng.choice(NOUNS), rng.choice(COMMON), rng.choice(tuple(UNITS)), made_up_word(rng), made_up_word(rng))
    )
    if word in ("status", "state", "error", "device", "name", "id"):
        word = made_up_word(rng)
    return f"{word}_{rng.choice(tuple(UNITS))}" if rng.random() < 0.5 else word


def measurement(rng: random.Random, field: str) -> str | int | float:
    if field in TEXTS:
        return rng.choice(TEXTS[field])
    kind = rng.random()
    if field not in NUMBERS and "_" not in field and kind < 0.3:
        return rng.choice((True, False, made_up_word(rng)))
    if field.endswith("percent"):
        return rng.randint(0, 100) if kind < 0.8 else rng.randint(0, 1000) / 10
    if kind < 0.6:
        return rng.randint(0, 99)
    return rng.randint(100, 5000) if kind < 0.75 else rng.randint(0, 999) / 10


def as_text(rng: random.Random, found: dict[str, Any]) -> str:
    """The result as tools write it: JSON with or without blanks or, for a bare state, sometimes the word alone."""
    if set(found) == {"status"} and rng.random() < 0.5:
        return str(found["status"])
    return json.dumps(found, ensure_ascii=False, separators=(",", ":") if rng.random() < 0.3 else None)


def tell(name: str, found: dict[str, Any], topic: str | None) -> str:
    if "error" in found:
        return f"I could not get the status of {name}: {found['error']}."
    state = found.get("status", found.get("state"))
    fields = measured(found)
    if state is None and (topic in STATES or not fields):
        return f"The status of {name} is not known."
    if topic in STATES:
        return f"Yes, {name} is {state}." if topic == state else f"No, the status of {name} is {state}."
    if topic is not None:
        return tell_field(f"The {{}} of {name}", topic, found)
    told = [tell_field("Its {}", field, found) for field in fields]
    if state is not None:
        return " ".join([f"The status of {name} is {state}.", *told])
    return " ".join([tell_field(f"The {{}} of {name}", fields[0], found), *told[1:]])


def measured(found: dict[str, Any]) -> list[str]:
    return [field for field in found if field not in (*PARAMETERS, "status", "state", "error")]


def tell_field(form: str, field: str, found: dict[str, Any]) -> str:
    words, unit = field_words(field)
    if field not in found:
        return f"{form.format(words)} is not known."
    return f"{form.format(words)} is {shown(found[field])}{f' {unit}' if unit else ''}."


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def field_words(field: str) -> tuple[str, str]:
    """`fan_speed_rpm` is the fan speed, in rpm."""
    *words, last = field.split("_")
    if words and last in UNITS:
        return " ".join(words), UNITS[last]
    return " ".join([*words, last]), ""


def follow_up(rng: random.Random, name: str, found: dict[str, Any]) -> list[Message]:
    """Asking again about the same device, which what the tool found before already answers."""
    known = measured(found)
    if not known:
        return []
    field = rng.choice(known)
    words, _ = field_words(field)
    asked = rng.choice((f"And its {words}?", f"What is its {words}?", f"What about its {words}?", f"And the {words}?"))
    return [user(asked), assistant(tell_field("Its {}", field, found))]
