"""``veneer.train`` and ``veneer train``: what is learnt, checkpoints, resuming, several processes, and bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import veneer
from tests.models import VOCAB, build
from tests.random_adapters import CONFIG, WEIGHTS, edit_config, same_bits
from veneer.cli import main

Written = Callable[..., Path]
QUICK: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 4, "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("train") / "base"
    model: Any = build("llama")
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    chat = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **ends).save_pretrained(folder)
    return folder


@pytest.fixture
def data(written: Written) -> Path:
    return written([{"prompt": f"w{i} w{i + 1}", "completion": " w7 w8 </s>"} for i in range(16)])


def messages(number: int) -> dict[str, Any]:
    roles = (("user", f"w{number}"), ("assistant", "w7 w8"), ("user", "w9"), ("assistant", "w10"))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def test_it_learns(base: Path, data: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    report = veneer.train(
        data,
        base,
        out=tmp_path / "out",
        validation_split=0.25,
        epochs=10,
        logging_steps=5,
        on_step=steps.append,
        **{**QUICK, "learning_rate": 3e-2, "r": 16, "target_modules": "all-linear"},
    )
    assert (report.examples, report.validation_examples, report.steps, report.epochs) == (12, 4, 30, 10.0)
    assert report.eval_loss is not None
    assert report.eval_loss < 1.5  # a guess has 4.6
    assert steps[:3] == ["checking the data", "loading", "step 0 of 30"]
    assert steps[3].startswith("step 3 of 30, eval_loss ")
    assert any(step.startswith("step 5 of 30, loss ") for step in steps)
    model = veneer.load(tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    assert model.peft_config["default"].lora_alpha == 32  # type: ignore[attr-defined]
    tokens = veneer.load_tokenizer(model)("w20 w21", return_tensors="pt")
    assert model(**tokens).logits[0, -1].argmax() == 4 + 7
    with model.disable_adapter():
        assert model(**tokens).logits[0, -1].argmax() != 4 + 7
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None" not in card
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-27", "checkpoint-30"]


def test_a_run_that_is_resumed_ends_as_one_that_was_not(base: Path, data: Path, tmp_path: Path) -> None:
    whole = veneer.train(data, base, out=tmp_path / "whole", max_steps=8, save_steps=4, **QUICK)
    cut = tmp_path / "cut"
    veneer.train(data, base, out=cut, max_steps=8, save_steps=4, **QUICK)
    shutil.rmtree(cut / "checkpoint-8")
    (cut / "checkpoint-9").mkdir()  # one that was being written
    for path in cut.glob("adapter_*"):
        path.unlink()
    again = veneer.train(data, base, out=cut, max_steps=8, save_steps=4, resume=True, **QUICK)
    assert same_bits(*(load_file(folder / WEIGHTS) for folder in (cut, tmp_path / "whole")))
    assert whole.steps == again.steps == 8
    ended = veneer.train(data, base, out=cut, max_steps=8, save_steps=4, resume=True, **QUICK)
    assert (ended.steps, ended.train_loss) == (8, None)


@pytest.mark.parametrize("loss", ["answers", "all"])
def test_conversations(base: Path, written: Written, tmp_path: Path, loss: str) -> None:
    conversations = written([messages(i) for i in range(4)])
    report = veneer.train(conversations, base, out=tmp_path / "out", loss=loss, epochs=1, **QUICK)
    assert (report.examples, report.steps) == (4, 2 if loss == "answers" else 1)
    assert report.train_loss is not None
    assert report.train_loss > 0


def test_texts_that_are_cut(base: Path, written: Written, tmp_path: Path) -> None:
    texts = written([{"text": "w5 " * length} for length in (3, 20)])
    report = veneer.train(texts, base, out=tmp_path / "out", max_steps=1, max_length=10, **QUICK)
    assert report.cut_examples == 1
    assert "1 of 2 examples reach 10 tokens" in str(report._warnings())
    longest = veneer.train(written([{"text": "w5 " * 90}]), base, out=tmp_path / "longest", max_steps=1, **QUICK)
    assert (longest.max_length, longest.cut_examples) == (64, 1)


def test_methods_and_configs(base: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / CONFIG
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["k_proj"], "use_rslora": True}))
    some = {"max_steps": 1, "gradient_checkpointing": True, "dtype": "bf16"}
    for out, options in (
        ("default", {}),
        ("ia3", {"method": "ia3"}),
        ("loha", {"method": "loha", "r": 2, "alpha": 3, "target_modules": ["q_proj"]}),
        ("file", {"config": config}),
        ("object", {"config": veneer.LoraConfig(r=3, target_modules=["v_proj"])}),
    ):
        veneer.train(data, base, out=tmp_path / out, **some, **options)
    veneer.train(data, base, out=tmp_path / "again", config=tmp_path / "object", **some)
    trained_b = [tensor for key, tensor in load_file(tmp_path / "again" / WEIGHTS).items() if "lora_B" in key]
    assert all(tensor.any() for tensor in trained_b)
    assert trained_b
    trained = {
        out: veneer.PeftConfig.from_pretrained(tmp_path / out) for out in ("default", "ia3", "loha", "file", "object")
    }
    assert [str(config.task_type) for config in trained.values()] == ["CAUSAL_LM"] * 5
    wanted = {"default": (16, 32), "loha": (2, 3), "file": (2, 8), "object": (3, 8)}
    alphas = {name: getattr(trained[name], "lora_alpha", getattr(trained[name], "alpha", None)) for name in wanted}
    assert {name: (trained[name].r, alphas[name]) for name in wanted} == wanted  # type: ignore[attr-defined]
    assert trained["file"].use_rslora  # type: ignore[attr-defined]
    assert len(trained["default"].target_modules) > 4  # type: ignore[attr-defined]


def test_a_start_that_was_taken_off_is_converted(base: Path, data: Path, tmp_path: Path) -> None:
    config = veneer.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    veneer.train(data, base, out=tmp_path / "out", config=config, max_steps=2, save_steps=1)
    last = veneer.PeftConfig.from_pretrained(tmp_path / "out" / "checkpoint-2")
    whole = veneer.PeftConfig.from_pretrained(tmp_path / "out")
    assert [(c.r, c.init_lora_weights) for c in (last, whole)] == [(2, "pissa"), (4, True)]  # type: ignore[attr-defined]


def test_a_prompt(base: Path, data: Path, tmp_path: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    (tmp_path / "prompt.json").write_text(json.dumps(config))
    report = veneer.train(data, base, out=tmp_path / "out", config=tmp_path / "prompt.json", epochs=1)
    assert report.parameters == 3 * 32


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_the_command(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ("train", data, "--base", base, "--out", out, "--steps", "2", "--lr", "1e-2", "--r", "4")
    targets = ("--target-modules", "q_proj,v_proj", "--validation", data, "--logging-steps", "1")
    code, shown, told = run(*command, *targets, capsys=capsys)
    assert code == 0, told
    assert "training report" in shown
    assert f"veneer generate {out} {base} --prompt Hello" in shown
    assert "step 2 of 2, loss " in told
    assert main(["generate", str(out), str(base), "--prompt", "w5", "--max-new-tokens", "2"]) == 0
    code, shown, told = run(*command, *targets, "--overwrite", "--json", capsys=capsys)
    report = json.loads(shown)
    assert (code, report["steps"], report["parameters"]) == (0, 2, report["parameters"])
    assert report["next_commands"][1] == f"veneer merge {out} {base} --out {out}-merged"
    call = veneer.train(data, base, out=tmp_path / "call", max_steps=2, validation=data, **{**QUICK, "alpha": 8})
    assert same_bits(*(load_file(folder / WEIGHTS) for folder in (out, tmp_path / "call")))
    assert call.eval_loss == pytest.approx(report["eval_loss"])


def test_an_interruption(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.finetuning import trl_run

    out = tmp_path / "out"
    command = ("train", data, base, "--out", out, "--steps", "3", "--save-steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(trl_run._Trainer, "save_model", interrupted_at(trl_run._Trainer.save_model, out / "checkpoint-2"))
        code, shown, told = run(*command, capsys=capsys)
    assert (code, shown) == (130, "")
    assert told.splitlines()[-2:] == ["The same command with --resume goes on from the last checkpoint.", "interrupted"]
    assert run(*command, "--resume", capsys=capsys)[0] == 0


def interrupted_at(save: Callable[..., None], folder: Path) -> Callable[..., None]:
    def save_model(trainer: Any, output_dir: str, *more: Any, **options: Any) -> None:
        if output_dir == str(folder):
            raise KeyboardInterrupt
        save(trainer, output_dir, *more, **options)

    return save_model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "is not empty. Go on from its last checkpoint by --resume"),
        (["--out", "{base}", "--overwrite"], "holds no adapter; it is not replaced"),
        (["--out", "{data}/x"], "cannot be written"),
        (["--out", "new", "--resume"], "no whole checkpoint"),
        (["--resume", "--overwrite"], "either resumed or overwritten"),
        (["--out", "new", "--base", "{out}"], "is an adapter"),
        (["--out", "new", "--base", "nowhere/at/all"], "does not exist"),
        (["{base}", "--out", "new"], "The base is given twice"),
        (["--out", "new", "--method", "lorra"], "Did you mean 'LORA'"),
        (["--out", "new", "--method", "ia3", "--r", "4"], "The method ia3 has no r"),
        (["--out", "new", "--config", "{out}", "--r", "4"], "A config is given, and r beside it"),
        (["--out", "new", "--config", "{data}"], "no valid JSON"),
        (["--out", "new", "--target-modules", "query"], "query"),
        (["--out", "new", "--target-modules", "lm_head"], "TRL refuses to train"),
        (["--out", "new", "--loss", "some"], "loss is 'some'"),
        (["--out", "new", "--lr", "0"], "learning_rate must be over 0"),
        (["--out", "new", "--lr", "nan"], "learning_rate must be over 0"),
        (["--out", "new", "--steps", "0"], "max_steps must be at least 1"),
        (["--out", "new", "--epochs", "1", "--steps", "1"], "both given"),
        (["--out", "new", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--out", "new", "--validation-split", "1"], "between 0 and 1"),
        (["--out", "new", "--validation-split", "0.1", "--validation", "{data}"], "Leave out one of the two"),
        (["--out", "new", "--validation", "nowhere"], "nowhere cannot be read"),
        (["--out", "new", "--dtype", "int8"], "Unknown dtype"),
        (["--out", "new", "--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_bad_input(
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    (out / "checkpoint-3").mkdir(parents=True)
    (out / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (out / CONFIG).write_text('{"peft_type": "LORA"}')
    given = [argument.format(base=base, data=data, out=out) for argument in arguments]
    code, shown, told = run("train", data, "--base", base, "--out", out, *given, capsys=capsys)
    assert (code, shown) == (2, "")
    [line] = [line for line in told.splitlines() if line not in ("checking the data", "loading")]
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "new").exists()
    assert (out / "checkpoint-3" / "trainer_state.json").read_text() == "{}"


def test_messages_without_a_template(base: Path, written: Written, tmp_path: Path) -> None:
    plain = shutil.copytree(base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(veneer.ConfigError, match="has no chat template"):
        veneer.train(written([messages(1)]), plain, out=tmp_path / "out")


def test_a_tokenizer_that_knows_no_end(base: Path, data: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(base, tmp_path / "odd")
    config = json.loads((odd / "tokenizer_config.json").read_text())
    (odd / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    with pytest.raises(veneer.ConfigError, match="has no eos_token"):
        veneer.train(data, odd, out=tmp_path / "out")


def test_a_template_that_fails(base: Path, written: Written, tmp_path: Path) -> None:
    odd = shutil.copytree(base, tmp_path / "odd")
    (odd / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(veneer.ConfigError, match="TRL refuses to train: no such role"):
        veneer.train(written([messages(1)]), odd, out=tmp_path / "out")


def test_tokens_that_the_base_does_not_know(base: Path, written: Written, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    odd = shutil.copytree(base, tmp_path / "odd")
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer.add_tokens(["more1", "more2"])
    tokenizer.save_pretrained(odd)
    with pytest.raises(veneer.ConfigError, match=f"the token {VOCAB + 1}, and the base knows {VOCAB}"):
        veneer.train(written([{"text": "w5 more2"}]), odd, out=tmp_path / "out")
    veneer.train(written([{"text": "w5 w6"}]), odd, out=tmp_path / "out", max_steps=1)


def test_a_model_that_is_no_causal_one(data: Path, base: Path, tmp_path: Path) -> None:
    model: Any = build("t5")
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(veneer.BaseModelError, match="is no causal language model"):
        veneer.train(data, tmp_path / "t5", out=tmp_path / "out")


def test_an_older_run_is_overwritten(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    veneer.train(data, base, out=out, max_steps=3, **QUICK)
    edit_config(out, r=99)
    veneer.train(data, base, out=out, max_steps=2, overwrite=True, **QUICK)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((out / CONFIG).read_text())["r"] == 4


def test_two_processes(base: Path, data: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
    ]
    command = [*launch, "-m", "veneer", "train", str(data), "--base", str(base), "--out", str(tmp_path / "out")]
    options = ["--steps", "2", "--batch-size", "2", "--json", "--logging-steps", "1", "--validation", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    assert done.stderr.count("step 1 of 2, loss") == 1
    assert (tmp_path / "out" / WEIGHTS).is_file()
    more = [*command, *options, "--steps", "3", "--resume"]
    resumed = subprocess.run(more, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(resumed.stdout)["steps"] == 3
    refused = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert refused.stderr.count("error: ") == 1
    assert refused.returncode != 0


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("import peft", "UnsupportedError: peft itself is imported already"),
        ("from trl import SFTTrainer", "UnsupportedError: TRL's trainer was imported before"),
        ("import trl, transformers.utils; assert not transformers.utils.is_peft_available()", ""),
    ],
)
def test_what_was_imported_before(base: Path, data: Path, tmp_path: Path, before: str, words: str) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "peft.py").write_text("")
    arguments = f"{str(data)!r}, {str(base)!r}, out={str(tmp_path / 'out')!r}, max_steps=1"
    code = f"{before}; import veneer; veneer.train({arguments})"
    path = [*([str(tmp_path / "with")] if before == "import peft" else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": ":".join(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == bool(words), done.stderr
    assert words in done.stderr
    assert "FutureWarning" not in done.stderr


def test_the_page(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    [examples] = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    Path("data.jsonl").write_text(examples * 6)
    for command in re.findall(r"^\$ veneer (.*)$", page, re.MULTILINE):
        assert main(shlex.split(command)) == 0, command
    namespace: dict[str, Any] = {"veneer": veneer}
    [python] = re.findall(r"^report = .*?(?=^```$)", page, re.MULTILINE | re.DOTALL)
    exec(python, namespace)
    assert Path("from-python", WEIGHTS).is_file()
