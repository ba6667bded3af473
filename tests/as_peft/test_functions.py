"""Functions of peft's modules that other libraries call, with Veneer in its place, against peft's own."""

from __future__ import annotations

from tests.as_peft.process import printed

SCRIPT = """
import torch
from torch import nn
from tests.models import build
import peft
from peft.config import PeftConfigMixin
from peft.tuners.lora.layer import LoraLayer, check_adapters_to_merge
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.loha.layer import LoHaLayer
from peft.utils import get_quantization_config
from peft.utils.integrations import get_bnb_param_type
from peft.utils.other import EMBEDDING_LAYER_NAMES
from peft.utils.save_and_load import get_embedding_layer_name, has_valid_embedding_base_layer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers, get_model_conversion_mapping

config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"])
model = peft.get_peft_model(build("llama"), config)
inner = model.base_model.model.model
print(has_valid_embedding_base_layer(inner.embed_tokens), has_valid_embedding_base_layer(inner.norm))
print(get_embedding_layer_name(model, inner.embed_tokens, True), get_embedding_layer_name(model, inner.norm, False))
print(get_embedding_layer_name(model, nn.Linear(1, 1), False))
print(check_adapters_to_merge(inner.layers[0].self_attn.q_proj))
print(get_bnb_param_type(nn.Parameter(torch.ones(1))), get_quantization_config(model, "gptq"), EMBEDDING_LAYER_NAMES)
print([factorization(n, k) for n in (12, 30, 7) for k in (-1, 4, 5)], isinstance(config, PeftConfigMixin))
print(convert_peft_config_for_transformers(config, model, None), config.target_modules == {"embed_tokens", "q_proj"})
names = [set(kind.adapter_layer_names) for kind in (LoraLayer, LoKrLayer, LoHaLayer)]
known = [{"lora_A", "lora_B", "lora_embedding_A"}, {"lokr_w1", "lokr_w2_a"}, {"hada_w1_a", "hada_w2_b"}]
print([some <= all for some, all in zip(known, names)])
"""


def test_they_answer_as_peft() -> None:
    expected: list[str] = []
    own = {"print": lambda *values: expected.append(" ".join(map(str, values)))}
    exec(SCRIPT, own)
    assert printed(SCRIPT) == expected
    assert expected[0] == "True False"


def test_layers_on_packed_weights_are_told_apart() -> None:
    lines = printed("""
        import peft, torch
        from peft.tuners.lora.torchao import TorchaoLoraLinear
        from peft.tuners.lora.tp_layer import LoraParallelLinear
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from tests.models import build
        model = build("llama")
        quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("q_proj"))
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        attention = model.base_model.model.model.layers[0].self_attn
        print([isinstance(layer, TorchaoLoraLinear) for layer in (attention.q_proj, attention.v_proj)])
        print(isinstance(attention.q_proj, LoraParallelLinear))
    """)
    assert lines == ["[True, False]", "False"]


def test_a_hub_that_cannot_be_asked_says_nothing_of_a_file() -> None:
    lines = printed("from peft.utils.other import check_file_exists_on_hf_hub as exists\nprint(exists('a/b', 'c'))")
    assert lines == ["None"]
