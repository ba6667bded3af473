"""EVA: the ranks and directions that peft finds, and an adapter that loads in both."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, config_of, scramble

pytestmark = pytest.mark.oracle

LINEAR = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "down_proj"]}
CLOSE = 1e-5


def data(batches: int = 6, rows: int = 6, length: int = 8) -> list[dict[str, Tensor]]:
    """Batches of text with padding and with labels that leave out the first token."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(batches):
        # Some tokens are common, as in a language: so the directions differ in what they explain.
        ids = 3 + (torch.rand(rows, length, generator=generator) ** 4 * 90).long()
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = ids.clone()
        labels[:, 0] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def ours(options: dict[str, Any], base: nn.Module | None = None, **eva: Any) -> veneer.PeftModel:
    config = veneer.LoraConfig(init_lora_weights="eva", eva_config=veneer.EvaConfig(**eva), **{**LINEAR, **options})
    model = veneer.get_peft_model(base or build("llama"), config, seed=2)
    veneer.initialize_lora_eva_weights(model, data())
    return model.eval()


def theirs(options: dict[str, Any], **eva: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**eva), **{**LINEAR, **options})
        model = peft.get_peft_model(build("llama"), config)
        peft.initialize_lora_eva_weights(model, data(), show_progress_bar=False)
    return model.eval()


def starts(model: Any) -> dict[str, Tensor]:
    """Layer's name -> its ``A``."""
    return {n.partition(".lora_A")[0]: p.detach() for n, p in model.named_parameters() if ".lora_A." in n}


@pytest.mark.parametrize(
    ("options", "eva"),
    [
        ({}, {"rho": 1.0}),
        ({}, {"rho": 1.5, "tau": 0.9}),
        # peft divides twice where two layers have one input, so here none do.
        ({"target_modules": ["q_proj", "down_proj"]}, {"rho": 1.0, "whiten": True, "use_label_mask": False}),
        ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 9}}, {"rho": 2.0, "tau": 0.9}),
        ({"r": 2}, {"rho": 4.0, "tau": 0.9, "adjust_scaling_factors": False}),
    ],
)
def test_ranks_and_directions_are_those_of_peft(options: dict[str, Any], eva: dict[str, Any]) -> None:
    mine, other = ours(options, **eva), theirs(options, **eva)
    assert starts(mine).keys() == starts(other).keys()
    for name, down in starts(other).items():
        # The decomposition is an estimate, and leaves signs open.
        assert float(torch.cosine_similarity(starts(mine)[name], down).abs().min()) > 0.98, name
        assert gap(starts(mine)[name].norm(dim=1), down.norm(dim=1)) < 1e-2, name
    for pattern in ("rank_pattern", "alpha_pattern"):
        assert getattr(mine.peft_config["default"], pattern) == getattr(other.peft_config["default"], pattern)
    assert gap(logits(mine, inputs("llama")), logits(build("llama"), inputs("llama"))) < CLOSE


def test_the_directions_are_the_principal_ones_of_the_inputs() -> None:
    seen: list[Tensor] = []
    base = build("llama")
    layer = base.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    for batch in data():
        base(**batch)
    handle.remove()
    kept = torch.cat([x[(b["attention_mask"] == 1) & (b["labels"] != -100)] for x, b in zip(seen, data(), strict=True)])
    _, _, directions = torch.linalg.svd(kept - kept.mean(0), full_matrices=False)
    mine = starts(ours({"r": 2}, base, rho=1.0, tau=0.999))["base_model.model.model.layers.1.mlp.down_proj"]
    assert float((mine * directions[:2]).sum(1).abs().min()) > 0.99


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_saved_it_loads_in_both_with_its_ranks(options: dict[str, Any], tmp_path: Path) -> None:
    model = ours({"r": 2, **options}, rho=3.0, tau=0.9)
    assert len(set(map(len, starts(model).values()))) > 1
    expected = logits(scramble(model), inputs("llama"))
    assert gap(expected, logits(build("llama"), inputs("llama"))) > VISIBLE
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["rank_pattern"]
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    there = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert gap(logits(here, inputs("llama")), expected) < CLOSE
    assert gap(logits(there, inputs("llama")), expected) < CLOSE
    assert gap(logits(model.merge_and_unload(), inputs("llama")), expected) < CLOSE


def test_what_peft_began_and_saved_loads_here(tmp_path: Path) -> None:
    other = theirs({"r": 2}, rho=3.0, tau=0.9)
    expected = logits(scramble(other), inputs("llama"))
    other.save_pretrained(tmp_path)
    assert gap(logits(veneer.PeftModel.from_pretrained(build("llama"), tmp_path), inputs("llama")), expected) < CLOSE


def test_a_layer_without_a_rank_has_no_adapter() -> None:
    model = ours({"r": 1}, rho=6.0, tau=0.9)
    left = starts(model)
    assert 0 < len(left) < 6
    config = model.peft_config["default"]
    assert sum(map(len, left.values())) == 6
    assert {"base_model.model." + name for name in config.target_modules} == left.keys()
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * len(left)


def test_the_figures_can_be_made_on_the_base_and_used_later() -> None:
    config = veneer.LoraConfig(init_lora_weights="eva", **LINEAR)
    base = build("llama")
    found = veneer.get_eva_state_dict(base, data(), config)
    model = veneer.get_peft_model(base, config)
    veneer.initialize_lora_eva_weights(model, eva_state_dict=found)
    assert all(torch.equal(found[name.removeprefix("base_model.model.")], down) for name, down in starts(model).items())


def test_what_of_the_inputs_is_looked_at_can_be_chosen() -> None:
    def last(x: Tensor, known: Any, name: str) -> Tensor:
        assert known is None
        return x[:, -4:].flatten(0, 1)

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["input_ids"])

    config = veneer.LoraConfig(init_lora_weights="eva", **LINEAR)
    everything, own = (
        veneer.get_eva_state_dict(
            build("llama"), data(), config, run, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=rows
        )
        for rows in (None, last)
    )
    assert any(not torch.equal(everything[name], own[name]) for name in own)


def wrong_state(model: veneer.PeftModel) -> None:
    veneer.initialize_lora_eva_weights(model, eva_state_dict={"model.layers.0.self_attn.q_proj": torch.ones(2, 5)})


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda m: veneer.initialize_lora_eva_weights(m), veneer.ConfigError, "needs data"),
        (lambda m: veneer.initialize_lora_eva_weights(m, []), veneer.ConfigError, "no batch"),
        (lambda m: veneer.initialize_lora_eva_weights(m, data(3, 1, 5)), veneer.ConfigError, "no batch has 8 rows"),
        (wrong_state, veneer.ConfigError, "32 entries"),
        (lambda m: veneer.get_eva_state_dict(build("llama"), data()), veneer.ConfigError, "peft_config"),
        (lambda m: veneer.EvaConfig(rho=0.5), veneer.ConfigError, "rho"),
        (
            lambda m: veneer.initialize_lora_eva_weights(
                m, [{**b, "attention_mask": b["attention_mask"] * 0} for b in data()]
            ),
            veneer.ConfigError,
            "no batch has",
        ),
    ],
)
def test_each_mistake_has_its_error(act: Any, kind: type[Exception], message: str) -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(init_lora_weights="eva", **LINEAR))
    with pytest.raises(kind, match=message):
        act(model)


def test_it_is_for_adapters_that_begin_so() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**LINEAR))
    with pytest.raises(veneer.AdapterError, match="does not begin by EVA"):
        veneer.initialize_lora_eva_weights(model, data())
