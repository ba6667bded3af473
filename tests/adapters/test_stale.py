"""What inference keeps of an adapter is never used once it is out of date."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, config, enlarge
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.fused import CachedForward
from veneer.patches.selection import Selection

X: Any = inputs("llama")
CLOSE = 1e-5
SOON = 10.0


def frozen(**options: Any) -> veneer.PeftModel:
    """A model as it is loaded for inference."""
    model = adapted("llama", **options)
    model.set_requires_grad("default", False)
    return model


def ups(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_B" in name]


def without_ups(model: nn.Module) -> dict[str, Tensor]:
    return {name: value * 0 if "lora_B" in name else value for name, value in model.state_dict().items()}


def holders(model: nn.Module) -> list[Any]:
    return [module["default"] for name, module in model.named_modules() if name.endswith("lora_B")]


# -- the adapter's weights ---------------------------------------------------------------------------------------------


def data_set(model: nn.Module) -> None:
    for parameter in ups(model):
        parameter.data = torch.zeros_like(parameter)


def data_copied(model: nn.Module) -> None:
    for parameter in ups(model):
        parameter.data.copy_(torch.zeros_like(parameter))


def data_zeroed(model: nn.Module) -> None:
    for parameter in ups(model):
        parameter.data.zero_()


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in ups(model):
            parameter.zero_()


def through_numpy(model: nn.Module) -> None:
    for parameter in ups(model):
        parameter.detach().numpy()[:] = 0


def through_storage(model: nn.Module) -> None:
    for parameter in ups(model):
        parameter.untyped_storage().fill_(0)


def through_dlpack(model: nn.Module) -> None:
    for parameter in ups(model):
        torch.from_dlpack(parameter.detach()).zero_()


def loaded(model: nn.Module) -> None:
    model.load_state_dict(without_ups(model))


def assigned(model: nn.Module) -> None:
    model.load_state_dict(without_ups(model), assign=True)


def assigned_then_edited(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        model(**X)
    data_zeroed(model)


def another_parameter(model: nn.Module) -> None:
    for holder in holders(model):
        holder.weight = nn.Parameter(torch.zeros_like(holder.weight), requires_grad=False)


def state_edited(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if "lora_B" in name:
            tensor.zero_()


EDITS: list[Callable[[nn.Module], None]] = [
    data_set,
    data_copied,
    data_zeroed,
    in_place,
    through_numpy,
    through_storage,
    through_dlpack,
    loaded,
    assigned,
    assigned_then_edited,
    another_parameter,
    state_edited,
]
WAYS: dict[str, Callable[[veneer.PeftModel], Tensor]] = {
    "alone": lambda model: logits(model, X),
    "mixed": lambda model: logits(model, X, adapter_names=["default", "other"])[:1],
    "with gradients": lambda model: model(**X).logits.detach(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_an_edit_of_the_weights_is_seen_by_the_next_call(
    edit: Callable[[nn.Module], None], way: str, trained: bool
) -> None:
    model = adapted("llama") if trained else frozen()
    model.add_adapter("other", config("llama"))
    enlarge(model, "other", 3)
    ask = WAYS[way]
    with model.disable_adapter():
        base = logits(model, X)
    model.eval()
    before = ask(model)
    assert torch.equal(ask(model), before)
    edit(model)
    after = ask(model)
    assert gap(before, base[: len(before)]) > 0.02
    assert gap(after, base[: len(after)]) < CLOSE


@pytest.mark.parametrize("edit", [data_set, data_zeroed, through_numpy], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "half", "unpickled and moved"])
def test_copies_and_moved_models_see_them_too(edit: Callable[[nn.Module], None], copied: str) -> None:
    model = frozen()
    if copied == "deepcopy":
        model = copy.deepcopy(model)
    elif copied == "half":
        model = model.half().float()
    else:
        model = pickle.loads(pickle.dumps(model))
        model = model.double().float() if "moved" in copied else model
    with model.disable_adapter():
        base = logits(model, X)
    before = logits(model, X)
    edit(model)
    assert gap(before, base) > 0.02
    assert gap(logits(model, X), base) < CLOSE


def test_weights_that_are_exchanged_for_an_evaluation_and_back() -> None:
    model = adapted("llama")
    before = logits(model, X)
    own = [parameter.data for parameter in ups(model)]  # kept, and written to later
    kept = [tensor.clone() for tensor in own]
    for tensor in own:
        tensor.zero_()
    with model.disable_adapter():
        base = logits(model, X)
    assert gap(logits(model, X), base) < CLOSE
    for tensor, values in zip(own, kept, strict=True):
        tensor.copy_(values)
    assert gap(logits(model, X), before) < CLOSE


def test_memory_of_a_frozen_adapter_that_is_written_to_later_needs_a_word() -> None:
    model = frozen()
    own = [parameter.data for parameter in ups(model)]
    logits(model, X)
    for tensor in own:
        tensor.zero_()
    model.eval()
    with model.disable_adapter():
        base = logits(model, X)
    assert gap(logits(model, X), base) < CLOSE


def test_an_adapter_loaded_in_inference_mode() -> None:
    with torch.inference_mode():
        model = frozen()
        with model.disable_adapter():
            base = logits(model, X)
        before = logits(model, X)
        for parameter in ups(model):
            parameter.zero_()
        assert gap(before, base) > 0.02
        assert gap(logits(model, X), base) < CLOSE


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = frozen()
    graph = torch.compile(model, fullgraph=True, backend="eager")
    before = logits(graph, X)
    assert gap(before, logits(model, X)) < CLOSE
    data_zeroed(model)
    with model.disable_adapter():
        base = logits(model, X)
    assert gap(before, base) > 0.02
    assert gap(logits(graph, X), base) < CLOSE


def test_a_model_whose_parameters_are_given_for_one_call() -> None:
    model = frozen()
    given = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if "lora_B" in name}
    before = logits(model, X)  # after the tensors were reached for, so that nothing but the call tells
    found = torch.func.functional_call(model, given, (), X).logits
    with model.disable_adapter():
        assert gap(found, logits(model, X)) < CLOSE
    assert torch.equal(logits(model, X), before)


def test_a_replica_for_another_device_has_nothing_of_the_layer_that_it_was_made_from() -> None:
    model = frozen()
    logits(model, X)
    layer = next(iter(model.adapters.layers.values()))
    replica = layer._replicate_for_data_parallel()
    assert layer._inference_cache.forward is not None
    assert replica._inference_cache.forward is None


def test_tensors_that_layers_share_are_exchanged_in_all_of_them() -> None:
    made = veneer.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    model = veneer.get_peft_model(build("llama"), made, seed=0).eval()
    enlarge(model, "default")
    model.set_requires_grad("default", False)
    before = logits(model, X)
    other = {name: value * 2 if "vera_A" in name else value for name, value in model.state_dict().items()}
    assert any("vera_A" in name for name in other)
    model.load_state_dict(other, assign=True)
    assigned_all = logits(model, X)
    with torch.no_grad():
        for buffer in {id(t): t for n, t in model.named_buffers() if "vera_A" in n}.values():
            buffer.mul_(0.5)
    assert gap(assigned_all, before) > 0.02
    assert gap(logits(model, X), before) < CLOSE


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_what_arrow_works_out_follows_its_experts(trained: bool) -> None:
    model = adapted("llama")
    model.add_adapter("b", config("llama"))
    enlarge(model, "b", 7)
    for name in ("default", "b"):
        model.set_requires_grad(name, trained)
    arrow = {"task_adapter_names": ["default", "b"], "top_k": 1}
    model.add_adapter("arrow", config("llama", arrow_config=arrow))
    model.set_adapter("arrow")
    model.eval()
    before = logits(model, X)
    assert torch.equal(logits(model, X), before)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    edited = logits(model, X)
    assert gap(edited, before) > 0.02
    fresh = copy.deepcopy(model)
    assert gap(logits(fresh, X), edited) < CLOSE


# -- what trains is torch's own ----------------------------------------------------------------------------------------


def test_parameters_that_are_trained_are_of_the_class_that_optimizers_are_fastest_with() -> None:
    model = adapted("llama")
    own = model.adapters.parameters("default")
    assert {type(parameter) for parameter in own} == {nn.Parameter}
    model.set_requires_grad("default", False)
    assert all(type(parameter) is not nn.Parameter for parameter in own)
    model.set_requires_grad("default", True)
    assert {type(parameter) for parameter in own} == {nn.Parameter}


def test_nothing_is_made_again_within_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    fold = AdaptedLayer._fuse

    def counted(self: AdaptedLayer, selection: Selection) -> CachedForward:
        made.append(self)
        return fold(self, selection)

    monkeypatch.setattr(AdaptedLayer, "_fuse", counted)
    for model, calls in ((adapted("llama"), 2), (frozen(), 1)):
        made.clear()
        for _ in range(2):
            model.generate(**X, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert len(made) == calls * len(model.adapters.layers)


# -- a layer that is changed while its form for inference is made ------------------------------------------------------


def states() -> dict[str, tuple[Callable[[AdaptedLayer], Any], Callable[[AdaptedLayer], Any]]]:
    """What is done to a layer before, and while, a thread makes what inference keeps of it."""
    one = ("default",)

    def edit(layer: AdaptedLayer) -> None:
        with torch.no_grad():
            for share in layer.bound["default"]:
                for parameter in layer.tensors("default", share).values():
                    parameter.mul_(3)

    def edit_data(layer: AdaptedLayer) -> None:
        for share in layer.bound["default"]:
            for parameter in layer.tensors("default", share).values():
                parameter.data.mul_(3)

    def nothing(layer: AdaptedLayer) -> None:
        pass

    return {
        "merge": (nothing, lambda layer: layer.merge_adapters(one)),
        "unmerge": (lambda layer: layer.merge_adapters(("other",)), lambda layer: layer.unmerge()),
        "unbind": (nothing, lambda layer: layer.unbind("default")),
        "rename": (nothing, lambda layer: layer.rename("default", "new")),
        "move": (nothing, lambda layer: layer.double().float()),
        "edit": (nothing, edit),
        "edit data": (nothing, edit_data),
    }


@pytest.mark.parametrize("state", states())
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_what_was_begun_in_another_state_is_not_kept(state: str, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before, change = states()[state]
    model = frozen()
    model.add_adapter("other", config("llama"))
    enlarge(model, "other", 3)
    model.set_requires_grad("other", False)
    layer = model.eval().adapters.layers["model.layers.0.self_attn.q_proj"]
    selection = model.adapters.rows(["default", "other"]) if mixed else model.adapters.selection("default")
    x = torch.randn(2, 3, 32)
    before(layer)

    @torch.no_grad()
    def run() -> Tensor:
        with model.adapters.using(selection):
            return layer(x)

    ready, go = threading.Event(), threading.Event()
    form = AdaptedLayer._fused_patch

    def slow(self: AdaptedLayer, names: Sequence[str]) -> Any:
        found = form(self, tuple(names))
        if threading.current_thread().name == "reader":
            ready.set()
            assert go.wait(SOON)
        return found

    monkeypatch.setattr(AdaptedLayer, "_fused_patch", slow)
    layer.forget_cached()
    reader = threading.Thread(target=run, name="reader")
    reader.start()
    assert ready.wait(SOON)
    change(layer)
    go.set()
    reader.join()
    found = run()
    layer.forget_cached()
    assert gap(found, run()) < CLOSE
