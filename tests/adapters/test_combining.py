"""Several adapters combined into one: each kind by its definition, and as peft has it where peft's is the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, config, enlarge
from veneer.adapters.merge.combining import drop_at_random, elect, keep_largest
from veneer.errors import ConfigError, DuplicateAdapterError, UnknownAdapterError, UnsupportedError
from veneer.patches.low_rank import truncated, truncated_product

X = inputs("llama")
CLOSE = 2e-5
LAYER = "model.layers.1.mlp.down_proj"


def pair(arch: str = "llama", **second: Any) -> veneer.PeftModel:
    """Two adapters of different rank, scale and layers."""
    model = adapted(arch, r=4, lora_alpha=6)
    case: dict[str, Any] = {"r": 2, "rank_pattern": {"v_proj": 3}, "use_rslora": True, **second}
    model.add_adapter("other", config(arch, **case))
    enlarge(model, "other", 5)
    return model.eval()


def change(model: veneer.PeftModel, name: str, layer: str = LAYER) -> Tensor:
    """What an adapter adds to a layer's weight."""
    with torch.no_grad():
        (patch,) = model.adapters.layers[layer].patches([name])
        assert patch.up is not None
        assert patch.down is not None
        return patch.scale * patch.up.float() @ patch.down.float()


def summed(model: veneer.PeftModel, weights: tuple[float, float] = (0.7, -0.4), layer: str = LAYER) -> Tensor:
    return weights[0] * change(model, "default", layer) + weights[1] * change(model, "other", layer)


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_the_exact_kinds_are_the_sum_of_the_changes(kind: str, tmp_path: Path) -> None:
    model = pair()
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both", kind)
    for layer in model.adapters.get("both").layers.names:
        assert gap(change(model, "both", layer), summed(model, layer=layer)) < CLOSE
    model.set_adapter("both")
    expected = logits(model, X)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "both")
    assert torch.equal(logits(again, X), expected)
    assert gap(logits(again.merge_and_unload(), X), expected) < CLOSE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "both").eval()
    assert gap(logits(theirs, X), expected) < CLOSE


def test_linear_takes_no_more_rank_than_it_needs() -> None:
    model = adapted("llama")
    model.add_weighted_adapter(["default"], [1.0], "scaled", "linear")
    assert model.peft_config["scaled"].r == model.peft_config["default"].r  # type: ignore[attr-defined]
    assert gap(change(model, "scaled"), change(model, "default")) < CLOSE


def test_one_adapter_taken_away_from_itself_changes_nothing() -> None:
    model = adapted("llama")
    with model.disable_adapter():
        base = logits(model, X)
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "none", "linear")
    model.set_adapter("none")
    assert gap(logits(model, X), base) < CLOSE


def test_svd_is_the_nearest_of_its_rank() -> None:
    model = pair()
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "near", "svd", svd_rank=3)
    total = summed(model)
    u, s, v = torch.linalg.svd(total)
    best = (u[:, :3] * s[:3]) @ v[:3]
    assert gap(change(model, "near"), best) < CLOSE
    assert gap(change(model, "near"), total) > 0.01


TASKS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "magnitude_prune": lambda d: 0.7 * keep_largest(d[0], 0.4) + 0.5 * keep_largest(d[1], 0.4),
    "ties": lambda d: elect(torch.stack([0.7 * keep_largest(d[0], 0.4), 0.5 * keep_largest(d[1], 0.4)]), "total"),
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("ending", ["", "_svd"])
def test_the_pruning_kinds_work_on_whole_changes(kind: str, ending: str) -> None:
    model = pair()
    model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "x", kind + ending, svd_rank=32, density=0.4)
    expected = TASKS[kind]([change(model, "default"), change(model, "other")])
    assert gap(change(model, "x"), expected) < CLOSE


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_is_repeatable_and_right_on_average(kind: str) -> None:
    model = pair()
    for name in ("a", "b"):
        model.add_weighted_adapter(["default", "other"], [1, 1], name, kind, svd_rank=32, density=0.5, seed=3)
    assert torch.equal(change(model, "a"), change(model, "b"))
    model.add_weighted_adapter(["default", "other"], [1, 1], "all", kind, svd_rank=32, density=1.0)
    whole = [change(model, "default"), change(model, "other")]
    assert (
        gap(change(model, "all"), sum(whole) if kind == "dare_linear" else elect(torch.stack(whole), "total")) < CLOSE
    )
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(100, 100)
    assert abs(float(drop_at_random(ones, 0.3, generator).mean()) - 1) < 0.05


def test_what_elect_and_keep_do() -> None:
    values = torch.tensor([[3.0, -1.0, 0.0], [1.0, -2.0, 5.0], [-2.0, 2.0, -1.0]])
    assert torch.equal(elect(values, "total"), torch.tensor([2.0, -1.5, 5.0]))
    assert torch.equal(elect(values, "frequency"), torch.tensor([2.0, -1.5, 5.0]))
    assert torch.equal(elect(torch.tensor([[3.0], [-1.0], [-1.0]]), "frequency"), torch.tensor([-1.0]))
    assert torch.equal(
        keep_largest(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5), torch.tensor([[0.0, -4.0], [3.0, 0.0]])
    )


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd", "magnitude_prune_svd"])
def test_as_in_peft(kind: str, tmp_path: Path) -> None:
    """Where peft's own definition is on whole changes, with scales of one and equal weights."""
    ours = adapted("llama", r=4, lora_alpha=4)
    ours.add_adapter("other", config("llama", r=4, lora_alpha=4))
    enlarge(ours, "other", 5)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
        theirs.load_adapter(tmp_path / "other", adapter_name="other")
        options = {} if kind in ("svd", "cat") else {"density": 0.5}
        theirs.add_weighted_adapter(["default", "other"], [0.5, 0.5], "x", kind, **options)
        theirs.set_adapter("x")
    ours.add_weighted_adapter(["default", "other"], [0.5, 0.5], "x", kind, **options)
    ours.set_adapter("x")
    assert gap(logits(ours.eval(), X), logits(theirs.eval(), X)) < 1e-4


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_other_networks(arch: str) -> None:
    options: dict[str, Any] = {"task_type": None}
    model = adapted(arch, **options)
    model.add_adapter("other", config(arch, r=2, **options))
    enlarge(model, "other", 5)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    model.set_adapter(["default", "other"])
    expected = logits(model.eval(), inputs(arch))
    model.set_adapter("both")
    assert gap(logits(model, inputs(arch)), expected) < 1e-4


def test_embeddings_and_other_methods_too() -> None:
    model = adapted("llama", target_modules=["embed_tokens", "q_proj"])
    model.add_adapter("dora", config("llama", target_modules=["q_proj"], use_dora=True))
    enlarge(model, "dora", 4)
    model.add_weighted_adapter(["default", "dora"], [1.0, 1.0], "both", "svd", svd_rank=32)
    layer = model.adapters.layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        weight = layer.base_weight()
        (patch,) = layer.patches(["dora"])
        dora = patch.changed_rows(weight.clone(), 0, len(weight)) - weight
    wanted = change(model, "default", layer.site.id) + dora
    assert gap(change(model, "both", layer.site.id), wanted) < CLOSE
    assert gap(change(model, "both", "model.embed_tokens"), change(model, "default", "model.embed_tokens")) < CLOSE


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_nearest_of_a_product_and_of_a_matrix_agree(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)  # by chance two singular values are as good as equal
    up, down = (torch.randn(*batch, *shape, generator=generator) for shape in ((20, 6), (6, 11)))
    for rank in (2, 6, None):
        (a, b), (c, d) = truncated_product(up, down, rank), truncated(up @ down, rank)
        assert a.shape[-1] == (rank or 6)
        assert torch.allclose(a @ b, c @ d, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"combination_type": "linea"}, ConfigError, "Unknown combination_type 'linea'"),
        ({"weights": [1.0]}, ConfigError, "2 adapters and 1 weights"),
        ({"combination_type": "ties"}, ConfigError, "needs density"),
        ({"combination_type": "ties", "density": 1.5}, ConfigError, "density"),
        ({"svd_rank": 0}, ConfigError, "svd_rank=0"),
        ({"majority_sign_method": "most"}, ConfigError, "majority_sign_method"),
        ({"adapters": ["default", "othr"]}, UnknownAdapterError, "Did you mean 'other'"),
        ({"adapter_name": "other"}, DuplicateAdapterError, "already"),
    ],
)
def test_what_cannot_be_combined(change: dict[str, Any], error: type[Exception], words: str) -> None:
    call = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "x", **change}
    with pytest.raises(error, match=words):
        pair().add_weighted_adapter(**call)


def test_a_whole_module_comes_along_from_the_one_adapter_that_brings_it() -> None:
    model = adapted("llama", modules_to_save=["lm_head"])
    model.add_adapter("other", config(target_modules=["k_proj"]))
    with torch.no_grad():
        head = model.base_model.model.lm_head.modules_to_save["default"].weight
        head.add_(1.0)
    expected = logits(model, X)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "both", "cat")
    assert model.peft_config["both"].modules_to_save == ["lm_head"]  # type: ignore[attr-defined]
    model.set_adapter("both")
    assert gap(logits(model, X), expected) < CLOSE
    with torch.no_grad():
        head.zero_()
    assert gap(logits(model, X), expected) < CLOSE


def test_two_adapters_that_bring_the_same_module_whole_cannot_be_combined() -> None:
    model = adapted("llama", modules_to_save=["lm_head"])
    model.add_adapter("other", config(modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedError, match=r"1 such instance\(s\). No weighting of lm_head is defined"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "x")


def test_what_cancels_out_is_exactly_nothing() -> None:
    model = adapted("llama")
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "none", "linear")
    assert model.peft_config["none"].r == 1  # type: ignore[attr-defined]
    assert not change(model, "none").any()
