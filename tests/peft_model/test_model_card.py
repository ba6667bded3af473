"""The model card that is saved beside adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import veneer
from tests.models import build
from tests.random_adapters import adapted


def named(name: str | None, **options: Any) -> veneer.PeftModel:
    """A model with an adapter, its base of that name."""
    model = adapted(**options)
    model.peft_config["default"].base_model_name_or_path = name
    return model


def test_the_card_says_what_the_hub_asks(tmp_path: Path) -> None:
    named("owner/base").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "owner/base",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:owner/base", "lora", "transformers"],
    }
    assert "`default`: LORA on `down_proj`" in card.text
    assert "; r 4" in card.text
    assert 'veneer.load("PATH_OR_ID_OF_THIS_FOLDER", base="owner/base")' in card.text
    assert "[owner/base](https://huggingface.co/owner/base)" in card.text


@pytest.mark.parametrize("name", [None, "/home/me/models/base", "./base"])
def test_a_place_on_this_machine_is_no_base_for_the_hub(name: str | None, tmp_path: Path) -> None:
    named(name).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert card.data.tags == ["lora", "transformers"]
    assert "/home/me" not in card.content


def test_a_card_that_is_there_keeps_its_text(tmp_path: Path) -> None:
    text = "\n# Mine\n\nTrained on tea.\n"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\ntags: [tea]\nlibrary_name: transformers\n---\n{text}")
    model = named("owner/base")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    card = ModelCard(first)
    assert card.text.strip() == text.strip()
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert card.data.tags == ["base_model:adapter:owner/base", "lora", "tea", "transformers"]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


def test_a_head_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    broken = "---\ntags: [a\n---\nMine\n"
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match=r"README.md is left as it is"):
        adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_other_methods_and_models_have_other_tags(tmp_path: Path) -> None:
    model = veneer.get_peft_model(build("bert"), veneer.VeraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "b")
    assert ModelCard.load(tmp_path / "b" / "README.md").data.to_dict() == {
        "library_name": "peft",
        "tags": ["transformers"],
    }
    adapted().save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c").exists()


def test_uploading_keeps_the_card_that_the_repository_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "theirs.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo: str, **_: Any) -> None: ...

        def hf_hub_download(self, repo: str, file: str, revision: str | None = None) -> str:
            sent["asked"] = (repo, file, revision)
            return str(tmp_path / "theirs.md")

        def upload_folder(
            self, *, repo_id: str, folder_path: str, revision: str | None = None, create_pr: bool = False
        ) -> str:
            sent.update(card=(Path(folder_path) / "README.md").read_text(), create_pr=create_pr)
            return repo_id

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = named("owner/base")
    model.push_to_hub("a/b", tags=["tea"], max_shard_size="5GB", create_pr=True, revision="v", use_auth_token="t")  # type: ignore[call-arg]
    card = ModelCard(sent["card"])
    assert card.text.strip() == "# Mine"
    assert (card.data.license, card.data.base_model, sent["create_pr"]) == ("mit", "owner/base", True)
    assert "tea" in (card.data.tags or [])
    assert (sent["asked"], sent["token"]) == (("a/b", "README.md", "v"), "t")


def test_trainers_own_card_is_completed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# A run\n")
    named("owner/base").create_or_update_model_card(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "owner/base"
