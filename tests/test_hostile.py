"""A checkpoint that means harm, or is merely broken: nothing of it runs, and each fault is an error of Veneer's."""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import veneer
from tests.models import build
from tests.random_adapters import CONFIG, WEIGHTS, adapted, edit_config, saved, saved_base
from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.checkpoints.model_class import class_for
from veneer.files.adapter_folders import expert_source
from veneer.files.atomic_write import atomic_write
from veneer.files.convert_pickle import convert_pickle
from veneer.files.resolve import resolve
from veneer.files.safetensors_header import read_header
from veneer.files.source import Source
from veneer.merging.verify import _ids

LONG = "n" * 300


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    folder = saved(tmp_path / "adapter")
    edit_config(folder, base_model_name_or_path=str(base))
    return folder


def problems(path: Path) -> dict[str, str]:
    """Code -> message of what ``inspect`` finds wrong."""
    return {problem.code: problem.message for problem in veneer.inspect(path).problems}


# -- code ----------------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code of a checkpoint would write. Who is asked whether to run it says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "canary"


def with_code(folder: Path, canary: Path, name: str, **auto_map: Any) -> Path:
    """Let ``name`` in a folder ask for a module there."""
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nX = object\n")
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {"tokenizer_class": "X"}
    path.write_text(json.dumps({**values, "auto_map": auto_map}))
    return folder


def test_a_tokenizers_code_is_not_run(adapter: Path, base: Path, canary: Path) -> None:
    for folder in (adapter, base):
        with_code(folder, canary, "tokenizer_config.json", AutoTokenizer=["evil.X", "evil.X"])
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(veneer.CorruptFileError, match=r"custom code.*is not run"):
            veneer.load_tokenizer(veneer.load(adapter), **options)
    assert not canary.exists()


def test_a_bases_tokenizer_may_run_code_when_it_is_trusted(adapter: Path, base: Path, canary: Path) -> None:
    with_code(base, canary, "tokenizer_config.json", AutoTokenizer=["evil.X", "evil.X"])
    model = veneer.load(adapter)
    with pytest.raises(veneer.CorruptFileError, match="custom code"):
        veneer.load_tokenizer(model)
    assert not canary.exists()
    with pytest.raises(veneer.CorruptFileError):  # its class is no tokenizer
        veneer.load_tokenizer(model, trust_remote_code=True)
    assert canary.exists()


def test_no_code_is_run_to_compare_answers(tmp_path: Path, canary: Path) -> None:
    folder = with_code(tmp_path / "m", canary, "tokenizer_config.json", AutoTokenizer=["evil.X", "evil.X"])
    with pytest.raises(veneer.VeneerError, match="its tokenizer cannot be used"):
        _ids(folder, 64, ["a"])
    assert not canary.exists()


def test_no_code_is_run_to_start_a_prompt(tmp_path: Path, canary: Path) -> None:
    folder = with_code(tmp_path / "t", canary, "tokenizer_config.json", AutoTokenizer=["evil.X", "evil.X"])
    config = veneer.PromptTuningConfig(
        num_virtual_tokens=2,
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a b",
        tokenizer_name_or_path=str(folder),
        tokenizer_kwargs={"trust_remote_code": True},
    )
    with pytest.raises(veneer.ConfigError, match="tokenizer_name_or_path"):
        veneer.get_peft_model(build("llama"), config)
    assert not canary.exists()


def test_the_config_of_a_bases_part_is_not_asked_about(tmp_path: Path, canary: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(vision_config={"model_type": "clip_vision_model", **vision}).to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    # transformers has no model for a config of this type alone, and would ask about the one that comes with it.
    code = {"auto_map": {"AutoModel": "evil.X"}, "_name_or_path": str(tmp_path / "base")}
    config["text_config"] = {"model_type": "blip_text_model", **code}
    with_code(tmp_path / "base", canary, "tokenizer_config.json")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(veneer.BaseModelError, match="execute"):
        veneer.load(tmp_path / "base")
    assert not canary.exists()


def test_the_question_comes_back_when_the_last_block_ends() -> None:
    from transformers import dynamic_module_utils as asking

    before, inside, leave = asking.TIME_OUT_REMOTE_CODE, threading.Event(), threading.Event()

    def read() -> None:
        with transformers_errors_as(veneer.ConfigError, "", ""):
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=read)
    other.start()
    inside.wait(10)
    with transformers_errors_as(veneer.ConfigError, "", ""):
        pass
    assert asking.TIME_OUT_REMOTE_CODE == 0
    leave.set()
    other.join()
    assert before == asking.TIME_OUT_REMOTE_CODE > 0


def test_a_failure_in_rust_is_the_inputs() -> None:
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(veneer.ConfigError, match="reading: oh no"),
        transformers_errors_as(veneer.ConfigError, "reading", ""),
    ):
        raise panic("oh no")
    with pytest.raises(KeyboardInterrupt), transformers_errors_as(veneer.ConfigError, "reading", ""):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["pipeline", "__version__", "AutoModelForCausalLM", "Trainer", "logging"])
def test_only_a_models_class_is_taken_for_one(name: str) -> None:
    here = Source(Path(), "here")
    assert class_for(here, {"architectures": [name]}, (), None) is transformers.AutoModel


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LONG, "\ud800", "a\0b", "~nobody-here", "\x1b]0;owned\x07", "(" * 5000])
def test_a_base_of_an_impossible_name(name: str, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, base_model_name_or_path=name)
    assert "base-not-found" in problems(adapter)
    for use in (veneer.load, lambda path: veneer.merge(path, out=tmp_path / "out")):
        with pytest.raises(veneer.BaseModelError, match="was not found") as caught:
            use(adapter)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [LONG, "\ud800", "a\x1bb"])
def test_a_shard_of_an_impossible_name(name: str, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert "missing-shard" in problems(adapter)
    with pytest.raises(veneer.IncompleteCheckpointError, match="1 of 1 shards"):
        veneer.load(adapter)


@pytest.mark.parametrize("use", [veneer.inspect, veneer.load, convert_pickle])
@pytest.mark.parametrize("name", [LONG, "\ud800", "a/" + LONG])
def test_a_path_that_cannot_be(use: Callable[[str], Any], name: str) -> None:
    with pytest.raises(veneer.PathNotFoundError):
        use(name)


def test_a_subfolder_that_cannot_be(adapter: Path) -> None:
    with pytest.raises(veneer.PathNotFoundError, match="no subfolder"):
        veneer.load(adapter, subfolder=LONG)


def test_the_base_beside_the_adapter_comes_first(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "here" / "base", adapter / "base"):
        saved_base(place)
    edit_config(adapter, base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path / "here")
    model: Any = veneer.load(adapter)
    assert Path(model.get_base_model().name_or_path) == (adapter / "base").resolve()
    veneer.merge(adapter, out=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["base"]["origin"] == str(adapter / "base")


# -- configs -------------------------------------------------------------------------------------------------


def xlora(folder: Path, adapters: Any) -> Path:
    classifier = {"base_model.internal_xlora_classifier.layers.0.weight": torch.ones(8, 32)}
    save_file(classifier, folder / WEIGHTS, metadata={"format": "pt"})
    values = json.loads((folder / CONFIG).read_text())
    kept = {key: values[key] for key in ("task_type", "base_model_name_or_path")}
    (folder / CONFIG).write_text(json.dumps({**kept, "peft_type": "XLORA", "hidden_size": 32, "adapters": adapters}))
    return folder


def test_adapters_that_mix_themselves(adapter: Path) -> None:
    with pytest.raises(veneer.UnsupportedError, match="to be mixed as '0', mixes adapters itself"):
        veneer.load(xlora(adapter, {"0": str(adapter)}))


@pytest.mark.parametrize("adapters", [["x"], "x", 3, {"a": 3}, {"a": LONG}, {"\ud800": "x"}, {"a": "\ud800"}])
def test_adapters_to_mix_that_cannot_be(adapters: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # some of these could be a repository's name
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.load(xlora(adapter, adapters))
    assert str(caught.value).isprintable()
    veneer.inspect(adapter)


def test_experts_beside_the_adapter_come_first(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "here" / "one", adapter / "one"):
        saved(place)
    monkeypatch.chdir(tmp_path / "here")
    assert expert_source("a", 0, "one", resolve(adapter)).root == adapter / "one"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arrow_config", {"(": 1}),
        ("rank_pattern", [1]),
        ("rank_pattern", {"(": 2}),
        ("loftq_config", 3),
        ("target_modules", "(" * 5000),
        ("layers_pattern", {"x": {"y": 1}}),
        ("r", 10**400),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_problem(key: str, value: Any, adapter: Path) -> None:
    edit_config(adapter, **{key: value})
    named = key.removesuffix("_config")
    assert named in problems(adapter)["config"].casefold()
    with pytest.raises(veneer.ConfigError, match=f"(?i){named}"):
        veneer.load(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [("text_config", "x"), ("head_dim", {"(": 1}), ("id2label", -1), ("architectures", ["__version__"])],
)
def test_a_base_of_odd_values_is_merged_or_refused(
    key: str, value: Any, adapter: Path, base: Path, tmp_path: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value}))
    veneer.inspect(base)
    for use in (veneer.load, lambda path: veneer.merge(path, out=tmp_path / "out")):
        with contextlib.suppress(veneer.VeneerError):
            use(adapter)


def test_json_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / CONFIG).open("wb") as file:
        file.truncate(1 << 30)  # takes no room
    assert "too many" in problems(tmp_path)["damaged"]


# -- weights -------------------------------------------------------------------------------------------------


def reshaped(adapter: Path, header: Callable[[bytes], bytes]) -> Path:
    """Write an adapter's weights with another header, the data where they were aligned."""
    raw = (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    made = header(raw[8 : 8 + length].rstrip())
    made += b" " * (-len(made) % 8 if not made.startswith(b"\xff") else 0)
    (adapter / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + length :])
    return adapter


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a mark before it": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "minus nought": lambda text: text.replace(b"[0,", b"[-0,", 1),
    "half a character": lambda text: text.replace(b'"format"', b'"\\ud800"', 1),
    "no number": lambda text: text.replace(b'"dtype"', b'"more":NaN,"dtype"', 1),
    "too deep": lambda text: text.replace(b'"dtype"', b'"more":' + b"[" * 200 + b"]" * 200 + b',"dtype"', 1),
}


@pytest.mark.parametrize("what", HEADERS)
def test_what_passes_here_opens_there(what: str, adapter: Path) -> None:
    reshaped(adapter, HEADERS[what])
    with pytest.raises(SafetensorError):
        safe_open(adapter / WEIGHTS, "pt").__enter__()
    with pytest.raises(veneer.CorruptFileError, match="header"):
        read_header(adapter / WEIGHTS)
    assert "header" in problems(adapter)["damaged"]


def test_a_header_begins_with_its_brace(adapter: Path) -> None:
    reshaped(adapter, lambda text: b" " + text)  # the format says so, whoever reads it all the same
    with pytest.raises(veneer.CorruptFileError, match="does not begin with a brace"):
        veneer.load(adapter)


def test_a_shape_that_only_nought_makes_small(tmp_path: Path) -> None:
    described = {"x": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}
    text = json.dumps(described).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x.safetensors", "pt").__enter__()
    with pytest.raises(veneer.CorruptFileError, match="no computer holds"):
        read_header(tmp_path / "x.safetensors")


def sharded(folder: Path, stem: str, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """Write a checkpoint's weights in two shards, and change what is in the second and what the index says."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    names = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    second = {max(tensors): tensors.pop(max(tensors))}
    index = {**dict.fromkeys(tensors, names[0]), **dict.fromkeys(second, names[1])}
    second["first"] = tensors[min(tensors)]
    change(second, index)
    second.pop("first", None)
    for name, own in zip(names, (tensors, second), strict=True):
        save_file(own, folder / name, metadata={"format": "pt"})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def twice(second: dict[str, Any], index: dict[str, str]) -> None:
    second[min(index)] = torch.zeros_like(second["first"])


def elsewhere(second: dict[str, Any], index: dict[str, str]) -> None:
    index[min(index)] = index[max(index)]


def unnamed(second: dict[str, Any], index: dict[str, str]) -> None:
    del index[min(index)]


def invented(second: dict[str, Any], index: dict[str, str]) -> None:
    index["x"] = index[min(index)]


CONTRADICTIONS = {twice: "is in two files", elsewhere: "and it is in", unnamed: "nowhere", invented: "in no file"}


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_shards_of_an_adapter_that_contradict_each_other(change: Any, adapter: Path) -> None:
    sharded(adapter, "adapter_model", change)
    assert CONTRADICTIONS[change] in problems(adapter)["shards"]
    with pytest.raises(veneer.CorruptFileError, match=CONTRADICTIONS[change]):
        veneer.load(adapter)


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_shards_of_a_base_that_contradict_each_other(change: Any, adapter: Path, base: Path, tmp_path: Path) -> None:
    sharded(base, "model", change)
    assert CONTRADICTIONS[change] in problems(base)["shards"]
    with pytest.raises(veneer.CorruptFileError, match=CONTRADICTIONS[change]):
        veneer.merge(adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_in_order_are_read(adapter: Path, base: Path) -> None:
    for folder, stem in ((adapter, "adapter_model"), (base, "model")):
        sharded(folder, stem, lambda second, index: None)
    assert "shards" not in problems(adapter) | problems(base)
    assert veneer.load(adapter).active_adapters == ["default"]


# -- writing -------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_TO_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [FULL, FULL_TO_SAFETENSORS], ids=["system", "safetensors"])
def test_a_full_disk(error: Exception, tmp_path: Path) -> None:
    refused = pytest.raises(veneer.SourceError, match="cannot be written: No space left on device")
    with refused as caught, atomic_write(tmp_path / "deep" / "er" / "x"):
        raise error
    assert str(caught.value.hint).startswith("Make room")
    assert not list(tmp_path.iterdir())


def test_what_is_no_refusal_of_the_system_passes(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_write(tmp_path / "deep" / "x"):
        raise KeyError
    with pytest.raises(veneer.PathNotFoundError, match="other"), atomic_write(tmp_path / "x"):
        raise veneer.PathNotFoundError("other")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "adapter_set.json"])
def test_a_folder_in_a_files_place(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(veneer.SourceError, match=f"{name} cannot be written: Is a directory"):
        adapted().save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("out", ["file", "file/below", LONG, LONG + "/below"])
def test_every_writer_tells_what_cannot_be_written(out: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    target = tmp_path / out
    (tmp_path / "file").write_text("")
    tuned = tmp_path / "tuned"
    veneer.merge(adapter, out=tuned)
    pickle = tmp_path / "adapter_model.bin"
    torch.save({"x": torch.ones(1)}, pickle)
    writers: list[Callable[[], Any]] = [
        lambda: veneer.convert_to_lora(adapter, out=target),
        lambda: veneer.combine(adapter, out=target),
        lambda: veneer.extract(tuned, base, out=target, rank=2),
        lambda: veneer.merge(adapter, out=target),
        lambda: veneer.unmerge(tuned, out=target, base=base),
        lambda: convert_pickle(pickle, target / "x.safetensors"),
        lambda: veneer.load(adapter).save_pretrained(target),
        lambda: veneer.load(base).save_pretrained(target),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for write in writers:
        with pytest.raises(veneer.VeneerError):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from veneer.benching.report.files import check

    (tmp_path / "file").write_text("")
    for name in ("file", "file/below", LONG):
        with pytest.raises(veneer.SourceError):
            check(tmp_path / name)
