"""Counts the bytes that a training step of an adapter keeps in memory, beside peft: exact, on the CPU, in seconds.

    python benchmarks/saved_bytes.py [--only DoRA] [--native] [--keep]       prints a table

Three figures, in bytes a token and block, of a tiny Llama in bfloat16 with all seven linear layers adapted:

    saved   storages that autograd packs for the backward pass; parameters do not count
    alive   storages that are there when the forward pass ends: also what hides from autograd's hooks
    peak    the most that is there at any point of forward and backward pass

Each is the slope between two lengths, so that what does not grow with the tokens drops out. From ``saved`` and
``alive`` the frozen base's are taken off. With h hidden, k the keys' width, m the intermediate one and r the rank,
``saved`` of LoRA is here ``2 (2h + m)``; in peft ``4 (6h + m) + 28 r``, and twice the first part under dropout.
``--native`` has dropout as on CUDA, where its mask is a byte an entry.
``--keep`` writes the figures into ``saved_bytes.json``, of which ``run.py --report`` makes the table again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS_FILE = Path(__file__).parent / "saved_bytes.json"
HIDDEN, INTERMEDIATE, KEYS, RANK, BLOCKS = 128, 352, 64, 8, 2
LENGTHS = (32, 96)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """An adapter, and how it is trained.

    Attributes:
        config: the name of its config's class.
        options: of the config, beside the targets.
        half: adapters are in bfloat16, not in float32.
        autocast: the model is called under autocast.
        checkpointing: activations are computed again on the way back.
    """

    config: str = "LoraConfig"
    options: Mapping[str, Any] = field(default_factory=dict)
    half: bool = False
    autocast: bool = False
    checkpointing: bool = False


LORA = {"r": RANK, "lora_alpha": 16}
DROPOUT = {**LORA, "lora_dropout": 0.1}
CASES: Mapping[str, Case] = {
    "LoRA": Case(options=LORA),
    "LoRA, dropout": Case(options=DROPOUT),
    "LoRA, autocast": Case(options=LORA, autocast=True),
    "LoRA, autocast, dropout": Case(options=DROPOUT, autocast=True),
    "LoRA, bfloat16 adapter": Case(options=LORA, half=True),
    "LoRA, bfloat16 adapter, dropout": Case(options=DROPOUT, half=True),
    "LoRA, checkpointing": Case(options=LORA, checkpointing=True),
    "LoRA, checkpointing, dropout": Case(options=DROPOUT, checkpointing=True),
    "DoRA": Case(options={**LORA, "use_dora": True}),
    # peft's VeRA wants layers of one shape.
    "VeRA": Case("VeraConfig", {"r": 64, "target_modules": ["q_proj", "o_proj"]}),
    "IA3": Case("IA3Config", {"feedforward_modules": ["down_proj"]}),
}


@dataclass(frozen=True)
class Bytes:
    """What a step keeps, in bytes a token and block."""

    saved: float
    alive: float
    peak: float


class Storages(TorchDispatchMode):
    """Notes the storages that operations make, and how many bytes of them are there.

    Attributes:
        peak: the most bytes that were there after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def alive(self) -> int:
        """The bytes that are there now."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in given:
                storage = tensor.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.alive)
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def saved_bytes(run: Callable[[], Any], known: set[int]) -> int:
    """Return the bytes of the storages that autograd keeps of ``run``, each once, without those in ``known``."""
    storages: list[tuple[StorageWeakRef, int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_of(tensor) not in known:
            storages.append((StorageWeakRef(storage), storage._cdata, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    # What was packed and dropped again is not kept, and its place may be another's by now.
    kept = {place: size for reference, place, size in storages if not reference.expired()}
    del result
    return sum(kept.values())


def base() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4 * KEYS // HIDDEN,
        vocab_size=64,
        max_position_embeddings=256,
        attn_implementation="sdpa",
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def adapted(library: Any, case: Case) -> Any:
    """Return the base with the case's adapter, whose values are random."""
    options = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **case.options}
    model = library.get_peft_model(base(), getattr(library, case.config)(**options))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data = values.bfloat16() if case.half else values.to(parameter.dtype)
    if case.checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    return model.train()


def measure(model: Any, autocast: bool = False) -> Bytes:
    """Measure a step of the blocks of a model: its loss has the size of the vocabulary."""
    blocks = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    short, long = (_step(model, blocks, length, autocast) for length in LENGTHS)
    count = (LENGTHS[1] - LENGTHS[0]) * BLOCKS
    return Bytes(*((after - before) / count for before, after in zip(short, long, strict=True)))


def _step(model: nn.Module, blocks: Any, length: int, autocast: bool) -> tuple[int, int, int]:
    inputs = torch.randn(1, length, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    known = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers(), inputs)}

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            states: Tensor = blocks(inputs_embeds=inputs, use_cache=False).last_hidden_state
            return states

    saved = saved_bytes(run, known)
    with Storages() as storages:
        states = run()
        alive = storages.alive
        states.float().sum().backward()
    model.zero_grad(set_to_none=True)
    return saved, alive, storages.peak


def own(case: Case, library: Any) -> Bytes:
    """Return what a case keeps: ``saved`` and ``alive`` without the frozen base's, ``peak`` with it."""
    whole, frozen = measure(adapted(library, case), case.autocast), measure(base(), case.autocast)
    if case.checkpointing:
        return whole
    return Bytes(whole.saved - frozen.saved, whole.alive - frozen.alive, whole.peak)


def native_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def table(results: Mapping[str, Any]) -> str:
    """Write the figures as Markdown."""
    lines = [
        "| Bytes a token and block | kept, Veneer | kept, peft | peak, Veneer | peak, peft |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, sides in results.items():
        cells = [f"{sides[side][figure]:,.0f}" for figure in ("saved", "peak") for side in ("veneer", "peft")]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose label begins with this")
    parser.add_argument("--native", action="store_true", help="dropout as on CUDA")
    parser.add_argument("--keep", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if asked.native:
        F.dropout = native_dropout
    import peft

    import veneer

    labels = [label for label in CASES if label.startswith(asked.only)]
    results = {
        label: {name: asdict(own(CASES[label], library)) for name, library in (("veneer", veneer), ("peft", peft))}
        for label in labels
    }
    print(table(results))
    if asked.keep:
        RESULTS_FILE.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
