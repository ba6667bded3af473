"""What holds for every prompt method, on every kind of model. peft is the oracle."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.methods.case import cases
from tests.methods.prompt import PromptCase
from tests.models import CASES, TEXT, VOCAB, build, gap, inputs, logits
from tests.random_adapters import saved_base
from veneer.errors import AdapterError, BindError, ConfigError, MergeError, UnsupportedError

pytestmark = pytest.mark.oracle

WEIGHTS = "adapter_model.safetensors"
CLOSE = 1e-5
VISIBLE = 0.02
NEW = 6


@torch.no_grad()
def enlarged(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give everything that trains values of a visible size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def generated(model: Any, case: PromptCase, batch: dict[str, Tensor], **options: Any) -> Tensor:
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return quietly(model.generate, **ids, **fixed, **case.choice, **options)


@dataclass(frozen=True)
class Made:
    """What peft made of a case: the folder it saved, the base's logits, its own, and the tokens it generates."""

    case: PromptCase
    folder: Path
    base: Tensor
    output: Tensor
    tokens: Tensor | None

    def bare(self) -> Any:
        return build(self.case.arch)

    def load(self, **options: Any) -> veneer.PeftModel:
        return veneer.PeftModel.from_pretrained(self.bare(), self.folder, **options)

    def theirs(self, folder: Path | None = None) -> Any:
        return quietly(peft.PeftModel.from_pretrained, self.bare(), folder or self.folder).eval()

    def batch(self) -> dict[str, Tensor]:
        return inputs(self.case.arch)

    def read(self, model: Any, **more: Any) -> Tensor:
        return quietly(logits, model, {**self.batch(), **more}, **self.case.choice)

    def config(self, library: Any) -> Any:
        return getattr(library, self.case.config)(task_type=CASES[self.case.arch].task, **self.case.options)

    @property
    def generates(self) -> bool:
        return self.case.arch != "bert"


@pytest.fixture(scope="module", params=cases("prompt"), ids=lambda pair: f"{pair[0]}, {pair[1].arch} {pair[1].label}")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case: PromptCase = request.param[1]
    folder = tmp_path_factory.mktemp("made")
    config = getattr(peft, case.config)(task_type=CASES[case.arch].task, **case.options)
    torch.manual_seed(0)
    model = enlarged(quietly(peft.get_peft_model, build(case.arch), config))
    quietly(model.save_pretrained, folder)
    blank = Made(case, folder, logits(build(case.arch), inputs(case.arch)), torch.zeros(0), None)
    model = blank.theirs()
    tokens = generated(model, case, inputs(case.arch)) if blank.generates else None
    made = Made(case, folder, blank.base, blank.read(model), tokens)
    assert gap(made.output[:, -1], made.base[:, -1]) > VISIBLE
    return made


def test_the_output_is_as_in_peft(made: Made) -> None:
    assert gap(made.read(made.load()), made.output) < CLOSE


def test_generation_is_as_in_peft(made: Made) -> None:
    if made.tokens is None:
        pytest.skip("it does not generate")
    model = made.load()
    assert torch.equal(generated(model, made.case, made.batch()), made.tokens)
    assert torch.equal(generated(model, made.case, made.batch(), use_cache=False), made.tokens)


def test_beams_generate_as_in_peft(made: Made) -> None:
    if not made.generates:
        pytest.skip("it does not generate")
    if made.case.tasks is not None:
        pytest.skip("peft does not repeat the tasks for each beam")
    found = [generated(model, made.case, made.batch(), num_beams=2) for model in (made.load(), made.theirs())]
    assert torch.equal(*found)


def test_saving_what_was_loaded_changes_no_bit(made: Made, tmp_path: Path) -> None:
    made.load().save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(made.folder / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def test_peft_reads_what_is_made_here(made: Made, tmp_path: Path) -> None:
    model: Any = enlarged(veneer.get_peft_model(made.bare(), made.config(veneer), seed=5))
    expected = made.read(model)
    assert gap(expected[:, -1], made.base[:, -1]) > VISIBLE
    model.save_pretrained(tmp_path)
    shapes = [{k: (t.shape, t.dtype) for k, t in load_file(f / WEIGHTS).items()} for f in (tmp_path, made.folder)]
    assert shapes[0] == shapes[1]
    assert gap(made.read(veneer.PeftModel.from_pretrained(made.bare(), tmp_path)), expected) < CLOSE
    assert gap(made.read(made.theirs(tmp_path)), expected) < CLOSE


def _labelled(made: Made) -> dict[str, Tensor]:
    batch = dict(made.batch())
    generator = torch.Generator().manual_seed(4)
    if made.case.arch == "bert":
        return {**batch, "labels": torch.tensor([2, 0])}
    shape = batch.pop("decoder_input_ids", batch["input_ids"]).shape
    return {**batch, "labels": torch.randint(3, VOCAB, shape, generator=generator)}


def test_the_loss_is_as_in_peft(made: Made) -> None:
    if made.case.labels_differ:
        pytest.skip(made.case.labels_differ)
    batch = _labelled(made)
    with torch.no_grad():
        found = [float(quietly(m, **batch, **made.case.choice).loss) for m in (made.load(), made.theirs())]
    assert found[0] == pytest.approx(found[1], rel=CLOSE)


def test_gradients_reach_its_tensors_and_no_other(made: Made) -> None:
    model: Any = enlarged(veneer.get_peft_model(made.bare(), made.config(veneer), seed=5))
    model(**_labelled(made), **made.case.choice).loss.backward()
    wanted = {id(parameter) for parameter in model.adapters.parameters("default")}
    assert wanted
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns == (id(parameter) in wanted), name


@pytest.mark.parametrize("loaded", [False, True])
def test_a_few_steps_lower_the_loss(made: Made, loaded: bool) -> None:
    if loaded:
        model = made.load(is_trainable=True).train()
    else:
        model = veneer.get_peft_model(made.bare(), made.config(veneer), seed=5).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**_labelled(made), **made.case.choice).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]


def test_disabled_deleted_or_unloaded_it_is_the_base(made: Made) -> None:
    model = made.load()
    base = logits(made.bare().requires_grad_(False), made.batch())
    with model.disable_adapter():
        assert torch.equal(logits(model, made.batch()), base)
    assert gap(made.read(model), made.output) < CLOSE
    model.rename_adapter("default", "other")
    assert gap(made.read(model), made.output) < CLOSE
    assert gap(made.read(copy.deepcopy(model)), made.output) < CLOSE
    model.delete_adapter("other")
    assert torch.equal(logits(model, made.batch()), base)
    assert torch.equal(logits(made.load().unload(), made.batch()), base)


def test_padding_on_either_side_changes_nothing(made: Made) -> None:
    model, case = made.load(), made.case
    whole = made.batch()
    if case.tasks is not None:
        pytest.skip("one row alone has one task")
    short = {name: whole[name][1:, :4] for name in ("input_ids", "attention_mask")}
    rest = {name: tensor[1:] for name, tensor in whole.items() if name not in short}
    expected = logits(model, {**short, **rest})[0]
    # T5 counts the padding between prompt and text, and BERT reads its answer off the first place: both pad right.
    for left in (True, False) if case.arch in ("llama", "gpt2") else (False,):
        pad = [torch.zeros(1, 3, dtype=torch.long)]
        row = {n: torch.cat([*pad, t] if left else [t, *pad], dim=1) for n, t in short.items()}
        batch = {**whole, **{n: torch.cat([whole[n][:1], t]) for n, t in row.items()}}
        found = logits(model, batch)[1]
        # A decoder's logits: the last token's, which padding on the right leaves in its place.
        if case.arch in ("llama", "gpt2"):
            found, wanted = (found[-1] if left else found[-4]), expected[-1]
        else:
            wanted = expected
        assert gap(found, wanted) < CLOSE
        if left and made.generates:
            ids = {name: batch[name] for name in short}
            alone = generated(model, case, short)[0][-NEW:]
            assert torch.equal(generated(model, case, ids)[1][-NEW:], alone)


def test_rows_of_a_batch_are_as_one_by_one(made: Made, tmp_path: Path) -> None:
    options = {**made.case.options}
    if "num_virtual_tokens" in options:
        options["num_virtual_tokens"] = 2
    config = getattr(veneer, made.case.config)(task_type=CASES[made.case.arch].task, **options)
    enlarged(veneer.get_peft_model(made.bare(), config, seed=7), seed=8).save_pretrained(tmp_path)
    model = made.load()
    model.load_adapter(tmp_path, adapter_name="other")
    alone = {"default": made.read(model), "__base__": made.base}
    with model.using("other"):
        alone["other"] = made.read(model)
    for rows in (["default", "__base__"], ["other", "default"], ["__base__", "other"]):
        if made.case.arch == "bert" and not made.case.fills_cache:
            with pytest.raises(AdapterError, match="different lengths"):
                logits(model, made.batch(), adapter_names=rows, **made.case.choice)
            continue
        mixed = quietly(logits, model, made.batch(), adapter_names=rows, **made.case.choice)
        for index, name in enumerate(rows):
            own = alone[name][index]
            assert gap(mixed[index][..., -own.shape[0] :, :] if own.ndim > 1 else mixed[index], own) < CLOSE
        if made.generates:
            tokens = generated(model, made.case, made.batch(), adapter_names=rows)
            for index, name in enumerate(rows):
                one = generated(model, made.case, made.batch(), adapter_names=[name] * 2)
                assert torch.equal(tokens[index], one[index])


def test_with_lora_it_is_used_and_never_merged(made: Made) -> None:
    model = made.load()
    lora = {"r": 4, "target_modules": list(CASES[made.case.arch].targets), "init_lora_weights": False}
    model.add_adapter("lora", veneer.LoraConfig(**lora, **CASES[made.case.arch].options), seed=1)
    model.set_adapter(["default", "lora"])
    both = made.read(model)
    assert gap(both, made.output) > VISIBLE / 10
    with pytest.raises(MergeError, match="is a prompt"):
        model.merge_adapter()
    model.merge_adapter(["lora"])
    model.set_adapter(["default", "lora"])
    assert gap(made.read(model), both) < 1e-4
    with pytest.raises(MergeError, match="is a prompt"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="is a prompt"):
        model.add_weighted_adapter(["default", "lora"], [1.0, 1.0], "both")


def test_two_prompts_are_not_active_together(made: Made, tmp_path: Path) -> None:
    model = made.load()
    model.load_adapter(made.folder, adapter_name="other")
    with pytest.raises(AdapterError, match="prompts"):
        model.set_adapter(["default", "other"])


def test_a_wrong_shape_and_a_missing_tensor_are_named(made: Made, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((made.folder / "adapter_config.json").read_bytes())
    tensors = load_file(made.folder / WEIGHTS)
    save_file({**tensors, "prompt_embeddings": torch.zeros(3, 1, 2)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BindError, match=r"\(3, 1, 2\)"):
        veneer.PeftModel.from_pretrained(made.bare(), tmp_path)
    del tensors["prompt_embeddings"]
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BindError, match="missing"):
        veneer.PeftModel.from_pretrained(made.bare(), tmp_path)


def test_in_bfloat16(made: Made) -> None:
    model = veneer.PeftModel.from_pretrained(made.bare().bfloat16(), made.folder)
    assert gap(made.read(model), made.output) < 0.2


def test_on_disk_it_is_seen_and_not_merged(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    config = veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = veneer.get_peft_model(build("llama"), config, seed=1)
    model.save_pretrained(tmp_path / "prompt")
    found = veneer.inspect(tmp_path / "prompt").adapter
    assert found is not None
    assert found.virtual_tokens == 4
    with pytest.raises(MergeError, match="is a prompt"):
        veneer.merge(tmp_path / "prompt", base, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_call_that_a_prompt_cannot_serve_is_refused() -> None:
    tokens = inputs("llama")
    model: Any = veneer.get_peft_model(
        build("llama"), veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), seed=1
    )
    with pytest.raises(UnsupportedError, match="4 dimensions"):
        model(input_ids=tokens["input_ids"], attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))
    quietly(model.gradient_checkpointing_enable)
    with pytest.raises(AdapterError, match="checkpointing"):
        model.train()(**tokens)
    base: Any = build("llama")
    quietly(base.gradient_checkpointing_enable)
    with pytest.raises(AdapterError, match="does not work with gradient checkpointing"):
        veneer.get_peft_model(base, veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    multi = veneer.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2)
    model = veneer.get_peft_model(build("llama"), multi, seed=1)
    with pytest.raises(AdapterError, match="nothing of tasks"):
        model(**tokens)
    with pytest.raises(AdapterError, match="not there"):
        model(**tokens, task_ids=torch.tensor([0, 2]))
    with pytest.raises(AdapterError, match="2 rows"):
        model(**tokens, task_ids=torch.tensor([0, 1, 0]))
    with pytest.raises(UnsupportedError, match="transformers"):
        veneer.get_peft_model(nn.Linear(2, 2), veneer.PromptTuningConfig(num_virtual_tokens=4))
    with pytest.raises(BindError, match="token_dim"):
        veneer.get_peft_model(build("llama"), veneer.PromptTuningConfig(num_virtual_tokens=4, token_dim=64))


def test_prompts_of_two_kinds_do_not_share_a_batch() -> None:
    sizes = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    model: Any = veneer.get_peft_model(build("llama"), veneer.PrefixTuningConfig(**sizes), seed=1)
    model.add_adapter("other", veneer.PromptTuningConfig(**sizes), seed=2)
    with pytest.raises(AdapterError, match="fills the cache"):
        model(**inputs("llama"), adapter_names=["default", "other"])


def test_a_loss_of_its_own_is_that_of_its_call_alone() -> None:
    config = veneer.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_tokens_type_mask=[2, 4])
    model: Any = veneer.get_peft_model(build("llama"), config, seed=1)
    batch = inputs("llama")
    model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch, labels=batch["input_ids"])
    model.get_base_model().lm_head._forward_pre_hooks.clear()
    assert model(**batch).loss is None


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("PromptTuningConfig", {"num_virtual_tokens": 2, "prompt_tuning_init": "MORE"}, "prompt_tuning_init"),
        (
            "PromptTuningConfig",
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"},
            "tokenizer_name_or_path can't be None",
        ),
        ("PromptEncoderConfig", {"num_virtual_tokens": 2, "encoder_reparameterization_type": "CNN"}, "CNN"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 2, "init_weights": "one"}, "init_weights"),
        ("CartridgeConfig", {"num_virtual_tokens": 2, "num_frozen_tokens": 3}, "num_frozen_tokens"),
        ("CPTConfig", {"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        ("CPTConfig", {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]}, "length"),
        (
            "MultitaskPromptTuningConfig",
            {"num_virtual_tokens": 2, "prompt_tuning_init": "EXACT_SOURCE_TASK"},
            "no source",
        ),
    ],
)
def test_a_config_that_means_nothing_is_refused(config: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        getattr(veneer, config)(**options)


def test_a_prompt_without_a_length_is_refused_on_a_model() -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens is missing"):
        veneer.get_peft_model(build("llama"), veneer.PromptTuningConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize(("init", "expected"), [("AVERAGE_SOURCE_TASKS", 0.5), ("EXACT_SOURCE_TASK", 1.0)])
def test_a_task_begins_from_those_of_a_source(init: str, expected: float, tmp_path: Path) -> None:
    sizes = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "num_ranks": 1}
    source = veneer.get_peft_model(build("llama"), veneer.MultitaskPromptTuningConfig(num_tasks=2, **sizes), seed=1)
    with torch.no_grad():
        for parameter in source.adapters.parameters("default"):
            parameter.copy_(torch.arange(len(parameter)).view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter))
    source.save_pretrained(tmp_path)
    config = veneer.MultitaskPromptTuningConfig(
        prompt_tuning_init=init,
        prompt_tuning_init_state_dict_path=str(tmp_path / WEIGHTS),
        prompt_tuning_init_task=1,
        **sizes,
    )
    found = veneer.get_peft_model(build("llama"), config).get_adapter_state_dict()
    assert torch.equal(found["prefix_task_cols"], torch.full((1, 2, 1), expected))
    assert torch.equal(found["prompt_embeddings"], torch.tensor([[0.0], [1.0]]).expand(2, 32))


def test_examples_without_labels_leave_those_of_the_input() -> None:
    # peft counts the input's labels on from the last type, 1 here, and then finds none: its loss is NaN.
    config = veneer.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4])
    model: Any = veneer.get_peft_model(build("llama"), config, seed=1).eval()
    batch = inputs("llama")
    output = model(**batch, labels=batch["input_ids"])
    expected = nn.functional.cross_entropy(output.logits[:, 1:-1].flatten(0, 1), batch["input_ids"].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=CLOSE)


def test_tasks_in_an_encoder_decoder_lengthen_the_encoder_alone(tmp_path: Path) -> None:
    # peft's forward pass prompts the decoder too and its generate does not; here both are as its generate.
    case = PromptCase("t5", "MultitaskPromptTuningConfig", tasks=(1, 0))
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_tasks=2)
    torch.manual_seed(0)
    theirs = enlarged(quietly(peft.get_peft_model, build("t5"), config))
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    model = veneer.PeftModel.from_pretrained(build("t5"), tmp_path)
    tokens = generated(model, case, inputs("t5"))
    assert torch.equal(tokens, generated(theirs, case, inputs("t5")))
    ids = {name: inputs("t5")[name] for name in ("input_ids", "attention_mask")}
    again = logits(model, {**ids, "decoder_input_ids": tokens[:, :-1]}, **case.choice).argmax(-1)
    assert torch.equal(again, tokens[:, 1:])


def _gemma4(**sizes: Any) -> Any:
    """A Gemma 4, whose layers have keys of two widths; the last may use those of others."""
    kinds = ["sliding_attention", "full_attention"] * 2
    blocks = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    heads = {"head_dim": 8, "global_head_dim": 16, "num_key_value_heads": 2, "layer_types": kinds, "sliding_window": 64}
    extra = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = tf.Gemma4TextConfig(**{**TEXT, **blocks, **heads, **extra, "num_kv_shared_layers": 2, **sizes})
    return tf.Gemma4ForCausalLM(config).eval()


GEMMAS: dict[str, dict[str, Any]] = {
    "keys of others": {},
    "keys of its own": {"num_kv_shared_layers": 0},
    "other heads": {"num_kv_shared_layers": 0, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "more heads": {"num_kv_shared_layers": 0, "num_global_key_value_heads": 4, "attention_k_eq_v": True},
}


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "CartridgeConfig"])
@pytest.mark.parametrize("sizes", GEMMAS.values(), ids=GEMMAS)
def test_a_prefix_on_layers_of_different_sizes_is_as_in_peft(sizes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    theirs = enlarged(quietly(peft.get_peft_model, _gemma4(**sizes), getattr(peft, kind)(**options)))
    wanted = quietly(logits, theirs, inputs("llama"))
    quietly(theirs.save_pretrained, tmp_path)
    ours = quietly(veneer.PeftModel.from_pretrained, _gemma4(**sizes), tmp_path)
    assert gap(wanted, logits(_gemma4(**sizes), inputs("llama"))) > VISIBLE
    assert gap(quietly(logits, ours, inputs("llama")), wanted) < CLOSE
    assert (ours.peft_config["default"].token_dim, ours.peft_config["default"].num_layers) == (
        theirs.peft_config["default"].token_dim,
        theirs.peft_config["default"].num_layers,
    )
    made = [quietly(m.generate, **inputs("llama"), max_new_tokens=NEW, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*made)


def test_the_layers_that_a_prefix_skips_are_named() -> None:
    config = veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model: Any = veneer.get_peft_model(_gemma4(**GEMMAS["other heads"]), config)
    with pytest.warns(veneer.VeneerWarning, match=r"in the layers \[1, 3\], and skipped \[0, 2\]"):
        model(**inputs("llama"))
    # Layers that use the keys of others see the prefix there.
    shared: Any = veneer.get_peft_model(_gemma4(), config)
    shared(**inputs("llama"))
    shared.config.num_key_value_heads = 9
    with pytest.raises(AdapterError, match="skipped every layer"):
        shared(**inputs("llama"))


PROMPTS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {},
    "PromptEncoderConfig": {"encoder_hidden_size": 8},
    "MultitaskPromptTuningConfig": {"num_tasks": 2},
    "PrefixTuningConfig": {},
    "CartridgeConfig": {"num_frozen_tokens": 1},
}


@pytest.mark.parametrize(("kind", "options"), PROMPTS.items(), ids=PROMPTS)
def test_the_virtual_tokens_can_be_had_as_in_peft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **options}
    theirs = enlarged(quietly(peft.get_peft_model, build("llama"), getattr(peft, kind)(**options)))
    quietly(theirs.save_pretrained, tmp_path)
    ours: Any = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    tasks = torch.tensor([0, 1, 1]) if "num_tasks" in options else None
    made, wanted = (model.get_prompt(3, tasks) for model in (ours, theirs))
    if not isinstance(made, Tensor):
        made, wanted = (torch.cat([layer.keys for layer in cache.layers]) for cache in (made, wanted))
    assert gap(made.detach(), wanted.detach()) < CLOSE
    assert gap(*(model.get_prompt_embedding_to_save("default") for model in (ours, theirs))) < CLOSE
    with ours.disable_adapter(), pytest.raises(AdapterError, match="No prompt is active"):
        ours.get_prompt(3)
    ours.add_adapter("lora", veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="'lora' is no prompt"):
        ours.get_prompt_embedding_to_save("lora")


class _Plain(nn.Module):
    """A model that is none of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def test_a_model_that_is_none_of_transformers_carries_a_prefix_of_given_sizes(tmp_path: Path) -> None:
    sizes = {"num_virtual_tokens": 5, "num_layers": 2, "token_dim": 10, "num_attention_heads": 2}
    model: Any = veneer.get_peft_model(_Plain(), veneer.PrefixTuningConfig(**sizes))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].shape == (5, 40)
    again: Any = veneer.PeftModel.from_pretrained(_Plain(), tmp_path)
    assert torch.equal(*(m.prompt_encoder["default"].embedding.weight for m in (model, again)))
    with pytest.raises(UnsupportedError, match="takes no past_key_values"):
        again(torch.zeros(1, 3))
    with again.disable_adapter():
        assert again(torch.zeros(1, 3)).shape == (1, 3)
    with pytest.raises(UnsupportedError, match="no transformers model"):
        veneer.get_peft_model(_Plain(), veneer.PrefixTuningConfig(num_virtual_tokens=5))


def test_names_of_before_are_found_by_what_a_model_itself_says_of_them(tmp_path: Path) -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _Plain()
            self._checkpoint_conversion_mapping = {r"^(?!inner)": "inner."}

    config = veneer.LoraConfig(target_modules=["linear"], init_lora_weights=False)
    old = veneer.get_peft_model(_Plain(), config, seed=1)
    old.save_pretrained(tmp_path)
    new: Any = veneer.PeftModel.from_pretrained(Moved(), tmp_path)
    loaded = new.get_base_model().inner.linear.lora_A["default"].weight
    assert torch.equal(loaded, load_file(tmp_path / WEIGHTS)["base_model.model.linear.lora_A.weight"])


def test_a_cartridge_shows_its_whole_table() -> None:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_frozen_tokens": 1}
    model: Any = veneer.get_peft_model(build("llama"), veneer.CartridgeConfig(**options))
    table = model.prompt_encoder["default"]
    assert torch.equal(table.weight, torch.cat([table.frozen_embedding, table.trainable_embedding]))
