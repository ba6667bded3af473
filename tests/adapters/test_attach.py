"""What makes attaching cheap changes nothing: tensors used where they lie, plans kept, modules made lean."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from tests.models import build, inputs, logits
from tests.random_adapters import WEIGHTS, adapted, saved
from veneer.checkpoints.binding_plan import PLANS
from veneer.errors import BindError, CorruptFileError
from veneer.files.mapped_tensors import read_mapped
from veneer.files.safetensors_header import read_header
from veneer.layers.parameter_holder import ParameterHolder


def write(path: Path, parts: list[tuple[str, str, list[int], bytes]], pad: int = 0) -> Path:
    """A safetensors file by hand, its header ``pad`` bytes longer than it need be."""
    header, end = {}, 0
    for name, dtype, shape, data in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in parts))
    return path


@pytest.mark.parametrize("pad", [0, 1])
def test_tensors_of_any_alignment_have_the_file_s_values(tmp_path: Path, pad: int) -> None:
    values = torch.tensor([[1.5, -2.0], [3.25, 4.0]])
    parts = [
        ("a", "F32", [2, 2], values.numpy().tobytes()),
        ("b", "U8", [3], bytes([1, 2, 3])),
        ("none", "F32", [0, 2], b""),
        ("c", "F16", [2], values[0].half().numpy().tobytes()),
    ]
    found = read_mapped(read_header(write(tmp_path / "x.safetensors", parts, pad)), {"a", "b", "c", "none"})
    assert torch.equal(found["a"], values)
    assert found["b"].tolist() == [1, 2, 3]
    assert found["none"].shape == (0, 2)
    assert torch.equal(found["c"], values[0].half())


def test_a_mapped_tensor_is_its_own_and_the_file_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", [("a", "F32", [2], bytes(8)), ("b", "F32", [2], bytes(8))])
    before = path.read_bytes()
    found = read_mapped(read_header(path), {"a", "b"})
    found["a"].add_(1)
    assert found["a"]._version == 1
    assert found["b"]._version == 0
    assert found["b"].tolist() == [0, 0]
    assert path.read_bytes() == before


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", [("a", "F32", [2], bytes(8))])
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptFileError, match="cannot be mapped"):
        read_mapped(header, {"a"})


def test_a_header_seen_before_is_still_checked_against_its_own_file(tmp_path: Path) -> None:
    parts = [("a", "F32", [2], bytes(8))]
    read_header(write(tmp_path / "x.safetensors", parts))
    short = write(tmp_path / "y.safetensors", parts)
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"y\.safetensors is damaged: truncated"):
        read_header(short)


def test_adapters_alike_share_a_plan_and_nothing_else(tmp_path: Path) -> None:
    batch, folders = inputs("llama"), [saved(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    alone = [logits(veneer.PeftModel.from_pretrained(build("llama"), folder), batch) for folder in folders]
    model = veneer.PeftModel.from_pretrained(build("llama"), folders[0], "a")
    model.load_adapter(folders[1], "b")
    assert len(PLANS[model.adapters.catalog]) == 1
    for name, expected in zip("ab", alone, strict=True):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), expected)
    model.delete_adapter("a")
    assert torch.equal(logits(model, batch), alone[1])


def test_another_config_and_a_changed_base_get_plans_of_their_own(tmp_path: Path) -> None:
    batch, folder = inputs("llama"), saved(tmp_path / "a")
    other = saved(tmp_path / "b", lora_alpha=64)
    model = veneer.PeftModel.from_pretrained(build("llama"), folder, "a")
    model.load_adapter(other, "b")
    model.set_adapter("b")
    assert torch.equal(logits(model, batch), logits(veneer.PeftModel.from_pretrained(build("llama"), other), batch))
    layer = next(iter(model.adapters.layers.values()))
    weight = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(torch.zeros(weight.shape[0] + 1, weight.shape[1]))
    with pytest.raises(BindError):
        model.load_adapter(folder, "c")


def test_a_layer_without_a_change_is_found_beside_those_with_one(tmp_path: Path) -> None:
    model = adapted()
    first, second, third = list(model.adapters.layers.values())[:3]
    with torch.no_grad():
        first.lora_B["default"].weight.zero_()
        # Its sum is zero, and it is not.
        second.lora_B["default"].weight.zero_()[0, :2] = torch.tensor([1.0, -1.0])
        third.lora_A["default"].weight.zero_()
    model.save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert model.load_report is not None
    assert model.load_report.adapters[0].zero_layers == [first.site.name, third.site.name]


def test_a_leaf_is_a_whole_module() -> None:
    leaf = ParameterHolder(training=False)
    leaf._parameters["weight"] = nn.Parameter(torch.ones(2))
    seen: list[str] = []
    leaf.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    assert list(leaf.state_dict()) == ["weight"]
    assert seen == ["saved"]
    assert not ParameterHolder(training=False)._state_dict_hooks
    assert [name for name, _ in leaf.named_modules()] == [""]
    assert leaf.double().weight.dtype is torch.float64
    assert leaf.train().training
    twin = copy.deepcopy(leaf)
    assert torch.equal(twin.weight, leaf.weight)
    assert twin.weight is not leaf.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = leaf.nothing


def test_a_loaded_adapter_is_saved_over_the_file_that_it_lies_in(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = (folder / WEIGHTS).read_bytes()
    batch, model = inputs("llama"), veneer.PeftModel.from_pretrained(build("llama"), folder)
    model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    again = veneer.PeftModel.from_pretrained(build("llama"), folder)
    assert torch.equal(logits(model, batch), logits(again, batch))


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_a_container_cannot_be_saved_whole(container: type[nn.Module]) -> None:
    base = nn.Module()
    base.lin = nn.Linear(3, 3)
    layer = nn.Linear(3, 3)
    base.held = nn.ModuleDict({"a": layer}) if container is nn.ModuleDict else nn.ModuleList([layer])
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["lin"], modules_to_save=["held"]))
