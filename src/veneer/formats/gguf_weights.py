"""Says how the weights of a base lie in the GGUF file that llama.cpp's converter makes of it: names, rows, halves.

It is a table by the class of the model. A class that it does not list is refused: an adapter that is rearranged in
another way than its base loads, and answers badly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from veneer.errors import BaseModelError, UnsupportedError, did_you_mean
from veneer.formats.format import Base

if TYPE_CHECKING:
    from gguf import TensorNameMap


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter rearranges the weights of a class of models.

    Attributes:
        name: as ``general.architecture`` has it.
        pairs: True if the rows of ``q_proj`` and ``k_proj`` change places within each head, so that the two which a
            rotation turns lie side by side; as they are in transformers, they lie half a head apart.
        transposed: True if the base stores its layers' weights as ``(in, out)``.
        turned_experts: True if the base stores its experts' weights as ``(in, out)``, gate and up taking turns in them.
        one_table: True if llama.cpp always uses the embedding's table as the output head too.
        text: the ``model_type`` that the language model has to be of, where models of the class have several.
    """

    name: str
    pairs: bool = False
    transposed: bool = False
    turned_experts: bool = False
    one_table: bool = False
    text: tuple[str, ...] = ()


# The class in a base's config -> how its weights lie in a GGUF file. Each was run in llama.cpp beside transformers, an
# adapter on all its layers: see tests/formats/test_llama_cpp.py.
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", pairs=True),
    "MistralForCausalLM": Architecture("llama", pairs=True),
    "MixtralForCausalLM": Architecture("llama", pairs=True),
    "Ministral3ForCausalLM": Architecture("mistral3", pairs=True),
    "Mistral3ForConditionalGeneration": Architecture("mistral3", pairs=True, text=("mistral", "ministral3")),
    "SmolLM3ForCausalLM": Architecture("smollm3", pairs=True),
    "GraniteForCausalLM": Architecture("granite", pairs=True),
    "ArceeForCausalLM": Architecture("arcee", pairs=True),
    "OlmoForCausalLM": Architecture("olmo", pairs=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2"),
    "OlmoeForCausalLM": Architecture("olmoe"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "Qwen2VLForConditionalGeneration": Architecture("qwen2vl"),
    "Qwen2_5_VLForConditionalGeneration": Architecture("qwen2vl"),
    "Qwen3VLForConditionalGeneration": Architecture("qwen3vl"),
    "Qwen3VLMoeForConditionalGeneration": Architecture("qwen3vlmoe"),
    "GemmaForCausalLM": Architecture("gemma", one_table=True),
    "Gemma2ForCausalLM": Architecture("gemma2", one_table=True),
    "Gemma3ForCausalLM": Architecture("gemma3", one_table=True),
    "Gemma3ForConditionalGeneration": Architecture("gemma3", one_table=True),
    "PhiForCausalLM": Architecture("phi2"),
    "Phi3ForCausalLM": Architecture("phi3"),
    "CohereForCausalLM": Architecture("command-r", one_table=True),
    "Cohere2ForCausalLM": Architecture("cohere2", one_table=True),
    "Ernie4_5ForCausalLM": Architecture("ernie4_5"),
    "Exaone4ForCausalLM": Architecture("exaone4"),
    "GlmForCausalLM": Architecture("chatglm"),
    "Glm4ForCausalLM": Architecture("glm4"),
    "HunYuanDenseV1ForCausalLM": Architecture("hunyuan-dense"),
    "NemotronForCausalLM": Architecture("nemotron"),
    "SeedOssForCausalLM": Architecture("seed_oss"),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
    "GptOssForCausalLM": Architecture("gpt-oss", turned_experts=True),
    "GPT2LMHeadModel": Architecture("gpt2", transposed=True),
}
# The weights to which llama.cpp adds a LoRA, by their names in a block and outside; it passes over any other.
_LAYERS = frozenset(
    f"{name}.weight"
    for name in (
        *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        *("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        *("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    )
)
# How the names of the two factors end.
FACTORS = (".lora_a", ".lora_b")
EMBEDDING, HEAD, ROUTER = "token_embd.weight", "output.weight", "ffn_gate_inp.weight"
# Experts' gate and up are one parameter in transformers, and two weights in a GGUF file: its name -> theirs.
_HALVES: Mapping[str, tuple[str, ...]] = {".experts.gate_up_proj": (".experts.gate_proj", ".experts.up_proj")}
_TEXT_MODEL = "model.language_model."


@dataclass(frozen=True)
class Weight:
    """A weight of the base, or half of one, in the base's GGUF file.

    Attributes:
        name: in the GGUF file: ``blk.0.attn_q.weight``.
        parameter: the base's parameter that it is, or is half of.
        shape: ``(out, in)`` or ``(experts, out, in)``; of an embedding ``(vocabulary, dim)``.
        half: which half of the parameter's rows it is; ``None`` if it is all of them.
        interleaved: True if that half is every other row.
        heads: the number of heads whose rows change places; 0 where rows lie as in the base.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    half: int | None = None
    interleaved: bool = False
    heads: int = 0

    @property
    def kind(self) -> str:
        """Its name without the number of its block."""
        return re.sub(r"^blk\.\d+\.", "", self.name)


def architecture_of(base: Base) -> Architecture:
    """Return how the weights of a base lie in a GGUF file.

    Raises:
        BaseModelError: its config names no class. UnsupportedError: the class is not in the table.
    """
    classes = base.config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise BaseModelError(
            f"The config of {base.origin} does not name the class of the model (architectures).",
            hint="Give a base whose config.json does.",
        )
    architecture = ARCHITECTURES.get(classes[0])
    kind = _text_config(base).get("model_type")
    if architecture is not None and architecture.text and kind not in architecture.text:
        raise _unknown(base, f"{classes[0]} with a {kind}")
    if architecture is None:
        raise _unknown(base, classes[0], did_you_mean(classes[0], ARCHITECTURES))
    return architecture


def _unknown(base: Base, what: str, near: str = "") -> UnsupportedError:
    known = ", ".join(ARCHITECTURES)
    return UnsupportedError(
        f"{base.origin} is a {what}, and how its weights lie in a GGUF file is not known here.",
        hint=f"{near}Known: {known}. For another, merge, and convert the merged model with llama.cpp: veneer merge "
        "ADAPTER --out NEW.",
    )


def weights_of(base: Base) -> list[Weight]:
    """Return the weights of a base that can have a LoRA in a GGUF file.

    Raises:
        BaseModelError, UnsupportedError: as :func:`architecture_of`.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = architecture_of(base)
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(number, _blocks(base))
    found = [weight for path, shape in base.shapes.items() for weight in _weights(path, shape, names, architecture)]
    return [_with_heads(weight, base) for weight in found] if architecture.pairs else found


def _blocks(base: Base) -> int:
    numbers = (int(part) for path in base.shapes for part in path.split(".") if part.isdecimal())
    return max(numbers, default=-1) + 1


def _weights(
    parameter: str, shape: tuple[int, ...], names: TensorNameMap, architecture: Architecture
) -> Iterator[Weight]:
    """Yield what a parameter is in a GGUF file: one weight, the halves of experts, or nothing."""
    plain = parameter.replace(_TEXT_MODEL, "model.", 1) if parameter.startswith(_TEXT_MODEL) else parameter
    plain = plain.removesuffix(".weight")
    is_turned = architecture.turned_experts if len(shape) == 3 else architecture.transposed
    stored = shape
    shape = (*shape[:-2], *shape[:-3:-1]) if is_turned else shape
    for ending, halves in _HALVES.items():
        if plain.endswith(ending):
            half_shape = (*shape[:-2], shape[-2] // 2, shape[-1])
            for half, other in enumerate(halves):
                name = f"{names.get_name(plain.removesuffix(ending) + other)}.weight"
                yield Weight(name, parameter, half_shape, half, is_turned)
            return
    name = f"{names.get_name(plain)}.weight"
    weight = Weight(name, parameter, shape)
    if weight.kind in _LAYERS:
        yield weight
    elif name in (EMBEDDING, HEAD):
        yield replace(weight, shape=stored)


def _with_heads(weight: Weight, base: Base) -> Weight:
    """Return a weight with the number of its heads, if its rows change places."""
    key = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(weight.kind)
    if key is None:
        return weight
    config = _text_config(base)
    heads = config.get(key) or config.get("num_attention_heads")
    if type(heads) is not int or heads < 1 or weight.shape[0] % (2 * heads):
        raise BaseModelError(
            f"The config of {base.origin} gives {key} as {heads!r}, which does not fit the {weight.shape[0]} rows of "
            f"{weight.parameter}.",
            hint="Give the base that the adapter was trained on.",
        )
    return replace(weight, heads=heads)


def _text_config(base: Base) -> Mapping[str, Any]:
    text = base.config.get("text_config")
    return text if isinstance(text, Mapping) else base.config
