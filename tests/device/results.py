"""Results of a run as one JSON file, and as the table of goals that run.sh and docs/performance/h200.md show.

python tests/device/results.py collect PIECES results.json    what the steps of run.sh left, and the table on the screen
python tests/device/results.py page                           writes the tables of docs/performance/h200.md anew
"""

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "performance"
PAGE = FOLDER / "h200.md"
PEER = FOLDER / "vllm-h200.json"
MACHINES = ("h100", "h200")
"""Results that the page shows, as far as they are there."""
BEGIN, END = "<!-- figures: written by tests/device/results.py page -->", "<!-- end of figures -->"
COLUMNS = ("engine", "figure", "vLLM, H200", "farrier", "must", "aim", "reached", "achieved", "of the ceiling")

Json = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A row of the table. `must` and `aim`: a number an engine, or times what the peer reaches."""

    name: str
    title: str
    lower_is_better: bool = False
    must: float | dict[str, float] | None = None
    aim: float | dict[str, float] | None = None
    absolute: bool = False
    """`must` and `aim` are numbers for every engine, not factors."""
    unit: float = 1.0
    rates: tuple[str, ...] = ()

    def goals(self, engine: str, peer: float | None) -> tuple[float | None, float | None]:
        return self._goal(self.must, engine, peer), self._goal(self.aim, engine, peer)

    def _goal(self, goal: float | dict[str, float] | None, engine: str, peer: float | None) -> float | None:
        if isinstance(goal, dict):
            return goal.get(engine)
        if goal is None or self.absolute:
            return goal
        return None if peer is None else goal * peer


def _load(requests: int, prompt: int, tokens: int, must: float, aim: float) -> Figure:
    name = f"load_{requests}x{prompt}+{tokens}"
    title = f"{requests} concurrent, {prompt} in, {tokens} out: output tok/s"
    return Figure(f"{name}_tok_s", title, must=must, aim=aim, rates=(f"{name}_bytes_per_s", f"{name}_flop_per_s"))


def _first_token(prompt: int, aim: float | None) -> Figure:
    name = f"ttft_{prompt}"
    title = f"first token, {prompt} in: ms"
    return Figure(f"{name}_ms", title, lower_is_better=True, must=1.0, aim=aim, rates=(f"{name}_flop_per_s",))


FIGURES = (
    Figure(
        "decode_tok_s",
        "batch 1 decode: tok/s",
        must={"llama-8b-bf16": 255, "llama-8b-fp8": 400, "llama-1b-bf16": 1250},
        aim={"llama-8b-bf16": 275, "llama-8b-fp8": 460, "llama-1b-bf16": 1450},
        rates=("decode_bytes_per_s",),
    ),
    _first_token(128, 0.5),
    _first_token(1024, None),
    _first_token(4096, 0.9),
    _load(64, 128, 256, 1.1, 1.3),
    _load(256, 128, 128, 0.9, 1.2),
    _load(64, 2048, 128, 0.9, 1.1),
    Figure("start_cold_s", "process start to first token, cold: s", lower_is_better=True, must=8, aim=3, absolute=True),
    Figure("start_warm_s", "the same, warm: s", lower_is_better=True, must=8, aim=3, absolute=True),
    Figure(
        "rss_bytes",
        "resident memory of the server without the weights' map: GB",
        lower_is_better=True,
        must=1e9,
        aim=0.5e9,
        absolute=True,
        unit=1e9,
    ),
)


def table(results: Json, peer: Json) -> list[tuple[str, ...]]:
    """One row for each engine and figure that was measured; see COLUMNS."""
    rows = []
    for engine, measured in sorted(results["engines"].items()):
        for figure in FIGURES:
            if figure.name not in measured:
                continue
            value = measured[figure.name]
            theirs = peer["engines"].get(engine, {}).get(figure.name)
            must, aim = figure.goals(engine, theirs)
            achieved, share = _achieved(figure, measured, results.get("ceilings") or {})
            shown = [theirs, value, must, aim]
            numbers = ["–" if number is None else _number(number / figure.unit) for number in shown]
            rows.append((engine, figure.title, *numbers, _verdict(figure, value, must, aim), achieved, share))
    return rows


def _verdict(figure: Figure, value: float, must: float | None, aim: float | None) -> str:
    def reaches(goal: float | None) -> bool:
        return goal is not None and (value <= goal if figure.lower_is_better else value >= goal)

    if must is None and aim is None:
        return "–"
    return "aim" if reaches(aim) else "must" if reaches(must) else "no"


def _achieved(figure: Figure, measured: Json, ceilings: Json) -> tuple[str, str]:
    rates, shares = [], []
    for rate in figure.rates:
        if rate not in measured:
            continue
        reads = rate.endswith("_bytes_per_s")
        value = measured[rate] / 1e12
        rates.append(
            f"{value:.2f} TB/s" if reads else f"{value:.0f} TFLOP/s" if value >= 10 else f"{value:.1f} TFLOP/s"
        )
        ceiling = ceilings.get("read_bytes_per_s" if reads else "bf16_flop_per_s")
        if ceiling:
            shares.append(f"{measured[rate] / ceiling:.0%}")
    return ", ".join(rates) or "–", ", ".join(shares) or "–"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose columns also line up as plain text."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (COLUMNS, *rows)]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def described(results: Json) -> str:
    """What the figures were measured on, and the ceilings of that card."""
    ceilings = results.get("ceilings")
    found = (
        f"it reads {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s and multiplies bf16 at "
        f"{ceilings['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s, measured in the same run"
        if ceilings
        else "its ceilings were not measured in this run"
    )
    note = f" {results['note']}" if "note" in results else ""
    return f"{results['device']}, {results['date']}, farrier {results['farrier']}; {found}.{note}"


def collect(pieces: Path) -> Json:
    """Everything the steps of a run left in `pieces`."""
    from farrier import __version__
    from farrier.targets.detect import detect, select_target

    target = select_target(detect(), "auto")
    engines: dict[str, Json] = {}
    for path in sorted(pieces.glob("llama-*.*.json")):
        engines.setdefault(path.name.split(".")[0], {}).update(_read(path))
    steps = [line.split("\t") for line in (pieces / "steps.tsv").read_text().splitlines()]
    others = {path.stem: _read(path) for path in sorted(pieces.glob("*.json")) if not path.name.startswith("llama-")}
    return {
        "device": target.device_name,
        "driver": target.driver_version,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "farrier": __version__,
        "ceilings": others.pop("ceilings", None),
        "steps": {name: {"status": status, "seconds": int(seconds)} for name, status, seconds in steps},
        "engines": engines,
        **others,
    }


def page_text(page: str) -> str:
    """The page with its tables as the JSON files have them."""
    peer = _read(PEER)
    parts = []
    for machine in MACHINES:
        path = FOLDER / f"{machine}.json"
        if path.exists():
            results = _read(path)
            parts.append(f"### {results['device']}\n\n{described(results)}\n\n{markdown(table(results, peer))}\n")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n\n" + "\n".join(parts) + "\n" + END + after


def _read(path: Path) -> Json:
    document: Json = json.loads(path.read_text(encoding="utf-8"))
    return document


def _print(results: Json) -> None:
    print(f"\n{described(results)}\n")
    for name, step in results["steps"].items():
        print(f"{name:15} {step['status']:20} {step['seconds']:4} s")
    tasks = results.get("accuracy", {}).get("tasks", {})
    if tasks:
        drops = [both["cpu"] - both["here"] for both in tasks.values()]
        print(f"held-out accuracy of the demo model: at most {max(drops):.1f} points below the CPU")
    for part, rate in (("throughput", "tokens_per_second"), ("serve", "output_tokens_per_second")):
        if f"demo.{part}" in results:
            print(f"farrier bench {part}, demo model: {results[f'demo.{part}']['results'][rate]} output tok/s")
    print("\n" + markdown(table(results, _read(PEER))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("pieces", type=Path)
    collecting.add_argument("out", type=Path)
    commands.add_parser("page")
    given = parser.parse_args()
    if given.command == "page":
        PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    results = collect(given.pieces)
    given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
