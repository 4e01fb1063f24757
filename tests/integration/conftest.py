"""Real servers on 127.0.0.1 that serve the parrot."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from farrier.runtime.llm import AsyncLLM
from farrier.runtime.server.app import create_app
from farrier.runtime.server.options import ServerOptions
from farrier.runtime.tokenizer import Tokenizer
from tests.integration.parrot import CONTROL_TOKENS, VOCAB_SIZE, Parrot

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}{% for call in message.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


@pytest.fixture(scope="session")
def byte_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three control tokens, then a token for each byte; chats in ChatML, tool calls as Hermes writes them."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([], trainer)
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(byte_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer_folder)


RunServer = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def run_server(byte_tokenizer: Tokenizer) -> RunServer:
    """`with run_server(engine, tokenizer=..., **ServerOptions) as url`: a server in a thread of this process.

    is_loaded: wait until it has loaded the engine.
    """

    @contextmanager
    def run(
        engine: Parrot, *, tokenizer: Tokenizer | None = byte_tokenizer, is_loaded: bool = True, **options: object
    ) -> Iterator[str]:
        settings = ServerOptions(**options)  # type: ignore[arg-type]
        llm = AsyncLLM(engine, tokenizer=tokenizer, kv_blocks=1024, max_queue=settings.max_queue)
        server = uvicorn.Server(uvicorn.Config(create_app(llm, settings), log_config=None, log_level="critical"))
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            if is_loaded:
                wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
            yield url
        finally:
            server.should_exit = True
            thread.join()

    return run


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds; fails when it does not within a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")


@pytest.fixture(scope="module")
def parrot(byte_tokenizer: Tokenizer) -> Parrot:
    return Parrot(byte_tokenizer)


@pytest.fixture(scope="module")
def url(parrot: Parrot, run_server: RunServer) -> Iterator[str]:
    """A server for the tests of one module."""
    with run_server(parrot) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


def metric(url: str, name: str, **labels: str) -> float:
    """The value of a metric whose name begins with `farrier:`."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    values = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"farrier:{name}" and labels.items() <= sample.labels.items()
    ]
    assert len(values) == 1, f"{name} {labels}: {values}"
    return values[0]
