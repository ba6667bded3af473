"""The lengths that DoRA divides by: those of the rows themselves, and computed anew when anything has changed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.methods.shared.row_lengths import RowLengths, row_lengths

SCALE = 0.7


@pytest.fixture
def values() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, U and V."""
    generator = torch.Generator().manual_seed(1)
    weight, up, down = (torch.randn(*shape, generator=generator) for shape in ((600, 40), (600, 3), (3, 40)))
    return weight, up.requires_grad_(), down.requires_grad_()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed: "lengths", and "squares" where those of the weight were."""
    calls: list[str] = []
    original = RowLengths._computed

    def noted(self: RowLengths, *arguments: object) -> Tensor:
        known = self._squares
        lengths = original(self, *arguments)  # type: ignore[arg-type]
        calls.append("lengths" if self._squares is known is not None else "squares")
        return lengths

    monkeypatch.setattr(RowLengths, "_computed", noted)
    return calls


def direct(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = weight.double() + SCALE * (up.double() @ down.double())
    return rows.norm(dim=1).detach()


def close(lengths: Tensor, expected: Tensor) -> bool:
    return torch.allclose(lengths.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_the_rows(values: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    weight, up, down = values
    weight = weight.to(dtype)
    assert close(RowLengths().of(weight, True, up, down, SCALE), direct(weight, up, down))


def test_rows_that_the_change_cancels_keep_their_digits(values: tuple[Tensor, Tensor, Tensor]) -> None:
    _, up, down = values
    weight = -SCALE * (up @ down).detach()
    weight[::2] *= 1 + 1e-3
    weight[5], up.data[5] = 0, 0
    lengths = RowLengths().of(weight, True, up, down, SCALE)
    expected = direct(weight, up, down)
    assert torch.allclose(lengths[::2].double(), expected[::2], rtol=1e-3)
    assert lengths[5] == 0


def test_what_has_not_changed_is_not_computed_again(values: tuple[Tensor, Tensor, Tensor], computed: list[str]) -> None:
    lengths, (weight, up, down) = RowLengths(), values
    first = lengths.of(weight, True, up, down, SCALE)
    assert torch.equal(lengths.of(weight.detach(), True, up, down, SCALE), first)
    assert computed == ["squares"]
    lengths.of(weight, True, up, down, 2 * SCALE)
    assert computed == ["squares", "lengths"]


CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "A": lambda weight, up, down: down.detach().mul_(2),
    "B": lambda weight, up, down: up.detach().mul_(2),
    # As optimizers write that are compiled for one device, or old: no version tells it.
    "A without a version": lambda weight, up, down: down.data.mul_(2),  # type: ignore[func-returns-value]
    "B exchanged": lambda weight, up, down: setattr(up, "data", 3 * up.data),
    "the weight": lambda weight, up, down: weight.mul_(2),  # type: ignore[func-returns-value]
    "a row of the weight": lambda weight, up, down: weight[3].zero_(),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_computed_anew(
    values: tuple[Tensor, Tensor, Tensor], change: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    lengths, (weight, up, down) = RowLengths(), values
    before = lengths.of(weight, True, up, down, SCALE)
    change(weight, up, down)
    after = lengths.of(weight, True, up, down, SCALE)
    assert not torch.equal(before, after)
    assert close(after, direct(weight, up, down))


def test_another_weight_in_the_place_of_the_first(values: tuple[Tensor, Tensor, Tensor]) -> None:
    lengths, (weight, up, down) = RowLengths(), values
    lengths.of(weight, True, up, down, SCALE)
    for factor in (2, 3, 4):
        del weight
        weight = values[0] * factor  # may take the memory that was freed
        assert close(lengths.of(weight, True, up, down, SCALE), direct(weight, up, down))


def test_a_weight_that_is_trained_is_read_each_time(values: tuple[Tensor, Tensor, Tensor], computed: list[str]) -> None:
    lengths, (weight, up, down) = RowLengths(), values
    lengths.of(weight, False, up, down, SCALE)
    weight.data.mul_(2)
    assert close(lengths.of(weight, False, up, down, SCALE), direct(weight, up, down))
    assert computed == ["squares", "squares"]


def test_threads_share_them(values: tuple[Tensor, Tensor, Tensor]) -> None:
    lengths, (weight, up, down) = RowLengths(), values
    factors = [((up * k).detach().requires_grad_(), (down / k).detach().requires_grad_()) for k in (1, 2, 4, 8)]
    wrong = []

    def work(number: int) -> None:
        own_up, own_down = factors[number]
        scaled_weight = weight * (number + 1)
        expected = direct(scaled_weight, own_up, own_down)
        for _ in range(30):
            if not close(lengths.of(scaled_weight, True, own_up, own_down, SCALE), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(factors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_begins_with_nothing(values: tuple[Tensor, Tensor, Tensor]) -> None:
    lengths, (weight, up, down) = RowLengths(), values
    lengths.of(weight, True, up, down, SCALE)
    for copied in (copy.deepcopy(lengths), pickle.loads(pickle.dumps(lengths))):
        assert copied._squares is copied._lengths is None


def test_checkpointing_and_accumulation_measure_once_a_step(computed: list[str]) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = veneer.get_peft_model(layers, veneer.LoraConfig(target_modules=["0"], r=2, use_dora=True), seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    computed.clear()
    for _ in range(2):
        for _ in range(2):
            x = torch.randn(3, 8)
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
        optimizer.step()
    assert len(computed) == 2


def test_rows_are_measured_in_transforms_of_functions(values: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, up, down = values
    scaled = torch.func.vmap(lambda factor: row_lengths(weight, up * factor, down, SCALE))
    assert close(scaled(torch.tensor([1.0, 2.0]))[1], direct(weight, 2 * up, down))


def test_inference_keeps_nothing(computed: list[str]) -> None:
    config = veneer.LoraConfig(target_modules=["0"], use_dora=True)
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    computed.clear()
    with torch.no_grad():
        model(torch.randn(3, 8))
        model.eval()(torch.randn(3, 8))
    assert not computed
    assert model.get_base_model()[0].bound["default"][0].settings.row_lengths._lengths is None
