"""Decides what each format can hold: exactly, after folding or padding, or not at all. Imports no torch.

docs/formats.md shows the table, and a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from veneer.configs.lora_start_options import is_moved
from veneer.errors import UnsupportedError

if TYPE_CHECKING:
    from veneer.formats.canonical import CanonicalAdapter, ModuleChange

EXACT, FOLD, PAD, REFUSE = "exact", "folded", "padded", "refused"


@dataclass(frozen=True)
class Holds:
    """Says for each feature of an adapter how a format holds it: ``EXACT``, ``FOLD``, ``PAD`` or ``REFUSE``.

    Attributes:
        ranks: a rank for each module.
        scales: a scale for each module.
        zero: a scale of zero.
        dora: magnitudes (DoRA).
        lora_bias: a bias of the factors.
        whole: modules, biases and token rows that are trained themselves.
        embeddings: factors of an embedding.
        convolutions: factors of a convolution.
        parameters: factors of a parameter that is no module, such as fused experts.
        methods: the methods.
        one_alpha: True where the format has one alpha, which each module divides by its rank, and not one scale.
        options: options of PEFT's config, of those in ``OPTIONS``, that the format can say too.
    """

    ranks: str = EXACT
    scales: str = EXACT
    zero: str = EXACT
    dora: str = REFUSE
    lora_bias: str = REFUSE
    whole: str = REFUSE
    embeddings: str = REFUSE
    convolutions: str = REFUSE
    parameters: str = REFUSE
    methods: tuple[str, ...] = ("LORA",)
    one_alpha: bool = False
    options: tuple[str, ...] = ()


# Format -> what it holds.
TABLE: Mapping[str, Holds] = {
    "peft": Holds(
        dora=EXACT,
        lora_bias=EXACT,
        whole=EXACT,
        embeddings=EXACT,
        convolutions=EXACT,
        parameters=EXACT,
        methods=("LORA", "LOHA", "LOKR", "IA3"),
    ),
    "mlx": Holds(ranks=PAD, scales=FOLD, zero=FOLD, dora=EXACT, embeddings=EXACT, parameters=EXACT),
    "gguf": Holds(
        scales=FOLD,
        zero=FOLD,
        embeddings=EXACT,
        parameters=EXACT,
        one_alpha=True,
        options=("alora_invocation_tokens",),
    ),
    "diffusers": Holds(dora=EXACT, lora_bias=EXACT, convolutions=EXACT),
    "kohya": Holds(zero=FOLD, convolutions=EXACT),
    "lycoris": Holds(zero=FOLD, dora=EXACT, convolutions=EXACT, methods=("LORA", "LOHA", "LOKR", "IA3")),
    "comfyui": Holds(ranks=PAD, scales=FOLD, zero=FOLD, convolutions=EXACT),
    "serving": Holds(ranks=PAD, scales=FOLD, zero=FOLD, embeddings=EXACT),
}

# Option of a LoRA's config -> what it does; a format other than PEFT's cannot say it.
OPTIONS: Mapping[str, str] = {
    "use_bdlora": "makes the factors block-diagonal",
    "use_qalora": "pools the inputs",
    "kasa_config": "changes the base's weights",
    "arrow_config": "routes tokens over other adapters",
    "alora_invocation_tokens": "begins to act at certain tokens",
    "layer_replication": "repeats layers of the base",
}
# Those of them that a plain LoRA cannot hold either.
NO_LORA = ("arrow_config", "alora_invocation_tokens", "layer_replication")
_MERGED = ("layer_replication",)

# Feature -> its name in errors and in docs/formats.md.
NAMES: Mapping[str, str] = {
    "ranks": "a rank for each module",
    "scales": "a scale for each module",
    "zero": "a scale of zero",
    "dora": "DoRA",
    "lora_bias": "a bias of the factors (lora_bias)",
    "whole": "what is trained whole (modules_to_save, biases, token rows)",
    "embeddings": "LoRA on an embedding",
    "convolutions": "LoRA on a convolution",
    "parameters": "LoRA on fused experts (target_parameters)",
}
AS_LORA = "Convert it to a plain LoRA on the way, and see what error that leaves: --as-lora --rank 16"
ALONE = "It acts by the input, which no other tool does: run it with veneer.load or `veneer serve`"
# For what cannot be read here.
MERGE_ELSEWHERE = (
    "Merge it with the tool that made it; kohya's extract_lora_from_models.py makes a LoRA of the merged model, or "
    "veneer extract of one of transformers"
)
MERGE = "Merge it into the model: veneer merge ADAPTER --out NEW"


def features() -> list[str]:
    """Return the features in the order of the table."""
    return [field.name for field in fields(Holds) if field.name in NAMES]


def features_of(change: ModuleChange) -> set[str]:
    """Return those features of a module's change that a format may refuse."""
    down = change.leaves.get("lora_A.weight")
    present = {
        "dora": "lora_magnitude_vector" in change.leaves,
        "lora_bias": "lora_B.bias" in change.leaves,
        "embeddings": "lora_embedding_A" in change.leaves,
        "convolutions": down is not None and down.ndim > 2,
        "parameters": change.is_parameter,
    }
    return {feature for feature, is_present in present.items() if is_present}


def check(adapter: CanonicalAdapter, name: str, title: str) -> None:
    """Raise ``UnsupportedError`` for the first thing of an adapter that a format cannot hold, with the way out.

    Args:
        adapter: the adapter.
        name: the format's name.
        title: the format's name for people.
    """
    holds = TABLE[name]
    for change in adapter.modules.values():
        if change.method not in holds.methods:
            raise _refused(title, f"an adapter of method {change.method}", [change.path], AS_LORA)
    for feature in features():
        paths = [path for path, change in adapter.modules.items() if feature in features_of(change)]
        if paths and getattr(holds, feature) == REFUSE:
            raise _refused(title, NAMES[feature], paths, AS_LORA if feature in ("dora", "lora_bias") else MERGE)
    if adapter.whole and holds.whole == REFUSE:
        raise _refused(title, NAMES["whole"], adapter.whole, MERGE)
    if name != "peft":
        _check_options(adapter, holds, title)


def _check_options(adapter: CanonicalAdapter, holds: Holds, title: str) -> None:
    """Refuse options of PEFT's config that change what the factors mean."""
    config = adapter.config or {}
    for option, what in OPTIONS.items():
        if config.get(option) and option not in holds.options:
            hint = AS_LORA if option not in NO_LORA else MERGE if option in _MERGED else ALONE
            raise UnsupportedError(f"{title} has no {option}, which {what}.", hint=f"{hint}.")
    start = config.get("init_lora_weights")
    if is_moved(start):
        raise UnsupportedError(
            f"{title} cannot say that the adapter is for a base without its start (init_lora_weights {start!r}).",
            hint="Convert it to a plain LoRA on the way: --as-lora.",
        )


def _refused(title: str, what: str, places: Iterable[str], hint: str) -> UnsupportedError:
    first, *others = places
    more = f" and {len(others)} more" if others else ""
    return UnsupportedError(f"{title} cannot hold {what}: {first}{more}.", hint=f"{hint}.")
