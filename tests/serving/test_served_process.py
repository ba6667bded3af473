"""The whole server, over its socket: right answers under every adapter, changes while it runs, and bad input."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.engine_world import base, tokenizer
from tests.serving.http_service import Reply, call, events_of
from tests.serving.served_process import (
    NAMES,
    ServedProcess,
    ask,
    check,
    check_many,
    completion,
    environment,
    made,
    process,
    save_base,
    started,
)
from veneer.files.base_digest import BASE_DIGEST_KEY, base_digest
from veneer.serving.auth import new_key

# Adapters that answer as r16 does, and are loaded when they are first asked for.
COLD = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    folder = tmp_path_factory.mktemp("served")
    world = made(folder)
    for number in range(COLD):
        target = shutil.copytree(world.folders["r16"], folder / "cold" / f"cold{number}")
        config = target / "adapter_config.json"
        config.write_text(config.read_text() + " " * number)  # other bytes, so that each is loaded by itself
    with process(world, folder, f"--adapters={folder / 'cold'}") as served:
        yield served


@pytest.fixture(autouse=True)
def answers_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, whatever it did, the server answers rightly."""
    yield
    if "server" in request.fixturenames:
        served: ServedProcess = request.getfixturevalue("server")
        assert call(served.url, "GET", "/health").status == 200
        check(served, ask(served, "r3", [5, 6, 7], 3), "r3", [5, 6, 7], 3)


def register(served: ServedProcess, name: str, source: Path | str, **more: Any) -> Reply:
    url = source if isinstance(source, str) else f"file://{source.resolve()}"
    body = {"name": name, "source": url, "wait": True, **more}
    return call(served.url, "POST", "/v1/adapters", body, timeout=60)


def copied(served: ServedProcess, name: str, of: str = "r3") -> Path:
    """Copy an adapter to where others may come from."""
    target = served.folder / "sources" / name
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(served.world.folders[of], target, ignore=shutil.ignore_patterns("r16", "dora", "ia3")))


def test_sixty_requests_of_many_clients_are_answered_under_their_own_adapters(server: ServedProcess) -> None:
    check_many(server, 60)


def test_openais_own_client(server: ServedProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert {model.id for model in client.models.list()} >= {"base", *NAMES}
        message = {"role": "user", "content": "w5 w6"}
        options: Any = {"model": "dora", "messages": [message], "max_tokens": 5, "temperature": 0}
        ignoring: Any = {"extra_body": {"ignore_eos": True}}
        answer = client.chat.completions.create(**options, **ignoring, logprobs=True, top_logprobs=2)
        expected = server.text("dora", [5, 6, 7], 5)
        assert answer.choices[0].message.content == expected
        top = answer.choices[0].logprobs.content[0].top_logprobs
        logprobs = server.world.logits("dora", [5, 6, 7])[-1].log_softmax(-1)
        assert [entry.logprob for entry in top] == pytest.approx(logprobs.topk(2).values.tolist(), abs=1e-4)
        stream = client.chat.completions.create(**options, **ignoring, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
        stop = expected.split()[2]
        stopped = client.chat.completions.create(**options, **ignoring, stop=[stop])
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].message.content == expected[: expected.index(stop)]
        sampled = [
            client.completions.create(model="r16", prompt="w5", seed=3, max_tokens=8).choices[0].text for _ in "ab"
        ]
        assert sampled[0] == sampled[1]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**options, "model": "r4"})


def test_a_comparison_is_what_each_answers_alone(server: ServedProcess) -> None:
    body = completion("", [], 6) | {"models": [*NAMES, "base"], "prompt": "w5 w6 w7", "stream": False}
    del body["model"]
    columns = call(server.url, "POST", "/v1/compare", body, timeout=60).json["columns"]
    expected = [server.text(name, [5, 6, 7], 6) for name in (*NAMES, None)]
    assert [column["text"] for column in columns] == expected
    assert len(set(expected)) == 5


def test_a_name_moves_and_comes_back_while_requests_run(server: ServedProcess) -> None:
    first, second = copied(server, "first", "r3"), copied(server, "second", "r16")
    assert register(server, "moving", first).status == 201
    old = call(server.url, "GET", "/v1/adapters/moving").json["digest"]
    assert register(server, "moving", second).error["code"] == "adapter_exists"
    with ThreadPoolExecutor(6) as clients:
        running = [clients.submit(ask, server, "moving", [5, 6, 7], 60) for _ in range(6)]
        time.sleep(0.1)
        assert register(server, "moving", second, replace=True).json["version"] == 2
        new = call(server.url, "GET", "/v1/adapters/moving").json["digest"]
        replies = [one.result() for one in running] + [ask(server, "moving", [5, 6, 7], 60)]
    versions = {f"moving@{old}": "r3", f"moving@{new}": "r16"}
    for reply in replies:
        expected = server.text(versions[reply.headers["x-veneer-adapter"]], [5, 6, 7], 60)
        assert reply.json["choices"][0]["text"] == expected
    assert replies[-1].headers["x-veneer-adapter"] == f"moving@{new}"
    assert ask(server, f"moving@{old[7:15]}", [5], 2).headers["x-veneer-adapter"] == f"moving@{old}"
    rolled = call(server.url, "POST", "/v1/adapters/moving/rollback", {}, timeout=60)
    assert (rolled.status, rolled.json["digest"]) == (200, old)
    aliased = call(server.url, "POST", "/v1/adapters/moving/alias", {"alias": "stable"})
    assert aliased.json["aliases"] == ["stable"]
    assert ask(server, "stable", [5], 2).status == 200
    assert call(server.url, "POST", "/v1/adapters/moving/pin", {}).json["pinned"] is True
    assert call(server.url, "POST", "/v1/adapters/moving/unpin", {}).json["pinned"] is False
    assert call(server.url, "POST", "/v1/adapters/moving/warm", {}, timeout=60).json["resident"] is True
    assert call(server.url, "DELETE", "/v1/adapters/moving?drain=20", timeout=60).status == 204
    assert ask(server, "moving", [5], 2).error["code"] == "adapter_removed"


def test_removal_under_load_waits_or_ends_what_runs(server: ServedProcess) -> None:
    assert register(server, "leaving", copied(server, "leaving")).status == 201
    with ThreadPoolExecutor(2) as clients:
        running = clients.submit(ask, server, "leaving", [5, 6, 7], 100, stream=True)
        wait_for(lambda: call(server.url, "GET", "/v1/adapters/leaving").json["requests"])
        assert call(server.url, "DELETE", "/v1/adapters/leaving").error["code"] == "adapter_busy"
        assert call(server.url, "DELETE", "/v1/adapters/leaving?force=true", timeout=60).status == 204
        events = events_of(running.result())
    assert events[-2]["choices"][0]["finish_reason"] in ("abort", "length")


def wait_for(reached: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_adapter_registered_in_the_background(server: ServedProcess) -> None:
    body = {"name": "later", "source": f"file://{copied(server, 'later').resolve()}", "pin": True}
    assert call(server.url, "POST", "/v1/adapters", body).status == 202
    wait_for(lambda: call(server.url, "GET", "/v1/adapters/later").json["state"] == "ready")
    assert call(server.url, "GET", "/v1/adapters/later").json["pinned"] is True
    assert call(server.url, "DELETE", "/v1/adapters/later", timeout=60).status == 204


def test_vllms_names(server: ServedProcess) -> None:
    def post(path: str, body: dict[str, Any]) -> Reply:
        return call(server.url, "POST", path, body, timeout=60)

    loading = {"lora_name": "vl", "lora_path": str(copied(server, "vl").resolve())}
    loaded = post("/v1/load_lora_adapter", loading)
    assert (loaded.status, loaded.body) == (200, b"Success: LoRA adapter 'vl' added successfully.")
    again = post("/v1/load_lora_adapter", loading)
    assert (again.status, again.error["type"]) == (400, "InvalidUserInput")
    assert "has already been loaded" in again.error["message"]
    assert post("/v1/load_lora_adapter", {**loading, "load_inplace": True}).status == 200
    assert post("/v1/load_lora_adapter", {"lora_name": "vl"}).status == 400
    gone = post("/v1/unload_lora_adapter", {"lora_name": "vl", "lora_int_id": 3})
    assert (gone.status, gone.body) == (200, b"Success: LoRA adapter 'vl' removed successfully.")
    missing = post("/v1/unload_lora_adapter", {"lora_name": "vl"})
    assert (missing.status, missing.error["type"]) == (404, "NotFoundError")


def not_finite(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")


def other_shapes(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.ones(3, 3) for name in load_file(file)}, file, {"format": "pt"})


def other_layers(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{" * 20_000)


def unknown_method(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "MAGIC"}))


def gated(folder: Path) -> None:
    """Not damaged, but a LoRA that begins at some tokens: the input decides."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": [5]}))


def prompting(folder: Path) -> None:
    """Not damaged, but virtual tokens."""
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 32}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "num_layers": 2, "num_attention_heads": 4}))
    save_file({"prompt_embeddings": torch.ones(2, 32)}, folder / "adapter_model.safetensors", {"format": "pt"})


def of_another_base(folder: Path) -> None:
    """Not damaged, but of a base of the same shapes with other weights."""
    other = base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    other.save_pretrained(folder.parent.parent / "other")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", BASE_DIGEST_KEY: base_digest(folder.parent.parent / "other")})


DAMAGES = [
    of_another_base,
    gated,
    prompting,
    not_finite,
    truncated,
    huge_header,
    pickled,
    other_shapes,
    other_layers,
    no_weights,
    no_json,
    unknown_method,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_bad_adapter_is_refused_and_never_answers(server: ServedProcess, damage: Any) -> None:
    damage(copied(server, "bad"))
    reply = register(server, "bad", server.folder / "sources" / "bad")
    assert (reply.status, reply.error["code"]) == (422, "adapter_invalid"), reply.body
    assert ask(server, "bad", [5], 2).status in (404, 410, 422)
    assert "veneer-serve-" not in reply.error["message"]  # where the server keeps adapters is not his
    assert str(server.folder) not in reply.error["message"]
    assert "strict=False" not in reply.error["message"]
    assert "adapter the adapter" not in reply.error["message"]


TRAVERSALS = [
    "file://{root}/sources/../adapters/r16",
    "file://{root}/sources/%2e%2e/adapters/r16",
    "file://{root}/sources/..%2fadapters",
    "{root}/sources/../adapters/r16",
    "file://{root}/sources/link",
    "file:///etc/passwd",
    "file://localhost/etc",
    "../adapters/r16",
    "~/x",
    "file://{root}/sources/a\\..\\..\\adapters",
    "http://169.254.169.254/latest",
    "https://example.com/adapter",
    "hf://someone/else",
    "file://{root}/sources/x\x00y",
    "simplecache::file:///etc",
]


@pytest.mark.parametrize("source", TRAVERSALS)
def test_a_source_outside_of_what_is_allowed_is_refused(server: ServedProcess, source: str) -> None:
    link = server.folder / "sources" / "link"
    if not link.is_symlink():
        link.symlink_to(server.world.folders["r16"].resolve())
    reply = register(server, "outside", source.replace("{root}", str(server.folder.resolve())))
    assert reply.status in (400, 403, 404, 424), reply.body
    assert call(server.url, "GET", "/v1/models/outside").status in (404, 410, 403, 424)


@pytest.mark.parametrize("name", ["../x", "a/../b", ".x", "a b", "x" * 200, "a/b/c", "base", "a\n", ""])
def test_a_name_that_is_none_is_refused(server: ServedProcess, name: str) -> None:
    reply = register(server, name, copied(server, "named"))
    assert reply.status in (400, 409), reply.body


def test_a_source_that_is_gone(server: ServedProcess) -> None:
    reply = register(server, "gone", server.folder / "sources" / "never")
    assert (reply.status, reply.error["code"]) in ((424, "adapter_source_failed"), (422, "adapter_invalid"))


CHAT = {"messages": [{"role": "user", "content": "w5"}]}
TEXT = {"prompt": "w5"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        ("/v1/completions", {"model": "r3", "prompt": [5] * 100, "max_tokens": 100}),
        ("/v1/completions", {"model": "r3", "prompt": [5] * 200}),
        ("/v1/completions", {"model": "r3", "prompt": [[5], [5] * 128], "max_tokens": 1}),
        ("/v1/completions", {"model": "r3", "n": 8, **TEXT, "max_tokens": 10**30}),
        ("/v1/chat/completions", {"model": "r3", **CHAT, "max_tokens": 128}),
        ("/v1/chat/completions", {"model": "r3", **CHAT, "max_completion_tokens": 128}),
        ("/v1/compare", {"models": ["r3", "base"], **CHAT, "max_tokens": 128}),
        ("/v1/compare", {"models": ["r3", "base"], "prompt": "w5 " * 200}),
    ],
    ids=str,
)
def test_a_request_longer_than_the_cache(server: ServedProcess, asked: tuple[str, Any], streamed: bool) -> None:
    reply = call(server.url, "POST", asked[0], {**asked[1], "stream": streamed})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_adapter_that_is_not_there_is_an_error_and_never_the_base(server: ServedProcess, streamed: bool) -> None:
    truncated(copied(server, "failed"))
    assert register(server, "failed", server.folder / "sources" / "failed").status == 422
    assert register(server, "removed", copied(server, "removed")).status == 201
    assert call(server.url, "DELETE", "/v1/adapters/removed", timeout=60).status == 204
    expected = {
        "unknown": (404, "model_not_found"),
        "r3@sha256:000000": (404, "model_not_found"),
        "base@sha256:000000": (404, "model_not_found"),
        "failed": (422, "adapter_invalid"),
        "removed": (410, "adapter_removed"),
    }
    for name, answer in expected.items():
        for path, body in (
            ("/v1/completions", {"model": name, **TEXT, "stream": streamed}),
            ("/v1/chat/completions", {"model": name, **CHAT, "stream": streamed}),
            ("/v1/compare", {"models": ["r3", name], **TEXT, "stream": streamed}),
            ("/tokenize", {"model": name, **CHAT}),
            ("/tokenize", {"model": name, **TEXT}),
            ("/detokenize", {"model": name, "tokens": [5]}),
            (f"/v1/adapters/{name}/warm", {}),
        ):
            reply = call(server.url, "POST", path, body)
            assert (reply.status, reply.error["code"]) == answer, (path, name)
            assert "x-veneer-adapter" not in reply.headers
    for path in ("pin", "rollback", "warm"):
        assert call(server.url, "POST", f"/v1/adapters/base/{path}", {}).error["code"] == "model_not_found"
    assert "is the base" in call(server.url, "DELETE", "/v1/adapters/base").error["message"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("query", ["force=true", "drain=30"])
def test_eight_answers_of_one_request_whose_adapter_goes(server: ServedProcess, query: str, streamed: bool) -> None:
    assert register(server, "eight", copied(server, "eight")).status == 201
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(ask, server, "eight", [5, 6, 7], 120, n=8, stream=streamed)
        wait_for(lambda: call(server.url, "GET", "/v1/adapters/eight").json["requests"] or running.done())
        assert call(server.url, "DELETE", f"/v1/adapters/eight?{query}", timeout=60).status == 204
        reply = running.result()
    assert reply.status == 200
    bodies = events_of(reply)[:-1] if streamed else [reply.json]
    choices = [choice for body in bodies for choice in body["choices"] if choice["finish_reason"]]
    assert len(choices) == 8
    assert {choice["finish_reason"] for choice in choices} <= {"length", "abort"} - (
        {"abort"} if "drain" in query else set()
    )
    assert ask(server, "eight", [5], 2).error["code"] == "adapter_removed"


def test_requests_of_one_id_are_answered_each_by_itself(server: ServedProcess) -> None:
    def asked(number: int) -> Reply:
        body = completion(NAMES[number % 4], [5, 6, number], 20, stream=number % 2 == 1)
        return call(server.url, "POST", "/v1/completions", body, timeout=60, x_request_id="same")

    for number in range(3, 15):
        server.text(NAMES[number % 4], [5, 6, number], 20)
    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(asked, range(3, 15)))
    for number, reply in enumerate(replies, 3):
        assert reply.headers["x-request-id"] == "same"
        check(server, reply, NAMES[number % 4], [5, 6, number], 20)


def test_nothing_that_a_client_says_steers_the_log(server: ServedProcess) -> None:
    odd = "\x1b]0;title\x07\r\n2026-01-01 INFO forged"
    for path, body in (
        ("/v1/completions", {"model": odd, **TEXT}),
        ("/v1/completions", {"model": "r3", odd: 1}),
        ("/v1/adapters", {"name": odd, "source": "hf://a/b"}),
        ("/v1/adapters", {"name": "odd", "source": f"file:///{odd}", "wait": True}),
        ("/v1/load_lora_adapter", {"lora_name": odd, "lora_path": odd}),
        (f"/v1/adapters/{quote(odd)}/warm", {}),
        (f"/{quote(odd)}", {}),
    ):
        reply = call(server.url, "POST", path, body)
        assert reply.status in (400, 403, 404)
        assert not any(sign in reply.error["message"] for sign in "\x1b\x07\r")
    log = (server.folder / "log").read_text()
    assert "forged" in log
    assert all(line.isprintable() for line in log.split("\n"))
    assert "\n2026-01-01 INFO forged" not in log


@pytest.mark.parametrize("read", [0, 1, 300])
def test_clients_that_go_away_leave_nothing_behind(server: ServedProcess, read: int) -> None:
    """Before the answer begins, at its head, and within its tokens."""
    address = urlsplit(server.url)
    data = json.dumps(completion("r16", [5, 6, 7], 100, stream=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
    for _ in range(40):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
            got = b""
            while len(got) < read:
                got += connection.recv(read - len(got))
    wait_for(lambda: call(server.url, "GET", "/v1/adapters/r16").json["requests"] == 0)
    text = call(server.url, "GET", "/metrics").body.decode()
    assert "veneer_requests_running 0.0" in text
    assert "veneer_requests_waiting 0.0" in text


@pytest.mark.parametrize("phase", ["before the body", "queued", "loading", "in a long prompt", "after the last token"])
def test_clients_that_go_away_in_each_phase_leave_nothing_behind(server: ServedProcess, phase: str) -> None:
    address = urlsplit(server.url)
    names = [f"cold{number}" for number in range(COLD)] if phase == "loading" else ["r16"]
    prompt = [5] * (100 if phase == "in a long prompt" else 3)
    tokens = 3 if phase == "after the last token" else 20
    with ExitStack() as stack:
        for number in range(40):
            body = json.dumps(completion(names[number % len(names)], prompt, tokens, stream=number % 4 != 1)).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
            connection = stack.enter_context(socket.create_connection((address.hostname, address.port), 20))
            sent = body[:-5] if phase == "before the body" else body
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + sent)
            got = b"" if phase == "after the last token" else b"[DONE]"
            while b"[DONE]" not in got and b"total_tokens" not in got:
                part = connection.recv(1 << 16)
                assert part
                got += part
    wait_for(lambda: not any(call(server.url, "GET", f"/v1/adapters/{name}").json["requests"] for name in names))
    text = call(server.url, "GET", "/metrics").body.decode()
    assert "veneer_requests_running 0.0" in text
    assert "veneer_requests_waiting 0.0" in text
    reply = ask(server, names[-1], [5, 6, 7], 4)
    assert reply.json["choices"][0]["text"] == server.text("r16", [5, 6, 7], 4)


def test_what_is_measured(server: ServedProcess) -> None:
    text = call(server.url, "GET", "/metrics").body.decode()
    assert 'veneer_adapters{state="ready"}' in text
    assert "veneer_requests_running 0.0" in text
    assert 'veneer_tokens_total{adapter="r3",kind="generated"}' in text


def test_a_server_that_is_told_to_stop_ends_its_answers_first(tmp_path: Path) -> None:
    options = ("--log=json", f"--audit-log={tmp_path / 'audit'}")
    with process(made(tmp_path), tmp_path, *options) as served, ThreadPoolExecutor(1) as clients:
        running = clients.submit(ask, served, "r16", [5, 6, 7], 120)
        wait_for(lambda: call(served.url, "GET", "/v1/adapters/r16").json["requests"])
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: call(served.url, "GET", "/ready").status == 503 or running.done())
        check(served, running.result(), "r16", [5, 6, 7], 120)
        assert served.process.wait(20) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert any("Stopping" in line["text"] for line in lines)
    assert not list(tmp_path.glob("veneer-serve-*"))
    audited = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [entry["event"] for entry in audited] == ["registered"] * 4 + ["answered"]
    assert audited[-1]["adapter"] == running.result().headers["x-veneer-adapter"]
    assert audited[-1]["tokens"] == 120


def test_names_survive_a_restart_in_a_store_and_keys_are_read_again(tmp_path: Path) -> None:
    world, (key, entry) = made(tmp_path), new_key("one")
    file = tmp_path / "keys.json"
    entry["scopes"] = ["infer", "admin"]
    file.write_text(json.dumps({"keys": [entry]}))
    options = (f"--store={tmp_path / 'store'}", f"--api-keys={file}")
    with process(world, tmp_path, *options) as served:
        bearer = f"Bearer {key}"
        body = {"name": "kept", "source": f"file://{copied(served, 'kept').resolve()}", "wait": True}
        registered = call(served.url, "POST", "/v1/adapters", body, timeout=60, authorization=bearer)
        assert registered.status == 201
        assert call(served.url, "GET", "/v1/models").status == 401
    shutil.rmtree(tmp_path / "sources" / "kept")
    with process(world, tmp_path, *options) as served:
        again = call(
            served.url, "POST", "/v1/completions", completion("kept", [5], 3), timeout=60, authorization=bearer
        )
        assert again.headers["x-veneer-adapter"] == f"kept@{registered.json['digest']}"
        file.write_text("{")
        served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "stay as they were" in (tmp_path / "log").read_text())
        assert call(served.url, "GET", "/v1/models", authorization=bearer).status == 200
        file.write_text(json.dumps({"keys": [new_key("two")[1]]}))
        served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: call(served.url, "GET", "/v1/models", authorization=bearer).status == 401)


def test_a_folder_of_adapters_is_served_but_for_what_cannot_be(tmp_path: Path) -> None:
    world = made(tmp_path)
    shutil.copytree(world.folders["r16"], tmp_path / "many" / "good")
    shutil.copytree(world.folders["r16"], tmp_path / "many" / "bad")
    truncated(tmp_path / "many" / "bad")
    (tmp_path / "many" / "notes").mkdir()
    with process(world, tmp_path, f"--adapters={tmp_path / 'many'}", "--ui") as served:
        names = {entry["id"] for entry in call(served.url, "GET", "/v1/models").json["data"]}
        assert names == {"base", "good", *NAMES}
        reply = ask(served, "good", [5, 6, 7], 4)
        assert reply.json["choices"][0]["text"] == served.text("r16", [5, 6, 7], 4)
        assert "bad is left out" in (tmp_path / "log").read_text()
        assert call(served.url, "GET", "/").status == 200


def test_an_adapter_of_the_command_line_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    world = made(tmp_path)
    truncated(world.folders["dora"])
    with pytest.raises(RuntimeError, match="error: "), process(world, tmp_path):
        raise AssertionError("it started")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["loading the base", "loading r3", "veneer-serve-"])
def test_told_to_stop_while_it_loads_it_leaves_nothing(tmp_path: Path, moment: str, number: int) -> None:
    world = made(tmp_path)
    command = [sys.executable, "-m", "veneer", "serve", str(tmp_path / "base"), "--port=0", "--threads=1"]
    adapters = [f"--adapter={name}={folder}" for name, folder in world.folders.items()]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen([*command, *adapters], stdout=log, stderr=log, env=environment(tmp_path))
    try:
        wait_for(lambda: moment in (tmp_path / "log").read_text() or [*tmp_path.glob(f"{moment}*")], 60)
        running.send_signal(number)
        assert running.wait(30) == 0
    finally:
        running.kill()
        running.wait()
    assert not list(tmp_path.glob("veneer-serve-*"))
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the limits of another process")
def test_a_full_disk_fails_changes_and_nothing_else(tmp_path: Path) -> None:
    """No file of the process may grow: of adapters, of names, or its log."""
    import resource

    def limit(size: int) -> None:
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def alias() -> Reply:
        return call(served.url, "POST", "/v1/adapters/r3/alias", {"alias": "stable"})

    world = made(tmp_path)
    options = (f"--store={tmp_path / 'store'}", f"--audit-log={tmp_path / 'audit'}")
    with process(world, tmp_path, *options) as served:
        copied(served, "new", "r16")
        limit(100)
        for reply in (register(served, "new", tmp_path / "sources" / "new"), alias(), alias()):
            assert (reply.status, reply.error["code"]) == (424, "adapter_source_failed")
            assert "cannot be written" in reply.error["message"]
            assert str(tmp_path) not in reply.error["message"]
        for path in ("/v1/adapters/r3/pin", "/v1/adapters/r3/unpin"):
            call(served.url, "POST", path, {})
        assert call(served.url, "DELETE", "/v1/adapters/dora").status == 424
        for name in (*NAMES, "base"):
            check(served, ask(served, name, [5, 6, 7], 3), name, [5, 6, 7], 3)
        assert call(served.url, "GET", "/v1/adapters/r3").json["aliases"] == []
        limit(resource.RLIM_INFINITY)
        wait_for(lambda: register(served, "new", tmp_path / "sources" / "new").status == 201)
        assert alias().json["aliases"] == ["stable"]
        assert not list((tmp_path / "store").glob(".fetching-*"))
    with process(world, tmp_path, *options) as served:
        assert call(served.url, "GET", "/v1/adapters/stable").json["name"] == "r3"
        check(served, ask(served, "dora", [5, 6, 7], 3), "dora", [5, 6, 7], 3)
        assert ask(served, "new", [5], 2).status == 200


def test_told_twice_it_stops_at_once(tmp_path: Path) -> None:
    with process(made(tmp_path), tmp_path, "--drain=60") as served, ThreadPoolExecutor(1) as clients:
        running = clients.submit(ask, served, "r16", [5, 6, 7], 120)
        wait_for(lambda: call(served.url, "GET", "/v1/adapters/r16").json["requests"])
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: call(served.url, "GET", "/ready").status == 503 or running.done())
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        running.exception()


def test_a_step_that_takes_too_long_ends_the_process_for_its_supervisor(tmp_path: Path) -> None:
    """Within such a timeout no step ends, so each one that is looked at hangs."""
    healths: set[int] = set()
    with process(made(tmp_path), tmp_path, "--step-timeout=0.000001") as served, ThreadPoolExecutor(2) as clients:

        def load() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    ask(served, "r16", [5, 6, 7], 120)

        for _ in range(2):
            clients.submit(load)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while served.process.poll() is None:
                healths.add(call(served.url, "GET", "/health").status)
        assert served.process.wait(20) == 70
    assert 503 in healths
    assert "A step takes more than 1e-06 s." in (tmp_path / "log").read_text()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_metrics_on_a_port_of_their_own_are_there_and_nothing_else_is(tmp_path: Path) -> None:
    key, entry = new_key("scraper")
    entry["scopes"] = ["metrics", "infer"]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [entry]}))
    port = free_port()
    options = (f"--metrics-port={port}", f"--api-keys={tmp_path / 'keys.json'}")
    with process(made(tmp_path), tmp_path, *options) as served:
        metrics, bearer = f"http://127.0.0.1:{port}", f"Bearer {key}"
        assert b"veneer_engine_up 1.0" in call(metrics, "GET", "/metrics", authorization=bearer).body
        assert call(metrics, "GET", "/metrics").status == 401
        gone = call(served.url, "GET", "/metrics", authorization=bearer)
        assert (gone.status, gone.error["code"]) == (404, "not_found")
        assert call(served.url, "GET", "/v1/models", authorization=bearer).status == 200
        for path in ("/v1/models", "/health", "/", "/metrics/x"):
            assert call(metrics, "GET", path, authorization=bearer).status == 404
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0


@pytest.mark.parametrize(
    ("template", "told"),
    [("w1\n{% for %}", "not valid, line 2"), ("{{ 9 ** (9 ** 9) }}", "takes more than 2 s"), ("{{ 1", "line 1")],
)
def test_an_adapter_whose_chat_template_is_no_good_is_refused(server: ServedProcess, template: str, told: str) -> None:
    source = shutil.copytree(server.world.folders["r3"], server.folder / "sources" / f"template{len(template)}")
    (source / "chat_template.jinja").write_text(template)
    reply = register(server, "templated", source)
    assert (reply.status, reply.error["code"]) == (422, "adapter_invalid")
    assert told in reply.error["message"]


def test_an_adapters_chat_template_is_rendered_apart(server: ServedProcess) -> None:
    source = shutil.copytree(server.world.folders["r3"], server.folder / "sources" / "templated")
    (source / "chat_template.jinja").write_text("w5 {{ messages[0].content }}")
    assert register(server, "templated", source).status == 201
    body = {"model": "templated", "messages": [{"role": "user", "content": "w6 w7"}]}
    reply = call(server.url, "POST", "/tokenize", body)
    assert reply.json["tokens"] == call(server.url, "POST", "/tokenize", {"prompt": "w5 w6 w7"}).json["tokens"]


def test_a_base_whose_chat_template_has_an_error_is_not_served(tmp_path: Path) -> None:
    save_base(tmp_path, tokenizer())
    (tmp_path / "base" / "chat_template.jinja").write_text("w1\n{% for %}")
    with (
        pytest.raises(RuntimeError, match="The base's chat template is not valid, line 2"),
        started(tmp_path, "--port=0"),
    ):
        pass
