"""Biases that are trained are the base's own parameters, and the base's values are never lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import BertConfig, BertForMaskedLM

import veneer
from tests.models import gap


class Net(nn.Module):
    """One layer of each kind that has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 8, 1)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).unsqueeze(1)
        x = self.conv(self.attention(x, x, x)[0].mT)
        return self.last(x.squeeze(2))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
ALL = {"first", "norm", "attention.out_proj", "conv", "last"}


def net(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype).eval()


def config(bias: str = "all", targets: tuple[str, ...] = ("first", "attention", "conv"), **options: Any) -> Any:
    return veneer.LoraConfig(target_modules=list(targets), bias=bias, init_lora_weights=False, **options)


def train(model: nn.Module, x: Tensor = X) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).float().square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def read(model: nn.Module, **options: Any) -> Tensor:
    return model(X.to(next(model.parameters()).dtype), **options)


def trained(model: nn.Module) -> set[str]:
    names = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    return {n.removeprefix("base_model.model.").replace("base_layer.", "").removesuffix(".bias") for n in names}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bias", "targets", "names"),
    [
        ("all", ("first", "attention", "conv"), ALL),
        ("all", ("first",), ALL),
        ("lora_only", ("first", "attention", "conv"), {"first", "attention.out_proj", "conv"}),
        ("lora_only", ("first",), {"first"}),
    ],
)
def test_the_bases_own_biases_are_trained_and_come_back(
    bias: str, targets: tuple[str, ...], names: set[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = net(dtype)
    own, before, plain = dict(base.named_parameters()), copy.deepcopy(base.state_dict()), read(base)
    close = 1e-5 if dtype is torch.float32 else 5e-2
    model = veneer.get_peft_model(base, config(bias, targets))
    assert trained(model) == names
    assert model.base_model.model.first.bias is own["first.bias"]
    train(model)
    assert not torch.equal(own["first.bias"], before["first.bias"])
    expected = read(model)
    assert gap(model(X.to(dtype)).detach(), expected) < close
    with model.disable_adapter():
        assert torch.equal(read(model), plain)

    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        loaded = veneer.PeftModel.from_pretrained(net(dtype), tmp_path, is_trainable=is_trainable).eval()
        assert gap(read(loaded), expected) < close
        assert trained(loaded) == (names if is_trainable else set())

    base_state = veneer.get_base_model_state_dict(model)
    assert base_state.keys() == before.keys()
    assert all(torch.equal(base_state[name], tensor) for name, tensor in before.items())
    model.merge_adapter()
    assert gap(read(model), expected) < close
    with model.disable_adapter():
        assert torch.equal(read(model), plain)
    base_state = veneer.get_base_model_state_dict(model)
    assert all(torch.equal(base_state[name], tensor) for name, tensor in before.items())
    model.unmerge_adapter()
    assert torch.equal(read(model), expected)
    assert trained(model) == names

    rows = read(model, adapter_names=["default", "default", "__base__", "__base__", "default"])
    assert gap(rows[[0, 1, 4]], expected[[0, 1, 4]]) < close
    assert torch.equal(rows[2:4], plain[2:4])

    assert model.unload() is base
    assert dict(base.named_parameters()).keys() == own.keys()
    assert all(parameter is own[name] for name, parameter in base.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in own.values())


def test_several_adapters_each_have_their_own() -> None:
    model = veneer.get_peft_model(net(), config())
    train(model)
    first = read(model)
    model.add_adapter("other", config("all", ("last",)))
    model.set_adapter("other")
    assert "last.trained_bias.other" in {name.removeprefix("base_model.model.") for name, _ in model.named_parameters()}
    train(model)
    other = read(model)
    assert gap(first, other) > 0.02
    for _ in range(2):
        model.set_adapter("default")
        assert gap(read(model), first) < 1e-6
        model.set_adapter("other")
        assert torch.equal(read(model), other)
    assert gap(read(model, adapter_names=["default"] * 2 + ["other"] * 3), torch.cat([first[:2], other[2:]])) < 1e-5
    model.merge_adapter()
    assert gap(read(model), other) < 1e-5
    model.set_adapter("default")
    assert gap(read(model), first) < 1e-5
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(read(model), other)
    both = veneer.get_base_model_state_dict(model)
    assert all(torch.equal(both[name], tensor) for name, tensor in net().state_dict().items())
    assert gap(read(model.merge_and_unload()), other) < 1e-5


def test_merging_another_for_good_leaves_the_trained_bias_out() -> None:
    model = veneer.get_peft_model(net(), config("all", ("first",)))
    train(model)
    model.add_adapter("other", config("none", ("last",)))
    model.set_adapter("other")
    expected = read(model)
    merged = model.merge_and_unload(adapter_names=["other"])
    assert gap(read(merged), expected) < 1e-5
    assert torch.equal(merged.first.bias, net().first.bias)


def test_an_optimizer_goes_on_with_a_resumed_or_renamed_adapter(tmp_path: Path) -> None:
    base = net()
    model = veneer.get_peft_model(base, config())
    train(model)
    model.save_pretrained(tmp_path)
    expected, bias = read(model), base.first.bias
    train(model)
    assert gap(read(model), expected) > 1e-3
    model.load_adapter(tmp_path, adapter_name="default", is_trainable=True)
    assert gap(read(model), expected) < 1e-6
    assert model.base_model.model.first.bias is bias
    assert trained(model) == ALL
    model.adapters.rename("default", "renamed")
    assert model.base_model.model.first.bias is bias
    assert torch.equal(read(model), expected)
    assert trained(model) == ALL


def test_a_state_dict_is_set_in_place() -> None:
    model = train(veneer.get_peft_model(net(), config()))
    state = {key: tensor.clone() for key, tensor in veneer.get_peft_model_state_dict(model).items()}
    assert {key for key in state if key.endswith(".bias")} >= {"base_model.model.first.base_layer.bias"}
    other = veneer.get_peft_model(net(), config())
    bias = other.base_model.model.first.bias
    assert veneer.set_peft_model_state_dict(other, state).missing_keys == []
    assert other.base_model.model.first.bias is bias
    assert gap(read(other), read(model)) < 1e-6


def test_a_state_dict_with_biases_of_an_adapter_without_changes_the_base() -> None:
    model = train(veneer.get_peft_model(net(), config("all", ("first", "attention"))))
    state = veneer.get_peft_model_state_dict(model)
    other = veneer.get_peft_model(net(), config("none", ("first", "attention"))).eval()
    result = veneer.set_peft_model_state_dict(other, {**state, "base_model.model.none.bias": torch.ones(2)})
    assert result.missing_keys == []
    assert result.unexpected_keys == ["base_model.model.none.bias"]
    assert gap(read(other), read(model)) < 1e-6
    assert torch.equal(veneer.get_base_model_state_dict(other)["last.bias"], state["base_model.model.last.bias"])


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # torch's, that one process is few, and that there is a newer way
def test_in_fsdp() -> None:
    model = train(veneer.get_peft_model(net(), config("all", ("first",))))
    expected = read(model)
    sharded: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert gap(read(sharded), expected) < 1e-6
    with model.disable_adapter():
        assert gap(read(sharded), read(net())) < 1e-6
    train(sharded)
    after = read(sharded)
    assert gap(after, expected) > 1e-3
    other = veneer.get_peft_model(net(), config("all", ("first",))).eval()
    veneer.set_peft_model_state_dict(other, veneer.get_peft_model_state_dict(sharded))
    assert gap(read(other), after) < 1e-6


def test_copies_moves_and_casts() -> None:
    model = train(veneer.get_peft_model(net(), config()))
    expected, plain = read(model), read(net())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(read(other), expected)
        assert torch.equal(read(other.unload()), plain)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert gap(read(model), expected) < 1e-5
    assert gap(read(model.unload()), plain) < 1e-5


def test_an_adapter_that_is_trained_later_takes_the_place(tmp_path: Path) -> None:
    train(veneer.get_peft_model(net(), config())).save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(net(), tmp_path)
    expected = read(model)
    assert trained(model) == set()
    model.set_requires_grad("default", True)
    assert trained(model) == ALL
    assert gap(read(model), expected) < 1e-6


def test_a_layer_whose_bias_one_adapter_trains_is_adapted_by_another() -> None:
    model = veneer.get_peft_model(net(), config("all", ("first",)))
    model.add_adapter("other", config("none", ("last", "conv")))
    model.set_adapter("other")
    alone = veneer.get_peft_model(net(), config("none", ("last", "conv")))
    state = veneer.get_peft_model_state_dict(model, adapter_name="other")
    veneer.set_peft_model_state_dict(alone, state)
    assert gap(read(model), read(alone)) < 1e-6
    model.delete_adapter("default")
    assert gap(read(model.merge_and_unload()), read(alone)) < 1e-5


def test_a_bias_that_two_modules_hold_is_trained_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

    def bert() -> BertForMaskedLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval()

    ids = torch.arange(6)[None]
    model = veneer.get_peft_model(bert(), config("all", ("query",)))
    head = model.base_model.model.cls.predictions
    assert head.bias is head.decoder.bias
    assert head.bias.requires_grad
    with torch.no_grad():
        head.bias.add_(torch.linspace(0, 1, 32))
    expected = model(ids).logits.detach()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, bert()(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(bert(), tmp_path)
    with torch.no_grad():
        assert gap(loaded(ids).logits, expected) < 1e-6
        assert gap(loaded.merge_and_unload()(ids).logits, expected) < 1e-6


def test_threads_see_their_own_choice_while_a_bias_is_in_place() -> None:
    model = train(veneer.get_peft_model(net(), config("all", ("first",))))
    model.add_adapter("other", config("none", ("last",)))
    expected = {"default": read(model)}
    with model.using("other"):
        expected["other"] = read(model)
    with model.disable_adapter():
        expected["base"] = read(model)
    assert torch.equal(expected["base"], read(net()))

    def ask(name: str) -> bool:
        with model.disable_adapter() if name == "base" else model.using(name):
            return all(gap(read(model), expected[name]) < 1e-6 for _ in range(20))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, [*expected] * 4))


def test_what_bias_can_be() -> None:
    with pytest.raises(NotImplementedError, match="bias='some' is none of the choices"):
        veneer.get_peft_model(net(), config("some"))
