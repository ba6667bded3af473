"""LyCORIS' files: each method's change, read independently of Veneer by LyCORIS' rules and by PEFT's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats import diffusion_bases as bases
from tests.formats.same_changes import assert_same
from tests.formats.test_kohya import product
from tests.random_adapters import saved, saved_base
from veneer.errors import BindError, UnsupportedError, VeneerError

ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
LINEAR = {f"{ATTENTION}.attn2.to_k": (8, 6), f"{ATTENTION}.ff.net.0.proj": (64, 8)}
CONV = {"up_blocks.0.resnets.2.conv1": (8, 12, 3, 3)}


def flat(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def matrix(leaves: dict[str, Tensor], name: str) -> Tensor:
    """A factor of LoKr, whole."""
    if name in leaves:
        return leaves[name].double()
    left, right = leaves[f"{name}_a"].double(), leaves[f"{name}_b"].double()
    core = leaves.get(name.replace("w", "t"))
    return left @ right if core is None else torch.einsum("pqkl,pa,qb->abkl", core.double(), left, right)


def dense(leaves: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> Tensor:
    """The change of a weight, by the formulas that PEFT and LyCORIS share."""
    if "hada_w1_a" in leaves:
        halves = []
        for half in ("1", "2"):
            a, b = leaves[f"hada_w{half}_a"].double(), leaves[f"hada_w{half}_b"].double()
            core = leaves.get(f"hada_t{half}")
            halves.append(a @ b if core is None else torch.einsum("pqkl,pa,qb->abkl", core.double(), a, b))
        return (scale * halves[0] * halves[1]).reshape(shape)
    first, second = matrix(leaves, "lokr_w1"), matrix(leaves, "lokr_w2")
    first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
    return (scale * torch.kron(first, second)).reshape(shape)


def parts_of(file: Path, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        module, _, leaf = key.removeprefix(prefix).rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    return modules


def of_lycoris(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    result = {}
    for name, leaves in parts_of(file).items():
        path = next(path for path in shapes if flat(path) == name)
        ranks = [t.shape[0] for leaf, t in leaves.items() if leaf in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b")]
        scale = float(leaves["alpha"]) / ranks[0] if ranks else 1.0
        result[path] = dense(leaves, scale, shapes[path])
    return result


def of_peft(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    result = {}
    for path, leaves in parts_of(folder / "adapter_model.safetensors", "base_model.model.").items():
        r, alpha = (
            next((v for k, v in config[patterns].items() if path.endswith(k.replace("\\", ""))), config[option])
            for patterns, option in (("rank_pattern", "r"), ("alpha_pattern", "alpha"))
        )
        result[path] = dense(leaves, alpha / r, shapes[path])
    return result


def trained(folder: Path, shapes: dict[str, tuple[int, ...]], config: Any, seed: int = 1) -> Path:
    """An adapter as Veneer itself makes and saves it on layers of these shapes: PEFT's layout, which others test."""
    from torch import nn

    root = nn.Module()
    for path, (out, inner, *kernel) in shapes.items():
        *parents, last = path.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.add_module(
            last, nn.Conv2d(inner, out, kernel[0], bias=False) if kernel else nn.Linear(inner, out, bias=False)
        )
    model = veneer.get_peft_model(root, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters("default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


CONFIGS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "loha": (
        veneer.LoHaConfig(r=3, alpha=5, target_modules=[*LINEAR, *CONV], rank_pattern={"to_k": 2}),
        {**LINEAR, **CONV},
    ),
    "loha tucker": (veneer.LoHaConfig(r=3, alpha=5, target_modules=[*CONV], use_effective_conv2d=True), CONV),
    "loha zero": (veneer.LoHaConfig(r=3, alpha=0, target_modules=[*LINEAR]), LINEAR),
    "lokr": (veneer.LoKrConfig(r=2, alpha=5, target_modules=[*LINEAR, *CONV]), {**LINEAR, **CONV}),
    "lokr tucker": (veneer.LoKrConfig(r=1, alpha=5, target_modules=[*CONV], use_effective_conv2d=True), CONV),
    "lokr both": (veneer.LoKrConfig(r=1, alpha=5, target_modules=[*LINEAR], decompose_both=True), LINEAR),
    "lokr factor": (veneer.LoKrConfig(r=1, alpha=5, target_modules=[*LINEAR], decompose_factor=2), LINEAR),
    "lokr whole": (veneer.LoKrConfig(r=16, alpha=5, target_modules=[*LINEAR, *CONV]), {**LINEAR, **CONV}),
    "lokr zero": (veneer.LoKrConfig(r=1, alpha=0, target_modules=[*LINEAR]), LINEAR),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_loha_and_lokr(tmp_path: Path, name: str) -> None:
    config, shapes = CONFIGS[name]
    base = bases.stored(tmp_path / "base", bases.unet())
    adapter = trained(tmp_path / "adapter", shapes, config)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    expected = of_peft(adapter, shapes)
    assert any(change.any() for change in expected.values()) != ("zero" in name)
    assert_same(of_lycoris(tmp_path / "out.safetensors", shapes), expected)
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    assert_same(of_peft(tmp_path / "again", shapes), expected)
    # A file of others has no config of PEFT's with it.
    save_file(load_file(tmp_path / "out.safetensors"), tmp_path / "bare.safetensors")
    veneer.convert(tmp_path / "bare.safetensors", tmp_path / "bare", base=base)
    assert_same(of_peft(tmp_path / "bare", shapes), expected)
    # And Veneer itself takes the factors' shapes for those of the config.
    model = trained(tmp_path / "model", shapes, config)
    assert model.exists()


def test_the_example_of_lokr(tmp_path: Path) -> None:
    name = "conv_out"
    shapes: bases.Shapes = {"down_blocks.0.x": (4, 4), name: (4, 4)}
    base = bases.stored(tmp_path / "base", shapes)
    factors = {"lokr_w1": torch.tensor([[1.0, 2], [0, 1]]), "lokr_w2": torch.tensor([[1.0, 0], [0, 3]])}
    tensors = {f"{flat(name)}.{leaf}": tensor for leaf, tensor in factors.items()}
    save_file({**tensors, f"{flat(name)}.alpha": torch.tensor(4.0)}, tmp_path / "a.safetensors")
    report = veneer.convert(tmp_path / "a.safetensors", tmp_path / "peft", base=base)
    change = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 6], [0, 0, 1, 0], [0, 0, 0, 3]], dtype=torch.float64)
    assert torch.equal(of_peft(tmp_path / "peft", shapes)[name], change)
    assert "whatever alpha says" in report.notes[0]


def test_the_example_of_dora(tmp_path: Path) -> None:
    shapes: bases.Shapes = {"down_blocks.0.x": (2, 2), "conv_out": (2, 3)}
    base = bases.stored(tmp_path / "base", shapes)
    factors = {
        "lora_A.weight": torch.tensor([[1.0, 0, 0]]),
        "lora_B.weight": torch.tensor([[1.0], [0]]),
        "lora_magnitude_vector": torch.tensor([10.0, 5]),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["conv_out"], "use_dora": True}
    tensors = {f"base_model.model.conv_out.{leaf}": tensor for leaf, tensor in factors.items()}
    adapter = bases.adapter(tmp_path / "adapter", config, tensors)
    with pytest.warns(veneer.VeneerWarning, match=r"ComfyUI and Forge divide .* --as-lora"):
        veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    assert load_file(tmp_path / "out.safetensors")["lora_unet_conv_out.dora_scale"].tolist() == [[10], [5]]
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.filterwarnings("ignore:LyCORIS reads this DoRA")
def test_dora_of_convolutions_and_fused_layers(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    adapter = bases.lora(tmp_path / "adapter", CONV, use_dora=True)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    assert load_file(tmp_path / "out.safetensors")[f"{flat(next(iter(CONV)))}.dora_scale"].shape == (8, 1, 1, 1)
    flux = bases.stored(tmp_path / "flux", bases.flux())
    layers = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    fused = bases.lora(tmp_path / "fused", dict.fromkeys(layers, (8, 8)), use_dora=True)
    for source, target, model in ((adapter, "conv", base), (fused, "joined", flux)):
        veneer.convert(source, tmp_path / f"{target}.safetensors", to="lycoris", base=model)
        veneer.convert(tmp_path / f"{target}.safetensors", tmp_path / target, base=model)
        own, again = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / target))
        magnitudes = {key: tensor for key, tensor in own.items() if "magnitude" in key}
        assert all(torch.equal(again[key], tensor) for key, tensor in magnitudes.items())
    lonely = bases.lora(tmp_path / "lonely", {layers[0]: (8, 8)}, use_dora=True)
    with pytest.raises(UnsupportedError, match="only some of its layers have magnitudes"):
        veneer.convert(lonely, tmp_path / "never.safetensors", to="lycoris", base=flux)


@pytest.mark.parametrize("inputs", [[], [f"{ATTENTION}.ff.net.0.proj", "conv1"]])
def test_ia3(tmp_path: Path, inputs: list[str]) -> None:
    shapes = {**LINEAR, **CONV}
    base = bases.stored(tmp_path / "base", bases.unet())
    targets = [f"{ATTENTION}.attn2.to_k", f"{ATTENTION}.ff.net.0.proj", "conv1"]
    adapter = trained(
        tmp_path / "adapter", shapes, veneer.IA3Config(target_modules=targets, feedforward_modules=inputs)
    )
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    own = parts_of(adapter / "adapter_model.safetensors", "base_model.model.")
    for name, leaves in parts_of(tmp_path / "out.safetensors").items():
        path = next(path for path in shapes if flat(path) == name)
        assert bool(leaves["on_input"]) == any(path.endswith(name) for name in inputs)
        torch.testing.assert_close(1 + leaves["weight"].flatten(), own[path]["ia3_l"].flatten())
    save_file(load_file(tmp_path / "out.safetensors"), tmp_path / "bare.safetensors")
    veneer.convert(tmp_path / "bare.safetensors", tmp_path / "again", base=base)
    for path, leaves in parts_of(tmp_path / "again" / "adapter_model.safetensors", "base_model.model.").items():
        torch.testing.assert_close(leaves["ia3_l"], own[path]["ia3_l"])
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert len(config["feedforward_modules"]) == len(inputs)


def test_ia3_on_a_bias_is_refused(tmp_path: Path) -> None:
    path = f"{ATTENTION}.attn2.to_k"
    base = bases.stored(tmp_path / "base", bases.unet(), biased=[path])
    adapter = trained(
        tmp_path / "adapter", {path: (8, 6)}, veneer.IA3Config(target_modules=[path], feedforward_modules=[])
    )
    with pytest.raises(UnsupportedError, match="to_k has a bias"):
        veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    tensors = {f"{flat(path)}.weight": torch.ones(8), f"{flat(path)}.on_input": torch.tensor(0)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="to_k has a bias"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)


def test_a_tucker_core_is_multiplied_in(tmp_path: Path) -> None:
    (path,) = CONV
    base = bases.stored(tmp_path / "base", bases.unet())
    down, core, up = torch.randn(3, 12, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(8, 3, 1, 1)
    factors = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up, "alpha": torch.tensor(6.0)}
    save_file({f"{flat(path)}.{leaf}": tensor for leaf, tensor in factors.items()}, tmp_path / "a.safetensors")
    report = veneer.convert(tmp_path / "a.safetensors", tmp_path / "peft", base=base)
    assert "Tucker" in report.notes[0]
    own = parts_of(tmp_path / "peft" / "adapter_model.safetensors", "base_model.model.")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(own) == 2
    change = 2 * product(*(tensors[f"base_model.model.{path}.lora_{name}.weight"] for name in "BA"))
    expected = 2 * torch.einsum(
        "op,pqkl,qi->oikl", *(t.double().squeeze() if t is not core else t.double() for t in (up, core, down))
    )
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


K = flat(f"{ATTENTION}.attn2.to_k")
PAIR = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(8, 2)}
HADA = {"hada_w1_a": torch.ones(8, 2), "hada_w1_b": torch.ones(2, 6), "hada_w2_a": torch.ones(8, 2)}
LOKR = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 3)}
REFUSED: dict[str, tuple[dict[str, Tensor], type[VeneerError], str]] = {
    "whole weights": ({"diff": torch.ones(8, 6)}, UnsupportedError, "no low-rank factors.*extract_lora_from_models"),
    "a bias": ({**PAIR, "diff_b": torch.ones(8)}, UnsupportedError, r"diff_b is of.*extract_lora_from_models"),
    "a norm": ({"w_norm": torch.ones(8), "b_norm": torch.ones(8)}, UnsupportedError, "[wb]_norm is of trained weights"),
    "glora": ({"a1.weight": torch.ones(2, 6), "a2.weight": torch.ones(8, 2)}, UnsupportedError, "GLoRA"),
    "oft": ({"oft_blocks": torch.ones(2, 4, 4), "alpha": torch.tensor(1.0)}, UnsupportedError, "OFT"),
    "early dora": ({**PAIR, "dora_scale": torch.ones(1, 6)}, UnsupportedError, "wd_on_out=False"),
    "dora of loha": (
        {**HADA, "hada_w2_b": torch.ones(2, 6), "dora_scale": torch.ones(8, 1)},
        UnsupportedError,
        "LoHa or LoKr with magnitudes",
    ),
    "half a loha": (HADA, BindError, "has no hada_w2_b"),
    "half a lokr": ({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 1)}, BindError, "has no lokr_w2"),
    "unbalanced lokr": (
        {"lokr_w1": torch.ones(8, 1), "lokr_w2": torch.ones(1, 6)},
        UnsupportedError,
        "decompose_factor",
    ),
    "half an ia3": ({"weight": torch.ones(8)}, BindError, "has no on_input"),
    "an ia3 of another size": ({"weight": torch.ones(7), "on_input": torch.tensor(0)}, BindError, "layer has 8"),
}


GOOD: dict[str, dict[str, Tensor]] = {
    "lora": {**PAIR, "alpha": torch.tensor(2.0), "dora_scale": torch.ones(8, 1)},
    "loha": {**HADA, "hada_w2_b": torch.ones(2, 6), "alpha": torch.tensor(2.0)},
    "lokr": {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 1), "lokr_w2_b": torch.ones(1, 3)},
    "lokr whole": LOKR,
    "ia3": {"weight": torch.ones(8), "on_input": torch.tensor(0)},
}
HOSTILE = {
    "a number": torch.tensor(1.0),
    "nothing": torch.ones(0),
    "a row": torch.ones(3),
    "no rank": torch.ones(8, 0),
    "a cube": torch.ones(2, 3, 4),
    "another matrix": torch.ones(5, 7),
    "nan": torch.tensor(math.nan),
    "no numbers": torch.ones(2, 2, dtype=torch.bool),
}


@pytest.mark.parametrize("odd", HOSTILE)
@pytest.mark.parametrize("method", GOOD)
def test_every_tensor_of_another_shape_is_told(tmp_path: Path, method: str, odd: str) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    for leaf in GOOD[method]:
        if leaf == "alpha" and HOSTILE[odd].numel() == 1 and odd != "nan":
            continue
        leaves = {**GOOD[method], leaf: HOSTILE[odd]}
        save_file({f"{K}.{name}": tensor.clone() for name, tensor in leaves.items()}, tmp_path / f"{leaf}.safetensors")
        with pytest.raises(VeneerError, match=f"{K}|{ATTENTION}"):
            veneer.convert(tmp_path / f"{leaf}.safetensors", tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", GOOD)
def test_and_the_right_shapes_are_read(tmp_path: Path, method: str) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    tensors = {f"{K}.{name}": tensor.clone() for name, tensor in GOOD[method].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("what", REFUSED)
def test_what_peft_has_no_form_for(tmp_path: Path, what: str) -> None:
    leaves, kind, message = REFUSED[what]
    base = bases.stored(tmp_path / "base", bases.unet())
    save_file({f"{K}.{leaf}": tensor for leaf, tensor in leaves.items()}, tmp_path / "a.safetensors")
    with pytest.raises(kind, match=message):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_norm_is_refused_as_such(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1"
    save_file({f"{name}.w_norm": torch.ones(8)}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=r"norm1\.w_norm is of trained weights"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)


def test_two_methods_in_a_file(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    other = flat(f"{ATTENTION}.attn2.to_v")
    tensors = {f"{K}.{leaf}": tensor for leaf, tensor in PAIR.items()}
    save_file({**tensors, **{f"{other}.{leaf}": t for leaf, t in LOKR.items()}}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="LOKR and LORA"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)


def test_loha_of_fused_layers(tmp_path: Path) -> None:
    flux = bases.stored(tmp_path / "flux", bases.flux())
    shapes = {f"transformer_blocks.0.attn.to_{x}": (8, 8) for x in "qv"}
    adapter = trained(tmp_path / "adapter", shapes, veneer.LoHaConfig(r=2, alpha=3, target_modules=["to_q", "to_v"]))
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=flux)
    (leaves,) = parts_of(tmp_path / "out.safetensors").values()
    change = dense(leaves, float(leaves["alpha"]) / leaves["hada_w1_b"].shape[0], (24, 8))
    expected = of_peft(adapter, shapes)
    zeros = torch.zeros(8, 8, dtype=torch.float64)
    together = [expected["transformer_blocks.0.attn.to_q"], zeros, expected["transformer_blocks.0.attn.to_v"]]
    torch.testing.assert_close(change, torch.cat(together), rtol=1e-5, atol=1e-6)
    lokr = trained(tmp_path / "lokr", shapes, veneer.LoKrConfig(r=2, target_modules=["to_q", "to_v"]))
    with pytest.raises(UnsupportedError, match=r"cannot be parted or joined by rows.*--as-lora"):
        veneer.convert(lokr, tmp_path / "never.safetensors", to="lycoris", base=flux)


def test_lokr_of_a_fused_layer(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {"lokr_w1": torch.ones(4, 2), "lokr_w2": torch.ones(6, 4)}
    save_file({f"{name}.{leaf}": tensor for leaf, tensor in factors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=r"parted or joined by rows.*extract_lora_from_models"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)


def test_rslora_of_lycoris_is_in_alpha(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    adapter = bases.lora(tmp_path / "adapter", LINEAR, use_rslora=True)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    alphas = {float(t) for key, t in load_file(tmp_path / "out.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {6 * math.sqrt(4)}


def test_a_model_that_kohya_has_no_names_for(tmp_path: Path) -> None:
    shapes: bases.Shapes = {"blocks.0.attn1.to_q": (8, 6), "blocks.0.ffn.net_0": (12, 8)}
    base = bases.stored(tmp_path / "base", shapes)
    adapter = bases.lora(tmp_path / "adapter", shapes)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    keys = load_file(tmp_path / "out.safetensors")
    assert {key.partition(".")[0] for key in keys} == {"lycoris_blocks_0_attn1_to_q", "lycoris_blocks_0_ffn_net_0"}
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    own, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert own.keys() == again.keys()
    assert all(torch.equal(own[key], again[key]) for key in own)


def test_a_language_model(tmp_path: Path) -> None:
    base, adapter = saved_base(tmp_path / "base"), saved(tmp_path / "adapter")
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=base)
    keys = load_file(tmp_path / "out.safetensors")
    assert "lycoris_model_layers_0_self_attn_q_proj.lora_down.weight" in keys
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    own, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert all(torch.equal(own[key], again[key]) for key in own)
