"""`farrier bench`"""

import asyncio
import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from farrier.agent.console import console, errors_console
from farrier.targets.errors import FarrierError, RequestError

if TYPE_CHECKING:
    import numpy as np

    from farrier.runtime.bench.load import ClosedLoop, OpenLoop
    from farrier.runtime.bench.report import Report
    from farrier.runtime.bench.workload import BenchRequest

app = typer.Typer(
    help="Measure an engine on this machine, or any OpenAI endpoint.", no_args_is_help=True, rich_markup_mode=None
)

Engine = Annotated[Path, typer.Argument(help="An engine directory.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Also draw a chart.")]
Seed = Annotated[int, typer.Option(min=0, help="Equal seeds give equal prompts.")]
KvBlocks = Annotated[int | None, typer.Option(min=1, help="Size of the KV pool; by default as memory allows.")]
PrefixCaching = Annotated[bool, typer.Option(help="Reuse the KV cache of equal beginnings.")]
NumRequests = Annotated[int | None, typer.Option(min=1, help="Random requests; 64 by default.")]
InputLen = Annotated[
    str | None, typer.Option(help="Prompt tokens of random requests: 128, 64:256 (uniform) or normal:MEAN:STD.")
]
OutputLen = Annotated[str, typer.Option(help="Tokens to generate, spelled likewise.")]
Dataset = Annotated[
    Path | None,
    typer.Option(metavar="FILE.jsonl", help='Instead: records with "prompt", "prompt_token_ids" or "messages".'),
]


@app.command("latency")
def latency_command(
    engine: Engine,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Such as 1,4,16; by default powers of two up to the engine's max_batch_size.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens of each sequence.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens to generate for each sequence.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each batch size.")] = 3,
    seed: Seed = 0,
    kv_blocks: KvBlocks = None,
    prefix_caching: PrefixCaching = True,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Time to the first token and between tokens, by batch size, without a server."""
    import numpy as np

    from farrier.runtime.bench.conditions import cache_state, engine_conditions
    from farrier.runtime.bench.offline import OfflineBench
    from farrier.runtime.bench.report import latency_report
    from farrier.targets.loading import execution_target

    _check_plot(plot)
    with OfflineBench(engine, kv_blocks=kv_blocks, enable_prefix_caching=prefix_caching) as bench, _progress() as bar:
        sizes = _batch_sizes(batch_sizes, bench.config.ceilings.max_batch_size)
        task = bar.add_task("Measuring", total=len(sizes))
        latency = bench.latency(
            sizes,
            input_len,
            output_len,
            repeats=repeats,
            rng=np.random.default_rng(seed),
            on_batch=lambda size: bar.update(task, completed=sizes.index(size)),
        )
        config = bench.config
    target = execution_target(config)
    conditions = engine_conditions(config, target) | {
        "context": f"{input_len} prompt tokens, {output_len} generated, measured runs: {repeats}, after a warm-up",
        "cache": cache_state(latency.cache),
        "TTFT": "until every sequence of the batch has its first token; not in ITL, tok/s and GB/s, which are of "
        "the steps in which all sequences decode",
        "GB/s": "the weights and the KV cache a step reads at least, over its time",
    }
    _publish(latency_report(latency, conditions, target.memory_bandwidth), json_file, plot)


@app.command("throughput")
def throughput_command(
    engine: Engine,
    num_requests: NumRequests = None,
    input_len: InputLen = None,
    output_len: OutputLen = "128",
    dataset: Dataset = None,
    seed: Seed = 0,
    kv_blocks: KvBlocks = None,
    prefix_caching: PrefixCaching = True,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Tokens per second when all requests are there at once, without a server."""
    import numpy as np

    from farrier.runtime.bench.conditions import cache_state, engine_conditions
    from farrier.runtime.bench.offline import OfflineBench
    from farrier.runtime.bench.report import throughput_report
    from farrier.targets.loading import execution_target

    _check_plot(plot)
    rng = np.random.default_rng(seed)
    with OfflineBench(engine, kv_blocks=kv_blocks, enable_prefix_caching=prefix_caching) as bench:
        config = bench.config
        requests, workload = _requests(
            rng, dataset, num_requests, input_len, output_len, "tokens", config.spec.vocab_size
        )
        with errors_console().status(f"Generating for {len(requests)} requests"):
            result = bench.throughput(requests, rng)
    target = execution_target(config)
    conditions = engine_conditions(config, target) | {
        "context": workload,
        "cache": cache_state(result.cache),
        "TTFT": "inside: the time is from the first prompt in to the last token out",
        "GB/s": "the weights and the KV cache the steps read at least, over that time",
    }
    _publish(throughput_report(result, conditions, target.memory_bandwidth), json_file, plot)


@app.command("serve")
def serve_command(
    base_url: Annotated[str, typer.Option(help="An OpenAI endpoint.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the first that the endpoint lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FARRIER_API_KEY")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many clients, each with one request; 16 by default.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Open loop: so many requests a second, Poisson; inf sends all at once.")
    ] = None,
    num_requests: NumRequests = None,
    input_len: InputLen = None,
    output_len: OutputLen = "128",
    prompts: Annotated[
        Literal["tokens", "text", "chat"],
        typer.Option(help="Random prompts as token ids or text to completions, or as text to chat completions."),
    ] = "tokens",
    vocab_size: Annotated[int, typer.Option(min=1, help="Random token ids are below this.")] = 1000,
    dataset: Dataset = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Generate to the full length. Not OpenAI's own field: some endpoints refuse it.")
    ] = True,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 600,
    seed: Seed = 0,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Latency percentiles and throughput of an OpenAI endpoint under load, streaming. Fails when every request does."""
    import numpy as np

    from farrier.runtime.bench.conditions import endpoint_conditions
    from farrier.runtime.bench.load import encode_request, parse_endpoint, run_load, served_model
    from farrier.runtime.bench.report import serve_report
    from farrier.runtime.bench.workload import Lengths, random_requests

    _check_plot(plot)
    load = _load(concurrency, request_rate)
    endpoint = parse_endpoint(base_url, api_key)
    rng = np.random.default_rng(seed)
    requests, workload = _requests(rng, dataset, num_requests, input_len, output_len, prompts, vocab_size)
    model = model or served_model(base_url, api_key)
    short = Lengths.parse("8", "input_len")
    # Of the kind that is measured, but nothing that is measured: what it leaves in a cache helps nobody.
    warm_up = random_requests(rng, 1, short, short, _kind_of(requests[0]), vocab_size)

    def encode(given: "list[BenchRequest]") -> list[bytes]:
        return [encode_request(endpoint, request, model, ignore_eos=ignore_eos) for request in given]

    warmed = asyncio.run(run_load(endpoint, encode(warm_up), load, rng=rng, timeout_s=timeout))
    if warmed.failures:
        raise FarrierError(f"{base_url} does not answer: {warmed.failures[0]}", code="bench_failed")
    with _progress() as bar:
        task = bar.add_task("Requests", total=len(requests))
        encoded, done = encode(requests), partial(bar.update, task, advance=1)
        result = asyncio.run(run_load(endpoint, encoded, load, rng=rng, timeout_s=timeout, on_done=done))
    if not result.answers:
        raise FarrierError(f"Every request failed. The first: {result.failures[0]}", code="bench_failed")
    cached = result.cached_tokens
    conditions = endpoint_conditions(base_url, model, api_key) | {
        "context": workload,
        "cache": "the server does not tell what it found in a prefix cache"
        if cached is None
        else f"{'cold' if cached == 0 else 'partly warm'}: {cached:,} of {result.prompt_tokens:,} prompt tokens found",
        "TTFT": "inside tok/s and end to end; not in ITL (gaps between streamed events) and TPOT (mean of the rest)",
    }
    _publish(serve_report(result, load, conditions), json_file, plot)


def _load(concurrency: int | None, request_rate: float | None) -> "ClosedLoop | OpenLoop":
    from farrier.runtime.bench.load import ClosedLoop, OpenLoop

    if request_rate is None:
        return ClosedLoop(concurrency or 16)
    if concurrency is not None:
        raise RequestError("--concurrency is a closed loop, --request-rate an open one; give one of them.")
    if not request_rate > 0:
        raise RequestError("--request-rate must be above 0, or inf.", param="request_rate")
    return OpenLoop(request_rate)


def _requests(
    rng: "np.random.Generator",
    dataset: Path | None,
    num_requests: int | None,
    input_len: str | None,
    output_len: str,
    kind: Literal["tokens", "text", "chat"],
    vocab_size: int,
) -> "tuple[list[BenchRequest], str]":
    """The requests to measure, and what to say about them."""
    from farrier.runtime.bench.workload import Lengths, random_requests, read_dataset

    outputs = Lengths.parse(output_len, "--output-len")
    if dataset is not None:
        for option, value in (("--num-requests", num_requests), ("--input-len", input_len)):
            if value is not None:
                raise RequestError(f"{option} is for random requests; a data set has its own.", param="dataset")
        requests = read_dataset(dataset, lambda: outputs.draw(rng, 1)[0])
        return requests, f"the {len(requests):,} requests of {dataset.name}"
    inputs = Lengths.parse(input_len or "128", "--input-len")
    requests = random_requests(rng, num_requests or 64, inputs, outputs, kind, vocab_size)
    return requests, f"{len(requests):,} random requests ({kind}): {inputs.text} in, {outputs.text} out; all different"


def _kind_of(request: "BenchRequest") -> Literal["tokens", "text", "chat"]:
    if isinstance(request.prompt, list):
        return "chat"
    return "text" if isinstance(request.prompt, str) else "tokens"


def _batch_sizes(given: str | None, largest: int) -> list[int]:
    if given is None:
        return [2**power for power in range(int(math.log2(largest)) + 1)]
    parts = given.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"--batch-sizes are counts such as 1,4,16, not {given!r}.", param="batch_sizes")
    return sorted({int(part) for part in parts})


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    terminal = errors_console()
    # Drawn seldom: it shares the processor with what is measured.
    return Progress(*columns, console=terminal, transient=True, refresh_per_second=1, disable=not terminal.is_terminal)


def _check_plot(plot: Path | None) -> None:
    """Before anything is measured, not after."""
    if plot is not None and plot.suffix != ".svg":
        raise RequestError(f"--plot draws SVG; give a name that ends in .svg, not {plot.name!r}.", param="plot")


def _publish(report: "Report", json_file: Path | None, plot: Path | None) -> None:
    console().print(report.render())
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
        if plot is not None:
            plot.write_text(report.as_svg(), encoding="utf-8")
    except OSError as error:
        raise FarrierError(f"Cannot write {error.filename}: {error.strerror}.", code="cannot_write") from error
