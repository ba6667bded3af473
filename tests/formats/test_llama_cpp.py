"""GGUF adapters in llama.cpp itself (the package xllamacpp), beside transformers; skipped where it is not installed.

This is what the table of architectures rests on: a wrong order of rows loads, and answers badly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.formats.llama_cpp import TIED, base_of, build, made, probabilities, write_base
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base
from veneer.formats.gguf import GgufFormat
from veneer.formats.gguf_weights import ARCHITECTURES, EMBEDDING, HEAD, Weight, weights_of

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
PROMPT = [5, 17, 33, 8, 60, 71, 4]


def expected(model: Any) -> Any:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].double()
    return torch.log_softmax(logits, -1).numpy()


def change_of(weight: Weight, base: Base, seed: int) -> ModuleChange:
    """A change of the parameter of a weight, as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    rank, scale = 2 + seed % 3, (0.5, 1.0, 2**0.5)[seed % 3]
    *experts, rows, columns = base.shapes[weight.parameter]
    if columns != weight.shape[-1]:
        rows, columns = columns, rows  # of GPT-2, and of gpt-oss' experts
    ranks = rank * (experts[0] if experts else 1)
    down = torch.randn(ranks, columns, generator=generator) * 0.25
    up = torch.randn(rows, ranks, generator=generator) * 0.25
    path = weight.parameter.removesuffix(".weight")
    if weight.name == EMBEDDING:
        return ModuleChange(path, "LORA", {"lora_embedding_A": up.T, "lora_embedding_B": down.T}, rank, scale)
    leaves = {"lora_A.weight": down, "lora_B.weight": up}
    return ModuleChange(weight.parameter if experts else path, "LORA", leaves, rank, scale, bool(experts))


def add(parameter: Tensor, change: ModuleChange) -> None:
    """Add a change to a parameter of a model."""
    leaves = change.leaves
    if "lora_embedding_A" in leaves:
        product = leaves["lora_embedding_A"].T @ leaves["lora_embedding_B"].T
    elif parameter.ndim == 3:
        down, up = leaves["lora_A.weight"], leaves["lora_B.weight"]
        product = up.unflatten(1, (-1, len(parameter))).permute(2, 0, 1) @ down.unflatten(0, (len(parameter), -1))
        product = product if product.shape == parameter.shape else product.mT
    else:
        product = leaves["lora_B.weight"] @ leaves["lora_A.weight"]
    parameter.data += change.scale * (product.T if is_gpt2(change) else product)


def is_gpt2(change: ModuleChange) -> bool:
    return change.path.startswith("transformer.h.")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_probabilities(name: str, tmp_path: Path) -> None:
    """With an adapter on every weight that can have one, and with one on each of q and k alone."""
    model = build(name)
    base = base_of(model)
    file = write_base(model, ARCHITECTURES[name].name, tmp_path / "base.gguf")
    plain = expected(model)
    numpy.testing.assert_allclose(probabilities(file, PROMPT), plain, atol=0.02)
    tied = {*base.tied, *base.tied.values()} if base.tied else set()
    ends = {EMBEDDING, HEAD} if ARCHITECTURES[name].one_table else set()
    weights = [w for w in weights_of(base) if w.parameter not in tied and w.name not in ends]
    for part in (weights, [w for w in weights if "attn_q." in w.name], [w for w in weights if "attn_k." in w.name]):
        changes = {c.path: c for seed, weight in enumerate(part) for c in [change_of(weight, base, seed)]}
        if not changes:
            continue
        adapter = tmp_path / f"{len(part)}{part[0].kind}.gguf"
        GgufFormat().write({"": CanonicalAdapter(changes)}, adapter, base)
        changed = build(name)
        parameters = dict(changed.named_parameters())
        for path, change in changes.items():
            add(parameters[path] if path in parameters else parameters[f"{path}.weight"], change)
        wanted = expected(changed)
        assert numpy.abs(wanted - plain).max() > 0.1
        numpy.testing.assert_allclose(probabilities(file, PROMPT, adapter), wanted, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    base = base_of(model)
    weight = next(weight for weight in weights_of(base) if weight.kind == "attn_output.weight")
    change = change_of(weight, base, 1)
    change = replace(change, leaves={leaf: tensor.to(dtype) for leaf, tensor in change.leaves.items()})
    GgufFormat().write({"": CanonicalAdapter({change.path: change})}, tmp_path / "a.gguf", base)
    file = write_base(model, "llama", tmp_path / "base.gguf")
    exact = replace(change, leaves={leaf: tensor.float() for leaf, tensor in change.leaves.items()})
    add(dict(model.named_parameters())[weight.parameter], exact)
    numpy.testing.assert_allclose(probabilities(file, PROMPT, tmp_path / "a.gguf"), expected(model), atol=0.03)


def test_why_a_tied_head_is_refused(tmp_path: Path) -> None:
    """llama.cpp finds no output weight on a tied base (and stops the process for a LoRA of its embedding)."""
    model = made("Qwen2ForCausalLM", **TIED)
    untied = base_of(build("Qwen2ForCausalLM"))
    change = change_of(next(weight for weight in weights_of(untied) if weight.name == HEAD), untied, 0)
    GgufFormat().write({"": CanonicalAdapter({change.path: change})}, tmp_path / "a.gguf", untied)
    file = write_base(model, "qwen2", tmp_path / "base.gguf")
    with pytest.raises(Exception, match="Failed to init"):
        probabilities(file, PROMPT, tmp_path / "a.gguf")
