"""An adapter that brings a tokenizer is served with it, where the base has all its tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.serving.engine_world import World, events_of, lora, request, run, running, tokenizer
from tests.serving.fake_engine import ROWS, TEMPLATE, FakeEngine, served, word_tokenizer
from tests.serving.http_service import OneAdapter, call, one_adapter_service
from veneer.errors import SourceError
from veneer.serving.prompt_tokens import PromptTokenizer, own_template
from veneer.serving.service import Service
from veneer.serving.serving_errors import AdapterInvalidError

CHAT = {"model": "a", "messages": [{"role": "user", "content": "W1 w2"}]}


def lower_case(rows: int = ROWS) -> Any:
    """Return the base's tokenizer, which takes ``W1`` for ``w1`` too, with further words up to ``rows``."""
    own = word_tokenizer()
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    own.add_tokens([f"w{number}" for number in range(ROWS, rows)])
    own.chat_template = None
    return own


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return one_adapter_service(tmp_path)


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service) as url:
        yield url


def folder_of(service: Service) -> Path:
    assert isinstance(service.registry, OneAdapter)
    return service.registry.stored.folder


def facts(url: str) -> tuple[Any, Any, Any]:
    told = call(url, "GET", "/v1/adapters/a").json
    return told["tokenizer"], told["chat_template"], told["tokenizer_unfit"]


def test_its_prompts_are_taken_apart_by_its_own(service: Service, url: str) -> None:
    assert facts(url) == ("base", "base", None)
    lower_case().save_pretrained(folder_of(service))
    assert isinstance(service.engine, FakeEngine)
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "a", "prompt": "W1 w2"}),
        ("/v1/compare", {"models": ["base", "a"], "prompt": "W1 w2", "stream": False}),
    ):
        assert call(url, "POST", path, body).status == 200
        assert service.engine.requests[-1].prompt[:2] == (1, 2)
    assert service.engine.requests[-2].prompt == (0, 2), "the base keeps its own"
    assert facts(url) == ("adapter", "base", None)
    assert call(url, "POST", "/tokenize", {"model": "a", "prompt": "W1"}).json["tokens"] == [1]
    assert call(url, "POST", "/tokenize", {"prompt": "W1"}).json["tokens"] == [0]
    assert call(url, "POST", "/tokenize", {"model": "b", "prompt": "W1"}).status == 404
    (folder_of(service) / "chat_template.jinja").write_text(TEMPLATE)
    assert facts(url) == ("adapter", "adapter", None)


def test_of_several_templates_the_default_is_its_own_and_none_is_its_tokenizers(tmp_path: Path) -> None:
    own = lower_case()
    own.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "w1"}, {"name": "default", "template": "w2"}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": several}))
    words = PromptTokenizer(word_tokenizer(), ROWS)
    assert own_template(tmp_path) == "w2"
    assert words.of(tmp_path).chat(CHAT["messages"], {}) == words.of(tmp_path).text("w1 w2 w7")


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ raise_exception('no') }}"])
def test_a_bases_template_may_refuse_a_conversation(template: str | None) -> None:
    words = word_tokenizer()
    words.chat_template = template
    PromptTokenizer(words, ROWS).check_template()


def test_a_bases_template_with_a_syntax_error_is_told() -> None:
    words = word_tokenizer()
    words.chat_template = "w1\n{% for %}"
    with pytest.raises(SourceError, match="base's chat template is not valid, line 2: Expected"):
        PromptTokenizer(words, ROWS).check_template()


def test_tokens_that_the_base_has_rows_for_are_the_adapters(tmp_path: Path) -> None:
    lower_case(ROWS + 2).save_pretrained(tmp_path)
    words = PromptTokenizer(word_tokenizer(), ROWS + 2)
    assert words.of(tmp_path).text(f"w{ROWS + 1}") == (ROWS + 1,)
    assert words.choice(tmp_path).tokenizer == "adapter"


def test_the_bases_is_used_where_it_lacks_tokens_of_the_adapters(service: Service, url: str) -> None:
    lower_case(ROWS + 1).save_pretrained(folder_of(service))
    assert facts(url) == ("base", "base", f"It has a token {ROWS}, and the base has {ROWS}.")
    assert call(url, "POST", "/tokenize", {"model": "a", "prompt": "W1"}).json["tokens"] == [0]


def test_the_bases_is_used_where_the_adapters_has_other_numbers(service: Service, url: str) -> None:
    turned = Tokenizer(models.WordLevel({f"w{ROWS - 1 - number}": number for number in range(ROWS)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=turned, unk_token="w0").save_pretrained(folder_of(service))
    own, _, unfit = facts(url)
    assert own == "base"
    assert "the token 'w0' of the base's, or has another number" in unfit


def test_one_that_cannot_be_read_is_told(service: Service, url: str) -> None:
    (folder_of(service) / "tokenizer.json").write_text("{")
    reply = call(url, "POST", "/v1/chat/completions", CHAT)
    assert (reply.status, reply.error["code"]) == (422, "adapter_invalid")
    assert "leave them out" in reply.error["message"]
    assert str(folder_of(service)) not in reply.body.decode()
    assert facts(url) == (None, None, "The adapter's tokenizer cannot be read.")
    assert call(url, "POST", "/v1/chat/completions", {**CHAT, "model": "base"}).status == 200


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    lower_case().save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')")
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("{", '{"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]},', 1))
    words = PromptTokenizer(word_tokenizer(), ROWS)
    with suppress(AdapterInvalidError):
        words.of(tmp_path)
    assert not ran.exists()


def test_several_threads_may_be_the_first_to_ask(tmp_path: Path) -> None:
    own = lower_case()
    own.backend_tokenizer.enable_truncation(1)
    own.save_pretrained(tmp_path)
    words = PromptTokenizer(word_tokenizer(), ROWS)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: words.of(tmp_path).text("W1 w2 w3"), range(64)))
    assert answers == [(1, 2, 3)] * 64


def test_copies_of_one_tokenizer_are_read_once(tmp_path: Path) -> None:
    words = PromptTokenizer(word_tokenizer(), ROWS)
    lower_case().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (words._adapters.of(tmp_path / name) for name in "ab")
    assert first is second is not None


def test_its_answers_are_put_together_and_ended_by_its_own(tmp_path: Path) -> None:
    world = World(tmp_path / "adapters", {"r3": lora(3), "r4": lora(4)})
    prompt = [3, 4, 5]
    expected = world.answer("r3", prompt, 8)
    own = tokenizer()
    own.eos_token = f"w{expected[3]}"
    own.save_pretrained(world.folders["r3"])
    asked = {"max_tokens": 8, "ignore_eos": False}

    async def main() -> Any:
        with running(words=tokenizer()) as engine:
            for version, folder in world.folders.items():
                await engine.load(version, folder)
            events = await events_of(engine, request(0, prompt, "r3", **asked))
            await engine.drop("r3")
            assert not engine._own_tokenizers
            (world.folders["r3"] / "tokenizer.json").write_text("{")
            with pytest.raises(AdapterInvalidError, match="tokenizer cannot be read"):
                await engine.load("r3", world.folders["r3"])
            assert "r3" not in engine.resident
            await events_of(engine, request(1, prompt, "r4", **asked))
            return events

    events = run(main())
    end = expected.index(expected[3])
    assert [event.token for event in events] == expected[: end + 1]
    assert events[-1].finish == "stop"
