"""A run on tiny models of every kind: what is measured, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.models import build
from tests.random_adapters import enlarge
from veneer.benching.inputs import find_inputs
from veneer.benching.measure.fidelity import fidelity, outputs
from veneer.benching.measure.fresh_process import LOADS, Request, in_fresh_process, load_and_answer
from veneer.benching.measure.machine import device_of
from veneer.benching.measure.models_compared import ModelsCompared, load_models
from veneer.benching.measure.progress import Progress
from veneer.benching.report.markdown import markdown
from veneer.benching.run import bench
from veneer.errors import (
    BaseModelError,
    ConfigError,
    MergeError,
    PathNotFoundError,
    SourceError,
    UnsupportedError,
    VeneerError,
)

Folder = Callable[[str], Path]
SHORT: dict[str, Any] = {"batch": (1, 3), "new_tokens": 3, "repeats": 2}


def quantities(report: veneer.BenchReport) -> set[tuple[str, str]]:
    return {(figure.quantity, figure.variant) for figure in report.figures}


@pytest.mark.parametrize(
    ("arch", "kind", "lengths"),
    [
        ("llama", "causal", (8,)),
        ("gpt2", "causal", (8,)),
        ("t5", "seq2seq", (8,)),
        ("whisper", "seq2seq", ()),
        ("bert", "forward", (8,)),
        ("vit", "forward", ()),
    ],
)
def test_every_kind_of_model(folder: Folder, no_processes: list[Request], arch: str, kind: str, lengths: Any) -> None:
    place = folder(arch)
    report = bench(place / "a", base=place / "base", adapters=[place / "b"], prompt_tokens=lengths or None, **SHORT)
    assert (report.setup.kind, report.setup.lengths) == (kind, lengths)
    assert [(a.name, a.method) for a in report.setup.adapters] == [("a", "LORA"), ("b", "LORA")]
    timed = ("forward",) if kind == "forward" else ("first", "decode")
    variants = ("base", "merged", "resident", "unmerged", "switching")
    wanted = {(q, v) for q in timed for v in (*variants, "mixed")} | {("keep", "resident")}
    assert wanted <= quantities(report)
    for figure in report.figures:
        assert all(value > 0 for value in figure.samples)
        if (figure.quantity, figure.variant) in wanted - {("keep", "resident")}:
            assert len(figure.samples) == 2
            assert figure.length in (8, None)
    assert {f.batch for f in report.figures if f.variant == "mixed"} == {3}
    assert [request.variant for request in no_processes] == [*LOADS, *LOADS[1:], LOADS[0]]
    assert (no_processes[0].rows, no_processes[-1].rows) == (3, 1)
    for one in report.fidelity:
        assert one.drift < 1e-4
        assert one.agreement == 1
        assert one.same_texts == (None if kind == "forward" else one.prompts)
    assert veneer.BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_sizes_in_memory(folder: Folder, no_processes: list[Request]) -> None:
    place = folder("llama")
    report = bench(place / "a", base=place / "base", **SHORT | {"batch": (1,), "prompt_tokens": (4,)})
    assert not {v for _, v in quantities(report)} & {"switching", "mixed"}
    base, merged, kept, own = (report.find("weights", v) for v in ("base", "merged", "kept", "adapter a"))
    assert base is not None
    assert merged is not None
    assert kept is not None
    assert own is not None
    assert base.samples == merged.samples
    # q_proj, v_proj and down_proj of both layers: 32 x 32, 16 x 32 and 32 x 48, in float32.
    assert kept.samples == (2 * 4 * (32 * 32 + 16 * 32 + 32 * 48),)
    assert own.samples == (2 * 4 * 4 * (64 + 48 + 80),)
    disk = report.find("disk", "base")
    assert disk is not None
    assert disk.samples == ((place / "base" / "model.safetensors").stat().st_size,)


def taken(place: Path, dtype: Any = "float32", prompts: Path | None = None) -> ModelsCompared:
    inventory = find_inputs(place / "a", place / "base", [place / "b"])
    how: dict[str, Any] = {"dtype": dtype, "device": torch.device("cpu"), "local_files_only": True}
    return load_models(inventory, inventory.adapters, prompts=prompts, **how)


def test_the_three_models_are_what_they_are_called(folder: Folder) -> None:
    found = taken(folder("llama"))
    row = found.questions[0]
    plain = {
        name: outputs(model, row)[0]
        for name, model in vars(found).items()
        if name in ("base", "merged", "resident", "single")
    }
    assert not torch.allclose(plain["base"], plain["single"], atol=1e-2)
    torch.testing.assert_close(plain["merged"], plain["single"], atol=1e-4, rtol=1e-4)
    assert torch.equal(plain["merged"], plain["resident"])
    with torch.inference_mode(), found.several.using("a"):
        torch.testing.assert_close(outputs(found.several, row)[0], plain["single"])
    shared = {id(p) for p in found.base.parameters()}
    assert sum(id(p) in shared for p in found.merged.parameters()) == len(shared) - 6


def test_fidelity_sees_the_rounding_of_a_merge(folder: Folder) -> None:
    exact, rounded = (fidelity(taken(folder("llama"), dtype), "a", 4) for dtype in ("float32", "bfloat16"))
    assert exact.drift < 1e-5
    assert 1e-4 < rounded.drift < 0.5
    assert 0 < rounded.share_of_effect < 0.5
    assert rounded.positions > 8 * 32


def test_loading_in_a_fresh_process(folder: Folder) -> None:
    place = folder("llama")
    adapters = (("a", str(place / "a")), ("b", str(place / "b")))
    requests = {
        variant: Request(
            variant, str(place / "base"), adapters, "CAUSAL_LM", "LlamaForCausalLM", "auto", "cpu", 2, 4, 2
        )
        for variant in LOADS
    }
    found = {variant: load_and_answer(request) for variant, request in requests.items()}
    assert {variant for variant in LOADS if "attach" in found[variant]} == {"unmerged"}
    fresh = in_fresh_process(requests["unmerged"])
    assert fresh.keys() == found["unmerged"].keys()
    assert all(value > 0 for value in fresh.values())
    assert fresh["peak"] >= fresh["serving"]


def test_a_fresh_process_that_fails_says_why(folder: Folder, tmp_path: Path) -> None:
    request = Request("base", str(tmp_path / "gone"), (("a", "a"),), None, "LlamaForCausalLM", "auto", "cpu", 1, 1, 2)
    with pytest.raises(VeneerError, match=r"fresh process.*PathNotFoundError.*gone"):
        in_fresh_process(request)


def test_progress_is_told(folder: Folder, no_processes: list[Request]) -> None:
    place, told = folder("llama"), list[Progress]()
    bench(place / "a", base=place / "base", prompt_tokens=(4,), **SHORT, on_progress=told.append)
    assert told[0].text == "loading"
    assert any("round 2 of 2" in progress.text for progress in told)
    assert all(progress.left is not None and progress.left > 0 for progress in told[2:])
    assert told[-1].text.startswith("loading in a fresh process, 2 of 2")


def test_which_adapters(folder: Folder, tmp_path: Path) -> None:
    place = folder("llama")
    model = veneer.load(place / "a", base=place / "base", adapter_name="x")
    model.load_adapter(place / "b", adapter_name="y")
    enlarge(model, "x")
    model.save_pretrained(tmp_path / "set")
    names = lambda *arguments: [a.name for a in find_inputs(*arguments).adapters]  # noqa: E731
    assert names(tmp_path / "set", None, []) == ["x", "y"]
    assert names(tmp_path / "set", None, ["y"]) == ["y"]
    assert names(tmp_path / "set", None, [place / "a"]) == ["x", "y", "a"]
    assert names(place / "base", None, [place / "a", place / "b", place / "a"]) == ["a", "b", "a-2"]
    with pytest.raises(ConfigError, match="without adapters"):
        find_inputs(place / "base", None, [])
    with pytest.raises(BaseModelError, match="takes no base"):
        find_inputs(place / "base", place / "base", [place / "a"])
    with pytest.raises(PathNotFoundError):
        find_inputs(place / "a", None, ["nothing/here/at-all"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": ()}, "batch must be at least 1"),
        ({"batch": (0, 1)}, "batch must be at least 1"),
        ({"prompt_tokens": (0,)}, "prompt_tokens must be at least 1"),
        ({"prompt_tokens": (63,)}, "Ask for at most 61"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"new_tokens": 64, "prompt_tokens": (1,)}, "fewer --new-tokens"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"memory": 0}, "memory must be at least 1"),
        ({"requests_per_change": float("nan")}, "requests_per_change must be at least 1"),
        ({"in_flight": 0}, "in_flight must be at least 1"),
        ({"traffic": {"b": 1}}, "none of the adapters"),
        ({"device": "cuda:7"}, "cannot be used"),
        ({"device": "meta"}, "computes nothing"),
        ({"dtype": "int8"}, "Unknown dtype"),
    ],
)
def test_options_that_make_no_sense(folder: Folder, no_processes: list[Request], options: Any, words: str) -> None:
    place = folder("llama")
    with pytest.raises(ConfigError, match=words):
        bench(place / "a", base=place / "base", **{**SHORT, **options})
    assert not no_processes


def test_what_cannot_be_merged_is_refused_before_anything_is_measured(
    folder: Folder, tmp_path: Path, no_processes: list[Request]
) -> None:
    place, told = folder("llama"), list[Progress]()
    prompt = veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    veneer.get_peft_model(build("llama"), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(MergeError, match=r"prompt.*no weight could hold it"):
        bench(place / "a", base=place / "base", adapters=[tmp_path / "prompt"], **SHORT, on_progress=told.append)
    assert [progress.text for progress in told] == ["loading"]


@pytest.mark.parametrize("error", [RuntimeError("not enough memory\nat line 5"), VeneerError("not enough memory")])
def test_a_size_that_does_not_run_is_named(
    folder: Folder, no_processes: list[Request], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: Any, model: Any, inputs: Any, *arguments: Any, **choice: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            raise error
        return {"first": 1.0, "decode": 1.0}

    monkeypatch.setattr("veneer.benching.measure.workloads.Workload.run", fail)
    place = folder("llama")
    with pytest.raises(UnsupportedError, match=r"base alone, 3 x 4\. .*not enough memory Leave out large --batch"):
        bench(place / "a", base=place / "base", prompt_tokens=(4,), **SHORT)


def test_a_load_that_fails_is_noted_and_loses_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Request) -> dict[str, float]:
        raise VeneerError("it was killed")

    monkeypatch.setattr("veneer.benching.run.in_fresh_process", fail)
    place = folder("llama")
    report = bench(place / "a", base=place / "base", prompt_tokens=(4,), **SHORT)
    assert "not measured" in report.notes[0]
    assert "it was killed" in report.notes[0]
    assert report.find("load", "base") is None
    assert report.recommendation.plans[0].memory > 0
    assert "it was killed" in markdown(report)


def test_prompts(folder: Folder, tmp_path: Path, made_up: Path) -> None:
    place = folder("llama")
    with pytest.raises(SourceError, match="cannot be read"):
        taken(place, prompts=tmp_path / "gone.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    with pytest.raises(SourceError, match="are empty"):
        taken(place, prompts=empty)
    with pytest.raises(SourceError, match="No tokenizer"):
        taken(place, prompts=made_up)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="no UTF-8 text"):
        taken(place, prompts=tmp_path / "bytes")


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A file with two prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("w5 w6 w7\n\nw8 w9\n")
    return file


def test_the_device_is_tried() -> None:
    assert device_of(None) == torch.device("cpu")
