"""Adapters that peft trained with ``ensure_weight_tying`` on a base whose output layer is the embedding's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import veneer
from tests.base_model.test_tied_embeddings import tied
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, WEIGHTS, scramble

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
BATCH = inputs("llama")
TOKEN = int(BATCH["input_ids"][0, 0])
BOTH = {"embed_tokens": [TOKEN, 7], "lm_head": [TOKEN, 7]}
CASES: dict[str, dict[str, Any]] = {
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "output saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "output adapted": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"trainable_token_indices": [TOKEN, 7]},
    "tokens of both": {"trainable_token_indices": BOTH},
}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_merges_and_saves_as_it_was_trained(case: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "r": 4, "task_type": "CAUSAL_LM", **CASES[case]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = scramble(peft.get_peft_model(tied(), peft.LoraConfig(ensure_weight_tying=True, **options)))
        other.save_pretrained(tmp_path / "peft")
    expected = logits(other, BATCH)
    assert gap(expected, logits(tied(), BATCH)) > VISIBLE
    here = veneer.PeftModel.from_pretrained(tied(), tmp_path / "peft")
    assert gap(logits(here, BATCH), expected) < CLOSE
    here.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "again"))
    assert all(torch.equal(first[key], tensor) for key, tensor in second.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(tied(), tmp_path / "again").eval()
    assert gap(logits(back, BATCH), expected) < CLOSE
    merged = here.merge_and_unload()
    assert gap(logits(merged, BATCH), expected) < CLOSE
    merged.save_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert gap(logits(model, BATCH), expected) < CLOSE
    said = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert said is (model.lm_head.weight is model.model.embed_tokens.weight)
    assert said


# Base -> its embedding, its output layer and a layer between.
ENDS = {"llama": ("embed_tokens", "lm_head", "q_proj"), "gpt2": ("wte", "lm_head", "c_attn")}


def base(arch: str) -> Any:
    return tied() if arch == "llama" else build(arch)


def of_peft(arch: str, options: dict[str, Any], folder: Path) -> Any:
    """An adapter of peft's, which it has saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = scramble(peft.get_peft_model(base(arch), peft.LoraConfig(fan_in_fan_out=arch == "gpt2", **options)))
        other.save_pretrained(folder)
    return other


def trained(model: Any, arch: str) -> Any:
    """The model, with gradients."""
    batch = inputs(arch)
    model.eval()(**batch, labels=batch["input_ids"]).loss.backward()
    return model


def gradients(model: Any, end: str) -> dict[str, torch.Tensor]:
    """The gradients of what is trained of one end, by the checkpoint's leaf."""
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and f".{end}." in n]
    return {n.partition(f".{end}.")[2].removesuffix(".weight").removesuffix(".default"): p.grad for n, p in named}


@pytest.mark.parametrize("arch", ENDS)
def test_one_lora_gets_the_gradients_of_both_ends(arch: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": list(ENDS[arch]), "r": 4, "ensure_weight_tying": True}
    other = of_peft(arch, options, tmp_path)
    here = trained(veneer.PeftModel.from_pretrained(base(arch), tmp_path, is_trainable=True), arch)
    trained(other, arch)
    # peft's two ends share their memory, and each has a part of the gradient.
    of_embedding, of_output = (gradients(other, end) for end in ENDS[arch][:2])
    summed = {
        "lora_embedding_A": of_embedding["lora_embedding_A"] + of_output["lora_B"].T,
        "lora_embedding_B": of_embedding["lora_embedding_B"] + of_output["lora_A"].T,
    }
    mine = gradients(here, ENDS[arch][0])
    assert mine.keys() == summed.keys()
    for leaf, expected in summed.items():
        assert gap(mine[leaf], expected) < CLOSE < expected.abs().max()
    assert len(here.adapters.parameters("default")) == 2 * (1 + sum(ENDS[arch][2] in n for n in here.adapters.layers))


@pytest.mark.parametrize("arch", ENDS)
def test_one_module_gets_the_gradients_of_both_ends(arch: str, tmp_path: Path) -> None:
    *ends, between = ENDS[arch]
    options: dict[str, Any] = {"target_modules": [between], "modules_to_save": ends, "ensure_weight_tying": True}
    other = of_peft(arch, options, tmp_path)
    here = trained(veneer.PeftModel.from_pretrained(base(arch), tmp_path, is_trainable=True), arch)
    (expected,) = gradients(trained(other, arch), ends[0]).values()
    for end in ends:
        (mine,) = gradients(here, end).values()
        assert gap(mine, expected) < CLOSE < expected.abs().max()


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("arch", ENDS)
def test_naming_one_end_trains_both_as_one(arch: str, end: int, kind: str, tmp_path: Path) -> None:
    *ends, between = ENDS[arch]
    options: dict[str, Any] = {"target_modules": [between], "task_type": "CAUSAL_LM"}
    options[kind] = [ends[end], *([between] if kind == "target_modules" else [])]
    here = veneer.get_peft_model(base(arch), veneer.LoraConfig(r=4, ensure_weight_tying=True, **options), seed=1)
    scramble(here)
    optimizer = torch.optim.SGD(here.adapters.parameters("default"), lr=0.1)
    trained(here, arch)
    optimizer.step()
    batch = inputs(arch)
    expected = logits(here, batch)
    assert gap(expected, logits(base(arch), batch)) > VISIBLE
    here.save_pretrained(tmp_path / "here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(base(arch), tmp_path / "here").eval()
    assert gap(logits(there, batch), expected) < CLOSE
    back = veneer.PeftModel.from_pretrained(base(arch), tmp_path / "here", is_trainable=True)
    assert gap(logits(back, batch), expected) < CLOSE
    assert len(back.adapters.parameters("default")) == len(here.adapters.parameters("default"))
    merged = back.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert gap(logits(merged, batch), expected) < CLOSE
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings
    assert gap(logits(again, batch), expected) < CLOSE


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target_modules": ["embed_tokens"], "use_dora": True}, veneer.UnsupportedError),
        ({"target_modules": ["embed_tokens"], "rank_pattern": {"lm_head": 2}}, veneer.UnsupportedError),
        ({"target_modules": ["embed_tokens"], "exclude_modules": ["lm_head"]}, veneer.ConfigError),
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, veneer.ConfigError),
    ],
)
def test_what_cannot_stay_alike_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="ensure_weight_tying"):
        veneer.get_peft_model(tied(), veneer.LoraConfig(ensure_weight_tying=True, **options))


def test_a_pattern_for_one_end_names_both() -> None:
    config = veneer.LoraConfig(ensure_weight_tying=True, target_modules=r".*\.(embed_tokens|q_proj)")
    config = veneer.get_peft_model(tied(), config).peft_config["default"]
    assert config.target_modules == {"embed_tokens", "lm_head", "q_proj"}


def test_a_base_that_is_not_tied_is_adapted_as_it_is() -> None:
    config = veneer.LoraConfig(ensure_weight_tying=True, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="no tied modules were found in the model"):
        model = veneer.get_peft_model(build("llama"), config)
    assert list(model.adapters.layers) == ["model.embed_tokens"]


UNTIED = "`ensure_weight_tying` is not set to True"
WARNINGS: list[tuple[type, dict[str, Any], str | None]] = [
    (veneer.LoraConfig, {"target_modules": ["lm_head"]}, UNTIED),
    (veneer.LoraConfig, {"modules_to_save": ["embed_tokens", "lm_head"]}, UNTIED),
    (veneer.LoHaConfig, {"target_modules": ["q_proj", "lm_head"]}, "no implementation exists to tie the adapters"),
    (veneer.LoraConfig, {"target_modules": ["q_proj"], "ensure_weight_tying": True}, "no tied modules are added"),
    (veneer.LoraConfig, {"trainable_token_indices": [1], "ensure_weight_tying": True}, None),
    (veneer.LoraConfig, {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}, None),
    (veneer.LoraConfig, {"target_modules": ["q_proj"]}, None),
]


@pytest.mark.parametrize(("kind", "options", "expected"), WARNINGS)
def test_a_weight_that_will_part_is_warned_of(kind: Any, options: dict[str, Any], expected: str | None) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        veneer.get_peft_model(tied(), kind(**options))
    assert [expected in str(warning.message) for warning in given if expected] == [True] * bool(expected)
    assert len(given) == bool(expected)


def test_a_model_whose_config_says_untied_is_adapted_as_it_is() -> None:
    model = tied()
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="no tied modules were found in the model"):
        adapted = veneer.get_peft_model(model, veneer.LoraConfig(ensure_weight_tying=True, target_modules=["lm_head"]))
    assert list(adapted.adapters.layers) == ["lm_head"]


def test_the_embeddings_of_an_encoder_decoder_load_as_peft_trained_them(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, ensure_weight_tying=True, target_modules=["lm_head", "q"])
        other = scramble(peft.get_peft_model(build("t5"), config))
        other.save_pretrained(tmp_path / "peft")
    expected = logits(other, inputs("t5"))
    assert gap(expected, logits(build("t5"), inputs("t5"))) > VISIBLE
    here = veneer.PeftModel.from_pretrained(build("t5"), tmp_path / "peft", is_trainable=True).eval()
    assert gap(logits(here, inputs("t5")), expected) < CLOSE


SHARED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "shared"])
def test_all_embeddings_of_an_encoder_decoder_stay_alike(kind: str, name: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q", name]} if kind == "target_modules" else {"target_modules": ["q"], kind: [name]}
    config = veneer.LoraConfig(r=4, ensure_weight_tying=True, task_type="SEQ_2_SEQ_LM", **options)  # type: ignore[arg-type]
    model = scramble(veneer.get_peft_model(build("t5"), config, seed=1))
    keys = model.get_adapter_state_dict()
    assert all(any(f".{end}." in key for key in keys) for end in SHARED)
    per_layer = 1 if kind == "modules_to_save" else 2
    own = [t for n, t in model.named_parameters() if t.requires_grad and ".q." not in n]
    assert len({id(tensor) for tensor in own}) == per_layer
    expected = logits(model, inputs("t5"))
    model.save_pretrained(tmp_path / "new")
    again = veneer.PeftModel.from_pretrained(build("t5"), tmp_path / "new", is_trainable=True).eval()
    assert gap(logits(again, inputs("t5")), expected) < CLOSE
    assert len(again.adapters.parameters("default")) == len(model.adapters.parameters("default"))
    merged = model.merge_and_unload()
    assert gap(logits(merged, inputs("t5")), expected) < CLOSE
    assert merged.lm_head.weight is merged.shared.weight
    if kind == "target_modules":  # peft makes a linear layer of the encoder's embedding that is saved whole
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            back = peft.PeftModel.from_pretrained(build("t5"), tmp_path / "new").eval()
        assert gap(logits(back, inputs("t5")), expected) < CLOSE


def test_going_on_with_one_end_alone_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=UNTIED):
        model = veneer.get_peft_model(tied(), veneer.LoraConfig(target_modules=["embed_tokens"]))
    model.peft_config["default"].ensure_weight_tying = True  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path)
    with pytest.raises(veneer.UnsupportedError, match="loads without is_trainable"):
        veneer.PeftModel.from_pretrained(tied(), tmp_path, is_trainable=True)
