"""One loader for any path, and its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.models import CASES, build, gap, inputs, logits
from tests.random_adapters import WEIGHTS, config, edit_config, edit_tensors, enlarge, saved, saved_base
from veneer.errors import (
    BaseMismatchError,
    BaseModelError,
    BindError,
    ConfigError,
    CorruptFileError,
    DuplicateAdapterError,
    IncompleteCheckpointError,
    NonFiniteError,
    NotACheckpointError,
    PathNotFoundError,
    PickleRefusedError,
    UnknownKeyError,
    UnknownMethodError,
    UnsupportedError,
)
from veneer.peft_model import auto_classes

VISIBLE = 1e-2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """An adapter trained on ``base``, which it names and whose digest it records."""
    model = veneer.load(base)
    model.add_adapter("default", config(), seed=1)
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# -- every kind of path ------------------------------------------------------------------------------------


def test_an_adapter_finds_the_base_that_it_names(adapter: Path, base: Path) -> None:
    batch = inputs("llama")
    expected = logits(veneer.PeftModel.from_pretrained(build("llama"), adapter), batch)
    model = veneer.load(adapter)
    assert isinstance(model, veneer.PeftModelForCausalLM)
    assert torch.equal(logits(model, batch), expected)
    report = model.load_report
    assert report is not None
    assert (report.kind, report.active, report.model_class) == ("adapter", ["default"], "LlamaForCausalLM")
    assert str(base) in report.base
    [found] = report.adapters
    assert found.tensors_bound == found.tensors_total == 2 * len(found.layers)
    assert (found.changed_layers, found.zero_layers, found.base_check) == (found.layers, [], "same")
    assert found.nbytes > 0
    assert set(report.seconds) == {"base", "adapters", "total"}


def test_both_ways_give_the_same_object(adapter: Path) -> None:
    ways = [
        veneer.load(adapter),
        veneer.AutoModelForCausalLM.from_pretrained(adapter),
        veneer.AutoPeftModelForCausalLM.from_pretrained(adapter),
        veneer.PeftModel.from_pretrained(build("llama"), adapter),
        veneer.load(adapter, base=build("llama")),
    ]
    assert len({type(model) for model in ways}) == 1
    outputs = [logits(model, inputs("llama")) for model in ways]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_full_model_is_a_model_without_an_adapter_yet(base: Path, adapter: Path) -> None:
    batch = inputs("llama")
    model = veneer.load(base)
    assert (model.active_adapters, model.load_report and model.load_report.kind) == ([], "model")
    assert torch.equal(logits(model, batch), logits(build("llama"), batch))
    model.load_adapter(adapter, "pirate")
    assert model.active_adapters == ["pirate"]
    assert torch.equal(logits(model, batch), logits(veneer.load(adapter), batch))


def test_merged_it_has_no_wrapper_and_says_so(adapter: Path) -> None:
    model = veneer.load(adapter, merge=True)
    assert gap(logits(model, inputs("llama")), logits(veneer.load(adapter), inputs("llama"))) < 1e-5
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    assert model.load_report is not None
    assert model.load_report.merged


def test_a_merged_folder_is_a_full_model(adapter: Path, tmp_path: Path) -> None:
    expected = logits(veneer.load(adapter), inputs("llama"))
    report = veneer.merge(adapter, out=tmp_path / "merged")
    assert report.layers == len(CASES["llama"].targets) * 2
    assert not list((tmp_path / "merged").glob("adapter_*"))
    model = veneer.load(tmp_path / "merged")
    assert model.load_report is not None
    assert model.load_report.kind == "model"
    assert gap(logits(model, inputs("llama")), expected) < 1e-5


def test_in_a_folder_with_both_the_adapters_config_decides(adapter: Path, base: Path, tmp_path: Path) -> None:
    both = shutil.copytree(adapter, tmp_path / "both")
    other = build("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1.0)
    other.save_pretrained(both)
    model = veneer.load(both)
    assert model.load_report is not None
    assert (model.load_report.kind, model.active_adapters) == ("model+adapter", ["default"])
    assert str(base) in model.load_report.base
    assert torch.equal(logits(model, inputs("llama")), logits(veneer.load(adapter), inputs("llama")))
    edit_config(both, base_model_name_or_path="gone/away")
    with pytest.warns(UserWarning, match="trained on another base"):
        beside = veneer.load(both, local_files_only=True)
    assert beside.load_report is not None
    assert "the model beside the adapter" in beside.load_report.base
    assert beside.active_adapters == ["default"]
    with beside.disable_adapter():
        assert torch.equal(logits(beside, inputs("llama")), logits(other, inputs("llama")))


def test_a_set_comes_back_whole(base: Path, tmp_path: Path) -> None:
    model, batch = veneer.load(base), inputs("llama")
    for seed, name in enumerate(["default", "french", "german"]):
        model.add_adapter(name, config(r=2 + seed), seed=seed)
        enlarge(model, name, seed)
    model.set_adapter(["german", "french"])
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "set")
    again = veneer.load(tmp_path / "set")
    assert list(again.peft_config) == ["default", "french", "german"]
    assert again.active_adapters == ["german", "french"]
    assert torch.equal(logits(again, batch), expected)
    assert again.load_report is not None
    assert again.load_report.kind == "set of adapters"
    assert again.load_report.active == ["german", "french"]
    assert torch.equal(logits(veneer.load(tmp_path / "set", base=build("llama")), batch), expected)
    model.save_pretrained(tmp_path / "one", selected_adapters=["french"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["README.md", "adapter_set.json", "french"]
    assert list(veneer.load(tmp_path / "one").peft_config) == ["french"]


def test_one_adapter_of_a_set_and_then_another_as_with_peft(tmp_path: Path) -> None:
    model, batch = veneer.get_peft_model(build("llama"), config(r=2), seed=0).eval(), inputs("llama")
    model.add_adapter("other", config(r=3), seed=1)
    expected = {}
    for name in ("default", "other"):
        enlarge(model, name)
        model.set_adapter(name)
        expected[name] = logits(model, batch)
    model.save_pretrained(tmp_path / "set")
    for folder in (tmp_path / "set", tmp_path / "set" / "other"):
        again = veneer.PeftModel.from_pretrained(build("llama"), folder, "mine")
        assert list(again.peft_config) == again.active_adapters == ["mine"]
        assert again.load_report is not None
        assert again.load_report.kind == "adapter"
    assert torch.equal(logits(again, batch), expected["other"])
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "set")
    assert torch.equal(logits(again, batch), expected["default"])
    again.load_adapter(tmp_path / "set" / "other", "other")
    again.set_adapter("other")
    assert torch.equal(logits(again, batch), expected["other"])


def test_a_set_without_an_adapter_at_its_root_is_no_single_adapter(tmp_path: Path) -> None:
    model = veneer.get_peft_model(build("llama"), config(), "french")
    model.add_adapter("german", config())
    model.save_pretrained(tmp_path)
    for load in (model.load_adapter, lambda path: veneer.PeftModel.from_pretrained(build("llama"), path)):
        with pytest.raises(NotACheckpointError, match=r"set of adapters.*/french, .*/german.*veneer\.load\("):
            load(tmp_path)


def test_a_trainers_checkpoints_below_an_adapter_are_no_set(adapter: Path) -> None:
    shutil.copytree(adapter, adapter / "checkpoint-10", ignore=shutil.ignore_patterns("checkpoint*"))
    assert list(veneer.load(adapter).peft_config) == ["default"]
    (adapter / "adapter_config.json").unlink()
    (adapter / WEIGHTS).unlink()
    with pytest.raises(NotACheckpointError, match=r"neither a model.*load one, such as .*checkpoint-10"):
        veneer.load(adapter)


@pytest.mark.parametrize("arch", CASES)
def test_every_task_class_loads_its_adapter(arch: str, tmp_path: Path) -> None:
    names = {
        "bert": "AutoModelForSequenceClassification",
        "t5": "AutoModelForSeq2SeqLM",
        "vit": "AutoModelForImageClassification",
        "whisper": "AutoModelForSpeechSeq2Seq",
    }
    base, folder = saved_base(tmp_path / "base", arch), saved(tmp_path / "adapter", arch)
    expected = logits(veneer.PeftModel.from_pretrained(build(arch), folder), inputs(arch))
    kind = getattr(veneer, names.get(arch, "AutoModelForCausalLM"))
    for model in (kind.from_pretrained(folder, base=base), veneer.load(folder, base=base)):
        assert torch.equal(logits(model, inputs(arch)), expected)
    plain = kind.from_pretrained(base)
    assert torch.equal(logits(plain, inputs(arch)), logits(build(arch), inputs(arch)))


def test_the_base_of_another_task_gets_the_adapters_head(tmp_path: Path) -> None:
    """A sequence classifier of five labels, trained on a base that was saved as a language model."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    base: Any = build("llama")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    start = LlamaForSequenceClassification(LlamaConfig(**{**base.config.to_dict(), "num_labels": 5})).eval()
    start.model.load_state_dict(base.model.state_dict())
    options = veneer.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    model = veneer.get_peft_model(start, options, seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    again = veneer.load(tmp_path / "adapter", base=tmp_path / "base")
    assert isinstance(again, veneer.PeftModelForSequenceClassification)
    assert torch.equal(logits(again, inputs("llama")), logits(model, inputs("llama")))
    assert again.load_report is not None
    assert not again.load_report.warnings


def test_weights_that_start_random_are_said(base: Path) -> None:
    model = veneer.AutoModelForSequenceClassification.from_pretrained(base)
    assert model.load_report is not None
    assert "start random: score.weight" in model.load_report.warnings[0]


@pytest.mark.parametrize("name", [name for name in veneer.__all__ if name.startswith("Auto")])
def test_every_auto_class_names_a_task_of_transformers(name: str) -> None:
    import transformers

    from veneer.checkpoints.model_class import TASK_CLASSES

    kind = getattr(veneer, name)
    assert issubclass(kind, auto_classes.AutoPeftModel)
    if kind.task is not None:
        assert hasattr(transformers, TASK_CLASSES[kind.task])
    with pytest.raises(TypeError, match="from_pretrained"):
        kind()


def test_dtypes_are_as_asked(adapter: Path, base: Path) -> None:
    edit_tensors(adapter, lambda tensors: {key: value.bfloat16() for key, value in tensors.items()})
    model = veneer.load(adapter, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.adapters.parameters("default")} == {torch.bfloat16}
    assert model.load_report is not None
    assert model.load_report.adapters[0].dtypes == ["bfloat16"]
    trainable = veneer.load(adapter, is_trainable=True)
    assert {p.dtype for p in trainable.adapters.parameters("default")} == {torch.float32}
    assert all(p.requires_grad for p in trainable.adapters.parameters("default"))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map(adapter: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    expected = logits(veneer.load(adapter), inputs("llama"))
    model = veneer.load(adapter, device_map=device_map)
    assert torch.equal(logits(model, inputs("llama")), expected)


def test_the_tokenizer_is_the_adapters_or_the_bases(adapter: Path, base: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = veneer.load(adapter)
    with pytest.raises(IncompleteCheckpointError, match="No tokenizer in"):
        veneer.load_tokenizer(model)
    for folder, word in ((base, "base"), (adapter, "own")):
        tokens = Tokenizer(models.WordLevel({"<unk>": 0, word: 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>").save_pretrained(folder)
        assert word in veneer.load_tokenizer(model).get_vocab()


def test_it_runs_in_a_pipeline(adapter: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0", pad_token="w0")
    model = veneer.load(adapter)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [answer] = generate("w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].split() == tokenizer.decode(expected[0, 3:], skip_special_tokens=True).split()


def test_the_report_prints(adapter: Path) -> None:
    from rich.console import Console

    console = Console(record=True, width=200)
    console.print(veneer.load(adapter).load_report)
    text = console.export_text()
    assert "6 of 6 layers carry a change" in text
    assert "base digest: same" in text
    report = veneer.load(adapter).load_report
    assert report is not None
    assert json.loads(json.dumps(report.to_dict()))["active"] == ["default"]


# -- which base --------------------------------------------------------------------------------------------


def test_a_base_may_be_named_relative_to_the_adapter(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="../base")
    model = veneer.load(adapter)
    assert model.load_report is not None
    assert "relative to the adapter's folder" in model.load_report.base


def test_a_base_that_moved_is_named_by_hand(adapter: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(BaseModelError, match=r"was not found. Tried: .*base.*veneer\.load\(.*base=") as error:
        veneer.load(adapter)
    assert "--base" in str(error.value.hint)
    assert veneer.load(adapter, base=tmp_path / "elsewhere").active_adapters == ["default"]


def test_a_base_that_is_not_named(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(BaseModelError, match="names no base model"):
        veneer.load(adapter)


def test_a_base_on_the_hub_is_not_fetched_offline(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="someone/base")
    with pytest.raises(BaseModelError, match=r"someone/base.*not found.*network is switched off"):
        veneer.load(adapter, local_files_only=True)


def test_a_base_that_does_not_exist(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"bas.*does not exist.*Did you mean .*base"):
        veneer.load(adapter, base=tmp_path / "bas")


def test_an_adapter_is_no_base(adapter: Path, base: Path) -> None:
    with pytest.raises(BaseModelError, match="is an adapter, not a base model") as error:
        veneer.load(adapter, base=adapter)
    assert str(base) in str(error.value.hint)
    with pytest.raises(BaseModelError, match="PeftModel"):
        veneer.load(adapter, base=veneer.load(base))


def test_a_full_model_is_no_adapter(base: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"is a full model, not an adapter.*veneer\.load"):
        veneer.PeftModel.from_pretrained(build("llama"), base)
    with pytest.raises(BaseModelError, match="takes no base"):
        veneer.load(base, base=base)
    with pytest.raises(BaseModelError, match="takes no base"):
        veneer.load(base, base=build("llama"))


def test_a_broken_base_is_known_before_anything_is_loaded(adapter: Path, base: Path) -> None:
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CorruptFileError, match="truncated"):
        veneer.load(adapter)
    weights.unlink()
    with pytest.raises(IncompleteCheckpointError, match="no weights"):
        veneer.load(adapter)
    (base / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(PickleRefusedError, match="convert-pickle"):
        veneer.load(adapter)


def test_another_base_of_the_same_shapes_is_noticed(adapter: Path, tmp_path: Path) -> None:
    other: Any = build("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(0.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="was trained on another base"):
        model = veneer.load(adapter, base=tmp_path / "other")
    assert model.load_report is not None
    assert model.load_report.adapters[0].base_check == "different"
    assert any("not the one it was trained on" in text for text in model.load_report.warnings)
    with pytest.raises(BaseMismatchError, match="strict_base=False"):
        veneer.load(adapter, base=tmp_path / "other", strict_base=True)


def test_a_changed_base_no_longer_vouches_for_its_files(adapter: Path) -> None:
    merged = veneer.load(adapter).merge_and_unload()
    again = veneer.get_peft_model(merged, config())
    assert again.base_digest is None


def test_an_unknown_task(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown task 'CHAT'.*CAUSAL_LM"):
        veneer.load(base, task="CHAT")


# -- what does not fit -------------------------------------------------------------------------------------


def test_a_base_of_other_shapes(adapter: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {**build("llama").config.to_dict(), "hidden_size": 64, "head_dim": 16}
    wide = LlamaForCausalLM(LlamaConfig(**values))
    with pytest.raises(BindError, match=r"does not fit LlamaForCausalLM.*is \(4, 32\).*want \(4, 64\)") as error:
        veneer.PeftModel.from_pretrained(wide, adapter)
    assert "It names" in str(error.value.hint)
    assert len(error.value.problems) > 4
    assert not any("lora" in name for name in wide.state_dict())


def test_a_base_of_other_names(adapter: Path) -> None:
    with pytest.raises(BindError, match=r"0 of \d+ tensors bind.*the model has no model\.layers\.0"):
        veneer.PeftModel.from_pretrained(build("opt"), adapter)


def test_a_base_of_the_same_shapes_and_other_names(adapter: Path) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")

    with pytest.raises(BindError, match=r"0 of \d+ tensors bind.*nearest: inner\.model\.layers\.0\.self_attn\.q_proj"):
        veneer.PeftModel.from_pretrained(Renamed(), adapter)


def test_a_base_with_more_layers(adapter: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    deep = LlamaForCausalLM(LlamaConfig(**{**build("llama").config.to_dict(), "num_hidden_layers": 3}))
    with pytest.raises(BindError, match=r"layers\.2.*targets it, and the checkpoint holds nothing for it"):
        veneer.PeftModel.from_pretrained(deep, adapter)


def test_keys_that_bind_nowhere_name_the_nearest(adapter: Path) -> None:
    def strip(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key.replace(".model.model.", ".model."): value for key, value in tensors.items()}

    edit_tensors(adapter, strip)
    with pytest.raises(BindError, match=r"no layers\.0\.self_attn\.q_proj \(nearest: model\.layers\.0"):
        veneer.load(adapter)


def test_keys_in_no_dialect(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {"x." + key: value for key, value in tensors.items()})
    with pytest.raises(BindError, match="not in the PEFT dialect"):
        veneer.load(adapter)


def test_a_slot_that_is_not_filled(adapter: Path) -> None:
    def drop(tensors: dict[str, Any]) -> dict[str, Any]:
        gone = sorted(key for key in tensors if "lora_B" in key)[0]
        return {key: value for key, value in tensors.items() if key != gone}

    edit_tensors(adapter, drop)
    with pytest.raises(BindError, match=r"lora_B\.weight is missing from the checkpoint"):
        veneer.load(adapter)
    with pytest.warns(UserWarning, match="What fits is used"):
        model = veneer.load(adapter, strict=False)
    assert model.load_report is not None
    [found] = model.load_report.adapters
    assert found.tensors_bound == found.tensors_total - 1
    assert any("is missing" in note for note in found.notes)


def test_a_layer_that_is_missing_whole(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj" not in k})
    with pytest.raises(BindError, match="holds nothing for it"):
        veneer.load(adapter)


def test_layers_beyond_the_configs_targets_are_used_and_said(adapter: Path) -> None:
    expected = logits(veneer.load(adapter), inputs("llama"))
    edit_config(adapter, target_modules=["q_proj"])
    model = veneer.load(adapter)
    assert torch.equal(logits(model, inputs("llama")), expected)
    assert model.load_report is not None
    assert any("not among the config's targets" in text for text in model.load_report.warnings)


def test_a_rank_that_is_not_the_tensors(adapter: Path) -> None:
    edit_config(adapter, r=8)
    with pytest.raises(BindError, match=r"is \(4, 32\), and this layer and config want \(8, 32\)"):
        veneer.load(adapter)


def test_a_kind_of_layer_that_cannot_carry_it(adapter: Path) -> None:
    old, new = "layers.0.self_attn.q_proj", "layers.0.input_layernorm"
    edit_tensors(adapter, lambda tensors: {key.replace(old, new): value for key, value in tensors.items()})
    with pytest.raises(BindError, match=r"input_layernorm \(LlamaRMSNorm\) cannot carry an adapter; kinds that can"):
        veneer.load(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(adapter: Path, value: float) -> None:
    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        next(iter(tensors.values())).view(-1)[3] = value
        return tensors

    edit_tensors(adapter, spoil)
    with pytest.raises(NonFiniteError, match="NaN or infinite values in 1 of"):
        veneer.load(adapter)


def test_an_adapter_without_effect_is_said(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()})
    model = veneer.load(adapter)
    assert model.load_report is not None
    assert model.load_report.adapters[0].changed_layers == []
    assert any("zero-effect adapter" in text for text in model.load_report.warnings)


def test_an_adapter_without_values(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {})
    with pytest.raises(IncompleteCheckpointError, match=r"empty checkpoint.*ZeRO-3"):
        veneer.load(adapter)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"peft_type": "LORRA"}, UnknownMethodError, "'LORRA' is unknown.*Did you mean 'LORA'"),
        ({"peft_type": ...}, ConfigError, "no peft_type"),
        ({"use_rsloraa": True}, UnknownKeyError, "use_rsloraa=True is unknown.*Did you mean 'use_rslora'"),
        ({"brand_new_config": {"x": 1}}, UnknownKeyError, "may change the maths"),
        ({"megatron_config": {"a": 1}}, UnsupportedError, "megatron_config={'a': 1} is not available"),
        ({"use_dora": True}, BindError, "lora_magnitude_vector is missing"),
        ({"lora_bias": True}, BindError, "lora_B.bias is missing"),
        ({"init_lora_weights": "lora_ga"}, UnsupportedError, "belongs to a base that was changed"),
        ({"r": "eight"}, ConfigError, "r='eight' is not of the type int"),
    ],
)
def test_configs_that_cannot_be_honoured(adapter: Path, changes: Any, kind: type[Exception], words: str) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(kind, match=words):
        veneer.load(adapter)


def test_keys_that_change_nothing_are_kept(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, use_something_new=False, other_new=None, tags=["a"])
    veneer.load(adapter).save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (values["use_something_new"], values["other_new"], values["tags"]) == (False, None, ["a"])
    edit_config(adapter, author_note=3)
    with pytest.warns(UserWarning, match="author_note=3 stays in the config for other tools"):
        veneer.load(adapter)
    edit_config(adapter, author_note=..., use_something_new=True)
    with pytest.warns(UserWarning, match="may change the maths. It is ignored"):
        veneer.load(adapter, strict=False)


def test_a_name_that_is_taken(adapter: Path) -> None:
    model = veneer.load(adapter)
    with pytest.raises(DuplicateAdapterError, match=r"'default' on this model already.*Present: 'default'"):
        model.add_adapter("default", veneer.LoraConfig(target_modules=["q_proj"]))
    model.load_adapter(adapter, "twin")
    assert list(model.peft_config) == ["default", "twin"]


def test_nothing_is_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(PathNotFoundError, match="does not exist"):
        veneer.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match="neither a model"):
        veneer.load(tmp_path / "empty")


def test_weights_without_a_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(IncompleteCheckpointError, match="its scale is unknown"):
        veneer.load(adapter)


def test_pickles_are_not_read(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match="convert-pickle"):
        veneer.load(adapter)


@pytest.mark.parametrize(
    "load", [veneer.PeftModel.from_pretrained, lambda base, path, **how: veneer.load(path, base=base, **how)]
)
def test_an_adapter_is_opened_once_and_as_strictly_as_asked(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path)
    edit_config(folder, use_unknown=True)
    with pytest.raises(veneer.UnknownKeyError, match="use_unknown"):
        load(build("llama"), folder)
    with pytest.warns(UserWarning, match="use_unknown") as told:
        load(build("llama"), folder, strict=False)
    assert len([one for one in told if "use_unknown" in str(one.message)]) == 1
