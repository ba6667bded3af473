from __future__ import annotations

import re
from typing import Any

import pytest

from veneer.base_model import targets
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError, TargetError

LINEAR = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
# A decoder of twelve blocks, as ``named_modules`` lists it: name -> whether "all-linear" means it.
NAMES = {
    "": False,
    "model": False,
    "model.layers": False,
    **{f"model.layers.{i}.{part}": True for i in range(12) for part in LINEAR},
    **{f"model.layers.{i}.norm": False for i in range(12)},
    "lm_head": True,
}


def chosen(model_type: str | None = None, names: dict[str, bool] | None = None, **options: Any) -> list[str]:
    return targets.target_names(LoraConfig(**options), names or NAMES, model_type=model_type, outputs=["lm_head"])


def test_a_list_means_whole_names_and_dotted_endings() -> None:
    assert len(chosen(target_modules=["q_proj"])) == 12
    assert len(chosen(target_modules=["self_attn.q_proj", "up_proj"])) == 24
    assert chosen(target_modules=["model.layers.3.mlp.up_proj"]) == ["model.layers.3.mlp.up_proj"]
    assert chosen(target_modules=["1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert chosen(target_modules=["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize("ending", ["proj", "_proj", "attn.q_proj", "q.proj", "Q_PROJ"])
def test_an_ending_that_stops_inside_a_part_means_nothing(ending: str) -> None:
    with pytest.raises(TargetError):
        chosen(target_modules=[ending])


def test_a_string_is_an_expression_for_the_whole_name() -> None:
    assert len(chosen(target_modules=r".*\.[0-4]\.self_attn\.(q|v)_proj")) == 10
    with pytest.raises(TargetError):
        chosen(target_modules="q_proj")


def test_all_linear_leaves_out_the_output_and_what_is_saved_whole() -> None:
    assert len(chosen(target_modules="all-linear")) == 36
    kept = chosen(target_modules="all-linear", modules_to_save=["mlp.up_proj"])
    assert len(kept) == 24
    assert not [name for name in kept if name.endswith("up_proj")]


def test_exclusion_wins() -> None:
    assert len(chosen(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])) == 12
    assert len(chosen(target_modules="all-linear", exclude_modules=r".*\.\d\..*")) == 6


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"layers_to_transform": 1}, {"1"}),
        ({"layers_to_transform": [1, 11]}, {"1", "11"}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"0"}),
        ({"layers_to_transform": [2], "layers_pattern": ["h", "layers"]}, {"2"}),
    ],
)
def test_blocks_are_numbers_and_not_prefixes_of_numbers(options: dict[str, Any], blocks: set[str]) -> None:
    assert {name.split(".")[2] for name in chosen(target_modules=["q_proj"], **options)} == blocks


def test_a_whole_name_says_its_block_itself() -> None:
    found = chosen(target_modules=["q_proj", "lm_head", "model.layers.3.mlp.up_proj"], layers_to_transform=[1])
    assert found == ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj", "lm_head"]


def test_an_empty_list_of_blocks_filters_nothing() -> None:
    assert len(chosen(target_modules=["q_proj"], layers_to_transform=[])) == 12


NESTED = {f"model.layers.{i}.{part}.{j}.q": True for i in range(3) for part in ("layers", "experts") for j in range(3)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, r"model\.layers\.1\..*"),
        ("layers", r"model\.layers\.1\..*"),
        ("experts", r".*\.experts\.1\.q"),
        # The first name that fits a module counts for it.
        (["experts", "layers"], r".*\.experts\.1\.q|model\.layers\.1\.layers\..*"),
        (["layers", "experts"], r"model\.layers\.1\..*"),
    ],
)
def test_the_outermost_list_counts_unless_one_is_named(pattern: str | list[str] | None, expected: str) -> None:
    found = chosen(names=NESTED, target_modules=["q"], layers_to_transform=1, layers_pattern=pattern)
    assert found == [name for name in NESTED if re.fullmatch(expected, name)]


def test_a_list_at_the_root_is_an_outermost_list() -> None:
    bare = {f"h.{i}.h.{j}.q": True for i in range(3) for j in range(3)}
    expected = [f"h.1.h.{j}.q" for j in range(3)]
    assert chosen(names=bare, target_modules=["q"], layers_to_transform=1, layers_pattern="h") == expected


def test_naming_nothing_means_the_usual_layers_of_the_family() -> None:
    assert {name.rpartition(".")[2] for name in chosen("llama")} == {"q_proj", "v_proj"}
    with pytest.raises(
        TargetError,
        match=r"Please specify `target_modules` in `peft_config`.*models of type 'unheard-of' have no usual choice",
    ) as error:
        chosen("unheard-of")
    assert "up_proj" in str(error.value.hint)


def test_the_order_is_the_models() -> None:
    assert chosen(target_modules=["up_proj", "q_proj"])[:2] == [f"model.layers.0.{LINEAR[i]}" for i in (0, 2)]


def test_an_error_names_the_nearest_modules() -> None:
    with pytest.raises(TargetError, match="Nearest: q_proj"):
        chosen(target_modules=["q_projj"])


def test_an_error_names_the_filter_that_removed_everything() -> None:
    with pytest.raises(TargetError, match=re.escape("exclude_modules=['q_proj'] removes all")):
        chosen(target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(TargetError, match=re.escape("layers_to_transform=[99] removes all")):
        chosen(target_modules=["q_proj"], layers_to_transform=[99])


def test_a_broken_expression_is_the_configs_fault() -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        LoraConfig(target_modules="(q_proj")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.q_proj", 4),
        ("model.layers.11.self_attn.q_proj", 2),
        ("model.layers.1.mlp.up_proj", 16),
        ("model.layers.2.mlp.up_proj", 8),
        ("q_proj", 2),
        ("my_q_proj", 8),
    ],
)
def test_the_first_pattern_that_a_name_ends_with_counts(name: str, value: int) -> None:
    patterns = {r"layers\.1\..*q_proj": 4, "q_proj": 2, r".*\.1\.mlp\.up_proj": 16, "up": 32}
    assert targets.pattern_value(name, patterns, 8) == value
