"""Finding what a path or a hub id means."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tests.files.headers import described, written
from veneer.errors import (
    CorruptFileError,
    NotACheckpointError,
    PathNotFoundError,
    PickleRefusedError,
    SourceError,
    UsageError,
)
from veneer.files.hub_page import is_hub_page, read_hub_page
from veneer.files.lookup_options import LookupOptions
from veneer.files.resolve import resolve
from veneer.files.weight_files import weight_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- finding a local path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    source = resolve(kind(tmp_path))
    assert (source.root, source.origin, source.file, source.commit) == (tmp_path, str(tmp_path), None, None)


def test_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "french").mkdir()
    source = resolve(tmp_path, LookupOptions(subfolder="french"))
    assert source.root == tmp_path / "french"
    assert source.origin == f"{tmp_path}/french"


def test_a_subfolder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "french").mkdir()
    with pytest.raises(PathNotFoundError) as caught:
        resolve(tmp_path, LookupOptions(subfolder="frensh"))
    assert "no subfolder 'frensh'" in caught.value.message
    assert str(tmp_path / "french") in (caught.value.hint or "")


@pytest.mark.parametrize("subfolder", ["..", "../..", "/etc"])
def test_a_subfolder_does_not_lead_out(subfolder: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        resolve(tmp_path, LookupOptions(subfolder=subfolder))


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    assert resolve("~/adapter").root == tmp_path / "adapter"


def test_a_single_file(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", {"a": described()})
    source = resolve(path)
    assert (source.root, source.file) == (tmp_path, path)
    assert weight_files(source, "model") == [path]
    with pytest.raises(PathNotFoundError, match="is a file"):
        resolve(path, LookupOptions(subfolder="french"))


def test_a_single_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError):
        resolve(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["notes.txt", "model.gguf", "adapter_config.json"])
def test_a_file_that_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(NotACheckpointError, match="no safetensors file"):
        resolve(tmp_path / name)


def test_a_single_pickle(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(PickleRefusedError) as caught:
        resolve(tmp_path / "model.bin")
    assert f"veneer convert-pickle {tmp_path / 'model.bin'}" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["./none", "../none", "a/b/c", "none.safetensors", "~/none-of-these", "two words"])
def test_what_looks_like_a_path_never_reaches_the_hub(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(PathNotFoundError, match="does not exist"):
        resolve(text)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(PathNotFoundError, match="'owner/name' does not exist"):
        resolve(Path("owner/name"))


def test_what_is_nearly_the_name_of_something_there(tmp_path: Path) -> None:
    (tmp_path / "adapter-french").mkdir()
    (tmp_path / "zebra").mkdir()
    with pytest.raises(PathNotFoundError) as caught:
        resolve(tmp_path / "adapter-frensh", what="adapter")
    assert caught.value.message.startswith("The adapter ")
    assert caught.value.hint == f"Did you mean {tmp_path / 'adapter-french'}?"


def test_the_first_part_of_a_path_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError) as caught:
        resolve(tmp_path / "none" / "below" / "it")
    assert caught.value.hint == f"There is no 'none' in {tmp_path}."


@pytest.mark.parametrize("text", ["", "  ", "x" * 5000, "/" + "x" * 300, "~nobody-of-this-name/x", "x\0y"])
def test_what_can_be_no_path(text: str) -> None:
    with pytest.raises(PathNotFoundError) as caught:
        resolve(text)
    assert caught.value.hint
    assert len(str(caught.value)) < 400


# -- finding a hub id ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and an empty current folder."""
    folder, here = tmp_path / "hub", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def cached(cache: Path, repo: str, *names: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """Lay out a repository in the cache."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    snapshot = repository / "snapshots" / commit
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text("{}")
    return snapshot


@pytest.mark.parametrize("repo", ["owner/name", "name"])
def test_a_cached_repository_needs_no_network(repo: str, cache: Path) -> None:
    snapshot = cached(cache, repo, "adapter_config.json", "adapter_model.safetensors")
    source = resolve(repo)
    assert (source.root, source.origin, source.commit) == (snapshot, repo, COMMIT)


def test_a_cached_revision_and_subfolder(cache: Path) -> None:
    cached(cache, "owner/name", "config.json", "model.safetensors")
    other = cached(cache, "owner/name", "fr/x.json", "fr/x.safetensors", commit="f" * 40, ref="v2")
    source = resolve("owner/name", LookupOptions("v2", "fr"))
    assert source.root.samefile(other / "fr")
    assert (source.origin, source.revision, source.commit) == ("owner/name/fr", "v2", "f" * 40)


@pytest.mark.parametrize(
    ("page", "repo", "revision"),
    [
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("http://hf.co/owner/name/?x=1#top", "owner/name", None),
        ("https://huggingface.co/name/tree/v2", "name", "v2"),
        ("https://www.huggingface.co/owner/name/tree/a%2Fb", "owner/name", "a/b"),
    ],
)
def test_the_page_of_a_model(page: str, repo: str, revision: str | None) -> None:
    assert is_hub_page(page)
    given = LookupOptions(subfolder="fr")
    assert read_hub_page(page, given, "path") == (repo, replace(given, revision=revision))
    assert read_hub_page(page, LookupOptions("v1"), "base") == (repo, LookupOptions(revision or "v1"))
    if revision is not None:
        for what, other in (("adapter", LookupOptions("v1")), ("base", LookupOptions(base_revision="v1"))):
            with pytest.raises(UsageError, match=f"at revision {revision!r}, and 'v1' is asked for"):
                read_hub_page(page, other, what)


def test_a_page_is_found_as_its_id(cache: Path) -> None:
    cached(cache, "owner/name", "config.json", "model.safetensors")
    other = cached(cache, "owner/name", "x.json", "x.safetensors", commit="f" * 40, ref="v2")
    source = resolve("https://huggingface.co/owner/name/tree/v2")
    assert source.root.samefile(other)
    assert (source.origin, source.revision) == ("owner/name", "v2")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/model",
        "hf://owner/name",
        "https://example.org/owner/name",
        "https://huggingface.co/owner/name/blob/main/config.json",
        "https://huggingface.co/datasets/squad",
        "https://huggingface.co/",
    ],
)
def test_other_urls_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(PathNotFoundError, match="is a URL, and only a model's page") as caught:
        resolve(url)
    assert "give their folder" in (caught.value.hint or "")


def test_a_local_folder_comes_before_the_hub(cache: Path) -> None:
    cached(cache, "owner/name", "config.json", "model.safetensors")
    Path("owner/name").mkdir(parents=True)
    assert resolve("owner/name").commit is None


def test_configs_alone_are_enough_where_no_weights_are_wanted(cache: Path) -> None:
    cached(cache, "owner/name", "config.json")
    assert resolve("owner/name", patterns=("*.json",)).commit == COMMIT


def test_a_copy_without_weights_is_completed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(cache, "owner/name", "config.json")
    calls: list[bool] = []

    def download(repo: str, *, local_files_only: bool = False, **options: Any) -> str:
        calls.append(local_files_only)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("owner/name")
    assert calls == [True, False]


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_it_is_the_cache_or_an_error(how: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how != "argument":
        monkeypatch.setenv(how, "1")
    with pytest.raises(PathNotFoundError) as caught:
        resolve("owner/name", LookupOptions(local_files_only=how == "argument"))
    assert "network is switched off" in caught.value.message
    assert "Download it first" in (caught.value.hint or "")


def test_with_a_folder_of_the_owners_name_it_is_a_slip_in_a_path(cache: Path) -> None:
    Path("adapters/french").mkdir(parents=True)
    with pytest.raises(PathNotFoundError) as caught:
        resolve("adapters/frensh")
    assert f"Did you mean adapters{os.sep}french?" in (caught.value.hint or "")
    cached(cache, "adapters/frensh", "adapter_config.json", "adapter_model.safetensors")
    assert resolve("adapters/frensh").commit == COMMIT


@pytest.mark.parametrize(
    ("error", "kind", "words", "hint"),
    [
        (GatedRepoError, SourceError, "gated", "token="),
        (RepositoryNotFoundError, PathNotFoundError, "neither a local path nor a public repository", "token="),
        (ConnectionError, PathNotFoundError, "the hub did not answer: no route", "network"),
    ],
)
def test_what_the_hub_refuses(
    error: type[Exception],
    kind: type[SourceError],
    words: str,
    hint: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_up = huggingface_hub.snapshot_download
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return look_up(repo, **options)
        raise error("no route") if error is ConnectionError else error("no", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind) as caught:
        resolve("owner/name", what="adapter")
    assert words in caught.value.message
    assert hint in (caught.value.hint or "")


def test_with_no_network_an_incomplete_copy_is_what_there_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(cache, "owner/name", "config.json")
    look_up = huggingface_hub.snapshot_download

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return look_up(repo, **options)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name").root == snapshot
