"""A merge reads and writes in its folders alone: links, names in manifests, adapters' code, replaced folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.models import gap, inputs, logits
from veneer.errors import CorruptFileError, MergeError, SourceError
from veneer.merging.output import target as target_folder
from veneer.merging.work.pieces import MergeLayer

MANIFEST = "merge_manifest.json"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def merge(world: Path, out: str = "out", **options: Any) -> veneer.MergeReport:
    return veneer.merge(world / "adapter", world / "base", out=world / out, **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- a base of several files -----------------------------------------------------------------------------------


def divided(base: Path, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Divide a base's weights into files that an index names; the tensors."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(name_of(name), {})[name] = tensor
    for file, part in parts.items():
        (base / file).parent.mkdir(exist_ok=True)
        save_file(part, base / file, metadata={"format": "pt"})
    where = {name: file for file, part in parts.items() for name in part}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def by_folder(name: str) -> str:
    return f"{'two' if '.layers.1.' in name else 'one' if '.layers.' in name else '0rest'}/w.safetensors"


def test_shards_of_one_name_in_several_folders(world: Path) -> None:
    divided(world / "base", by_folder)
    merge(world, reversible=True)
    assert {p.name for p in (world / "out").glob("*.safetensors")} == {
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    }
    found = [t for p in sorted((world / "out").glob("*.safetensors")) for t in load_file(p).items()]
    expected = load_file(world / "merged" / "model.safetensors")
    assert {name for name, _ in found} == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found)
    again = transformers.AutoModelForCausalLM.from_pretrained(world / "out").eval()
    unmerged = veneer.load(world / "adapter", base=world / "base")
    assert gap(logits(again, inputs("llama")), logits(unmerged, inputs("llama"))) < 1e-5
    assert veneer.verify(world / "out", world / "adapter", world / "base", logits=False).passed
    for options in ({}, {"base": world / "base"}):
        veneer.unmerge(world / "out", out=world / "back", overwrite=True, **options)
        assert tree(world / "back") == tree(world / "base")
        shutil.rmtree(world / "back")


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "weights.safetensors", "in/w.safetensors"])
def test_one_shard_with_an_index(name: str, world: Path) -> None:
    divided(world / "base", lambda _: name)
    merge(world, reversible=True)
    assert not (world / "out" / INDEX).exists()
    assert tree(world / "out")["model.safetensors"] == tree(world / "merged")["model.safetensors"]
    veneer.load(world / "out")
    veneer.unmerge(world / "out", out=world / "back")
    assert tree(world / "back") == tree(world / "base")


def test_a_base_given_by_its_file(world: Path) -> None:
    (world / "base" / "model.safetensors").rename(world / "base" / "other.safetensors")
    veneer.merge(world / "adapter", world / "base" / "other.safetensors", out=world / "out")
    assert "model.safetensors" in tree(world / "out")


def test_a_shard_that_is_no_safetensors_file(world: Path) -> None:
    divided(world / "base", lambda _: "small")
    with pytest.raises(CorruptFileError, match="no safetensors file"):
        merge(world)


# -- links -----------------------------------------------------------------------------------------------------

OUT_OF = {
    "adapter/notes.txt": "secret",
    "base/notes.txt": "secret",
    "base/model.safetensors": "merged/model.safetensors",
    "base/config.json": "merged/config.json",
    "adapter/adapter_model.safetensors": "other",
    "adapter/tokenizer.json": "nowhere",
    "adapter/additional_chat_templates/x.jinja": "secret",
    "adapter/additional_chat_templates/y.jinja": "nowhere",
    "base/additional_chat_templates/z.jinja": "base/additional_chat_templates/z.jinja",
}


@pytest.mark.parametrize("link", OUT_OF)
def test_a_link_out_of_the_folder_is_not_followed(link: str, world: Path) -> None:
    (world / "secret").write_text("key")
    shutil.copy(world / "adapter" / "adapter_model.safetensors", world / "other")
    (world / link).parent.mkdir(exist_ok=True)
    (world / link).unlink(missing_ok=True)
    (world / link).symlink_to(world / OUT_OF[link])
    with pytest.raises(SourceError, match=rf"{link.rpartition('/')[2]} is a link") as caught:
        merge(world)
    assert caught.value.hint
    assert not (world / "out").exists()


def test_what_is_no_file_is_refused(world: Path) -> None:
    folder = world / "adapter" / "additional_chat_templates"
    folder.mkdir()
    os.mkfifo(folder / "x.jinja")
    with pytest.raises(SourceError, match=r"x\.jinja is no regular file"):
        merge(world)


def test_links_inside_of_a_folder_and_of_the_hub_are_followed(world: Path) -> None:
    (world / "base" / "tokens").mkdir()
    (world / "base" / "tokens" / "vocab.txt").write_text("a")
    (world / "base" / "vocab.txt").symlink_to("tokens/vocab.txt")
    blobs, snapshot = world / "models--acme--a" / "blobs", world / "models--acme--a" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((world / "adapter").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (world / "adapter").rmdir()
    (world / "adapter").symlink_to(snapshot)
    # As the hub's client once made a folder of one's own: links into the cache, to files named by their digests.
    blob = blobs / hashlib.sha256((world / "base" / "model.safetensors").read_bytes()).hexdigest()
    (world / "base" / "model.safetensors").rename(blob)
    (world / "base" / "model.safetensors").symlink_to(blob)
    merge(world)
    assert (world / "out" / "vocab.txt").read_text() == "a"
    assert tree(world / "out")["model.safetensors"] == tree(world / "merged")["model.safetensors"]


def test_chat_templates_come_along_and_back(world: Path) -> None:
    for origin, names in (("base", "ab"), ("adapter", "bc")):
        (world / origin / "additional_chat_templates").mkdir()
        for name in names:
            (world / origin / "additional_chat_templates" / f"{name}.jinja").write_text(origin)
    merge(world, reversible=True)
    found = {p.stem: p.read_text() for p in (world / "out" / "additional_chat_templates").iterdir()}
    assert found == {"a": "base", "b": "adapter", "c": "adapter"}
    assert (
        "additional_chat_templates/c.jinja" in json.loads((world / "out" / MANIFEST).read_text())["outputs"]["digests"]
    )
    veneer.unmerge(world / "out", out=world / "back")
    assert tree(world / "back") == tree(world / "base")
    merge(world, overwrite=True)


# -- code ------------------------------------------------------------------------------------------------------


def test_an_adapters_code_does_not_come_along(world: Path) -> None:
    for origin in ("base", "adapter"):
        (world / origin / "modeling_x.py").write_text(f"# {origin}")
    (world / "adapter" / "train.py").write_text("1")
    (world / "adapter" / "Tokenization_X.PY").write_text("1")
    report = merge(world)
    assert (world / "out" / "modeling_x.py").read_text() == "# base"
    assert [name for name in report.files if name.lower().endswith(".py")] == ["modeling_x.py"]
    assert [text for text in report.warnings if "modeling_x.py" in text]
    assert not [text for text in report.warnings if "train.py" in text]


@pytest.mark.parametrize("own", [{}, {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}, None])
def test_an_adapters_tokenizer_names_no_code_of_its_own(own: dict[str, Any] | None, world: Path) -> None:
    if own is not None:
        (world / "base" / "tokenizer_config.json").write_text(json.dumps({"kept": "no", **own}))
    theirs = {"auto_map": {"AutoTokenizer": ["evil/x--tokenization_x.X", None]}, "chat_template": "ä"}
    (world / "adapter" / "tokenizer_config.json").write_text(json.dumps(theirs))
    merge(world)
    assert json.loads((world / "out" / "tokenizer_config.json").read_text()) == {"chat_template": "ä", **(own or {})}


# -- what is replaced ------------------------------------------------------------------------------------------


def inside(world: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Make a call that would replace a folder which holds an input."""
    out = world / "out"
    shutil.copytree(world / "base", out)
    shutil.copytree(world / what, out / "inner")
    # As if the folder were a model's: what is read in it is to be found all the same.
    monkeypatch.setattr(target_folder, "_foreign", lambda target: [])
    if what == "merged":
        return lambda: veneer.unmerge(out / "inner", out=out, overwrite=True)
    given = {"adapter": world / "adapter", "base": world / "base", what: out / "inner"}
    return lambda: veneer.merge(given["adapter"], given["base"], out=out, overwrite=True)


@pytest.mark.parametrize("what", ["adapter", "base", "merged"])
def test_what_is_read_is_not_replaced(what: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = inside(world, what, monkeypatch)
    before = tree(world)
    with pytest.raises(MergeError, match="inner; it is not replaced"):
        run()
    assert tree(world) == before


def test_a_link_to_what_is_written_is_the_same_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(world, "base", monkeypatch)
    (world / "short").symlink_to("out/inner")
    (world / "long").symlink_to("out")
    monkeypatch.chdir(world / "adapter")
    for base, out in ((world / "short", world / "out"), ("../out/inner", world / "long"), (world / "out", "../long")):
        with pytest.raises(MergeError, match="it is not replaced"):
            veneer.merge(world / "adapter", base, out=out, overwrite=True)
    assert (world / "out" / "inner" / "config.json").is_file()


def test_what_lies_in_the_staging_folder_is_not_swept_away(world: Path) -> None:
    shutil.copytree(world / "base", world / ".out.merging" / "model")
    with pytest.raises(MergeError, match="holds the base"):
        veneer.merge(world / "adapter", world / ".out.merging" / "model", out=world / "out")
    assert (world / ".out.merging" / "model" / "config.json").is_file()


@pytest.mark.parametrize("name", ["runs/log", "notes.docx", "optimizer.pt", "merge_delta/mine", ".git/HEAD"])
def test_what_is_no_part_of_a_model_is_not_replaced(name: str, world: Path) -> None:
    shutil.copytree(world / "base", world / "out")
    (world / "out" / name).parent.mkdir(exist_ok=True)
    (world / "out" / name).write_text("mine")
    told = name if name.startswith("merge_delta") else name.partition("/")[0]
    for run in (merge, lambda w, **o: veneer.unmerge(w / "merged", out=w / "out", **o)):
        with pytest.raises(MergeError, match=rf"no part of a plain model.*: {told}\."):
            run(world, overwrite=True)
    assert (world / "out" / name).read_text() == "mine"


def test_what_a_merge_wrote_is_replaced(world: Path) -> None:
    (world / "base" / "odd.name").write_text("1")
    (world / "base" / "additional_chat_templates").mkdir()
    (world / "base" / "additional_chat_templates" / "a.jinja").write_text("1")
    for _ in range(2):
        merge(world, overwrite=True, reversible=True)
    veneer.unmerge(world / "out", out=world / "out2")
    veneer.unmerge(world / "out", out=world / "out3", base=world / "base")
    assert tree(world / "out2") == tree(world / "out3") == tree(world / "base")


def test_what_comes_to_the_place_meanwhile_is_kept(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MergeLayer.run

    def slow(self: MergeLayer, sink: Any) -> Any:
        (world / "out").mkdir(exist_ok=True)
        (world / "out" / "theirs").write_text("1")
        return run(self, sink)

    monkeypatch.setattr(MergeLayer, "run", slow)
    with pytest.raises(MergeError, match="is not empty"):
        merge(world)
    assert tree(world / "out") == {"theirs": b"1"}


def test_a_failing_exchange_puts_back_what_was_there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world / "base", world / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MergeError, match="Input/output error"):
        merge(world, overwrite=True)
    assert tree(world / "out") == tree(world / "base")


def test_extracting_does_not_replace_its_models(world: Path) -> None:
    shutil.copytree(world / "adapter", world / "base", dirs_exist_ok=True)
    before = tree(world / "base")
    with pytest.raises(MergeError, match="is the base itself"):
        veneer.extract(world / "merged", world / "base", out=world / "base", overwrite=True)
    assert tree(world / "base") == before


# -- a staging folder that somebody prepared -------------------------------------------------------------------------


def prepared(world: Path, what: str) -> Path:
    """Make a hidden folder beside ``out`` that holds a link, or is one; return the link."""
    place, victim = world / ".out.merging", world / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (victim / "model.safetensors").write_text("precious")
    link = place if what == "itself" else place / what
    if what != "itself":
        place.mkdir()
    link.symlink_to(victim if what in ("itself", "model", "old") else victim / "file")
    return link


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", ["itself", "lock", "model", "old", "journal.json"])
def test_links_in_the_staging_folder_are_refused(what: str, resume: bool, world: Path) -> None:
    link = prepared(world, what)
    with pytest.raises(MergeError, match=rf"{link.name} is a link"):
        merge(world, resume=resume)
    assert set(tree(world / "victim").values()) == {b"precious"}
    with pytest.raises(MergeError, match=rf"{link.name} is a link"):
        veneer.unmerge(world / "merged", out=world / "out")


def test_a_lock_is_not_emptied(world: Path) -> None:
    (world / "victim").write_text("precious")
    (world / ".out.merging").mkdir()
    os.link(world / "victim", world / ".out.merging" / "lock")
    merge(world)
    assert (world / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    "journal", ["{}", '{"made_from": 1, "finished": {}}', '{"made_from": {}, "finished": {"a": 1}}']
)
def test_a_damaged_journal_is_refused(journal: str, world: Path) -> None:
    (world / ".out.merging" / "model").mkdir(parents=True)
    (world / ".out.merging" / "journal.json").write_text(journal)
    with pytest.raises(MergeError, match="is damaged") as caught:
        merge(world, resume=True)
    assert "--resume" in str(caught.value.hint)


# -- the manifest and the delta --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../x", ""])
@pytest.mark.parametrize("part", ["base", "outputs"])
def test_a_manifest_names_nothing_outside(part: str, name: str, world: Path) -> None:
    path = world / "merged" / MANIFEST
    values = json.loads(path.read_text())
    values[part]["digests"][name] = f"sha256:{hashlib.sha256(b'').hexdigest()}"
    path.write_text(json.dumps(values))
    for run in (
        lambda: veneer.unmerge(world / "merged", out=world / "mine" / "out"),
        lambda: veneer.unmerge(world / "merged", out=world / "mine" / "out", base=world / "base"),
        lambda: veneer.verify(world / "merged", world / "adapter", world / "base", logits=False),
    ):
        with pytest.raises(CorruptFileError, match="outside of its folder"):
            run()
    assert not (world / "mine").exists()


def test_only_what_the_manifest_names_is_restored(world: Path) -> None:
    import zipfile

    with zipfile.ZipFile(world / "merged" / "merge_delta" / "small.zip", "a") as archive:
        archive.writestr("modeling_x.py", "1")
        archive.writestr("../evil", "1")
    veneer.unmerge(world / "merged", out=world / "back")
    assert tree(world / "back") == tree(world / "base")
    assert not (world / "evil").exists()


def test_a_link_in_the_delta_is_not_followed(world: Path) -> None:
    small = world / "merged" / "merge_delta" / "small.zip"
    small.rename(world / "small.zip")
    small.symlink_to(world / "small.zip")
    with pytest.raises(SourceError, match=r"small\.zip is a link"):
        veneer.unmerge(world / "merged", out=world / "back")


# -- changes meanwhile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base/config.json", "adapter/vocab.txt"],
)
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_what_changes_while_it_is_merged_fails_it(
    name: str, how: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = world / name, MergeLayer.run
    (world / "adapter" / "vocab.txt").write_text("a")
    other = path.read_bytes()

    def meanwhile(self: MergeLayer, sink: Any) -> Any:
        path.unlink(missing_ok=True)
        if how == "changed":
            path.write_bytes(other)
        return run(self, sink)

    monkeypatch.setattr(MergeLayer, "run", meanwhile)
    with pytest.raises(MergeError, match=rf"{path.name} {'changed' if how == 'changed' else 'went away'}"):
        merge(world)
    assert not (world / "out").exists()
    assert not (world / ".out.merging").exists()
