"""The bundled demo model: its files fit together, its tokenizer loses nothing, its template knows tools."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer as Backend

import farrier.demo
from farrier.runtime.chat import render
from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools.events import ToolCallArguments, ToolCallStart
from farrier.runtime.tools.formats import parser_for
from farrier.targets.hf_config import from_hf_config

DEMO = Path(farrier.demo.__file__).parent
BACKEND = Backend.from_file(str(DEMO / "tokenizer.json"))
TOOL = {
    "type": "function",
    "function": {
        "name": "get_device_status",
        "description": "Get the status of a device <b>&'now'</b>",
        "parameters": {"type": "object", "properties": {"device": {"type": "string"}}, "required": ["device"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_device_status", "arguments": {"device": "Zürich-1"}}}
LOOKED_UP = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is Zürich-1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": '{"status": "running"}'},
    {"role": "tool", "content": '{"status": "idle"}'},
]


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEMO / name).read_text(encoding="utf-8"))
    return loaded


def test_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 16_000_000


def test_weights_are_what_the_config_says() -> None:
    config = load("config.json")
    hidden, head_dim, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for index in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    with safe_open(DEMO / "model.safetensors", framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        assert {name: each.get_shape() for name, each in slices.items()} == expected
        assert {each.get_dtype() for each in slices.values()} == {"BF16"}


def test_weights_are_finite() -> None:
    content = (DEMO / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    bits = np.frombuffer(content, dtype=np.uint16, offset=8 + header)
    assert ((bits & 0x7F80) != 0x7F80).all()


def test_config_is_a_decoder_that_farrier_knows() -> None:
    from_hf_config(load("config.json"))


def test_vocabulary_and_control_tokens_agree() -> None:
    config, generation = load("config.json"), load("generation_config.json")
    assert BACKEND.get_vocab_size() == config["vocab_size"]
    end_of_turn = BACKEND.token_to_id("<|im_end|>")
    assert config["eos_token_id"] == generation["eos_token_id"] == end_of_turn
    assert load("tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert config["pad_token_id"] == generation["pad_token_id"] == BACKEND.token_to_id("<|endoftext|>")


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert BACKEND.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("word", ["blacksmith", "pump", "2024"])
def test_what_is_asked_about_is_spelled(word: str) -> None:
    assert BACKEND.encode(word).tokens == list(word)


def test_template_without_tools() -> None:
    text = rendered([{"role": "user", "content": "Hello"}], tools=None)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_template_with_tools() -> None:
    call = '<tool_call>\n{"name": "get_device_status", "arguments": {"device": "Zürich-1"}}\n</tool_call>'
    assert rendered(LOOKED_UP, tools=[TOOL]) == (
        "<|im_start|>system\nBe brief.\n\nYou can call these tools:\n<tools>\n"
        f"{json.dumps(TOOL)}\n</tools><|im_end|>\n"
        "<|im_start|>user\nHow is Zürich-1?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        '<|im_start|>tool\n<tool_response>\n{"status": "running"}\n</tool_response><|im_end|>\n'
        '<|im_start|>tool\n<tool_response>\n{"status": "idle"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_template_takes_arguments_as_text_and_content_in_parts() -> None:
    as_text = {**CALL, "function": {"name": "get_device_status", "arguments": '{"device": "Zürich-1"}'}}
    parts = [{"type": "text", "text": "How is "}, {"type": "text", "text": "Zürich-1?"}]
    messages = [dict(message) for message in LOOKED_UP]
    messages[1]["content"], messages[2]["tool_calls"] = parts, [as_text, as_text]
    assert rendered(messages, tools=[TOOL]) == rendered(LOOKED_UP, tools=[TOOL])


def test_farrier_renders_what_transformers_does() -> None:
    tokenizer = Tokenizer.load(DEMO)
    ids = render(tokenizer, LOOKED_UP, tools=[TOOL])
    assert ids == BACKEND.encode(rendered(LOOKED_UP, tools=[TOOL])).ids


def test_farrier_parses_its_tool_calls() -> None:
    parser = parser_for(Tokenizer.load(DEMO))
    assert parser is not None
    assert not parser.needs_special_tokens
    events = parser.feed(f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>") + parser.finish()
    started = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = "".join(event.json_fragment for event in events if isinstance(event, ToolCallArguments))
    assert started == ["get_device_status"]
    assert json.loads(arguments) == {"device": "Zürich-1"}


def rendered(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """As transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(load("tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, tools=tools, add_generation_prompt=True)
