"""Keywords of public calls: none is swallowed, and those that other tools pass are taken."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, config, edit_tensors, saved, saved_base
from veneer.errors import ConfigError, UnknownKeywordError, UnsupportedError
from veneer.files.lookup_options import LookupOptions
from veneer.files.resolve import resolve

SLIP = "is_trainble"
# Their keywords are the base model's.
OF_THE_BASE = {"forward", "generate", "kind"}


def _public_functions() -> list[str]:
    return [name for name in veneer.__all__ if inspect.isfunction(getattr(veneer, name))]


def _classes() -> list[str]:
    return [name for name in veneer.__all__ if name.endswith("Config") and name != "PeftConfig"]


def _methods(kind: type) -> list[str]:
    own = set(dir(kind)) - set(dir(torch.nn.Module)) - OF_THE_BASE
    return sorted(name for name in own if not name.startswith("_") and inspect.isroutine(getattr(kind, name)))


def _required(call: Callable[..., Any]) -> dict[str, Any]:
    """A value for each argument that a call needs."""
    parameters = inspect.signature(call).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: None for p in needed if p.name != "self"}


@pytest.fixture(scope="module")
def model() -> veneer.PeftModel:
    return adapted()


@pytest.mark.parametrize("name", _public_functions())
def test_no_function_swallows_a_slip(name: str, tmp_path: Path) -> None:
    call = getattr(veneer, name)
    given = _required(call)
    if name == "load":
        given = {"path": saved(tmp_path / "a"), "base": saved_base(tmp_path / "base")}
    if name == "convert_to_lora":
        given = {"source": adapted(), "out": tmp_path / "out"}
    if name == "create_loraplus_optimizer":
        given["optimizer_cls"] = torch.optim.AdamW
    with pytest.raises(UnknownKeywordError, match=rf"^{name}\(\).* does not take {SLIP}="):
        call(**given, **{SLIP: True})


@pytest.mark.parametrize("name", _methods(veneer.PeftModel))
def test_no_method_swallows_a_slip(name: str, model: veneer.PeftModel) -> None:
    given = _required(getattr(model, name)) | ({"repo_id": "a/b"} if name == "push_to_hub" else {})
    with pytest.raises(UnknownKeywordError, match=rf"^\w+.{name.replace('_layers', 's')}\(\) does not take {SLIP}="):
        getattr(model, name)(**given, **{SLIP: True})


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_no_auto_class_swallows_a_slip(name: str, tmp_path: Path) -> None:
    adapter, base = saved(tmp_path / "a"), saved_base(tmp_path / "base")
    with pytest.raises(UnknownKeywordError, match="Did you mean is_trainable="):
        getattr(veneer, name).from_pretrained(adapter, base=base, **{SLIP: True})


@pytest.mark.parametrize("name", _classes())
def test_no_config_swallows_a_slip(name: str) -> None:
    with pytest.raises(UnknownKeywordError, match=rf"^{name}\(\) does not take peft_typo="):
        getattr(veneer, name)(peft_typo=1)


@pytest.mark.parametrize("name", _methods(veneer.PeftConfig))
def test_no_config_call_swallows_a_slip(name: str, tmp_path: Path) -> None:
    own = veneer.LoraConfig()
    # The options of two are those of the class that they make.
    kind = "LoraConfig" if name in ("check_kwargs", "from_peft_type") else f"PeftConfig.{name}"
    with pytest.raises(UnknownKeywordError, match=rf"{kind}\(\) does not take {SLIP}="):
        getattr(own, name)(**_required(getattr(own, name)), **{SLIP: True})


def test_it_is_a_type_error_that_names_the_nearest(tmp_path: Path) -> None:
    model, adapter = adapted(), saved(tmp_path)
    with pytest.raises(TypeError, match=r"load_adapter\(\) does not take is_trainble=\. Did you mean is_trainable=\?"):
        model.load_adapter(adapter, "b", is_trainble=True)  # type: ignore[call-arg]
    assert list(model.peft_config) == ["default"]
    with pytest.raises(UnknownKeywordError, match=r"LoraConfig\(\) does not take rank=.*It takes .*r, lora_alpha"):
        veneer.LoraConfig(rank=8)  # type: ignore[call-arg]


SETTLED = [
    {"torch_dtype": torch.float16},
    {"dtype": "float16"},
    {"device_map": "auto"},
    {"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}, "offload_folder": "nowhere", "offload_dir": "nowhere"},
    {"torch_device": "cpu", "low_cpu_mem_usage": True, "ephemeral_gpu_offload": False},
    {"cache_dir": None, "use_auth_token": None, "local_files_only": True, "subfolder": None, "revision": None},
    {"key_mapping": {}, "ignore_mismatched_sizes": False, "autocast_adapter_dtype": False},
]


@pytest.mark.parametrize("given", SETTLED, ids=lambda given: next(iter(given)))
def test_what_scripts_pass_changes_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    adapter, batch = saved(tmp_path), inputs("llama")
    expected = logits(adapted(), batch)
    model = veneer.PeftModel.from_pretrained(build("llama"), adapter, **given)
    assert torch.equal(logits(model, batch), expected)
    model.load_adapter(adapter, "other", **given)
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (peft.get_peft_model, veneer.get_peft_model),
        (peft.PeftModel.from_pretrained, veneer.PeftModel.from_pretrained),
        (peft.PeftModel.load_adapter, veneer.PeftModel.load_adapter),
        (peft.PeftModel.add_adapter, veneer.PeftModel.add_adapter),
        (peft.LoraModel.add_weighted_adapter, veneer.PeftModel.add_weighted_adapter),
        (peft.LoraModel.merge_and_unload, veneer.PeftModel.merge_and_unload),
        (peft.LoraModel.merge_adapter, veneer.PeftModel.merge_adapter),
        (peft.LoraModel.set_adapter, veneer.PeftModel.set_adapter),
    ],
    ids=lambda call: call.__qualname__,
)
def test_pefts_keywords_are_known(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Each is in the signature, or named by the list of what the call takes."""
    names = {n for n, p in inspect.signature(theirs).parameters.items() if p.kind is not p.VAR_KEYWORD} - {"self"}
    with pytest.raises(UnknownKeywordError) as caught:
        ours(zzz=1)
    told = set(re.findall(r"\w+", caught.value.hint or ""))
    assert names <= told


def test_a_new_adapter_has_the_dtype_that_is_asked_for() -> None:
    def dtypes(**options: Any) -> set[torch.dtype]:
        model = veneer.get_peft_model(build("llama").bfloat16(), config(), **options)
        return {p.dtype for p in model.adapters.parameters("default")}

    assert dtypes() == {torch.float32}
    assert dtypes(autocast_adapter_dtype=False, low_cpu_mem_usage=True, revision=None) == {torch.bfloat16}
    model = veneer.get_peft_model(build("llama"), config(), revision="v2")
    assert model.peft_config["default"].revision == "v2"
    model.add_adapter("vera", veneer.VeraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert "vera" in model.peft_config


def test_a_key_mapping_renames_keys_as_pefts_does(tmp_path: Path) -> None:
    adapter, batch = saved(tmp_path), inputs("llama")
    expected = logits(adapted(), batch)
    mapping = {"^model.layers": "model.blocks", "model": "never"}
    back = {r"^model\.blocks": "model.layers"}
    edit_tensors(adapter, lambda t: {k.replace("model.layers", "model.blocks"): v for k, v in t.items()})
    theirs = peft.PeftModel.from_pretrained(build("llama"), str(adapter), key_mapping=back)
    ours = veneer.PeftModel.from_pretrained(build("llama"), adapter, key_mapping=back)
    assert gap(logits(ours, batch), logits(theirs.eval(), batch)) < 1e-5
    assert torch.equal(logits(ours, batch), expected)
    with pytest.raises(veneer.BindError):
        veneer.PeftModel.from_pretrained(build("llama"), adapter, key_mapping=mapping)
    with pytest.raises(ConfigError, match="no regular expression"):
        ours.load_adapter(adapter, "b", key_mapping={"(": ""})
    with pytest.raises(ConfigError, match="to several tensors"):
        ours.load_adapter(adapter, "b", key_mapping={r"layers\.\d|blocks\.\d": "layers.0"})
    report = ours.load_adapter(saved(tmp_path / "plain"), "b", key_mapping={"nothing": ""})
    assert "key_mapping fits none of the checkpoint's keys." in report.notes


def test_ignoring_mismatched_sizes_uses_what_fits(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    other: Any = build("llama")
    other.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 30)
    with pytest.raises(veneer.BindError):
        veneer.PeftModel.from_pretrained(other, adapter)
    with pytest.warns(UserWarning, match="What fits is used"):
        model = veneer.PeftModel.from_pretrained(other, adapter, ignore_mismatched_sizes=True)
    assert model.load_report is not None
    assert model.load_report.adapters[0].tensors_bound > 0


def test_the_cache_is_the_one_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options)
        return str(saved(tmp_path / "snapshot"))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("owner/name", LookupOptions(cache_dir=tmp_path / "cache", force_download=True))
    assert [one["cache_dir"] for one in asked] == [tmp_path / "cache"] * 2
    assert asked[-1]["force_download"]
    veneer.PeftModel.from_pretrained(build("llama"), "owner/name", cache_dir=str(tmp_path / "cache"))
    veneer.PeftConfig.from_pretrained("owner/name", cache_dir="elsewhere", use_auth_token="t")
    assert asked[-1]["cache_dir"] == "elsewhere"


@pytest.mark.parametrize("call", [veneer.load, veneer.AutoPeftModelForCausalLM.from_pretrained])
def test_torch_dtype_is_another_name_of_dtype(call: Any, tmp_path: Path) -> None:
    adapter, base = saved(tmp_path / "a"), saved_base(tmp_path / "base")
    assert call(adapter, base=base, torch_dtype=torch.bfloat16).dtype is torch.bfloat16
    assert call(adapter, base=base, torch_dtype="bfloat16", dtype=torch.bfloat16).dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="two names of one thing"):
        call(adapter, base=base, torch_dtype=torch.bfloat16, dtype="float16")


def test_torch_dtype_is_a_merges_dtype_too(tmp_path: Path) -> None:
    adapter, base = saved(tmp_path / "a"), saved_base(tmp_path / "base")
    veneer.merge(adapter, base, out=tmp_path / "out", torch_dtype=torch.bfloat16)  # type: ignore[call-arg]
    assert veneer.load(tmp_path / "out").dtype is torch.bfloat16


@pytest.mark.parametrize("given", [{"dtype": "float16"}, {"torch_dtype": torch.float16}, {"device_map": "cpu"}])
def test_how_a_base_is_built_says_nothing_of_one_in_memory(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnknownKeywordError, match=r"load\(\) with a base in memory does not take (dtype|device_map)="):
        veneer.load(saved(tmp_path), base=build("llama"), **given)


def test_a_config_and_a_name_by_position_as_pefts_auto_classes_take_them(tmp_path: Path) -> None:
    adapter, base = saved(tmp_path / "a"), saved_base(tmp_path / "base")
    own = veneer.PeftConfig.from_pretrained(adapter)
    assert isinstance(own, veneer.LoraConfig)
    own.lora_alpha = 2
    model = veneer.AutoPeftModelForCausalLM.from_pretrained(adapter, "mine", True, config=own, base=base)
    assert model.active_adapters == ["mine"]
    assert model.peft_config["mine"].lora_alpha == 2  # type: ignore[attr-defined]
    again = veneer.AutoPeftModel.from_pretrained(pretrained_model_name_or_path=adapter, base=base)  # type: ignore[call-arg]
    assert again.active_adapters == ["default"]


def test_saving_takes_what_accelerate_passes_and_refuses_the_rest(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="5GB", push_to_hub=False)
    with pytest.raises(UnsupportedError, match="without uploading"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    with pytest.raises(UnknownKeywordError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "b", selected_adapter=["default"])
    assert not (tmp_path / "b").exists()


def test_options_of_a_svd_that_change_nothing_are_taken(tmp_path: Path) -> None:
    model = adapted()
    model.add_weighted_adapter(["default"], [1.0], "w", svd_rank=2, svd_full_matrices=False, svd_driver="gesvd")
    with pytest.raises(UnsupportedError, match="svd_clamp"):
        model.add_weighted_adapter(["default"], [1.0], "v", svd_clamp=0.9)
