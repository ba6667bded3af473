"""Numbers at the edge, of configs, dtypes and zeros: each is right or refused by its name, never NaN or a traceback."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import veneer
from tests.methods.case import Case, cases
from tests.methods.networks import NETWORKS
from tests.models import TEXT, build, gap, inputs, logits
from tests.random_adapters import edit_config, edit_tensors, saved
from veneer.configs.base import config_class
from veneer.errors import BindError, ConfigError, UnsupportedError, VeneerError

FIRST: dict[str, Case] = {}
for _name, _case in cases():
    FIRST.setdefault(_name, _case)
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning", "cartridge")


def numbers(kind: Any) -> Iterator[tuple[str, Any]]:
    """Each field of a config that is a number or holds numbers, and a way to write one into it."""
    for name, declared in typing.get_type_hints(kind).items():
        text = str(declared)
        if name == "supported_values" or not any(number in text for number in ("int", "float")):
            continue
        if "dict[str, int" in text or "dict[str, float" in text:
            yield name, lambda number: {".*": number}
        elif "list" not in text and "dict" not in text and "Any" not in text:
            yield name, lambda number: number


def config_of(case: Case, **options: Any) -> Any:
    chosen = {**case.options, **options}
    if "r" in options:  # where a pattern says otherwise, it is not the value that counts
        chosen.pop("rank_pattern", None)
    return getattr(veneer, case.config)(**chosen)


def gradients(model: nn.Module, case: Case) -> list[Tensor]:
    output = NETWORKS[case.network].output(model.train())
    output.float().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


# -- configs -------------------------------------------------------------------------------------------------


OF_LAYERS = [(name, *field) for name, case in FIRST.items() for field in numbers(getattr(veneer, case.config))]
OF_PROMPTS = [(name, *field) for name in PROMPTS for field in numbers(config_class(name.upper(), "the test"))]


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")  # that an option is without effect here
@pytest.mark.parametrize(
    ("name", "field", "written"), OF_LAYERS, ids=[f"{name}-{field}" for name, field, _ in OF_LAYERS]
)
def test_a_number_of_a_config_is_usable_or_refused(name: str, field: str, written: Callable[[int], Any]) -> None:
    """A number that divides, shapes or is a share is checked where it is read, and not met in the middle of torch."""
    case = FIRST[name]
    for number in (0, -1):
        try:
            config = config_of(case, **{field: written(number)})
            model = veneer.get_peft_model(case.prepare(NETWORKS[case.network].make()), config, seed=1)
            assert bool(torch.isfinite(NETWORKS[case.network].read(model)).all()), number
            assert all(bool(torch.isfinite(grad).all()) for grad in gradients(model, case)), number
        except VeneerError:
            continue


@pytest.mark.parametrize(("name", "field", "written"), OF_PROMPTS, ids=[f"{n}-{field}" for n, field, _ in OF_PROMPTS])
def test_a_number_of_a_prompts_config_is_usable_or_refused(
    name: str, field: str, written: Callable[[int], Any]
) -> None:
    kind = config_class(name.upper(), "the test")
    for number in (0, -1):
        try:
            config = kind(**{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", field: written(number)})
            veneer.get_peft_model(build("llama"), config)
        except VeneerError:
            continue


WRONG: list[tuple[str, Mapping[str, Any]]] = [
    ("GraloraConfig", {"gralora_k": 0}),
    ("GraloraConfig", {"r": 0}),
    ("VeraConfig", {"r": 0}),
    ("RandLoraConfig", {"r": -1}),
    ("DeftConfig", {"r": 0}),
    ("TinyLoraConfig", {"u": 0}),
    ("UniLoraConfig", {"theta_d_length": 0}),
    ("VBLoRAConfig", {"vector_length": 0}),
    ("VBLoRAConfig", {"vblora_dropout": 1.5}),
    ("PsoftConfig", {"psoft_alpha": 0}),
    ("PsoftConfig", {"cayley_neumann_eps": 0.0, "use_cayley_neumann": True}),
    ("PromptEncoderConfig", {"num_virtual_tokens": 2, "encoder_hidden_size": -1}),
    ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 2, "num_tasks": 0}),
    ("LoraConfig", {"lora_alpha": 1e300}),
    ("LoraConfig", {"lora_alpha": 10**300, "use_rslora": True}),
    ("LoraConfig", {"alpha_pattern": {"q_proj": -1e39}}),
    ("FourierFTConfig", {"scaling": 1e39}),
    ("DeloraConfig", {"lambda_pattern": {"q_proj": 1e39}}),
    ("LoHaConfig", {"alpha": float("inf")}),
    ("LilyConfig", {"scaling": float("nan")}),
]


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")  # that an option is without effect here
@pytest.mark.parametrize(("kind", "options"), WRONG)
def test_a_number_that_cannot_be(kind: str, options: Mapping[str, Any]) -> None:
    wrong = next(name for name in options if name not in ("num_virtual_tokens", "use_rslora"))
    with pytest.raises(ConfigError, match=wrong):
        getattr(veneer, kind)(**options)


def test_a_scale_beyond_float32_is_refused_when_it_is_read(tmp_path: Path) -> None:
    edit_config(saved(tmp_path / "a"), lora_alpha=1e300)
    build("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"lora_alpha=1e\+300 is no number that float32 holds"):
        veneer.load(tmp_path / "a", base=build("llama"))
    with pytest.raises(ConfigError, match="lora_alpha"):
        veneer.merge(tmp_path / "a", tmp_path / "base", out=tmp_path / "out")


# -- zeros ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FIRST if name != "deft"])
def test_zeros_are_no_nan(name: str) -> None:
    """A vector of zeros has no direction: nothing divides by its length, forward, merged or backward."""
    case = FIRST[name]
    model = veneer.get_peft_model(case.prepare(NETWORKS[case.network].make()), config_of(case), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    output = NETWORKS[case.network].read(model.eval())
    assert bool(torch.isfinite(output).all())
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients(model, case))
    if case.merges:
        merged = NETWORKS[case.network].read(model.eval().merge_and_unload())
        assert torch.allclose(merged, output, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("gram_schmidt", [True, False])
def test_a_zero_vector_reflects_nothing(gram_schmidt: bool, whole: bool) -> None:
    """HRA with one such vector is HRA without it; with no other it is the base."""

    def made(r: int) -> veneer.PeftModel:
        config = veneer.HRAConfig(r=r, apply_GS=gram_schmidt, target_modules=["q_proj"], init_weights=False)
        return veneer.get_peft_model(build("llama"), config, seed=1).eval()

    with torch.no_grad():
        three, two = made(3), made(2)
        for one, other in zip(three.adapters.parameters("default"), two.adapters.parameters("default"), strict=True):
            other.copy_(one[:, [0, 2]])
            one[:, 1] = 0
            if whole:
                one.zero_()
    right = logits(build("llama") if whole else two, inputs("llama"))
    assert gap(logits(three, inputs("llama")), right) < 1e-5


def test_a_series_of_rotations_has_gradients_from_the_start() -> None:
    config = veneer.PsoftConfig(r=4, use_cayley_neumann=True, cayley_neumann_eps=0.9, target_modules=["q_proj"])
    model = veneer.get_peft_model(build("llama"), config)
    model(**inputs("llama")).logits.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert any(bool(grad.count_nonzero()) for grad in grads)


@pytest.mark.parametrize("layer", ["q_proj", "embed_tokens"])
def test_dora_on_rows_of_zeros(layer: str) -> None:
    """They stay zero whatever length they are to have."""
    base: Any = build("llama")
    with torch.no_grad():
        weight = base.model.layers[0].self_attn.q_proj.weight if layer == "q_proj" else base.model.embed_tokens.weight.T
        weight[:3] = 0
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, use_dora=True, target_modules=[layer]), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.fill_(7.0)
    output = model(**inputs("llama")).logits
    output.square().sum().backward()
    assert bool(torch.isfinite(output).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("ridge", [0.001, 0.0])
def test_frod_refuses_weights_that_leave_an_input_out(ridge: float) -> None:
    base: Any = build("llama")
    with torch.no_grad():
        for block in base.model.layers:
            block.self_attn.q_proj.weight[:, 0] = 0
    with pytest.raises(UnsupportedError, match="q_proj"):
        veneer.get_peft_model(base, veneer.FrodConfig(target_modules=["q_proj"], regularization_alpha=ridge))


# -- dtypes --------------------------------------------------------------------------------------------------

EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


def in_dtype(name: str, folder: Path, dtype: torch.dtype, **more: Any) -> Case:
    """Save a new adapter of a method with its weights in ``dtype``."""
    case = FIRST[name]
    model = case.prepare(NETWORKS[case.network].make())
    veneer.get_peft_model(model, config_of(case, **more), seed=1).save_pretrained(folder)
    edit_tensors(folder, lambda ts: {k: t.to(dtype) if t.is_floating_point() else t for k, t in ts.items()})
    return case


@pytest.mark.parametrize("name", FIRST)
def test_eight_bits_are_widened(name: str, tmp_path: Path) -> None:
    """What is stored in float8 answers as the same values in float32 do."""
    case = in_dtype(name, tmp_path, torch.float8_e4m3fn)
    network = NETWORKS[case.network]

    def read() -> Tensor:
        return network.read(veneer.PeftModel.from_pretrained(case.prepare(network.make()), tmp_path).eval())

    found = read()
    edit_tensors(tmp_path, lambda ts: {k: t.float() if t.is_floating_point() else t for k, t in ts.items()})
    assert torch.equal(found, read())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_eight_bits_of_a_whole_module_and_merged_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    saved(tmp_path / "a", modules_to_save=["lm_head"])
    edit_tensors(tmp_path / "a", lambda ts: {k: t.to(dtype) for k, t in ts.items()})
    right = logits(veneer.load(tmp_path / "a", base=build("llama")), inputs("llama"))
    veneer.merge(tmp_path / "a", tmp_path / "base", out=tmp_path / "out")
    assert gap(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), inputs("llama")), right) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("key", ["lora_A.weight", "lm_head.weight"])
def test_whole_numbers_are_no_weights(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, modules_to_save=["lm_head"])
    edit_tensors(tmp_path, lambda ts: {k: (t * 9).to(dtype) if k.endswith(key) else t for k, t in ts.items()})
    with pytest.raises(BindError, match="floating-point numbers belong there"):
        veneer.load(tmp_path, base=build("llama"))


@pytest.mark.parametrize(("name", "more"), [("shira", {}), ("unilora", {"save_indices": True})])
def test_weights_are_no_places(name: str, more: Mapping[str, Any], tmp_path: Path) -> None:
    case = in_dtype(name, tmp_path, torch.float32, **more)
    edit_tensors(tmp_path, lambda ts: {k: t.float() for k, t in ts.items()})
    with pytest.raises(BindError, match="whole numbers belong there"):
        veneer.PeftModel.from_pretrained(NETWORKS[case.network].make(), tmp_path)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_whole_module_of_several_dtypes_computes_in_the_widest(trainable: bool, tmp_path: Path) -> None:
    base = tf.BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )

    def bert() -> Any:
        torch.manual_seed(0)
        return tf.BertForSequenceClassification(base).eval()

    config = veneer.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    veneer.get_peft_model(bert(), config, seed=1).save_pretrained(tmp_path)
    batch = {"input_ids": inputs("llama")["input_ids"]}
    right = logits(veneer.load(tmp_path, base=bert()), batch)
    wide = "base_model.model.classifier.weight"
    edit_tensors(tmp_path, lambda ts: {k: t.double() if k == wide else t for k, t in ts.items()})
    model = veneer.PeftModel.from_pretrained(bert(), tmp_path, is_trainable=trainable).eval()
    found = logits(model, batch)
    assert found.dtype == torch.float32
    assert gap(found, right) < 1e-5
    if not trainable:
        model.save_pretrained(tmp_path / "again")
        dtypes = {k: t.dtype for k, t in model.get_adapter_state_dict().items() if "classifier" in k}
        assert dtypes == {wide: torch.float64, wide.replace("weight", "bias"): torch.float32}
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


class Mixed(nn.Module):
    """A norm in float32 over a layer in bfloat16, as some models are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x.float()).to(torch.bfloat16))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 8), Mixed()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


def test_a_module_whose_own_dtypes_differ_keeps_them() -> None:
    model = veneer.get_peft_model(Around(), veneer.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    own = {p.dtype for n, p in model.named_parameters() if "modules_to_save" in n}
    assert own == {torch.float32, torch.bfloat16}
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
        merged: Any = model.merge_and_unload()
        assert torch.equal(merged(x), before)
    assert (merged.head.norm.weight.dtype, merged.head.last.weight.dtype) == (torch.float32, torch.bfloat16)


# -- layers and prompts that were met in the middle of torch ---------------------------------------------------


def bart() -> Any:
    torch.manual_seed(0)
    layers = {f"{end}_{what}": n for end in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 40))}
    heads = {f"{end}_attention_heads": 4 for end in ("encoder", "decoder")}
    config = tf.BartConfig(**TEXT, d_model=32, **layers, **heads, max_position_embeddings=64, scale_embedding=True)
    return tf.BartForConditionalGeneration(config).eval()


def test_an_embedding_that_scales_by_a_plain_number() -> None:
    """BART and its kin keep a float where Gemma keeps a tensor."""
    config = veneer.LoraConfig(r=2, target_modules=["decoder.embed_tokens", "q_proj"], init_lora_weights=False)
    model = veneer.get_peft_model(bart(), config, seed=1).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    found = logits(model, batch)
    assert gap(found, logits(bart(), batch)) > 0.01
    assert gap(logits(model.merge_and_unload(), batch), found) < 1e-5


def gemma4() -> nn.Module:
    torch.manual_seed(0)
    config = tf.Gemma4TextConfig(
        **{**TEXT, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48},
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    )
    return tf.Gemma4ForCausalLM(config).eval()


def falcon() -> nn.Module:
    torch.manual_seed(0)
    config = tf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return tf.FalconForCausalLM(config).eval()


def deepseek() -> nn.Module:
    widths = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    own = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**TEXT, **own, **widths, first_k_dense_replace=1)).eval()


def lfm2() -> nn.Module:
    own = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**TEXT, **own, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    ).eval()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("make", [gemma4, falcon, deepseek, lfm2])
def test_a_prompt_of_embeddings_needs_their_width_alone(make: Any, kind: str) -> None:
    config = getattr(veneer, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = veneer.get_peft_model(make(), config)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert gap(logits(model, batch)[:, -3:], logits(make(), batch)) > 1e-4


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "CartridgeConfig"])
@pytest.mark.parametrize("make", [deepseek, lfm2])
def test_a_prefix_is_refused_where_keys_and_values_have_no_one_shape(make: Any, kind: str) -> None:
    config = getattr(veneer, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedError, match="can carry no prompt of keys and values"):
        veneer.get_peft_model(make(), config)


def test_a_prefix_for_one_head_of_keys() -> None:
    config = veneer.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = veneer.get_peft_model(falcon(), config)
    assert (config.num_attention_heads, config.token_dim) != (4, 32)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert gap(logits(model, batch), logits(falcon(), batch)) > 1e-4


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()


def swapped_in(folder: Path, r: int, seed: int) -> Path:
    config = veneer.LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)
    veneer.get_peft_model(grouped(), config, seed=seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("first", "second"), [(2, 6), (6, 2), (4, 8)])
def test_another_rank_on_a_convolution_in_groups(first: int, second: int, tmp_path: Path) -> None:
    """Each group has its part of the ranks, and so its part of the padding."""
    one, other = swapped_in(tmp_path / "a", first, 1), swapped_in(tmp_path / "b", second, 2)
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = veneer.PeftModel.from_pretrained(grouped(), one).eval()
        right = [veneer.PeftModel.from_pretrained(grouped(), path).eval()(x) for path in (one, other)]
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert gap(model(x), right[0]) < 1e-5
        veneer.hotswap_adapter(model, other)
        assert gap(model(x), right[1]) < 1e-5
    assert gap(*right) > 0.001


def test_a_target_rank_that_groups_do_not_divide(tmp_path: Path) -> None:
    model = veneer.PeftModel.from_pretrained(grouped(), swapped_in(tmp_path, 2, 1))
    with pytest.raises(UnsupportedError, match="2 groups, and target_rank=5"):
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=5)
