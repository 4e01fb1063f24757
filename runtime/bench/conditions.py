"""What a number means nothing without: machine, power mode, precision, cache state, versions."""

import importlib.metadata
import platform
import re
from urllib.parse import urlsplit

import httpx

from farrier import __version__
from farrier.runtime.bench.offline import CacheUse
from farrier.targets.detect import detect
from farrier.targets.engine import EngineConfig
from farrier.targets.target import Target

Conditions = dict[str, str]


def engine_conditions(config: EngineConfig, target: Target) -> Conditions:
    ceilings = config.ceilings
    overrides = "".join(f", {pattern} {precision}" for pattern, precision in config.overrides.items())
    return {
        "model": f"{config.model} ({config.spec.num_parameters() / 1e6:,.1f} M parameters, "
        f"{config.weight_bytes / 1e6:,.1f} MB of weights)",
        "precision": f"{config.precision}{overrides}; KV cache {config.kv_dtype}",
        "ceilings": f"{ceilings.max_batch_size} sequences and {ceilings.max_num_tokens} tokens a step, "
        f"{ceilings.max_seq_len} tokens a sequence",
        **machine_conditions(target),
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in (
                ("farrier", __version__),
                *((library, _installed(library) or built) for library, built in config.fingerprint.versions),
                ("Python", platform.python_version()),
            )
        ),
    }


def machine_conditions(target: Target) -> Conditions:
    bandwidth = f", {target.memory_bandwidth / 1e9:,.0f} GB/s" if target.memory_bandwidth else ""
    return {
        "target": f"{target.name} ({target.device_name}, {target.cpu.cores} CPU cores{bandwidth})",
        "power mode": target.power_mode or "this machine does not tell",
    }


def cache_state(use: CacheUse) -> str:
    if not use.enabled:
        return "prefix caching off"
    state = "cold" if use.cached_tokens == 0 else "partly warm"
    return f"prefix caching on, {state}: {use.cached_tokens:,} of {use.prompt_tokens:,} prompt tokens found"


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def endpoint_conditions(base_url: str, model: str, api_key: str | None) -> Conditions:
    """What an endpoint tells about itself: a farrier through its metrics, any other next to nothing."""
    told = _metric_labels(base_url, api_key)
    conditions = {"endpoint": base_url, "model": model}
    if told:
        conditions["precision"] = f"{told.get('precision')}; KV cache {told.get('cache_dtype')}"
        conditions["target"] = f"{told.get('target')}, as the server tells"
        conditions["versions"] = f"farrier {told.get('version')} (server), farrier {__version__} (client)"
    else:
        conditions["precision"] = conditions["target"] = "the server does not tell"
        conditions["versions"] = f"the server does not tell; farrier {__version__} (client)"
    if _is_local(base_url):
        # The same machine, so what is detected here is true there.
        machine = machine_conditions(detect().chosen)
        conditions["power mode"] = machine["power mode"]
        conditions["client"] = f"on the server's machine and sharing it: {machine['target']}"
    else:
        conditions["power mode"] = "the server does not tell"
        conditions["client"] = "on another machine"
    return conditions


def _metric_labels(base_url: str, api_key: str | None) -> dict[str, str]:
    """The labels of farrier's info metrics; empty when the endpoint has none."""
    url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
    try:
        text = httpx.get(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {}, timeout=10).text
    except httpx.HTTPError:
        return {}
    infos = re.findall(r"^farrier:(?:engine|cache_config)_info\{(.*)\} ", text, re.MULTILINE)
    return dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', ",".join(infos)))


def _is_local(base_url: str) -> bool:
    return (urlsplit(base_url).hostname or "") in ("127.0.0.1", "::1", "localhost")
