"""Exchanges put together: conversations to train on, and held-out examples to evaluate on."""

import random
from dataclasses import dataclass

from demo_model import words
from demo_model.conversation import Exchange, Message, Tool, answer_text
from demo_model.tasks import TASKS, Task, device_status

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are farrier's demo model.",
    "You are a small and friendly assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer as briefly as you can.",
    "You are a helpful AI assistant that can use tools.",
    "You answer questions about devices.",
    "Be brief and exact.",
    "You help the operators of a factory.",
)
DEVICE_TASK = next(task for task in TASKS if task.name == "device status")
ARITHMETIC = next(task for task in TASKS if task.name == "arithmetic")
OTHER_TASKS = tuple(task for task in TASKS if task is not DEVICE_TASK)


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Tool]


@dataclass(frozen=True)
class Example:
    """What goes before an answer, and the answer that is expected. `task` is the row in the table of results.

    An example without messages is a bare text, `prompt`, to be gone on with outside any chat.
    """

    task: str
    messages: list[Message]
    tools: list[Tool]
    expected: str
    prompt: str = ""


def training_conversation(rng: random.Random) -> Conversation:
    tools = offered_tools(rng)
    length = rng.choices((1, 2, 3, 5, 8, 25), (40, 25, 15, 12, 6, 2))[0]
    exchanges = [
        pick(rng, tools).draw(rng, tools, held_out=False) for _ in range(rng.randint((length + 1) // 2, length))
    ]
    return Conversation([*system_prompt(rng), *messages_of(exchanges)], tools)


def completion(rng: random.Random, held_out: bool) -> str:
    """A calculation as bare text, such as `12 + 30 = 42`."""
    return answer_text(ARITHMETIC.draw(rng, [], held_out).messages[-1])


def held_out_examples(per_task: int, seed: int) -> list[Example]:
    """`per_task` examples of every row: the question, with what may go before it, was never trained on."""
    examples: list[Example] = []
    for task in OTHER_TASKS:
        rng = random.Random(f"{seed}:{task.name}")
        examples += [held_out(rng, task, task.name, []) for _ in range(per_task)]
    rng = random.Random(f"{seed}:completion")
    examples += [held_out_completion(rng) for _ in range(per_task)]
    rng = random.Random(f"{seed}:tools")
    examples += [held_out(rng, DEVICE_TASK, "device: no tool offered", irrelevant_tools(rng)) for _ in range(per_task)]
    examples += [
        held_out(rng, rng.choice(OTHER_TASKS), "device: tool not needed", device_tools(rng)) for _ in range(per_task)
    ]
    looked_up: dict[str, list[Example]] = {"device: tool call": [], "device: telling the result": []}
    while any(len(rows) < per_task for rows in looked_up.values()):
        tools = device_tools(rng)
        before = context(rng, tools)
        exchange = DEVICE_TASK.draw(rng, tools, held_out=True)
        for index, message in enumerate(exchange.messages):
            if message["role"] == "assistant":
                row = "device: tool call" if message.get("tool_calls") else "device: telling the result"
                example = Example(row, [*before, *exchange.messages[:index]], tools, answer_text(message))
                looked_up[row].append(example)
    return examples + [example for rows in looked_up.values() for example in rows[:per_task]]


def held_out(rng: random.Random, task: Task, row: str, tools: list[Tool]) -> Example:
    before = context(rng, tools)
    *asked, answer = task.draw(rng, tools, held_out=True).messages
    return Example(row, [*before, *asked], tools, answer_text(answer))


def held_out_completion(rng: random.Random) -> Example:
    asked, sign, answer = completion(rng, held_out=True).partition(" =")
    return Example("arithmetic as bare text", [], [], answer, prompt=asked + sign)


def context(rng: random.Random, tools: list[Tool]) -> list[Message]:
    """Half of the examples open a conversation; the others follow one to three exchanges of the trained kind."""
    length = 0 if rng.random() < 0.5 else rng.randint(1, 3)
    exchanges = [pick(rng, tools).draw(rng, tools, held_out=False) for _ in range(length)]
    return [*system_prompt(rng), *messages_of(exchanges)]


def messages_of(exchanges: list[Exchange]) -> list[Message]:
    return [message for exchange in exchanges for message in exchange.messages]


def system_prompt(rng: random.Random) -> list[Message]:
    if rng.random() < 0.75:
        return []
    made_up = f"You are {words.full_name(rng)}, a {rng.choice(words.NOUNS)} from {words.city(rng)}."
    return [{"role": "system", "content": made_up if rng.random() < 0.2 else rng.choice(SYSTEM_PROMPTS)}]


def pick(rng: random.Random, tools: list[Tool]) -> Task:
    if tools and rng.random() < 0.5:
        return DEVICE_TASK
    return rng.choices(TASKS, [task.weight for task in TASKS])[0]


def offered_tools(rng: random.Random) -> list[Tool]:
    kind = rng.random()
    if kind < 0.7:
        return []
    return device_tools(rng) if kind < 0.94 else [device_status.other_tool(rng)]


def device_tools(rng: random.Random) -> list[Tool]:
    tools = [device_status.tool(rng)]
    if rng.random() < 0.25:
        tools.insert(rng.randint(0, 1), device_status.other_tool(rng))
    return tools


def irrelevant_tools(rng: random.Random) -> list[Tool]:
    return [device_status.other_tool(rng)] if rng.random() < 0.3 else []
