"""The tasks by name. Each draws a random exchange; how often they are trained on is their weight."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from demo_model.conversation import Exchange, Tool
from demo_model.split import is_held_out
from demo_model.tasks import (
    arithmetic,
    counting,
    device_status,
    extraction,
    greeting,
    identity,
    reversing,
    scope,
    sorting,
    spelling,
    units,
)


@dataclass(frozen=True)
class Task:
    name: str
    weight: int
    sample: Callable[[random.Random, list[Tool]], Exchange]

    def draw(self, rng: random.Random, tools: list[Tool], held_out: bool) -> Exchange:
        """A random exchange of the asked-for side of the split."""
        while True:
            exchange = self.sample(rng, tools)
            if is_held_out(exchange.key) == held_out:
                return exchange


def without_tools(sample: Callable[[random.Random], Exchange]) -> Callable[[random.Random, list[Tool]], Exchange]:
    return lambda rng, tools: sample(rng)


TASKS = (
    Task("greeting", 5, without_tools(greeting.sample)),
    Task("identity", 4, without_tools(identity.sample)),
    Task("scope", 5, without_tools(scope.sample)),
    Task("arithmetic", 16, without_tools(arithmetic.sample)),
    Task("reversing", 15, without_tools(reversing.sample)),
    Task("spelling", 4, without_tools(spelling.sample)),
    Task("counting", 12, without_tools(counting.sample)),
    Task("sorting", 12, without_tools(sorting.sample)),
    Task("units", 18, without_tools(units.sample)),
    Task("extraction", 13, without_tools(extraction.sample)),
    Task("device status", 8, device_status.sample),
)
