"""What is saved is wholly there, wholly as before, or told: whatever cuts a save off, and whoever changes the set."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import build, inputs
from tests.random_adapters import config, enlarge
from veneer.adapters.adapter import Adapter
from veneer.checkpoints import checkpoint
from veneer.errors import IncompleteCheckpointError, SourceError

PROMPT: Any = inputs("llama")


class Killed(BaseException):
    """Stands for the end of a process: nothing that is left to do is done."""


def several(alphas: dict[str, int], seed: int) -> veneer.PeftModel:
    """A model with these adapters, name -> alpha; the last is active."""
    model: veneer.PeftModel | None = None
    for number, (name, alpha) in enumerate(alphas.items()):
        if model is None:
            model = veneer.get_peft_model(build("llama"), config("llama", lora_alpha=alpha), adapter_name=name)
        else:
            model.add_adapter(name, config("llama", lora_alpha=alpha))
        enlarge(model, name, seed + number)
    assert model is not None
    model.set_adapter(next(reversed(alphas)))
    return model.eval()


@torch.no_grad()
def answers(model: veneer.PeftModel) -> list[tuple[str, Tensor]]:
    """The active adapter's name, and what each answers."""
    found = [(",".join(model.active_adapters), model(**PROMPT).logits)]
    for name in sorted(model.peft_config):
        with model.using(name):
            found.append((name, model(**PROMPT).logits))
    return found


def same(one: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> bool:
    return [n for n, _ in one] == [n for n, _ in other] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True)
    )


def killed_at(step: int, save: Callable[[], None]) -> bool:
    """Save in a process of its own, which ends before the ``step``-th change of a name; whether it got that far."""
    pid = os.fork()
    if not pid:
        left = [step]

        def watch(event: str, args: tuple[Any, ...]) -> None:
            if event in ("os.rename", "os.remove"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(1)

        sys.addaudithook(watch)
        try:
            save()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


SETS = [
    pytest.param({"default": 4}, {"default": 64}, id="one"),
    pytest.param({}, {"default": 4, "french": 8}, id="a-new-set"),
    pytest.param({"default": 4}, {"default": 32, "french": 8}, id="one-becomes-a-set"),
    pytest.param({"default": 4, "french": 8}, {"default": 32, "french": 64}, id="a-set"),
    pytest.param({"default": 4, "french": 8}, {"default": 32}, id="one-of-a-set"),
    pytest.param({"french": 4}, {"french": 64}, id="one-with-a-name"),
]


@pytest.mark.parametrize(("before", "after"), SETS)
def test_a_save_that_is_cut_off_anywhere(before: dict[str, int], after: dict[str, int], tmp_path: Path) -> None:
    """It leaves the old, or the new, or what is refused; never a mixture."""
    new = several(after, seed=9)
    new.save_pretrained(tmp_path / "ready")  # and all is imported
    seen, step = set(), 0
    told = IncompleteCheckpointError if before else SourceError  # where nothing was, there may be nothing
    whole: list[list[tuple[str, Tensor]]] = []
    for which in ("before", "after"):
        if before:
            several(before, seed=1).save_pretrained(tmp_path / which)
        if which == "after":
            new.save_pretrained(tmp_path / which)
        if before or which == "after":
            whole.append(answers(veneer.load(tmp_path / which, base=build("llama"))))
    assert not before or not same(*whole)
    while True:
        folder = tmp_path / str(step)
        if before:
            several(before, seed=1).save_pretrained(folder)
        reached = killed_at(step, lambda folder=folder: new.save_pretrained(folder))  # type: ignore[misc]
        try:
            found = answers(veneer.load(folder, base=build("llama")))
            assert any(same(found, one) for one in whole), f"a mixture, when killed at step {step}"
            seen.add("new" if same(found, whole[-1]) else "old")
        except told:
            seen.add("told")
        if not reached:
            break
        step += 1
    assert step > 2
    assert {"told", "new"} <= seen
    assert same(answers(veneer.load(folder, base=build("llama"))), whole[-1])


def test_a_set_that_was_cut_off_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = several({"default": 4, "french": 8}, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **options: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            model.save_pretrained(tmp_path)
    with pytest.raises(IncompleteCheckpointError, match="saving the adapters here was cut off") as caught:
        veneer.load(tmp_path, base=build("llama"))
    assert "adapter_set.json" in (caught.value.hint or "")
    assert any("cut off" in problem.message for problem in veneer.inspect(tmp_path).problems)
    model.save_pretrained(tmp_path)
    assert list(veneer.load(tmp_path, base=build("llama")).peft_config) == ["default", "french"]


def test_a_failure_while_writing_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several({"default": 4, "french": 8}, seed=1).save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    new, save, done = several({"default": 8, "french": 4}, seed=5), checkpoint._save_tensors, []

    def fail(draft: Any, path: Path) -> None:
        save(draft, path)
        done.append(path)
        if len(done) == 2:
            raise SourceError("no room", hint="")

    monkeypatch.setattr(checkpoint, "_save_tensors", fail)
    with pytest.raises(SourceError, match="no room"):
        new.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_config_may_be_edited_by_hand(tmp_path: Path) -> None:
    several({"default": 4}, seed=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere", "inference_mode": False}
    path.write_text(json.dumps(values))
    assert veneer.load(tmp_path, base=build("llama")).peft_config["default"].base_model_name_or_path == "elsewhere"
    assert not (tmp_path / "adapter_set.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.rename_adapter("a", "c"),
        lambda model: model.delete_adapter("a"),
        lambda model: model.set_adapter("default"),
        lambda model: model.unload(),
    ],
    ids=["rename", "delete", "set", "unload"],
)
def test_saving_beside_a_thread_that_changes_the_set(
    change: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the set as it was before the other thread came, or after; here before."""
    model = several({"default": 4, "a": 8}, seed=1)
    before = answers(model)
    named = Adapter.named_tensors
    jobs: list[Any] = []
    with ThreadPoolExecutor(1) as pool:

        def meet(*args: Any) -> Any:
            if not jobs:
                jobs.append(pool.submit(change, model))
                time.sleep(0.05)
            return named(*args)

        monkeypatch.setattr(Adapter, "named_tensors", meet)
        model.save_pretrained(tmp_path)
        jobs[0].result()
    assert same(answers(veneer.load(tmp_path, base=build("llama"))), before)


def test_the_set_of_a_copy_has_a_lock_of_its_own() -> None:
    model = several({"default": 4}, seed=1)
    again = pickle.loads(pickle.dumps(model))
    with model.adapters.active_selection.choosing, ThreadPoolExecutor(1) as pool:
        pool.submit(again.rename_adapter, "default", "other").result(timeout=10)
    assert list(again.peft_config) == ["other"]


def test_embeddings_that_cannot_be_found_are_told(tmp_path: Path) -> None:
    model: Any = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(target_modules=["0"]))
    with pytest.warns(veneer.VeneerWarning, match=r"Could not identify embedding layer\(s\)"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)


def test_another_revision_of_the_base_is_told() -> None:
    config = veneer.LoraConfig(target_modules=["0"], revision="v1")
    with pytest.warns(
        veneer.VeneerWarning, match="already set base model revision to v1, overwriting with revision v2"
    ):
        model = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, revision="v2")
    assert (model.peft_config["default"].revision, config.revision) == ("v2", "v1")


def test_a_tensor_that_is_a_flat_shard_is_told(tmp_path: Path) -> None:
    model: Any = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(target_modules=["0"]))
    model.base_model.model[0].lora_A["default"].weight.data = torch.zeros(32)
    with pytest.warns(veneer.VeneerWarning, match=r"1 tensors.*FSDP shards.*lora_A.weight is \(32,\), not \(8, 4\)"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
