"""Which sources may be fetched, and the ways around it that do not work."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.serving.tiny_adapters import write_adapter
from veneer.serving import server_options, source_files
from veneer.serving.adapter_names import check_name, read_reference
from veneer.serving.registry_types import Registration
from veneer.serving.serving_errors import (
    InvalidRequestError,
    ModelNotFoundError,
    NotAllowedError,
    ServingError,
    SourceFailedError,
)
from veneer.serving.source_files import FolderSource, HubSource, RemoteSource
from veneer.serving.source_policy import SourcePolicy
from veneer.serving.store import Store


def policy_for(root: Path) -> SourcePolicy:
    return SourcePolicy((f"file://{root}/*", "hf://org/*", "s3://bucket/adapters/*"))


def test_what_is_allowed_is_read_as_what_it_is(tmp_path: Path) -> None:
    policy = policy_for(tmp_path)
    write_adapter(tmp_path / "a" / "b")
    assert policy.source(Registration("a", f"{tmp_path}/a/b")) == FolderSource(tmp_path / "a" / "b", links=False)
    assert policy.source(Registration("a", f"file://{tmp_path}/a", subfolder="b")).url == f"file://{tmp_path}/a/b"
    assert policy.source(Registration("a", "org/x")) == HubSource("org/x")
    assert policy.source(Registration("a", "hf://org/x@v1#sub")) == HubSource("org/x", "v1", "sub")
    assert policy.source(Registration("a", "org/x", revision="v1")) == HubSource("org/x", "v1")
    assert policy.source(Registration("a", "https://huggingface.co/org/x")) == HubSource("org/x")
    assert policy.source(Registration("a", "s3://bucket/adapters/x")) == RemoteSource("s3://bucket/adapters/x")


def test_the_operators_own_may_be_relative_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapters" / "pirate")
    source = SourcePolicy().source(Registration("a", "adapters/pirate", trusted=True))
    assert source == FolderSource(tmp_path / "adapters" / "pirate", links=True)
    assert SourcePolicy().source(Registration("a", "org/name", trusted=True)) == HubSource("org/name")


TRAVERSALS = [
    "{root}/../secret",
    "{root}/a/../../secret",
    "file://{root}/../secret",
    "file://localhost{root}/a",
    "file:{root}/../secret",
    "FILE://{outside}",
    "{root}/%2e%2e/secret",
    "{root}\\..\\secret",
    "~/secret",
    "a/../../secret",
    "{root}/link-out",
    "{root}/a/link-out/inner",
    "{root}/a\0/../secret",
    "{root}",
    "{outside}",
    "/proc/self/root{outside}",
    "file:///proc/self/cwd",
    "local://{outside}",
    "simplecache::file://{outside}",
    "s3://bucket/adapters/../secret",
    "s3://key:secret@bucket/adapters/x",
    "S3://bucket/adapters/x",
    "s3://bucket/other/x",
    "hf://org/../secret",
    "hf://other/x",
    "org/x@../../y",
    "other/x",
    "http://169.254.169.254/latest",
    "https://example.com/adapters",
    "",
    " ",
    "x" * 2000,
]


@pytest.mark.parametrize("source", TRAVERSALS)
def test_no_way_leads_out(tmp_path: Path, source: str) -> None:
    root, outside = tmp_path / "adapters", write_adapter(tmp_path / "secret")
    write_adapter(outside / "inner")
    write_adapter(root / "a")
    (root / "link-out").symlink_to(outside)
    (root / "a" / "link-out").symlink_to(outside)
    text = source.format(root=root, outside=outside)
    with pytest.raises((InvalidRequestError, NotAllowedError)):
        policy_for(root).source(Registration("a", text))


@pytest.mark.parametrize("inner", ["../secret", "/etc", "a/../../secret", "..", "link-out", "a\\b", "%2e%2e"])
def test_no_subfolder_leads_out(tmp_path: Path, inner: str) -> None:
    root = write_adapter(tmp_path / "adapters" / "a").parent
    write_adapter(tmp_path / "secret")
    (root / "a" / "link-out").symlink_to(tmp_path / "secret")
    with pytest.raises((InvalidRequestError, NotAllowedError)):
        policy_for(root).source(Registration("a", f"{root}/a", subfolder=inner))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_a_file_that_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    folder = write_adapter(tmp_path / "adapters" / "a")
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "moved")
    if kind == "link":
        weights.symlink_to(tmp_path / "moved")
    elif kind == "pipe":
        os.mkfifo(weights)
    elif kind == "folder":
        weights.mkdir()
    else:
        weights.symlink_to("/dev/zero")
    store = Store(tmp_path / "store")
    store.open()
    source = policy_for(folder.parent).source(Registration("a", str(folder)))
    with pytest.raises(ServingError, match="no regular file"):
        asyncio.run(store.add(source))


def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapters" / "a")
    source = policy_for(folder.parent).source(Registration("a", str(folder)))
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    store = Store(tmp_path / "store")
    store.open()
    with pytest.raises(ServingError, match="cannot be read"):
        asyncio.run(store.add(source))


def test_a_link_within_the_root_is_followed_and_one_as_the_root_too(tmp_path: Path) -> None:
    write_adapter(tmp_path / "real" / "a")
    (tmp_path / "real" / "b").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    source = policy_for(tmp_path / "root").source(Registration("a", f"{tmp_path}/root/b"))
    assert source.url == f"file://{tmp_path}/real/a"


@pytest.mark.parametrize("glob", ["*", "/adapters/*", "http://host/*", "https://host/*", ""])
def test_globs_that_allow_too_much_are_refused(glob: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be allowed"):
        SourcePolicy((glob,))


@pytest.mark.parametrize("name", ["pirate", "acme/pirate", "a", "A.b_c-9", "x" * 64, "a..b", "sha256"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/", "/a", "a//b", "a/b/c", "../a", "a/..", "a/.b", "a b", "a\n", "ä", "a@b", "x" * 65,
     "a\\b", "a%2fb", "\0", None, 5],
)  # fmt: skip
def test_no_names(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_name(name)


def test_references() -> None:
    assert read_reference("pirate").prefix == ""
    assert read_reference("acme/pirate@sha256:1a2b3c").prefix == "1a2b3c"
    assert read_reference("pirate@1a2b3c").name == "pirate"
    for wrong in ("", "a@", "a@12345", "a@xyzxyz", "a@b@c", "@1a2b3c"):
        with pytest.raises(ModelNotFoundError):
            read_reference(wrong)


@pytest.mark.parametrize("offline", [True, False])
def test_a_name_that_may_be_a_folder_or_the_hubs_is_told_as_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    def unknown(*args: Any, **options: Any) -> None:
        raise OSError("404 Not Found")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-there").mkdir()
    monkeypatch.setattr(source_files, "is_offline", lambda: offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    for text, trusted, is_told in (("nothere", True, True), ("hf://nothere", True, False), ("nothere", False, False)):
        source = SourcePolicy(("hf://*",)).source(Registration("a", text, trusted=trusted))
        with pytest.raises(SourceFailedError) as caught, source.opened():
            raise AssertionError("it is there")
        assert ("Did you mean no-there?" in str(caught.value)) == is_told
        if not offline:
            assert ("There is no folder 'nothere'. The hub gives no" in str(caught.value)) == is_told
            assert "The hub gives no hf://nothere: 404 Not Found." in str(caught.value)


def test_a_folder_without_adapters_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.warns(UserWarning, match="holds no adapter. Give the folder that the adapters are in"):
        assert list(server_options._found(tmp_path, set())) == []
