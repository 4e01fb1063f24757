"""llama.cpp on the shapes of model.py, commanded over standard input. Needs llama-cpp-python and gguf, not farrier.

python llama_peer.py FILE.gguf bf16|q8_0|q4_0 THREADS

Writes the file first if it is not there. Every line of input is a JSON command, and is answered with a JSON list of
seconds, one for each call of llama_decode:
{"decode": BATCH, "steps": N}: the whole batch goes on by a token, from a context of CONTEXT tokens.
{"prefill": TOKENS, "runs": N}: one prompt, in one piece.
"""

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import gguf
import llama_cpp
import numpy as np
from model import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    MAX_POSITIONS,
    NORM_EPS,
    ROPE_THETA,
    VOCAB,
    random_matrix,
)

CONTEXT, MAX_BATCH, MAX_TOKENS = 128, 16, 512
TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def write_gguf(path: Path, kind: str) -> None:
    if path.is_file():
        return
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        quantized = gguf.quants.quantize(random_matrix(rng, rows, columns), TYPES[kind])
        writer.add_tensor(name + ".weight", quantized, raw_dtype=TYPES[kind])

    def norm(name: str) -> None:
        writer.add_tensor(name + ".weight", np.ones(HIDDEN, np.float32))

    matrix("token_embd", VOCAB, HIDDEN)  # the output layer too
    norm("output_norm")
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm")
        norm(prefix + "ffn_norm")
        matrix(prefix + "attn_q", HEADS * HEAD_DIM, HIDDEN)
        matrix(prefix + "attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(prefix + "attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(prefix + "attn_output", HIDDEN, HEADS * HEAD_DIM)
        matrix(prefix + "ffn_gate", INTERMEDIATE, HIDDEN)
        matrix(prefix + "ffn_up", INTERMEDIATE, HIDDEN)
        matrix(prefix + "ffn_down", HIDDEN, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


class Peer:
    """One context of MAX_BATCH sequences, each of which holds CONTEXT tokens between commands."""

    def __init__(self, path: Path, threads: int) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = MAX_BATCH * 512
        params.n_batch = params.n_ubatch = MAX_TOKENS
        params.n_seq_max = MAX_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # or each sequence would attend over the masked cells of all others
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(MAX_TOKENS, 0, 1)
        self._rng = np.random.default_rng(0)
        for sequence in range(MAX_BATCH):
            self._run([(position, sequence, position == CONTEXT - 1) for position in range(CONTEXT)])

    def decode(self, batch_size: int, steps: int) -> list[float]:
        seconds = [
            self._run([(CONTEXT + step, sequence, True) for sequence in range(batch_size)]) for step in range(steps)
        ]
        for sequence in range(batch_size):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, CONTEXT, -1)
        return seconds

    def prefill(self, num_tokens: int, runs: int) -> list[float]:
        """Uses, and empties, the last sequence, and fills it again."""
        last, seconds = MAX_BATCH - 1, []
        for _ in range(runs):
            llama_cpp.llama_memory_seq_rm(self._memory, last, 0, -1)
            seconds.append(self._run([(position, last, position == num_tokens - 1) for position in range(num_tokens)]))
        llama_cpp.llama_memory_seq_rm(self._memory, last, CONTEXT, -1)
        return seconds

    def _run(self, rows: list[tuple[int, int, bool]]) -> float:
        """Seconds it takes to compute a random token for each (position, sequence, wants logits)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (position, sequence, wants_logits) in enumerate(rows):
            batch.token[index] = int(self._rng.integers(VOCAB))
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wants_logits
        start = perf_counter()
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_synchronize(self._context)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return perf_counter() - start


def main() -> None:
    path, kind, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    write_gguf(path, kind)
    peer = Peer(path, threads)
    print(json.dumps({"llama_cpp_python": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if "decode" in command:
            seconds = peer.decode(command["decode"], command["steps"])
        else:
            seconds = peer.prefill(command["prefill"], command["runs"])
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
