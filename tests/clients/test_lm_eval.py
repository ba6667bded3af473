"""Adapters in lm-eval's harness: a model, ``peft=`` in Python and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import peft
import pytest
import transformers as tf
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.clients import conftest
from tests.clients.world import base_model, save_adapter

AsRecorded = Callable[[Any], None]
ROOT = Path(__file__).parents[2]
TASK = """task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/data.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["w1", "w2"]
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of multiple choices."""
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps([{"question": f"w{i} w7 w9", "answer": i % 2} for i in range(6)]))
    (folder / "tiny.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


def evaluated(model: Any, task: Path) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(task), include_defaults=False)
    whole = lm_eval.simple_evaluate(
        model=model, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    samples = whole["samples"]["tiny"]
    return {
        "accuracy": whole["results"]["tiny"]["acc,none"],
        "likelihoods": [float(choice[0][0]) for sample in samples for choice in sample["resps"]],
    }


def test_an_adapter_by_its_folder(base: Path, adapter: Path, task: Path, as_recorded: AsRecorded) -> None:
    model = HFLM(pretrained=str(base), peft=str(adapter), device="cpu", batch_size=2, dtype="float32")
    as_recorded({"class": type(model.model).__name__, **evaluated(model, task)})


def test_a_model_with_an_adapter(base: Path, adapter: Path, task: Path, as_recorded: AsRecorded) -> None:
    model = peft.PeftModel.from_pretrained(base_model(base), adapter)
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    as_recorded(evaluated(HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=2), task))


def test_the_command_line(base: Path, adapter: Path, task: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    before = [] if conftest.RECORDING else ["-m", "veneer.as_peft"]
    command = [sys.executable, "-W", "ignore", *before, "-m", "lm_eval"]
    command += ["--model", "hf", "--model_args", f"pretrained={base},peft={adapter},dtype=float32"]
    command += ["--tasks", "tiny", "--include_path", str(task), "--device", "cpu", "--batch_size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    as_recorded({"accuracy": results["results"]["tiny"]["acc,none"]})
