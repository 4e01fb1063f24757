"""Trains the demo model from scratch and writes it as a Hugging Face checkpoint beside its tokenizer.

    python -m demo_model.train OUTPUT_DIR

On a GPU this is the whole training; on a CPU give a few --steps and --rows to see it run.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from demo_model.data import IGNORED, Stream, batches
from demo_model.model import Llama, Shape, document_mask
from demo_model.tokenizer import END, PAD

WARMUP = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="holds tokenizer.json already; the model is written into it")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--rows", type=int, default=32, help="rows in a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row; longer conversations are left out")
    parser.add_argument("--workers", type=int, default=14, help="processes that make up text; part of the seed")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    shape = Shape()
    model = train(shape, options)
    write(model, shape, options.output)


def train(shape: Shape, options: argparse.Namespace) -> Llama:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama(shape).to(device)
    compiled = torch.compile(model, dynamic=False) if device == "cuda" else model
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")
    stream = Stream(options.output / "tokenizer.json", options.rows, options.length, options.seed)
    source = batches(stream, options.workers)
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options.steps)
        batch = next(source).to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = compiled(batch.tokens, batch.positions, document_mask(batch.documents))
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == options.steps:
            print(f"step {step} loss {loss.item():.4f} after {time.monotonic() - started:.0f} s", flush=True)
    return model


def schedule(step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to a fiftieth."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def write(model: Llama, shape: Shape, output: Path) -> None:
    vocabulary = json.loads((output / "tokenizer.json").read_text())["model"]["vocab"]
    pad, end = vocabulary[PAD], vocabulary[END]
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    write_json(output / "config.json", shape.hf_config(pad, end))
    generation = {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad, "do_sample": False}
    write_json(output / "generation_config.json", generation)


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
