"""What LoRA's variants do beyond the contract: in training, and where they are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from safetensors.torch import load_file
from torch import Tensor

import veneer
from tests.methods.networks import NETWORKS
from tests.models import gap
from veneer.errors import ConfigError, UnsupportedError, VeneerError
from veneer.methods.lora_variants.monteclora import SHARES, MonteClora
from veneer.methods.lora_variants.variant import LORA_A
from veneer.patches.patch import Patch

LLAMA = NETWORKS["llama"]
TARGETS = ["q_proj", "down_proj"]


def _options(**more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **more}


@torch.no_grad()
def _made(folder: Path, **more: Any) -> Any:
    """A model of peft's with such an adapter, which it has saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(LLAMA.make(), peft.LoraConfig(**_options(**more)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(folder)
    return model


def _learned(model: Any) -> dict[str, Tensor]:
    """The gradients of one training step, and the projections that it leaves."""
    torch.manual_seed(5)
    LLAMA.output(model.train()).float().square().mean().backward()
    named = [*model.named_parameters(), *model.named_buffers()]
    found = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
    return found | {name: tensor.detach() for name, tensor in named if "velora_embed" in name}


@pytest.mark.oracle
@pytest.mark.parametrize(
    "velora",
    [{"num_groups": 8}, {"num_groups": 5, "scale": 2.0}, {"num_groups": 8, "init_type": "random"}],
    ids=["groups", "uneven groups", "random"],
)
def test_velora_learns_as_in_peft(velora: dict[str, Any], tmp_path: Path) -> None:
    theirs = _learned(_made(tmp_path, velora_config=velora, lora_dropout=0.1))
    ours = _learned(veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path, is_trainable=True))
    assert ours.keys() == theirs.keys()
    assert all(bool(tensor.any()) for tensor in ours.values())
    for name, tensor in theirs.items():
        assert gap(ours[name], tensor) < 1e-5, name


def test_velora_keeps_the_first_projection_where_it_is_asked_to() -> None:
    config = veneer.LoraConfig(**_options(velora_config=veneer.VeloraConfig(4, init_type="batch_average_once")))
    model = veneer.get_peft_model(LLAMA.make(), config).train()
    first = {name: t.clone() for name, t in _learned(model).items() if "embed" in name}
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    assert all(torch.equal(tensor, first[name]) for name, tensor in _learned(model).items() if "embed" in name)


def _penalty(model: Any) -> Tensor:
    """What is added to the loss of a step in training."""
    batch = {**LLAMA.batch(), "labels": LLAMA.batch()["input_ids"]}
    plain: Tensor = model.eval()(**batch).loss
    trained: Tensor = model.train()(**batch).loss
    return trained - plain


@pytest.mark.oracle
def test_kasa_adds_its_penalty_to_the_loss(tmp_path: Path) -> None:
    theirs = _made(tmp_path, kasa_config={"beta": 0.3, "gamma": 0.2})
    ours = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path, is_trainable=True)
    assert _penalty(ours).item() == pytest.approx(theirs.base_model._get_kasa_loss().item(), rel=1e-4)


@torch.no_grad()
def test_kasa_gives_up_what_the_weight_has_least_of() -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(**_options(kasa_config=veneer.KasaConfig())))
    weight = LLAMA.make().model.layers[0].self_attn.q_proj.weight
    kept = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    values = torch.linalg.svdvals(weight)
    assert gap(torch.linalg.svdvals(kept)[:-4], values[:-4]) < 1e-5
    assert torch.linalg.svdvals(kept)[-4:].max() < 1e-5
    assert values[-4:].max() > 1e-2


def test_montecloras_noise_has_the_law_of_peers() -> None:
    options = veneer.MontecloraConfig(num_samples=3, sample_scaler=0.1)
    torch.manual_seed(0)
    sampler = MontecloraSampler(32, 4, buffer_size=300, device="cpu", num_samples=3, sample_scaler=0.1)
    tensors = MonteClora(4, options).init(None, None)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(sampler, name.rpartition(".")[2]).copy_(tensor)
        theirs = torch.stack(
            [torch.einsum("n,nij->ji", weights, noise) for noise, weights in (sampler() for _ in range(300))]
        )
        patch = MonteClora(4, options).patch(Patch(up=torch.ones(2, 4), down=torch.zeros(4, 32)), tensors)
        assert patch.drop is not None
        ours = torch.stack([patch.drop(patch).down for _ in range(300)])
    assert gap(ours.std((0, 2)), theirs.std((0, 2))) < 0.15
    assert gap(ours.square().mean(2).std(0), theirs.square().mean(2).std(0)) < 0.3


def test_monteclora_is_a_lora_but_for_training() -> None:
    options = veneer.MontecloraConfig(num_samples=3, sample_scaler=0.05, use_entropy=True, kl_loss_weight=1e-3)
    config = veneer.LoraConfig(**_options(monteclora_config=options, init_lora_weights=False))
    model = veneer.get_peft_model(LLAMA.make(), config)
    plain = veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(**_options(init_lora_weights=False)))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(model.get_parameter(name))
    assert gap(LLAMA.read(model.eval()), LLAMA.read(plain.eval())) == 0
    assert gap(LLAMA.read(model.train()), LLAMA.read(plain.train())) > 1e-4
    assert _penalty(model).item() > 0.2
    name = next(name for name, _ in model.named_parameters() if SHARES.partition(".")[2] in name)
    _learned(model)
    assert bool(model.get_parameter(name).grad.any())


def test_variants_are_saved_for_the_base_as_it_is(tmp_path: Path) -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(**_options(kasa_config=veneer.KasaConfig())))
    model.save_pretrained(tmp_path)
    keys = {key.rpartition("proj.")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {LORA_A, "lora_B.weight", "lora_diag"}
    config = veneer.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, veneer.LoraConfig)
    assert (config.r, config.kasa_config) == (4, veneer.KasaConfig())


def test_kasa_becomes_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    options = _options(kasa_config=veneer.KasaConfig(), init_lora_weights=False)
    model = veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(**options))
    expected = LLAMA.read(model.eval())
    assert veneer.convert_to_lora(model, out=tmp_path / "lora", rank=8).error < 1e-5
    assert gap(LLAMA.read(veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path / "lora")), expected) < 1e-5


BLOCKS = veneer.BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=3)
REFUSED: dict[str, tuple[dict[str, Any], type[VeneerError], str]] = {
    "two of them": ({"kasa_config": {}, "velora_config": {}}, ConfigError, "exclude each other"),
    "with DoRA": ({"kasa_config": {}, "use_dora": True}, ConfigError, "exclude each other"),
    "no blocks named": ({"use_bdlora": True}, ConfigError, "must be a `BdLoraConfig`"),
    "a bias": ({"use_bdlora": BLOCKS, "lora_bias": True}, ConfigError, "lora_bias"),
    "uneven blocks": ({"use_bdlora": BLOCKS}, UnsupportedError, "nblocks=3"),
    "neither factor": ({"use_bdlora": {"target_modules_bd_a": ["down_proj"]}}, ConfigError, "neither"),
    "both factors": ({"use_bdlora": {f"target_modules_bd_{x}": ["proj"] for x in "ab"}}, ConfigError, "overlapping"),
    "a moved start": ({"kasa_config": {}, "init_lora_weights": "pissa"}, UnsupportedError, "pissa"),
    "a large rank": ({"kasa_config": {}, "r": 500}, UnsupportedError, "nothing would be left"),
    "an embedding": ({"velora_config": {}, "target_modules": ["embed_tokens"]}, UnsupportedError, "velora_config"),
    "a bad option": ({"velora_config": {"init_type": "x"}}, ConfigError, "init_type"),
    "too small an option": ({"monteclora_config": {"num_samples": 0}}, ConfigError, "num_samples"),
    "a negative option": ({"kasa_config": {"beta": -1.0}}, ConfigError, "beta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_defined_is_refused(name: str) -> None:
    options, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(**_options(**options)))


def test_a_variant_cannot_be_padded_for_hot_swapping() -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(**_options(kasa_config=veneer.KasaConfig())))
    with pytest.raises(UnsupportedError, match="more than a LoRA"):
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=8)
