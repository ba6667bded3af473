"""What holds for every method, on every network that it has a case for. peft is the oracle."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.methods.case import Case, cases
from tests.methods.networks import NETWORKS, Network
from tests.models import gap
from tests.random_adapters import bits
from veneer.errors import BindError, IncompleteCheckpointError, MergeError, UnsupportedError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.watched_parameters import Edits

pytestmark = pytest.mark.oracle

WEIGHTS = "adapter_model.safetensors"
# Composed changes are larger than a single one, and float32 keeps seven digits.
COMPOSED = 1e-4
FLOAT32 = 1e-6


@torch.no_grad()
def scrambled(model: nn.Module, case: Case, seed: int = 3) -> nn.Module:
    """Give everything that trains other values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(case.scramble(name, parameter, generator))
    return model.eval()


@dataclass(frozen=True)
class Made:
    """What peft made of a case: the folder it saved, and its outputs."""

    case: Case
    folder: Path
    base: Tensor
    unmerged: Tensor
    merged: Tensor | None

    @property
    def network(self) -> Network:
        return NETWORKS[self.case.network]

    def bare(self) -> nn.Module:
        return self.case.prepare(self.network.make())

    def load(self, **options: Any) -> veneer.PeftModel:
        return veneer.PeftModel.from_pretrained(self.bare(), self.folder, **options)

    def read(self, model: nn.Module) -> Tensor:
        return self.network.read(model)

    def tensors(self) -> dict[str, Tensor]:
        """What peft saved and has a meaning."""
        silent = self.case.says_nothing
        saved = load_file(self.folder / WEIGHTS)
        return {key: tensor for key, tensor in saved.items() if silent is None or not re.search(silent, key)}

    def config(self, library: Any, **more: Any) -> Any:
        return getattr(library, self.case.config)(**{**self.case.options, **more})


@pytest.fixture(scope="module", params=cases(), ids=lambda pair: f"{pair[0]}, {pair[1].label}")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case: Case = request.param[1]
    network, folder = NETWORKS[case.network], tmp_path_factory.mktemp("made")
    base = case.peer_prepare(case.prepare(network.make()))
    before = network.read(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = scrambled(peft.get_peft_model(base, getattr(peft, case.config)(**case.options)), case)
        model.save_pretrained(folder)
        unmerged = network.read(model)
        merged = network.read(model.merge_and_unload()) if case.merges and case.peer_merges else None
    assert gap(unmerged, before) > case.visible, "the adapter changes too little"
    return Made(case, folder, before, unmerged, merged)


def test_unmerged_as_in_peft(made: Made) -> None:
    if made.case.ours_differs:
        pytest.skip(made.case.ours_differs)
    assert gap(made.read(made.load()), made.unmerged) < made.case.close


def test_merged_as_in_peft(made: Made) -> None:
    if made.merged is None:
        pytest.skip("peft has no merged form of it")
    assert gap(made.read(made.load().merge_and_unload()), made.merged) < made.case.close


def test_merged_is_unmerged(made: Made) -> None:
    if not made.case.merges:
        pytest.skip("it has no merged form")
    model = made.load()
    expected = made.read(model)
    assert gap(made.read(model.merge_and_unload()), expected) < made.case.close


def test_it_comes_and_goes_beside_what_others_have_folded(made: Made) -> None:
    model = made.load(adapter_name="first")
    made.read(model)
    edits = Edits.last
    model.load_adapter(made.folder, "second")
    model.set_adapter("second")
    made.read(model)
    model.delete_adapter("second")
    assert Edits.last is edits


def test_merging_into_the_weights_own_memory_is_the_same_merge(made: Made) -> None:
    if not made.case.merges:
        pytest.skip("it has no merged form")
    model = veneer.PeftModel(made.bare())
    with model.adapters.merging_on_load({torch.float32}):
        model.load_adapter(made.folder)
        merged = model.merge_and_unload()
    found, expected = bits(merged), bits(made.load().merge_and_unload())
    assert found.keys() == expected.keys()
    # Products in float32 are rounded otherwise where the numbers lie otherwise.
    assert max(gap(found[name], tensor) for name, tensor in expected.items()) < FLOAT32


def test_with_its_merged_weights_kept_it_is_the_merged_model_bit_for_bit(made: Made) -> None:
    if not made.case.merges:
        pytest.skip("it has no merged form")
    model = made.load()
    before = bits(model)
    report = model.keep_merged("default")
    assert report is not None
    found, kept = made.read(model), report.adapters[0]
    assert not kept.unmerged
    assert kept.kept == kept.layers
    assert model.merged_copies == report
    assert bits(model).keys() == before.keys()
    model.merge_adapter()
    assert torch.equal(found, made.read(model))
    model.unmerge_adapter()
    assert torch.equal(made.read(model), found)
    model.drop_merged()
    assert gap(made.read(model), made.unmerged if not made.case.ours_differs else found) < made.case.close


def test_what_has_no_merged_form_says_so(made: Made) -> None:
    if made.case.merges:
        pytest.skip("it has a merged form")
    model = made.load()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="no weight"):
            merge()
    assert gap(made.read(model), made.unmerged) < made.case.close


def test_saving_what_was_loaded_changes_no_bit(made: Made, tmp_path: Path) -> None:
    made.load().save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), made.tensors()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def test_peft_reads_what_is_made_here(made: Made, tmp_path: Path) -> None:
    model = veneer.get_peft_model(made.bare(), made.config(veneer), seed=5)
    if made.case.starts_still:
        assert gap(made.read(model.eval()), made.base) < made.case.close, "a fresh adapter changes nothing"
    expected = made.read(scrambled(model, made.case, seed=9))
    assert gap(expected, made.base) > made.case.visible
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), made.tensors()
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
    assert gap(made.read(veneer.PeftModel.from_pretrained(made.bare(), tmp_path)), expected) < made.case.close
    if made.case.ours_differs:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(made.case.peer_prepare(made.bare()), tmp_path).eval()
    assert gap(made.read(model), expected) < made.case.close


def test_disabled_it_is_the_base_bit_for_bit(made: Made) -> None:
    model = made.load()
    assert gap(made.read(model), made.base) > made.case.visible
    # Frozen, as under an adapter: torch chooses other kernels for weights that want gradients.
    base = made.read(made.bare().requires_grad_(False))
    with model.disable_adapter():
        assert torch.equal(made.read(model), base)


def test_merging_and_unmerging_changes_no_bit_of_the_base(made: Made) -> None:
    model, before = made.load(), made.bare().state_dict()
    if made.case.merges:
        expected = made.read(model)
        model.merge_adapter()
        assert gap(made.read(model), expected) < made.case.close
        model.unmerge_adapter()
        assert torch.equal(made.read(model), expected)
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _second(made: Made, folder: Path, config: Any) -> None:
    """Save another adapter, made here, for the same base."""
    model = veneer.get_peft_model(made.bare(), config, seed=7)
    scrambled(model, made.case, seed=11).save_pretrained(folder)


@pytest.mark.parametrize("other", ["the same method", "LoRA"])
def test_two_compose_merged_as_unmerged(made: Made, other: str, tmp_path: Path) -> None:
    if other == "LoRA":
        targets = made.case.lora_targets or made.case.options.get("target_modules")
        _second(made, tmp_path, veneer.LoraConfig(r=4, target_modules=targets))
    else:
        _second(made, tmp_path, made.config(veneer))
    model = made.load()
    first = made.read(model)
    model.load_adapter(tmp_path, adapter_name="other")
    assert torch.equal(made.read(model), first)
    model.set_adapter(["default", "other"])
    both = made.read(model)
    assert gap(both, first) > made.case.visible / 10
    if made.case.merges:
        assert gap(made.read(model.merge_and_unload()), both) < max(COMPOSED, made.case.close)


def test_rows_of_a_batch_are_as_one_by_one(made: Made, tmp_path: Path) -> None:
    if not made.case.rows:
        pytest.skip("its rows cannot use different adapters")
    _second(made, tmp_path, made.config(veneer))
    model = made.load()
    model.load_adapter(tmp_path, adapter_name="other")
    alone = {"default": made.read(model), "__base__": made.base}
    with model.using("other"):
        alone["other"] = made.read(model)
    for rows in (["default", "__base__"], ["other", "default"], ["__base__", "other"]):
        with model.adapters.using(model.adapters.rows(rows)):
            mixed = made.read(model)
        for index, name in enumerate(rows):
            assert gap(mixed[index], alone[name][index]) < made.case.close


def test_rows_from_a_bank_are_as_one_by_one(made: Made, tmp_path: Path) -> None:
    if not made.case.rows:
        pytest.skip("its rows cannot use different adapters")
    _second(made, tmp_path, made.config(veneer))
    model = made.load()
    model.load_adapter(tmp_path, adapter_name="other")
    bank = model.bank(slots=12, rank_buckets=(4, 16))
    try:
        leases = {name: bank.lease(name) for name in ("default", "other")}
    except UnsupportedError:
        assert not made.case.merges
        return
    alone = {"default": made.read(model), "__base__": made.base}
    with model.using("other"):
        alone["other"] = made.read(model)
    for rows in (["default", "__base__"], ["other", "default"], ["__base__", "other"]):
        plan = bank.plan([leases.get(name) for name in rows])
        with bank.reading(plan) as selection, model.adapters.using(selection), torch.no_grad():
            mixed = made.read(model)
        for index, name in enumerate(rows):
            assert gap(mixed[index], alone[name][index]) < made.case.close


# Rows that name the adapters evenly, evenly and out of order, and so unevenly that they are not padded.
ROWS = {
    "even": ["default"] * 4 + ["other"] * 4,
    "unordered": ["other", "__base__", "default", "other", "__base__", "default", "default", "other"],
    "uneven": ["default", *["other"] * 7],
    "alone": ["__base__", *["other"] * 7],
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_fast_forms_are_the_plain_one(
    made: Made, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _second(made, tmp_path, made.config(veneer))
    model = made.load().to(dtype)
    model.load_adapter(tmp_path, adapter_name="other")
    batch = {key: torch.cat([value] * 4) for key, value in made.network.batch().items()}

    def outputs() -> dict[str, Tensor]:
        def run(selection: Any) -> Tensor:
            with model.adapters.using(selection):
                found = model(**batch)
            return found if isinstance(found, Tensor) else found.logits

        chosen = {name: model.adapters.selection(name) for name in ("default", "other")}
        mixed = {label: model.adapters.rows(rows) for label, rows in ROWS.items()} if made.case.rows else {}
        return {label: run(selection) for label, selection in {**chosen, **mixed}.items()}

    fast = outputs()
    for layer in model.adapters.layers.values():
        layer.forget_cached()
    monkeypatch.setattr(AdaptedLayer, "_fused_patch", lambda *_: None)
    for label, plain in outputs().items():
        assert gap(fast[label], plain) < (1e-5 if dtype is torch.float32 else 0.1), label


def test_gradients_reach_its_tensors_and_no_other(made: Made) -> None:
    model = made.load(is_trainable=True).train(made.case.learns_in_training)
    made.network.output(model).float().square().mean().backward()
    wanted = {id(parameter) for parameter in model.adapters.parameters("default")}
    assert wanted
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns == (id(parameter) in wanted), name


def test_a_few_steps_lower_the_loss(made: Made) -> None:
    model = made.load(is_trainable=True).train()
    target = made.base.detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (made.network.output(model).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]


def test_in_bfloat16(made: Made, tmp_path: Path) -> None:
    expected = made.unmerged if not made.case.ours_differs else made.read(made.load())
    tensors = load_file(made.folder / WEIGHTS)
    halves = {k: t.bfloat16() if t.is_floating_point() else t for k, t in tensors.items()}
    save_file(halves, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes((made.folder / "adapter_config.json").read_bytes())
    model = veneer.PeftModel.from_pretrained(made.bare().bfloat16(), tmp_path)
    unmerged = made.read(model)
    assert gap(unmerged, expected) < 0.2
    if made.case.merges:
        assert gap(made.read(model.merge_and_unload()), unmerged) < 0.1


def test_it_trains_in_the_dtype_of_a_base_in_half_precision(made: Made) -> None:
    model = veneer.get_peft_model(made.bare().bfloat16(), made.config(veneer), autocast_adapter_dtype=False)
    model.train(made.case.learns_in_training)
    made.network.output(model).float().square().mean().backward()
    assert any(parameter.grad is not None for parameter in model.adapters.parameters("default"))


def test_a_wrong_shape_and_a_missing_tensor_are_named(made: Made, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((made.folder / "adapter_config.json").read_bytes())
    tensors = made.tensors()
    # The last of them: a tied layer's tensor, which comes first, may stand there twice.
    key = max((k for k in tensors if k.startswith("base_model.model.")), default=next(iter(tensors)))
    save_file({**tensors, key: torch.zeros(3, 1, 2)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BindError, match=r"\(3, 1, 2\)"):
        veneer.PeftModel.from_pretrained(made.bare(), tmp_path)
    save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises((BindError, IncompleteCheckpointError), match=r"missing|holds nothing|not fill|empty"):
        veneer.PeftModel.from_pretrained(made.bare(), tmp_path)


def test_the_state_dict_of_one_model_fits_another(made: Made) -> None:
    weights = veneer.load_peft_weights(made.folder)
    loaded = made.load()
    state = veneer.get_peft_model_state_dict(loaded)
    assert made.tensors().keys() <= state.keys()
    for key, tensor in made.tensors().items():
        assert torch.equal(state[key], tensor), key
    with torch.no_grad():
        for parameter in loaded.adapters.parameters("default"):
            parameter.mul_(0.5)
    assert gap(made.read(loaded), made.unmerged) > 0
    result = veneer.set_peft_model_state_dict(loaded, weights)
    assert result.missing_keys == []
    assert {key for key in result.unexpected_keys if key in made.tensors()} == set()
    assert gap(made.read(loaded), made.unmerged) < max(made.case.close, FLOAT32) or made.case.ours_differs
