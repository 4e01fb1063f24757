"""Prometheus metrics under vLLM's names with the prefix `farrier:`."""

from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farrier import __version__
from farrier.runtime.outputs import CoreStats, Delta
from farrier.targets.engine import EngineConfig

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_WHOLE_REQUEST = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """All metrics of one served engine, in a registry of their own."""

    def __init__(self, model: str, config: EngineConfig, stats: Callable[[], CoreStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_CoreCollector(model, config, stats))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"farrier:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model)

        self.first_token = histogram("time_to_first_token_seconds", "Until the first token.", _FIRST_TOKEN)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two tokens.", _BETWEEN_TOKENS)
        self.whole_request = histogram("e2e_request_latency_seconds", "Until the last token.", _WHOLE_REQUEST)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a finished output.", _TOKENS)
        self.output_tokens = histogram("request_generation_tokens", "Tokens of a finished output.", _TOKENS)
        finished = Counter(
            "farrier:request_success",
            "Finished outputs by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.finished = {reason: finished.labels(model, reason) for reason in ("stop", "length", "abort", "error")}

    def expose(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class RequestTimer:
    """Observes the deltas of one HTTP request; `num_outputs` of them end."""

    def __init__(self, metrics: Metrics, num_outputs: int) -> None:
        self._metrics = metrics
        self._start = monotonic()
        self._last: list[float | None] = [None] * num_outputs
        self._tokens = [0] * num_outputs
        self._unfinished = num_outputs

    def observe(self, output: int, delta: Delta) -> None:
        now, last, count = monotonic(), self._last[output], len(delta.token_ids)
        if count:
            if last is None:
                self._metrics.first_token.observe(now - self._start)
            else:
                for _ in range(count):
                    self._metrics.between_tokens.observe((now - last) / count)
            self._last[output] = now
            self._tokens[output] += count
        if delta.finish_reason is not None:
            self._unfinished -= 1
            self._metrics.finished[delta.finish_reason].inc()
            self._metrics.whole_request.observe(now - self._start)
            self._metrics.prompt_tokens.observe(delta.num_prompt_tokens)
            self._metrics.output_tokens.observe(self._tokens[output])

    def close(self) -> None:
        """Outputs that did not end were aborted."""
        self._metrics.finished["abort"].inc(self._unfinished)
        self._unfinished = 0


class _CoreCollector(Collector):
    """Reads the engine core's own counters when Prometheus asks, so that a step pays nothing for them."""

    def __init__(self, model: str, config: EngineConfig, stats: Callable[[], CoreStats]) -> None:
        self._model = model
        self._config = config
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._gauge("num_requests_running", "Outputs that hold KV blocks.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Outputs that wait.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", stats.kv_cache_usage)
        yield self._counter("num_preemptions", "Outputs put back to waiting.", stats.num_preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens taken in.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found cached.", stats.prefix_cache_hits)
        yield self._counter("engine_steps", "Iterations of the engine.", stats.steps)
        yield self._info("cache_config_info", self._cache_labels(stats))
        yield self._info("engine_info", self._engine_labels())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"farrier:{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"farrier:{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _info(self, name: str, values: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(f"farrier:{name}", "Facts, as labels.", labels=["model_name", *values])
        family.add_metric([self._model, *values.values()], 1)
        return family

    def _cache_labels(self, stats: CoreStats) -> dict[str, str]:
        config = self._config
        return {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(stats.num_kv_blocks),  # vLLM's label, whatever the device
            "cache_dtype": config.kv_dtype,
        }

    def _engine_labels(self) -> dict[str, str]:
        config = self._config
        return {
            "version": __version__,
            "target": config.target,
            "precision": config.precision,
            "max_batch_size": str(config.ceilings.max_batch_size),
            "max_num_tokens": str(config.ceilings.max_num_tokens),
            "max_seq_len": str(config.ceilings.max_seq_len),
            "source_digest": config.source_digest,
        }
