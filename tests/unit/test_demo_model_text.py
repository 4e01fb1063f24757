"""What the demo model is trained on: nothing of it is held out, and the shipped tokenizer is what the script makes."""

import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import farrier.demo

ROOT = Path(__file__).parents[2] / "packaging" / "demo_model"


@pytest.fixture(scope="module", autouse=True)
def _package() -> None:
    spec = importlib.util.spec_from_file_location(
        "demo_model", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["demo_model"] = package
    spec.loader.exec_module(package)


@pytest.fixture
def dialogue() -> ModuleType:
    return import_module("demo_model.dialogue")


def test_no_trained_exchange_is_held_out(dialogue: ModuleType) -> None:
    split = import_module("demo_model.split")
    rng = random.Random(1)
    for task in dialogue.TASKS:
        tools = dialogue.device_tools(rng)
        trained = {task.draw(rng, tools, held_out=False).key for _ in range(500)}
        held_out = {task.draw(rng, tools, held_out=True).key for _ in range(100)}
        assert not trained & held_out
        assert None not in held_out
        assert all(split.is_held_out(key) for key in held_out)


def test_no_held_out_question_is_trained_on(dialogue: ModuleType) -> None:
    """By their words, not by their keys. (After a lookup `And its battery?` is asked again and again.)"""
    examples = [e for e in dialogue.held_out_examples(100, 7) if e.messages and "telling" not in e.task]
    held_out = {example.messages[-1]["content"] for example in examples}
    rng = random.Random(2)
    for _ in range(3000):
        conversation = dialogue.training_conversation(rng)
        trained = {message["content"] for message in conversation.messages if message["role"] == "user"}
        assert not trained & held_out


def test_held_out_examples_are_always_the_same(dialogue: ModuleType) -> None:
    examples = dialogue.held_out_examples(20, 7)
    assert examples == dialogue.held_out_examples(20, 7)
    assert set(Counter(example.task for example in examples).values()) == {20}


@pytest.mark.parametrize(
    ("task", "check"),
    [
        ("arithmetic", lambda question, answer: eval_equation(answer)),
        ("reversing", lambda question, answer: answer[::-1].lower() in question.lower()),
        ("spelling", lambda question, answer: answer.replace("-", "") in question),
        ("sorting", lambda question, answer: is_sorted([int(n) for n in answer.split(", ")])),
    ],
)
def test_answers_are_right(dialogue: ModuleType, task: str, check: Callable[[str, str], bool]) -> None:
    rng = random.Random(3)
    sample = next(each.sample for each in dialogue.TASKS if each.name == task)
    for _ in range(300):
        question, answer = sample(rng, []).messages
        assert check(question["content"], answer["content"]), (question, answer)


def test_conversions_are_right(dialogue: ModuleType) -> None:
    units = import_module("demo_model.tasks.units")
    rng = random.Random(4)
    factors = {(large[0], small[0]): 10**power for large, small, power in units.POWERS_OF_TEN}
    factors |= {(large[0], small[0]): by for large, small, by in units.FACTORS}
    factors |= {(small, large): 1 / by for (large, small), by in factors.items()}
    for _ in range(300):
        left, *_, right = units.sample(rng).messages[1]["content"].split(" = ")
        (value, source), (result, target) = left.split(" ", 1), right.split(" ", 1)
        if source == "°C":
            assert float(result) == pytest.approx(float(value) * 1.8 + 32)
        else:
            assert float(result) == pytest.approx(float(value) * factors[plural(units, source), plural(units, target)])


def test_extracted_fields_stand_in_the_sentence(dialogue: ModuleType) -> None:
    sample = import_module("demo_model.tasks.extraction").sample
    rng = random.Random(5)
    for _ in range(300):
        question, answer = sample(rng).messages
        for name, value in json.loads(answer["content"]).items():
            assert name in question["content"]
            assert value is None or str(value) in question["content"]


def test_shipped_tokenizer_is_what_the_script_makes(tmp_path: Path) -> None:
    module = import_module("demo_model.tokenizer")
    made = json.loads(module.tokenizer().to_str())
    demo = Path(farrier.demo.__file__).parent
    assert made == json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    configuration = module.configuration((ROOT / "chat_template.jinja").read_text(encoding="utf-8"))
    assert configuration == json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))


def plural(units: ModuleType, name: str) -> str:
    known = {unit[0] for pair in (*units.POWERS_OF_TEN, *units.FACTORS) for unit in pair[:2]}
    return name if name in known else {"foot": "feet", "inch": "inches"}.get(name, f"{name}s")


def is_sorted(numbers: list[int]) -> bool:
    return numbers in (sorted(numbers), sorted(numbers, reverse=True))


def eval_equation(answer: str) -> bool:
    left, *rest = answer.split(" = ")
    a, sign, b = left.split(" ")
    result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}.get(sign)
    if result is None:
        quotient, rest_ = divmod(int(a), int(b))
        return rest == [f"{quotient} remainder {rest_}" if rest_ else str(quotient)]
    return rest[-1] == str(result)
