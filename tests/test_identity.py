"""The digest of a base: the same for the same weights however they lie, another for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.errors import IncompleteCheckpointError
from veneer.identity import base_digest


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(40, 30, generator=generator) for name in "abc"}


def folder(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    path.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    parts = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(parts.values()):
        save_file({n: tensors[n] for n in names if parts[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return path


@pytest.mark.parametrize("full", [False, True])
def test_it_is_of_the_weights_alone(tmp_path: Path, tensors: dict[str, Tensor], full: bool) -> None:
    one = base_digest(folder(tmp_path / "one", tensors), full=full)
    assert one.startswith("sha256-full:" if full else "sha256:")
    turned = dict(reversed(tensors.items()))
    assert base_digest(folder(tmp_path / "sharded", turned, shards=2), full=full) == one
    (tmp_path / "one" / "config.json").write_text("{}")
    assert base_digest(tmp_path / "one", full=full) == one


@pytest.mark.parametrize("place", [(0, 0), (39, 29), (20, 0)])
def test_another_value_is_another_base(tmp_path: Path, tensors: dict[str, Tensor], place: tuple[int, int]) -> None:
    one = base_digest(folder(tmp_path / "one", tensors))
    tensors["b"][place] += 1
    assert base_digest(folder(tmp_path / "two", tensors)) != one


def test_a_name_a_shape_or_a_dtype_makes_another_base(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    zero = {"a": torch.zeros(4, 2)}
    variants = [zero, {"b": zero["a"]}, {"a": torch.zeros(2, 4)}, {"a": torch.zeros(4, 2, dtype=torch.int32)}]
    digests = {base_digest(folder(tmp_path / str(i), variant)) for i, variant in enumerate(variants)}
    assert len(digests) == len(variants)


def test_between_the_samples_only_the_full_digest_sees(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    one = folder(tmp_path / "one", tensors)
    changed = load_file(one / "model.safetensors")
    changed["b"][10, 0] += 1
    two = folder(tmp_path / "two", changed)
    assert base_digest(one) == base_digest(two)
    assert base_digest(one, full=True) != base_digest(two, full=True)


def test_there_must_be_weights(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpointError):
        base_digest(tmp_path)
