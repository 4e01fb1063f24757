"""Held-out accuracy of every task under greedy decoding, as a table.

python -m demo_model.evaluate --transformers MODEL_DIR
python -m demo_model.evaluate --farrier ENGINE_DIR
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from demo_model.dialogue import Example, held_out_examples

LONGEST_ANSWER = 640
SEED = 7
Backend = Callable[[Sequence[Example]], list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    runtime = parser.add_mutually_exclusive_group(required=True)
    runtime.add_argument("--transformers", type=Path, metavar="MODEL_DIR")
    runtime.add_argument("--farrier", type=Path, metavar="ENGINE_DIR")
    parser.add_argument("--per-task", type=int, default=200)
    parser.add_argument("--failures", type=int, default=3, help="wrong answers to show for each task")
    options = parser.parse_args()
    backend = transformers_backend(options.transformers) if options.transformers else farrier_backend(options.farrier)
    report(backend, options.per_task, options.failures)


def report(backend: Backend, per_task: int, failures: int) -> None:
    wrong: list[str] = []
    print("| task | held-out examples | correct |\n|---|---|---|")
    for task, rows in groupby(held_out_examples(per_task, SEED), key=lambda example: example.task):
        examples = list(rows)
        answers = backend(examples)
        missed = [(e, a) for e, a in zip(examples, answers, strict=True) if not is_correct(e.expected, a)]
        print(f"| {task} | {len(examples)} | {100 * (1 - len(missed) / len(examples)):.1f} % |", flush=True)
        wrong += [
            f"{task}: {asked(e)!r}\n  expected {e.expected!r}\n  answered {a[:200]!r}" for e, a in missed[:failures]
        ]
    print("\n".join(wrong))


def is_correct(expected: str, answer: str) -> bool:
    """Equal texts, where JSON counts as equal when it parses to the same."""
    return expected == answer or comparable(expected) == comparable(answer)


def comparable(text: str) -> Any:
    calls = text.split("<tool_call>\n")
    try:
        if len(calls) > 1:
            return [calls[0], *(json.loads(call.strip().removesuffix("</tool_call>")) for call in calls[1:])]
        return json.loads(text) if text.startswith("{") else text
    except ValueError:
        return text


def asked(example: Example) -> str:
    last: str = example.messages[-1]["content"] if example.messages else example.prompt
    return last


def transformers_backend(directory: Path) -> Backend:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(device)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")

    def text(example: Example) -> str:
        if not example.messages:
            return example.prompt
        rendered: str = tokenizer.apply_chat_template(
            example.messages, tools=example.tools or None, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = tokenizer([text(e) for e in examples], return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: prompts[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        decoded: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return decoded

    return lambda examples: [a for start in range(0, len(examples), 50) for a in answer(examples[start : start + 50])]


def farrier_backend(engine: Path) -> Backend:
    from farrier import LLM, SamplingParams
    from farrier.runtime import chat

    llm = LLM(engine)
    llm.start()
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def prompt(example: Example) -> Any:
        if not example.messages:
            return example.prompt
        return {"prompt_token_ids": chat.render(tokenizer, example.messages, tools=example.tools)}

    def answer(examples: Sequence[Example]) -> list[str]:
        greedy = SamplingParams(temperature=0.0, max_tokens=LONGEST_ANSWER)
        return [output.outputs[0].text for output in llm.generate([prompt(e) for e in examples], greedy)]

    return answer


if __name__ == "__main__":
    main()
