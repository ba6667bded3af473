"""The base's files are hashed from the first moment on, and those that change are hashed again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors.torch import load_file, save_file

import veneer
from tests.random_adapters import edit_config, saved, saved_base
from veneer.files.lookup_options import LookupOptions
from veneer.merging.base import hashing as room
from veneer.merging.base.hashing import Hashing, digest_of, stamp_of
from veneer.merging.work import prepare
from veneer.merging.work.inputs import likely_weights


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Make ``base/`` and ``adapter/``, whose config names no base."""
    saved_base(tmp_path / "base")
    saved(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path=None)
    return tmp_path


def digest(path: Path) -> str:
    return f"blake3:{blake3(path.read_bytes()).hexdigest()}"


def test_the_name_of_merge_brings_no_torch() -> None:
    code = (
        "import sys, veneer; veneer.merge; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_files_are_found_without_torch(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, weights = world / "adapter", [world / "base" / "model.safetensors"]
    assert likely_weights(adapter, world / "base", LookupOptions()) == weights
    assert likely_weights(adapter, str(world / "base"), LookupOptions()) == weights
    assert likely_weights({adapter: 0.5}, None, LookupOptions()) == []
    edit_config(adapter, base_model_name_or_path="../base")
    assert [path.resolve() for path in likely_weights([adapter, "other"], None, LookupOptions())] == weights
    edit_config(adapter, base_model_name_or_path="acme/base")
    assert likely_weights(adapter, None, LookupOptions()) == []
    monkeypatch.setenv("VENEER_BASE_MAP", f"acme/base={world / 'base'}")
    assert likely_weights(adapter, None, LookupOptions()) == weights


@pytest.mark.parametrize("adapters", [[], "nowhere", 7, {}])
def test_a_guess_never_complains(adapters: Any) -> None:
    assert (
        likely_weights(adapters, None, LookupOptions())
        == likely_weights(adapters, "nowhere/at-all", LookupOptions())
        == []
    )


def test_each_file_is_hashed_once_and_before_anything_is_read(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []
    before: list[Path] = []

    def counting(path: Path, given_up: Callable[[], bool] = lambda: False) -> str:
        begun.append(path)
        return digest_of(path, given_up)

    def preparing(*args: Any, real: Any = prepare.prepare) -> Any:
        before.extend(begun)
        return real(*args)

    monkeypatch.setattr(room, "digest_of", counting)
    monkeypatch.setattr(room.ThreadPoolExecutor, "submit", at_once)
    monkeypatch.setattr(prepare, "prepare", preparing)
    veneer.merge(world / "adapter", world / "base", out=world / "out")
    assert before == [world / "base" / "model.safetensors"]
    assert set(Counter(begun).values()) == {1}


def at_once(self: Any, action: Callable[..., Any], *args: Any) -> Any:
    """Do a pool's work in the thread that asks for it."""
    future: Any = room.Future()
    future.set_result(action(*args))
    return future


def test_a_base_that_changes_before_it_is_opened_is_hashed_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = world / "base" / "model.safetensors"
    first = digest(path)

    def preparing(*args: Any, real: Any = prepare.prepare) -> Any:
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", preparing)
        veneer.merge(world / "adapter", world / "base", out=world / "out")
    told = json.loads((world / "out" / "merge_manifest.json").read_text())["base"]["digests"][path.name]
    assert told == digest(path) != first
    assert veneer.verify(world / "out", world / "adapter", world / "base").passed


def test_files_that_were_not_foreseen_are_hashed_too(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("a", "b")}
    for name, path in paths.items():
        path.write_bytes(name.encode() * 1000)
    hashing = Hashing([paths["a"], tmp_path / "gone"])
    hashing.expect(paths, {name: stamp_of(path) for name, path in paths.items()})
    assert hashing.result() == {name: digest(path) for name, path in paths.items()}
    hashing.close()


def test_it_is_given_up_in_the_middle_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(100))
    with pytest.raises(CancelledError):
        digest_of(tmp_path / "large", lambda: True)


def test_it_hashes_while_torch_is_imported(world: Path) -> None:
    """In a process of its own, the command begins hashing before torch is imported."""
    code = (
        "import sys, veneer\n"
        "from veneer.merging.base import hashing\n"
        "def told(*a, real=hashing.Hashing._begin): print('torch' in sys.modules); return real(*a)\n"
        "hashing.Hashing._begin = told\n"
        "veneer.merge(sys.argv[1], sys.argv[2], out=sys.argv[3])"
    )
    command = [sys.executable, "-c", code, *(str(world / name) for name in ("adapter", "base", "out"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
    assert veneer.inspect(world / "out").kind == "model"
