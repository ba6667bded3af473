"""SHADOW: a small decoder whose states move the inputs of the base's blocks. peft is the oracle."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import veneer
from tests.models import BLOCKS, LLAMA, TEXT, build, gap, inputs, logits
from tests.random_adapters import WEIGHTS, edit_config, saved_base
from veneer.errors import (
    AdapterError,
    BindError,
    ConfigError,
    CorruptFileError,
    IncompleteCheckpointError,
    MergeError,
    NoMergedFormError,
    PathNotFoundError,
    PickleRefusedError,
    TargetError,
    UnsupportedError,
)

SHARP: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_weights": False, "shadow_alpha": 2.0}
SMALL: dict[str, Any] = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_hidden_layers": 2}
CLASSES: dict[str, Any] = {**SMALL, "task_type": "SEQ_CLS"}
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
        made = peft.get_peft_model(model, peft.ShadowConfig(**{**SHARP, **options})).eval()
    # What is copied from the base is to differ from it.
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "shadow_head" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return made


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


def _check_both_ways(make: Callable[[], Any], arch: str, options: dict[str, Any], tmp_path: Path) -> tuple[Any, Any]:
    """Ours and theirs of one adapter, compared: theirs loaded here and ours there, their files byte for byte."""
    theirs = _theirs(make(), **options)
    wanted = logits(theirs, _padded(arch))
    assert gap(wanted, logits(make(), _padded(arch))) > 0.1
    ours: Any = veneer.PeftModel.from_pretrained(make(), _saved(theirs, tmp_path / "theirs"))
    assert gap(logits(ours, _padded(arch)), wanted) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert gap(logits(again, _padded(arch)), wanted) < 1e-6
    return ours, theirs


def _generated(model: Any, arch: str, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens: Tensor = model.generate(
            **_padded(arch), **options, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
    return tokens


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_as_in_peft_both_ways(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    _check_both_ways(lambda: build(arch), arch, options, tmp_path)


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_is_as_in_peft_with_padding(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = _theirs(build(arch), **SMALL)
    ours: Any = veneer.PeftModel.from_pretrained(build(arch), _saved(theirs, tmp_path))
    assert torch.equal(*(_generated(model, arch, **options) for model in (ours, theirs)))


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


def _gradients(model: Any) -> dict[str, Tensor]:
    """Parameter's name -> its gradient. What all blocks share lies in the model, and in peft beside it."""
    place = re.compile(r"model\.(shadow_(?:backbone|projection|head)\.default)")
    return {
        place.sub(r"\1", name.removeprefix("base_model.")): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _check_trained_alike(ours: Any, theirs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Compare the losses of training and their gradients; returns ours."""
    losses = [model(**batch).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    ours_loss, theirs_loss = (loss.detach() for loss in losses)
    assert gap(ours_loss, theirs_loss) < 1e-5
    with torch.no_grad():
        evaluated = ours.eval()(**batch).loss
    assert gap(ours_loss, evaluated) > 0.1
    found, wanted = _gradients(ours), _gradients(theirs)
    assert found.keys() == wanted.keys()
    assert all(gap(found[name], wanted[name]) < 1e-4 for name in wanted)
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_loss_of_training_and_its_gradients_are_as_in_peft(checkpointing: bool, tmp_path: Path) -> None:
    options = {**SMALL, "shadow_dropout": 0.0, "auxiliary_loss_weight": 0.5}
    theirs = _theirs(build("llama"), **options).train()
    ours: Any = veneer.PeftModel.from_pretrained(build("llama"), _saved(theirs, tmp_path), is_trainable=True).train()
    if checkpointing:
        ours.activation_checkpointing_enable()
    batch = _padded("llama")
    found = _check_trained_alike(ours, theirs, {**batch, "labels": batch["input_ids"]})
    assert sum("shadow_backbone" in name for name in found) == 1 + 9 * 2 + 1
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


def _check_it_learns(model: Any, batch: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model.train()(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_a_new_one_changes_nothing_and_learns() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0))
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    assert torch.equal(logits(model, inputs("llama")), logits(build("llama"), inputs("llama")))
    _check_it_learns(model, batch)
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
    with pytest.raises(NoMergedFormError, match=r"no weight can hold it.*unmerged") as error:
        model.merge_and_unload()
    assert isinstance(error.value, NotImplementedError)
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
    with pytest.raises(ConfigError, match="r=0 is too small"):
        veneer.ShadowConfig(r=0)
    edit_config(folder, shadow_num_hidden_layers=2)
    with pytest.raises(BindError, match=r"shadow_backbone.default.layers.1.*is missing"):
        veneer.PeftModel.from_pretrained(build("llama"), folder)


def _classifier(arch: str, labels: int = 3) -> Any:
    """A sequence classifier on the decoder of a language model."""
    base: Any = build(arch)
    config = copy.deepcopy(base.config)
    config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = tf.AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(base.base_model.state_dict())
    return model.eval()


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_classifier_is_as_in_peft_both_ways(arch: str, tmp_path: Path) -> None:
    _check_both_ways(lambda: _classifier(arch), arch, CLASSES, tmp_path)


LABELS: dict[str, tuple[int, Tensor]] = {
    "one of three": (3, torch.tensor([2, 0])),
    "a number": (1, torch.tensor([1.5, -1.0])),
    "some of three": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])),
}


@pytest.mark.oracle
@pytest.mark.parametrize(("count", "labels"), LABELS.values(), ids=LABELS)
def test_a_classifiers_loss_and_its_gradients_are_as_in_peft(count: int, labels: Tensor, tmp_path: Path) -> None:
    options = {**CLASSES, "shadow_dropout": 0.0, "auxiliary_loss_weight": 0.5}
    theirs = _theirs(_classifier("llama", count), **options).train()
    ours: Any = veneer.PeftModel.from_pretrained(
        _classifier("llama", count), _saved(theirs, tmp_path), is_trainable=True
    ).train()
    batch = inputs("llama")
    batch["input_ids"][0, -2:], batch["attention_mask"][0, -2:] = 0, 0
    found = _check_trained_alike(ours, theirs, {**batch, "labels": labels})
    assert {"shadow_head.default.weight", "model.score.modules_to_save.default.weight"} < found.keys()


def test_a_new_classifier_learns_and_is_loaded_on_a_language_model(tmp_path: Path) -> None:
    config = veneer.ShadowConfig(**{**SHARP, **CLASSES}, shadow_dropout=0.0)
    model: Any = veneer.get_peft_model(_classifier("llama"), config, seed=1)
    _check_it_learns(model, {**inputs("llama"), "labels": torch.tensor([2, 0])})
    heads = [t for key, t in model.adapters.named_tensors("default") if "shadow_head" in key or "score" in key]
    start = _classifier("llama").score.weight
    assert len({t.detach().numpy().tobytes() for t in (*heads, start)}) == 3
    model.save_pretrained(tmp_path / "adapter")
    again = veneer.load(tmp_path / "adapter", base=saved_base(tmp_path / "base", "llama"))
    assert isinstance(again, veneer.PeftModelForSequenceClassification)
    assert torch.equal(logits(again, inputs("llama")), logits(model.eval(), inputs("llama")))
    assert torch.equal(model.unload().score.weight, start)


def test_rows_of_one_batch_have_their_own_classifier() -> None:
    options = {**SHARP, **CLASSES, "shadow_dropout": 0.0}
    model: Any = veneer.get_peft_model(_classifier("llama"), veneer.ShadowConfig(**options), seed=1)
    torch.manual_seed(2)
    model.add_adapter("other", veneer.ShadowConfig(**options))
    with torch.no_grad():
        for key, tensor in model.adapters.named_tensors("other"):
            if "shadow_head" in key or "score" in key:
                tensor.add_(torch.randn_like(tensor))
    batch, names = inputs("llama"), ["other", "default"]
    mixed = logits(model.eval(), batch, adapter_names=names)
    alone = [logits(model, batch, adapter_names=[name] * 2) for name in names]
    assert gap(alone[0], alone[1]) > 0.1
    assert all(gap(mixed[row], alone[row][row]) < 1e-5 for row in range(2))

    @torch.no_grad()
    def added(rows: slice) -> Tensor:
        """What the loss of training has beside the model's own."""
        part = {key: value[rows] for key, value in {**batch, "labels": torch.tensor([2, 0])}.items()}
        losses = []
        for weight in (0.5, 0.0):
            for config in model.peft_config.values():
                config.auxiliary_loss_weight = weight
            losses.append(model.train()(**part, adapter_names=names[rows]).loss)
        return losses[0] - losses[1]

    assert gap(added(slice(2)), added(slice(1)) + added(slice(1, 2))) < 1e-4


def _on_disk(folder: Path, kind: str) -> Path:
    """A decoder that is a model of its own; all but one are narrower than the base, with another vocabulary."""
    sizes = {**LLAMA, "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 120}
    torch.manual_seed(5)
    model: Any = build("gpt2") if kind == "of another class" else tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    if kind != "projected":
        model.save_pretrained(folder)
        return folder
    tensors = {f"shadow_model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    folder.mkdir()
    save_file({**tensors, "shadow_hidden_projection.weight": torch.randn(32, 16)}, folder / "model.safetensors")
    own = json.loads(model.config.to_json_string())
    values = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": own}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["narrow", "of another class", "projected"])
def test_a_model_of_its_own_is_as_in_peft_both_ways(kind: str, tmp_path: Path) -> None:
    options = {"shadow_model": str(_on_disk(tmp_path / "decoder", kind))}
    ours, theirs = _check_both_ways(lambda: build("llama"), "llama", options, tmp_path)
    assert torch.equal(*(_generated(model, "llama") for model in (ours, theirs)))
    again = veneer.load(tmp_path / "theirs", base=saved_base(tmp_path / "base", "llama"))
    assert torch.equal(logits(again, inputs("llama")), logits(ours, inputs("llama")))
    # A new one starts from the same values.
    new: Any = veneer.get_peft_model(build("llama"), veneer.ShadowConfig(**SHARP, **options))
    made, wanted = dict(new.adapters.named_tensors("default")), load_file(tmp_path / "theirs" / WEIGHTS)
    assert made.keys() == wanted.keys()
    given = [key for key in wanted if "backbone" in key or (kind == "projected" and "projection" in key)]
    assert all(torch.equal(made[key], wanted[key]) for key in given)


@pytest.mark.oracle
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_embeddings_of_a_model_of_its_own_are_not_trained(task: str, tmp_path: Path) -> None:
    decoder = str(_on_disk(tmp_path / "decoder", "projected"))
    options = {"shadow_model": decoder, "shadow_dropout": 0.0, "auxiliary_loss_weight": 0.5, "task_type": task}

    def make() -> Any:
        return build("llama") if task == "CAUSAL_LM" else _classifier("llama")

    theirs = _theirs(make(), **options).train()
    ours: Any = veneer.PeftModel.from_pretrained(make(), _saved(theirs, tmp_path / "a"), is_trainable=True).train()
    batch = inputs("llama")
    labels = batch["input_ids"] if task == "CAUSAL_LM" else torch.tensor([2, 0])
    _check_trained_alike(ours, theirs, {**batch, "labels": labels})
    ours.set_adapter("default")
    frozen = [name for name, p in ours.named_parameters() if "shadow_" in name and not p.requires_grad]
    assert len(frozen) == 1
    assert frozen[0].endswith("shadow_backbone.default.embed_tokens.weight")


def _edit(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


def test_a_decoder_that_cannot_be_used_is_refused_with_a_mend(tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, path: Path | str) -> None:
        with pytest.raises(kind, match=match):
            veneer.get_peft_model(build("llama"), veneer.ShadowConfig(shadow_model=str(path)))

    refused(PathNotFoundError, "The shadow_model .* does not exist", tmp_path / "nowhere")
    refused(PathNotFoundError, r"neither a local path nor in the hub's cache.*Download it first", "nobody/nothing")
    pair: Any = build("t5")
    pair.save_pretrained(tmp_path / "pair")
    refused(UnsupportedError, "a t5 is no decoder", tmp_path / "pair")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own.py").write_text("raise SystemExit")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(own))
    refused(UnsupportedError, r"transformers cannot load.*is not run", tmp_path / "code")
    with pytest.raises(ConfigError, match="has sizes of its own, and the config gives shadow_hidden_size"):
        veneer.ShadowConfig(shadow_model="other", shadow_hidden_size=16)
    narrow = _on_disk(tmp_path / "narrow", "narrow") / "model.safetensors"
    _edit(narrow, lambda tensors: {k: t for k, t in tensors.items() if k != "model.norm.weight"})
    refused(IncompleteCheckpointError, r"1 weights of LlamaModel are missing.*norm.weight", narrow.parent)
    narrow.rename(narrow.with_name("pytorch_model.bin"))
    refused(PickleRefusedError, "only as a pickle", narrow.parent)
    projected = _on_disk(tmp_path / "projected", "projected") / "model.safetensors"
    _edit(projected, lambda tensors: {**tensors, "shadow_hidden_projection.weight": torch.ones(24, 16)})
    refused(UnsupportedError, r"is \(24, 16\), and this base wants \(32, 16\)", projected.parent)
    _edit(projected, lambda tensors: {k: t for k, t in tensors.items() if "q_proj" not in k})
    refused(CorruptFileError, "q_proj.weight is not as its config says", projected.parent)


@pytest.mark.oracle
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("options", [{}, SMALL], ids=["as wide", "small"])
def test_the_decoder_alone_is_as_in_peft(task: str, options: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Any:
        return build("llama") if task == "CAUSAL_LM" else _classifier("llama")

    theirs = _theirs(make(), **options, task_type=task)
    ours: Any = veneer.PeftModel.from_pretrained(make(), _saved(theirs, tmp_path))
    batch = inputs("llama")
    batch["input_ids"][0, -2:], batch["attention_mask"][0, -2:] = 0, 0
    wanted = logits(theirs.base_model.unload_shadow(), batch)
    alone = ours.base_model.unload_shadow().eval()
    assert gap(logits(alone, batch), wanted) < 1e-5
    labels = batch["input_ids"] if task == "CAUSAL_LM" else torch.tensor([2, 0])
    output = ours(**batch, labels=labels)
    assert gap(output.shadow_loss, alone(**batch, labels=labels).loss.detach()) < 1e-5
    assert ours.last_shadow_loss is output.shadow_loss
    assert gap(output.loss.detach(), theirs(**batch, labels=labels).loss.detach()) < 1e-5
    assert not hasattr(ours(**batch), "shadow_loss")
    assert ours.last_shadow_loss is None
    assert alone.can_generate() == (task == "CAUSAL_LM")


@pytest.mark.parametrize(("arch", "options"), [("llama", {}), ("gpt2", {}), ("llama", SMALL)], ids=str)
def test_the_decoder_alone_generates_and_its_copy_is_complete(arch: str, options: dict[str, Any]) -> None:
    model: Any = veneer.get_peft_model(build(arch), veneer.ShadowConfig(**{**SHARP, **options}), seed=1).eval()
    alone = model.unload_shadow()
    assert alone.backbone is model.base_model.shadow_backbone["default"]
    ran: dict[str, Any] = {**inputs(arch), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens = alone.generate(**ran)
    assert torch.equal(tokens, alone.generate(**ran, use_cache=False))
    copied = model.unload_shadow("default", copy=True)
    assert any(t is copied.get_input_embeddings().weight for t in copied.state_dict(keep_vars=True).values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied.generate(**ran), tokens)
    assert not alone(**inputs(arch)).logits.any()


def test_its_modules_are_where_peft_has_them() -> None:
    model: Any = veneer.get_peft_model(build("llama"), veneer.ShadowConfig(**SHARP), seed=1)
    model.add_adapter("other", veneer.ShadowConfig(**{**SHARP, **SMALL}))
    tuner = model.base_model
    assert [list(getattr(tuner, f"shadow_{kind}")) for kind in ("backbone", "projection", "head")] == [
        ["default", "other"],
        ["default", "other"],
        [],
    ]
    assert isinstance(tuner.shadow_projection["default"], torch.nn.Identity)
    assert tuner.shadow_projection["other"].weight.shape == (32, 16)
    model.set_adapter("other")
    trained = [{p.requires_grad for p in tuner.shadow_backbone[name].parameters()} for name in ("default", "other")]
    assert trained == [{False}, {True}]
    # What replaces a module's tensors, as FSDP does, is what is used and saved.
    inner = tuner.shadow_backbone["other"].norm
    inner.weight = torch.nn.Parameter(torch.full_like(inner.weight, 3.0))
    key = "base_model.shadow_backbone.default.norm.weight"
    assert torch.equal(veneer.get_peft_model_state_dict(model, adapter_name="other")[key], inner.weight)
    model.delete_adapter("other")
    assert list(tuner.shadow_backbone) == ["default"]
    model.delete_adapter("default")
    assert not hasattr(model.get_base_model(), "shadow_backbone")


def test_the_decoder_alone_is_refused_where_there_is_none() -> None:
    model: Any = veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"No SHADOW adapter is active.*Name one"):
        model.unload_shadow()
    with pytest.raises(AdapterError, match="'default' is no SHADOW but LORA"):
        model.unload_shadow("default")
    bare: Any = veneer.get_peft_model(build("llama").model, veneer.ShadowConfig())
    with pytest.raises(AdapterError, match=r"nothing that predicts.*SEQ_CLS"):
        bare.unload_shadow()


class _Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states + scale * self.linear(self.norm(hidden_states))


class _Denoiser(torch.nn.Module):
    """A transformer as those of diffusers are, whose states no tokens of the call are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_attention_heads=2, attention_head_dim=4, to_dict=dict)
        self.embed = torch.nn.Linear(8, 8)
        self.single_transformer_blocks = torch.nn.ModuleList(_Block(8) for _ in range(3))
        self.checkpoints = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        states: Tensor = self.embed(hidden_states)
        for block in self.single_transformer_blocks:
            states = (
                checkpoint(block.__call__, states, 0.5, use_reentrant=False) if self.checkpoints else block(states, 0.5)
            )
        return states


BLOCKS_OF_IT: dict[str, Any] = {"target_modules": r"single_transformer_blocks\.\d+$", "shadow_dropout": 0.0}
BESIDE: dict[str, dict[str, Any]] = {
    "as wide": BLOCKS_OF_IT,
    "small": {**BLOCKS_OF_IT, "shadow_hidden_size": 4, "shadow_intermediate_size": 6, "shadow_num_hidden_layers": 2},
    "some": {**BLOCKS_OF_IT, "target_modules": ["single_transformer_blocks.1", "single_transformer_blocks.2"]},
}


@pytest.mark.oracle
@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
def test_beside_a_diffusion_transformer_it_is_as_in_peft_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    theirs = _theirs(_Denoiser(), **options, task_type=None)
    wanted = theirs(hidden_states=x)
    assert gap(wanted.detach(), _Denoiser()(hidden_states=x).detach()) > 0.1
    ours: Any = veneer.PeftModel.from_pretrained(_Denoiser(), _saved(theirs, tmp_path / "a"), is_trainable=True)
    assert gap(ours(hidden_states=x).detach(), wanted.detach()) < 1e-6
    ours.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    gradients = []
    for model, checkpoints in ((theirs, False), (ours, False), (ours, True)):
        model.zero_grad()
        model.train().base_model.model.checkpoints = checkpoints
        # Two calls before the gradients of either.
        first, second = model(hidden_states=x), model(hidden_states=x.flip(0) + 1)
        (second.square().mean() + 2 * first.square().mean()).backward()
        gradients.append({n: g.clone() for n, g in _gradients(model).items() if "shadow_" in n})
    assert gradients[0].keys() == gradients[1].keys() == gradients[2].keys()
    assert any("shadow_backbone" in name for name in gradients[0])
    for found in gradients[1:]:
        assert all(gap(found[name], tensor) < 1e-4 for name, tensor in gradients[0].items())


def test_beside_a_diffusion_transformer_rows_have_their_own_and_it_goes_again() -> None:
    x = torch.randn(2, 5, 8)
    model: Any = veneer.get_peft_model(_Denoiser(), veneer.ShadowConfig(init_weights=False, shadow_alpha=2.0), seed=1)
    assert model.peft_config["default"].target_modules == [f"single_transformer_blocks.{place}" for place in range(3)]
    model.add_adapter("other", veneer.ShadowConfig(init_weights=False, shadow_alpha=2.0), seed=2)
    model.eval()
    with torch.no_grad():
        alone = [model(x, adapter_names=[name] * 2) for name in ("other", "default")]
        mixed = model(x, adapter_names=["other", "default"])
        assert gap(alone[0], alone[1]) > 0.01
        assert all(gap(mixed[row], alone[row][row]) < 1e-5 for row in range(2))
        assert gap(copy.deepcopy(model)(x), alone[1]) < 1e-6
        bare = model.unload()
        assert torch.equal(bare(x), _Denoiser()(x))


def test_what_it_cannot_do_beside_a_diffusion_transformer_is_refused() -> None:
    model: Any = veneer.get_peft_model(_Denoiser(), veneer.ShadowConfig())
    with pytest.raises(UnsupportedError, match="not supported for Diffusers models"):
        model.unload_shadow()
    with pytest.raises(AdapterError, match="was not run for this call"):
        model.base_model.model.single_transformer_blocks[0](torch.zeros(1, 2, 8))
    with pytest.raises(UnsupportedError, match="cannot run beside a _Denoiser"):
        veneer.get_peft_model(_Denoiser(), veneer.ShadowConfig(shadow_model="somewhere"))
    with pytest.raises(TargetError, match="is no block of the decoder"):
        veneer.get_peft_model(_Denoiser(), veneer.ShadowConfig(target_modules=["embed"]))

    class Pairs(_Block):
        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
            return hidden_states, super().forward(hidden_states, scale)

    base = _Denoiser()
    base.single_transformer_blocks[0] = Pairs(8)
    pairs = veneer.get_peft_model(base, veneer.ShadowConfig(target_modules=["single_transformer_blocks.0"]))
    with pytest.raises(UnsupportedError, match="gives 2 tensors"):
        pairs(torch.zeros(1, 2, 8))


@pytest.mark.usefixtures("process_group")
def test_its_tensors_are_gathered_from_fsdp() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    config = veneer.ShadowConfig(**SHARP, **SMALL)
    model: Any = veneer.get_peft_model(build("llama"), config, seed=1).eval()
    wanted = logits(model, inputs("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spread = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert gap(logits(spread, inputs("llama")), wanted) < 1e-6
        state = veneer.get_peft_model_state_dict(spread)
    again: Any = veneer.get_peft_model(build("llama"), config, seed=2).eval()
    assert veneer.set_peft_model_state_dict(again, state).unexpected_keys == []
    assert gap(logits(again, inputs("llama")), wanted) < 1e-6


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "loaded again"])
def test_one_in_the_place_of_another_has_its_own_heads(swap: bool, tmp_path: Path) -> None:
    sizes = {"shadow_hidden_size": 16}
    first, second = (_ours(tmp_path / str(h), h, "gpt2", **sizes, shadow_num_attention_heads=h) for h in (2, 4))
    wanted = logits(veneer.PeftModel.from_pretrained(build("gpt2"), second), inputs("gpt2"))
    model: Any = veneer.PeftModel.from_pretrained(build("gpt2"), first)
    tensors = [id(tensor) for tensor in model.base_model.shadow_backbone["default"].parameters()]
    if swap:
        veneer.hotswap_adapter(model, second, "default")
    else:
        model.load_adapter(second)
    assert torch.equal(logits(model, inputs("gpt2")), wanted)
    assert [id(tensor) for tensor in model.base_model.shadow_backbone["default"].parameters()] == tensors
