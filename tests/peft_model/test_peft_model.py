"""One model object: choosing, mixing, merging, deleting, and the base as it was."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tests.models import CASES, build, gap, inputs, logits
from tests.random_adapters import adapted, bits, config, enlarge, same_bits, saved
from veneer.errors import (
    AdapterError,
    BaseModelError,
    BindError,
    DuplicateAdapterError,
    MergeError,
    TargetError,
    UnknownAdapterError,
    UnsupportedError,
)

VISIBLE = 1e-2


def pair(arch: str = "llama") -> veneer.PeftModel:
    """A model with two adapters of different rank and place, ``default`` active."""
    model = adapted(arch)
    model.add_adapter("second", config(arch, r=2, target_modules=list(CASES[arch].targets[1:]), lora_alpha=16))
    enlarge(model, "second", 2)
    return model.eval()


@pytest.mark.parametrize("arch", CASES)
def test_unloading_leaves_the_base_as_it_was(arch: str) -> None:
    base = build(arch)
    before, wanted = bits(base), {n: p.requires_grad for n, p in base.named_parameters()}
    plain = logits(base, inputs(arch))
    model = veneer.get_peft_model(base, config(arch), seed=1).eval()
    enlarge(model, "default")
    assert gap(logits(model, inputs(arch)), plain) > VISIBLE
    model.merge_adapter()
    restored = model.unload()
    assert restored is base
    assert same_bits(bits(restored), before)
    assert {n: p.requires_grad for n, p in restored.named_parameters()} == wanted
    assert torch.equal(logits(restored, inputs(arch)), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_is_exact(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    before, output = bits(model), logits(model, inputs("llama"))
    model.merge_adapter()
    assert not same_bits(bits(model), before)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)
    assert torch.equal(logits(model, inputs("llama")), output)


def test_any_selection_is_right_while_merged() -> None:
    model, batch = pair(), inputs("llama")
    expected = {}
    for names in (["default"], ["second"], ["default", "second"], []):
        with model.using(names):
            expected[tuple(names)] = logits(model, batch)
    mixed = logits(model, batch, adapter_names=["second", "__base__"])
    model.merge_adapter(["default"])
    for names, output in expected.items():
        with model.using(list(names)):
            assert gap(logits(model, batch), output) < 1e-5, names
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected[()])
    assert gap(logits(model, batch, adapter_names=["second", "__base__"]), mixed) < 1e-5
    model.merge_adapter(["second"])
    assert model.active_adapters == ["default", "second"]
    assert gap(logits(model, batch), expected["default", "second"]) < 1e-5


def test_merged_weights_follow_a_move() -> None:
    model, batch = adapted(), inputs("llama")
    with model.disable_adapter():
        base = logits(model, batch)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert gap(logits(model, batch), base) < 1e-6
    assert model.base_model.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float64


def test_several_active_adapters_add_up_and_merge_to_the_same() -> None:
    model, batch = pair(), inputs("llama")
    model.set_adapter(["default", "second"])
    together = logits(model, batch)
    model.set_adapter("second")
    assert gap(logits(model, batch), together) > VISIBLE
    model.set_adapter(["default", "second"])
    assert gap(logits(model.merge_and_unload(), batch), together) < 1e-5


def test_a_deleted_adapter_is_gone_and_the_rest_stays() -> None:
    model, batch = pair(), inputs("llama")
    with model.using("second"):
        second = logits(model, batch)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model, batch), second)
    assert not any("default" in name for name in model.state_dict())
    model.delete_adapter("second")
    assert model.active_adapters == []
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())


def test_the_first_that_remains_takes_the_place_of_a_deleted_one_that_alone_was_active() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"]), "a")
    for name in "bcd":
        model.add_adapter(name, veneer.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["b", "c"])
    model.delete_adapter("c")
    assert model.active_adapters == ["b"]
    model.delete_adapter("d")
    assert model.active_adapters == ["b"]
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"a"}


@pytest.mark.parametrize("names", [["default", "second"], ["second", "second"], ["default", "__base__"]])
def test_rows_are_the_base_while_adapters_are_disabled(names: list[str]) -> None:
    model, batch = pair(), inputs("llama")
    batch = {key: value.expand(2, *value.shape[1:]) for key, value in batch.items()}
    mixed = logits(model, {**batch, "adapter_names": names})
    with model.disable_adapter():
        base = logits(model, batch)
        assert torch.equal(logits(model, {**batch, "adapter_names": names}), base)
        with model.using("second"):
            assert torch.equal(logits(model, {**batch, "adapter_names": names}), mixed)
        with pytest.raises(veneer.UnknownAdapterError):
            model(**batch, adapter_names=["nobody", "second"])
    model.disable_adapters()
    assert torch.equal(logits(model, {**batch, "adapter_names": names}), base)
    model.enable_adapters()
    assert gap(logits(model, {**batch, "adapter_names": names}), base) > VISIBLE


def test_deleting_a_merged_adapter_takes_it_out_of_the_weights() -> None:
    model, batch = pair(), inputs("llama")
    model.set_adapter("second")
    second = logits(model, batch)
    model.merge_adapter(["default"])
    assert model.active_adapters == ["default"]
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert gap(logits(model, batch), second) < 1e-5


def test_renaming_keeps_what_is_active_and_merged() -> None:
    model, batch = pair(), inputs("llama")
    expected = logits(model, batch)
    model.rename_adapter("default", "first")
    assert (model.active_adapters, list(model.peft_config)) == (["first"], ["first", "second"])
    assert torch.equal(logits(model, batch), expected)
    assert any(".lora_A.first.weight" in name for name in model.state_dict())
    model.merge_adapter()
    model.rename_adapter("first", "again")
    assert gap(logits(model, batch), expected) < 1e-5
    with pytest.raises(DuplicateAdapterError):
        model.rename_adapter("again", "second")
    with pytest.raises(UnknownAdapterError, match="'first'"):
        model.rename_adapter("first", "other")


@pytest.mark.parametrize("name", ["keys", "forward", "weight", "lora_A", "training", "my adapter"])
def test_any_plain_name_works(name: str, tmp_path: Path) -> None:
    model, batch = adapted(), inputs("llama")
    expected = logits(model, batch)
    model.rename_adapter("default", name)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(again, batch), expected)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\\b", "__base__"])
def test_some_names_are_refused(name: str) -> None:
    with pytest.raises(DuplicateAdapterError, match="cannot be an adapter's name"):
        adapted().add_adapter(name, config())


def test_rows_of_a_batch_choose_for_themselves() -> None:
    model, batch = pair(), inputs("llama")
    rows = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in batch.items()}
    names = ["second", "__base__", "default", "second"]
    mixed = logits(model, rows, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in rows.items()}
        with model.disable_adapter() if name == "__base__" else model.using(name):
            assert gap(mixed[row], logits(model, one)[0]) < 1e-5


def test_rows_are_followed_through_beams() -> None:
    model, batch = pair(), inputs("llama")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    mixed = model.generate(**batch, adapter_names=["second", "default"], **options)
    for row, name in enumerate(["second", "default"]):
        with model.using(name):
            alone = model.generate(**{key: value[row : row + 1] for key, value in batch.items()}, **options)
        assert torch.equal(mixed[row], alone[0])


def test_a_batch_with_unknown_or_too_few_names_is_refused() -> None:
    model, batch = pair(), inputs("llama")
    with pytest.raises(UnknownAdapterError, match=r"'secnd'.*Did you mean 'second'"):
        model(**batch, adapter_names=["secnd", "default"])
    with pytest.raises(AdapterError, match="3 names, and the batch 2 rows"):
        model(**batch, adapter_names=["second", "default", "default"])
    with pytest.raises(AdapterError, match="0 names"):
        model(**batch, adapter_names=[])


def test_a_choice_inside_a_block_ends_with_it_even_by_an_error() -> None:
    model = pair()
    with model.using("second"):
        assert model.active_adapters == ["second"]
        with model.disable_adapter():
            assert model.active_adapters == []
        assert model.active_adapters == ["second"]
    with pytest.raises(RuntimeError, match="mine"), model.disable_adapter():
        raise RuntimeError("mine")
    assert model.active_adapters == ["default"]
    model.disable_adapters()
    assert model.active_adapters == []
    model.enable_adapters()
    assert model.active_adapters == ["default"]


def test_two_models_do_not_share_a_choice() -> None:
    one, other = pair(), pair()
    with one.using("second"), other.disable_adapter():
        assert (one.active_adapters, other.active_adapters) == (["second"], [])


def test_threads_do_not_see_each_others_choice() -> None:
    model, batch = pair(), inputs("llama")
    names = ["default", "second", "__base__"]
    expected = {}
    for name in names:
        with model.disable_adapter() if name == "__base__" else model.using(name):
            expected[name] = logits(model, batch)
    wrong: list[str] = []
    start = threading.Barrier(len(names) * 2)

    def ask(name: str) -> None:
        start.wait()
        for _ in range(20):
            with model.disable_adapter() if name == "__base__" else model.using(name):
                if not torch.equal(logits(model, batch), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_second_wrap_is_refused() -> None:
    model = adapted()
    with pytest.raises(BaseModelError, match=r"PeftModel already.*load_adapter"):
        veneer.get_peft_model(model, config())
    with pytest.raises(BaseModelError, match="already carries adapters"):
        veneer.get_peft_model(model.get_base_model(), config())
    again = veneer.get_peft_model(model.unload(), config())
    assert again.active_adapters == ["default"]


def test_loading_in_a_loop_does_not_stack(tmp_path: Path) -> None:
    base, batch = build("llama"), inputs("llama")
    first, second = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)
    outputs = []
    for folder in (first, second, first):
        model = veneer.PeftModel.from_pretrained(base, folder)
        outputs.append(logits(model, batch))
        assert model.unload() is base
    assert torch.equal(outputs[0], outputs[2])
    assert gap(outputs[0], outputs[1]) > VISIBLE


def test_it_stands_for_its_base() -> None:
    base: Any = build("llama")
    model: Any = veneer.get_peft_model(base, config())
    assert isinstance(model, veneer.PeftModelForCausalLM)
    assert isinstance(model, type(base))
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert (model.config, model.device, model.dtype) == (base.config, base.device, base.dtype)
    assert model.get_base_model() is base is model.base_model.model
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.can_generate()
    layer = base.model.layers[0].self_attn.q_proj
    assert (layer.in_features, layer.weight is layer.base_layer.weight) == (32, True)
    generation = copy.deepcopy(model.generation_config)
    model.generation_config = generation
    assert base.generation_config is generation
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("gpt2", veneer.PeftModelForCausalLM),
        ("bert", veneer.PeftModelForSequenceClassification),
        ("t5", veneer.PeftModelForSeq2SeqLM),
        ("vit", veneer.PeftModel),
    ],
)
def test_without_a_task_the_bases_class_chooses_that_of_the_model(arch: str, kind: type[veneer.PeftModel]) -> None:
    made = veneer.get_peft_model(build(arch), config(arch, task_type=None))
    assert type(made).__mro__[1] is kind


def test_a_class_of_somebody_elses_is_kept_and_takes_no_ones_place(tmp_path: Path) -> None:
    class Mine(veneer.PeftModelForCausalLM):
        task = veneer.TaskType.CAUSAL_LM

    assert not isinstance(adapted(), Mine)
    mine = Mine.from_pretrained(build("llama"), saved(tmp_path))
    assert not isinstance(mine, Mine)  # as in peft, the task chooses
    made = Mine(build("llama"), config())
    assert isinstance(made, Mine)
    assert isinstance(copy.deepcopy(made), Mine)


def test_parameters_are_named_as_people_expect() -> None:
    names = set(adapted("bert").state_dict())
    stem = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert {f"{stem}.base_layer.weight", f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight"} <= names
    assert "base_model.model.classifier.modules_to_save.default.weight" in names
    assert "base_model.model.classifier.original_module.weight" in names


def test_copies_and_pickles_are_models_of_their_own() -> None:
    model, batch = pair(), inputs("llama")
    expected = logits(model, batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    # Our own bytes, written three lines above.
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert type(other) is type(model)
        other.set_adapter("second")
        assert torch.equal(logits(model, batch), expected)
        assert gap(logits(other, batch), expected) > VISIBLE


def test_a_copy_has_a_report_of_its_own(tmp_path: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build("llama"), saved(tmp_path), adapter_name="first")
    other = copy.deepcopy(model)
    other.rename_adapter("first", "second")
    assert [(m.load_report.active, m.load_report.adapters[0].name) for m in (model, other) if m.load_report] == [
        (["first"], "first"),
        (["second"], "second"),
    ]


def test_a_plain_torch_module_can_be_a_base() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.second = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    net, x = Net(), torch.randn(3, 8)
    before = net(x).detach()
    model = veneer.get_peft_model(net, veneer.LoraConfig(target_modules=["first"], init_lora_weights=False), seed=1)
    enlarge(model, "default")
    assert gap(model(x).detach(), before) > VISIBLE
    assert torch.equal(model.unload()(x), before)


def test_the_head_of_a_classifier_belongs_to_the_adapter() -> None:
    model, batch = pair("bert"), inputs("bert")
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = logits(model, batch)
    mixed = logits(model, batch, adapter_names=["second", "default"])
    assert gap(mixed[0], outputs["second"][0]) < 1e-5
    assert gap(mixed[1], outputs["default"][1]) < 1e-5
    with pytest.raises(AdapterError, match=r"both bring classifier whole"):
        model.set_adapter(["default", "second"])
    model.set_adapter("second")
    merged = model.merge_and_unload()
    assert gap(logits(merged, batch), outputs["second"]) < 1e-5
    assert not any("modules_to_save" in name or "original_module" in name for name in merged.state_dict())


def test_one_adapters_head_is_not_anothers_target() -> None:
    model = adapted("bert")
    with pytest.raises(BindError, match="classifier is saved whole by one adapter"):
        model.add_adapter("other", veneer.LoraConfig(target_modules=["classifier"]))
    assert list(model.peft_config) == ["default"]


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = adapted()
    before = bits(model)
    with torch.no_grad():
        for parameter in model.adapters.parameters("default"):
            parameter.mul_(1e20)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="nothing was merged"):
            merge(safe_merge=True)
    lora = {name for name in before if "lora_" in name}
    assert same_bits(*({n: t for n, t in b.items() if n not in lora} for b in (bits(model), before)))


def test_a_merge_unties_embeddings_that_differ_afterwards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, tie_word_embeddings=True, **sizes)).eval()
    embeddings = base.get_input_embeddings().weight.clone()
    options = veneer.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = veneer.get_peft_model(base, options, seed=1).eval()
    enlarge(model, "default")
    expected = logits(model, inputs("llama"))
    merged: Any = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert gap(logits(again, inputs("llama")), expected) < 1e-5


def test_configs_that_mean_nothing_usable_are_refused() -> None:
    with pytest.raises(TargetError, match=r"not found in the base model.*Nearest: q_proj"):
        veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_prj"]))
    with pytest.raises(TargetError, match=r"cannot carry an adapter.*norm \(LlamaRMSNorm\)"):
        veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["norm"]))
    with pytest.raises(UnsupportedError, match="megatron_config="):
        veneer.get_peft_model(build("llama"), config(megatron_config={"params_dtype": "float32"}))
    with pytest.raises(BaseModelError, match="not the path"):
        veneer.PeftModel.from_pretrained("some/base", "some/adapter")  # type: ignore[arg-type]


def test_a_failed_start_leaves_the_base_alone() -> None:
    base = build("llama")
    before = bits(base)
    with pytest.raises(TargetError):
        veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["nothing"]))
    assert same_bits(bits(base), before)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r=0 is no rank"),
        ({"r": 2.5}, "r=2.5 is not of the type int"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 is no share"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is not of the type"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        (
            {"target_modules": ".*q", "layers_to_transform": [0]},
            "`layers_to_transform` cannot be used when `target_modules` is a str",
        ),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(veneer.ConfigError, match=words.replace("(", r"\(")):
        veneer.LoraConfig(**options)


def test_all_linear_is_spelt_out_in_the_config() -> None:
    model = adapted(target_modules="all-linear")
    found = model.peft_config["default"].target_modules  # type: ignore[attr-defined]
    assert found == {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}


def test_one_config_serves_several_models() -> None:
    shared = veneer.LoraConfig(target_modules="all-linear")
    for arch in ("llama", "gpt2"):
        assert veneer.get_peft_model(build(arch), shared).adapters.layers
    assert shared.target_modules == "all-linear"


def test_counts_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = veneer.get_peft_model(build("llama"), config())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.adapters.parameters("default")) > 0
    assert total == sum(p.numel() for p in build("llama").parameters()) + trainable
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params: {total:,} ||")


def test_uploading_saves_and_makes_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            done.append(token)

        def create_repo(self, repo: str, **options: Any) -> None:
            done.append((repo, options))

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
            done.append(sorted(p.name for p in Path(folder_path).iterdir()))
            return repo_id

        def hf_hub_download(self, *_: Any, **__: Any) -> str:
            raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert adapted().push_to_hub("me/mine", token="t", private=True) == "me/mine"
    assert done == [
        "t",
        ("me/mine", {"private": True, "exist_ok": True}),
        ["README.md", "adapter_config.json", "adapter_model.safetensors"],
    ]


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_is_dropped_takes_no_memory(merged: bool) -> None:
    made = veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"]), seed=0)
    kept = weakref.ref(made.adapters)
    layer = weakref.ref(made.get_base_model().model.layers[0].self_attn.q_proj)
    gc.collect()
    gc.disable()
    try:
        if merged:
            layer = weakref.ref(made.merge_and_unload().model.layers[0].self_attn.q_proj)
        del made
        assert kept() is None
        assert layer() is None
    finally:
        gc.enable()
