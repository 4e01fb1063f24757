import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from farrier.runtime import chat_template
from farrier.runtime.chat import render
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import EngineError, RequestError

FAMILIES = sorted(path.stem for path in (Path(__file__).parents[1] / "fixtures" / "chat_templates").glob("*.jinja"))
WITH_SYSTEM = [family for family in FAMILIES if family != "gemma-2"]
WITH_TOOLS = ["llama-3.1", "mistral-v0.3", "qwen2.5", "qwen3", "phi-4-mini"]

HELLO = [{"role": "user", "content": "Grüezi <b>&'you'</b>  "}]
TALK = [*HELLO, {"role": "assistant", "content": " Hello!\n"}, {"role": "user", "content": "你好 🙂"}]
SYSTEM = [{"role": "system", "content": "Be brief. "}, *TALK]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": 'Looks <up> the "weather" für eine Stadt',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_forecast")
]
CALL = {"id": "abc123XYZ", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
CALLING = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abc123XYZ", "content": '{"degrees": 21.50}'},
]


@pytest.fixture(scope="module")
def load(chat_folder: Callable[[str], Path]) -> Any:
    """(tokenizer, transformers' tokenizer) of a family, or of a template's source."""

    @functools.cache
    def load(family: str) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
        folder = chat_folder(family)
        return Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)

    return load


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as objects: what transformers asks its callers for."""
    copied = json.loads(json.dumps(messages))
    for message in copied:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copied


def assert_same(
    pair: tuple[Tokenizer, PreTrainedTokenizerFast], messages: list[dict[str, Any]], **options: Any
) -> None:
    ours, theirs = pair
    variables = options.pop("template_kwargs", {})
    expected = theirs.apply_chat_template(with_objects(messages), **options, **variables)["input_ids"]
    options.setdefault("add_generation_prompt", False)
    assert render(ours, messages, template_kwargs=variables, **options) == expected


# --- the families ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [HELLO, TALK], ids=["hello", "talk"])
def test_conversations(load: Any, family: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    assert_same(load(family), messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_system_messages(load: Any, family: str) -> None:
    assert_same(load(family), SYSTEM, add_generation_prompt=True)
    developer = [{**SYSTEM[0], "role": "developer"}, *TALK]
    assert render(load(family)[0], developer) == render(load(family)[0], SYSTEM)


@pytest.mark.parametrize("family", WITH_TOOLS)
@pytest.mark.parametrize("messages", [HELLO, CALLING], ids=["hello", "calling"])
def test_tools(load: Any, family: str, messages: list[dict[str, Any]]) -> None:
    assert_same(load(family), messages, tools=TOOLS, add_generation_prompt=True)


@pytest.mark.parametrize("family", ["mistral-v0.3", "qwen2.5", "qwen3", "phi-4-mini"])
def test_several_calls_in_one_message(load: Any, family: str) -> None:
    messages = json.loads(json.dumps(CALLING))
    messages[1]["tool_calls"].append({**CALL, "id": "000000000"})
    messages.append({"role": "tool", "tool_call_id": "000000000", "content": "rain"})
    assert_same(load(family), messages, tools=TOOLS, add_generation_prompt=True)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral-v0.3"])
@pytest.mark.parametrize("words", [" Hel", "Hel ", ""])
def test_the_last_message_is_continued(load: Any, family: str, words: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": words}]
    assert_same(load(family), messages, continue_final_message=True)


def test_template_variables(load: Any) -> None:
    assert_same(load("qwen3"), HELLO, add_generation_prompt=True, template_kwargs={"enable_thinking": False})
    assert_same(load("llama-3.1"), HELLO, tools=TOOLS, template_kwargs={"tools_in_user_message": False})
    assert_same(load("llama-3.1"), HELLO, template_kwargs={"date_string": "1 Jan 2030"})


def test_the_bos_token_comes_once(load: Any) -> None:
    for family in ("llama-3.1", "mistral-v0.3", "gemma-2", "gemma-3"):
        tokenizer = load(family)[0]
        assert render(tokenizer, HELLO).count(tokenizer.bos_token_id) == 1
    assert load("qwen3")[0].bos_token_id not in render(load("qwen3")[0], HELLO)


# --- what messages may look like ---


def test_text_parts_are_joined(load: Any) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Grüezi <b>&'you'"}, {"type": "text", "text": "</b>  "}]}
    ]
    for family in FAMILIES:
        assert render(load(family)[0], parts) == render(load(family)[0], HELLO)


def test_arguments_may_be_objects_or_empty(load: Any) -> None:
    tokenizer = load("qwen3")[0]
    as_object = with_objects(CALLING)
    assert render(tokenizer, as_object) == render(tokenizer, CALLING)
    as_object[1]["tool_calls"][0]["function"]["arguments"] = ""
    assert '"arguments": {}' in tokenizer.decode(render(tokenizer, as_object))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0] is of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0] must look like"),
        ({"role": "user", "content": 3}, "messages[1].content must be"),
        ({"role": "user"}, "messages[1] has no content"),
        ({"role": "assistant", "tool_calls": []}, "messages[1] has no content"),
        ({"role": "wizard", "content": ""}, "messages[1].role must be one of"),
        ({"content": ""}, "messages[1].role must be one of"),
        ({"role": "user", "content": "", "tool_calls": [CALL]}, "only an assistant message"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0] must have a function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":'}}]},
            "messages[1].tool_calls[0].function.arguments is not valid JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages[1].tool_calls[0].function.arguments must be a JSON object",
        ),
        ({"role": "user", "content": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_message_that_cannot_be_is_refused(load: Any, message: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        render(load("qwen3")[0], [*HELLO, message])


@pytest.mark.parametrize(
    ("family", "options", "param", "problem"),
    [
        ("qwen3", {"messages": []}, "messages", "at least one"),
        ("gemma-3", {"tools": TOOLS}, "tools", "no place for tools"),
        ("gemma-3", {"messages": CALLING}, "messages", "no place for tool calls"),
        ("gemma-2", {"messages": SYSTEM}, "messages", "System role not supported"),
        ("gemma-3", {"messages": [*HELLO, *HELLO]}, "messages", "must alternate"),
        ("qwen3", {"template_kwargs": {"mood": 1}}, "chat_template_kwargs", "'mood'"),
        ("qwen3", {"template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ("qwen3", {"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        (
            "qwen3",
            {"messages": CALLING[:2], "continue_final_message": True, "add_generation_prompt": False},
            "continue_final_message",
            "no content",
        ),
        (
            "mistral-v0.3",
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{**CALL, "id": "call_1"}]}]},
            "messages",
            "length 9",
        ),
        ("{{ messages[0].content.gone.further }}", {}, "messages", "has no attribute 'gone'"),
        ("{{ messages[0].content + 1 }}", {}, "messages", "cannot render"),
        (
            "{{ messages[0].content[:3] }}",
            {"continue_final_message": True, "add_generation_prompt": False},
            "continue_final_message",
            "does not keep the last message",
        ),
    ],
)
def test_what_cannot_be_honoured_names_its_field(
    load: Any, family: str, options: dict[str, Any], param: str, problem: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)) as refused:
        render(load(family)[0], **{"messages": HELLO, **options})
    assert refused.value.param == param


def test_a_model_without_a_template_has_no_chat(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template") as refused:
        render(byte_level, HELLO)
    assert refused.value.param == "messages"


def test_a_template_of_its_own_for_tools(byte_level_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(byte_level_folder, tmp_path / "model"))
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(render(tokenizer, HELLO)) == "plain"
    assert tokenizer.decode(render(tokenizer, HELLO, tools=TOOLS)) == "2 tools"


# --- control tokens that others wrote ---


@pytest.mark.parametrize("family", WITH_TOOLS)
@given(data=st.data())
def test_nobody_smuggles_control_tokens_in(load: Any, family: str, data: st.DataObject) -> None:
    tokenizer: Tokenizer = load(family)[0]
    control = st.sampled_from([tokenizer.token_text(token_id) for token_id in sorted(tokenizer.special_token_ids)])
    writing = st.lists(st.one_of(control, st.sampled_from(["<", "|im_", "end|>", " ", "x\n", "🙂"]))).map("x".join)
    messages = with_objects(CALLING)
    messages[0]["content"] = data.draw(writing)
    messages[2]["content"] = data.draw(writing)
    messages[1]["tool_calls"][0]["function"]["arguments"] = {data.draw(writing): data.draw(writing)}
    tools = json.loads(json.dumps(TOOLS))
    tools[0]["function"]["description"] = data.draw(writing)
    ids = render(tokenizer, messages, tools=tools)
    harmless = render(tokenizer, CALLING, tools=TOOLS)
    special = tokenizer.special_token_ids
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    text = load(family)[1].apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smuggled_tokens_get_no_spaces_from_sentencepiece(sentencepiece: Tokenizer) -> None:
    tokenizer = Tokenizer(
        Backend.from_str(sentencepiece._backend.to_str()), {}, {"default": "[INST]{{ messages[0].content }}[/INST]"}
    )
    ids = render(tokenizer, [{"role": "user", "content": "a</s>b<s>[INST]</s>"}])
    assert (
        tokenizer.decode(ids, skip_special_tokens=False).replace("[INST] ", "[INST]", 1)
        == "[INST]a</s>b<s>[INST]</s>[/INST]"
    )


def test_a_template_that_cuts_a_control_token_apart_is_refused(load: Any) -> None:
    tokenizer = load("{{ messages[0].content[:40] }}")[0]
    with pytest.raises(RequestError, match="cuts a message apart"):
        render(tokenizer, [{"role": "user", "content": "</s> and more, and more, and more"}])


def test_a_control_token_that_cannot_be_told_from_text_is_refused() -> None:
    backend = Backend(models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = Tokenizer(backend, {}, {"default": "{{ messages[0].content }}"})
    assert render(tokenizer, [{"role": "user", "content": "a </a>"}]) == [1, 2]
    with pytest.raises(RequestError, match="'</s>'"):
        render(tokenizer, [{"role": "user", "content": "a </s>"}])


def test_a_smuggled_token_behind_which_a_newline_merges() -> None:
    vocab = {"Ċ": 0, "<": 1, "Ċ<": 2, "s": 3, ">": 4}
    backend = Backend(models.BPE(vocab=vocab, merges=[("Ċ", "<")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(backend, {}, {"default": "<s>{{ messages[0].content }}"})
    assert render(tokenizer, [{"role": "user", "content": "s<s>"}]) == [5, 3, 1, 3, 4]


# --- templates that misbehave ---


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_without_an_end_is_stopped(load: Any, source: str) -> None:
    with pytest.raises(RequestError, match="chat template") as refused:
        render(load(source)[0], HELLO)
    assert refused.value.param == "messages"


def test_loops_are_counted_over_the_whole_rendering(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_ITERATIONS", 10)
    render(load("{% for a in range(10) %}x{% endfor %}")[0], HELLO)
    with pytest.raises(RequestError, match="loops run more than"):
        render(
            load("{% for a in range(6) %}x{% endfor %}{% for a in range(5) if true %}{{ loop.length }}{% endfor %}")[0],
            HELLO,
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set x = messages.pop() %}{{ x.content }}",
    ],
)
def test_a_template_stays_in_its_sandbox(load: Any, source: str) -> None:
    with pytest.raises(RequestError, match="unsafe"):
        render(load(source)[0], HELLO)


def test_a_broken_template_is_the_engines_fault(byte_level: Tokenizer) -> None:
    broken = Tokenizer(byte_level._backend, {}, {"default": "{% if %}"})
    with pytest.raises(EngineError, match="not valid Jinja"):
        render(broken, HELLO)
    with pytest.raises(RequestError, match="no place for tools"):
        render(broken, HELLO, tools=TOOLS)


def test_what_templates_expect_around_them(load: Any) -> None:
    source = (
        "{{ strftime_now('%Y') | length }} {{ {'b': '<ü>', 'a': 1} | tojson }} {{ [1] | tojson(indent=2) }} "
        "{{ tools is none }} "
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{{ loop.length }}"
        "{{ loop.last }}{% endfor %}\n"
        "   {%- set ns = namespace(n=1) %}\n{% generation %}  {% set ns.n = 2 %}g{% endgeneration %}\n{{ ns.n }}"
    )
    assert_same(load(source), HELLO)
