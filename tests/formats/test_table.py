"""The table of what formats hold: the page shows it, and each cell of it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.formats import diffusion_bases as bases
from veneer.errors import UnsupportedError
from veneer.formats import registry
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.scaling import fitted
from veneer.formats.table import NAMES, OPTIONS, REFUSE, TABLE, check, features, features_of

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def page_table() -> str:
    titles = {name: registry.target(name).title for name in TABLE}
    head = ["", *(f"{title} (`{name}`)" for name, title in titles.items())]
    rows = [[NAMES[feature], *(getattr(holds, feature) for holds in TABLE.values())] for feature in features()]
    methods = ["methods", *(", ".join(holds.methods) for holds in TABLE.values())]
    lines = [head, ["---"] * len(head), *rows, methods]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def test_the_page_shows_it() -> None:
    assert page_table() in PAGE.read_text(encoding="utf-8"), page_table()


def change(**leaves: Any) -> ModuleChange:
    tensors = {leaf.replace("__", "."): tensor for leaf, tensor in leaves.items()}
    return ModuleChange("layer", "LORA", tensors, 2, 1.0, is_parameter=leaves.pop("parameter", False))


WITH = {
    "dora": {"lora_A__weight": torch.ones(2, 3), "lora_magnitude_vector": torch.ones(4)},
    "lora_bias": {"lora_A__weight": torch.ones(2, 3), "lora_B__bias": torch.ones(4)},
    "embeddings": {"lora_embedding_A": torch.ones(2, 3)},
    "convolutions": {"lora_A__weight": torch.ones(2, 3, 1, 1)},
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("feature", WITH)
def test_what_is_refused_is_refused_with_the_way_out(name: str, feature: str) -> None:
    adapter = CanonicalAdapter({"layer": change(**WITH[feature])})
    assert features_of(adapter.modules["layer"]) == {feature}
    if getattr(TABLE[name], feature) != REFUSE:
        check(adapter, name, name)
        return
    with pytest.raises(UnsupportedError, match=r"cannot hold .*: layer\..*(--as-lora|veneer merge)"):
        check(adapter, name, name)


@pytest.mark.parametrize("name", [name for name in TABLE if name != "peft"])
def test_other_refusals(name: str) -> None:
    plain = change(lora_A__weight=torch.ones(2, 3), lora_B__weight=torch.ones(4, 2))
    with pytest.raises(UnsupportedError, match=r"trained whole.*head\.weight.*veneer merge"):
        check(CanonicalAdapter({"layer": plain}, {"head.weight": torch.ones(2)}), name, name)
    for option in OPTIONS.keys() - set(TABLE[name].options):
        with pytest.raises(UnsupportedError, match=option):
            check(CanonicalAdapter({"layer": plain}, config={option: True}), name, name)
    with pytest.raises(UnsupportedError, match="pissa"):
        check(CanonicalAdapter({"layer": plain}, config={"init_lora_weights": "pissa"}), name, name)
    with pytest.raises(UnsupportedError, match=r"method VERA.*--as-lora"):
        check(CanonicalAdapter({"layer": ModuleChange("layer", "VERA", {}, 2, 1.0)}), name, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_is_exact_or_in_float32(dtype: torch.dtype) -> None:
    up = torch.randn(4, 2).to(dtype)
    one = ModuleChange("a", "LORA", {"lora_A.weight": torch.ones(2, 3, dtype=dtype), "lora_B.weight": up}, 2, 1.0)
    for factor, kept in ((4.0, True), (0.3, dtype == torch.float32)):
        two = ModuleChange("b", "LORA", one.leaves, 2, factor)
        others = {f"c{i}": ModuleChange(f"c{i}", "LORA", one.leaves, 2, 1.0) for i in range(2)}
        fit = fitted(CanonicalAdapter({"a": one, "b": two, **others}), "serving", "a server")
        folded = fit.adapter.modules["b"].leaves["lora_B.weight"]
        assert (fit.scale, folded.dtype == dtype) == (1.0, kept)
        torch.testing.assert_close(folded.double(), factor * up.double(), rtol=1e-7, atol=0)
        assert fit.adapter.modules["a"] is one
        assert [(step.kind, step.modules) for step in fit.steps] == [("exact", ("a", "c0", "c1")), ("folded", ("b",))]
        assert fit.steps[1].error < 1e-7


def test_a_stack_of_experts_is_padded_expert_by_expert(tmp_path: Path) -> None:
    experts, rank, wider, inner, outer = 3, 2, 5, 4, 6
    down, up = torch.randn(experts, rank, inner), torch.randn(outer, rank, experts)
    leaves = {"lora_A.weight": down.flatten(0, 1), "lora_B.weight": up.flatten(1, 2)}
    stack = ModuleChange("m.experts.w", "LORA", leaves, rank, 2.0, is_parameter=True)
    plain = ModuleChange(
        "m.q", "LORA", {"lora_A.weight": torch.ones(wider, 4), "lora_B.weight": torch.ones(3, wider)}, wider, 2.0
    )
    fit = fitted(CanonicalAdapter({c.path: c for c in (stack, plain)}), "mlx", "MLX-LM")
    padded = fit.adapter.modules["m.experts.w"]
    a = padded.leaves["lora_A.weight"].reshape(experts, wider, inner)
    b = padded.leaves["lora_B.weight"].reshape(outer, wider, experts)
    torch.testing.assert_close(torch.einsum("ore,eri->eoi", b, a), torch.einsum("ore,eri->eoi", up, down))
    assert padded.rank == fit.rank == wider


def test_the_example_of_the_facts(tmp_path: Path) -> None:
    """In = out = 4, r = 2, alpha = 4 with rsLoRA: one whole alpha, and the root of two in B."""
    a = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 3]])
    b = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0]])
    values = veneer.LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["q"]).to_dict()
    tensors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    veneer.convert(bases.adapter(tmp_path / "adapter", values, tensors), tmp_path / "served", to="serving")
    config = veneer.PeftConfig.from_pretrained(tmp_path / "served")
    assert isinstance(config, veneer.LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora) == (2, 4, False)
    from safetensors.torch import load_file

    served = load_file(tmp_path / "served" / "adapter_model.safetensors")
    torch.testing.assert_close(served["base_model.model.q.lora_B.weight"], b * 2**0.5)
