"""SHADOW: a small decoder whose states move the inputs of the base's blocks. peft is the oracle."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import veneer
from tests.adapters import WEIGHTS, edit_config, saved_base
from tests.models import BLOCKS, LLAMA, TEXT, build, gap, inputs, logits
from veneer.errors import AdapterError, BindError, ConfigError, MergeError, TargetError, UnsupportedError

SHARP: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_weights": False, "shadow_alpha": 2.0}
SMALL: dict[str, Any] = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_hidden_layers": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "as wide": {},
    "small": {**SMALL, "update_hidden_size": 5, "shadow_intermediate_size": 24},
    "own embeddings": {"share_embeddings": False, "r": 3},
}
GENERATION: dict[str, dict[str, Any]] = {"cache": {}, "no cache": {"use_cache": False}, "beams": {"num_beams": 2}}


def _theirs(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.ShadowConfig(**{**SHARP, **options})).eval()


def _saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def _ours(folder: Path, seed: int = 1, arch: str = "llama", **options: Any) -> Path:
    veneer.get_peft_model(build(arch), veneer.ShadowConfig(**{**SHARP, **options}), seed=seed).save_pretrained(folder)
    return folder


def _padded(arch: str) -> dict[str, Any]:
    batch = inputs(arch)
    batch["input_ids"][0, :3], batch["attention_mask"][0, :3] = 0, 0
    return batch


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_as_in_peft_both_ways(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = _theirs(build(arch), **options)
    wanted = logits(theirs, _padded(arch))
    assert gap(wanted, logits(build(arch), _padded(arch))) > 0.1
    ours: Any = veneer.PeftModel.from_pretrained(build(arch), _saved(theirs, tmp_path / "theirs"))
    assert gap(logits(ours, _padded(arch)), wanted) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(build(arch), tmp_path / "ours").eval()
    assert gap(logits(again, _padded(arch)), wanted) < 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_is_as_in_peft_with_padding(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = _theirs(build(arch), **SMALL)
    ours: Any = veneer.PeftModel.from_pretrained(build(arch), _saved(theirs, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            model.generate(
                **_padded(arch), **options, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
            )
            for model in (ours, theirs)
        ]
    assert torch.equal(*found)


OTHERS: dict[str, Any] = {
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**LLAMA, "head_dim": 8, "num_hidden_layers": 3})),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**TEXT, **BLOCKS, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, **BLOCKS, intermediate_size=48)),
}


@pytest.mark.oracle
@pytest.mark.parametrize("arch", OTHERS)
def test_other_decoders_are_as_in_peft(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, other = OTHERS[arch]().eval(), OTHERS[arch]().eval()
    other.load_state_dict(base.state_dict())
    theirs = _theirs(base)
    ours = veneer.PeftModel.from_pretrained(other, _saved(theirs, tmp_path))
    assert gap(logits(ours, inputs("llama")), logits(theirs, inputs("llama"))) < 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_loss_of_training_and_its_gradients_are_as_in_peft(checkpointing: bool, tmp_path: Path) -> None:
    options = {**SMALL, "shadow_dropout": 0.0, "auxiliary_loss_weight": 0.5}
    theirs = _theirs(build("llama"), **options).train()
    ours: Any = veneer.PeftModel.from_pretrained(build("llama"), _saved(theirs, tmp_path), is_trainable=True).train()
    if checkpointing:
        ours.activation_checkpointing_enable()
    batch = _padded("llama")
    losses = [model(**batch, labels=batch["input_ids"]).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    ours_loss, theirs_loss = (loss.detach() for loss in losses)
    assert gap(ours_loss, theirs_loss) < 1e-5
    with torch.no_grad():
        evaluated = ours.eval()(**batch, labels=batch["input_ids"]).loss
    assert gap(ours_loss, evaluated) > 0.1
    # The small decoder's tensors lie on the first block here, and beside the model in peft.
    wanted = {n.removeprefix("base_model."): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = {
        n.removeprefix("base_model.")
        .replace("model.model.layers.0.shadow_backbone.default", "shadow_backbone")
        .replace("model.model.layers.0.shadow_projection.default", "shadow_projection"): p.grad
        for n, p in ours.named_parameters()
        if p.grad is not None
    }
    assert found.keys() == wanted.keys()
    assert sum("shadow_backbone" in name for name in found) == 1 + 9 * 2 + 1
    assert all(gap(found[name], wanted[name]) < 1e-4 for name in wanted)
    # The states after the last block are read by nobody; all others are trained, and nothing else.
    idle = {n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None}
    assert all("layers.1.shadow_update" in name for name in idle)
    assert all("shadow_" in n for n, p in ours.named_parameters() if p.requires_grad)


@pytest.mark.oracle
@pytest.mark.parametrize("options", [{"target_modules": ["layers.1"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_some_blocks_and_a_head_are_as_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = _theirs(build("llama"), **options)
    ours = veneer.PeftModel.from_pretrained(build("llama"), _saved(theirs, tmp_path))
    assert gap(logits(ours, inputs("llama")), logits(theirs, inputs("llama"))) < 1e-5


def test_blocks_are_chosen_by_their_places(tmp_path: Path) -> None:
    model: Any = veneer.get_peft_model(build("llama"), veneer.ShadowConfig(**SHARP, layers_to_transform=[1]))
    assert model.peft_config["default"].target_modules == ["model.layers.1"]
    wanted = logits(model.eval(), inputs("llama"))
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again, inputs("llama")), wanted)


def test_two_and_a_prompt_are_active_together_and_a_copy_is_the_same() -> None:
    prompt = veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model: Any = veneer.get_peft_model(build("llama"), prompt, seed=1).eval()
    model.add_adapter("a", veneer.ShadowConfig(**SHARP))
    model.add_adapter("b", veneer.ShadowConfig(**SHARP, shadow_num_hidden_layers=2))
    found = []
    for names in (["default"], ["default", "a"], ["default", "a", "b"]):
        model.set_adapter(names)
        found.append(logits(model.eval(), inputs("llama")))
    assert gap(found[0], found[1]) > 0.01
    assert gap(found[1], found[2]) > 0.01
    # Through the cache as without it.
    ran: dict[str, Any] = {**inputs("llama"), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**ran), model.generate(**ran, use_cache=False))
    assert torch.equal(logits(copy.deepcopy(model), inputs("llama")), found[2])


def test_a_base_in_bfloat16_gives_nearly_the_same(tmp_path: Path) -> None:
    folder = _ours(tmp_path)
    wanted = logits(veneer.PeftModel.from_pretrained(build("llama"), folder), inputs("llama"))
    model = veneer.PeftModel.from_pretrained(build("llama").to(torch.bfloat16), folder)
    assert gap(logits(model, inputs("llama")), wanted) < 0.03


def test_a_new_one_changes_nothing_and_learns() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0))
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    assert torch.equal(logits(model, inputs("llama")), logits(build("llama"), inputs("llama")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model.train()(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert gap(logits(model.eval(), inputs("llama")), logits(build("llama"), inputs("llama"))) > 1e-3


def test_it_can_be_turned_off_and_taken_off(tmp_path: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build("llama"), _ours(tmp_path / "a"))
    base = logits(build("llama"), inputs("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs("llama")), base)
    alone = logits(model, inputs("llama"))
    model.rename_adapter("default", "first")
    assert torch.equal(logits(model, inputs("llama")), alone)
    bare = model.unload()
    assert torch.equal(logits(bare, inputs("llama")), base)
    assert not any("shadow" in name for name, _ in bare.named_parameters())


def test_rows_of_one_batch_have_their_own_also_in_generation(tmp_path: Path) -> None:
    model: Any = veneer.PeftModel.from_pretrained(build("llama"), _ours(tmp_path / "a"))
    model.load_adapter(_ours(tmp_path / "b", 2, **SMALL), adapter_name="other")
    batch = {key: value.repeat(2, 1)[:3] for key, value in inputs("llama").items()}
    names = ["other", "__base__", "default"]
    mixed = logits(model, batch, adapter_names=names)
    ran: dict[str, Any] = {**batch, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
    tokens = model.generate(**ran, adapter_names=names)
    for row, name in enumerate(names):
        assert gap(mixed[row], logits(model, batch, adapter_names=[name] * 3)[row]) < 1e-5
        assert torch.equal(tokens[row], model.generate(**ran, adapter_names=[name] * 3)[row])
    assert gap(logits(model, batch, adapter_names=["other"] * 3), logits(model, batch, adapter_names=names)) > 0.01


def test_it_works_beside_a_lora(tmp_path: Path) -> None:
    model: Any = veneer.PeftModel.from_pretrained(build("llama"), _ours(tmp_path / "a"))
    shadow = logits(model, inputs("llama"))
    model.add_adapter("lora", veneer.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    both = logits(model, inputs("llama"))
    assert gap(both, shadow) > 1e-3
    model.merge_adapter(["lora"])
    model.set_adapter(["default", "lora"])
    assert gap(logits(model, inputs("llama")), both) < 1e-5


def test_what_it_cannot_do_is_refused_with_a_mend(tmp_path: Path) -> None:
    folder = _ours(tmp_path / "a")
    model: Any = veneer.PeftModel.from_pretrained(build("llama"), folder)
    with pytest.raises(MergeError, match=r"no weight can hold it.*unmerged"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="no weight can hold it"):
        veneer.merge(folder, base=saved_base(tmp_path / "base", "llama"), out=tmp_path / "out")
    with pytest.raises(AdapterError, match="reads whole rows"):
        logits(model, inputs("llama"), adapter_names=[("default", 14)])
    with model.disable_adapter():
        cache = model(**inputs("llama"), use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="filled without 'default'"):
        model(input_ids=inputs("llama")["input_ids"][:, :1], past_key_values=cache)
    narrow: Any = veneer.get_peft_model(build("llama"), veneer.ShadowConfig(**SMALL))
    with pytest.raises(AdapterError, match=r"has embeddings of its own.*Give input_ids"):
        narrow(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(UnsupportedError, match=r"T5\w+ has no list of blocks"):
        veneer.get_peft_model(build("t5"), veneer.ShadowConfig())
    with pytest.raises(TargetError, match="is no block of the decoder"):
        veneer.get_peft_model(build("llama"), veneer.ShadowConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="second classifier"):
        veneer.get_peft_model(build("llama"), veneer.ShadowConfig(task_type="SEQ_CLS"))
    with pytest.raises(UnsupportedError, match="shadow_model='other'"):
        veneer.get_peft_model(build("llama"), veneer.ShadowConfig(shadow_model="other"))
    with pytest.raises(ConfigError, match="r=0 is too small"):
        veneer.ShadowConfig(r=0)
    edit_config(folder, shadow_num_hidden_layers=2)
    with pytest.raises(BindError, match=r"shadow_backbone.default.layers.1.*is missing"):
        veneer.PeftModel.from_pretrained(build("llama"), folder)
