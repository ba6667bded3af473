"""Perplexity of base and adapters on a file: against other formulas, and what is refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import veneer
from tests.benching import examples
from tests.benching.conftest import tokenizer
from tests.cli.test_bad_input import refused
from tests.models import build
from veneer.benching.compare import compare
from veneer.benching.evaluation_samples import read_samples
from veneer.benching.measure.fresh_process import Request
from veneer.benching.measure.perplexity import PredictedTokens, perplexity_of, tokenized
from veneer.benching.report.html import html
from veneer.benching.report.markdown import markdown
from veneer.benching.result import Perplexity
from veneer.benching.run import bench
from veneer.errors import SourceError, UsageError

Run = Callable[..., Any]
SHORT: dict[str, Any] = {"batch": (1,), "prompt_tokens": (4,), "new_tokens": 2, "repeats": 1}


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def some_ids(length: int) -> Tensor:
    return torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def log_probability(model: nn.Module, ids: Tensor) -> float:
    """Of the last token, by the definition."""
    scores = model(input_ids=ids[None]).logits[0, -2].double()
    return float(scores[ids[-1]] - scores.exp().sum().log())


def test_it_is_the_models_own_loss() -> None:
    model, ids = build("llama").eval(), some_ids(20)
    with torch.no_grad():
        expected = math.exp(float(model(input_ids=ids[None], labels=ids[None]).loss))
    assert perplexity_of(model, [PredictedTokens(ids, 1)]) == pytest.approx(expected, rel=1e-5)


def test_every_token_counts_once_after_half_a_window_at_least() -> None:
    model, ids, window = build("llama").eval(), some_ids(27), 8
    contexts = [ids[:end] for end in range(2, 9)]  # the first window
    contexts += [ids[begin : end + 1] for begin in (4, 8, 12, 16) for end in range(begin + 4, begin + 8)]
    contexts += [ids[20 : end + 1] for end in range(24, 27)]
    assert len(contexts) == len(ids) - 1
    expected = math.exp(-sum(log_probability(model, context) for context in contexts) / len(contexts))
    assert perplexity_of(model, [PredictedTokens(ids, 1)], window) == pytest.approx(expected, rel=1e-5)
    whole = perplexity_of(model, [PredictedTokens(ids, 1)])
    assert abs(whole - expected) / whole > 1e-3


def test_texts_count_by_their_tokens_and_prompts_do_not() -> None:
    model, ids = build("llama").eval(), some_ids(30)
    texts = [PredictedTokens(ids[:5], 3), PredictedTokens(ids, 20), PredictedTokens(ids[:7], 1)]
    logs = [log_probability(model, text.ids[: end + 1]) for text in texts for end in range(text.first, len(text.ids))]
    assert len(logs) == 2 + 10 + 6
    expected = math.exp(-sum(logs) / len(logs))
    assert perplexity_of(model, texts) == pytest.approx(expected, rel=1e-5)
    # A prompt longer than a window, of which half a window is seen.
    logs = [log_probability(model, ids[16 : end + 1]) for end in range(20, 24)]
    logs += [log_probability(model, ids[20 : end + 1]) for end in range(24, 28)]
    logs += [log_probability(model, ids[24 : end + 1]) for end in range(28, 30)]
    found = perplexity_of(model, [PredictedTokens(ids, 20)], 8)
    assert found == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-5)


def test_a_model_that_knows_nothing_chooses_among_all_tokens() -> None:
    model: Any = build("llama").eval()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity_of(model, [PredictedTokens(some_ids(600), 1)]) == pytest.approx(99, rel=1e-6)
    assert perplexity_of(model.to(torch.bfloat16), [PredictedTokens(some_ids(9), 1)]) == pytest.approx(99, rel=1e-6)


# -- the file ------------------------------------------------------------------------------------------------


def tokens_of(file: Path, *records: Any, chat: bool = True) -> list[tuple[list[int], int]]:
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return [(text.ids.tolist(), text.first) for text in tokenized(read_samples(file), tokenizer(chat))]


def said(role: str, *numbers: int) -> dict[str, str]:
    return {"role": role, "content": words(*numbers)}


def test_records(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert tokens_of(file, {"text": words(5, 6, 7), "id": 3}) == [([5, 6, 7], 1)]
    assert tokens_of(file, {"prompt": words(5, 6) + " ", "completion": words(7, 8)}) == [([5, 6, 7, 8], 2)]
    chat = [said("user", 5), said("assistant", 6, 7), said("user", 8), said("assistant", 9)]
    answers = [([90, 5, 2, 91, 6, 7, 2], 4), ([90, 5, 2, 91, 6, 7, 2, 90, 8, 2, 91, 9, 2], 11)]
    assert tokens_of(file, {"messages": chat}) == answers
    assert tokens_of(file, {"prompt": chat[:3], "completion": chat[3:]}) == answers[1:]
    assert tokens_of(file, {"messages": [said("assistant", 9)]}) == [([91, 9, 2], 1)]
    assert len(tokens_of(file, {"text": ""}, {"text": words(5, 6)}, {"text": words(4)})) == 1


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(words(5, 6) + "\n\n" + words(7), encoding="utf-8-sig")
    (text,) = tokenized(read_samples(file), tokenizer())
    assert (text.ids.tolist(), text.first) == ([5, 6, 7], 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", " \n", "a.txt holds nothing to predict"),
        ("a.txt", "x", "a.txt holds nothing to predict"),
        ("a.jsonl", "\n", "a.jsonl holds nothing to predict"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "w5"}]}', "a.jsonl holds nothing to predict"),
        ("a.jsonl", '\n{"text": ', "a.jsonl, line 2: no valid JSON"),
        ("a.jsonl", '{"text": 5}', "line 1: no record of a known form"),
        ("a.jsonl", '{"messages": ["w5"]}', "line 1: no record of a known form"),
        ("a.jsonl", "[" * 100_000, "line 1: no valid JSON"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt", None, "cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_one_line_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(run("bench", "nowhere", "--perplexity", name))


def test_what_cannot_be_predicted_is_refused(tmp_path: Path, talking: Path, folder: Callable[[str], Path]) -> None:
    with pytest.raises(SourceError, match=r"a\.jsonl is too short: no token follows another"):
        tokens_of(tmp_path / "a.jsonl", {"text": words(5)})
    chat = {"messages": [said("user", 5), said("assistant", 6)]}
    with pytest.raises(SourceError, match=r"line 1: the tokenizer has no chat template"):
        tokens_of(tmp_path / "a.jsonl", chat, chat=False)
    broken = tokenizer()
    broken.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(SourceError, match=r"line 1: the chat template refuses the messages.*no system"):
        tokenized(read_samples(tmp_path / "a.jsonl"), broken)
    (tmp_path / "a.txt").write_text(words(5, 6))
    with pytest.raises(SourceError, match="No tokenizer"):
        bench(folder("llama") / "a", base=folder("llama") / "base", perplexity=tmp_path / "a.txt", **SHORT)
    tokenizer().save_pretrained(talking / "bert")
    for file in (folder("bert") / "base").iterdir():
        (talking / "bert" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="continues no text"):
        bench(folder("bert") / "a", base=talking / "bert", perplexity=tmp_path / "a.txt", **SHORT)


# -- the whole run -------------------------------------------------------------------------------------------


def test_a_run(talking: Path, no_processes: list[Request]) -> None:
    ids = some_ids(40)
    (talking / "a.txt").write_text(words(*ids.tolist()))
    options: dict[str, Any] = {"base": talking / "base", "adapters": [talking / "b"], **SHORT}
    report = bench(talking / "a", perplexity=talking / "a.txt", **options)
    assert [found.adapter for found in report.perplexity] == ["", "a", "b"]
    for found in report.perplexity:
        path = talking / (found.adapter or "base")
        model = veneer.load(path, base=talking / "base" if found.adapter else None)
        with torch.no_grad():
            expected = math.exp(float(model(input_ids=ids[None], labels=ids[None]).loss))
        assert found.unmerged == pytest.approx(expected, rel=1e-4)
        assert found.merged is None if not found.adapter else found.merged == pytest.approx(expected, rel=1e-4)
        assert found.tokens == 39
    assert len({round(found.unmerged, 1) for found in report.perplexity}) == 3
    assert report.setup.texts.endswith("a.txt")
    assert veneer.BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_command_shows_it(run: Run, talking: Path, monkeypatch: pytest.MonkeyPatch, no_processes: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(talking)
    Path("a.jsonl").write_text(json.dumps({"messages": [said("user", 5, 6), said("assistant", 7, 8)]}))
    size = ("--batch", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1")
    result = run("bench", "a", "--base", "base", "--perplexity", "a.jsonl", *size)
    assert (result.code, result.err) == (0, "")
    shown = " ".join(result.out.split())
    assert "Perplexity" in shown
    assert "better a.jsonl is predicted" in shown
    for name in ("report.html", "report.md", "report.json"):
        assert "erplexity" in (Path("report") / name).read_text(encoding="utf-8")
    assert "would replace it" in refused(run("bench", "a", "--base", "base", "--perplexity", "report/report.md", *size))


def test_texts_that_are_predicted_worse_are_told() -> None:
    found = (
        Perplexity("", 20.0, None, 9, 8),
        Perplexity("pirate", 30.0, 31.0, 9, 8),
        Perplexity("json", 9.0, 9.0, 9, 8),
    )
    report = examples.report(examples.setup(texts="notes.txt"), perplexity=found)
    cautions = " ".join(report.recommendation.cautions)
    assert "pirate predicts notes.txt worse than the base alone: perplexity 30.00 against 20.00." in cautions
    assert "pirate: perplexity on notes.txt is 31.00 merged, 30.00 unmerged." in cautions
    assert "json" not in cautions
    for text in (markdown(report), html(report)):
        assert "+50" in text
    assert "Perplexity" not in markdown(examples.report())


def test_two_runs_are_compared_on_the_same_text() -> None:
    def run_of(json_: float, texts: str = "notes.txt", tokens: int = 9) -> veneer.BenchReport:
        found = (Perplexity("", 20.0, None, tokens, 8), Perplexity("json", json_, json_, tokens, 8))
        return examples.report(examples.setup(texts=texts), perplexity=found)

    def changes(old: veneer.BenchReport, new: veneer.BenchReport) -> list[tuple[str, str]]:
        return [(c.variant, c.verdict) for c in compare(old, new).changes if c.quantity == "perplexity"]

    assert changes(run_of(9.0), run_of(9.5)) == [("base", "same"), ("json", "worse")]
    assert changes(run_of(9.0), run_of(8.0)) == [("base", "same"), ("json", "better")]
    assert changes(run_of(9.0), run_of(9.5, "others.txt")) == changes(run_of(9.0), run_of(9.5, tokens=10)) == []
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compare(run_of(9.0), run_of(9.5)))
    assert "perplexity" in console.export_text()
