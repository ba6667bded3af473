"""Adapters on quantised bases: unmerged, merged either way, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import veneer
from tests.large.quantized import FORMS, library, quantized
from tests.models import WIDE_LLAMA, build, gap, inputs, logits
from tests.random_adapters import adapted, config, enlarge, saved, saved_base
from veneer.base_model.sites import packed_site
from veneer.errors import BindError, MergeError, TargetError, UnsupportedError

BATCH = inputs(WIDE_LLAMA)
# Each rounds its inputs too, so that its own product is not that of its weight.
INPUTS_ROUNDED = {"bitsandbytes 8 bits"}
REPACKING = "Packing the merged weights again lost"


@pytest.fixture(scope="module", autouse=True)
def portable_layout() -> Iterator[None]:
    """Layouts that depend on the processor want larger layers than these."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("bitsandbytes") is not None:
            patch.setattr(library("bitsandbytes.nn.modules"), "has_avx512bf16", lambda: False)
        yield


@pytest.fixture(params=FORMS, scope="module")
def form(request: pytest.FixtureRequest) -> str:
    quantized(request.param)  # skips where the library is missing
    return str(request.param)


def with_adapter(form: str, **options: Any) -> veneer.PeftModel:
    model = veneer.get_peft_model(quantized(form), config(**options), seed=1).eval()
    enlarge(model, "default")
    return model


def plain(form: str) -> nn.Module:
    """The same weights in an unpacked float32 model."""
    model = quantized(form)
    for name, module in list(model.named_modules()):
        site = packed_site(name, module)
        if site is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, site.plain(site.weight(), site.bias, torch.float32))
    return model


def test_unmerged_is_the_adapter_on_the_dequantised_base(form: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, WIDE_LLAMA)
    on_packed = logits(veneer.PeftModel.from_pretrained(quantized(form), folder), BATCH)
    on_plain = logits(veneer.PeftModel.from_pretrained(plain(form), folder), BATCH)
    assert gap(on_packed, logits(quantized(form), BATCH)) > 0.02
    assert gap(on_packed, on_plain) < (0.05 if form in INPUTS_ROUNDED else 1e-4)


def test_training_and_saving(form: str, tmp_path: Path) -> None:
    model = veneer.get_peft_model(quantized(form), config(), seed=1).train()
    before = {name: t.clone() for name, t in model.get_adapter_state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    after = model.get_adapter_state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    model.eval().save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(quantized(form), tmp_path)
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))


def test_a_merge_asks_where_to_put_the_sum(form: str) -> None:
    model = with_adapter(form)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r'into="dequantized".*into="requantized"'):
            merge()
    with pytest.raises(MergeError, match="Unknown into='smaller'"):
        model.merge_adapter(into="smaller")


def test_merged_and_dequantised(form: str) -> None:
    model = with_adapter(form)
    expected = logits(model, BATCH)
    merged = model.merge_and_unload(safe_merge=True, into="dequantized")
    assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert gap(logits(merged, BATCH), expected) < (0.05 if form in INPUTS_ROUNDED else 1e-4)
    figures = model.quantized_merge
    assert figures is not None
    assert figures.into == "dequantized"
    assert len(figures.layers) == 6
    assert figures.worst.weight < 1e-6
    assert figures.to_dict()["layers"]
    # The PeftModel goes on with the plain layers.
    model.add_adapter("next", config(), seed=2)
    model.merge_adapter()


def test_merged_and_packed_again(form: str) -> None:
    model = with_adapter(form)
    expected = logits(model, BATCH)
    kinds = {n: type(m) for n, m in quantized(form).named_modules()}
    merged = model.merge_and_unload(into="requantized")
    assert {n: type(m) for n, m in merged.named_modules()} == kinds
    figures = model.quantized_merge
    assert figures is not None
    # A change as large as this one survives packing; what it costs is said.
    assert 1e-4 < figures.worst.change < 0.5
    assert gap(logits(merged, BATCH), expected) < 0.8
    site = packed_site("q", merged.model.layers[0].self_attn.q_proj)
    assert site is not None
    was = packed_site("q", quantized(form).model.layers[0].self_attn.q_proj)  # type: ignore[union-attr]
    assert was is not None
    assert site.stored.dtype == was.stored.dtype


def test_a_small_change_that_packing_loses_is_told(form: str) -> None:
    model = with_adapter(form)
    with torch.no_grad():
        for parameter in model.adapters.parameters("default"):
            parameter.mul_(0.03)
    with pytest.warns(UserWarning, match=REPACKING):
        model.merge_and_unload(into="requantized")


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_merging_is_undone_exactly(form: str, into: str) -> None:
    model = with_adapter(form)
    model.add_adapter("other", config(), seed=5)
    enlarge(model, "other", 5)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, BATCH)
    with model.disable_adapter():
        base = logits(model, BATCH)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    held = layer.site.stored
    data = None if form.startswith("torchao") else held.data.clone()
    model.set_adapter("default")
    model.merge_adapter(into=into)
    assert layer.base_layer is not layer.site.module
    merged = logits(model, BATCH)
    # While merged, every other choice still gives its right result.
    with model.using("other"):
        assert torch.equal(logits(model, BATCH), alone["other"])
    with model.disable_adapter():
        assert torch.equal(logits(model, BATCH), base)
    assert gap(merged, alone["default"]) < 0.8
    model.unmerge_adapter()
    assert layer.site.stored is held
    assert data is None or torch.equal(held.data, data)
    assert torch.equal(logits(model, BATCH), alone["default"])
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model, BATCH), base)


def test_dora_takes_lengths_of_the_dequantised_weight(form: str) -> None:
    model = veneer.get_peft_model(quantized(form), config(use_dora=True), seed=1).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    site = layer.site
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    start = b @ a * layer.bound["default"][0].settings.scale
    lengths = layer.lora_magnitude_vector["default"].weight
    assert gap(lengths.detach(), (site.weight() + start).norm(dim=1).detach()) < 1e-5
    enlarge(model, "default")
    expected = logits(model, BATCH)
    merged = model.merge_and_unload(into="dequantized")
    assert gap(logits(merged, BATCH), expected) < (0.1 if form in INPUTS_ROUNDED else 1e-3)


METHODS = {
    "IA3Config": {"feedforward_modules": ["o_proj"]},
    "VeraConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4, "r": 0},
    "HRAConfig": {"r": 4},
    "LoHaConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 20},
    "LNTuningConfig": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_them(method: str, tmp_path: Path) -> None:
    chosen = getattr(veneer, method)(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", **METHODS[method])
    form = "bitsandbytes 4 bits"
    model = veneer.get_peft_model(quantized(form), chosen, seed=1).eval()
    enlarge(model, "default")
    expected = logits(model, BATCH)
    assert gap(expected, logits(quantized(form), BATCH)) > 0.02
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(quantized(form), tmp_path)
    assert torch.equal(logits(again, BATCH), expected)
    assert gap(logits(again.merge_and_unload(into="dequantized"), BATCH), expected) < 1e-4


def test_all_linear_means_the_packed_layers(form: str) -> None:
    model = veneer.get_peft_model(
        quantized(form), veneer.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert len(model.adapters.layers) == 14


def test_copies_and_mixed_batches(form: str) -> None:
    model = with_adapter(form)
    expected = logits(model, BATCH)
    assert torch.equal(logits(copy.deepcopy(model), BATCH), expected)
    mixed = logits(model, BATCH, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        base = logits(model, BATCH)
    close = 0.1 if form in INPUTS_ROUNDED else 1e-4
    assert gap(mixed[0], expected[0]) < close
    assert gap(mixed[1], base[1]) < close


def test_bitsandbytes_layout_for_bfloat16_processors() -> None:
    library("bitsandbytes")
    functional: Any = library("bitsandbytes.functional")
    layer = FORMS["bitsandbytes 4 bits"]()(nn.Linear(128, 64))
    site = packed_site("q", layer)
    assert site is not None
    before = site.weight()
    data, state = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = data, state
    # This layout keeps its scales in bfloat16.
    assert gap(site.weight(), before) < 0.01
    assert state.packing_format_for_cpu
    assert torch.equal(layer.weight.data, data)


def test_torchao_layouts_that_can_only_multiply() -> None:
    library("torchao")
    int4: Any = library("torchao.prototype.quantization.int4")
    layer = nn.Linear(64, 32).requires_grad_(False)
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(int4.Int4OpaqueTensor.from_hp(weight, [1, 32]), requires_grad=False)
    site = packed_site("layer", layer)
    assert site is not None
    x = torch.randn(3, 64)
    assert gap(x @ site.weight().T + layer.bias, layer(x)) < 1e-3
    assert 0 < gap(site.weight(), weight) < 0.1
    again = site.packed(site.weight(), site.bias)
    assert gap(again(x), layer(x)) < 0.02
    with pytest.raises(UnsupportedError, match="packed and cannot be replaced in place"):
        site.store(layer.weight, None)


class WQLinear_GEMM(nn.Module):
    """As AWQ's layer looks from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 32
        self.register_buffer("qweight", torch.zeros(32, 4, dtype=torch.int32))


WQLinear_GEMM.__module__ = "awq.modules.linear.gemm"


def test_a_packed_layer_of_an_unknown_form_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, WIDE_LLAMA)

    def base() -> nn.Module:
        model: Any = build(WIDE_LLAMA)
        for layer in model.model.layers:
            layer.self_attn.q_proj = WQLinear_GEMM()
        return model  # type: ignore[no-any-return]

    for targets in (["q_proj"], "all-linear"):
        with pytest.raises(TargetError, match=r"q_proj \(WQLinear_GEMM\): its weight is packed by AWQ.*dequantised"):
            veneer.get_peft_model(base(), veneer.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    with pytest.raises(
        BindError, match=r"q_proj \(WQLinear_GEMM\) cannot carry an adapter; its weight is packed by AWQ"
    ):
        veneer.PeftModel.from_pretrained(base(), folder)


def test_requantising_a_plain_base_is_refused() -> None:
    with pytest.raises(MergeError, match=r"no layer adapted by .* is quantised"):
        adapted().merge_and_unload(into="requantized")
    adapted().merge_and_unload(into="dequantized")


def on_the_fly(kind: str) -> dict[str, Any]:
    """What makes transformers quantise a base while it loads it."""
    library("bitsandbytes" if kind != "int8" else "torchao")
    if kind == "int8":
        own: Any = transformers.TorchAoConfig(library("torchao.quantization").Int8WeightOnlyConfig())
    else:
        how = {"load_in_8bit": True} if kind == "8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        own = transformers.BitsAndBytesConfig(**how)
    return {"quantization_config": own, "dtype": torch.float32, "device_map": "cpu"}


@pytest.mark.parametrize("kind", ["4", "8", "int8"])
def test_loaded_merged_and_saved_through_transformers(kind: str, tmp_path: Path) -> None:
    base, folder = saved_base(tmp_path / "base", WIDE_LLAMA), saved(tmp_path / "adapter", WIDE_LLAMA)
    options = on_the_fly(kind)
    model = veneer.load(folder, base=base, **options)
    expected = logits(model, BATCH)
    plain_model = veneer.load(folder, base=base, merge=True, into="dequantized", **options)
    plain_model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not hasattr(again.config, "quantization_config")
    assert gap(logits(again, BATCH), expected) < (0.05 if kind == "8" else 1e-4)
    packed = veneer.load(folder, base=base, **options).merge_and_unload(into="requantized")
    packed.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    assert hasattr(again.config, "quantization_config")
    assert gap(logits(again, BATCH), logits(packed, BATCH)) < 1e-5


@pytest.mark.parametrize("kind", ["4", "8"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_base_that_is_stored_quantised_is_saved_merged(kind: str, arch: str, tmp_path: Path) -> None:
    options, batch = on_the_fly(kind), inputs(arch)
    saved_base(tmp_path / "plain", arch)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "base")
    model = veneer.load(tmp_path / "base")
    model.add_adapter("default", config(target_modules=["q_proj" if arch == "llama" else "c_proj"]), seed=1)
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    with model.disable_adapter():
        without = logits(model, batch)
    for into in ("dequantized", "requantized"):
        merged = veneer.load(tmp_path / "adapter", base=tmp_path / "base").merge_and_unload(into=into).eval()
        merged.save_pretrained(tmp_path / into)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / into)
        assert hasattr(again.config, "quantization_config") == (into == "requantized")
        assert gap(logits(again, batch), logits(merged, batch)) < 1e-6
        assert gap(logits(again, batch), without) > 0.05


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_as_the_peer_has_it(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    if form == "torchao int4" or (form.startswith("HQQ") and options):
        pytest.skip("the peer has no such layer")
    folder = saved(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
        theirs = logits(peft.PeftModel.from_pretrained(quantized(form, "llama"), folder).eval(), BATCH)
    ours = logits(veneer.PeftModel.from_pretrained(quantized(form, "llama"), folder), BATCH)
    # The base's own product is the same; quantisation itself moves these outputs by a hundred times this and more.
    assert gap(ours, theirs) < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_learns_on_a_packed_base(form: str, reentrant: bool) -> None:
    base = quantized(form)
    before = logits(base, BATCH)
    options = {"use_reentrant": reentrant}
    base = veneer.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=options)
    assert gap(logits(base, BATCH), before) < 1e-5
    model = veneer.get_peft_model(base, config()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    parameters = model.adapters.parameters("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert any(p.grad.any() for p in parameters if p.grad is not None)


def test_packed_weights_are_not_cast(form: str) -> None:
    model = veneer.get_peft_model(quantized(form), config())
    weights = {name: p.dtype for name, p in model.named_parameters() if "_proj" in name and "lora" not in name}
    veneer.cast_mixed_precision_params(model, torch.bfloat16)
    now = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: now[name] for name in weights} == weights
    assert now["base_model.model.model.norm.weight"] == torch.bfloat16
