"""Checkpoints that say less than their config, or other than it, or that today's peft no longer makes."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from tests.methods.case import Case
from tests.methods.networks import NETWORKS
from tests.methods.test_contract import WEIGHTS, scrambled
from tests.models import gap
from veneer.errors import BindError, ConfigError, UnsupportedError

pytestmark = pytest.mark.oracle
TARGETS = ["q_proj", "v_proj"]


def made(folder: Path, kind: str, network: str = "llama", **options: Any) -> torch.Tensor:
    """Let peft save an adapter; its output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = getattr(peft, kind)(**{"target_modules": TARGETS, **options})
        model = scrambled(peft.get_peft_model(NETWORKS[network].make(), config), Case("", network, kind))
        model.save_pretrained(folder)
        return NETWORKS[network].read(model)


def loaded(folder: Path, network: str = "llama") -> torch.Tensor:
    return NETWORKS[network].read(veneer.PeftModel.from_pretrained(NETWORKS[network].make(), folder))


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))


def test_hira_of_peft_has_one_rank_whatever_its_pattern_says(tmp_path: Path) -> None:
    expected = made(tmp_path, "HiraConfig", r=4, rank_pattern={"q_proj": 2})
    assert gap(loaded(tmp_path), expected) < 1e-5
    config = veneer.HiraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=TARGETS)
    model = veneer.get_peft_model(NETWORKS["llama"].make(), config)
    assert model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.hira_A.default"].shape[0] == 2


def test_boft_that_was_made_without_the_cuda_extension_has_one_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    expected = made(tmp_path, "BOFTConfig", boft_n_butterfly_factor=2)
    assert gap(loaded(tmp_path), expected) < 1e-5


def test_layers_that_the_targets_do_not_tell_have_all_their_tensors(tmp_path: Path) -> None:
    expected = made(tmp_path, "PeanutConfig", r=4, depth=2)
    edit(tmp_path, target_modules=["nowhere"])
    assert gap(loaded(tmp_path), expected) < 1e-5


def test_shira_with_a_mask_of_ones_own_loads(tmp_path: Path) -> None:
    expected = made(tmp_path, "ShiraConfig", r=4, random_seed=8)
    edit(tmp_path, mask_type="mine", random_seed=None)
    assert gap(loaded(tmp_path), expected) < 1e-5
    with pytest.raises(UnsupportedError, match="mine"):
        veneer.get_peft_model(
            NETWORKS["llama"].make(), veneer.ShiraConfig(r=4, mask_type="mine", target_modules=TARGETS)
        )


@pytest.mark.parametrize("start", [True, "bat"])
def test_bone_is_miss_under_its_first_name(start: bool | str, tmp_path: Path) -> None:
    expected = made(tmp_path, "MissConfig", r=4, init_weights=start)
    tensors = {key.replace("miss_block", "bone_block"): t for key, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    kept = {"peft_type": "BONE", "r": 4, "init_weights": start, "target_modules": TARGETS}
    (tmp_path / "adapter_config.json").write_text(json.dumps(kept))
    model = veneer.PeftModel.from_pretrained(NETWORKS["llama"].make(), tmp_path)
    assert gap(NETWORKS["llama"].read(model), expected) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == tensors.keys()
    assert gap(NETWORKS["llama"].read(model.merge_and_unload()), expected) < 1e-5


def test_oft_merged_into_a_convolution_is_as_in_peft_where_its_unmerged_form_is_not(tmp_path: Path) -> None:
    unmerged = made(tmp_path, "OFTConfig", "conv", oft_block_size=6, target_modules=["conv2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(NETWORKS["conv"].make(), tmp_path).merge_and_unload()
    assert gap(loaded(tmp_path, "conv"), NETWORKS["conv"].read(model)) < 1e-5
    assert gap(unmerged, NETWORKS["conv"].read(model)) > 0.1


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("LoHaConfig", {"r": 0}, "r=0"),
        ("LoKrConfig", {"rank_pattern": {"q": 0}}, "rank_pattern"),
        ("LoHaConfig", {"module_dropout": 1.0}, "module_dropout"),
        ("OFTConfig", {"r": 4}, "oft_block_size=32"),
        ("BOFTConfig", {"boft_block_size": 0}, "boft_block_num=0"),
        ("RoadConfig", {"variant": "road_3"}, "road_3"),
        ("RoadConfig", {"group_size": 3}, "group_size=3"),
        ("C3AConfig", {"init_weights": "ones"}, "ones"),
        ("MissConfig", {"init_weights": "big"}, "big"),
        ("BoneConfig", {"init_weights": "mini"}, "mini"),
        ("HiraConfig", {"init_weights": "pissa"}, "pissa"),
        ("AdamssConfig", {"num_subspaces": 0}, "num_subspaces=0"),
        ("AdamssConfig", {"init_weights": "zeros"}, "zeros"),
        ("AdamssConfig", {"use_asa": True, "final_warmup": 50}, "final_warmup=50"),
    ],
)
def test_a_config_that_means_nothing_is_refused(kind: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        getattr(veneer, kind)(**options)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("BOFTConfig", {"boft_block_size": 5}, "32 inputs"),
        ("C3AConfig", {"block_size": 24}, "block_size=24"),
        ("RoadConfig", {"group_size": 24}, "group_size=24"),
        ("MissConfig", {"r": 33}, "r=33"),
        ("MissConfig", {"r": 4, "init_weights": "mini", "mini_r": 5}, "mini_r=5"),
        ("ShiraConfig", {"r": 32}, "trained numbers"),
        ("FourierFTConfig", {"n_frequency": 2000}, "2000 trained"),
        ("OFTConfig", {"bias": "some", "oft_block_size": 8}, "some"),
        ("C3AConfig", {"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(kind: str, options: dict[str, Any], match: str) -> None:
    config = getattr(veneer, kind)(**{"target_modules": TARGETS, **options})
    with pytest.raises((UnsupportedError, ConfigError), match=match):
        veneer.get_peft_model(NETWORKS["llama"].make(), config)


def test_a_tied_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    made(tmp_path, "TrainableTokensConfig", "gpt2", token_indices=[5, 6], target_modules=["wte"])
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2
    save_file({**tensors, min(tensors): torch.zeros(3, 32)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BindError, match=r"lm_head.*\(3, 32\)"):
        loaded(tmp_path, "gpt2")


def test_every_wavelet_of_peft_is_the_same_here() -> None:
    from peft.tuners.waveft.waverec2d import waverec2d

    from veneer.methods.shared.wavelets import inverse

    for family in ("db1", "db2", "db7", "sym5", "coif2"):
        values = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (a, h), (v, d) = (half.chunk(2, 1) for half in values.chunk(2, 0))
        assert gap(inverse(values, family), waverec2d((a, (h, v, d)), family)) < 1e-5, family


class Odd(nn.Module):
    """A layer whose sizes are odd."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("family", ["db1", "db2"])
def test_wavelets_on_a_layer_of_odd_sizes(family: str, tmp_path: Path) -> None:
    options = {"n_frequency": 12, "wavelet_family": family, "target_modules": ["layer"]}
    model = scrambled(peft.get_peft_model(Odd(), peft.WaveFTConfig(**options)), Case("", "", ""))
    model.save_pretrained(tmp_path)
    x, ours = torch.randn(3, 7), veneer.PeftModel.from_pretrained(Odd(), tmp_path)
    with torch.no_grad():
        assert gap(ours(x), model(x)) < 1e-5
        assert gap(ours(x), Odd()(x)) > 0.1


def test_a_wavelet_that_nobody_knows_is_refused() -> None:
    config = veneer.WaveFTConfig(wavelet_family="db99", n_frequency=10, target_modules=TARGETS)
    with pytest.raises(UnsupportedError, match="db99"):
        veneer.get_peft_model(NETWORKS["llama"].make(), config)


def test_without_its_package_a_wavelet_is_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.methods.shared.wavelets import low_pass

    monkeypatch.setitem(sys.modules, "pywt", None)
    low_pass.cache_clear()
    assert len(low_pass("db1")) == 2
    with pytest.raises(UnsupportedError, match="PyWavelets"):
        low_pass("db4")
