"""Every command, as a user and as a script would call it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.adapters import WEIGHTS
from tests.models import gap, inputs, logits

Run = Callable[..., Any]
SHORT = ("--max-new-tokens", "5")


def told(run: Run, *arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_inspect(run: Run, made: Path) -> None:
    found = told(run, "inspect", made / "adapter")
    assert found == json.loads(json.dumps(veneer.inspect(made / "adapter").to_dict()))
    shown = run("inspect", made / "adapter")
    assert (shown.code, shown.err) == (0, "")
    assert "LORA for CAUSAL_LM" in shown.out


def test_generate_gives_what_the_model_gives(run: Run, made: Path) -> None:
    model = veneer.load(made / "adapter")
    tokenizer = veneer.load_tokenizer(model)
    prompt = tokenizer("w5 w6 w9", return_tensors="pt")
    for options, choice in (((), "default"), (("--adapter", "__base__"), None), (("--merge",), "default")):
        with model.using([choice] if choice else []):
            ids = model.generate(**prompt, max_new_tokens=5, do_sample=False)
        expected = tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
        found = told(run, "generate", made / "adapter", "--prompt", "w5 w6 w9", *SHORT, *options)
        assert (found["answer"], found["new_tokens"]) == (expected, len(ids[0]) - 3)
        assert found["load_report"]["adapters"][0]["name"] == "default"
    streamed = run("generate", made / "adapter", "--prompt", "w5 w6 w9", *SHORT)
    assert streamed.code == 0, streamed.err
    assert streamed.out.strip()


def test_generate_chooses_from_a_set(run: Run, made: Path) -> None:
    answers = {
        name: told(run, "generate", made / "set", "--prompt", "w5 w6", *SHORT, "--adapter", name)["answer"]
        for name in ("default", "other", "__base__")
    }
    assert len(set(answers.values())) == 3
    assert told(run, "generate", made / "set", "--prompt", "w5 w6", *SHORT)["adapters"] == ["default"]


def test_generate_uses_the_chat_template(run: Run, chat: Path, made: Path) -> None:
    plain = told(run, "generate", chat, "--prompt", "w5 w6", "--no-chat", *SHORT)["answer"]
    template = told(run, "generate", chat, "--prompt", "w5 w6", *SHORT)["answer"]
    assert template == told(run, "generate", made / "adapter", "--prompt", "w5 w6 w7", *SHORT)["answer"]
    assert template != plain
    system = told(run, "generate", chat, "--prompt", "w6", "--system", "w5", *SHORT)["answer"]
    assert system == template
    refused = run("generate", chat, "--prompt", "w6", "--system", "w5", "--no-chat")
    assert (refused.code, "--system needs a chat template" in refused.err) == (2, True)


def test_generate_reads_standard_input_and_samples(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6"))
    assert told(run, "generate", made / "adapter", "--prompt", "-", *SHORT)["prompt"] == "w5 w6"
    options = ("--temperature", "2.0", "--seed", "1", "--max-new-tokens", "12")
    one, two = (told(run, "generate", made / "adapter", "--prompt", "w5", *options)["answer"] for _ in range(2))
    assert one == two
    assert one != told(run, "generate", made / "adapter", "--prompt", "w5", "--max-new-tokens", "12")["answer"]


def test_merge(run: Run, made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    report = told(run, "merge", made / "adapter", "--out", tmp_path / "out")
    assert report["out"] == str(tmp_path / "out")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert gap(logits(plain, inputs("llama")), logits(veneer.load(made / "adapter"), inputs("llama"))) < 1e-5
    refused = run("merge", made / "adapter", "--out", tmp_path / "out")
    assert (refused.code, "--overwrite" in refused.err) == (2, True)
    again = run("merge", made / "adapter", "--base", made / "base", "--out", tmp_path / "out", "--overwrite")
    assert (again.code, "merge report" in again.out) == (0, True)
    half = told(run, "merge", made / "adapter", "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"


def test_convert_pickle(run: Run, made: Path, tmp_path: Path) -> None:
    torch.save(load_file(made / "adapter" / WEIGHTS), tmp_path / "adapter_model.bin")
    result = run("convert-pickle", tmp_path)
    assert (result.code, result.out.strip()) == (0, str(tmp_path / WEIGHTS))
    assert run("convert-pickle", tmp_path).code == 2


def test_digest(run: Run, made: Path) -> None:
    digest = run("digest", made / "base").out.strip()
    assert digest == veneer.load(made / "base").base_digest
    assert run("digest", made / "base", "--full").out.startswith("sha256-full:")


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.strip() == f"veneer {veneer.__version__}"
    for arguments in ([], ["--help"]):
        result = run(*arguments)
        assert (result.code, "convert-pickle" in result.out) == (0, True)
    assert "--max-new-tokens" in run("generate", "--help").out


def test_the_module_is_the_command(made: Path) -> None:
    command = [sys.executable, "-m", "veneer", "inspect", str(made / "adapter"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["kind"] == "adapter"


def test_inspect_imports_nothing_heavy(made: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "veneer", "inspect", str(made / "adapter")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "veneer" in imported
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub", "safetensors"}
