"""Merged weights that are kept beside the base's: the merged model's results, never out of date, in bounded memory."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import veneer
from tests.adapters.test_stale import EDITS
from tests.large.quantized import quantized
from tests.models import BUILT, WIDE_LLAMA, build, gap, inputs, logits
from tests.random_adapters import bits, config, enlarge, same_bits, saved, saved_base
from veneer.errors import AdapterError, MergeError, UnknownAdapterError, UnsupportedError, UsageError
from veneer.layers import merged_copy
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.watched_parameters import WatchedBase

X: Any = inputs("llama")
CLOSE = 1e-5
ROWS: Any = {key: value[:2] for key, value in X.items()}


def two(arch: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> veneer.PeftModel:
    """A model with the adapters "a" and "b", as it is loaded for inference; "a" is active."""
    model = veneer.get_peft_model(build(arch).to(dtype), config(arch, **options), "a", seed=1).eval()
    model.add_adapter("b", config(arch, target_modules=list(BUILT[arch].targets)[:2]), seed=2)
    for seed, name in enumerate("ab", 1):
        enlarge(model, name, seed)
        model.set_requires_grad(name, False)
    return model.eval()


def under(model: veneer.PeftModel, *names: str, batch: Any = X) -> Tensor:
    with model.using(list(names)):
        return logits(model, batch)


def merged(model: veneer.PeftModel, *names: str, batch: Any = X) -> Tensor:
    model.merge_adapter(list(names))
    found = logits(model, batch)
    model.unmerge_adapter()
    return found


def kept_layers(model: veneer.PeftModel, name: str = "a") -> int:
    report = model.merged_copies
    assert report is not None
    return len(next(one for one in report.adapters if one.names == (name,)).kept)


def base_weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", BUILT)
def test_a_selected_adapter_computes_as_the_merged_model(arch: str) -> None:
    model, batch = two(arch), inputs(arch)
    plain, before = bits(model), {name: under(model, name, batch=batch) for name in "ab"}
    with model.disable_adapter():
        base = logits(model, batch)
    report = model.keep_merged("a", memory="1GB")
    assert report is not None
    assert not report.warnings
    expected = merged(model, "a", batch=batch)
    model.set_adapter("a")
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(under(model, "a", batch=batch), expected)
    assert gap(expected, base) > 0.01
    # Any other call is as it was.
    assert torch.equal(under(model, "b", batch=batch), before["b"])
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert same_bits(bits(model), plain)
    model.drop_merged()
    assert model.merged_copies is None
    assert gap(logits(model, batch), before["a"]) < CLOSE


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bert"])
def test_rows_that_all_name_it_and_rows_that_differ(arch: str) -> None:
    model, batch = two(arch), inputs(arch)
    alone = {name: under(model, name, batch=batch) for name in "ab"}
    mixed = logits(model, batch, adapter_names=["a", "b"])
    model.keep_merged("a")
    expected = under(model, "a", batch=batch)
    assert torch.equal(logits(model, batch, adapter_names=["a", "a"]), expected)
    assert torch.equal(logits(model, batch, adapter_names=["a", "b"]), mixed)
    assert gap(logits(model, batch, adapter_names=["b", "b"]), alone["b"]) < CLOSE
    with model.disable_adapter():
        base = logits(model, batch)
    assert torch.equal(logits(model, batch, adapter_names=["__base__"] * 2), base)
    assert gap(logits(model, batch, adapter_names=["a", "__base__"])[1], base[1]) < CLOSE


def test_generating_and_packed_rows() -> None:
    model = two()
    model.keep_merged("a")
    expected = model.generate(**X, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**X, max_new_tokens=5, do_sample=False, adapter_names=["a", "a"]), expected)
    model.drop_merged()
    assert torch.equal(model.generate(**X, max_new_tokens=5, do_sample=False), expected)
    packed = {"input_ids": X["input_ids"][:1], "position_ids": torch.arange(7)[None]}
    before = logits(model, packed, adapter_names=[("a", 7)])
    model.keep_merged("a")
    assert gap(logits(model, packed, adapter_names=[("a", 7)]), before) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_bit_for_bit_those_of_a_merge(dtype: torch.dtype) -> None:
    model = two("qwen2", dtype, target_modules="all-linear", lora_bias=False)
    model.keep_merged("a")
    copies = {name: layer.merged_copies["a",] for name, layer in model.adapters.layers.items()}
    model.merge_adapter(["a"])
    for name, layer in model.adapters.layers.items():
        assert torch.equal(copies[name].weight, layer.site.stored)
        assert copies[name].weight.dtype is dtype
        assert layer.site.bias is None or torch.equal(copies[name].bias, layer.site.bias)


@pytest.mark.parametrize("trained", ["all", "lora_only"])
@pytest.mark.parametrize("arch", ["qwen2", "opt", "bert"])
def test_an_adapter_that_brings_biases(arch: str, trained: str) -> None:
    batch = inputs(arch)
    model = veneer.get_peft_model(build(arch), config(arch, bias=trained), "a", seed=1).eval()
    enlarge(model, "a")
    model.add_adapter("b", config(arch, bias="none"))
    model.set_requires_grad(["a", "b"], False)
    before = {name: under(model, name, batch=batch) for name in "ab"}
    with model.disable_adapter():
        base = logits(model, batch)
    report = model.keep_merged("a", "b")
    assert report is not None
    assert not any("memory" in warning for warning in report.warnings)
    held = {t.data_ptr(): t.nbytes for layer in model.adapters.adapted_layers for t in own_tensors(layer)}
    assert report.nbytes == sum(held.values()) <= (model.keep_merged("a", "b", memory=report.nbytes) or report).nbytes
    assert not (model.keep_merged("a", "b", memory=report.nbytes) or report).warnings
    for name in "ab":
        assert gap(under(model, name, batch=batch), before[name]) < CLOSE
    assert torch.equal(under(model, "a", batch=batch), merged(model, "a", batch=batch))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    mixed = logits(model, batch, adapter_names=["a", "b"])
    assert gap(mixed[0], before["a"][0]) < CLOSE
    assert gap(mixed[1], before["b"][1]) < CLOSE


def test_a_layer_runs_the_bases_own_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    model.keep_merged("a")
    logits(model, X)
    calls: list[tuple[Any, ...]] = []
    linear = torch.nn.functional.linear

    def noting(*args: Any) -> Tensor:
        calls.append(args)
        return linear(*args)

    layer = model.adapters.layers["model.layers.0.self_attn.q_proj"]
    monkeypatch.setattr("veneer.layers.merged_copy.F.linear", noting)
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        y = layer(x)
    assert len(calls) == 1
    assert calls[0][1] is layer.merged_copies["a",].weight
    assert torch.equal(y, linear(x, layer.merged_copies["a",].weight))


def test_several_that_are_selected_together() -> None:
    model = two()
    both = under(model, "a", "b")
    report = model.keep_merged("a", ["a", "b"], ["b", "a"])
    assert report is not None
    assert [one.names for one in report.adapters] == [("a",), ("a", "b"), ("b", "a")]
    # Where "b" adapts nothing, a set shares the copy of "a".
    first, second, third = report.adapters
    assert second.nbytes == third.nbytes == first.nbytes
    assert report.nbytes < first.nbytes + second.nbytes + third.nbytes
    assert torch.equal(under(model, "a", "b"), merged(model, "a", "b"))
    assert gap(under(model, "a", "b"), both) < CLOSE
    assert torch.equal(under(model, "a"), merged(model, "a"))
    model.keep_merged(["a", "b"])
    assert all(("a",) not in layer.merged_copies for layer in layers_of(model, "b"))


def layers_of(model: veneer.PeftModel, name: str) -> list[AdaptedLayer]:
    return [layer for layer in model.adapters.adapted_layers if name in layer.bound]


def test_gradients_to_the_input_and_training_of_another() -> None:
    model = two()
    x = model.get_input_embeddings()(X["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    expected, x.grad = x.grad, None
    model.keep_merged("a")
    model(inputs_embeds=x).logits.sum().backward()
    assert gap(x.grad, expected) < CLOSE
    model.set_requires_grad("b", True)
    model.set_adapter("b")
    model.train()
    model(**X, labels=X["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.adapters.parameters("b"))
    model.eval()
    model.set_adapter("a")
    assert torch.equal(logits(model, X), merged(model, "a"))
    assert kept_layers(model) == len(layers_of(model, "a"))


def test_hooks_on_the_base_layer_run() -> None:
    model = two("gpt2")
    model.keep_merged("a")
    expected = logits(model, inputs("gpt2"))
    layer = layers_of(model, "a")[0]
    seen: list[Tensor] = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(logits(model, inputs("gpt2")), expected)
    handle.remove()
    llama = two()
    llama.keep_merged("a")
    llama_layer = layers_of(llama, "a")[0]
    llama_layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    logits(llama, X)
    assert len(seen) == 2
    assert gap(logits(llama, X), merged(llama, "a")) < CLOSE


# -- never out of date -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_of_the_adapter_is_seen_by_the_next_call(edit: Callable[[nn.Module], None]) -> None:
    model = two()
    with model.disable_adapter():
        base = logits(model, X)
    model.keep_merged("a")
    assert gap(logits(model, X), base) > 0.02
    edit_default = model.rename_adapter
    edit_default("a", "default")
    logits(model, X)
    edit(model)
    assert gap(logits(model, X), base) < CLOSE
    assert kept_layers(model, "default") == 0
    report = model.merged_copies
    assert report is not None
    assert "have changed since" in report.warnings[0]
    assert model.keep_merged("default") is not None
    assert kept_layers(model, "default") == len(layers_of(model, "default"))
    assert gap(logits(model, X), base) < CLOSE


def of_base_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in base_weights(model):
            weight.mul_(2)


def of_base_by_data(model: nn.Module) -> None:
    for weight in base_weights(model):
        weight.data.mul_(2)


def of_base_data_set(model: nn.Module) -> None:
    for weight in base_weights(model):
        weight.data = weight.detach() * 2


def of_base_loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v * 2 if k.endswith("base_layer.weight") else v for k, v in model.state_dict().items()})


def of_base_assigned(model: nn.Module) -> None:
    state = {k: v * 2 if k.endswith("base_layer.weight") else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def of_base_replaced(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, AdaptedLayer):
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.detach() * 2, requires_grad=False)


def of_base_state(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if name.endswith("base_layer.weight"):
            tensor.mul_(2)


BASE_EDITS = [
    of_base_in_place,
    of_base_by_data,
    of_base_data_set,
    of_base_loaded,
    of_base_assigned,
    of_base_replaced,
    of_base_state,
]


@pytest.mark.parametrize("edit", BASE_EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_of_the_base_is_seen_by_the_next_call(edit: Callable[[nn.Module], None]) -> None:
    model, other = two(), two()
    before = logits(model, X)
    model.keep_merged("a", "b")
    logits(model, X)
    edit(model)
    edit(other)
    for name in "ab":
        assert gap(under(model, name), under(other, name)) < CLOSE
        assert kept_layers(model, name) == 0
    assert gap(logits(model, X), before) > 0.02
    model.keep_merged("a")
    assert torch.equal(logits(model, X), merged(other, "a"))


def test_only_the_changed_layer_is_dropped() -> None:
    model = two()
    model.keep_merged("a")
    layer = layers_of(model, "a")[1]
    with torch.no_grad():
        layer.lora_A["a"].weight.mul_(2)
    other = two()
    with torch.no_grad():
        layers_of(other, "a")[1].lora_A["a"].weight.mul_(2)
    assert gap(logits(model, X), logits(other, X)) < CLOSE
    report = model.merged_copies
    assert report is not None
    (adapter,) = report.adapters
    assert [*adapter.unmerged.values()] == [[layer.site.id]]
    assert len(adapter.kept) == len(adapter.layers) - 1


def test_what_changes_nothing_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    model.keep_merged("a")
    expected = logits(model, X)
    all_of_them = kept_layers(model)
    digests: list[Any] = []
    digest = merged_copy.digest
    monkeypatch.setattr(merged_copy, "digest", lambda tensors: digests.append(1) or digest(tensors))
    for name in ("b", "a", "b", "a"):
        under(model, name)
    assert not digests
    model.to("cpu").to(torch.float32)
    model.requires_grad_(False)
    model.train().eval()
    model.save_pretrained(tmp_path / "saved")
    model.get_base_model().save_pretrained(tmp_path / "base")
    copy.deepcopy(model)
    pickle.dumps(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.add_adapter("c", config("llama"))
    model.delete_adapter("c")
    model.get_model_status()
    assert torch.equal(under(model, "a"), expected)
    assert kept_layers(model) == all_of_them


def test_loading_a_state_of_the_same_values() -> None:
    model = two()
    model.keep_merged("a")
    state = {key: value.clone() for key, value in model.state_dict().items() if "lora" in key}
    model.load_state_dict(state, strict=False)
    # The adapter's tensors hold what they held.
    assert kept_layers(model) == len(layers_of(model, "a"))


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_a_cast_model(change: str) -> None:
    model = two()
    model.keep_merged("a")
    getattr(model, change)()
    assert kept_layers(model) == 0
    assert not any(layer.merged_copies for layer in model.adapters.adapted_layers)
    model.keep_merged("a")
    assert torch.equal(logits(model, X), merged(model, "a"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_the_model_have_none_and_are_right(how: str) -> None:
    model = two()
    model.keep_merged("a")
    expected = logits(model, X)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.merged_copies is None
    assert not any(isinstance(p, WatchedBase) for p in other.parameters() if type(p) is WatchedBase)
    assert gap(logits(other, X), expected) < CLOSE
    assert kept_layers(model) == len(layers_of(model, "a"))
    other.keep_merged("a")
    assert torch.equal(logits(other, X), expected)


# -- the other calls of the model --------------------------------------------------------------------------------------


def test_renamed_deleted_and_set_anew(tmp_path: Path) -> None:
    model = two()
    model.keep_merged("a", "b")
    expected = logits(model, X)
    model.rename_adapter("a", "new")
    assert kept_layers(model, "new") == len(layers_of(model, "new"))
    assert torch.equal(under(model, "new"), expected)
    model.delete_adapter("b")
    report = model.merged_copies
    assert report is not None
    assert [one.names for one in report.adapters] == [("new",)]
    assert not any("b" in names for layer in model.adapters.adapted_layers for names in layer.merged_copies)
    model.delete_adapter("new")
    assert model.merged_copies is None
    assert not any(type(p) is WatchedBase for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"r": 2}], ids=["alike", "other shapes"])
def test_another_adapter_of_the_same_name(options: dict[str, Any], tmp_path: Path) -> None:
    model = two()
    model.keep_merged("a")
    logits(model, X)
    model.load_adapter(saved(tmp_path, "llama", 7, **options), "a")
    alone = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert gap(under(model, "a"), logits(alone, X)) < CLOSE
    assert kept_layers(model) == 0
    model.keep_merged("a")
    assert torch.equal(under(model, "a"), merged(alone, "default"))


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapped(prepared: bool, tmp_path: Path) -> None:
    model = two()
    if prepared:
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
    model.keep_merged("a")
    logits(model, X)
    veneer.hotswap_adapter(model, saved(tmp_path, "llama", 7), "a")
    alone = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert gap(logits(model, X), logits(alone, X)) < CLOSE
    assert kept_layers(model) == 0


def test_scaled() -> None:
    model, other = two(), two()
    model.keep_merged("a")
    logits(model, X)
    for each in (model, other):
        for layer in layers_of(each, "a"):
            layer.set_scale("a", 2.0)
    assert gap(logits(model, X), logits(other, X)) < CLOSE
    assert kept_layers(model) == 0


def test_merging_beside_them() -> None:
    model = two()
    model.keep_merged("a")
    expected, b = logits(model, X), under(model, "b")
    model.merge_adapter(["b"])
    assert torch.equal(under(model, "a"), expected)
    assert gap(under(model, "b"), b) < CLOSE
    with model.disable_adapter():
        base = logits(model, X)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert gap(logits(model, X), base) < CLOSE
    assert torch.equal(under(model, "a"), expected)
    assert kept_layers(model) == len(layers_of(model, "a"))
    plain = model.merge_and_unload(adapter_names=["a"])
    assert torch.equal(plain(**X).logits, expected)
    assert not any(type(p) is WatchedBase for p in plain.parameters())


def test_unloading_leaves_the_base_as_it_was() -> None:
    model = two()
    model.keep_merged("a", "b")
    logits(model, X)
    base = model.unload()
    assert all(type(p) is nn.Parameter for p in base.parameters())
    assert same_bits(bits(base), bits(build("llama")))
    assert torch.equal(base(**X).logits, build("llama")(**X).logits)


def test_an_adapter_that_is_trained_on() -> None:
    model, other = two(), two()
    model.keep_merged("a")
    logits(model, X)
    for each in (model, other):
        each.set_requires_grad("a", True)
        each.train()
        each(**X, labels=X["input_ids"]).loss.backward()
        torch.optim.SGD(each.adapters.parameters("a"), lr=0.5).step()
        each.eval()
    assert gap(logits(model, X), logits(other, X)) < CLOSE
    for each in (model, other):
        for parameter in each.adapters.parameters("a"):
            parameter.data.mul_(0.5)
    assert gap(logits(model, X), logits(other, X)) < CLOSE
    assert kept_layers(model) == 0


def test_saved_and_counted_as_without_them(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path / "before")
    counted, keys, text = model.get_nb_trainable_parameters(), list(model.state_dict()), repr(model)
    model.keep_merged("a", "b")
    logits(model, X)
    model.save_pretrained(tmp_path / "after")
    assert (model.get_nb_trainable_parameters(), list(model.state_dict()), repr(model)) == (counted, keys, text)
    for file in (tmp_path / "before").rglob("*.safetensors"):
        assert (tmp_path / "after" / file.relative_to(tmp_path / "before")).read_bytes() == file.read_bytes()


def test_a_compiled_model_runs_unmerged() -> None:
    torch._dynamo.reset()
    model = two()
    expected = logits(model, X)
    model.keep_merged("a")
    graph = torch.compile(model, fullgraph=True, backend="eager")
    assert gap(logits(graph, X), expected) < CLOSE
    model.set_adapter("b")
    assert gap(logits(graph, X), under(model, "b")) < CLOSE
    with torch.no_grad():
        base_weights(model)[0].mul_(2)
    assert gap(logits(graph, X), logits(model, X)) < CLOSE
    torch._dynamo.reset()


def test_a_replica_for_another_device_has_none() -> None:
    model = two()
    model.keep_merged("a")
    layer = layers_of(model, "a")[0]
    replica = layer._replicate_for_data_parallel()
    assert not replica.merged_copies
    assert layer.merged_copies


# -- memory ------------------------------------------------------------------------------------------------------------


def weight_bytes(model: veneer.PeftModel, name: str) -> list[int]:
    return [layer.base_stored.nbytes for layer in layers_of(model, name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_weights(dtype: torch.dtype) -> None:
    model = two(dtype=dtype)
    report = model.keep_merged("a", "b")
    assert report is not None
    expected = [sum(weight_bytes(model, name)) for name in "ab"]
    assert [one.nbytes for one in report.adapters] == expected
    assert report.nbytes == sum(expected)
    assert report.memory is None


def test_what_fits_is_kept_and_the_rest_told() -> None:
    model = two()
    whole = {name: under(model, name) for name in "ab"}
    sizes = weight_bytes(model, "a")
    everything = sum(sizes) + sum(weight_bytes(model, "b"))
    for memory in (1, sizes[0], sizes[0] + sizes[1], sum(sizes) - 1, sum(sizes), everything - 1, everything):
        report = model.keep_merged("a", "b", memory=memory)
        assert report is not None
        assert report.memory == memory
        assert report.nbytes <= memory
        held = {t.data_ptr(): t.nbytes for layer in model.adapters.adapted_layers for t in own_tensors(layer)}
        assert sum(held.values()) == report.nbytes
        first, second = report.adapters
        if memory >= sum(sizes):
            assert first.kept == first.layers
        if memory == everything:
            assert second.kept == second.layers
            assert not report.warnings
        else:
            assert any("the memory is used up" in warning for warning in report.warnings)
        for name in "ab":
            assert gap(under(model, name), whole[name]) < CLOSE
    assert model.keep_merged("a", memory=sizes[0]) is not None
    assert kept_layers(model) == 1


def own_tensors(layer: AdaptedLayer) -> list[Tensor]:
    return [tensor for one in layer.merged_copies.values() for tensor in one.own_tensors]


def test_a_second_call_makes_only_what_is_missing() -> None:
    model = two()
    model.keep_merged("a")
    before = [layer.merged_copies["a",] for layer in layers_of(model, "a")]
    model.keep_merged("b", "a")
    assert all(layer.merged_copies["a",] is one for layer, one in zip(layers_of(model, "a"), before, strict=True))
    model.keep_merged("b")
    assert not any(("a",) in layer.merged_copies for layer in layers_of(model, "a"))
    assert model.keep_merged() is None
    assert not any(layer.merged_copies for layer in model.adapters.adapted_layers)
    assert all(type(p) is not WatchedBase for p in model.parameters())


DROPS: dict[str, Callable[[veneer.PeftModel], Any]] = {
    "drop_merged": lambda model: model.drop_merged(),
    "others": lambda model: model.keep_merged("b"),
    "deleted": lambda model: model.delete_adapter("a"),
    "unloaded": lambda model: model.unload(),
    "merged": lambda model: model.merge_and_unload(),
    "cast": lambda model: model.half(),
    "changed, then called": lambda model: (of_base_in_place(model), logits(model, X)),
    "changed, then reported": lambda model: (of_base_in_place(model), model.load_report, model.merged_copies),
}


@pytest.mark.parametrize("how", DROPS)
def test_the_memory_of_a_dropped_copy_is_free_at_once(how: str) -> None:
    model = two()
    model.keep_merged("a")
    for name in "aba":
        under(model, name)
    logits(model, X, adapter_names=["a", "a"])
    weights = [weakref.ref(layer.merged_copies["a",].weight) for layer in layers_of(model, "a")]
    assert all(weight() is not None for weight in weights)
    DROPS[how](model)
    assert all(weight() is None for weight in weights)


def test_tied_layers_that_are_changed_alike_share_a_copy() -> None:
    base = build("opt")
    assert base.lm_head.weight is base.model.decoder.embed_tokens.weight  # type: ignore[union-attr]
    ends = ["embed_tokens", "lm_head"]
    made = veneer.LoraConfig(r=4, target_modules=ends, ensure_weight_tying=True, init_lora_weights=False)
    model = veneer.get_peft_model(base, made, "a", seed=1).eval()
    enlarge(model, "a")
    model.set_requires_grad("a", False)
    before = logits(model, inputs("opt"))
    report = model.keep_merged("a")
    assert report is not None
    assert len(report.adapters[0].kept) == 2
    assert report.nbytes == base_weights(model)[0].nbytes
    assert gap(logits(model, inputs("opt")), before) < CLOSE
    assert kept_layers(model.to("cpu")) == 2  # type: ignore[arg-type]


def test_tied_layers_that_are_changed_apart_have_their_own() -> None:
    made = veneer.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    model = veneer.get_peft_model(build("opt"), made, "a", seed=1).eval()
    enlarge(model, "a")
    model.set_requires_grad("a", False)
    before = logits(model, inputs("opt"))
    size = base_weights(model)[0].nbytes
    for memory in (None, 2 * size, 2 * size - 1, size):
        report = model.keep_merged("a", memory=memory)
        assert report is not None
        assert report.nbytes == (size if memory is not None and memory < 2 * size else 2 * size)
    assert gap(logits(model, inputs("opt")), before) < CLOSE


@pytest.mark.parametrize("memory", ["2 gigs", "", 0, -1, True, float("nan"), 0.5, [1]])
def test_no_amount_of_memory(memory: Any) -> None:
    model = two()
    with pytest.raises(UsageError, match="amount of memory"):
        model.keep_merged("a", memory=memory)
    assert model.merged_copies is None


@pytest.mark.parametrize("memory", ["1MB", "1 MiB", 10**6, 1e6])
def test_amounts_of_memory(memory: Any) -> None:
    report = two().keep_merged("a", memory=memory)
    assert report is not None
    assert report.memory == (2**20 if memory == "1 MiB" else 10**6)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_reports(tmp_path: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build("llama"), saved(tmp_path, "llama"), "a")
    assert model.load_report is not None
    assert model.load_report.merged_copies is None
    size = layers_of(model, "a")[0].base_stored.nbytes
    report = model.keep_merged("a", memory=size)
    assert report is not None
    console = Console(width=200, record=True)
    console.print(report)
    console.print(model.load_report)
    text = console.export_text()
    assert text.count("1 of 6 layers, 4.1 kB") == 2
    assert "memory   4.1 kB of 4.1 kB" in text
    assert text.count("a: 5 of 6 layers run unmerged") == 2
    assert model.load_report.to_dict()["merged_copies"]["nbytes"] == size
    model.drop_merged()
    assert model.load_report.merged_copies is None


# -- what cannot be kept -----------------------------------------------------------------------------------------------


def test_names_that_cannot_be_kept() -> None:
    model = two()
    with pytest.raises(UnknownAdapterError, match="'c'"):
        model.keep_merged("a", "c")
    with pytest.raises(AdapterError, match="twice"):
        model.keep_merged(["a", "a"])
    model.set_requires_grad("b", True)
    with pytest.raises(AdapterError, match="is to be trained") as error:
        model.keep_merged("a", "b")
    assert "set_requires_grad('b', False)" in error.value.hint
    model.add_adapter("prompt", veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(MergeError, match="is a prompt"):
        model.keep_merged("prompt")
    assert model.merged_copies is None
    assert not any(layer.merged_copies for layer in model.adapters.adapted_layers)


def test_an_adapter_whose_change_depends_on_the_input() -> None:
    made = veneer.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    model = veneer.get_peft_model(build("llama"), made, "a").eval()
    model.set_requires_grad("a", False)
    with pytest.raises(MergeError, match="alora_invocation_tokens"):
        model.keep_merged("a")


def test_inside_a_call_that_uses_it() -> None:
    model = two()
    errors: list[AdapterError] = []

    def keep(*_: Any) -> None:
        try:
            model.keep_merged("a")
        except AdapterError as error:
            errors.append(error)

    layers_of(model, "a")[0].base_layer.register_forward_hook(keep)
    logits(model, X)
    assert "inside a call" in errors[0].message
    assert model.merged_copies is None


@pytest.mark.parametrize("form", ["HQQ 4 bits", "bitsandbytes 8 bits", "torchao int8"])
def test_quantised_layers_run_unmerged_and_are_told(form: str) -> None:
    made = config(WIDE_LLAMA, target_modules=["q_proj", "lm_head"])
    model = veneer.get_peft_model(quantized(form), made, "a").eval()
    model.set_requires_grad("a", False)
    before = logits(model, X)
    report = model.keep_merged("a")
    assert report is not None
    assert report.adapters[0].kept == ["lm_head"]
    assert "2 of 3 layers run unmerged" in report.warnings[0]
    assert "its weight is quantised" in report.warnings[0]
    assert gap(logits(model, X), before) < CLOSE
    model.add_adapter("b", config(WIDE_LLAMA, target_modules=["q_proj"]))
    model.set_requires_grad("b", False)
    with pytest.raises(UnsupportedError, match="its weight is quantised"):
        model.keep_merged("b")
    assert kept_layers(model) == 1


def test_an_offloaded_base_is_refused_by_name(tmp_path: Path) -> None:
    from tests.large.test_offload import DISK

    options = {"base": saved_base(tmp_path / "base"), "device_map": DISK["llama"], "offload_folder": tmp_path / "off"}
    made = saved(tmp_path / "adapter", target_modules=["q_proj"])
    model = veneer.load(made, **options)
    before = logits(model, X)
    report = model.keep_merged("default")
    assert report is not None
    assert len(report.adapters[0].kept) == 1
    assert "its weight is offloaded" in report.warnings[0]
    assert gap(logits(model, X), before) < CLOSE


def test_an_adapter_of_inference_mode() -> None:
    with torch.inference_mode():
        model = two()
    with pytest.raises(UnsupportedError, match="no plain parameter"):
        model.keep_merged("a")
    base = two()
    with torch.inference_mode():
        base.add_adapter("c", config("llama"))
    base.set_requires_grad("c", False)
    with pytest.raises(UnsupportedError, match="inference_mode"):
        base.keep_merged("c")


def test_a_merge_that_fails_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    last = layers_of(model, "a")[-1]
    merged_parameters = AdaptedLayer.merged_parameters

    def failing(layer: AdaptedLayer, names: tuple[str, ...]) -> Any:
        if layer is last:
            raise MemoryError
        return merged_parameters(layer, names)

    monkeypatch.setattr(AdaptedLayer, "merged_parameters", failing)
    with pytest.raises(MemoryError):
        model.keep_merged("a")
    assert kept_layers(model) == 0
    assert not any(type(p) is WatchedBase for p in model.parameters())


# -- threads -----------------------------------------------------------------------------------------------------------


def test_calls_read_their_choice_once_while_copies_come_and_go() -> None:
    model = two(dtype=torch.bfloat16)
    allowed = {name: [under(model, name)] for name in "ab"}
    model.keep_merged("a", "b")
    for name in "ab":
        allowed[name].append(under(model, name))
        assert not torch.equal(*allowed[name])
    stop = threading.Event()

    def ask(name: str) -> bool:
        while not stop.is_set():
            found = under(model, name)
            if not any(torch.equal(found, one) for one in allowed[name]):
                return False
        return True

    def change() -> None:
        for _ in range(10):
            model.drop_merged()
            model.keep_merged("b")
            model.keep_merged("a", "b")

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, name) for name in "abab"]
        changing = [pool.submit(change) for _ in range(2)]
        try:
            for one in changing:
                one.result(60)
        finally:
            stop.set()
        assert all(one.result(60) for one in asked)
    assert kept_layers(model, "a") == len(layers_of(model, "a"))


def test_calls_go_on_while_copies_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    begun, go_on = threading.Event(), threading.Event()
    merged_parameters = AdaptedLayer.merged_parameters

    def slow(layer: AdaptedLayer, names: tuple[str, ...]) -> Any:
        begun.set()
        assert go_on.wait(10)
        return merged_parameters(layer, names)

    monkeypatch.setattr(AdaptedLayer, "merged_parameters", slow)
    with ThreadPoolExecutor(1) as pool:
        keeping = pool.submit(model.keep_merged, "a")
        assert begun.wait(10)
        expected = under(model, "a")
        # What it was made of changes meanwhile: the copy is not taken.
        with torch.no_grad():
            layers_of(model, "a")[0].lora_B["a"].weight.zero_()
        go_on.set()
        keeping.result(10)
    assert gap(under(model, "a"), expected) > 1e-4
    assert kept_layers(model) == len(layers_of(model, "a")) - 1
