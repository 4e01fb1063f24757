"""An endless stream of packed training batches, drawn afresh from the tasks by worker processes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo_model.dialogue import completion, training_conversation
from demo_model.template import render
from demo_model.tokenizer import END, START

IGNORED = -100
COMPLETIONS = 0.04


@dataclass(frozen=True)
class Batch:
    """Four arrays [rows, tokens]: `targets` are the next tokens of the model's own turns, IGNORED elsewhere."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor

    def to(self, device: str) -> "Batch":
        parts = (self.tokens, self.targets, self.positions, self.documents)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    def pin_memory(self) -> "Batch":
        return Batch(*(part.pin_memory() for part in (self.tokens, self.targets, self.positions, self.documents)))


class Stream(IterableDataset[Batch]):
    """The same seed and the same number of workers give the same batches."""

    def __init__(self, tokenizer: Path, rows: int, length: int, seed: int) -> None:
        self.tokenizer, self.rows, self.length, self.seed = tokenizer, rows, length, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}:{worker.id if worker else 0}")
        documents = Documents(Tokenizer.from_file(str(self.tokenizer)), rng)
        pending = documents.draw(self.length)
        while True:
            arrays = numpy.zeros((4, self.rows, self.length), dtype=numpy.int64)
            arrays[1] = IGNORED
            for row in range(self.rows):
                filled, number = 0, 0
                while filled + len(pending.tokens) <= self.length:
                    size = len(pending.tokens)
                    parts = (pending.tokens, pending.targets, range(size), [number] * size)
                    arrays[:, row, filled : filled + size] = parts
                    filled, number = filled + size, number + 1
                    pending = documents.draw(self.length)
                arrays[3, row, filled:] = number
            yield Batch(*torch.from_numpy(arrays))


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    targets: list[int]


class Documents:
    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.start, self.end, self.assistant, self.equals = (
            cast(int, tokenizer.token_to_id(token)) for token in (START, END, "assistant", "Ġ=")
        )

    def draw(self, longest: int) -> Document:
        while True:
            if self.rng.random() < COMPLETIONS:
                tokens = self.tokenizer.encode(completion(self.rng, held_out=False) + END).ids
                asked = tokens.index(self.equals)
                return Document(tokens, [*[IGNORED] * asked, *tokens[asked + 1 :], IGNORED])
            conversation = training_conversation(self.rng)
            tokens = self.tokenizer.encode(render(conversation.messages, conversation.tools)).ids
            if len(tokens) <= longest:
                return Document(tokens, self.targets(tokens))

    def targets(self, tokens: list[int]) -> list[int]:
        """The next token wherever it is the assistant's or ends the assistant's turn."""
        targets, answering = [IGNORED] * len(tokens), False
        for index in range(len(tokens) - 1):
            # A turn opens with three tokens: the mark, the role and a line feed.
            if index >= 2 and tokens[index - 2] == self.start:
                answering = tokens[index - 1] == self.assistant
            if answering:
                targets[index] = tokens[index + 1]
                answering = tokens[index + 1] != self.end
        return targets


def batches(stream: Stream, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=torch.cuda.is_available()
    )
    return iter(loader)
