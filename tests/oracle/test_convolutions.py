"""LoRA and DoRA on convolutions of every geometry: unmerged, merged in memory and on disk, and beside peft.

peft 0.21 leaves the layer's dilation and padding mode out of its LoRA, so that its output fails or is wrong unmerged
while its merged weight is right; and it merges no layer with groups, and no ``Conv3d`` whose kernel begins with 1 x 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.models import gap
from tests.oracle.peer import VISIBLE, WEIGHTS, scramble
from veneer.errors import MergeError

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Geometry:
    """A convolution of 8 channels to 12, and what of peft is right for it."""

    kernel: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    peer_unmerged: bool = True
    peer_merges: bool = True

    @property
    def grouped(self) -> bool:
        return self.options.get("groups", 1) > 1


GEOMETRIES = {
    "1d": Geometry((3,)),
    "1d, stride, bias off": Geometry((5,), {"stride": 2, "padding": 1, "bias": False}),
    "1d, dilation": Geometry((3,), {"dilation": 2}, peer_unmerged=False),
    "1d, circular": Geometry((3,), {"padding": 1, "padding_mode": "circular"}, peer_unmerged=False),
    "1d, groups": Geometry((3,), {"groups": 4, "stride": 2}, peer_merges=False),
    "2d, not square": Geometry((3, 5), {"stride": (1, 2), "padding": (1, 2)}),
    "2d, point": Geometry((1, 1)),
    "2d, dilation": Geometry((3, 5), {"dilation": (2, 1), "padding": "same"}, peer_unmerged=False),
    "2d, groups": Geometry((2, 3), {"groups": 2, "padding": (0, 1), "stride": (2, 1)}, peer_merges=False),
    "2d, groups, dilation": Geometry((2, 3), {"groups": 4, "dilation": 2}, peer_unmerged=False, peer_merges=False),
    "3d, not square": Geometry((2, 3, 1), {"stride": (1, 2, 1), "padding": (0, 1, 0)}),
    "3d, flat": Geometry((1, 1, 3), {}, peer_merges=False),
    "3d, groups": Geometry((2, 1, 3), {"groups": 2}, peer_merges=False),
}


class ConvolutionConfig(tf.PreTrainedConfig):
    model_type = "veneer-convolution"

    def __init__(self, name: str = "1d", **kwargs: Any) -> None:
        self.name = name
        super().__init__(**kwargs)


class Convolution(tf.PreTrainedModel):
    """One convolution, and a linear layer on its channels."""

    config_class = ConvolutionConfig

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        geometry = GEOMETRIES[config.name]
        self.conv = KINDS[len(geometry.kernel)](8, 12, geometry.kernel, **geometry.options)
        self.last = nn.Linear(12, 4)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).movedim(1, -1))


tf.AutoConfig.register("veneer-convolution", ConvolutionConfig)
tf.AutoModel.register(ConvolutionConfig, Convolution)


def build(name: str) -> Convolution:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Convolution(ConvolutionConfig(name)).eval()


@torch.no_grad()
def read(model: nn.Module, name: str) -> Tensor:
    size = (7, 6, 5)[: len(GEOMETRIES[name].kernel)]
    return model(torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def own_channels_only(folder: Path, groups: int) -> None:
    """Let each group's part of A see that group's channels alone."""
    tensors = load_file(folder / WEIGHTS)
    for key, a in tensors.items():
        if key.endswith("conv.lora_A.weight"):
            rows, channels = a.shape[0] // groups, a.shape[1] // groups
            for group in range(groups):
                own = slice(group * rows, (group + 1) * rows)
                a[own, : group * channels] = 0
                a[own, (group + 1) * channels :] = 0
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(params=GEOMETRIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def peer_made(name: str, folder: Path, **options: Any) -> nn.Module:
    """An adapter that peft made, saved in ``folder``; its base in ``base/``."""
    build(name).save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["conv", "last"], **options)
        model = scramble(peft.get_peft_model(build(name), config))
        model.save_pretrained(folder / "adapter")
        if GEOMETRIES[name].grouped:
            own_channels_only(folder / "adapter", GEOMETRIES[name].options["groups"])
            model = peft.PeftModel.from_pretrained(build(name), folder / "adapter").eval()
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_unmerged_merged_and_from_disk_to_disk(name: str, dora: bool, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    if dora and "flat" in name:
        pytest.skip("peft makes no DoRA of it")
    peer = peer_made(name, tmp_path, use_dora=dora)
    ours = veneer.load(tmp_path / "adapter", base=tmp_path / "base")
    expected = read(ours, name)
    assert gap(expected, read(build(name), name)) > VISIBLE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if geometry.peer_unmerged:
            assert gap(expected, read(peer, name)) < CLOSE
        if geometry.peer_merges:
            assert gap(expected, read(peer.merge_and_unload(), name)) < CLOSE
    ours.merge_adapter()
    assert gap(read(ours, name), expected) < CLOSE
    ours.unmerge_adapter()
    assert torch.equal(read(ours, name), expected)
    veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    assert gap(read(Convolution.from_pretrained(tmp_path / "out").eval(), name), expected) < CLOSE
    merged = ours.merge_and_unload().state_dict()
    disk = load_file(tmp_path / "out" / "model.safetensors")
    assert all(gap(disk[key], tensor) < 1e-6 for key, tensor in merged.items())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", [name for name, geometry in GEOMETRIES.items() if geometry.grouped])
def test_what_connects_groups_stays_unmerged(name: str, dora: bool, tmp_path: Path) -> None:
    config = veneer.LoraConfig(r=4, target_modules=["conv"], use_dora=dora)
    model = veneer.get_peft_model(build(name), config, seed=1)
    assert gap(read(model, name), read(build(name), name)) < CLOSE
    scramble(model).save_pretrained(tmp_path / "adapter")
    build(name).save_pretrained(tmp_path / "base")
    expected = read(model, name)
    if GEOMETRIES[name].peer_unmerged:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = peft.PeftModel.from_pretrained(build(name), tmp_path / "adapter").eval()
        assert gap(expected, read(peer, name)) < CLOSE
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"connects channels across them: \d+% of its change"):
            merge()
    with pytest.raises(MergeError, match="No weight of that layer can hold this"):
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(read(model, name), expected)
