"""The store: an adapter is in it whole and checked, or not at all."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.serving.tiny_adapters import A, write_adapter
from veneer.serving import fetch
from veneer.serving.registry_types import Registration, StoredAdapter
from veneer.serving.serving_errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    ServingError,
    SourceFailedError,
)
from veneer.serving.source_files import FolderSource, RemoteSource, SourceFiles
from veneer.serving.source_policy import SourcePolicy
from veneer.serving.store import Store, StoreLimits


def opened(root: Path, limits: StoreLimits | None = None, **options: Any) -> Store:
    store = Store(root, limits, **options)
    store.open()
    return store


def added(store: Store, folder: Path, digest: str | None = None) -> StoredAdapter:
    return asyncio.run(store.add(FolderSource(folder, links=False), digest)).adapter


def nothing_left(root: Path) -> bool:
    return not [path for path in root.iterdir() if path.name.startswith(".")]


def test_an_adapter_is_kept_by_its_digest_read_only_and_without_its_source(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    source = write_adapter(tmp_path / "pirate")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "evil.py").write_text("boom")
    adapter = added(store, source)
    shutil.rmtree(source)
    assert adapter.folder == tmp_path / "store" / adapter.digest.removeprefix("sha256:")
    assert adapter.files == ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")
    assert {path.name for path in adapter.folder.iterdir()} == {*adapter.files, ".stored.json"}
    assert all(path.stat().st_mode & 0o222 == 0 for path in (adapter.folder, *adapter.folder.iterdir()))
    assert (adapter.method, adapter.rank) == ("LORA", 2)
    assert asyncio.run(store.verify(adapter.digest)) == adapter
    assert nothing_left(store.root)


def test_the_same_bytes_are_one_copy_and_other_bytes_another(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    one = added(store, write_adapter(tmp_path / "a", seed=1))
    same = added(store, write_adapter(tmp_path / "b", seed=1))
    other = added(store, write_adapter(tmp_path / "c", seed=2))
    configured = added(store, write_adapter(tmp_path / "d", seed=1, lora_alpha=9))
    assert one == same
    assert len({one.digest, other.digest, configured.digest}) == 3
    assert len(store) == 3
    assert len(list(store.root.iterdir())) == 3


def test_it_is_there_after_a_restart_and_what_was_cut_off_is_not(tmp_path: Path) -> None:
    adapter = added(opened(tmp_path / "store"), write_adapter(tmp_path / "a"))
    (tmp_path / "store" / ".fetching-abc").mkdir()
    (tmp_path / "store" / ".removing-abc").mkdir()
    (tmp_path / "store" / "notes").mkdir()
    again = opened(tmp_path / "store")
    assert again.get(adapter.digest) == adapter
    assert nothing_left(again.root)
    assert asyncio.run(again.verify(adapter.digest)) == adapter


def test_bytes_that_changed_in_the_store_are_not_served(tmp_path: Path) -> None:
    adapter = added(opened(tmp_path / "store"), write_adapter(tmp_path / "a"))
    weights = adapter.folder / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = opened(tmp_path / "store")
    with pytest.raises(AdapterInvalidError, match="no whole adapter"):
        asyncio.run(again.verify(adapter.digest))
    assert len(again) == 0


@pytest.mark.parametrize("is_whole", [True, False])
def test_bytes_that_are_replaced_while_they_are_verified_are_those_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    source = write_adapter(tmp_path / "pirate")
    digest = added(opened(tmp_path / "store"), source).digest
    store = opened(tmp_path / "store")

    async def both() -> StoredAdapter:
        loop = asyncio.get_running_loop()

        def replaced(folder: Path, names: tuple[str, ...]) -> str:
            monkeypatch.undo()
            asyncio.run_coroutine_threadsafe(store.add(FolderSource(source, links=False)), loop).result()
            return digest if is_whole else "sha256:0"

        monkeypatch.setattr("veneer.serving.store.digest_in", replaced)
        return await store.verify(digest)

    assert asyncio.run(both()) == store.get(digest)
    assert store.get(digest) is not None


def test_bytes_that_are_removed_while_they_are_verified_can_be_stored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_adapter(tmp_path / "pirate")
    digest = added(opened(tmp_path / "store"), source).digest
    store = opened(tmp_path / "store")

    async def both() -> None:
        loop = asyncio.get_running_loop()

        def removed(folder: Path, names: tuple[str, ...]) -> str:
            asyncio.run_coroutine_threadsafe(store.remove(digest), loop).result()
            return digest

        monkeypatch.setattr("veneer.serving.store.digest_in", removed)
        await store.verify(digest)

    with pytest.raises(AdapterInvalidError, match="no whole adapter"):
        asyncio.run(both())
    assert added(store, source).folder.is_dir()


def truncated(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[A][0, 3] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def deep(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": ' + "[" * 10_000)


def of_another_base(folder: Path) -> None:
    write_adapter(folder, metadata={"base_digest": "sha256:1234"})


def mixing(folder: Path) -> None:
    config = {"peft_type": "XLORA", "adapters": {"a": "/etc"}, "hidden_size": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (truncated, AdapterInvalidError, "truncated"),
        (pickled, AdapterInvalidError, "pickle"),
        (not_finite, AdapterInvalidError, "NaN or infinite"),
        (deep, AdapterInvalidError, "JSON"),
        (of_another_base, AdapterInvalidError, "another base"),
        (mixing, AdapterInvalidError, "mixes other adapters"),
        (lambda folder: (folder / "adapter_config.json").unlink(), AdapterInvalidError, "no adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), AdapterInvalidError, "no weights"),
        (lambda folder: write_adapter(folder, peft_type="NOTHING"), AdapterInvalidError, "NOTHING"),
        (lambda folder: write_adapter(folder, rank=65), AdapterTooLargeError, "rank 65"),
        (lambda folder: shutil.rmtree(folder), SourceFailedError, "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    tmp_path: Path, damage: Callable[[Path], object], kind: type[ServingError], message: str
) -> None:
    store = opened(tmp_path / "store", StoreLimits(rank=64), base_digest="sha256:5678")
    damage(write_adapter(tmp_path / "a"))
    with pytest.raises(kind, match=message) as caught:
        added(store, tmp_path / "a")
    assert str(store.root) not in str(caught.value)
    assert list(store.root.iterdir()) == []


def test_size_and_rank_are_refused_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    copied = fetch.Fetch._copied
    monkeypatch.setattr(
        fetch.Fetch, "_copied", lambda self, files, name, to: read.append(name) or copied(self, files, name, to)
    )
    with pytest.raises(AdapterTooLargeError):
        added(opened(tmp_path / "store", StoreLimits(adapter_bytes=100)), write_adapter(tmp_path / "a"))
    assert read == []
    with pytest.raises(AdapterTooLargeError):
        added(opened(tmp_path / "store", StoreLimits(rank=1)), tmp_path / "a")
    assert read == ["adapter_config.json"]


def test_another_digest_than_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    write_adapter(tmp_path / "a")
    with pytest.raises(AdapterInvalidError, match="is asked for"):
        added(store, tmp_path / "a", "sha256:" + "0" * 64)
    assert list(store.root.iterdir()) == []


def test_the_unneeded_go_first_and_those_unused_for_longest_before_others(tmp_path: Path) -> None:
    size = added(opened(tmp_path / "other"), write_adapter(tmp_path / "0", seed=0)).nbytes
    store = opened(tmp_path / "store", StoreLimits(store_bytes=3 * size + 10))
    one, two, three = (added(store, write_adapter(tmp_path / str(n), seed=n)) for n in (1, 2, 3))
    store.is_needed = lambda digest: digest == one.digest
    store.touch(two.digest)
    added(store, write_adapter(tmp_path / "4", seed=4))
    assert store.get(three.digest) is None
    assert not three.folder.exists()
    assert store.get(one.digest)
    assert store.get(two.digest)
    store.is_needed = lambda digest: True
    with pytest.raises(SourceFailedError, match="no room"):
        added(store, write_adapter(tmp_path / "5", seed=5))
    assert len(list(store.root.iterdir())) == 3


def test_a_full_disk_fails_one_registration_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path / "store")
    write_adapter(tmp_path / "a")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "flush", full)
        with pytest.raises(SourceFailedError, match="No space left") as caught:
            added(store, tmp_path / "a")
    assert "Make room" in str(caught.value)
    assert list(store.root.iterdir()) == []
    added(store, tmp_path / "a")


def test_a_source_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path / "store")
    folder = write_adapter(tmp_path / "a")
    listed = FolderSource._files

    def smaller(source: FolderSource, label: str, descriptor: int) -> SourceFiles:
        files = listed(source, label, descriptor)
        return replace(files, sizes={name: size - 1 for name, size in files.sizes.items()})

    monkeypatch.setattr(FolderSource, "_files", smaller)
    with pytest.raises(SourceFailedError, match="another size"):
        added(store, folder)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("change", [shutil.rmtree, lambda folder: os.truncate(folder / "adapter_model.safetensors", 9)])
def test_a_source_that_goes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    store = opened(tmp_path / "store")
    folder = write_adapter(tmp_path / "a")
    read = fetch._read

    def going(stream: Any) -> Any:
        if folder.exists():
            change(folder)
        return read(stream)

    monkeypatch.setattr(fetch, "_read", going)
    with pytest.raises(SourceFailedError, match=r"cannot be read|another size"):
        added(store, folder)
    assert list(store.root.iterdir()) == []
    monkeypatch.undo()
    shutil.rmtree(folder, ignore_errors=True)
    added(store, write_adapter(folder))


def test_a_fetch_that_nobody_waits_for_any_more_is_accounted_for(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    folder = write_adapter(tmp_path / "a")

    async def run() -> None:
        task = asyncio.ensure_future(store.add(FolderSource(folder, links=False)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    asyncio.run(run())
    assert len(store) == 1
    assert nothing_left(store.root)


def test_many_at_once_of_one_adapter_are_one_copy(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    folder = write_adapter(tmp_path / "a")

    async def run() -> list[StoredAdapter]:
        fetched = await asyncio.gather(*(store.add(FolderSource(folder, links=False)) for _ in range(12)))
        return [one.adapter for one in fetched]

    assert len(set(asyncio.run(run()))) == 1
    assert len(list(store.root.iterdir())) == 1


def test_what_fsspec_reaches_is_fetched(tmp_path: Path) -> None:
    import fsspec

    folder = write_adapter(tmp_path / "a")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/a/{path.name}", path.read_bytes())
    store = opened(tmp_path / "store")
    policy = SourcePolicy(("memory://bucket/*",))
    try:
        adapter = asyncio.run(store.add(policy.source(Registration("a", "memory://bucket", subfolder="a")))).adapter
    finally:
        memory.rm("/bucket", recursive=True)
    assert adapter == added(store, folder)
    with pytest.raises(SourceFailedError, match="memory://bucket/none cannot be read"):
        asyncio.run(store.add(RemoteSource("memory://bucket/none")))
    with pytest.raises(SourceFailedError, match="cannot be read"):
        asyncio.run(store.add(RemoteSource("nosuch://bucket/none")))


def test_a_repository_on_the_hub_is_fetched_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    folder = write_adapter(tmp_path / "repo" / "inner")
    asked: list[Any] = []

    def model_info(self: Any, repo: str, **options: Any) -> Any:
        asked.append((repo, options["revision"], self.token))
        names = [("README.md", 10), *((f"inner/{path.name}", path.stat().st_size) for path in folder.iterdir())]
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in names])

    def download(repo: str, name: str, *, revision: str, token: str | None) -> str:
        asked.append((repo, revision, token))
        return str(tmp_path / "repo" / name)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    store = opened(tmp_path / "store")
    policy = SourcePolicy(("hf://org/*",), {"acme": "secret"})
    source = policy.source(Registration("acme/a", "hf://org/repo@main#inner"))
    assert "secret" not in repr(policy)
    assert asyncio.run(store.add(source)).adapter == added(store, folder)
    assert asked[0] == ("org/repo", "main", "secret")
    assert set(asked[1:]) == {("org/repo", "c0ffee", "secret")}


def test_facts_that_are_damaged_are_passed_over(tmp_path: Path) -> None:
    adapter = added(opened(tmp_path / "store"), write_adapter(tmp_path / "a"))
    facts = adapter.folder / ".stored.json"
    facts.chmod(0o644)
    facts.write_text(json.dumps({"digest": adapter.digest}))
    store = opened(tmp_path / "store")
    assert len(store) == 0
    assert added(store, tmp_path / "a") == adapter
