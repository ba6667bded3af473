"""The forms of LoRA beside the plain one, each on a small network that has the layers for it, as peft computes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tests.models import TEXT, build, gap, inputs
from tests.oracle.peer import VISIBLE, WEIGHTS, scramble

pytestmark = pytest.mark.oracle

CLOSE = 1e-5


class Net(nn.Module):
    """Every kind of layer in one chain; the input is token ids ``(2, 12)``, the output ``(2, n)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.conv1 = nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 12, 3, groups=4, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(1, 4, (3, 5), stride=(1, 2), padding=(1, 2))
        self.conv3 = nn.Conv3d(1, 4, (1, 3, 3), padding="same")
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.last = nn.Linear(12, 5)
        self.free = nn.Linear(12, 5, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        x = torch.tanh(self.grouped(torch.tanh(self.conv1(x.mT)))).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        image = torch.tanh(self.conv2(x.unsqueeze(1)))
        volume = self.conv3(image.unsqueeze(1))
        return torch.cat([self.last(x).flatten(1), self.free(x).flatten(1), volume.flatten(1)], 1)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


IDS = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(1))


def of_net(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def llama() -> nn.Module:
    return build("llama")


def tied() -> nn.Module:
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def mixtral() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, **sizes, **heads)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def of_text(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=inputs("llama")["input_ids"]).logits


@dataclass(frozen=True)
class Form:
    """One form: the network, how its output is read, LoRA's options, and whether peft can merge it."""

    make: Callable[[], nn.Module]
    read: Callable[[nn.Module], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    merges: bool = True


LINEAR = ["q_proj", "down_proj"]
FORMS = {
    "dora": Form(llama, of_text, {"target_modules": LINEAR, "use_dora": True}),
    "dora rslora": Form(llama, of_text, {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "dora with bias": Form(net, of_net, {"target_modules": ["last", "free"], "use_dora": True}),
    "lora_bias": Form(net, of_net, {"target_modules": ["last", "conv1"], "lora_bias": True}),
    "bias lora_only": Form(net, of_net, {"target_modules": ["last", "conv1", "free"], "bias": "lora_only"}),
    "bias all": Form(net, of_net, {"target_modules": ["last", "conv1", "free"], "bias": "all"}),
    "embedding": Form(net, of_net, {"target_modules": ["embed", "last"]}),
    "embedding dora": Form(net, of_net, {"target_modules": ["embed"], "use_dora": True}),
    "embedding of a model": Form(llama, of_text, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "conv1d": Form(net, of_net, {"target_modules": ["conv1"]}),
    "conv2d": Form(net, of_net, {"target_modules": ["conv2"]}),
    "conv3d": Form(net, of_net, {"target_modules": ["conv3"]}),
    "conv2d dora": Form(net, of_net, {"target_modules": ["conv2"], "use_dora": True}),
    "conv1d dora": Form(net, of_net, {"target_modules": ["conv1"], "use_dora": True}),
    "attention": Form(net, of_net, {"target_modules": ["attention"]}),
    "tokens": Form(llama, of_text, {"target_modules": LINEAR, "trainable_token_indices": [40, 7, 12, 55, 3]}),
    "tokens by name": Form(
        llama, of_text, {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [40, 7, 3]}}
    ),
    "tokens tied": Form(tied, of_text, {"target_modules": LINEAR, "trainable_token_indices": [40, 7, 12, 55, 3]}),
    "experts": Form(
        mixtral,
        of_text,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one expert parameter": Form(
        mixtral, of_text, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    ),
    "a whole matrix": Form(llama, of_text, {"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight"]}),
}


@dataclass(frozen=True)
class Saved:
    """What peft made of a form."""

    form: Form
    folder: Path
    unmerged: Tensor
    merged: Tensor | None


@pytest.fixture(scope="module", params=FORMS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    form, folder = FORMS[request.param], tmp_path_factory.mktemp("form")
    base = form.make()
    before = form.read(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = scramble(peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **form.options)))
        model.save_pretrained(folder)
        unmerged = form.read(model)
        assert gap(unmerged, before) > VISIBLE
        merged = form.read(model.merge_and_unload()) if form.merges else None
    return Saved(form, folder, unmerged, merged)


def ours(saved: Saved) -> veneer.PeftModel:
    return veneer.PeftModel.from_pretrained(saved.form.make(), saved.folder)


def test_unmerged(saved: Saved) -> None:
    assert gap(saved.form.read(ours(saved)), saved.unmerged) < CLOSE


def test_merged(saved: Saved) -> None:
    assert saved.merged is not None
    model = ours(saved)
    assert gap(saved.form.read(model.merge_and_unload()), saved.merged) < CLOSE


def test_merging_and_unmerging_leaves_every_bit(saved: Saved) -> None:
    model = ours(saved)
    unmerged = saved.form.read(model)
    base = {name: t.clone() for name, t in saved.form.make().state_dict().items()}
    model.merge_adapter()
    assert gap(saved.form.read(model), unmerged) < CLOSE
    model.unmerge_adapter()
    assert torch.equal(saved.form.read(model), unmerged)
    after = model.unload().state_dict()
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)


def test_saving_changes_no_bit(saved: Saved, tmp_path: Path) -> None:
    ours(saved).save_pretrained(tmp_path)
    mine, theirs = load_file(tmp_path / WEIGHTS), load_file(saved.folder / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_peft_computes_the_same_from_an_adapter_made_here(saved: Saved, tmp_path: Path) -> None:
    model = veneer.get_peft_model(saved.form.make(), veneer.LoraConfig(r=4, lora_alpha=6, **saved.form.options), seed=3)
    fresh = saved.form.read(model.eval())
    assert gap(fresh, saved.form.read(saved.form.make())) < CLOSE, "a new adapter changes nothing"
    expected = saved.form.read(scramble(model))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(saved.form.make(), tmp_path).eval()
    assert gap(saved.form.read(theirs), expected) < CLOSE
    assert gap(expected, fresh) > VISIBLE


def test_every_tensor_learns(saved: Saved) -> None:
    model = veneer.PeftModel.from_pretrained(saved.form.make(), saved.folder, is_trainable=True)
    with torch.enable_grad():
        output = model(IDS) if saved.form.read is of_net else model(input_ids=inputs("llama")["input_ids"]).logits
        output.square().mean().backward()
    wanted = {id(p) for p in model.adapters.parameters("default")}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in wanted), name


def test_rows_of_a_batch_may_use_it_or_not(saved: Saved) -> None:
    model = ours(saved)
    both = saved.form.read(model)
    # Frozen, as under an adapter: torch chooses other kernels for weights that want gradients.
    base = saved.form.read(saved.form.make().requires_grad_(False))
    with model.disable_adapter():
        assert torch.equal(saved.form.read(model), base)
    with model.adapters.using(model.adapters.rows(["default", "__base__"])):
        mixed = saved.form.read(model)
    assert gap(mixed[0], both[0]) < CLOSE
    assert gap(mixed[1], base[1]) < CLOSE
