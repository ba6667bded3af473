"""Every command, as a user and as a script would call it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shellingham
import torch
from safetensors.torch import load_file

import veneer
from tests.models import gap, inputs, logits
from tests.random_adapters import WEIGHTS, edit_config, edit_tensors
from veneer.checkpoints.model_class import dtype_of
from veneer.cli.app import COMMANDS
from veneer.peft_model.stop_strings import before_stop, settled, stopping_criterion
from veneer.serving.source_files import FolderSource
from veneer.serving.store import Store

Run = Callable[..., Any]
WITHOUT_TORCH = [
    *(["--help"], ["inspect", "--help"], ["generate"], ["inspct"], ["--version"]),
    *([command, ".", "--dtype", "int8", "--out", "out"] for command in ("merge", "bench")),
    ["extract", "--tuned", ".", "--base", ".", "--out", "out", "--dtype", "auto"],
    ["generate", ".", "--prompt", "w5", "--dtype", "fp18"],
    *(["chat", "-h"], ["train", "-h"], ["chat", ".", "--stop", ""], ["train", "data.jsonl", "--out", "out"]),
]
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_speaks_to_users(run: Run, command: str) -> None:
    """It has an example whose options exist, and a word for each value in place of its type."""
    text = run(command, "--help").out
    assert not re.search(r"<[a-z]", text)
    [example] = re.findall(r"Example: veneer (.*?)\n\n", text, re.DOTALL)
    assert example.split()[0] == command
    assert set(re.findall(r"--[\w-]+", example)) <= set(re.findall(r"--[\w-]+", text[text.index("Options:") :]))
    assert not re.search(r"TEXT|INTEGER|FLOAT|DIRECTORY", text)


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


def test_generate_samples_from_the_likeliest(run: Run, made: Path) -> None:
    ask = ("generate", made / "adapter", "--prompt", "w5", "--max-tokens", "12", "--seed", "1")
    greedy = told(run, *ask)["answer"]
    assert told(run, *ask, "--top-k", "1")["answer"] == told(run, *ask, "--top-p", "0")["answer"] == greedy
    wide = [told(run, *ask, "--temperature", "5", *options)["answer"] for options in ((), ("--top-k", "0"))]
    assert greedy not in wide
    assert told(run, *ask, "--top-p", "0.9", "--device", "cpu")["answer"] != greedy


def test_generate_stops_before_a_text(run: Run, made: Path) -> None:
    ask = ("generate", made / "adapter", "--prompt", "w5 w6", "--max-new-tokens", "12")
    whole = told(run, *ask)
    words = ["w" + word for word in whole["answer"].split("w")[1:]]
    stops = ("--stop", "w5000", "--stop", "".join(words[3:5]))
    cut = told(run, *ask, *stops)
    assert cut["answer"] == whole["answer"].partition("".join(words[3:5]))[0] != whole["answer"]
    assert cut["new_tokens"] < whole["new_tokens"]
    assert run(*ask, *stops).out == cut["answer"] + "\n"
    assert told(run, *ask, "--stop", "none")["answer"] == whole["answer"]


def test_an_answer_is_held_back_where_it_may_be_the_beginning_of_a_stop_string() -> None:
    stops = ["END", "aa"]
    texts = ("one E", "one EN", "one ENx", "xa", "xaa", "x aab", "one ENDEN")
    assert [settled(text, stops) for text in texts] == ["one ", "one ", "one ENx", "x", "x", "x ", "one "]
    assert before_stop("one EN", stops) == "one EN"


def test_a_stop_string_is_looked_for_at_the_end_alone() -> None:
    lengths: list[int] = []

    def decode(tokens: torch.Tensor) -> str:
        lengths.append(len(tokens))
        return "".join(map(chr, tokens.tolist()))

    is_done = stopping_criterion(decode, 2, ["END"])
    texts = ["END" + "x" * 500, "END" + "x" * 497 + "END", "EN" + "x" * 498 + "END", "x" * 500 + "END"]
    rows = torch.tensor([list(text.encode()) for text in texts])
    assert is_done(rows, None).tolist() == [False, True, True, True]
    assert max(lengths) < 50
    assert is_done(rows[:, :5], None).tolist() == [False] * 4


def test_the_base_as_second_argument(run: Run, made: Path, tmp_path: Path) -> None:
    adapter, base = shutil.copytree(made / "adapter", tmp_path / "adapter"), made / "base"
    edit_config(adapter, base_model_name_or_path=None)
    out = ("--out", tmp_path / "out")
    for command in (
        ("generate", adapter, base, "--prompt", "w5", *SHORT),
        ("merge", adapter, base, *out),
        ("verify", tmp_path / "out", base),
        ("unmerge", tmp_path / "out", base, "--out", tmp_path / "restored"),
    ):
        result = run(*command)
        assert result.code == 0, result.err
        twice = run(*command, "--base", base)
        assert (twice.code, twice.out) == (2, "")
        assert twice.err == f"error: The base is given twice: {base} and --base {base}. Leave out one of the two.\n"


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


def test_merge_dequantises(run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Its layout for some processors wants larger layers than these.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(made / "base", quantization_config=how).save_pretrained(tmp_path / "base")
    arguments = ("merge", made / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    refused = run(*arguments)
    [line] = refused.err.splitlines()
    assert (refused.code, refused.out, line.startswith("error: ")) == (2, "", True)
    assert "quantised (bitsandbytes)" in line
    assert "--dequantize" in line
    assert not (tmp_path / "out").exists()
    assert told(run, *arguments, "--dequantize", "--verify")["dtype"] == "float32"
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with pytest.warns(UserWarning, match="another base"):
        unmerged = veneer.load(made / "adapter", base=tmp_path / "base")
    assert gap(logits(plain, inputs("llama")), logits(unmerged, inputs("llama"))) < 1e-5


def test_convert_pickle(run: Run, made: Path, tmp_path: Path) -> None:
    torch.save(load_file(made / "adapter" / WEIGHTS), tmp_path / "adapter_model.bin")
    result = run("convert-pickle", tmp_path)
    assert (result.code, result.out.strip()) == (0, str(tmp_path / WEIGHTS))
    assert run("convert-pickle", tmp_path).code == 2


def test_digest(run: Run, made: Path) -> None:
    digest = run("digest", made / "base").out.strip()
    assert digest == veneer.load(made / "base").base_digest
    assert run("digest", made / "base", "--full").out.startswith("sha256-full:")


def test_the_digest_of_an_adapter_is_that_of_the_store(run: Run, made: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    stored = asyncio.run(store.add(FolderSource(made / "adapter", links=False)))
    assert run("digest", "--adapter", made / "adapter").out.strip() == stored.adapter.digest


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.strip() == f"veneer {veneer.__version__}"
    for arguments in ([], ["--help"], ["-h"]):
        result = run(*arguments)
        assert (result.code, "convert-pickle" in result.out) == (0, True)
    for option in ("--help", "-h"):
        assert "--max-new-tokens" in run("generate", option).out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_both_names_of_help(run: Run, command: str) -> None:
    assert run(command, "-h").out == run(command, "--help").out != ""


def test_short_names_of_dtypes(run: Run, made: Path, tmp_path: Path) -> None:
    report = told(run, "merge", made / "adapter", "--out", tmp_path / "out", "--dtype", "bf16")
    assert report["dtype"] == "bfloat16"
    assert veneer.load(made / "adapter", dtype="fp16").dtype == torch.float16
    for name, dtype in (("half", torch.float16), ("float", torch.float32), ("fp32", torch.float32)):
        assert dtype_of(name) is dtype


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


def test_generate_merges_the_adapter_that_is_named(run: Run, made: Path) -> None:
    ask = ("generate", made / "set", "--prompt", "w5 w6", *SHORT)
    apart = {name: told(run, *ask, "--adapter", name)["answer"] for name in ("default", "other")}
    for name, answer in apart.items():
        found = told(run, *ask, "--adapter", name, "--merge")
        assert (found["answer"], found["adapters"]) == (answer, [name])
        assert found["load_report"]["merged"] is True
    assert len(set(apart.values())) == 2


def test_generate_without_an_adapter(run: Run, made: Path) -> None:
    model, alone = (
        told(run, "generate", made / path, "--prompt", "w5 w6", *SHORT, *options)["answer"]
        for path, options in (("base", ()), ("adapter", ("--adapter", "__base__")))
    )
    assert model == alone


def test_generate_tells_what_is_odd_on_standard_error(run: Run, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "adapter", tmp_path / "zero")
    edit_tensors(folder, lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()})
    result = run("generate", folder, "--prompt", "w5", *SHORT, "--json")
    assert result.code == 0
    json.loads(result.out)
    assert result.err.startswith("warning: ")
    assert "zero-effect adapter" in result.err


def test_a_merged_folder_is_a_plain_model(run: Run, made: Path, tmp_path: Path) -> None:
    report = told(run, "merge", made / "adapter", "--out", tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert report["files"] == sorted(path.name for path in out.iterdir())
    assert not any(name.startswith("adapter") for name in report["files"])
    found = told(run, "inspect", out)
    assert (found["kind"], found["problems"]) == ("model", [])
    answers = [told(run, "generate", path, "--prompt", "w5 w6", *SHORT)["answer"] for path in (out, made / "adapter")]
    assert answers[0] == answers[1]
    keys = load_file(out / "model.safetensors").keys()
    assert keys == load_file(made / "base" / "model.safetensors").keys()


def test_a_merge_into_a_linked_folder_keeps_the_link(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert run("merge", made / "adapter", "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()


def test_overwriting_leaves_nothing_of_the_old_model(run: Run, made: Path, tmp_path: Path) -> None:
    old = shutil.copytree(made / "base", tmp_path / "out")
    (old / "pytorch_model.bin").touch()
    assert run("merge", made / "adapter", "--out", old, "--overwrite").code == 0
    assert not (old / "pytorch_model.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_convert_pickle_to_a_named_place(run: Run, made: Path, tmp_path: Path) -> None:
    torch.save(load_file(made / "adapter" / WEIGHTS), tmp_path / "odd.bin")
    result = run("convert-pickle", tmp_path / "odd.bin", "--out", tmp_path / "x.safetensors")
    assert (result.code, result.out.strip(), result.err) == (0, str(tmp_path / "x.safetensors"), "")
    assert load_file(tmp_path / "x.safetensors").keys() == load_file(made / "adapter" / WEIGHTS).keys()


def test_an_adapter_once_converted_answers_the_same(run: Run, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "adapter", tmp_path / "old")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    refused = run("generate", folder, "--prompt", "w5 w6", *SHORT)
    assert refused.code == 2
    mend = refused.err.partition("If you trust it: veneer ")[2].split()
    assert run(*mend).code == 0
    answers = [
        told(run, "generate", path, "--prompt", "w5 w6", *SHORT)["answer"] for path in (folder, made / "adapter")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("veneer ins", ["plain,inspect"]),
        ("veneer generate --top", ["plain,--top-p", "plain,--top-k"]),
        ("veneer inspect ./ad", ["file,./ad"]),
        ("veneer merge adapter --base ./ad", ["file,./ad"]),
        ("veneer merge adapter --out ./ad", ["file,./ad"]),
    ],
)
def test_the_shell_completes_commands_and_options(line: str, completions: list[str]) -> None:
    words = line.split()
    environment = {
        **os.environ,
        **{"_VENEER_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    }
    command = [sys.executable, "-X", "importtime", "-m", "veneer"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == completions
    assert "| torch" not in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_the_completion_of_a_shell_is_shown(run: Run, shell: str) -> None:
    result = run("--show-completion", shell)
    assert (result.code, "_VENEER_COMPLETE" in result.out, f"{shell}_complete" in result.out) == (0, True, True)


def test_the_completion_is_that_of_the_shell_which_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("fish", "/usr/bin/fish"))
    assert run("--show-completion").out == run("--show-completion", "fish").out

    def detect() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr("shellingham.detect_shell", detect)
    for arguments, words in (([], "Name it: bash, zsh"), (["cmd"], "no completion for 'cmd'")):
        result = run("--show-completion", *arguments)
        assert (result.code, words in result.err) == (2, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_is_installed_once(
    run: Run, shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start_up = tmp_path / f".{shell}rc"
    start_up.write_text("alias a=b")
    results = [run("--install-completion", shell) for _ in range(2)]
    assert [result.code for result in results] == [0, 0]
    path = Path(results[0].out.split(": ")[1].strip())
    assert path.read_text() == run("--show-completion", shell).out.removesuffix("\n")
    lines = start_up.read_text().splitlines()
    assert lines[0] == "alias a=b"
    assert [str(path) in line for line in lines[1:]] == ([] if shell == "fish" else [True])


def test_an_installed_completion_works(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("--install-completion", "bash").code == 0
    (tmp_path / "veneer").write_text(f'#!/bin/sh\nexec {sys.executable} -m veneer "$@"\n')
    (tmp_path / "veneer").chmod(0o755)
    script = f". {tmp_path}/.bashrc; COMP_WORDS=(veneer insp) COMP_CWORD=1; _veneer_completion {tmp_path}/veneer; "
    result = subprocess.run(["bash", "-c", script + "echo $COMPREPLY"], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("inspect\n", "")


def test_an_unknown_profile_is_left_alone(run: Run) -> None:
    result = run("--install-completion", "powershell")
    assert (result.code, "veneer --show-completion powershell" in result.err) == (2, True)


@pytest.mark.parametrize("arguments", WITHOUT_TORCH)
def test_help_and_wrong_usage_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "veneer", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub", "safetensors"}


def test_inspection_is_quick(made: Path) -> None:
    """The work itself, without the start of Python, takes a small part of the 0.2 s that are promised."""
    started = time.process_time()
    veneer.inspect(made / "set")
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_that_knows_ascii_alone(made: Path, tmp_path: Path, options: list[str]) -> None:
    folder = shutil.copytree(made / "adapter", tmp_path / "naïve字")
    command = [sys.executable, "-m", "veneer", "inspect", str(folder), *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    result = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u5b57" in result.stdout
    assert result.stdout.isascii()


def test_inspect_of_neither_model_nor_adapter_exits_with_2(run: Run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--json")
    assert (result.code, json.loads(result.out)["kind"]) == (2, "unknown")
