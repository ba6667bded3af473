"""Files of LyCORIS' own library, read here, and files written here, run by it: the network answers the same.

Skipped where it is not installed: ``pip install lycoris-lora toml``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.errors import UnsupportedError

lycoris = pytest.importorskip("lycoris", reason="LyCORIS is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
LAYERS = ["conv", "one", "lin", "out"]


class Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {
            "conv": nn.Conv2d(4, 8, 3, padding=1, bias=bias),
            "one": nn.Conv2d(8, 6, 1, bias=bias),
            "lin": nn.Linear(6, 12, bias=bias),
            "out": nn.Linear(12, 5, bias=bias),
        }
        self.blocks = nn.ModuleList([nn.ModuleDict(layers)])

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        hidden = block["one"](torch.relu(block["conv"](x))).mean((2, 3))
        return block["out"](torch.relu(block["lin"](hidden)))


def drawn(module: nn.Module, only_trained: bool = False) -> nn.Module:
    """Give a module's parameters values that visibly change the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only_trained and not parameter.requires_grad:
                continue
            values = torch.randn(parameter.shape, generator=generator) * 0.7
            is_norm = name.endswith(("dora_scale", "lora_magnitude_vector.default"))
            parameter.copy_(parameter * (1 + values.abs()) if is_norm else values)
    return module


def network(**options: Any) -> tuple[nn.Module, Tensor]:
    """Return a network of LyCORIS' library on the net, and the net's answer with it."""
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    net = Net()
    wrapped = lycoris.create_lycoris(net, 1.0, **{"linear_dim": 2, "linear_alpha": 3, **options})
    wrapped.apply_to()
    drawn(wrapped).eval()
    with torch.no_grad():
        return wrapped, net.eval()(X)


TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "conv_dim": 3, "conv_alpha": 1},
    "lora, tucker": {"algo": "lora", "conv_dim": 3, "conv_alpha": 1, "use_tucker": True},
    "lora, stabilised": {"algo": "lora", "rs_lora": "True"},
    "lora, scalar": {"algo": "lora", "use_scalar": True},
    "dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha", "conv_dim": 2, "conv_alpha": 1},
    "loha, tucker": {"algo": "loha", "conv_dim": 2, "conv_alpha": 1, "use_tucker": True},
    "lokr": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "conv_alpha": 2},
    "lokr, factor": {"algo": "lokr", "linear_dim": 1, "factor": 2},
    "lokr, both": {"algo": "lokr", "linear_dim": 1, "decompose_both": True},
    "lokr, full": {"algo": "lokr", "linear_dim": 1, "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "use_tucker": True},
    "ia3": {"algo": "ia3"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_lycoris_trains(tmp_path: Path, name: str) -> None:
    wrapped, answer = network(**TRAINED[name])
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in wrapped.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    model = veneer.PeftModel.from_pretrained(Net(), tmp_path / "a.safetensors").eval()
    with torch.no_grad():
        assert not torch.allclose(Net()(X), answer, atol=1e-2)
        torch.testing.assert_close(model(X), answer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "full"},
        {"algo": "glora"},
        {"algo": "diag-oft"},
        {"algo": "lora", "dora_wd": "True", "wd_on_output": "False"},
        {"algo": "loha", "dora_wd": "True"},
    ],
)
def test_what_peft_has_no_form_for(tmp_path: Path, options: dict[str, Any]) -> None:
    wrapped, _ = network(**options)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in wrapped.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="extract_lora_from_models"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=Net())


# The library's own reader does not read its (IA)3, nor a Tucker decomposition of LoKr.
WRITTEN: dict[str, Any] = {
    "lora": veneer.LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, rank_pattern={"lin": 3}),
    "rslora": veneer.LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, use_rslora=True),
    "dora": veneer.LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, use_dora=True),
    "loha": veneer.LoHaConfig(r=2, alpha=3, target_modules=LAYERS),
    "loha, tucker": veneer.LoHaConfig(r=2, alpha=3, target_modules=["conv", "lin"], use_effective_conv2d=True),
    "lokr": veneer.LoKrConfig(r=1, alpha=3, target_modules=LAYERS),
    "lokr, both": veneer.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, decompose_both=True),
    "lokr, whole": veneer.LoKrConfig(r=16, alpha=3, target_modules=LAYERS),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_lycoris_reads(tmp_path: Path, name: str) -> None:
    model = drawn(veneer.get_peft_model(Net(bias=True), WRITTEN[name]), only_trained=True).eval()
    model.save_pretrained(tmp_path / "adapter")
    veneer.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="lycoris", base=Net(bias=True))
    tensors, net = load_file(tmp_path / "a.safetensors"), Net(bias=True)
    wrapped, _ = lycoris.create_lycoris_from_weights(1.0, None, net, weights_sd=tensors)
    wrapped.apply_to()
    wrapped.load_state_dict(tensors, strict=False)
    wrapped.eval()
    with torch.no_grad():
        assert not torch.allclose(Net(bias=True)(X), model(X), atol=1e-2)
        torch.testing.assert_close(net.eval()(X), model(X), rtol=1e-5, atol=1e-5)
