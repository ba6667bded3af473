"""A base in a GGUF file: transformers dequantises it, and it is an ordinary base from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

import veneer
from tests.models import LLAMA, build, gap, inputs, logits
from tests.random_adapters import saved
from veneer.errors import BaseModelError

gguf = pytest.importorskip("gguf")
BATCH = inputs("llama")
FILE = "tiny.Q8_0.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in ENDS:
        return ENDS[module] + ".weight"
    _, _, block, rest = module.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_context_length(LLAMA["max_position_embeddings"])
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(LLAMA["vocab_size"])
    model: Any = build("llama")
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values.astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_an_adapter_on_it(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    model = veneer.load(folder, base=base, gguf_file=FILE, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(base, gguf_file=FILE, dtype=torch.float32).eval()
    expected = logits(veneer.PeftModel.from_pretrained(plain, folder), BATCH)
    assert torch.equal(logits(model, BATCH), expected)
    with model.disable_adapter():
        assert gap(logits(model, BATCH), expected) > 0.02
    # An ordinary base: a merge asks nothing, and what it gives is saved and read as any model.
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert gap(logits(again.eval(), BATCH), expected) < 1e-4


def test_what_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(BaseModelError, match=rf"no other.gguf\. GGUF files there: {FILE}"):
        veneer.load(folder, base=base, gguf_file="other.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BaseModelError, match=r"cannot read .*bad.gguf"):
        veneer.load(folder, base=tmp_path, gguf_file="bad.gguf")
