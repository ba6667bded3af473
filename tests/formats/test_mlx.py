"""MLX-LM's format there and back: the change of each weight, read by an independent reading, is the adapter's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.families import CONFIGS, family, saved_family
from tests.formats.mlx_reading import mlx_changes
from tests.formats.same_changes import assert_same
from tests.models import build
from tests.random_adapters import edit_config, edit_tensors, enlarge, saved
from veneer.errors import (
    BaseModelError,
    BindError,
    CorruptFileError,
    IncompleteCheckpointError,
    UnsupportedError,
    UsageError,
)
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.mlx import MlxFormat
from veneer.formats.mlx_names import FAMILIES

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
MIXED: dict[str, Any] = {
    "rank_pattern": {"k_proj": 2, "down_proj": 40},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 5, "o_proj": 3},
}


def adapter_of(folder: Path, model_type: str, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """A saved adapter on a model of a kind."""
    chosen = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ATTENTION, **options}
    model = veneer.get_peft_model(family(model_type, **(config or {})), veneer.LoraConfig(**chosen), seed=1)
    enlarge(model, "default")
    model.save_pretrained(folder)
    return folder


def weight_changes(adapter: Path, base: Path) -> dict[str, Tensor]:
    """Parameter -> its change, by merging into the base in float64."""
    model = veneer.load(adapter, base=base)
    before = {name: p.detach().double().clone() for name, p in model.get_base_model().named_parameters()}
    plain = {name.replace(".base_layer", ""): value for name, value in before.items() if "lora" not in name}
    merged = model.merge_and_unload()
    after = {name: p.detach().double() for name, p in merged.named_parameters()}
    changes = {name: after[name] - plain[name] for name in after if name in plain}
    return {name.removesuffix(".weight"): change for name, change in changes.items() if change.any()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 0, "alpha_pattern": {"v_proj": 4}},
        MIXED,
        {**MIXED, "use_rslora": True},
        {"r": 50, "target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    ],
    ids=["plain", "alpha-0", "mixed", "rslora", "rank-above-in"],
)
def test_the_change_is_the_adapters(tmp_path: Path, options: dict[str, Any]) -> None:
    base = saved_family(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", "llama", **options)
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    changes = {name: change for name, change in mlx_changes(tmp_path / "mlx").items() if change.any()}
    assert_same(changes, weight_changes(adapter, base))


@pytest.mark.parametrize("options", [{}, MIXED, {**MIXED, "use_rslora": True}, {"use_dora": True}])
def test_the_way_back_restores_the_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    base = saved_family(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", "llama", **options)
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    files = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "back")]
    assert files[0] == files[1]
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back")]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][key]) or options.get("use_rslora") or "alpha_pattern" in options
        torch.testing.assert_close(tensor, tensors[1][key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe", "granitemoe", "phimoe"])
def test_fused_experts_and_routers(tmp_path: Path, model_type: str) -> None:
    base = saved_family(tmp_path / "base", model_type)
    names = [name for name, _ in family(model_type).named_parameters()]
    experts = sorted({name.split(".", 3)[3] for name in names if name.endswith(("gate_up_proj", "down_proj"))})
    router = next(name for name in names if name.endswith(("gate.weight", "router.weight")))
    adapter = adapter_of(
        tmp_path / "adapter",
        model_type,
        target_modules=["q_proj"],
        target_parameters=[*experts, router.split(".", 3)[3]],
        rank_pattern={"gate_up_proj": 3, "q_proj": 2},
    )
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    changes = mlx_changes(tmp_path / "mlx")
    swapped = model_type == "gpt_oss"
    for name, change in weight_changes(adapter, base).items():
        change = change.mT if swapped and change.ndim == 3 else change
        block = name.rpartition(".mlp" if ".mlp" in name else ".block")[0]
        if name.endswith("gate_up_proj"):
            gate, up = (
                next(v for k, v in changes.items() if k.startswith(block) and k.endswith(end))
                for end in (".gate_proj", ".up_proj")
            )
            halves = (change[:, 0::2], change[:, 1::2]) if swapped else change.chunk(2, 1)
            torch.testing.assert_close(gate, halves[0], rtol=1e-4, atol=2e-6)
            torch.testing.assert_close(up, halves[1], rtol=1e-4, atol=2e-6)
        elif name.endswith("down_proj"):
            down = next(v for k, v in changes.items() if k.startswith(block) and k.endswith(".down_proj"))
            torch.testing.assert_close(down, change, rtol=1e-4, atol=2e-6)
    facts = veneer.inspect(tmp_path / "mlx").adapter
    assert facts is not None
    assert (facts.format, facts.ranks, facts.alpha) == ("MLX-LM", {4: 10}, 6)
    assert sum("gate_proj" in name for name in changes) == 2
    assert len(changes) == 2 * 5
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))


def test_halves_of_experts_that_were_trained_apart(tmp_path: Path) -> None:
    """MLX trains gate and up with an A each, or only one of them."""
    base = saved_family(tmp_path / "base", "qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    sizes = {"gate_proj": (40, 32), "up_proj": (40, 32), "down_proj": (32, 40)}
    for layer, names in ((0, ("gate_proj", "up_proj", "down_proj")), (1, ("up_proj",))):
        for name in names:
            out, inner = sizes[name]
            module = f"model.layers.{layer}.mlp.switch_mlp.{name}"
            tensors[f"{module}.lora_a"] = torch.randn(4, 3, inner, generator=generator)
            tensors[f"{module}.lora_b"] = torch.randn(4, out, 3, generator=generator)
    folder = mlx_folder(tmp_path / "mlx", tensors, rank=3, scale=0.5)
    expected = mlx_changes(folder)
    veneer.convert(folder, tmp_path / "peft", base=base)
    changes = weight_changes(tmp_path / "peft", base)
    nothing = torch.zeros(4, 40, 32)
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp"
        gate, up = (expected.get(f"{prefix}.switch_mlp.{name}", nothing) for name in ("gate_proj", "up_proj"))
        both = changes[f"{prefix}.experts.gate_up_proj"]
        torch.testing.assert_close(both, torch.cat([gate, up], 1).double(), rtol=1e-4, atol=2e-6)
    down = changes["model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(down, expected["model.layers.0.mlp.switch_mlp.down_proj"], rtol=1e-4, atol=2e-6)


def mlx_folder(folder: Path, tensors: dict[str, Tensor], rank: int = 2, scale: float = 2.0, **config: Any) -> Path:
    """An adapter as MLX-LM saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapters.safetensors")
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, **config.pop("lora_parameters", {})}
    values = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def query(rank: int = 2, layer: int = 0) -> dict[str, Tensor]:
    """The factors of one layer."""
    generator = torch.Generator().manual_seed(3)
    module = f"model.layers.{layer}.self_attn.k_proj"
    return {
        f"{module}.lora_a": torch.randn(32, rank, generator=generator),
        f"{module}.lora_b": torch.randn(rank, 16, generator=generator),
    }


def test_the_worked_example(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    a, b = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]]), torch.tensor([[1.0, 0, 1, 2], [0, 1, 1, 0]])
    folder = mlx_folder(tmp_path / "mlx", {f"{module}.lora_a": a, f"{module}.lora_b": b})
    veneer.convert(folder, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    expected = torch.tensor([[2.0, 0, 4, 0], [0, 2, 0, 6], [2, 2, 4, 6], [4, 0, 8, 0]])
    assert torch.equal(2.0 * up @ down, expected)


def test_names_in_each_layer_where_all_readers_can_know_them(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "llama")
    for number, (targets, expected) in enumerate(
        [
            (["q_proj", "up_proj"], (2, ["mlp.up_proj", "self_attn.q_proj"])),
            (r".*\.1\.self_attn\.q_proj", (1, ["self_attn.q_proj"])),
            (r".*\.0\.self_attn\.q_proj", (-1, ["model.layers.0.self_attn.q_proj"])),
            (["q_proj", "lm_head"], (-1, ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))])),
        ]
    ):
        adapter = adapter_of(tmp_path / f"adapter-{number}", "llama", target_modules=targets)
        veneer.convert(adapter, tmp_path / f"mlx-{number}", to="mlx", base=base)
        config = json.loads((tmp_path / f"mlx-{number}" / "adapter_config.json").read_text())
        assert (config["num_layers"], sorted(config["lora_parameters"]["keys"])) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding(tmp_path: Path, tied: bool) -> None:
    base = saved_family(tmp_path / "base", "llama", tie_word_embeddings=tied)
    targets = ["embed_tokens", "q_proj"]
    adapter = adapter_of(tmp_path / "adapter", "llama", {"tie_word_embeddings": tied}, target_modules=targets)
    if tied:
        with pytest.raises(UnsupportedError, match="computes its output with the embedding"):
            veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
        return
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    assert_same(mlx_changes(tmp_path / "mlx"), weight_changes(adapter, base))
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))


def test_dora_keeps_its_lengths(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", "llama", use_dora=True)
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora"
    edit_config(tmp_path / "mlx", fine_tune_type=..., use_dora=True)
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    weights = load_file(base / "model.safetensors")
    changes = mlx_changes(tmp_path / "mlx")
    for name, expected in weight_changes(adapter, base).items():
        weight = weights[f"{name}.weight"].double()
        moved = weight + changes[name]
        after = tensors[f"{name}.m"].double()[:, None] * moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(after - weight, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "linear layers alone"),
    ],
)
def test_what_mlx_cannot_hold_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    base = saved_family(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", "llama", **options)
    with pytest.raises(UnsupportedError, match=named) as caught:
        veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    assert caught.value.hint
    assert not (tmp_path / "mlx").exists()


def test_several_models_of_a_pipeline_are_refused(tmp_path: Path) -> None:
    adapters = {"unet": CanonicalAdapter({}), "text_encoder": CanonicalAdapter({})}
    with pytest.raises(UnsupportedError, match="there are 2: unet, text_encoder"):
        MlxFormat().write(adapters, tmp_path / "mlx", None)


def test_a_component_is_written_alone(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", "llama")
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base, component="text_encoder")
    assert_same(mlx_changes(tmp_path / "mlx"), weight_changes(adapter, base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    base = saved_family(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", "llama")
    edit_tensors(adapter, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    assert {t.dtype for t in load_file(tmp_path / "mlx" / "adapters.safetensors").values()} == {dtype}
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (adapter, tmp_path / "back")]
    assert files[0] == files[1]


def test_the_base_is_needed_and_must_be_known(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", "llama")
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(BaseModelError, match="--base"):
        veneer.convert(adapter, tmp_path / "mlx", to="mlx")
    other = saved(tmp_path / "opt", "opt")
    with pytest.raises(UnsupportedError, match="type 'opt' are not known here"):
        veneer.convert(other, tmp_path / "mlx", to="mlx", base=build("opt"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", "llama")
    smaller = saved_family(tmp_path / "base", "llama", num_hidden_layers=1)
    with pytest.raises(BindError, match=r"has no model\.layers\.1"):
        veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=smaller)
    folder = mlx_folder(tmp_path / "mlx-1", query(layer=1))
    with pytest.raises(BindError, match="1 of 1 modules are not in"):
        veneer.convert(folder, tmp_path / "back", base=smaller)
    narrow = saved_family(tmp_path / "narrow", "llama", num_key_value_heads=1)
    with pytest.raises(BindError, match="k_proj"):
        veneer.convert(adapter, tmp_path / "mlx", to="mlx", base=narrow)
    with pytest.raises(BindError, match="k_proj"):
        veneer.convert(folder, tmp_path / "back", base=narrow)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_all_linear_layers_of_each_family(tmp_path: Path, model_type: str) -> None:
    model = family(model_type)
    linear = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and not any(w in name for w in ("vis", "multi_modal", "head", "kv_b_proj"))
    ]
    adapter = veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules=linear, init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    base = family(model_type)
    veneer.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=base)
    assert len(mlx_changes(tmp_path / "mlx")) == len(linear)
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_each_family_is_tested() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


def test_an_encoder_of_images_is_refused(tmp_path: Path) -> None:
    model = family("qwen3_vl")
    config = veneer.LoraConfig(r=2, target_modules=r".*visual.*attn\.proj", init_lora_weights=False)
    veneer.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"has no layer for model\.visual"):
        veneer.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=family("qwen3_vl"))


# -- files of MLX that are not as they should be -----------------------------------------------------------


def test_the_base_of_mlx_alone_is_not_taken(tmp_path: Path) -> None:
    for number, (model, base) in enumerate(
        [("mlx-community/Qwen3-4B-4bit", None), ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"), ("Qwen3-4B-MLX-4bit", None)]
    ):
        key = ("model", "base_model_name_or_path")[number % 2]
        folder = mlx_folder(tmp_path / f"mlx-{number}", query(), **{key: model})
        report = veneer.convert(folder, tmp_path / f"peft-{number}")
        config = json.loads((tmp_path / f"peft-{number}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
        assert bool(report.notes) == (base is None)


def test_a_name_that_depends_on_the_base(tmp_path: Path) -> None:
    tensors = {key.replace("model.layers", "model.h"): tensor for key, tensor in query().items()}
    with pytest.raises(BaseModelError, match="depends on the model"):
        veneer.convert(mlx_folder(tmp_path / "mlx", tensors), tmp_path / "peft")


def test_checkpoints_of_a_training(tmp_path: Path) -> None:
    folder = mlx_folder(tmp_path / "mlx", query())
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    with pytest.raises(IncompleteCheckpointError, match=r"0000100_adapters\.safetensors"):
        veneer.convert(folder, tmp_path / "peft")
    veneer.convert(folder / "0000100_adapters.safetensors", tmp_path / "peft")
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 2


@pytest.mark.parametrize(
    ("scaling", "alpha"), [("plain", 6.0), ("alpha/rank", 24.0), (None, None)], ids=["later", "2024", "unsaid"]
)
def test_an_alpha_beside_the_scale(tmp_path: Path, scaling: str | None, alpha: float | None) -> None:
    folder = mlx_folder(tmp_path / "mlx", query(), scale=3.0, lora_parameters={"alpha": 8})
    edit_config(folder, num_layers=..., fine_tune_type=..., lora_layers=16)
    if alpha is None:
        with pytest.raises(UsageError, match=r"scale \* alpha / rank \(12\).*--scaling"):
            veneer.convert(folder, tmp_path / "peft")
        return
    veneer.convert(folder, tmp_path / "peft", scaling=scaling)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == alpha


def test_an_alpha_that_stayed_in_the_defaults_means_nothing(tmp_path: Path) -> None:
    folder = mlx_folder(tmp_path / "mlx", query(), scale=3.0, lora_parameters={"alpha": 8}, mask_prompt=False)
    veneer.convert(folder, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_experts_as_mlx_had_them_until_2025(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 2, 40, generator=generator), torch.randn(4, 32, 2, generator=generator)
    module = "model.layers.1.mlp.switch_mlp.down_proj"
    folder = mlx_folder(tmp_path / "mlx", {f"{module}.lora_a": down.flatten(0, 1), f"{module}.lora_b": up}, scale=0.5)
    veneer.convert(folder, tmp_path / "peft", base=base)
    change = weight_changes(tmp_path / "peft", base)["model.layers.1.mlp.experts.down_proj"]
    torch.testing.assert_close(change, 0.5 * (up @ down).double(), rtol=1e-4, atol=2e-6)


def _drop(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in query().items() if not name.endswith(key)}


@pytest.mark.parametrize(
    ("tensors", "config", "error", "named"),
    [
        (query(), {"fine_tune_type": "full"}, UnsupportedError, "whole weights"),
        (query(), {"fine_tune_type": "odd"}, UnsupportedError, "'odd' is not known"),
        (query(), {"fine_tune_type": "dora"}, IncompleteCheckpointError, "no magnitude"),
        (query(), {"lora_parameters": {"rank": 4}}, CorruptFileError, "no factors of rank 4"),
        (query(), {"lora_parameters": {"rank": "2"}}, CorruptFileError, "rank '2'"),
        (query(), {"lora_parameters": {"scale": float("nan")}}, CorruptFileError, "scale nan"),
        (query(), {"lora_parameters": {"scale": None}}, CorruptFileError, "scale None"),
        (_drop("lora_a"), {}, IncompleteCheckpointError, "no lora_a"),
        ({**query(), "model.norm.weight": torch.ones(2)}, {}, BindError, "model.norm.weight"),
        ({"model.layers.0.mlp.lora_a.0": torch.ones(2, 2)}, {}, UnsupportedError, "AFM"),
        ({**query(), "model.layers.0.self_attn.k_proj.m": torch.ones(16)}, {}, CorruptFileError, "magnitude"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], error: type[Exception], named: str
) -> None:
    folder = mlx_folder(tmp_path / "mlx", tensors, **config)
    with pytest.raises(error, match=named) as caught:
        veneer.convert(folder, tmp_path / "peft")
    assert getattr(caught.value, "hint", None)
    assert not (tmp_path / "peft").exists()


def test_a_file_that_is_cut_off_or_alone(tmp_path: Path) -> None:
    folder = mlx_folder(tmp_path / "mlx", query())
    weights = folder / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match="damaged"):
        veneer.convert(folder, tmp_path / "peft")
    folder = mlx_folder(tmp_path / "alone", query())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(IncompleteCheckpointError, match="says their scale"):
        veneer.convert(folder, tmp_path / "peft")
    folder = mlx_folder(tmp_path / "empty", query())
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"no adapters\.safetensors"):
        veneer.convert(folder, tmp_path / "peft")
    (folder / "adapters.npz").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"adapters\.npz"):
        veneer.convert(folder, tmp_path / "peft")


# -- MLX-VLM -----------------------------------------------------------------------------------------------


def test_the_older_format_of_mlx_vlm(tmp_path: Path) -> None:
    base = family("qwen3_vl")
    folder = tmp_path / "vlm"
    folder.mkdir()
    module = "language_model.model.layers.1.self_attn.k_proj"
    a, b = torch.randn(32, 2), torch.randn(2, 16)
    save_file({f"{module}.A": a, f"{module}.B": b}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 3.0, "dropout": 0.1}))
    with pytest.raises(UsageError, match="March 2026"):
        veneer.convert(folder, tmp_path / "peft", base=base)
    with pytest.raises(BaseModelError, match="--base"):
        veneer.convert(folder, tmp_path / "peft", scaling="plain")
    for scaling, scale in (("plain", 3.0), ("alpha/rank", 1.5)):
        out = tmp_path / scaling.replace("/", "-")
        veneer.convert(folder, out, base=base, scaling=scaling)
        tensors = load_file(out / "adapter_model.safetensors")
        key = "base_model.model.model.language_model.layers.1.self_attn.k_proj"
        down, up = (tensors[f"{key}.lora_{x}.weight"] for x in "AB")
        config = json.loads((out / "adapter_config.json").read_text())
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * up @ down, scale * (a @ b).T)
