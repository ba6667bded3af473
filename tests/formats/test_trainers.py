"""The layouts of trainers that have models of their own: the change of each weight is theirs, in transformers' rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import veneer
from tests.formats.families import family
from tests.formats.same_changes import assert_same
from tests.formats.test_mlx import weight_changes
from veneer.errors import (
    BaseModelError,
    BindError,
    CorruptFileError,
    IncompleteCheckpointError,
    PickleRefusedError,
    UnsupportedError,
)
from veneer.files.convert_pickle import convert_pickle

HEADS, KEY_HEADS, SIZE, HIDDEN, WIDE = 4, 2, 8, 32, 48
OUT = {"attn.q_proj": 32, "attn.k_proj": 16, "attn.v_proj": 16, "attn.output_proj": 32, "mlp.w1": 48, "mlp.w3": 48}


def factors(out: int, inner: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inner, generator=generator) * 0.2, torch.randn(out, rank, generator=generator) * 0.2


# -- torchtune ---------------------------------------------------------------------------------------------


def torchtune_folder(folder: Path, names: dict[str, int], alpha: Any = 6, output: bool = True) -> dict[str, Tensor]:
    """An adapter as torchtune saves it, and the change of each of its modules, in its order of rows."""
    folder.mkdir()
    tensors, changes = {}, {}
    modules = {f"layers.{i}.{name}": out for i in (0, 1) for name, out in names.items()}
    modules |= {"layers.0.mlp.w2": 32, **({"output": 64} if output else {})}
    for seed, (module, out) in enumerate(modules.items()):
        a, b = factors(out, WIDE if module.endswith("w2") else HIDDEN, 3, seed)
        tensors[f"{module}.lora_a.weight"], tensors[f"{module}.lora_b.weight"] = a, b
        changes[module] = alpha / 3 * b @ a if alpha else b @ a
    torch.save(tensors, folder / "adapter_model.pt")
    if alpha is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": alpha, "peft_type": "LORA"}))
    return changes


def beside_to_apart(change: Tensor, heads: int) -> Tensor:
    """Rows of a head whose pairs lie beside each other -> rows whose pairs are half a head apart, one by one."""
    half = SIZE // 2
    moved = torch.empty_like(change)
    for head in range(heads):
        for pair in range(half):
            for which in (0, 1):
                moved[head * SIZE + which * half + pair] = change[head * SIZE + 2 * pair + which]
    return moved


NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_torchtune(tmp_path: Path, model_type: str) -> None:
    base: Any = family(model_type)
    base.save_pretrained(tmp_path / "base")
    expected = {}
    for module, change in torchtune_folder(tmp_path / "tune", OUT).items():
        head, _, name = module.partition(".attn.") if ".attn." in module else module.partition(".mlp.")
        part = module.removeprefix(f"{head}.")
        if part in ("attn.q_proj", "attn.k_proj") and model_type != "qwen2":
            change = beside_to_apart(change, HEADS if part == "attn.q_proj" else KEY_HEADS)
        expected["lm_head" if not name else f"model.{head}.{NAMES[part]}"] = change
    veneer.convert(tmp_path / "tune", tmp_path / "peft", base=tmp_path / "base")
    assert_same(weight_changes(tmp_path / "peft", tmp_path / "base"), expected)
    facts = veneer.inspect(tmp_path / "tune").adapter
    assert facts is not None
    assert (facts.format, facts.peft_type, facts.alpha) == ("torchtune", "LORA", 6)
    assert facts.weights is not None
    assert facts.weights.tensors == 2 * len(expected)


def test_torchtune_of_phi_has_apart_what_transformers_fuses(tmp_path: Path) -> None:
    base: Any = family("phi3")
    base.save_pretrained(tmp_path / "base")
    names = {"attn.q_proj": 32, "attn.v_proj": 16, "mlp.w3": 48}
    changes = torchtune_folder(tmp_path / "tune", names, output=False)
    veneer.convert(tmp_path / "tune", tmp_path / "peft", base=tmp_path / "base")
    expected = {"model.layers.0.mlp.down_proj": changes["layers.0.mlp.w2"]}
    for i in (0, 1):
        q, v, up = (changes[f"layers.{i}.{name}"] for name in names)
        expected[f"model.layers.{i}.self_attn.qkv_proj"] = torch.cat([q, torch.zeros(16, 32), v])
        expected[f"model.layers.{i}.mlp.gate_up_proj"] = torch.cat([torch.zeros(48, 32), up])
    assert_same(weight_changes(tmp_path / "peft", tmp_path / "base"), expected)


def test_magnitudes_of_torchtune_follow_their_rows(tmp_path: Path) -> None:
    base: Any = family("llama")
    base.save_pretrained(tmp_path / "base")
    folder = tmp_path / "tune"
    folder.mkdir()
    a, b = factors(16, HIDDEN, 3, 0)
    magnitude = torch.arange(1.0, 17.0)
    module = "layers.0.attn.k_proj"
    tensors = {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b, f"{module}.magnitude": magnitude}
    torch.save(tensors, folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    veneer.convert(folder, tmp_path / "peft", base=tmp_path / "base")
    weight = dict(base.named_parameters())["model.layers.0.self_attn.k_proj.weight"].detach()
    moved = weight + 2 * beside_to_apart(b @ a, KEY_HEADS)
    lengths = beside_to_apart(magnitude[:, None], KEY_HEADS)
    expected = lengths * moved / moved.norm(dim=1, keepdim=True) - weight
    found = weight_changes(tmp_path / "peft", tmp_path / "base")
    assert_same(found, {"model.layers.0.self_attn.k_proj": expected})


def test_a_pickle_of_torchtune_that_was_converted(tmp_path: Path) -> None:
    torchtune_folder(tmp_path / "tune", OUT)
    base = family("llama")
    veneer.convert(tmp_path / "tune", tmp_path / "first", base=base)
    convert_pickle(tmp_path / "tune" / "adapter_model.pt")
    (tmp_path / "tune" / "adapter_model.pt").unlink()
    veneer.convert(tmp_path / "tune", tmp_path / "second", base=base)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_faults_of_torchtune(tmp_path: Path) -> None:
    torchtune_folder(tmp_path / "tune", OUT)
    with pytest.raises(BaseModelError, match="--base"):
        veneer.convert(tmp_path / "tune", tmp_path / "peft")
    with pytest.raises(UnsupportedError, match="type 'gpt2' is not known"):
        veneer.convert(tmp_path / "tune", tmp_path / "peft", base=family("gpt2"))
    with pytest.raises(BindError, match="heads of 8"):
        veneer.convert(tmp_path / "tune", tmp_path / "peft", base=family("llama", num_key_value_heads=1))
    torchtune_folder(tmp_path / "unsaid", OUT, alpha=None)
    with pytest.raises(IncompleteCheckpointError, match="does not say its alpha"):
        veneer.convert(tmp_path / "unsaid", tmp_path / "peft", base=family("llama"))
    path = tmp_path / "tune" / "adapter_model.pt"
    tensors = torch.load(path)
    torch.save({**tensors, "layers.0.attn.q_proj.bias": torch.ones(2)}, path)
    with pytest.raises(BindError, match=r"q_proj\.bias is no tensor"):
        veneer.convert(tmp_path / "tune", tmp_path / "peft", base=family("llama"))
    tensors.pop("layers.1.attn.k_proj.lora_b.weight")
    torch.save(tensors, path)
    with pytest.raises(BindError, match="has no lora_B"):
        veneer.convert(tmp_path / "tune", tmp_path / "peft", base=family("llama"))
    torch.save({**tensors, "more": nn.Linear(1, 1)}, path)
    with pytest.raises(PickleRefusedError, match="more than plain tensors"):
        veneer.convert(tmp_path / "tune", tmp_path / "peft", base=family("llama"))


# -- LitGPT ------------------------------------------------------------------------------------------------


def litgpt_folder(folder: Path, shapes: dict[str, tuple[int, int]], enabled: str = "qv", **settings: Any) -> Path:
    """An adapter as LitGPT saves it: a pickle of one mapping, and the training's settings."""
    folder.mkdir()
    tensors = {}
    for seed, (module, (out, inner)) in enumerate(shapes.items()):
        a, b = factors(out, inner, 3, seed)
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = a, b
    for layer in (0, 1):
        rows = {"q": 32, "k": 16, "v": 16}
        a, _ = factors(1, HIDDEN, 3 * len(enabled), 100 + layer)
        _, b = factors(sum(rows[name] for name in enabled), 1, 3, 200 + layer)
        prefix = f"transformer.h.{layer}.attn.qkv"
        tensors[f"{prefix}.lora_A"], tensors[f"{prefix}.lora_B"] = a, b
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    names = {"q": "query", "k": "key", "v": "value"}
    values = {"lora_r": 3, "lora_alpha": 6, "checkpoint_dir": "checkpoints/owner/name"}
    values |= {f"lora_{names[name]}": name in enabled for name in "qkv"}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in {**values, **settings}.items())
    (folder / "hyperparameters.yaml").write_text(text)
    return folder


def projections(folder: Path, layer: int, enabled: str) -> dict[str, Tensor]:
    """The changes of q, k and v, those that are adapted, by LitGPT's own slices."""
    tensors = torch.load(folder / "lit_model.pth.lora")["model"]
    a, b = (tensors[f"transformer.h.{layer}.attn.qkv.lora_{x}"] for x in "AB")
    changes, row = {}, 0
    for i, name in enumerate(enabled):
        size = 32 if name == "q" else 16
        changes[name] = 2 * b[row : row + size] @ a[3 * i : 3 * i + 3]
        row += size
    return changes


def product(folder: Path, module: str) -> Tensor:
    tensors = torch.load(folder / "lit_model.pth.lora")["model"]
    change: Tensor = 2 * tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]
    return change


@pytest.mark.parametrize("enabled", ["q", "qv", "qkv", "kv"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_litgpt(tmp_path: Path, enabled: str, model_type: str) -> None:
    base: Any = family(model_type)
    base.save_pretrained(tmp_path / "base")
    shapes = {
        "transformer.h.0.attn.proj": (32, 32),
        "transformer.h.1.mlp.fc_1": (48, 32),
        "transformer.h.1.mlp.fc_2": (48, 32),
        "transformer.h.1.mlp.proj": (32, 48),
        "lm_head": (70, 32),
    }
    folder = litgpt_folder(tmp_path / "lit", shapes, enabled)
    veneer.convert(folder, tmp_path / "peft", base=tmp_path / "base")
    names = ("o_proj", "gate_proj", "up_proj", "down_proj")
    expected = {
        f"model.layers.{module.split('.')[2]}.{'self_attn' if 'attn' in module else 'mlp'}.{name}": product(
            folder, module
        )
        for module, name in zip(shapes, names, strict=False)
    }
    expected["lm_head"] = product(folder, "lm_head")[:64]
    for layer in (0, 1):
        for name, change in projections(folder, layer, enabled).items():
            expected[f"model.layers.{layer}.self_attn.{name}_proj"] = change
    assert_same(weight_changes(tmp_path / "peft", tmp_path / "base"), expected)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    facts = veneer.inspect(folder).adapter
    assert facts is not None
    assert (facts.format, facts.peft_type) == ("LitGPT", "LORA")


def test_litgpt_of_phi_3(tmp_path: Path) -> None:
    base: Any = family("phi3")
    base.save_pretrained(tmp_path / "base")
    folder = litgpt_folder(tmp_path / "lit", {"transformer.h.0.mlp.fc_1": (48, 32)}, "qv")
    veneer.convert(folder, tmp_path / "peft", base=tmp_path / "base")
    gate = product(folder, "transformer.h.0.mlp.fc_1")
    expected = {"model.layers.0.mlp.gate_up_proj": torch.cat([gate, torch.zeros(48, 32)])}
    for layer in (0, 1):
        parts = projections(folder, layer, "qv")
        expected[f"model.layers.{layer}.self_attn.qkv_proj"] = torch.cat([parts["q"], torch.zeros(16, 32), parts["v"]])
    assert_same(weight_changes(tmp_path / "peft", tmp_path / "base"), expected)


def test_litgpt_of_gpt_neox_has_the_heads_beside_each_other(tmp_path: Path) -> None:
    base: Any = family("gpt_neox")
    base.save_pretrained(tmp_path / "base")
    folder = tmp_path / "lit"
    litgpt_folder(folder, {"transformer.h.1.mlp.fc": (128, 32)}, "q")
    tensors = torch.load(folder / "lit_model.pth.lora")["model"]
    for layer in (0, 1):
        a, b = factors(64, HIDDEN, 3, layer)
        other, _ = factors(1, HIDDEN, 3, 50 + layer)
        prefix = f"transformer.h.{layer}.attn.qkv"
        tensors[f"{prefix}.lora_A"], tensors[f"{prefix}.lora_B"] = torch.cat([a, other]), b
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    settings = (folder / "hyperparameters.yaml").read_text().replace("lora_value: false", "lora_value: true")
    (folder / "hyperparameters.yaml").write_text(settings)
    veneer.convert(folder, tmp_path / "peft", base=tmp_path / "base")
    expected = {"gpt_neox.layers.1.mlp.dense_h_to_4h": product(folder, "transformer.h.1.mlp.fc")}
    for layer in (0, 1):
        a, b = (tensors[f"transformer.h.{layer}.attn.qkv.lora_{x}"] for x in "AB")
        query, value = 2 * b[:32] @ a[:3], 2 * b[32:] @ a[3:]
        rows = []
        for head in range(HEADS):
            place = slice(head * SIZE, head * SIZE + SIZE)
            rows += [query[place], torch.zeros(SIZE, HIDDEN), value[place]]
        expected[f"gpt_neox.layers.{layer}.attention.query_key_value"] = torch.cat(rows)
    assert_same(weight_changes(tmp_path / "peft", tmp_path / "base"), expected)


def test_litgpt_copies_the_bases_config_beside_it(tmp_path: Path) -> None:
    folder = litgpt_folder(tmp_path / "lit", {}, "qv")
    model: Any = family("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    veneer.convert(folder, tmp_path / "peft")
    veneer.convert(folder / "lit_model.pth.lora", tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "again")]
    assert files[0] == files[1]
    loaded = veneer.load(folder, base=family("llama"))
    assert loaded.active_adapter


def test_faults_of_litgpt(tmp_path: Path) -> None:
    folder = litgpt_folder(tmp_path / "lit", {}, "qv")
    with pytest.raises(BaseModelError, match="--base"):
        veneer.convert(folder, tmp_path / "peft")
    with pytest.raises(BindError, match="rank 3 for query, value of"):
        veneer.convert(folder, tmp_path / "peft", base=family("llama", num_key_value_heads=1))
    with pytest.raises(UnsupportedError, match="type 'gpt2' is not known"):
        veneer.convert(folder, tmp_path / "peft", base=family("gpt2"))
    odd = litgpt_folder(tmp_path / "odd", {"transformer.h.0.mlp.experts.0.fc_1": (48, 32)})
    with pytest.raises(BindError, match="it has no"):
        veneer.convert(odd, tmp_path / "peft", base=family("llama"))
    (folder / "hyperparameters.yaml").write_text("lora_r: 3\nlora_alpha: many\n")
    with pytest.raises(CorruptFileError, match="lora_alpha 'many'"):
        veneer.convert(folder, tmp_path / "peft", base=family("llama"))
    (folder / "hyperparameters.yaml").write_text("a: [")
    with pytest.raises(CorruptFileError, match="no YAML"):
        veneer.convert(folder, tmp_path / "peft", base=family("llama"))
    (folder / "hyperparameters.yaml").unlink()
    with pytest.raises(IncompleteCheckpointError, match="says their rank"):
        veneer.convert(folder, tmp_path / "peft", base=family("llama"))
    (odd / "lit_model.pth.lora").write_bytes((odd / "lit_model.pth.lora").read_bytes()[:100])
    with pytest.raises(CorruptFileError, match="damaged"):
        veneer.convert(odd, tmp_path / "peft", base=family("llama"))


# -- what is only recognised -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "contents", "hint"),
    [
        ("model.lora_weights.npy", b"\x93NUMPY", "hf_lora_convert"),
        ("ggml-adapter-model.bin", b"algg\x01", "--to gguf"),
        ("adapter_config.json", b'{"swift_type": "LONGLORA"}', "veneer extract"),
    ],
)
def test_what_is_not_read_is_named_with_the_way_out(tmp_path: Path, name: str, contents: bytes, hint: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / name).write_bytes(contents)
    with pytest.raises(UnsupportedError, match="which is not read") as caught:
        veneer.convert(folder, tmp_path / "peft")
    assert hint in str(caught.value)
    assert [problem.code for problem in veneer.inspect(folder).problems] == ["not-read"]
    if name.endswith(".bin"):
        with pytest.raises(UnsupportedError, match="ggla"):
            veneer.convert(folder / name, tmp_path / "peft")


def test_megatron_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    key = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
    save_file({key: torch.ones(2, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="save_hf_adapter"):
        veneer.convert(tmp_path / "adapter", tmp_path / "peft")
