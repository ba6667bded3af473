"""Gives the names that MLX-LM has for the modules of each kind of model; imports no torch.

MLX's models have the module tree of transformers, but for the prefixes and the experts that its model files rename. A
kind of model that is not in the table is refused: a wrong guess would not load, or adapt another layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.errors import UnsupportedError
from veneer.formats.format import Base

WEIGHTS = "adapters.safetensors"
LEAF = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_a|lora_b|m)")
GATE, UP = "gate_proj", "up_proj"
_FUSED = "gate_up_proj"


@dataclass(frozen=True)
class MlxFamily:
    """The names of one kind of model.

    Attributes:
        prefixes: beginning of a path in transformers -> in MLX; a path with none of them has no counterpart in MLX.
        experts: the module of a layer's fused experts in transformers, and in MLX; ``None`` where there are none.
        interleaved: True where gate and up have every other row of the experts' parameter, and not a half each.
        router: the layer that chooses the experts in transformers, and in MLX; a parameter in transformers.
        no_layers: modules that MLX has, and not as a layer that takes a LoRA.
        always_tied: True where MLX has no output layer of its own for any model of the kind.
    """

    prefixes: tuple[tuple[str, str], ...] = (("model.", "model."), ("lm_head", "lm_head"))
    experts: tuple[str, str] | None = None
    interleaved: bool = False
    router: tuple[str, str] | None = None
    no_layers: tuple[str, ...] = ()
    always_tied: bool = False


@dataclass(frozen=True)
class MlxName:
    """The place of a base's module or parameter in MLX.

    Attributes:
        path: the module in MLX; of a parameter that MLX has in two halves, their parent.
        halves: the names of the halves (gate and up) below ``path``; empty where it is one module.
        is_stack: True for a matrix for each expert.
    """

    path: str
    halves: tuple[str, ...] = ()
    is_stack: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules in MLX."""
        return tuple(f"{self.path}.{half}" for half in self.halves) or (self.path,)


_PLAIN = MlxFamily()
_TIED = MlxFamily(always_tied=True)
# Of a language model beside an encoder of images.
WRAPPED = MlxFamily(
    prefixes=(
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
        ("model.layers.", "language_model.model.layers."),
        ("model.embed_tokens", "language_model.model.embed_tokens"),
    )
)
_WRAPPED_SWITCH = MlxFamily(
    WRAPPED.prefixes, experts=("mlp.experts", "mlp.switch_mlp"), router=("mlp.gate", "mlp.gate")
)
_SWITCH = MlxFamily(experts=("mlp.experts", "mlp.switch_mlp"), router=("mlp.gate", "mlp.gate"))
_BLOCK_SPARSE = "block_sparse_moe.switch_mlp"

# ``model_type`` -> names. Each was compared with the model of mlx-lm 0.32, weight by weight.
FAMILIES: Mapping[str, MlxFamily] = {
    **dict.fromkeys(
        (
            *("apertus", "ernie4_5", "exaone4", "gemma3_text", "gemma4_text", "glm4", "granite"),
            *("helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron", "olmo2", "phi", "phi3"),
            *("qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma2", "lfm2"), _TIED),
    **dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"), WRAPPED),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_vl_moe"), _WRAPPED_SWITCH),
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"), _SWITCH),
    "deepseek_v3": MlxFamily(experts=("mlp.experts", "mlp.switch_mlp"), no_layers=("mlp.gate", "self_attn.kv_b_proj")),
    "dots1": MlxFamily(experts=("mlp.experts", "mlp.experts"), no_layers=("mlp.gate",)),
    "glm4_moe": MlxFamily(experts=("mlp.experts", "mlp.switch_mlp"), no_layers=("mlp.gate",)),
    "mixtral": MlxFamily(experts=("mlp.experts", _BLOCK_SPARSE), router=("mlp.gate", "block_sparse_moe.gate")),
    "phimoe": MlxFamily(experts=("mlp.experts", _BLOCK_SPARSE), router=("mlp.router", "block_sparse_moe.gate")),
    "granitemoe": MlxFamily(
        experts=("block_sparse_moe.experts", _BLOCK_SPARSE),
        router=("block_sparse_moe.router", "block_sparse_moe.router.layer"),
    ),
    "gpt_oss": MlxFamily(experts=("mlp.experts", "mlp.experts"), router=("mlp.router", "mlp.router"), interleaved=True),
    "gpt2": MlxFamily(prefixes=(("transformer.", "model."),), always_tied=True),
    "gpt_bigcode": MlxFamily(prefixes=(("transformer.", "transformer."), ("lm_head", "lm_head"))),
    "gptj": MlxFamily(prefixes=(("transformer.", "model."), ("lm_head", "lm_head"))),
    "gpt_neox": MlxFamily(
        prefixes=(
            ("gpt_neox.layers.", "model.h."),
            ("gpt_neox.embed_in", "model.embed_in"),
            ("lm_head", "model.embed_out"),
            ("embed_out", "model.embed_out"),
        )
    ),
}

# The names of the layers that are embeddings, in all families.
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in")
# Modules that have the same names in every family that has them; only of these a path is read without the base.
_SURE = re.compile(r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)")
_LAYER = re.compile(r"(?P<layers>.*\.(?:layers|h))\.(?P<index>\d+)\.(?P<inner>.+)")


def family_of(base: Base) -> MlxFamily:
    """Return the names of a base's kind.

    Raises:
        UnsupportedError: they are not known.
    """
    model_type = str(base.config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"{base.origin}: the names that MLX-LM has for a model of type {model_type!r} are not known here.",
            hint=f"Known: {', '.join(sorted(FAMILIES))}. Or merge the adapter (veneer merge), and convert the model.",
        )
    return FAMILIES[model_type]


def is_tied(base: Base, family: MlxFamily) -> bool:
    """Tell whether the base in MLX computes its output with the input embedding."""
    text = base.config.get("text_config")
    configs = (base.config, text if isinstance(text, Mapping) else {})
    return bool(base.tied) or family.always_tied or any(c.get("tie_word_embeddings") for c in configs)


def mlx_name(path: str, family: MlxFamily) -> MlxName | None:
    """Return the place in MLX of a module, or of a parameter that is none of its own; ``None`` where it has none."""
    for prefix, other in family.prefixes:
        if path.startswith(prefix) and not path.removesuffix(".weight").endswith(family.no_layers):
            return _inner_name(other + path.removeprefix(prefix), family)
    return None


def _inner_name(path: str, family: MlxFamily) -> MlxName:
    """Return the place of what lies in a layer, given its path with the prefix of MLX."""
    module = path.removesuffix(".weight")
    if family.router and module.endswith(f".{family.router[0]}"):
        return MlxName(module.removesuffix(family.router[0]) + family.router[1])
    head, _, name = path.rpartition(".")
    if family.experts is None or not head.endswith(f".{family.experts[0]}"):
        return MlxName(path)
    experts = head.removesuffix(family.experts[0]) + family.experts[1]
    return MlxName(experts, (GATE, UP), True) if name == _FUSED else MlxName(f"{experts}.{name}", is_stack=True)


def paths_by_module(base: Base, family: MlxFamily) -> dict[str, str]:
    """Return each module of MLX -> the base's module, or its parameter that is no module of its own."""
    paths: dict[str, str] = {}
    for parameter in base.shapes:
        is_router = family.router is not None and parameter.endswith(f".{family.router[0]}.weight")
        path = parameter if is_router else parameter.removesuffix(".weight")
        name = mlx_name(path, family)
        paths.update(dict.fromkeys(name.modules if name else (), path))
    return paths


def is_sure(module: str) -> bool:
    """Tell whether a module of MLX has the same name in every base that has it."""
    return _SURE.fullmatch(module) is not None or module == "lm_head"


def is_embedding(module: str) -> bool:
    """Tell whether a module is an embedding."""
    return module.rpartition(".")[2] in EMBEDDINGS


def common_layers(modules: list[str], base: Base, family: MlxFamily) -> tuple[int, list[str]] | None:
    """Return the number of last layers, and the names in each, where exactly those are the modules; else ``None``.

    All readers of MLX know this form. Full paths, for other adapters, are known to mlx-lm alone.
    """
    layers = {
        int(match["index"])
        for parameter in base.shapes
        if (name := mlx_name(parameter, family)) and (match := _LAYER.fullmatch(name.path))
    }
    matches = [_LAYER.fullmatch(module) for module in modules]
    adapted: dict[int, set[str]] = {}
    for match in matches:
        if match is None:
            return None
        adapted.setdefault(int(match["index"]), set()).add(match["inner"])
    names = next(iter(adapted.values()), set())
    first = max(layers, default=-1) + 1 - len(adapted)
    if min(adapted, default=-1) != first or any(inner != names for inner in adapted.values()):
        return None
    return len(adapted), sorted(names)
