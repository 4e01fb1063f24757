"""Everything beside completions: models, tokens, health, version, metrics."""

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import farrier
from farrier.runtime.tokenizer import Tokenizer
from tests.integration.conftest import RunServer, metric
from tests.integration.parrot import Parrot


def test_models_are_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("parrot", "model", "farrier")
    assert model.max_model_len == 512  # type: ignore[attr-defined]
    assert client.models.retrieve("parrot") == model


def test_a_model_is_served_under_the_name_given(byte_tokenizer: Tokenizer, run_server: RunServer) -> None:
    with (
        run_server(Parrot(byte_tokenizer), served_model_name="birds/grey parrot") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list().data] == ["birds/grey parrot"]
        assert client.models.retrieve("birds/grey parrot").id == "birds/grey parrot"
        assert client.completions.create(model="birds/grey parrot", prompt="y").model == "birds/grey parrot"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="parrot", prompt="y")


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json() == {"version": farrier.__version__}


def test_a_prompt_is_tokenized(http: httpx.Client, byte_tokenizer: Tokenizer) -> None:
    answer = http.post("/tokenize", json={"prompt": "aä", "return_token_strs": True}).json()
    ids = byte_tokenizer.encode("aä")
    assert answer == {"count": 3, "max_model_len": 512, "tokens": ids, "token_strs": ["a", "\ufffd", "\ufffd"]}
    plain = http.post("/tokenize", json={"model": "parrot", "prompt": "x" * 20_000, "add_special_tokens": False})
    assert plain.json()["count"] == 20_000
    assert "token_strs" not in plain.json()


def test_a_chat_is_tokenized_as_its_completion_is(http: httpx.Client, client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for more in ({}, {"tools": [tool]}):
        body = {"messages": [{"role": "user", "content": "hello"}], **more}
        counted = http.post("/tokenize", json=body).json()["count"]
        text = http.post("/detokenize", json={"tokens": http.post("/tokenize", json=body).json()["tokens"]}).json()
        assert text["prompt"].endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
        assert ('"name": "f"' in text["prompt"]) == bool(more)
        if not more:
            usage = client.chat.completions.create(model="parrot", **body).usage  # type: ignore[call-overload]
            assert usage.prompt_tokens == counted
    closed = http.post("/tokenize", json={**body, "add_generation_prompt": False, "tools": None}).json()["tokens"]
    prompt = http.post("/detokenize", json={"tokens": closed}).json()["prompt"]
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "what": 1}, "what"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(http: httpx.Client, body: dict[str, object], param: str) -> None:
    response = http.post("/tokenize", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_tokens_become_text(http: httpx.Client, byte_tokenizer: Tokenizer) -> None:
    tokens = byte_tokenizer.encode("aä<|im_end|>")
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "aä<|im_end|>"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    refused = http.post("/detokenize", json={"tokens": [0, -1]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens[1]")


def test_metrics_have_vllms_names(byte_tokenizer: Tokenizer, run_server: RunServer) -> None:
    with run_server(Parrot(byte_tokenizer)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            client.completions.create(model="parrot", prompt="abc", max_tokens=5, n=2)
            list(client.completions.create(model="parrot", prompt="x", max_tokens=5, stream=True))
        response = httpx.get(f"{url}/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        kinds = {family.name: family.type for family in text_string_to_metric_families(response.text)}
        assert {name for name, kind in kinds.items() if kind == "histogram"} == {
            "farrier:time_to_first_token_seconds",
            "farrier:inter_token_latency_seconds",
            "farrier:e2e_request_latency_seconds",
            "farrier:request_prompt_tokens",
            "farrier:request_generation_tokens",
        }
        assert {name for name, kind in kinds.items() if kind == "counter"} == {
            "farrier:num_preemptions",
            "farrier:prompt_tokens",
            "farrier:generation_tokens",
            "farrier:prefix_cache_queries",
            "farrier:prefix_cache_hits",
            "farrier:engine_steps",
            "farrier:request_success",
        }
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert metric(url, name, model_name="parrot") == 0
        assert metric(url, "prompt_tokens_total") == 3 + 3 + 1
        assert metric(url, "generation_tokens_total") == 5 + 5 + 3
        assert metric(url, "request_success_total", finished_reason="length") == 2
        assert metric(url, "request_success_total", finished_reason="stop") == 1
        assert metric(url, "time_to_first_token_seconds_count") == 3
        assert metric(url, "inter_token_latency_seconds_count") == 4 + 4 + 2
        assert metric(url, "e2e_request_latency_seconds_count") == 3
        assert metric(url, "request_prompt_tokens_sum") == 7
        assert metric(url, "request_generation_tokens_sum") == 13
        assert metric(url, "cache_config_info", block_size="16", num_gpu_blocks="1024") == 1
        assert metric(url, "engine_info", version=farrier.__version__, max_seq_len="512") == 1
