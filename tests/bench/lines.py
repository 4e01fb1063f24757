"""A line of the table, and how measurements are taken in turns."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

ROUNDS = 5


@dataclass(frozen=True)
class Line:
    """`measured` beside `peer` (higher is better), or under a budget when there is no peer.

    goal: least ratio to the peer, or the budget; None when nothing was promised.
    """

    what: str
    unit: str
    measured: float
    peer: float | None
    goal: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.measured / self.peer

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return "–"
        reached = self.measured <= self.goal if self.ratio is None else self.ratio >= self.goal
        return "ok" if reached else "miss"

    def cells(self) -> list[str]:
        goal = "–" if self.goal is None else f"≤ {self.goal:g}" if self.peer is None else f"≥ {self.goal:.2f} ×"
        return [
            self.what,
            f"{self.measured:,.3g} {self.unit}" if self.measured < 100 else f"{self.measured:,.0f} {self.unit}",
            "–" if self.peer is None else f"{self.peer:,.1f}",
            "–" if self.ratio is None else f"{self.ratio:.2f} ×",
            goal,
            self.verdict,
        ]


def in_turns(*measurements: Callable[[], list[float]]) -> list[float]:
    """Medians: every round takes each measurement once, so that whatever slows the machine slows all of them."""
    samples: list[list[float]] = [[] for _ in measurements]
    for _ in range(ROUNDS):
        for sample, measure in zip(samples, measurements, strict=True):
            sample += measure()
    return [median(sample) for sample in samples]
