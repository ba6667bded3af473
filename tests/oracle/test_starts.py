"""Starting points for training: what peft begins from, on a base that is never touched, and saved for that base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tests.large.quantized import quantized
from tests.models import CASES, build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, WEIGHTS, config_of, scramble
from tests.random_adapters import bits, edit_config, same_bits
from veneer.errors import ConfigError

pytestmark = pytest.mark.oracle

LORA = peft.tuners.lora.config
CLOSE = 1e-5
LINEAR = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
MOVED = ["pissa", "olora", "corda", "lora_ga"]


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    return inputs("gpt2" if model.config.model_type == "gpt2" else "llama")


def ours(model: nn.Module, how: Any, **options: Any) -> veneer.PeftModel:
    """A new adapter here, with the data that its start wants."""
    config = veneer.LoraConfig(init_lora_weights=how, **{**LINEAR, **options})
    prepare(model, config, how, veneer.preprocess_corda, veneer.preprocess_loraga)
    return veneer.get_peft_model(model, config, seed=2).eval()


def theirs(model: nn.Module, how: Any, **options: Any) -> Any:
    """The same in peft."""
    kinds = {"lora_ga_config": LORA.LoraGAConfig}
    options = {k: kinds[k](**v) if k in kinds else v for k, v in options.items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(2)  # its estimates of decompositions draw from torch's own generator
        config = peft.LoraConfig(init_lora_weights=how, **{**LINEAR, **options})
        if how == "lora_ga" and config.lora_ga_config is None:
            config.lora_ga_config = LORA.LoraGAConfig()
        prepare(model, config, how, None, preprocess_loraga)
        return peft.get_peft_model(model, config).eval()


def prepare(
    model: nn.Module, config: Any, how: Any, corda: Callable[..., Any] | None, loraga: Callable[..., Any]
) -> None:
    batch = batch_of(model)

    def run() -> None:
        for row in batch["input_ids"]:  # peft wants one text at a time
            model(input_ids=row.unsqueeze(0))

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()

    if how == "corda" and corda is not None:
        corda(model, config, run)
    elif how == "lora_ga":
        loraga(model, config, step)


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer's name -> ``A`` and ``B`` of its adapter."""
    tensors = {name: t.detach() for name, t in model.named_parameters()}
    return {
        name: (down, tensors[name.replace("lora_A", "lora_B")]) for name, down in tensors.items() if ".lora_A." in name
    }


STARTS: list[tuple[str, dict[str, Any]]] = [
    ("pissa", {}),
    ("pissa", {"use_rslora": True}),
    ("olora", {}),
    ("lora_ga", {}),
    ("lora_ga", {"lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"}}),
    ("lora_ga", {"lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"}}),
    ("lora_ga", {"lora_ga_config": {"scale": "unit"}}),
]


@pytest.mark.parametrize(("how", "options"), STARTS)
def test_it_begins_where_peft_begins(how: str, options: dict[str, Any]) -> None:
    mine, other = factors(ours(build("llama"), how, **options)), factors(theirs(build("llama"), how, **options))
    assert mine.keys() == other.keys()
    for name, (down, up) in other.items():
        own_down, own_up = mine[name]
        # A decomposition leaves the signs of its vectors open; these products do not depend on them.
        assert gap(own_down.T @ own_down, down.T @ down) < 1e-3
        # The largest singular value of the weight is itself an estimate, by chance.
        assert gap(own_up @ own_up.T, up @ up.T) < (0.05 if "weight_svd" in str(options) else 1e-3)
        if how != "lora_ga":
            assert gap(own_up @ own_down, up @ down) < 1e-4


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_the_directions_that_its_paper_says(method: str) -> None:
    """By its definition: peft's own needs a package that is not among its requirements."""
    inputs_seen: list[Tensor] = []
    base = build("llama")
    layer = base.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda _, args, __: inputs_seen.append(args[0].detach().flatten(0, -2)))
    model = ours(base, "corda", corda_config={"corda_method": method})
    handle.remove()
    scaled = [x / x.max().abs() for x in inputs_seen[: len(inputs("llama")["input_ids"])]]
    covariance = (sum(x.T @ x for x in scaled) / len(scaled)).double()
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(32)
    up, values, down = torch.linalg.svd(layer.weight.detach().double() @ covariance)
    part = slice(None, 4) if method == "ipm" else slice(-4, None)
    expected = up[:, part] * values[part] @ (down @ torch.linalg.inv(covariance))[part]
    own_down, own_up = factors(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert gap(own_up @ own_down * 6 / 4, expected) < 1e-3


@pytest.mark.parametrize("how", [*MOVED, "pissa_niter_8", "orthogonal", "gaussian", True])
def test_a_new_adapter_changes_nothing_and_the_base_keeps_every_bit(how: Any) -> None:
    base = build("llama")
    before, expected = bits(base), logits(base, inputs("llama"))
    model = ours(base, how)
    assert gap(logits(model, inputs("llama")), expected) < CLOSE
    with model.disable_adapter():
        assert gap(logits(model, inputs("llama")), expected) < 1e-7
    assert same_bits(bits(model.unload()), before)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        *((how, {}) for how in MOVED),
        ("pissa_niter_4", {}),
        ("pissa", {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 9}}),
        ("olora", {"use_dora": True}),
        ("pissa", {"modules_to_save": ["lm_head"]}),
        ("orthogonal", {}),
    ],
)
def test_saved_it_is_a_plain_adapter_for_the_untouched_base(how: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = scramble(ours(build("llama"), how, **options))
    expected = logits(model, inputs("llama"))
    assert gap(expected, logits(build("llama"), inputs("llama"))) > VISIBLE
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="anywhere")
    moved = how != "orthogonal"
    assert config_of(tmp_path)["r"] == (8 if moved else 4)
    assert config_of(tmp_path)["init_lora_weights"] == (True if moved else how)
    assert not [key for key in load_file(tmp_path / WEIGHTS) if "start" in key]
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    there = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert gap(logits(here, inputs("llama")), expected) < CLOSE
    assert gap(logits(there, inputs("llama")), expected) < CLOSE
    assert gap(logits(model.merge_and_unload(), inputs("llama")), expected) < CLOSE


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_peft_saved_without_conversion_computes_the_same_here(how: str, tmp_path: Path) -> None:
    model = scramble(theirs(build("llama"), how))
    expected = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path / "peft")
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "peft")
    assert gap(logits(here, inputs("llama")), expected) < CLOSE
    here.save_pretrained(tmp_path / "plain")
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    assert gap(logits(again, inputs("llama")), expected) < CLOSE


def test_peft_converts_as_is_done_here(tmp_path: Path) -> None:
    other = theirs(build("llama"), "pissa")
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "initial")
    other.peft_config["default"].init_lora_weights = "pissa"
    expected = logits(scramble(other), inputs("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    assert gap(logits(here, inputs("llama")), expected) < CLOSE


@pytest.mark.parametrize("how", MOVED)
def test_saved_with_its_start_said_to_be_plain_it_stays_as_it_is(how: str, tmp_path: Path) -> None:
    model = ours(build("llama"), how)
    before = model.peft_config["default"]
    start = {key: t.clone() for key, t in veneer.get_peft_model_state_dict(model).items()}
    before.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    initial = load_file(tmp_path / "initial" / WEIGHTS)
    assert (config_of(tmp_path / "initial")["r"], initial.keys()) == (4, start.keys())
    assert all(torch.equal(initial[key], tensor) for key, tensor in start.items())
    expected = logits(scramble(model), inputs("llama"))
    options = {"path_initial_model_for_weight_conversion": tmp_path / "initial"}
    model.save_pretrained(tmp_path / "converted", **options)  # peft's documents leave the config as it is now
    before.init_lora_weights = how
    model.save_pretrained(tmp_path / "again", **options)
    for folder in (tmp_path / "converted", tmp_path / "again"):
        assert config_of(folder)["r"] == 8
        assert gap(logits(veneer.PeftModel.from_pretrained(build("llama"), folder), inputs("llama")), expected) < CLOSE


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "modules_to_save": ["lm_head"]}]
)
def test_an_adapter_of_a_changed_base_is_converted_by_its_initial_one(more: dict[str, Any], tmp_path: Path) -> None:
    other = theirs(build("llama"), "pissa", **more)
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "initial")
    scramble(other).save_pretrained(tmp_path / "trained")
    expected = logits(other, inputs("llama"))
    changed = other.unload()  # peft leaves the base without the start
    model = veneer.PeftModel.from_pretrained(changed, tmp_path / "trained")
    assert gap(logits(model, inputs("llama")), expected) < CLOSE
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    assert gap(logits(again, inputs("llama")), expected) < CLOSE
    ours(build("llama"), True, r=2).save_pretrained(tmp_path / "foreign")
    with pytest.raises(veneer.UnsupportedError, match="not what the adapter began as"):
        model.save_pretrained(tmp_path / "no", path_initial_model_for_weight_conversion=tmp_path / "foreign")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("in_its_place", [False, True], ids=["by name", "in peft's place"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 6}}, {"use_dora": True}])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_it_keeps_its_rank_where_loading_computes_the_start_again(
    how: str, options: dict[str, Any], in_its_place: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = scramble(ours(build("llama"), how, **options))
    expected = logits(model, inputs("llama"))
    if in_its_place:
        monkeypatch.setattr("veneer.peft_model.initial_adapter.stands_in_for_peft", lambda: True)
    model.save_pretrained(tmp_path, **({} if in_its_place else {"convert_start": False}))
    assert (config_of(tmp_path)["r"], config_of(tmp_path)["init_lora_weights"]) == (4, how)
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert gap(logits(here, inputs("llama")), expected) < CLOSE
    with warnings.catch_warnings(action="ignore"):
        there = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert gap(logits(there, inputs("llama")), expected) < CLOSE
    here.save_pretrained(tmp_path / "plain", convert_start=True)
    assert config_of(tmp_path / "plain")["r"] == 8
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    assert gap(logits(again, inputs("llama")), expected) < CLOSE


def test_corda_at_its_rank_loads_where_the_data_were_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, config = build("llama"), veneer.LoraConfig(init_lora_weights="corda", **LINEAR)  # type: ignore[arg-type]
    prepare(base, config, "corda", veneer.preprocess_corda, veneer.preprocess_loraga)
    model = scramble(veneer.get_peft_model(copy.deepcopy(base), config).eval())
    expected = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path / "own", convert_start=False)
    assert config_of(tmp_path / "own")["r"] == 4
    assert gap(logits(veneer.PeftModel.from_pretrained(base, tmp_path / "own"), inputs("llama")), expected) < CLOSE
    with pytest.raises(veneer.UnsupportedError, match="changed before training") as refused:
        veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "own")
    assert "preprocess_corda" in str(refused.value)
    monkeypatch.setattr("veneer.peft_model.initial_adapter.stands_in_for_peft", lambda: True)
    model.save_pretrained(tmp_path / "plain")
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    assert gap(logits(here, inputs("llama")), expected) < CLOSE


@pytest.mark.parametrize("how", ["lora_ga", "pissa_niter_4"])
def test_a_start_by_chance_is_not_kept_in_what_is_saved(how: str, tmp_path: Path) -> None:
    with pytest.raises(veneer.UnsupportedError, match="another each time"):
        ours(build("llama"), how).save_pretrained(tmp_path / "out", convert_start=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arch", "how"), [("llama", how) for how in MOVED] + [("gpt2", "pissa")])
def test_the_base_without_the_start_is_made_as_peft_leaves_it(arch: str, how: str, tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if arch == "gpt2" else {}
    expected = logits(build(arch), inputs(arch))
    model = ours(build(arch), how, **options)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.unload(take_starts_off=True).save_pretrained(tmp_path / "base")
    changed = type(build(arch)).from_pretrained(tmp_path / "base")
    assert gap(logits(changed, inputs(arch)), expected) > VISIBLE
    if how in ("pissa", "olora"):
        theirs_ = theirs(build(arch), how, **options).unload().state_dict()
        assert all(gap(tensor, theirs_[name]) < 1e-5 for name, tensor in changed.state_dict().items())
    here = veneer.PeftModel.from_pretrained(changed, tmp_path / "initial")
    assert gap(logits(here, inputs(arch)), expected) < CLOSE


@pytest.mark.parametrize("option", ["covariance_file", "cache_file"])
def test_corda_measures_once_for_a_file(option: str, tmp_path: Path) -> None:
    file, base = tmp_path / "measured.safetensors", build("llama")
    first = ours(build("llama"), "corda", corda_config={option: file})
    config = veneer.LoraConfig(init_lora_weights="corda", **LINEAR, corda_config={option: str(file)})  # type: ignore[arg-type]
    veneer.preprocess_corda(base, config)
    again = veneer.get_peft_model(base, config)
    expected = factors(first)
    assert all(torch.equal(down, expected[name][0]) for name, (down, _) in factors(again).items())
    config.target_modules = ["up_proj"]
    with pytest.raises(ConfigError, match="nothing was measured of 2 layers"):
        veneer.preprocess_corda(build("llama"), config)
    with pytest.raises(ConfigError, match="`run_model` must be specified"):
        veneer.preprocess_corda(build("llama"), veneer.LoraConfig(init_lora_weights="corda", **LINEAR))  # type: ignore[arg-type]


def test_lora_ga_measures_once_for_a_file(tmp_path: Path) -> None:
    file, base = tmp_path / "measured.safetensors", build("llama")
    config = veneer.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=veneer.LoraGAConfig(), **LINEAR)  # type: ignore[arg-type]
    runs = []

    def train_step() -> None:
        runs.append(base(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward())

    for _ in range(2):
        veneer.preprocess_loraga(base, config, train_step, cache_file=file)
    assert len(runs) == 1
    veneer.get_peft_model(base, config)
    config.target_modules = ["up_proj"]
    with pytest.raises(ConfigError, match="nothing was measured of 2 layers"):
        veneer.preprocess_loraga(build("llama"), config, train_step, cache_file=file)


@pytest.mark.parametrize("how", ["corda", "lora_ga", "pissa_niter_4"])
def test_what_cannot_be_worked_out_again_is_refused(how: str, tmp_path: Path) -> None:
    ours(build("llama"), True).save_pretrained(tmp_path)
    edit_config(tmp_path, init_lora_weights=how)
    with pytest.raises(veneer.UnsupportedError, match="changed before training"):
        veneer.PeftModel.from_pretrained(build("llama"), tmp_path)


def test_on_gpt2_whose_weights_lie_transposed() -> None:
    for how in MOVED:
        options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        model = ours(build("gpt2"), how, **options)
        assert gap(logits(model, inputs("gpt2")), logits(build("gpt2"), inputs("gpt2"))) < CLOSE
        assert gap(logits(scramble(model), inputs("gpt2")), logits(build("gpt2"), inputs("gpt2"))) > VISIBLE


def test_only_the_adapter_learns_and_its_start_stays() -> None:
    model = ours(build("llama"), "pissa")
    model.train()
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert learns == {name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"how": "pisa"}, veneer.ConfigError, "Did you mean 'pissa'"),
        ({"how": "orthogonal", "r": 5}, veneer.ConfigError, "rank to be even"),
        ({"how": "pissa", "r": 64}, veneer.ConfigError, "at most"),
        ({"how": "lora_ga", "lora_ga_config": {"scale": "long"}}, veneer.ConfigError, "scale='long'"),
        ({"how": "pissa", "target_modules": ["embed_tokens"]}, veneer.UnsupportedError, "not supported for Embedding"),
        ({"how": "loftq", "use_dora": True}, veneer.UnsupportedError, "DoRA"),
        ({"how": "loftq", "loftq_config": {"loftq_bits": 2}}, veneer.ConfigError, "loftq_bits=2"),
        ({"how": "loftq", "loftq_config": {"loftq_iter": 0}}, veneer.ConfigError, "at least 1"),
        ({"how": "mica", "r": 64}, veneer.ConfigError, "MiCA requires `r`"),
    ],
)
def test_each_mistake_has_its_error(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ours(build("llama"), **options)


@pytest.mark.parametrize(("how", "name"), [("corda", "CorDA"), ("lora_ga", "LoRA-GA")])
def test_what_is_measured_for_nothing_is_refused(how: str, name: str) -> None:
    measure = {"corda": veneer.preprocess_corda, "lora_ga": veneer.preprocess_loraga}[how]
    with pytest.raises(veneer.ConfigError, match=f"takes no such data.* use {name}"):
        measure(build("llama"), veneer.LoraConfig(**LINEAR), lambda: None)  # type: ignore[arg-type]
    config = veneer.LoraConfig(**{**LINEAR, "target_modules": ["embed_tokens"], "init_lora_weights": how})  # type: ignore[arg-type]
    with pytest.raises(veneer.ConfigError, match="No supported layers found"):
        measure(build("llama"), config, lambda: None)


def test_a_packed_weight_gets_no_gradient_to_measure() -> None:
    config = veneer.LoraConfig(init_lora_weights="lora_ga", **LINEAR)  # type: ignore[arg-type]
    with pytest.raises(veneer.UnsupportedError, match=r"q_proj is quantized, and gets no gradient"):
        veneer.preprocess_loraga(quantized("bitsandbytes 4 bits"), config, lambda: None)


def test_a_packed_weight_keeps_its_start() -> None:
    model = ours(quantized("bitsandbytes 4 bits"), "pissa")
    with pytest.raises(veneer.UnsupportedError, match="is packed, and its start cannot be taken off it"):
        model.unload(take_starts_off=True)
    assert model.active_adapters == ["default"]
    assert isinstance(model.unload(), nn.Module)


def test_a_rank_one_gradient_gives_a_start_of_the_weights_length() -> None:
    """In any order of its directions: the largest one sets the length."""
    base: Any = nn.Sequential(nn.Linear(10, 10))
    options: dict[str, Any] = {"direction": "random", "scale": "weight_svd"}
    config = veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=options)
    veneer.preprocess_loraga(base, config, lambda: base(torch.ones(2, 10)).sum().backward())
    length = float(torch.linalg.matrix_norm(base[0].weight.detach(), 2))
    for seed in range(8):
        model = veneer.get_peft_model(copy.deepcopy(base), config, seed=seed)
        (up,) = (up for _, up in factors(model).values())
        assert float(up.norm(dim=0).max()) == pytest.approx(length, rel=0.2)


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_start_from_data_without_data_says_so(how: str) -> None:
    config = veneer.LoraConfig(init_lora_weights=how, **CASES["llama"].options, **LINEAR)
    with pytest.raises(veneer.ConfigError, match="needs data"):
        veneer.get_peft_model(build("llama"), config)


def test_mica_of_an_embedding_is_as_in_peft(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "mica"}
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**options), seed=1)  # type: ignore[arg-type]
    peer = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    own, other = model.get_adapter_state_dict(save_embedding_layers=False), peft.get_peft_model_state_dict(peer)
    for key in (key for key in other if "lora" in key and "_A" not in key):
        assert gap(own[key] @ own[key].T, other[key] @ other[key].T) < 1e-4
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name.rpartition(".default")[0].rpartition(".")[2] for name in trained} == {"lora_embedding_A", "lora_A"}
    expected = logits(scramble(model), inputs("llama"))
    assert gap(expected, logits(build("llama"), inputs("llama"))) > VISIBLE
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert gap(logits(again, inputs("llama")), expected) < CLOSE


def test_a_new_bias_on_a_layer_without_one_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="`lora_bias=True` was passed but the targeted layer of type Linear has no"):
        veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"], lora_bias=True))
