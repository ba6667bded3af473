"""The routes of inference: OpenAI's forms, byte by byte and by its own client, and what is refused."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.fake_engine import FakeEngine, answer_token, served
from tests.serving.http_service import DIGEST, OneAdapter, OpenDoor, call, events_of, one_adapter_service
from veneer import __version__
from veneer.serving import http_guard, http_protocol, stream
from veneer.serving.registry_types import Use
from veneer.serving.service import Service

CHAT = {"model": "a", "messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return one_adapter_service(tmp_path_factory.mktemp("adapter"), page=True)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service) as url:
        yield url


@pytest.fixture
def engine(service: Service) -> Iterator[FakeEngine]:
    engine = service.engine
    assert isinstance(engine, FakeEngine)
    engine.requests.clear()
    yield engine
    engine.delay, engine.broken, engine.dead = 0.0, False, False


@pytest.fixture
def url(address: str, service: Service, engine: FakeEngine) -> Iterator[str]:
    """The address; afterwards nothing is held any more."""
    yield address
    wait_until(lambda: not engine.running and not held(service))


def held(service: Service) -> int:
    assert isinstance(service.registry, OneAdapter)
    assert isinstance(service.admission, OpenDoor)
    return (
        service.registry.held + service.admission.inside + sum(service.waiting.values()) + sum(service.running.values())
    )


def wait_until(reached: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached"
        time.sleep(0.01)


def words(count: int, version: str | None = DIGEST, prompt: int = 4, seed: int = 0) -> str:
    return "".join(f"w{answer_token(version, prompt, seed, index)} " for index in range(count))


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_by_openais_own_client(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(**CHAT, n=2, seed=1, logprobs=True, top_logprobs=2)
    answer = raw.parse()
    assert [choice.message.content for choice in answer.choices] == [words(3, seed=1), words(3, seed=2)]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)
    assert answer.system_fingerprint == f"bbbbbbbb-aaaaaaaa-{__version__}"
    entry = answer.choices[0].logprobs.content[0]
    assert (entry.token, entry.logprob, len(entry.top_logprobs)) == (words(1, seed=1).strip(), -0.5, 2)
    assert bytes(entry.bytes).decode() == entry.token
    assert raw.headers["x-veneer-adapter"] == f"a@{DIGEST}"


def test_a_stream_by_openais_own_client(client: Any) -> None:
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == words(3)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 7
    assert len({c.id for c in chunks}) == 1


def test_a_stream_byte_by_byte(url: str) -> None:
    reply = call(url, "POST", "/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 1})
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache"
    first, *_ = events_of(reply)
    head = {name: first[name] for name in ("id", "object", "created", "model", "system_fingerprint")}
    assert head["object"] == "chat.completion.chunk"

    def line(delta: dict[str, str], finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return b"data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"

    role, text = line({"role": "assistant", "content": ""}, None), line({"content": words(1)}, None)
    assert reply.body == role + text + line({}, "length") + b"data: [DONE]\n\n"


def test_completions_of_several_prompts(client: Any) -> None:
    answer = client.completions.create(model="base", prompt=["w1", "w2 w3"], logprobs=1, max_tokens=2, n=2)
    texts = [choice.text for choice in answer.choices]
    assert texts == [words(2, None, 1), words(2, None, 1), words(2, None, 2), words(2, None, 2)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, len(words(1, None, 1))]


def test_completions_of_tokens_and_as_a_stream(client: Any, engine: FakeEngine) -> None:
    chunks = list(client.completions.create(model="a", prompt=[1, 2, 3], stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == words(16, prompt=3)
    assert [c.choices[0].logprobs.text_offset for c in chunks[:2]] == [[0], [len(words(1, prompt=3))]]  # type: ignore[union-attr]
    assert engine.requests[0].prompt == (1, 2, 3)


def test_what_is_asked_for_reaches_the_engine(url: str, engine: FakeEngine) -> None:
    asked = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["w5", "w6"],
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "ignore_eos": True,
        "max_completion_tokens": 2,
        "chat_template_kwargs": {"loud": True},
        "user": "somebody",
        "tools": [],
        "response_format": {"type": "text"},
        "metadata": None,
    }
    assert call(url, "POST", "/v1/chat/completions", {**CHAT, **asked}).status == 200
    request = engine.requests[0]
    assert request.prompt == (1, 2, 3, 9, 7)
    assert request.version == DIGEST
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        2,
        0,
        0.5,
        0,
        0.1,
    )
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (7, ("w5", "w6"), True)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (1, -1.5, 1.1)
    assert sampling.logit_bias == {5: -100}
    assert sampling.top_logprobs is None


def test_parts_and_the_developers_role(url: str, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    messages = [{"role": "developer", "content": "w8"}, {"role": "user", "content": parts}]
    assert call(url, "POST", "/v1/chat/completions", {**CHAT, "messages": messages}).status == 200
    assert engine.requests[0].prompt == (8, 1, 2, 7)


def test_a_chat_without_a_limit_may_take_the_whole_context(url: str, engine: FakeEngine) -> None:
    assert call(url, "POST", "/v1/chat/completions", {k: v for k, v in CHAT.items() if k != "max_tokens"}).status == 200
    assert engine.requests[0].sampling.max_tokens == 60


REFUSED: dict[str, tuple[Any, int, str, str]] = {
    "unknown field": ({**CHAT, "tools": [{}], "mirostat": 1}, 400, "unsupported_field", "`tools`, `mirostat`"),
    "unknown field of any name": ({**CHAT, "x-y[0]\x1b": 1}, 400, "unsupported_field", "`x-y[0]\\x1b` is"),
    "penalty": ({**CHAT, "repetition_penalty": 1e-300}, 400, "invalid_request", "`repetition_penalty`"),
    "image": (
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "unsupported_field",
        "messages[0].content[0].image_url",
    ),
    "json mode": ({**CHAT, "response_format": {"type": "json_object"}}, 400, "unsupported_field", "response_format"),
    "unknown model": ({**CHAT, "model": "b"}, 404, "model_not_found", "'b'"),
    "no messages": ({**CHAT, "messages": []}, 400, "invalid_request", "`messages`"),
    "wrong type": ({**CHAT, "temperature": "hot"}, 400, "invalid_request", "`temperature`"),
    "too long": ({**CHAT, "max_tokens": 61}, 400, "context_length_exceeded", "Ask for 60 tokens"),
    "too long prompt": (
        {**CHAT, "messages": [{"role": "user", "content": "w1 " * 70}]},
        400,
        "context_length_exceeded",
        "Shorten",
    ),
    "five stops": ({**CHAT, "stop": ["w1"] * 5}, 400, "invalid_request", "stop"),
    "empty stop": ({**CHAT, "stop": ""}, 400, "invalid_request", "stop"),
    "bias": ({**CHAT, "logit_bias": {"99": 1}}, 400, "invalid_request", "no token 99"),
    "n": ({**CHAT, "n": 9}, 400, "invalid_request", "`n`"),
    "template's own": (
        {**CHAT, "chat_template_kwargs": {"chat_template": "x"}},
        400,
        "invalid_request",
        "the server's",
    ),
    "self of the template": (
        {**CHAT, "chat_template_kwargs": {"self": 1}},
        400,
        "invalid_request",
        "the server's",
    ),
    "conversations of the template": (
        {**CHAT, "chat_template_kwargs": {"conversations": 1}},
        400,
        "invalid_request",
        "the server's",
    ),
    "usage without stream": ({**CHAT, "stream_options": {"include_usage": True}}, 400, "invalid_request", "stream"),
    "deep": (b"[" * 10_000 + b"]" * 10_000, 400, "invalid_request", "recursion"),
    "deep field": (b'{"model":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400, "invalid_request", "recursion"),
    "no JSON": (b"{model}", 400, "invalid_request", "JSON"),
    "no object": (b"[1]", 400, "invalid_request", ""),
    "not a number": (
        b'{"model":"a","messages":[{"role":"user","content":"w1"}],"temperature":NaN}',
        400,
        "invalid_request",
        "",
    ),
    "bad UTF-8": (b'{"model":"\xff"}', 400, "invalid_request", ""),
    "empty": (b"", 400, "invalid_request", "JSON"),
    "huge": (b" " * (9 << 20), 413, "body_too_large", "bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_body_is_refused_and_the_next_request_answered(url: str, case: str) -> None:
    body, status, code, text = REFUSED[case]
    reply = call(url, "POST", "/v1/chat/completions", body)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert text in reply.error["message"]
    assert reply.error.keys() == {"message", "type", "param", "code"}
    assert call(url, "POST", "/v1/chat/completions", CHAT).status == 200


def test_openais_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**CHAT, "model": "b"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="mirostat"):
        client.chat.completions.create(**CHAT, extra_body={"mirostat": 2})


def test_another_content_type_is_refused(url: str) -> None:
    reply = call(url, "POST", "/v1/chat/completions", CHAT, content_type="text/plain")
    assert (reply.status, reply.error["code"]) == (415, "wrong_content_type")


def test_addresses_and_methods_that_are_not_there(url: str) -> None:
    assert call(url, "GET", "/v1/nothing").error["code"] == "not_found"
    assert call(url, "GET", "/v1/chat/completions").error["code"] == "method_not_allowed"
    assert call(url, "GET", "/docs").status == 404
    assert call(url, "GET", "/openapi.json").status == 404


def test_other_sites_and_other_names_are_refused(url: str) -> None:
    assert call(url, "POST", "/v1/chat/completions", CHAT, origin="http://evil.example").status == 403
    assert call(url, "GET", "/v1/models", host="evil.example").error["code"] == "host_not_allowed"
    assert call(url, "GET", "/v1/models", host="localhost:80").status == 200
    assert call(url, "GET", "/v1/models", origin=url).status == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /health HTTP/1.1\r\nhost: [x", 403),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\norigin: http://[x", 403),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\norigin: null", 403),
        ("GET /health HTTP/1.0", 403),
        ("GET http://evil/ HTTP/1.1\r\nhost: localhost", 404),
        ("BREW /v1/models HTTP/1.1\r\nhost: localhost", 405),
        ("HEAD /v1/models HTTP/1.1\r\nhost: localhost", 405),
        ("HEAD /health HTTP/1.1\r\nhost: localhost", 200),
        ("OPTIONS /v1/models HTTP/1.1\r\nhost: localhost\r\naccess-control-request-method: POST", 405),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade", 200),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + "x" * 200_000, 400),
        ("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5", 400),
        ("\x16\x03\x01 no HTTP at all", 400),
    ],
)
def test_odd_heads_are_answered_and_the_next_request_too(url: str, head: str, status: int) -> None:
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 5) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode("latin-1"))
        answer = connection.recv(65536).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert "access-control-allow" not in answer
    if status == 405:
        assert "\r\nallow: GET\r\n" in answer
    assert call(url, "POST", "/v1/chat/completions", CHAT).status == 200


def test_a_path_forges_no_line_of_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "veneer.serve")
    assert call(url, "GET", "/%1b[31m%0d%0a2026-01-01%20INFO").status == 404
    wait_until(lambda: "/%1B%5B31m%0D%0A2026-01-01%20INFO 404" in caplog.text)  # it is written behind the answer
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_base_may_have_any_name(tmp_path: Path) -> None:
    service = one_adapter_service(tmp_path)
    name = "模型 100%\r\nx-evil: 1"
    service.settings = replace(service.settings, base_name=name)
    use = Use(name, None, None)
    service.registry.use = lambda model, caller: nullcontext(use)  # type: ignore[method-assign,assignment]
    with served(service) as url:
        for path, body in (
            ("/v1/chat/completions", {**CHAT, "model": name}),
            ("/v1/chat/completions", {**CHAT, "model": name, "stream": True}),
            ("/v1/compare", {"models": [name, name], "prompt": "w1", "max_tokens": 2}),
        ):
            reply = call(url, "POST", path, body)
            assert reply.status == 200
            assert reply.headers["x-veneer-adapter"] == "%E6%A8%A1%E5%9E%8B 100%25%0D%0Ax-evil: 1"
            assert "x-evil" not in reply.headers


def test_a_model_that_is_not_there_has_no_tokens(url: str) -> None:
    for path, body in (("/tokenize", {"prompt": "w1"}), ("/detokenize", {"tokens": [1]})):
        assert call(url, "POST", path, {**body, "model": "b"}).error["code"] == "model_not_found"
        assert call(url, "POST", path, {**body, "model": "a"}).status == 200


def test_request_ids_are_echoed_and_never_used(url: str, engine: FakeEngine) -> None:
    replies = [call(url, "POST", "/v1/chat/completions", CHAT, x_request_id="mine") for _ in range(2)]
    assert [reply.headers["x-request-id"] for reply in replies] == ["mine", "mine"]
    assert len({request.id for request in engine.requests} | {"mine"}) == 3
    assert call(url, "GET", "/nothing", x_request_id="mine").headers["x-request-id"] == "mine"
    assert call(url, "GET", "/health", x_request_id="a b").headers["x-request-id"].startswith("req-")


def test_a_full_queue_is_told_with_the_time_to_come_again(url: str, service: Service) -> None:
    assert isinstance(service.admission, OpenDoor)
    service.admission.full = True
    try:
        for streamed in (False, True):
            reply = call(url, "POST", "/v1/chat/completions", {**CHAT, "stream": streamed})
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "queue_full", "2")
    finally:
        service.admission.full = False


def test_a_step_that_fails_ends_an_answer(url: str, client: Any, engine: FakeEngine) -> None:
    engine.broken = True
    reply = call(url, "POST", "/v1/chat/completions", CHAT)
    assert (reply.status, reply.error["code"]) == (500, "engine_error")
    streamed = call(url, "POST", "/v1/chat/completions", {**CHAT, "stream": True})
    events = events_of(streamed)
    assert streamed.status == 200
    assert events[-1]["error"]["code"] == "engine_error"
    assert "[DONE]" not in events
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**CHAT, stream=True))


def test_an_answer_that_takes_too_long(url: str, engine: FakeEngine) -> None:
    engine.delay = 0.2
    reply = call(url, "POST", "/v1/chat/completions", {**CHAT, "timeout": 0.05})
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")


def test_heartbeats_while_nothing_comes(url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.05)
    engine.delay = 0.2
    body = call(url, "POST", "/v1/chat/completions", {**CHAT, "stream": True}).body
    assert b"\n\n: waiting\n\n" in body
    assert body.endswith(b"data: [DONE]\n\n")


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + data


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_what_it_held(
    url: str, engine: FakeEngine, service: Service, streamed: bool
) -> None:
    engine.delay = 0.05
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        connection.sendall(request_bytes({**CHAT, "stream": streamed, "max_tokens": 60}))
        wait_until(lambda: bool(engine.running))
    wait_until(lambda: not engine.running and not held(service))
    text = call(url, "GET", "/metrics").body.decode()
    assert 'veneer_requests_total{code="499"}' in text


def test_a_client_that_goes_away_before_its_body_is_there(url: str) -> None:
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        connection.sendall(request_bytes(CHAT)[:-10])
    assert call(url, "POST", "/v1/chat/completions", CHAT).status == 200


def test_a_slow_sender_is_given_up(url: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_SECONDS", 0.1)
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-length", "100")
    connection.putheader("content-type", "application/json")
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (408, "request_timeout")
    connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\n"])
def test_a_head_that_does_not_end_is_given_up(tmp_path: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    with served(one_adapter_service(tmp_path), http=http_protocol.HttpProtocol) as url:
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 5) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
        for _ in range(3):  # one connection, for longer than a head may take
            time.sleep(0.15)
            connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), {"content-type": "application/json"})
            assert connection.getresponse().read()
        connection.close()


def test_a_body_without_end_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_BYTES", 100)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 5) as connection:
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + b"32\r\n" + b" " * 50 + b"\r\n")
        connection.sendall(b"40\r\n" + b" " * 64 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert call(url, "POST", "/v1/chat/completions", CHAT).status == 200


def test_a_client_that_takes_nothing_is_given_up(
    url: str, engine: FakeEngine, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.2)
    event = FakeEngine._event
    monkeypatch.setattr(FakeEngine, "_event", lambda *of: replace(event(*of), text="x" * 1_000_000))
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        connection.sendall(request_bytes({**CHAT, "stream": True, "max_tokens": 60}))
        wait_until(lambda: bool(engine.requests))
        wait_until(lambda: not held(service))
    assert call(url, "GET", "/health").status == 200


def test_a_comparison_streams_all_columns(url: str) -> None:
    body = {"models": ["a", "base"], "messages": CHAT["messages"], "max_tokens": 3}
    reply = call(url, "POST", "/v1/compare", body)
    events = events_of(reply)
    assert reply.headers["x-veneer-adapter"] == f"a@{DIGEST}, base"
    assert events[-1] == "[DONE]"
    assert [event["adapter"] for event in events[:2]] == [f"a@{DIGEST}", "base"]
    for index, version in enumerate((DIGEST, None)):
        column = [event for event in events[2:-1] if event["index"] == index]
        assert "".join(event["text"] for event in column) == words(3, version)
        assert column[-1]["usage"]["completion_tokens"] == 3
        assert column[-1]["timing"]["first_token_seconds"] >= 0


def test_a_comparison_as_one_body(url: str) -> None:
    body = {"models": ["a", "base"], "prompt": "w1 w2", "max_tokens": 2, "stream": False}
    columns = call(url, "POST", "/v1/compare", body).json["columns"]
    assert [column["text"] for column in columns] == [words(2, DIGEST, 2), words(2, None, 2)]


def test_a_comparison_tells_which_column_failed(url: str, engine: FakeEngine) -> None:
    engine.broken = True
    events = events_of(call(url, "POST", "/v1/compare", {"models": ["a", "base"], "prompt": "w1", "max_tokens": 3}))
    assert {event["index"] for event in events if "error" in event and "index" in event} == {0, 1}
    assert "[DONE]" not in events


@pytest.mark.parametrize(
    "body",
    [
        {"models": ["a"], "prompt": "w1"},
        {"models": ["a"] * 9, "prompt": "w1"},
        {"models": ["a", "base"]},
        {"models": ["a", "base"], "prompt": "w1", "messages": CHAT["messages"]},
    ],
)
def test_a_comparison_of_something_else_is_refused(url: str, body: dict[str, Any]) -> None:
    assert call(url, "POST", "/v1/compare", body).error["code"] == "invalid_request"


def test_models(url: str, client: Any) -> None:
    base, adapter = client.models.list().data
    assert (base.id, adapter.id) == ("base", "a")
    entry = call(url, "GET", "/v1/models/a").json
    assert (entry["parent"], entry["veneer"]["digest"], entry["veneer"]["rank"]) == ("base", DIGEST, 8)
    assert call(url, "GET", "/v1/models/base").json["parent"] is None
    assert call(url, "GET", "/v1/models/b").error["code"] == "model_not_found"


def test_tokens_and_text(url: str) -> None:
    assert call(url, "POST", "/tokenize", {"prompt": "w1 w5"}).json == {
        "count": 2,
        "max_model_len": 64,
        "tokens": [1, 5],
    }
    chat = {"model": "a", "messages": CHAT["messages"], "add_generation_prompt": False}
    assert call(url, "POST", "/tokenize", chat).json["tokens"] == [1, 2, 3]
    assert call(url, "POST", "/detokenize", {"tokens": [1, 5]}).json == {"prompt": "w1w5"}
    assert call(url, "POST", "/detokenize", {"tokens": [1, 99]}).error["param"] == "tokens"


def test_an_adapters_own_template_comes_before_the_bases(url: str, service: Service, engine: FakeEngine) -> None:
    assert isinstance(service.registry, OneAdapter)
    file = service.registry.stored.folder / "chat_template.jinja"
    file.write_text("w4 {{ messages[0]['content'] }}")
    try:
        assert call(url, "POST", "/v1/chat/completions", CHAT).status == 200
        assert engine.requests[-1].prompt == (4, 1, 2, 3)
        file.write_bytes(b"\xff")
        assert call(url, "POST", "/v1/chat/completions", CHAT).error["code"] == "adapter_invalid"
        file.write_text("{{ raise_exception('no') }}")
        assert call(url, "POST", "/v1/chat/completions", CHAT).error["code"] == "invalid_request"
    finally:
        file.unlink()
    config = file.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"chat_template": "x" * (1 << 21)}))
    try:
        assert "has more than" in call(url, "POST", "/v1/chat/completions", CHAT).error["message"]
    finally:
        config.unlink()


def test_health_tells_of_the_engine(url: str, engine: FakeEngine) -> None:
    assert call(url, "GET", "/health").status == 200
    assert call(url, "GET", "/ready").json == {"status": "ready"}
    for path in ("/health", "/ready"):
        reply = call(url, "HEAD", path)
        assert (reply.status, reply.body) == (200, b"")
    engine.dead = True
    assert call(url, "HEAD", "/health").status == 503
    assert call(url, "GET", "/health").status == 503
    assert call(url, "GET", "/ready").status == 503
    reply = call(url, "POST", "/v1/chat/completions", CHAT)
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "engine_restarting", "2")


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    service = one_adapter_service(tmp_path, gateway_metrics=True)
    with served(service) as url:
        assert call(url, "POST", "/v1/chat/completions", {**CHAT, "n": 2}).status == 200
        reply = call(url, "GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
    values = {name: [sample.value for sample in family.samples] for name, family in families.items()}
    assert values["veneer_bank_slots"] == [1, 3]
    assert values["veneer_adapters"] == [1]
    assert next(s.value for s in families["veneer_ttft_seconds"].samples if s.name.endswith("_count")) == 2
    tokens = {s.labels["kind"]: s.value for s in families["veneer_tokens"].samples if s.name.endswith("_total")}
    assert tokens == {"prompt": 8, "generated": 6}
    info = families["vllm:lora_requests_info"].samples[0].labels
    assert info == {"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert values["vllm:num_requests_running"] == [0]


def test_the_page_loads_nothing_from_elsewhere(url: str) -> None:
    page = call(url, "GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    for name in ("page.css", "page.js", "events.js"):
        assert call(url, "GET", f"/{name}").status == 200


def test_a_server_that_drains_takes_nothing_new(tmp_path: Path) -> None:
    service = one_adapter_service(tmp_path)
    with served(service) as url:
        service.drain()
        assert call(url, "GET", "/ready").json == {"status": "draining"}
        reply = call(url, "POST", "/v1/chat/completions", CHAT)
        assert (reply.status, reply.error["code"]) == (503, "draining")
        assert call(url, "GET", "/").status == 404
