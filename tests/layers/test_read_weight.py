"""Layers whose weight a model reads instead of calling them: an adapter there changes what it changes merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import config, enlarge
from veneer.errors import UnsupportedError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.read_weight import Unread

CLOSE = 1e-5


def apart(a: Tensor, b: Tensor) -> float:
    return gap(a.detach(), b.detach())


class Reads(nn.Module):
    """Computes with a layer's weight, and with another's that it calls too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 6, bias=False)
        self.table = nn.Embedding(12, 8)

    def block(self, h: Tensor) -> Tensor:
        h = F.linear(h, self.first.weight, self.first.bias)
        own = self.second(h.to(self.second.weight.dtype))
        return own + F.linear(h, self.second.weight, self.second.bias)


class Model(nn.Module):
    """Such a block behind a table that it reads too; or the same with all of them called."""

    def __init__(self, calls: bool = False, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.inner, self.calls, self.checkpointed = Reads(), calls, checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        if self.calls:
            h = self.inner.first(self.inner.table(ids))
            return self.inner.second(h) + self.inner.second(h)
        h = F.embedding(ids, self.inner.table.weight)
        if self.checkpointed is None:
            return self.inner.block(h)
        found: Tensor = checkpoint(self.inner.block, h, use_reentrant=self.checkpointed)
        return found


IDS = torch.tensor([[1, 5, 2], [3, 0, 11]])
LAYERS = ["first", "second", "table"]
CONFIGS: dict[str, Callable[[], veneer.PeftConfig]] = {
    "lora": lambda: veneer.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False),
    "only": lambda: veneer.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False),
    "dora": lambda: veneer.LoraConfig(r=2, target_modules=LAYERS[:2], use_dora=True, init_lora_weights=False),
    "bias": lambda: veneer.LoraConfig(r=2, target_modules=LAYERS[:2], lora_bias=True, init_lora_weights=False),
    "ia3": lambda: veneer.IA3Config(target_modules=LAYERS[:2], feedforward_modules=["second"]),
    "oft": lambda: veneer.OFTConfig(oft_block_size=2, target_modules=["first", "second"]),
}


def of(made: str, model: nn.Module) -> veneer.PeftModel:
    found = veneer.get_peft_model(model, CONFIGS[made](), seed=0)
    enlarge(found, "default", 3)
    return found.eval()


@pytest.mark.parametrize("made", CONFIGS)
def test_what_a_model_reads_is_what_a_merge_makes(made: str) -> None:
    model, calls = of(made, Model()), of(made, Model(calls=True))
    with model.disable_adapter():
        base = model(IDS)
    found = model(IDS)
    assert torch.equal(base, Model()(IDS))
    assert apart(found, base) > 0.01
    assert apart(found, calls(IDS)) < CLOSE
    with torch.no_grad():
        assert apart(model(IDS), found) < CLOSE
        for parameter in model.adapters.parameters("default"):
            parameter.mul_(0.5)
        edited = model(IDS)
    assert apart(edited, found) > 0.001
    model.merge_adapter()
    assert apart(model(IDS), edited) < CLOSE
    with model.disable_adapter():
        assert apart(model(IDS), base) < CLOSE
    model.unmerge_adapter()
    assert apart(model(IDS), edited) < CLOSE
    assert apart(model.merge_and_unload()(IDS), edited) < CLOSE


@pytest.mark.parametrize(
    ("made", "checkpointed"),
    [("lora", None), ("dora", None), ("bias", None), ("lora", False), ("dora", False), ("lora", True)],
)
def test_gradients_flow_through_a_weight_that_is_read(made: str, checkpointed: bool | None) -> None:
    model, calls = of(made, Model(checkpointed=checkpointed)), of(made, Model(calls=True))
    for one in (model, calls):
        one.train()(IDS).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: p.grad for name, p in calls.named_parameters() if p.requires_grad}
    assert expected
    for name, grad in expected.items():
        assert grad is not None
        own = found[name]
        assert own is not None, name
        assert apart(own, grad) < CLOSE, name


def test_outside_a_call_it_is_the_base_weight() -> None:
    model = of("lora", Model())
    layer: Any = model.get_base_model().inner.first
    model(IDS)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias


def test_rows_of_several_adapters_have_no_weight_to_read() -> None:
    model = of("lora", Model())
    with pytest.raises(UnsupportedError, match=r"inner.table: .* one adapter for each row"):
        model(IDS, adapter_names=["default", "__base__"])
    assert torch.equal(model(IDS, adapter_names=["__base__", "__base__"]), Model()(IDS))


def test_an_adapter_that_no_weight_can_hold_is_refused() -> None:
    made = veneer.PolyConfig(target_modules=["first"], r=2, n_tasks=2, n_skills=2, init_weights=False)
    model = veneer.get_peft_model(Model(), made, seed=0)
    with pytest.raises(UnsupportedError, match=r"inner.first: .* cannot hold such an adapter"):
        model(IDS, task_ids=torch.tensor([0, 1]))


def test_a_module_brought_whole_in_a_mixed_batch() -> None:
    made = veneer.LoraConfig(r=2, target_modules=["second"], modules_to_save=["first"])
    model = veneer.get_peft_model(Model(), made, seed=0)
    with pytest.raises(UnsupportedError, match="brings whole"):
        model(IDS, adapter_names=["default", "__base__"])


def test_compiled() -> None:
    torch._dynamo.reset()
    model = of("dora", Model())
    graph = torch.compile(model, fullgraph=True, backend="eager")
    assert apart(graph(IDS), model(IDS)) < CLOSE
    with model.disable_adapter():
        assert torch.equal(graph(IDS), Model()(IDS))


# -- layers that are called and asked for their dtype ------------------------------------------------------------------


def test_asking_a_layer_that_is_called_for_its_dtype_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = veneer.get_peft_model(build("t5"), config("t5", target_modules=["wo"]), seed=0).train()
    enlarge(model, "default")
    batch = inputs("t5")
    model(**batch)
    made: list[object] = []
    monkeypatch.setattr(AdaptedLayer, "_made", lambda self, *_: made.append(self))
    rows = logits(model.eval(), batch, adapter_names=["default", "__base__"])
    model.train()(**batch)
    assert not made
    assert apart(rows[:1], logits(model.eval(), batch)[:1]) < CLOSE


def test_what_stands_for_a_weight() -> None:
    outside, inside = torch.zeros(3, 2, dtype=torch.float16), torch.ones(3, 2, dtype=torch.float16, requires_grad=True)
    asked: list[int] = []

    def make() -> Tensor:
        asked.append(1)
        return inside

    weight = Unread(outside, make)
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.shape, weight.device, weight.ndim) == (torch.float16, (3, 2), outside.device, 2)
    assert (weight.size(0), weight.dim(), weight.numel(), weight.is_floating_point()) == (3, 2, 6, True)
    assert not asked
    weight.float().sum().backward()
    assert inside.grad is not None
    assert torch.equal(torch.cat([weight, outside]), torch.cat([inside, outside]))
    assert torch.equal(weight.t(), inside.t())
    assert torch.equal(torch.ops.aten.neg(weight), -inside)
    assert "1." in repr(weight)


class Doubled(torch.autograd.Function):
    """A kernel with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight * 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def test_a_kernel_that_would_train_nothing_is_refused() -> None:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Doubled.apply(x, self.first.weight)  # type: ignore[no-untyped-call]
            return found

    model = of("only", Kernel())
    x = torch.randn(2, 4)
    with pytest.raises(UnsupportedError, match="no gradient"):
        model(x)
    with torch.no_grad():
        found = model(x)
    assert apart(model.merge_and_unload()(x), found) < CLOSE


# -- architectures -----------------------------------------------------------------------------------------------------


def wavlm() -> tuple[nn.Module, dict[str, Tensor]]:
    made = tf.WavLMConfig(
        vocab_size=20,
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40},
        **{"conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 3], "num_feat_extract_layers": 2},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_buckets": 8},
    )
    return tf.WavLMForCTC(made), {"input_values": torch.randn(1, 400)}


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    made = tf.MambaConfig(vocab_size=20, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0)
    return tf.MambaForCausalLM(made), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def jamba() -> tuple[nn.Module, dict[str, Tensor]]:
    made = tf.JambaConfig(
        **{"vocab_size": 20, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"num_experts": 2, "use_mamba_kernels": False, "pad_token_id": 0},
    )
    return tf.JambaForCausalLM(made), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def mobilebert() -> tuple[nn.Module, dict[str, Tensor]]:
    made = tf.MobileBertConfig(
        **{"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 40, "embedding_size": 16, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
    )
    return tf.MobileBertForMaskedLM(made), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


class Encoder(nn.Module):
    """torch's own encoder layer, which in inference calls no layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return tf.utils.ModelOutput(logits=self.layer(x))


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    return Encoder(), {"x": torch.randn(2, 3, 16)}


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"]),
        (mamba, ["dt_proj"]),
        (jamba, ["dt_proj"]),
        (mobilebert, ["predictions.decoder", "predictions.dense"]),
        (encoder, ["linear1", "linear2"]),
        (encoder, ["self_attn"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else ",".join(value),
)
def test_architectures(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], targets: list[str]) -> None:
    torch.manual_seed(0)
    base, batch = make()
    plain = logits(base.eval(), batch)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, lora_alpha=640, target_modules=targets), seed=0).eval()
    enlarge(model, "default")
    found = logits(model, batch)
    assert apart(found, plain) > 1e-5
    assert apart(model(**batch).logits, found) < 1e-6 + 0.01 * apart(found, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert apart(logits(model.merge_and_unload(), batch), found) < 1e-6 + 0.01 * apart(found, plain)
