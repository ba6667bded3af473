"""The digest of a base: the same for the same weights however they lie, another for others."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.errors import CorruptFileError, IncompleteCheckpointError
from veneer.files.base_digest import base_digest


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


def test_a_file_has_the_digest_of_its_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    one = folder(tmp_path / "one", tensors)
    assert base_digest(one / "model.safetensors") == base_digest(str(one))


def test_damaged_weights_have_no_digest(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    one = folder(tmp_path / "one", tensors, shards=2)
    shard = one / "model-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"model-0\.safetensors is damaged: truncated"):
        base_digest(one)
    shard.unlink()
    with pytest.raises(IncompleteCheckpointError, match="1 of 2 shards are missing"):
        base_digest(one)


SIZES = st.lists(st.integers(0, 200), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, shards=st.integers(2, 3), order=st.randoms(use_true_random=False), full=st.booleans())
def test_neither_order_nor_shards_matter(sizes: list[int], shards: int, order: Random, full: bool) -> None:
    tensors = {str(i): torch.arange(size, dtype=torch.uint8) + i for i, size in enumerate(sizes)}
    names = list(tensors)
    order.shuffle(names)
    with TemporaryDirectory() as place:
        one = base_digest(folder(Path(place) / "one", tensors), full=full)
        two = base_digest(folder(Path(place) / "two", {n: tensors[n] for n in names}, shards=shards), full=full)
    assert one == two


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 1000), data=st.data())
def test_every_sampled_byte_counts(size: int, data: st.DataObject) -> None:
    start = (size - 64) // 2
    sampled = sorted(
        {*range(min(64, size)), *range(max(start, 0), min(start + 64, size)), *range(max(size - 64, 0), size)}
    )
    value = torch.arange(size) % 251
    other = value.clone()
    other[data.draw(st.sampled_from(sampled))] += 1
    with TemporaryDirectory() as place:
        digests = {
            base_digest(folder(Path(place) / str(i), {"w": tensor.to(torch.uint8)}))
            for i, tensor in enumerate((value, other))
        }
    assert len(digests) == 2
