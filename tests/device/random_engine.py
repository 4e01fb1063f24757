"""Engines with random weights, written without a checkpoint: speed does not depend on what the weights say.

python tests/device/random_engine.py llama-8b out/ --precision fp8
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farrier import __version__
from farrier.targets.backend import Choices
from farrier.targets.bfloat16 import to_bfloat16
from farrier.targets.cuda.backend import BLOCK_SIZE, ENGINE_FILE, CudaBackend
from farrier.targets.cuda.builder import write_engine
from farrier.targets.decoder import DecoderSpec
from farrier.targets.detect import detect
from farrier.targets.engine import Ceilings, EngineConfig
from farrier.targets.engine_dir import write_config
from farrier.targets.hf_config import from_hf_config
from farrier.targets.known import build_target
from farrier.targets.precision import precisions
from farrier.targets.tensorfile import Tensor

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
_POOL = 1 << 26


class RandomTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors, each a piece of one random pool."""

    def __init__(self, spec: DecoderSpec, precision: str) -> None:
        chosen = precisions(spec, precision, {})
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in spec.tensors().items():
            self._add(name, shape, chosen[name])
        if "lm_head.weight" not in self._shapes and chosen["lm_head.weight"] in ("fp8", "int8", "int4"):
            self._add("lm_head.weight", spec.tensors()["embed.weight"], chosen["lm_head.weight"])
        rng = np.random.default_rng(0)
        normal = rng.standard_normal(_POOL, np.float32)
        self._pools = {
            "BF16": to_bfloat16(normal * np.float32(0.02)),
            "F32": np.float32(1) + normal[: 1 << 20] * np.float32(0.1),
            "F8_E4M3": rng.integers(0, 0x70, _POOL, np.uint8) | (rng.integers(0, 2, _POOL, np.uint8) << 7),
            "I8": rng.integers(-127, 128, _POOL, np.int8),
            "U8": rng.integers(0, 256, _POOL, np.uint8),
        }

    def _add(self, name: str, shape: tuple[int, ...], precision: str) -> None:
        base = name.removesuffix(".weight")
        if precision == "fp8":
            self._shapes[name] = ("F8_E4M3", shape)
            self._shapes[base + ".scale"] = ("F32", shape[:1])
        elif precision == "int8":
            self._shapes[name] = ("I8", shape)
            self._shapes[base + ".scale"] = ("F32", shape[:1])
        elif precision == "int4":
            self._shapes[name] = ("U8", (shape[0], shape[1] // 2))
            self._shapes[base + ".scale"] = ("F32", (shape[0], shape[1] // 128))
        else:
            self._shapes[name] = ("BF16", shape)

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._shapes[name]
        pool = self._pools[dtype]
        if dtype == "F32":  # scales: weights of about 0.02
            return Tensor(dtype, np.resize(pool * np.float32(2e-4), shape))
        return Tensor(dtype, np.resize(pool, shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_random_engine(
    out: Path,
    model: str,
    precision: str,
    ceilings: Ceilings,
    *,
    target_name: str = "auto",
    kv_dtype: str | None = None,
    timings: Path | None = None,
) -> None:
    target, runs_here = build_target(detect(), target_name)
    spec = from_hf_config(MODELS[model], max_seq_len=ceilings.max_seq_len)
    backend = CudaBackend()
    kv: Any = backend.kv_dtype(spec, target, precision, kv_dtype)  # type: ignore[arg-type]
    out.mkdir(parents=True)
    tensors = RandomTensors(spec, precision)
    choices = Choices(target, precision, kv, ceilings, False, runs_here, timings)
    begun = time.perf_counter()

    def stage(title: str) -> Any:
        print(f"{time.perf_counter() - begun:.1f} s: {title}", flush=True)
        return lambda done, total: None

    write_engine(out, spec, tensors, choices, stage)
    print(f"{time.perf_counter() - begun:.1f} s: written", flush=True)
    config = EngineConfig(
        model=model,
        target=target.name,
        fingerprint=backend.fingerprint(target, precision, kv),
        spec=spec,
        precision=precision,
        overrides={},
        kv_dtype=kv,
        block_size=BLOCK_SIZE,
        ceilings=ceilings,
        eos_token_ids=(),
        has_tokenizer=False,
        source_digest="random",
        files={ENGINE_FILE: "random"},
        weight_bytes=(out / ENGINE_FILE).stat().st_size,
        kv_bytes_per_block=backend.kv_bytes_per_block(spec, kv),
        farrier_version=__version__,
    )
    write_config(out, config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--max-seq-len", type=int, default=8192)
    parser.add_argument("--timings", type=Path, help="model.cache of an earlier build")
    given = parser.parse_args()
    ceilings = Ceilings(given.max_batch_size, given.max_num_tokens, given.max_seq_len)
    write_random_engine(
        given.out, given.model, given.precision, ceilings, target_name=given.target, timings=given.timings
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
