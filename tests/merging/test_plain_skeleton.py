"""A skeleton made from headers is the one that transformers makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import veneer
from tests.models import build
from tests.random_adapters import saved
from veneer.base_model.catalog import Catalog
from veneer.base_model.plain_families import FAMILIES
from veneer.base_model.sites.vector import is_norm
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.merging.base.plain_skeleton import plain_skeleton, plainly_stored
from veneer.merging.base.skeleton import build_skeleton, stored_names
from veneer.merging.base.weight_files import WeightFiles

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def base(folder: Path, family: str, **options: Any) -> Source:
    config = transformers.AutoConfig.for_model(family, **SIZES, **options)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return resolve(folder)


def files_of(source: Source) -> WeightFiles:
    return WeightFiles.open(source)


def described(model: nn.Module) -> dict[str, Any]:
    """Describe a model by all that a merge reads of it."""
    catalog = Catalog(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "class": type(model).__name__,
        "model type": catalog.model_type,
        "parameters": {
            name: (tuple(parameter.shape), parameter.dtype, parameter.device.type, names[id(parameter)])
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        "ends": (catalog.input_embeddings, catalog.output_embeddings),
        "linear": [name for name, is_linear in catalog.linear.items() if is_linear],
        "norms": [name for name, module in catalog.modules.items() if is_norm(module)],
        "sites": {name: [(type(s), s.shape) for s in catalog.sites_at(name)] for name in catalog.linear},
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    source = base(tmp_path, family, tie_word_embeddings=tied)
    files = files_of(source)
    plain, theirs = plain_skeleton(source, files, [], None), build_skeleton(source, [], None)
    assert plain is not None
    ours, right = described(plain), described(theirs)
    right["sites"] = {name: sites for name, sites in right["sites"].items() if sites}
    ours["sites"] = {name: sites for name, sites in ours["sites"].items() if sites}
    for values in (ours, right):
        values["parameters"] = dict(sorted(values["parameters"].items()))
        values["linear"], values["norms"] = sorted(values["linear"]), sorted(values["norms"])
    assert ours == right
    shapes = {name: place.info.shape for name, place in files.places.items()}
    assert plainly_stored(files) == stored_names(theirs, shapes, shapes)
    files.close()


@pytest.mark.parametrize(
    ("family", "options", "changes"),
    [
        ("llama", {"attention_bias": True}, {}),
        ("llama", {}, {"architectures": ["LlamaForSequenceClassification"]}),
        ("llama", {}, {"hidden_size": 16}),
        ("llama", {}, {"tie_word_embeddings": True}),
        ("llama", {}, {"quantization_config": {"quant_method": "fp8"}}),
        ("gemma", {"head_dim": 8}, {}),
    ],
)
def test_what_is_not_plain_is_left_to_transformers(
    family: str, options: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    source = base(tmp_path, family, **options)
    files = files_of(source)
    assert plain_skeleton(source, files, [], None, **changes) is None
    files.close()


def test_merging_a_plain_model_does_not_import_transformers(tmp_path: Path) -> None:
    model: Any = build("llama")
    model.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter")
    code = (
        "import sys, veneer; veneer.merge(sys.argv[1], sys.argv[2], out=sys.argv[3]);"
        "print([name for name in sys.modules if name in ('transformers', 'torch._dynamo')])"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("adapter", "base", "out"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["[]"]
    assert veneer.verify(tmp_path / "out", logits=False).passed
