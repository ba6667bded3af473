"""Another adapter's weights in the place of one: the same answers as loading it, and nothing compiled anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import WEIGHTS, saved
from veneer.errors import AdapterError, BaseModelError, ConfigError, MergeError, UnsupportedError

X = inputs("llama")
CLOSE = 1e-5
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def adapter(folder: Path, name: str, seed: int, **options: Any) -> Path:
    return saved(folder / name, "llama", seed, **options)


def load(folder: Path) -> veneer.PeftModel:
    return veneer.PeftModel.from_pretrained(build("llama"), folder)


OTHERS: dict[str, dict[str, Any]] = {
    "the same shapes": {},
    "another scale": {"lora_alpha": 3},
    "a smaller rank": {"r": 2, "lora_alpha": 5, "use_rslora": True},
    "ranks by layer": {"r": 3, "rank_pattern": {"q_proj": 6}},
    "fewer layers": {"target_modules": ["q_proj"], "r": 2},
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_it_answers_as_if_loaded(other: str, prepared: bool, tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "a", 1), adapter(tmp_path, "b", 2, **OTHERS[other])
    before = (first / WEIGHTS).read_bytes()
    model, expected = load(first), logits(load(second), X)
    if prepared:
        usual = logits(model, X)
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert gap(logits(model, X), usual) < CLOSE
    assert gap(logits(model, X), expected) > 0.02
    veneer.hotswap_adapter(model, second)
    assert gap(logits(model, X), expected) < CLOSE
    assert model.peft_config["default"].r == load(second).peft_config["default"].r  # type: ignore[attr-defined]
    assert (first / WEIGHTS).read_bytes() == before
    model.save_pretrained(tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(second / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert gap(logits(model.merge_and_unload(), X), expected) < CLOSE


def test_nothing_is_compiled_anew(tmp_path: Path) -> None:
    folders = [adapter(tmp_path, name, seed, **options) for seed, (name, options) in enumerate(OTHERS.items(), 1)]
    model = load(folders[0])
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
    counter = CompileCounter()
    graph = torch.compile(model, fullgraph=True, backend=counter)
    for folder in [*folders, folders[0]]:
        veneer.hotswap_adapter(graph, folder)
        assert gap(logits(graph, X), logits(load(folder), X)) < CLOSE
    assert counter.frame_count == 1


def test_one_of_several_is_swapped_and_the_report_says_so(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "a", 1), adapter(tmp_path, "b", 2)
    model = load(first)
    model.load_adapter(first, adapter_name="kept")
    veneer.hotswap_adapter(model, second, "default")
    with model.using("kept"):
        assert gap(logits(model, X), logits(load(first), X)) < CLOSE
    assert model.load_report is not None
    origins = {report.name: report.origin for report in model.load_report.adapters}
    assert origins == {"kept": str(first), "default": str(second)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, r"adapts 2 layers that 'default' does not"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ],
)
def test_what_cannot_be_swapped_leaves_the_model_as_it_was(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = load(adapter(tmp_path, "a", 1))
    before = logits(model, X)
    with pytest.raises(AdapterError, match=words):
        veneer.hotswap_adapter(model, adapter(tmp_path, "b", 2, **options))
    assert torch.equal(logits(model, X), before)


def test_one_of_another_method_is_not_swapped_in(tmp_path: Path) -> None:
    model = load(adapter(tmp_path, "a", 1))
    config = veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    veneer.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "b")
    with pytest.raises(AdapterError, match="Incompatible PEFT types found: LORA and IA3"):
        veneer.hotswap_adapter(model, tmp_path / "b")


def test_one_for_a_base_without_its_start_is_not_swapped_in(tmp_path: Path) -> None:
    first, start = load(adapter(tmp_path, "a", 1)), load(adapter(tmp_path, "b", 2, init_lora_weights="pissa"))
    config = veneer.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    begun = veneer.get_peft_model(build("llama"), config)
    begun.save_pretrained(tmp_path / "c", convert_start=False)
    with pytest.raises(AdapterError, match="convert_start=True saves it for this one"):
        veneer.hotswap_adapter(first, tmp_path / "c")
    expected = logits(start, X)
    start.save_pretrained(tmp_path / "d")
    veneer.hotswap_adapter(first, tmp_path / "d")
    assert gap(logits(first, X), expected) < CLOSE


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    model = load(adapter(tmp_path, "a", 1))
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        veneer.hotswap_adapter(model, adapter(tmp_path, "b", 2))


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    model = load(adapter(tmp_path, "a", 1))
    with pytest.raises(AdapterError, match=r"target_rank=2 is smaller than the rank 4"):
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=2)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(AdapterError, match="already compiled"):
        veneer.prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="already compiled"):
        veneer.prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    veneer.prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
    with pytest.raises(ConfigError, match="none of the choices"):
        veneer.prepare_model_for_compiled_hotswap(model, check_compiled="never")
    with pytest.raises(BaseModelError, match="no model with adapters"):
        veneer.prepare_model_for_compiled_hotswap(build("llama"))
    other = veneer.get_peft_model(build("llama"), veneer.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(UnsupportedError, match="only LoRA can be prepared"):
        veneer.prepare_model_for_compiled_hotswap(other)


@pytest.mark.parametrize("arch", ["llama", "grouped"])
def test_a_prepared_adapter_is_trained_on_and_saved_without_what_was_added(arch: str, tmp_path: Path) -> None:
    config = veneer.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"] if arch == "llama" else ["conv"])
    make = Grouped if arch == "grouped" else lambda: build("llama")
    x: Any = torch.rand(2, 4, 8, 8) if arch == "grouped" else X["input_ids"]
    model = veneer.get_peft_model(make(), config)
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(model.adapters.parameters("default"))
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        getattr(output, "logits", output).square().sum().backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(make(), tmp_path)
    assert again.peft_config["default"].r == 4  # type: ignore[attr-defined]
    with torch.no_grad():
        expected, found = (getattr(output, "logits", output) for output in (model(x), again(x)))
    assert gap(found, expected) < CLOSE


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(x)
        return output


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_other_ranks_on_a_grouped_convolution(ranks: tuple[int, int], tmp_path: Path) -> None:
    x, outputs = torch.rand(1, 4, 8, 8), []
    for number, rank in enumerate(ranks):
        config = veneer.LoraConfig(r=rank, target_modules=["conv"], init_lora_weights=False)
        model = veneer.get_peft_model(Grouped(), config, seed=number).eval()
        outputs.append(model(x).detach())
        model.save_pretrained(tmp_path / str(number))
    assert gap(*outputs) > 0.02
    model = veneer.PeftModel.from_pretrained(Grouped(), tmp_path / "0")
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=4)
    for number in (0, 1, 0):
        veneer.hotswap_adapter(model, tmp_path / str(number))
        assert gap(model(x), outputs[number]) < CLOSE


@pytest.mark.parametrize("prepared", [False, True])
def test_layers_that_one_adapter_leaves_out_are_there_for_the_next(prepared: bool, tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "a", 1), adapter(tmp_path, "b", 2, **OTHERS["fewer layers"])
    model = load(first)
    expected = logits(model, X)
    if prepared:
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=6)
    veneer.hotswap_adapter(model, second)
    veneer.hotswap_adapter(model, first)
    assert gap(logits(model, X), expected) < CLOSE
    model.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(first / WEIGHTS).keys()


def test_configs_to_come_are_given_the_rank(tmp_path: Path) -> None:
    model = load(adapter(tmp_path, "a", 1))
    own, other = model.peft_config["default"], veneer.LoraConfig(r=2, rank_pattern={"q_proj": 3})
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=6, config={"default": own, "other": other})  # type: ignore[dict-item]
    assert (other.r, other.rank_pattern) == (6, {"q_proj": 6})
    assert model.peft_config["default"].r == 6  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "out")
    saved = load(tmp_path / "out")
    assert saved.peft_config["default"].r == 4  # type: ignore[attr-defined]
    assert gap(logits(saved, X), logits(model, X)) < CLOSE
    veneer.hotswap_adapter(model, adapter(tmp_path, "b", 2, r=2))
    assert model.peft_config["default"].r == 2  # type: ignore[attr-defined]


@pytest.mark.oracle
def test_as_peft_swaps(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    first, second = adapter(tmp_path, "a", 1), adapter(tmp_path, "b", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build("llama"), first).eval()
        hotswap_adapter(theirs, second, "default")
    model = load(first)
    veneer.hotswap_adapter(model, second)
    assert gap(logits(model, X), logits(theirs, X)) < CLOSE


def test_a_bias_that_the_new_one_does_not_bring_is_the_bases_again(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / bias, "qwen2", 1, bias=bias) for bias in ("lora_only", "none"))
    model = veneer.PeftModel.from_pretrained(build("qwen2"), first)
    expected = logits(veneer.PeftModel.from_pretrained(build("qwen2"), second), X)
    assert gap(logits(model, X), expected) > 0.02
    veneer.hotswap_adapter(model, second)
    assert gap(logits(model, X), expected) < CLOSE
