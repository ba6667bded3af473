"""Tiny bases as GGUF files, written as llama.cpp's converter writes them, and what llama.cpp computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers as tf
from torch import Tensor, nn

from veneer.formats.format import Base

VOCAB = 96
HEADS, KEYS, HEAD_SIZE, LAYERS = 4, 2, 8, 2
SIZES: Mapping[str, Any] = {
    **{"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128},
    **{"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS},
    **{"intermediate_size": 48, "head_dim": HEAD_SIZE, "tie_word_embeddings": False, "sliding_window": 64},
}
EXPERTS: Mapping[str, Any] = {
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
TIED: Mapping[str, Any] = {"tie_word_embeddings": True}


def _make(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        kind = getattr(tf, name)
        return kind(kind.config_class(**{**SIZES, **options}))

    return make


def _with_images(name: str, vision: Mapping[str, Any], **text: Any) -> Callable[[], Any]:
    """Makes a model that reads images too, of whose language model alone a GGUF file is made."""

    def make() -> Any:
        kind = getattr(tf, name)
        ids = {"image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "vision_start_token_id": 6}
        return kind(kind.config_class(text_config={**SIZES, **text}, vision_config=vision, **ids))

    return make


SIGLIP: Mapping[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
PIXTRAL: Mapping[str, Any] = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}
QWEN_IMAGES: Mapping[str, Any] = {
    **{"depth": 1, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
    **{"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [], "fullatt_block_indexes": [0]},
}
SECTIONS: Mapping[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}


MODELS: Mapping[str, Callable[[], Any]] = {
    "LlamaForCausalLM": _make("LlamaForCausalLM"),
    "MistralForCausalLM": _make("MistralForCausalLM"),
    "MixtralForCausalLM": _make("MixtralForCausalLM", **EXPERTS),
    "SmolLM3ForCausalLM": _make("SmolLM3ForCausalLM", num_hidden_layers=4, use_sliding_window=False),
    "Qwen2ForCausalLM": _make("Qwen2ForCausalLM"),
    "Qwen2MoeForCausalLM": _make("Qwen2MoeForCausalLM", **EXPERTS),
    "Qwen3ForCausalLM": _make("Qwen3ForCausalLM"),
    "Qwen3MoeForCausalLM": _make("Qwen3MoeForCausalLM", **EXPERTS, norm_topk_prob=True),
    "GemmaForCausalLM": _make("GemmaForCausalLM", **TIED),
    "Gemma2ForCausalLM": _make("Gemma2ForCausalLM", **TIED, query_pre_attn_scalar=8),
    "Gemma3ForCausalLM": _make("Gemma3ForCausalLM", **TIED, query_pre_attn_scalar=8),
    "Gemma3ForConditionalGeneration": _with_images(
        "Gemma3ForConditionalGeneration", SIGLIP, **TIED, query_pre_attn_scalar=8
    ),
    "Phi3ForCausalLM": _make("Phi3ForCausalLM", original_max_position_embeddings=128, sliding_window=None),
    "GraniteForCausalLM": _make(
        "GraniteForCausalLM",
        attention_multiplier=0.4,
        embedding_multiplier=1.5,
        residual_multiplier=0.8,
        logits_scaling=1.25,
    ),
    "ArceeForCausalLM": _make("ArceeForCausalLM"),
    "OlmoForCausalLM": _make("OlmoForCausalLM"),
    "Olmo2ForCausalLM": _make("Olmo2ForCausalLM"),
    "Olmo3ForCausalLM": _make("Olmo3ForCausalLM"),
    "OlmoeForCausalLM": _make("OlmoeForCausalLM", **EXPERTS, num_key_value_heads=HEADS),
    "SeedOssForCausalLM": _make("SeedOssForCausalLM"),
    "StableLmForCausalLM": _make("StableLmForCausalLM", partial_rotary_factor=0.5, use_qkv_bias=True),
    "Starcoder2ForCausalLM": _make("Starcoder2ForCausalLM", sliding_window=None),
    "PhiForCausalLM": _make("PhiForCausalLM", partial_rotary_factor=0.5, num_key_value_heads=HEADS),
    "CohereForCausalLM": _make("CohereForCausalLM", **TIED, logit_scale=0.5),
    "Ernie4_5ForCausalLM": _make("Ernie4_5ForCausalLM"),
    "Ministral3ForCausalLM": _make("Ministral3ForCausalLM"),
    "Cohere2ForCausalLM": _make("Cohere2ForCausalLM", **TIED, logit_scale=0.5),
    "Exaone4ForCausalLM": _make("Exaone4ForCausalLM", sliding_window=None, layer_types=["full_attention"] * LAYERS),
    "GlmForCausalLM": _make("GlmForCausalLM", partial_rotary_factor=0.5),
    "Glm4ForCausalLM": _make("Glm4ForCausalLM", partial_rotary_factor=0.5),
    "HunYuanDenseV1ForCausalLM": _make("HunYuanDenseV1ForCausalLM"),
    "NemotronForCausalLM": _make("NemotronForCausalLM", partial_rotary_factor=0.5),
    "Mistral3ForConditionalGeneration": _with_images("Mistral3ForConditionalGeneration", PIXTRAL, model_type="mistral"),
    "Qwen2VLForConditionalGeneration": _with_images("Qwen2VLForConditionalGeneration", QWEN_IMAGES, **SECTIONS),
    "Qwen2_5_VLForConditionalGeneration": _with_images("Qwen2_5_VLForConditionalGeneration", QWEN_IMAGES, **SECTIONS),
    "Qwen3VLForConditionalGeneration": _with_images("Qwen3VLForConditionalGeneration", QWEN_IMAGES, **SECTIONS),
    "Qwen3VLMoeForConditionalGeneration": _with_images(
        "Qwen3VLMoeForConditionalGeneration", QWEN_IMAGES, **{**EXPERTS, **SECTIONS}
    ),
    "GptOssForCausalLM": _make(
        "GptOssForCausalLM", **{**EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    ),
    "GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=HEADS, n_positions=128)
    ),
}


def build(name: str, make: Callable[[], Any] | None = None) -> Any:
    """A tiny model of a class, its weights random and large enough that a wrong order of rows shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (make or MODELS[name])()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model.float().eval()


def made(name: str, **options: Any) -> Any:
    """The same with other options of its config."""
    return build(name, _make(name, **options))


def base_of(model: nn.Module) -> Base:
    """What a format is told of a model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {path: first[id(p)] for path, p in parameters.items() if first.setdefault(id(p), path) != path}
    config: Any = model.config
    values = {**config.to_dict(), "architectures": [type(model).__name__]}
    return Base("the base", values, {path: tuple(p.shape) for path, p in parameters.items()}, tied)


# The names of weights in transformers and in a GGUF file, written out for the test.
BLOCK: Mapping[str, str] = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{"self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv"},
    **{"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{"self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp"},
    **{"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
    **{"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    **{"mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
    **{"mlp.experts.down_proj": "ffn_down_exps", "input_layernorm": "attn_norm", "attn.c_attn": "attn_qkv"},
    **{"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "ln_1": "attn_norm"},
    **{"ln_2": "ffn_norm", "post_attention_layernorm": "ffn_norm"},
    **{"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
}
FOUR_NORMS: Mapping[str, str] = {
    **{"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"},
    **{"post_feedforward_layernorm": "post_ffw_norm"},
}
OUTSIDE: Mapping[str, str] = {
    "model.final_layernorm": "output_norm",
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"},
}
PAIRS = ("llama", "smollm3", "granite", "arcee", "olmo", "mistral3")
HAVE_FOUR_NORMS = ("gemma2", "gemma3", "olmo2", "exaone4")
HAVE_POST_NORM = ("seed_oss", "gpt-oss")


def write_base(model: Any, architecture: str, path: Path) -> Path:
    """Write a model as llama.cpp's converter would."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    _add_values(writer, architecture, getattr(model.config, "text_config", model.config))
    for name, tensor in _tensors(model, architecture).items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_values(writer: Any, architecture: str, config: Any) -> None:
    import gguf

    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 128))
    writer.add_head_count(HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))
    writer.add_layer_norm_eps(1e-5)
    if architecture != "gpt2":
        rope = config.rope_parameters
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(HEAD_SIZE)
        writer.add_value_length(HEAD_SIZE)
        writer.add_rope_dimension_count(int(HEAD_SIZE * rope.get("partial_rotary_factor", 1)))
        writer.add_rope_freq_base(float(rope.get("full_attention", rope).get("rope_theta", 10000.0)))
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_sliding_window(0)
    if architecture in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(64)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture == "cohere2":
        writer.add_sliding_window(64)
    if architecture in ("command-r", "cohere2"):
        writer.add_logit_scale(config.logit_scale)
    if architecture in ("qwen2vl", "qwen3vl", "qwen3vlmoe"):
        writer.add_rope_dimension_sections([2, 1, 1, 0])
    if architecture in ("qwen3vl", "qwen3vlmoe"):
        writer.add_num_deepstack_layers(0)
    if architecture == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture in ("qwen2moe", "qwen3moe", "qwen3vlmoe"):
        writer.add_expert_feed_forward_length(24)
        writer.add_expert_shared_feed_forward_length(40)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(model: Any, architecture: str) -> dict[str, Tensor]:
    tensors = {}
    for path, tensor in model.named_parameters():
        plain = path.replace("model.language_model.", "model.")
        if "vis" in plain or "multi_modal" in plain:
            continue
        has_leaf = plain.endswith((".weight", ".bias"))
        module, _, leaf = plain.rpartition(".") if has_leaf else (plain, "", "weight")
        inner = module.split(".", 3)[3] if module.count(".") > 2 else ""
        block = f"blk.{module.split('.')[2]}" if inner else ""
        if architecture == "gpt-oss" and ".experts." in inner:
            tensors |= _turned_experts(tensor, inner, block)
        elif inner == "mlp.experts.gate_up_proj":
            tensors[f"{block}.ffn_gate_exps.weight"], tensors[f"{block}.ffn_up_exps.weight"] = tensor.chunk(2, 1)
        elif inner:
            norms = FOUR_NORMS if architecture in (*HAVE_FOUR_NORMS, *HAVE_POST_NORM) else {}
            name = {**BLOCK, **norms}[inner]
            tensors[f"{block}.{name}.{leaf}"] = _one_more(
                _rows(tensor, name, leaf, architecture), f"{inner}.{leaf}", architecture
            )
        else:
            tensors[f"{OUTSIDE[module]}.{leaf}"] = _one_more(tensor, f"{module}.{leaf}", architecture)
    return tensors


def _turned_experts(tensor: Tensor, inner: str, block: str) -> dict[str, Tensor]:
    """The weights and biases of gpt-oss' experts, where gate and up take turns."""
    leaf = "bias" if inner.endswith("_bias") else "weight"
    rows = tensor if leaf == "bias" else tensor.mT
    if "gate_up" not in inner:
        return {f"{block}.ffn_down_exps.{leaf}": rows}
    return {f"{block}.ffn_gate_exps.{leaf}": rows[:, 0::2], f"{block}.ffn_up_exps.{leaf}": rows[:, 1::2]}


def _one_more(tensor: Tensor, path: str, architecture: str) -> Tensor:
    adds_one = architecture.startswith("gemma") or architecture == "nemotron"
    return tensor + 1 if path.endswith("norm.weight") and adds_one else tensor


def _rows(tensor: Tensor, name: str, leaf: str, architecture: str) -> Tensor:
    """The rows of a weight as the converter orders them, by an index of rows and not by reshaping."""
    if architecture == "gpt2" and leaf == "weight" and tensor.ndim == 2:
        return tensor.T
    if architecture not in PAIRS or name not in ("attn_q", "attn_k"):
        return tensor
    return tensor[pair_order(HEADS if name == "attn_q" else KEYS, tensor.shape[0])]


def pair_order(heads: int, rows: int) -> list[int]:
    """The row of a weight in transformers for each of its rows in a GGUF file."""
    size = rows // heads
    order = [0] * rows
    for head in range(heads):
        for upper in (0, 1):
            for k in range(size // 2):
                order[head * size + 2 * k + upper] = head * size + upper * (size // 2) + k
    return order


def same_weights(one: Path, other: Path) -> bool:
    """Whether two adapters' folders hold the same tensors and metadata, bit for bit, in whatever order."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    files = [folder / "adapter_model.safetensors" for folder in (one, other)]
    first, second = (load_file(file) for file in files)
    metadata = [safe_open(file, "pt").metadata() for file in files]
    alike = first.keys() == second.keys() and all(first[key].dtype == second[key].dtype for key in first)
    return alike and metadata[0] == metadata[1] and all(torch.equal(first[key], second[key]) for key in first)


def server(model: Path, adapter: Path | None = None) -> Any:
    """A model in llama.cpp, with an adapter."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def probabilities(model: Path, tokens: list[int], adapter: Path | None = None) -> Any:
    """The logarithm of each token's probability after a prompt, in llama.cpp."""
    options = {"prompt": tokens, "n_predict": 1, "temperature": 0, "n_probs": VOCAB}
    answer = server(model, adapter).handle_completions(options)
    values = numpy.full(VOCAB, -numpy.inf)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values
