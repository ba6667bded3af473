"""Adapters of a base whose vocabulary has grown: what is saved brings the new tokens' rows back, here and in peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import veneer
from tests.models import LLAMA, gap, logits
from tests.oracle.peer import WEIGHTS, base_model, scramble

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
MORE = 103
FEED = {"input_ids": torch.tensor([[5, 99, 7, 102, 8]])}


def base(folder: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**LLAMA, "tie_word_embeddings": tied, "initializer_range": 0.2})
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read(folder: Path, rows: int = MORE, seed: int = 1) -> Any:
    """The base, with new tokens; each seed gives them other vectors."""
    model: Any = base_model("llama", folder)
    if rows != 99:
        model.resize_token_embeddings(rows, mean_resizing=False)
        generator = torch.Generator().manual_seed(seed)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight.data[99:] = torch.randn(rows - 99, 32, generator=generator)
    return model


def adapted(library: Any, model: Any, **options: Any) -> Any:
    kind = library.TrainableTokensConfig if "token_indices" in options else library.LoraConfig
    own = {} if "token_indices" in options else {"r": 4, "target_modules": ["q_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that layers are tied
        return scramble(library.get_peft_model(model, kind(task_type="CAUSAL_LM", **{**own, **options})))


def saved(model: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that embeddings are saved
        model.save_pretrained(folder, **options)
    return load_file(folder / WEIGHTS)


def ends(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The rows among an adapter's tensors, without what peft writes twice."""
    spare = (".original_module.", ".modules_to_save.", "trainable_tokens_delta")
    return {
        key: tuple(tensor.shape)
        for key, tensor in tensors.items()
        if ("embed_tokens" in key or "lm_head" in key) and not any(infix in key for infix in spare)
    }


TRAINED: dict[str, dict[str, Any]] = {
    "between": {},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "both adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [7, 99, 101]},
    "tokens alone": {"token_indices": [7, 99, 101]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", TRAINED)
def test_what_is_saved_brings_the_rows_back(case: str, tied: bool, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", tied)
    model = adapted(veneer, read(folder), **TRAINED[case])
    expected = logits(model, FEED)
    tensors = saved(model, tmp_path / "here")
    theirs = saved(adapted(peft, read(folder), **TRAINED[case]), tmp_path / "peft")
    # Where one end is adapted peft leaves the other's rows out.
    assert ends(tensors).items() >= ends(theirs).items()
    assert case in ("embedding adapted", "tokens alone") or ends(tensors) == ends(theirs)
    for load in (veneer.load, veneer.AutoPeftModelForCausalLM.from_pretrained):
        back = load(tmp_path / "here")
        assert gap(logits(back, FEED), expected) < CLOSE
        assert any("resized from 99 to 103 tokens" in told for told in back.load_report.warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # keys of the config that peft does not know
        there = peft.PeftModel.from_pretrained(read(folder, seed=2), tmp_path / "here").eval()
    assert gap(logits(there, FEED), expected) < CLOSE
    assert saved(back, tmp_path / "again").keys() == tensors.keys()
    back.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.vocab_size == MORE
    assert gap(logits(again, FEED), expected) < CLOSE
    veneer.merge(tmp_path / "here", folder, out=tmp_path / "disk")
    assert gap(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "disk"), FEED), expected) < CLOSE


@pytest.mark.parametrize("case", TRAINED)
def test_peft_brings_its_own_back_here(case: str, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", True)
    other = adapted(peft, read(folder), **TRAINED[case])
    saved(other, tmp_path / "peft")
    assert gap(logits(veneer.load(tmp_path / "peft"), FEED), logits(other, FEED)) < CLOSE


@pytest.mark.parametrize("wanted", [True, False, "auto"])
@pytest.mark.parametrize("rows", [99, MORE])
@pytest.mark.parametrize("case", ["between", "both adapted", "tokens", "both saved"])
def test_it_is_asked_for_as_in_peft(case: str, rows: int, wanted: Any, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", False)
    options = {**TRAINED[case], **({"trainable_token_indices": [7, 9]} if case == "tokens" else {})}
    found = [
        ends(saved(adapted(library, read(folder, rows), **options), tmp_path / name, save_embedding_layers=wanted))
        for library, name in ((peft, "peft"), (veneer, "here"))
    ]
    assert found[0] == found[1]


def test_another_word_for_it_is_refused(tmp_path: Path) -> None:
    model = adapted(veneer, read(base(tmp_path / "base", False)))
    with pytest.raises(veneer.ConfigError, match="save_embedding_layers='yes' is none"):
        model.save_pretrained(tmp_path / "here", save_embedding_layers="yes")
    assert not (tmp_path / "here").exists()


def test_rows_that_only_come_along_are_not_trained(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", True)
    counts = []
    saved(adapted(veneer, read(folder)), tmp_path / "here")
    for library in (peft, veneer):
        model = library.PeftModel.from_pretrained(read(folder), tmp_path / "here", is_trainable=True)
        counts.append(model.get_nb_trainable_parameters()[0])
        model.train()
        model(**FEED, labels=FEED["input_ids"]).loss.backward()
    assert counts[0] == counts[1]


def test_a_base_that_nobody_can_look_at_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", False)
    model = read(folder)
    model.config._name_or_path = model.name_or_path = str(tmp_path / "elsewhere")
    assert not ends(saved(adapted(veneer, model), tmp_path / "here"))
    name = json.loads((tmp_path / "here" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == str(tmp_path / "elsewhere")


def test_a_trained_copy_of_the_embedding_brings_no_rows_of_the_output(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", True)
    saved(adapted(veneer, read(folder), **TRAINED["embedding saved"]), tmp_path / "here", save_embedding_layers=False)
    with pytest.raises(veneer.BaseModelError, match="brings no rows for the output layer"):
        veneer.load(tmp_path / "here")


def test_rows_saved_in_a_narrower_dtype_are_the_bases_own(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", True)
    model: Any = tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    saved(adapted(veneer, model, target_modules=["embed_tokens"]), tmp_path / "here")
    here = veneer.load(tmp_path / "here", dtype="float32")
    assert list(here.adapters.layers) == ["model.embed_tokens"]
    with here.disable_adapter():
        alone = logits(here, {"input_ids": FEED["input_ids"] % 99})
    assert gap(alone, logits(read(folder, 99), {"input_ids": FEED["input_ids"] % 99})) == 0
