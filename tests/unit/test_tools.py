import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farrier.runtime.chat import render
from farrier.runtime.sampling_params import GuidedDecoding
from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools import ContentDelta, ToolCallArguments, ToolCallStart, ToolEvent, ToolParser, parser_for
from farrier.runtime.tools.formats import FUNCTOOLS, HERMES, LLAMA, MISTRAL, PHI_TAGS
from farrier.runtime.tools.json_format import JsonFormat
from farrier.runtime.tools.json_parser import JsonToolParser
from farrier.targets.errors import RequestError

FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "functools": FUNCTOOLS, "phi_tags": PHI_TAGS}
FORMAT_OF = {"qwen2.5": HERMES, "qwen3": HERMES, "mistral-v0.3": MISTRAL, "llama-3.1": LLAMA, "phi-4-mini": FUNCTOOLS}
WITHOUT_TOOLS = ["gemma-2", "gemma-3", "phi-3", "phi-4"]

Call = tuple[str, str]
"""Name and arguments."""


@pytest.fixture(scope="session", params=FORMATS)
def style(request: pytest.FixtureRequest) -> JsonFormat:
    return FORMATS[request.param]


def joined(events: list[ToolEvent]) -> tuple[str, list[Call]]:
    """Content and calls, checked for being in order."""
    content, calls = "", []
    for event in events:
        match event:
            case ContentDelta(text):
                assert text
                content += text
            case ToolCallStart(index, _, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ToolCallArguments(index, fragment):
                assert fragment
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + fragment)
    return content, calls


def parse(parser: ToolParser, *pieces: str) -> tuple[str, list[Call]]:
    return joined([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


def call_text(style: JsonFormat, *calls: Call) -> str:
    objects = [f'{{"name": {json.dumps(name)}, "{style.arguments_key}": {arguments}}}' for name, arguments in calls]
    if style.is_bare:
        return "; ".join(objects)
    blocks = [f"[{', '.join(objects)}]"] if style.is_list else objects
    end = style.padding + style.closer if style.closer else ""
    return "\n".join(f"{style.opener}{style.padding}{block}{end}" for block in blocks)


def fragments(style: JsonFormat) -> st.SearchStrategy[str]:
    """Texts that are close to calls, and often are."""
    key = style.arguments_key
    good = call_text(style, ("f", '{"a": "}\\"{"}'), ("g", "{}"))
    parts = [good, style.opener, style.closer, "{", "}", "[", "]", '"', ",", ":", ";", "\\", " ", "\n", "x", "é🙂"]
    parts += ['"name": "f"', f'"{key}": {{"b": [1, 2]}}', f'{{"name": "h", "{key}": {{', '"id": 5, ', '{"name": "h"}']
    halves = [good[: len(good) // 2], good[len(good) // 2 :], style.opener[:-1], style.opener * 2]
    return st.lists(st.sampled_from(parts + halves), max_size=12).map("".join)


names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=6,
)
arguments = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    st.dictionaries(st.text(max_size=4), json_values, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
)
plain_text = st.text("ab .\n<>[]é🙂", max_size=20).filter(lambda text: "<|" not in text)


# --- parsing ---


@given(data=st.data())
def test_events_do_not_depend_on_how_the_text_is_cut(
    style: JsonFormat, byte_level: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(fragments(style))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = parse(JsonToolParser(style, byte_level), text)
    assert parse(JsonToolParser(style, byte_level), *pieces) == whole
    assert parse(JsonToolParser(style, byte_level), *text) == whole


@given(data=st.data())
def test_what_holds_no_call_is_content_to_the_last_character(
    style: JsonFormat, byte_level: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(fragments(style))
    content, calls = parse(JsonToolParser(style, byte_level), text)
    if not calls:
        assert content == text
    for name, passed_on in calls:
        assert name in text
        assert passed_on == "{}" or passed_on in text


@given(
    data=st.data(),
    calls=st.lists(st.tuples(names, arguments), min_size=1, max_size=3),
    before=plain_text,
    after=plain_text,
)
def test_calls_between_texts(
    style: JsonFormat, byte_level: Tokenizer, data: st.DataObject, calls: list[Call], before: str, after: str
) -> None:
    if style.is_bare:
        before = ""
        after = "" if after.lstrip().startswith(";") else after
    text = f"{before}{call_text(style, *calls)}{after}"
    content, found = parse(JsonToolParser(style, byte_level), *text)
    assert found == calls
    before, after = before.rstrip(" \n"), after if after.strip(" \n") else ""
    assert content == before + after


def test_a_call_streams_as_it_is_written(byte_level: Tokenizer) -> None:
    parser = JsonToolParser(HERMES, byte_level)
    assert parser.feed("Let me see.\n<tool") == [ContentDelta("Let me see.")]
    assert parser.feed('_call>\n{"name": "get_weather", "arguments": ') == []
    [start, first] = parser.feed('{"city": "Zü')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "get_weather")
    assert first == ToolCallArguments(0, '{"city": "Zü')
    assert parser.feed('rich"}') == [ToolCallArguments(0, 'rich"}')]
    assert parser.feed("}\n</tool_call>") == []
    assert parser.finish() == []


def test_text_is_not_held_back(style: JsonFormat, byte_level: Tokenizer) -> None:
    parser = JsonToolParser(style, byte_level)
    for word in ("Hello", ",", " world", " < 3", "!"):
        assert parser.feed(word) == [ContentDelta(word)]


def test_a_malformed_call_is_content_as_soon_as_it_is_malformed(byte_level: Tokenizer) -> None:
    for text in ("<tool_call>\nno", '<tool_call>{"name": "f\n"', '<tool_call>{"name": "f", "arguments": ['):
        parser = JsonToolParser(HERMES, byte_level)
        assert parser.feed(text) == [ContentDelta(text)]
        [*_, start, arguments] = parser.feed(call_text(HERMES, ("f", "{}")))
        assert (start.name, arguments) == ("f", ToolCallArguments(0, "{}"))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>not JSON</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f\n", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f',
        '<tool_call>{"name": "f", "arguments": ',
        " <tool_call> \n<tool_call> ",
    ],
)
def test_malformed_calls_are_content(byte_level: Tokenizer, text: str) -> None:
    assert parse(JsonToolParser(HERMES, byte_level), text) == (text, [])


def test_json_that_is_no_call_is_content(byte_level: Tokenizer) -> None:
    for text in (
        '{"name": "Ada", "age": 36}',
        '[{"name": "Ada"}]',
        '  {"name": "Ada"}\n',
        "{",
        "[1, 2]",
        '{"parameters": {}}',
    ):
        assert parse(JsonToolParser(LLAMA, byte_level), text) == (text, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"id": [1], "name": "f", "arguments": {}, "x": "}"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": True}}</tool_call>', "", [("f", '{"a": True}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_c', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}} so <b>', " so <b>", [("f", "{}")]),
        ('<tool_call>no <tool_call>{"name": "f"}</tool_call>', "<tool_call>no", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}, "arguments": {"a": 1}}</tool_call>', "", [("f", "{}")]),
    ],
)
def test_calls_out_of_the_ordinary(byte_level: Tokenizer, text: str, content: str, calls: list[Call]) -> None:
    assert parse(JsonToolParser(HERMES, byte_level), text) == (content, calls)


def test_ids_are_as_the_format_wants_them(style: JsonFormat, byte_level: Tokenizer) -> None:
    parser = JsonToolParser(style, byte_level)
    events = parser.feed(call_text(style, ("f", "{}"), ("g", "{}")))
    first, second = (event.id for event in events if isinstance(event, ToolCallStart))
    assert first != second
    assert re.fullmatch(r"[a-zA-Z0-9]{9}" if style is MISTRAL else r"call_[a-zA-Z0-9]{24}", first)


# --- which format ---


@pytest.fixture(scope="module")
def load(chat_folder: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    return lambda family: Tokenizer.load(chat_folder(family))


@pytest.mark.parametrize("family", FORMAT_OF)
def test_what_a_template_writes_its_parser_reads(load: Callable[[str], Tokenizer], family: str) -> None:
    tokenizer = load(family)
    words = '{"city": "Zürich \\"Altstadt\\"", "days": [1, 2.50]}'
    call = {"id": "123456789", "type": "function", "function": {"name": "get_weather", "arguments": words}}
    user = {"role": "user", "content": "Hi"}
    asked = render(tokenizer, [user], add_generation_prompt=family != "mistral-v0.3")
    answered = render(tokenizer, [user, {"role": "assistant", "tool_calls": [call]}], add_generation_prompt=False)
    before = tokenizer.decode(asked, skip_special_tokens=False)
    if family == "qwen3":  # it leaves room for thoughts
        before += "<think>\n\n</think>\n\n"
    text = tokenizer.decode(answered, skip_special_tokens=False)
    assert text.startswith(before)
    text = re.sub(r"(<\|im_end\|>\n|<\|eot_id\|>|(<\|end\|>)?</s>)$", "", text.removeprefix(before))
    parser = parser_for(tokenizer)
    content, [(name, passed_on)] = parse(parser, text)
    assert (content.strip("\n"), name) == ("", "get_weather")
    assert json.loads(passed_on) == json.loads(words)


@pytest.mark.parametrize("family", WITHOUT_TOOLS)
def test_templates_without_tools_have_no_parser(load: Callable[[str], Tokenizer], family: str) -> None:
    assert parser_for(load(family)) is None


def test_formats_we_do_not_know_have_no_parser(byte_level: Tokenizer) -> None:
    assert parser_for(byte_level) is None
    for source in ("<tool_call>\n<function=f>", "[TOOL_CALLS]f[ARGS]{}", "{{ tools }}"):
        assert parser_for(Tokenizer(byte_level._backend, {}, {"default": source})) is None
    with_tags = Tokenizer(byte_level._backend, {}, {"default": "<|tool_call|>"})
    assert parse(parser_for(with_tags), call_text(PHI_TAGS, ("f", "{}"))) == ("", [("f", "{}")])


def test_special_tokens_are_needed_where_they_mark_calls(load: Callable[[str], Tokenizer]) -> None:
    needed = {family: parser_for(load(family)).needs_special_tokens for family in FORMAT_OF}
    assert needed == {family: family == "mistral-v0.3" for family in FORMAT_OF}


# --- grammars ---

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time"}},
]


def tool(**parameters: Any) -> dict[str, Any]:
    strict = parameters.pop("strict", None)
    return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}


def write(tokenizer: Tokenizer, guided: GuidedDecoding, seed: int, start: str = "", steps: int = 300) -> str | None:
    """`start` and then a random text that the grammar allows; None when it has no end."""
    generator, eos = random.Random(seed), tokenizer.token_id("</s>")
    guide = tokenizer.guide(guided, (eos,), tokenizer.vocab_size)
    ids = tokenizer.encode(start, add_special_tokens=False)
    for token in ids:
        guide.accept(token)
    row = np.zeros((tokenizer.vocab_size + 31) // 32, np.uint32)
    while not guide.is_finished and len(ids) < steps:
        guide.fill_mask(row)
        token = int(generator.choice(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))))
        if token == eos:
            return tokenizer.decode(ids, skip_special_tokens=False)
        guide.accept(token)
        ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=False) if guide.is_finished else None


def assert_valid(calls: list[Call]) -> None:
    for name, passed_on in calls:
        given_arguments = json.loads(passed_on)
        if name == "now":
            assert given_arguments == {}
        else:
            assert name == "get_weather"
            assert len(given_arguments["city"]) <= 5
            assert given_arguments.keys() <= {"city", "days"}
            assert given_arguments.get("days", 0) <= 9


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_required_calls_parse_and_follow_their_schemas(
    style: JsonFormat, tokenizer: Tokenizer, seed: int, parallel: bool
) -> None:
    parser = JsonToolParser(style, tokenizer)
    text = write(tokenizer, parser.guide_for(TOOLS, "required", parallel=parallel), seed, steps=2000)
    content, calls = parse(parser, text)
    assert content == ""
    assert calls
    assert parallel or len(calls) == 1
    assert_valid(calls)


@pytest.mark.parametrize("text", ["", "Hello <b> import functools\n 🙂", "[] {", "</s"])
def test_auto_leaves_text_alone(style: JsonFormat, tokenizer: Tokenizer, text: str) -> None:
    guided = JsonToolParser(style, tokenizer).guide_for(TOOLS, "auto")
    if guided is None:
        assert style is LLAMA
    else:
        write(tokenizer, guided, 0, start=text, steps=0)  # raises where a token is not allowed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["hermes", "mistral", "functools", "phi_tags"])
def test_auto_binds_from_the_opener_on(name: str, tokenizer: Tokenizer, seed: int) -> None:
    style = FORMATS[name]
    guided = JsonToolParser(style, tokenizer).guide_for(TOOLS, "auto", parallel=False)
    opener = style.opener + "[" * (style in (FUNCTOOLS, PHI_TAGS))
    text = write(tokenizer, guided, seed, start=f"Hm.\n{opener}", steps=2000)
    content, calls = parse(JsonToolParser(style, tokenizer), text)
    assert content == "Hm."
    assert len(calls) == 1
    assert_valid(calls)


def test_auto_without_parallel_ends_after_one_call(style: JsonFormat, byte_level: Tokenizer) -> None:
    guided = JsonToolParser(style, byte_level).guide_for(TOOLS, "auto", parallel=False)
    if guided is not None:
        start = "Well. " + call_text(style, ("now", "{}"))
        assert write(byte_level, guided, 0, start=start, steps=0) == start


def test_only_the_tools_given_can_be_called(style: JsonFormat, byte_level: Tokenizer) -> None:
    parser = JsonToolParser(style, byte_level)
    text = write(byte_level, parser.guide_for(TOOLS[1:], "required", parallel=False), 0)
    content, [(name, passed_on)] = parse(parser, text)
    assert (content, name, json.loads(passed_on)) == ("", "now", {})


def test_a_schema_of_something_else_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match=re.escape("tools[1].function.parameters")) as refused:
        JsonToolParser(HERMES, byte_level).guide_for([TOOLS[0], tool(type="string")], "required")
    assert refused.value.param == "tools"


def test_keywords_grammars_do_not_know_are_an_error_only_when_strict(byte_level: Tokenizer) -> None:
    parameters = {"properties": {"a": {"type": "array", "items": {"type": "null"}, "uniqueItems": True}}}
    loose = JsonToolParser(HERMES, byte_level).guide_for([tool(**parameters)], "required", parallel=False)
    assert write(byte_level, loose, 0, steps=2000)
    strict = JsonToolParser(HERMES, byte_level).guide_for([tool(**parameters, strict=True)], "required")
    with pytest.raises(RequestError, match="uniqueItems"):
        write(byte_level, strict, 0)
