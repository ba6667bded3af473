"""Makes bases of every kind on disk, and adapters of them by peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn

from tests.models import TEXT, build, gap, inputs
from tests.oracle.peer import VISIBLE, scramble


class NetConfig(tf.PreTrainedConfig):
    model_type = "veneer-net"


class NetModel(tf.PreTrainedModel):
    """Convolutions, attention and linear layers in one chain; the input is token ids ``(2, 12)``."""

    config_class = NetConfig

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(30, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.conv1 = nn.Conv1d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 5), padding=(1, 2))
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.last = nn.Linear(12, 5)
        self.free = nn.Linear(12, 5, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor) -> Any:
        x = self.norm(self.embed(input_ids))
        x = torch.tanh(self.conv1(x.mT)).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        image = torch.tanh(self.conv2(x.unsqueeze(1))).mean(1)
        return tf.utils.ModelOutput(logits=torch.cat([self.last(image), self.free(image)], -1))


tf.AutoConfig.register("veneer-net", NetConfig)
tf.AutoModel.register(NetConfig, NetModel)
IDS = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(1))


def _random(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def net() -> nn.Module:
    return _random(lambda: NetModel(NetConfig()))


def mixtral() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return _random(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, **sizes, **heads)))


def tied() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return _random(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **sizes, tie_word_embeddings=True)))


def of_net() -> Mapping[str, Tensor]:
    return {"input_ids": IDS}


def of_text() -> Mapping[str, Tensor]:
    return {"input_ids": inputs("llama")["input_ids"]}


@dataclass(frozen=True)
class Kind:
    """A base and a LoRA of it.

    Attributes:
        make: the base model.
        batch: an input for it.
        options: what LoraConfig is given.
        task: the adapter's task.
        peer_saves: whether what peft merges and saves computes the same when it is loaded again.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    peer_saves: bool = True


LINEAR = ["q_proj", "down_proj"]
_LLAMA = {"make": lambda: build("llama"), "batch": of_text, "task": "CAUSAL_LM"}
_TIED = {"make": tied, "batch": of_text, "task": "CAUSAL_LM"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: Mapping[str, Kind] = {
    "linear": Kind(**_LLAMA, options={"target_modules": "all-linear"}),
    "dora": Kind(**_LLAMA, options={"target_modules": LINEAR, "use_dora": True}),
    "transposed": Kind(
        lambda: build("gpt2"),
        lambda: inputs("gpt2"),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        "CAUSAL_LM",
    ),
    "whole head": Kind(**_LLAMA, options={"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "classifier": Kind(lambda: build("bert"), lambda: inputs("bert"), {"target_modules": ["query"]}, "SEQ_CLS"),
    "embedding and head": Kind(**_LLAMA, options={"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tokens": Kind(**_LLAMA, options={"target_modules": LINEAR, "trainable_token_indices": [40, 7, 12]}),
    "tied, linear": Kind(**_TIED, options={"target_modules": LINEAR}),
    "tied, tokens": Kind(**_TIED, options={"target_modules": LINEAR, "trainable_token_indices": [40, 7]}),
    # peft 0.21 leaves tie_word_embeddings on, and transformers then warns that the config is wrong.
    "tied, head": Kind(**_TIED, options={"target_modules": ["lm_head", "q_proj"]}, peer_saves=False),
    "tied, embedding": Kind(**_TIED, options={"target_modules": ["embed_tokens", "q_proj"]}, peer_saves=False),
    "t5": Kind(lambda: build("t5"), lambda: inputs("t5"), {"target_modules": ["q", "wi"]}, "SEQ_2_SEQ_LM"),
    "t5, tied head": Kind(
        lambda: build("t5"), lambda: inputs("t5"), {"target_modules": ["q", "lm_head"]}, "SEQ_2_SEQ_LM", False
    ),
    "whisper": Kind(
        lambda: build("whisper"), lambda: inputs("whisper"), {"target_modules": ["q_proj", "v_proj", "fc1"]}
    ),
    "vit": Kind(lambda: build("vit"), lambda: inputs("vit"), {"target_modules": ["q_proj", "projection"]}),
    "experts": Kind(mixtral, of_text, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, "CAUSAL_LM"),
    "one expert parameter": Kind(
        mixtral, of_text, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}, "CAUSAL_LM"
    ),
    "convolutions": Kind(net, of_net, {"target_modules": ["conv1", "conv2", "last"]}),
    "attention": Kind(net, of_net, {"target_modules": ["attention"]}),
    "biases": Kind(net, of_net, {"target_modules": ["last", "conv1"], "bias": "all"}),
    "own bias": Kind(net, of_net, {"target_modules": ["last", "conv1"], "lora_bias": True}),
}


@dataclass(frozen=True)
class Made:
    """A kind on disk, as peft made it.

    Attributes:
        base: the base's folder.
        adapter: the adapter's folder; its config names the base.
        unmerged: logits with the adapter active.
        peer: the folder that peft's own load, merge and save wrote.
    """

    kind: Kind
    base: Path
    adapter: Path
    unmerged: Tensor
    peer: Path

    def read(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**self.kind.batch()).logits.float()

    def load(self, folder: Path) -> nn.Module:
        found: nn.Module = type(self.kind.make()).from_pretrained(folder)
        return found.eval()


def make(name: str, folder: Path) -> Made:
    """Let peft make an adapter of a kind, save it, merge it and save the result."""
    kind = KINDS[name]
    model: Any = kind.make()
    model.save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base").eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        before = base(**kind.batch()).logits.float()
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type=kind.task, **kind.options)
        model = scramble(peft.get_peft_model(base, config))
        model.save_pretrained(folder / "adapter")
        unmerged = model(**kind.batch()).logits.float()
        assert gap(unmerged, before) > VISIBLE
        model.merge_and_unload().save_pretrained(folder / "peer")
    return Made(kind, folder / "base", folder / "adapter", unmerged, folder / "peer")
