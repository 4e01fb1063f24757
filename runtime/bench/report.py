"""From measurements to what is shown: a table, JSON, a chart."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from farrier.runtime.bench.chart import Panel, number, svg
from farrier.runtime.bench.conditions import Conditions
from farrier.runtime.bench.load import ClosedLoop, OpenLoop, ServeResult
from farrier.runtime.bench.offline import Latency, Throughput
from farrier.runtime.bench.statistics import Summary


@dataclass(frozen=True)
class Report:
    """`results` is what goes into the JSON; the rest is made for people."""

    benchmark: str
    title: str
    headline: str
    """What it comes down to, in a line."""
    conditions: Conditions
    columns: list[str]
    rows: list[list[str]]
    results: dict[str, Any]
    panels: list[Panel]
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "conditions": self.conditions,
            "results": self.results,
            "warnings": self.warnings,
        }

    def as_svg(self) -> str:
        conditions = "\N{NO-BREAK SPACE}· ".join(f"{name}: {text}" for name, text in self.conditions.items())
        return svg(self.title, self.headline, conditions, self.panels)

    def render(self) -> RenderableType:
        conditions = Table(show_header=False, box=None, pad_edge=False)
        for name, text in self.conditions.items():
            conditions.add_row(name, text, style="dim")
        table = Table()
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        heading = Text.assemble((self.title, "bold"), "\n", self.headline)
        return Group(heading, table, conditions, *(f"Warning: {warning}" for warning in self.warnings))


def latency_report(latency: Latency, conditions: Conditions, bandwidth: float | None) -> Report:
    """bandwidth: of the machine's memory, bytes/s, where it is known."""
    best = max(latency.batches, key=lambda batch: batch.tokens_per_second)
    rows = [
        [
            str(batch.batch_size),
            _ms(batch.first_token.p50),
            *(_ms(value) for value in (batch.between_tokens.p50, batch.between_tokens.p90, batch.between_tokens.p99)),
            number(batch.tokens_per_second),
            number(batch.bytes_per_second / 1e9),
        ]
        for batch in latency.batches
    ]
    return Report(
        benchmark="latency",
        title="Latency by batch size",
        headline=f"{number(best.tokens_per_second)} tok/s decoding at batch {best.batch_size}",
        conditions=conditions,
        columns=["batch", "TTFT ms", "ITL ms p50", "p90", "p99", "decode tok/s", "GB/s"],
        rows=rows,
        results=asdict(latency),
        panels=[
            Panel("Decode", "tok/s", [(f"batch {b.batch_size}", b.tokens_per_second) for b in latency.batches]),
            Panel(
                "Between tokens, p50",
                "ms",
                [(f"batch {b.batch_size}", 1e3 * b.between_tokens.p50) for b in latency.batches],
            ),
            Panel(
                "To the batch's first tokens, p50",
                "ms",
                [(f"batch {b.batch_size}", 1e3 * b.first_token.p50) for b in latency.batches],
            ),
        ],
        warnings=_too_fast(max(batch.bytes_per_second for batch in latency.batches), bandwidth),
    )


def throughput_report(result: Throughput, conditions: Conditions, bandwidth: float | None) -> Report:
    rates = {
        "output": result.output_tokens / result.seconds,
        "prompt": result.prompt_tokens / result.seconds,
        "total": (result.output_tokens + result.prompt_tokens) / result.seconds,
    }
    rows = [
        *([f"{name} tok/s", number(rate)] for name, rate in rates.items()),
        ["requests/s", number(result.requests / result.seconds)],
        ["GB/s", number(result.bytes_per_second / 1e9)],
        ["requests", f"{result.requests:,}"],
        ["output tokens", f"{result.output_tokens:,}"],
        ["prompt tokens", f"{result.prompt_tokens:,}"],
        ["seconds", number(result.seconds)],
        ["sequences in a step, mean", number(result.mean_sequences)],
    ]
    return Report(
        benchmark="throughput",
        title="Throughput, everything at once",
        headline=f"{number(rates['output'])} output tok/s from {result.requests:,} requests",
        conditions=conditions,
        columns=["", "measured"],
        rows=rows,
        results=asdict(result) | {"tokens_per_second": rates, "requests_per_second": result.requests / result.seconds},
        panels=[Panel("Tokens", "tok/s", list(rates.items()))],
        warnings=_too_fast(result.bytes_per_second, bandwidth),
    )


def serve_report(result: ServeResult, load: ClosedLoop | OpenLoop, conditions: Conditions) -> Report:
    timings = {
        "first_token": ("TTFT", "Time to first token", result.first_token),
        "between_tokens": ("ITL", "Between tokens", result.between_tokens),
        "per_output_token": ("TPOT", "Per output token", result.per_output_token),
        "end_to_end": ("end to end", "End to end", result.end_to_end),
    }
    rows = [
        [f"{short} ms", *("–" if timing is None else _ms(getattr(timing, column)) for column in _SHOWN)]
        for short, _, timing in timings.values()
    ]
    output_rate, request_rate = result.output_tokens / result.seconds, len(result.answers) / result.seconds
    return Report(
        benchmark="serve",
        title=_load_title(load),
        headline=f"{number(output_rate)} output tok/s, {number(request_rate)} requests/s, "
        f"{len(result.failures)} of {len(result.answers) + len(result.failures)} failed",
        conditions=conditions,
        columns=["", "mean", "p50", "p90", "p99", "max"],
        rows=rows,
        results={
            "load": _load_json(load),
            "seconds": result.seconds,
            "requests": len(result.answers),
            "failures": result.failures_by_reason,
            "prompt_tokens": result.prompt_tokens,
            "cached_tokens": result.cached_tokens,
            "output_tokens": result.output_tokens,
            "output_tokens_per_second": output_rate,
            "requests_per_second": request_rate,
            **{key: None if timing is None else asdict(timing) for key, (_, _, timing) in timings.items()},
        },
        panels=[_percentile_panel(name, timing) for _, name, timing in timings.values() if timing is not None],
        warnings=[f"{count} × {_example(result, reason)}" for reason, count in result.failures_by_reason.items()],
    )


_SHOWN = ("mean", "p50", "p90", "p99", "max")


def _percentile_panel(name: str, timing: Summary) -> Panel:
    return Panel(name, "ms", [(column, 1e3 * getattr(timing, column)) for column in ("p50", "p90", "p99")])


def _load_title(load: ClosedLoop | OpenLoop) -> str:
    if isinstance(load, ClosedLoop):
        return f"Closed loop, {load.concurrency} at a time"
    return "All at once" if math.isinf(load.rate) else f"Open loop, {load.rate:g} requests/s"


def _load_json(load: ClosedLoop | OpenLoop) -> dict[str, Any]:
    if isinstance(load, ClosedLoop):
        return {"kind": "closed", "concurrency": load.concurrency}
    return {"kind": "open", "rate": None if math.isinf(load.rate) else load.rate}


def _example(result: ServeResult, reason: str) -> str:
    return str(next(failure for failure in result.failures if failure.reason == reason))


def _too_fast(bytes_per_second: float, bandwidth: float | None) -> list[str]:
    if bandwidth is None or bytes_per_second <= bandwidth:
        return []
    return [
        f"{bytes_per_second / 1e9:,.0f} GB/s is more than the {bandwidth / 1e9:,.0f} GB/s of this machine's memory: "
        "the weights fit into a cache, or the measurement is wrong."
    ]


def _ms(seconds: float) -> str:
    return number(1e3 * seconds)
