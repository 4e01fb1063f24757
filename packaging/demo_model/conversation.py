"""Messages, and an exchange: one question with everything up to its final answer."""

import json
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """`key` names the example in canonical form and decides on which side of the split it falls.

    Exchanges with the same key have the same answers, however the question is put. None marks what is only
    ever trained on, such as the multiplication table of single digits, which nothing could be inferred from.
    """

    key: str | None
    messages: tuple[Message, ...]


def ask(key: str | None, question: str, answer: str) -> Exchange:
    return Exchange(key, (user(question), assistant(answer)))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def tool_calls(name: str, arguments: list[dict[str, Any]]) -> Message:
    """One assistant turn that calls the tool once per element of `arguments`."""
    calls = [{"type": "function", "function": {"name": name, "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def tool_result(content: str) -> Message:
    return {"role": "tool", "content": content}


def answer_text(message: Message) -> str:
    """What the model writes for an assistant message, without the end-of-turn token."""
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", [])
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)
