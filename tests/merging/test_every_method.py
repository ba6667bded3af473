"""A merge from disk to disk gives the weights of a merge in memory, for every method with a merged form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import veneer
from tests.methods.case import Case, cases
from tests.methods.networks import NETWORKS, ConvNet
from tests.methods.test_contract import scrambled


class ConvConfig(tf.PreTrainedConfig):
    model_type = "veneer-conv"


class ConvModel(tf.PreTrainedModel):
    """The network with convolutions, as transformers saves and loads one."""

    config_class = ConvConfig

    def __init__(self, config: ConvConfig) -> None:
        super().__init__(config)
        for name, layer in ConvNet().named_children():
            self.add_module(name, layer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    forward = ConvNet.forward


tf.AutoConfig.register("veneer-conv", ConvConfig)
tf.AutoModel.register(ConvConfig, ConvModel)


def _one_of_each() -> list[tuple[str, Case]]:
    """Choose a case for each method and network."""
    found: dict[tuple[str, str], tuple[str, Case]] = {}
    for method, case in cases():
        if case.merges and case.network in ("llama", "gpt2", "conv"):
            found.setdefault((method, case.network), (method, case))
    return list(found.values())


def make(case: Case, folder: Path) -> None:
    """Make ``base/`` in bfloat16 and ``adapter/``."""
    model: Any = case.prepare(NETWORKS[case.network].make())
    if isinstance(model, ConvNet):
        weights, model = model.state_dict(), ConvModel(ConvConfig())
        model.load_state_dict(weights)
    model.bfloat16().save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base")
    adapted = veneer.get_peft_model(base, getattr(veneer, case.config)(**case.options), seed=5)
    scrambled(adapted, case).save_pretrained(folder / "adapter")


@pytest.mark.parametrize("pair", _one_of_each(), ids=lambda pair: f"{pair[0]}, {pair[1].network}")
def test_on_disk_as_in_memory_bit_for_bit(pair: tuple[str, Case], tmp_path: Path) -> None:
    make(pair[1], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = veneer.load(tmp_path / "adapter", base=tmp_path / "base").merge_and_unload()
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    memory.save_pretrained(tmp_path / "memory")
    ours, theirs, base = (
        {name: t for path in (tmp_path / folder).glob("*.safetensors") for name, t in load_file(path).items()}
        for folder in ("out", "memory", "base")
    )
    assert ours.keys() == theirs.keys()
    assert any(name not in base or not torch.equal(tensor, base[name]) for name, tensor in ours.items())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
