"""Every pair of formats: what a file says of each weight, read here by the layout alone, is what the first one said.

The bases have layers whose sides differ, several heads of eight columns, and fewer heads of keys than of queries; the
adapters have mixed ranks and alphas, rsLoRA, and an alpha of zero.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import veneer
from tests.formats import diffusion_bases as bases
from veneer.formats import registry
from veneer.formats.table import EXACT, TABLE

HEADS, KEY_HEADS, SIZE, HIDDEN = 4, 2, 8, 24
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"rank_pattern": {"q_proj": 2, "to_q": 2}, "alpha_pattern": {"k_proj": 5, "to_k": 5}},
    "rslora": {"rank_pattern": {"q_proj": 2, "to_q": 2}, "use_rslora": True},
    "zero": {"lora_alpha": 0},
    "one zero": {"alpha_pattern": {"k_proj": 0, "to_k": 0}},
}
Changes = dict[str, Tensor]


# -- what each file says ------------------------------------------------------------------------------------


def product(up: Tensor, down: Tensor) -> Tensor:
    matrix = up.double().flatten(1) @ down.double().flatten(1)
    return matrix.reshape(up.shape[0], *down.shape[1:])


def of_peft(folder: Path) -> Changes:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = first_match(path, config.get("rank_pattern"), config["r"])
            alpha = first_match(path, config.get("alpha_pattern"), config["lora_alpha"])
            assert down.shape[0] == rank, path
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            changes[path] = scale * product(tensors[key.replace("lora_A", "lora_B")], down)
    return changes


def first_match(path: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def of_mlx(folder: Path) -> Changes:
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_parameters"]["scale"]
    tensors = load_file(folder / "adapters.safetensors")
    downs = {key.removesuffix(".lora_a"): a for key, a in tensors.items() if key.endswith(".lora_a")}
    keys = config["lora_parameters"]["keys"]
    layers = range(2 - config["num_layers"] if 0 < config["num_layers"] < 2 else 0, 2)
    inside = {f"model.layers.{i}.{key}" for key in keys if not key.startswith("model.") for i in layers}
    assert {key for key in keys if key.startswith("model.")} | inside == set(downs)
    assert {a.shape[1] for a in downs.values()} == {config["lora_parameters"]["rank"]}
    return {path: scale * (a.double() @ tensors[f"{path}.lora_b"].double()).T for path, a in downs.items()}


GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def of_gguf(file: Path) -> Changes:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    changes = {}
    for name, a in tensors.items():
        if not name.endswith(".weight.lora_a"):
            continue
        _, block, weight = name.removesuffix(".weight.lora_a").split(".")
        b = tensors[name.replace("lora_a", "lora_b")]
        if weight in ("attn_q", "attn_k"):
            b = b[[row_in_gguf(row) for row in range(b.shape[0])]]
        assert alpha
        changes[f"model.layers.{block}.{GGUF[weight]}"] = alpha / b.shape[1] * product(b, a)
    return changes


def row_in_gguf(row: int) -> int:
    """The row of llama.cpp's q and k for a row of transformers': the halves of a head are interleaved."""
    head, place = divmod(row, SIZE)
    half, offset = divmod(place, SIZE // 2)
    return head * SIZE + 2 * offset + half


def of_diffusers(file: Path) -> Changes:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    config = {key.partition(".")[2]: value for key, value in metadata.items()}
    changes = {}
    for key, down in tensors.items():
        if match := re.fullmatch(r"(?:unet|transformer)\.(.+)\.lora_A\.weight", key):
            rank = down.shape[0]
            alpha = first_match(match[1], config.get("alpha_pattern"), config.get("lora_alpha", rank))
            assert first_match(match[1], config.get("rank_pattern"), config.get("r", rank)) == rank
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            changes[match[1]] = scale * product(tensors[key.replace("lora_A", "lora_B")], down)
    return changes


def of_kohya(file: Path) -> Changes:
    tensors = load_file(file)
    flat = {path.replace(".", "_"): path for path in bases.unet()}
    changes = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            alpha = float(tensors[f"{name}.alpha"]) or down.shape[0]
            up = tensors[f"{name}.lora_up.weight"]
            changes[flat[name.removeprefix("lora_unet_")]] = alpha / down.shape[0] * product(up, down)
    return changes


READERS: dict[str, Callable[[Path], Changes]] = {
    "peft": of_peft,
    "serving": of_peft,
    "mlx": of_mlx,
    "gguf": of_gguf,
    "diffusers": of_diffusers,
    "kohya": of_kohya,
    "lycoris": of_kohya,
    "comfyui": of_diffusers,
}
TEXT = [name for name in ("peft", "serving", "mlx", "gguf") if name in registry.targets()]
IMAGE = ["peft", "diffusers", "kohya", "lycoris"]
TRANSFORMER = ["peft", "diffusers", "comfyui"]
FILES = {"gguf": ".gguf", **dict.fromkeys(("diffusers", "kohya", "lycoris", "comfyui"), ".safetensors")}
# The layers of the UNet that are adapted: linear ones and convolutions.
LAYERS = {name: shape for name, shape in bases.unet().items() if re.search(r"attentions|resnets\.0\.conv1", name)}


def test_each_format_is_paired() -> None:
    assert {*TEXT, *IMAGE, *TRANSFORMER} == set(registry.targets()) == TABLE.keys()


# -- the pairs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=SIZE,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    folder = tmp_path_factory.mktemp("llama")
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.stored(tmp_path_factory.mktemp("unet") / "unet", bases.unet())


def llama_layers() -> bases.Shapes:
    block: bases.Shapes = {
        "self_attn.q_proj": (HEADS * SIZE, HIDDEN),
        "self_attn.k_proj": (KEY_HEADS * SIZE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * SIZE),
        "mlp.down_proj": (HIDDEN, 40),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}


def assert_same(changes: Changes, expected: Changes) -> None:
    assert changes.keys() == expected.keys()
    for path, change in changes.items():
        assert change.shape == expected[path].shape
        assert (change - expected[path]).norm() <= 1e-6 * expected[path].norm(), path


def place(folder: Path, name: str) -> Path:
    return folder / f"{name}{FILES.get(name, '')}"


def check_pair(folder: Path, adapter: Path, base: Path, one: str, other: str) -> None:
    """Convert PEFT's adapter to one format, and that to the other, and read both here."""
    expected = of_peft(adapter)
    first, second = place(folder / "first", one), place(folder / "second", other)
    veneer.convert(adapter, first, to=one, base=base)
    assert_same(READERS[one](first), expected)
    veneer.convert(first, second, to=other, base=base)
    assert_same(READERS[other](second), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("one", "other"), list(itertools.product(TEXT, TEXT)))
def test_text(one: str, other: str, options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    adapter = bases.lora(tmp_path / "adapter", llama_layers(), **options)
    check_pair(tmp_path, adapter, llama, one, other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("one", "other"), list(itertools.product(IMAGE, IMAGE)))
def test_images(one: str, other: str, options: dict[str, Any], unet: Path, tmp_path: Path) -> None:
    adapter = bases.lora(tmp_path / "adapter", LAYERS, **options)
    check_pair(tmp_path, adapter, unet, one, other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("one", "other"), list(itertools.product(TRANSFORMER, TRANSFORMER)))
def test_transformers(one: str, other: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "transformer", bases.flux())
    layers = {name: shape for name, shape in bases.flux().items() if "attn" in name or ".ff." in name}
    check_pair(tmp_path, bases.lora(tmp_path / "adapter", layers, **options), base, one, other)


@pytest.mark.parametrize(
    "name", [name for name in dict.fromkeys((*TEXT, *IMAGE)) if TABLE[name].scales == TABLE[name].ranks == EXACT]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_come_back_where_a_format_holds_all(name: str, dtype: torch.dtype, tmp_path: Path, unet: Path) -> None:
    from safetensors.torch import save_file

    adapter = bases.lora(tmp_path / "adapter", LAYERS, **OPTIONS["mixed"])
    weights = adapter / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(weights).items()}, weights)
    veneer.convert(adapter, place(tmp_path, name), to=name, base=unet)
    veneer.convert(place(tmp_path, name), tmp_path / "again", base=unet)
    tensors, back = load_file(weights), load_file(tmp_path / "again" / weights.name)
    assert tensors.keys() == back.keys()
    assert all(torch.equal(tensor, back[key]) and tensor.dtype == back[key].dtype for key, tensor in tensors.items())


@pytest.mark.parametrize("name", [name for name in TEXT if name != "peft"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_config_comes_back(name: str, options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    adapter = bases.lora(tmp_path / "adapter", llama_layers(), lora_dropout=0.25, task_type="CAUSAL_LM", **options)
    veneer.convert(adapter, tmp_path / "once", base=llama)
    veneer.convert(adapter, place(tmp_path, name), to=name, base=llama)
    veneer.convert(place(tmp_path, name), tmp_path / "again", base=llama)
    assert_same(of_peft(tmp_path / "again"), of_peft(adapter))
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("once", "again")]
    assert configs[0] == configs[1]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    alphas=st.lists(st.one_of(st.integers(0, 40), st.floats(0.01, 40)), min_size=3, max_size=3),
    use_rslora=st.booleans(),
    pair=st.sampled_from(list(itertools.product(TEXT, TEXT))),
)
def test_any_ranks_and_alphas(
    ranks: list[int],
    alphas: list[float],
    use_rslora: bool,
    pair: tuple[str, str],
    llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    options = {
        "r": ranks[0],
        "lora_alpha": alphas[0],
        "rank_pattern": {"q_proj": ranks[1], r"layers\.1\.self_attn\.k_proj": ranks[2]},
        "alpha_pattern": {"o_proj": alphas[1], r"layers\.1\.mlp\.down_proj": alphas[2]},
    }
    adapter = bases.lora(folder / "adapter", llama_layers(), use_rslora=use_rslora, **options)
    check_pair(folder, adapter, llama, *pair)
