"""Chat templates that adapters bring hold up nobody, and take no more memory than they may."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving.fake_engine import TEMPLATE, FakeEngine, served, word_tokenizer
from tests.serving.http_service import OneAdapter, call, one_adapter_service
from veneer.serving import template_process
from veneer.serving.prompt_tokens import PromptTokenizer
from veneer.serving.serving_errors import AdapterInvalidError, InvalidRequestError
from veneer.serving.template_process import TemplateInput, TemplateProcess

MESSAGES = ({"role": "user", "content": "w1 w5"},)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = [
    LOOP,
    "{{ 9 ** (9 ** 9) }}",  # one call of C, computed when the template is compiled
    "{{ 'a' * 10 ** 10 }}",
    "{% set a = 'a' * 10 ** messages|length %}{{ a * 10 ** 9 }}",
    "{{ 'a' * 9000000 }}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ raise_exception('a' * 400000000) }}",
]


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> Iterator[TemplateProcess]:
    monkeypatch.setattr(template_process, "_SECONDS", 0.3)
    templates = TemplateProcess()
    yield templates
    templates.close()
    assert templates._process is None


def render(templates: TemplateProcess, template: str, caller: str = "one", **more: Any) -> str:
    return run(templates.render(TemplateInput(template, MESSAGES, **more), caller))


def run(answer: Coroutine[Any, Any, str]) -> str:
    return asyncio.run(answer)


@pytest.mark.parametrize("template", [TEMPLATE, "{% for m in messages %}{{ eos_token }}{% break %}{% endfor %}"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_it_renders_as_transformers_does(templates: TemplateProcess, template: str, generation_prompt: bool) -> None:
    tokenizer, options = word_tokenizer(), {"loud": ["ä", "\ud800"]}
    tokens = tokenizer.apply_chat_template(
        list(MESSAGES), chat_template=template, add_generation_prompt=generation_prompt, **options
    )["input_ids"]
    words = PromptTokenizer(tokenizer, 99)
    chat = TemplateInput(template, MESSAGES, words.template_variables(options), generation_prompt)
    assert list(words.text(run(templates.render(chat, "one")), special_tokens=False)) == tokens


@pytest.mark.parametrize("template", ENDLESS)
def test_one_that_takes_too_much_is_ended_and_others_go_on(templates: TemplateProcess, template: str) -> None:
    with pytest.raises(AdapterInvalidError, match=r"takes more than 0\.3 s, or too much memory"):
        render(templates, template)
    ended = templates._process
    with pytest.raises(AdapterInvalidError, match="It is refused for 60 s"):
        render(templates, template)
    assert templates._process is ended, "it is not tried again"
    assert render(templates, "{{ messages[0].content }}") == "w1 w5"


def test_it_is_refused_to_the_caller_alone_and_for_a_while(
    templates: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = f"{{% if slow %}}{LOOP}{{% endif %}}fine"
    with pytest.raises(AdapterInvalidError):
        render(templates, template, variables={"slow": True})
    assert render(templates, template, caller="two") == "fine"
    with pytest.raises(AdapterInvalidError, match="is refused"):
        render(templates, template)
    later = time.monotonic() + 61
    monkeypatch.setattr(template_process.time, "monotonic", lambda: later)
    assert render(templates, template) == "fine"


def test_one_that_refuses_the_conversation_may_be_asked_again(templates: TemplateProcess) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="refuses: no system"):
            render(templates, "{{ raise_exception('no system') }}")
    process = templates._process
    assert render(templates, "{{ messages|length }}") == "1"
    assert templates._process is process


def test_a_process_that_died_is_started_anew(templates: TemplateProcess) -> None:
    assert render(templates, "a") == "a"
    assert templates._process is not None
    templates._process.kill()
    templates._process.wait()
    assert render(templates, "a") == "a"


def test_a_clock_ends_it_where_no_signal_does(templates: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_SECONDS", 1000.0)
    monkeypatch.setattr(template_process, "_CLOCK_SECONDS", 0.3)
    with pytest.raises(AdapterInvalidError, match="takes more than"):
        render(templates, LOOP)
    assert render(templates, "a") == "a"


def test_one_that_has_grown_is_started_anew(templates: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_MOST_KEPT", 0)
    assert render(templates, "a") == render(templates, "a") == "a"
    assert templates._process is None


def test_it_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, asyncio, os, threading, time\n"
        "from veneer.serving.template_process import TemplateInput, TemplateProcess\n"
        "templates = TemplateProcess()\n"
        "asyncio.run(templates.render(TemplateInput('a'), ''))\n"
        "print(templates._process.pid, flush=True)\n"
        "asyncio.run(templates.render(TemplateInput(sys.argv[1]), ''))\n"
        "time.sleep(60)\n"
    )
    for template in ("a", LOOP):
        server = subprocess.Popen([sys.executable, "-c", program, template], stdout=subprocess.PIPE)
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        time.sleep(0.3)
        server.send_signal(signal.SIGKILL)
        server.communicate()
        _, alive = psutil.wait_procs([child], timeout=20)
        assert not alive


def test_chats_of_other_adapters_go_on(tmp_path: Path) -> None:
    service = one_adapter_service(tmp_path)
    assert isinstance(service.registry, OneAdapter)
    assert isinstance(service.engine, FakeEngine)
    (service.registry.stored.folder / "chat_template.jinja").write_text(LOOP)
    body = {"model": "a", "messages": list(MESSAGES), "max_tokens": 2}

    with served(service) as url, ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(call, url, "POST", "/v1/chat/completions", body) for _ in range(8)]
        time.sleep(0.2)
        start = time.monotonic()
        reply = call(url, "POST", "/v1/chat/completions", {**body, "model": "base"})
        seconds, refused = time.monotonic() - start, [each.result() for each in slow]
        assert reply.status == 200
        assert seconds < 1.5
        assert {(r.status, r.error["code"]) for r in refused} == {(422, "adapter_invalid")}
        assert "chat template takes more than 2 s" in refused[0].error["message"]
        assert not service.registry.held
    assert not [child for child in psutil.Process(os.getpid()).children() if "template_child" in str(child.cmdline())]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ a }}\n{% if %}", "not valid, line 2: Expected an expression"),
        ("\n\n{{ a | nothing }}", "not valid, line 3: No filter named 'nothing'"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "not valid: too many statically nested blocks"),
        (LOOP, "takes more than"),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_an_adapters_folder_is_checked(
    templates: TemplateProcess, tmp_path: Path, template: str, told: str | None
) -> None:
    templates.check(tmp_path)
    assert templates._process is None, "no template, no process"
    (tmp_path / "chat_template.jinja").write_text(template)
    if told is None:
        templates.check(tmp_path)
        return
    with pytest.raises(AdapterInvalidError, match=told):
        templates.check(tmp_path)
