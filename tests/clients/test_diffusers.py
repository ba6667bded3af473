"""LoRAs of diffusers' pipelines and models: load, choose, weigh, fuse, swap, train and save them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.clients import conftest
from tests.clients import pipelines as make
from tests.clients.pipelines import flux, flux_output, image, lora_of, unet

AsRecorded = Callable[[Any], None]


@pytest.fixture
def pipeline(tmp_path: Path) -> Any:
    return make.stable_diffusion(tmp_path)


def first() -> Any:
    return lora_of(unet(), "unet")


def second() -> Any:
    return lora_of(unet(), "unet", ("to_q", "to_v"), rank=2, seed=2)


def with_text_encoder() -> Any:
    text = lora_of(make.text_encoder(), "text_encoder", make.TEXT_TARGETS, rank=2, seed=5)
    return {**lora_of(unet(), "unet", seed=4), **text}


def two(pipeline: Any) -> Any:
    pipeline.load_lora_weights(first(), adapter_name="a")
    pipeline.load_lora_weights(second(), adapter_name="b")
    return pipeline


def test_where_weights_come_from(pipeline: Any, tmp_path: Path, as_recorded: AsRecorded) -> None:
    save_file(first(), tmp_path / "own.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(second(), tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    figures = {"base": image(pipeline)}
    sources: dict[str, tuple[Any, dict[str, Any]]] = {
        "state dict": (first(), {}),
        "file": (str(tmp_path / "own.safetensors"), {}),
        "folder": (str(tmp_path / "folder"), {"low_cpu_mem_usage": True}),
        "named": (str(tmp_path), {"weight_name": "own.safetensors", "low_cpu_mem_usage": False}),
        "kohya": (make.kohya(), {}),
        "convolutions": (lora_of(unet(), "unet", make.UNET_TARGETS + make.CONVOLUTIONS, rank=3), {}),
        "two ranks": ({**first(), **second()}, {}),
        "text encoder": (with_text_encoder(), {}),
    }
    for name, (source, options) in sources.items():
        pipeline.load_lora_weights(source, adapter_name="same", **options)
        figures[name] = image(pipeline)
        pipeline.unload_lora_weights()
        assert image(pipeline) == figures["base"]
        assert not any("lora" in key for key in pipeline.unet.state_dict())
    as_recorded(figures)


def test_choose_and_weigh(pipeline: Any, as_recorded: AsRecorded) -> None:
    two(pipeline)
    figures = {"the last": [image(pipeline), pipeline.get_active_adapters(), pipeline.get_list_adapters()]}
    choices: dict[str, tuple[Any, Any]] = {
        "both": (["a", "b"], [0.7, 0.3]),
        "one": ("a", None),
        "other": (["b"], 2.0),
        "blocks": (["a", "b"], [{"unet": {"down": 0.2, "mid": 1.0, "up": 0.5}}, 0.4]),
        "layers": ("a", {"unet": {"up": {"block_0": [0.1, 0.9]}}}),
    }
    for name, (adapters, weights) in choices.items():
        pipeline.set_adapters(adapters, weights)
        figures[name] = [image(pipeline), pipeline.get_active_adapters()]
    pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    figures["scale"] = [image(pipeline, cross_attention_kwargs={"scale": scale}) for scale in (0.5, 0.0)]
    pipeline.disable_lora()
    figures["disabled"] = [image(pipeline), pipeline.get_active_adapters()]
    pipeline.enable_lora()
    figures["enabled"] = [image(pipeline)]
    pipeline.set_lora_device(["a"], "cpu")
    for name in ("a", "b"):
        pipeline.delete_adapters(name)
        figures[f"without {name}"] = [image(pipeline), pipeline.get_active_adapters(), pipeline.get_list_adapters()]
    as_recorded(figures)


def test_adapters_of_two_models(pipeline: Any, as_recorded: AsRecorded) -> None:
    pipeline.load_lora_weights(with_text_encoder(), adapter_name="t")
    pipeline.load_lora_weights(first(), adapter_name="a")
    figures = {"names": [pipeline.get_list_adapters(), image(pipeline)]}
    choices: dict[str, tuple[Any, Any]] = {
        "one": ("a", None),
        "both": (["t", "a"], [0.5, 0.5]),
        "by model": (["t"], [{"unet": 0.5, "text_encoder": 0.2}]),
    }
    for name, (adapters, weights) in choices.items():
        pipeline.set_adapters(adapters, weights)
        figures[name] = [image(pipeline), pipeline.get_active_adapters()]
    pipeline.fuse_lora(components=["text_encoder"])
    figures["fused"] = [image(pipeline), sorted(pipeline.fused_loras)]
    pipeline.unfuse_lora(components=["text_encoder"])
    pipeline.delete_adapters("t")
    figures["deleted"] = [image(pipeline), pipeline.get_list_adapters()]
    as_recorded(figures)


def test_fuse(pipeline: Any, as_recorded: AsRecorded) -> None:
    two(pipeline).set_adapters(["a", "b"], [0.7, 0.3])
    figures = {"active": image(pipeline)}
    for name, options in {"fused": {}, "half": {"lora_scale": 0.5}, "safe": {"safe_fusing": True}}.items():
        pipeline.fuse_lora(**options)
        figures[name] = [image(pipeline), sorted(pipeline.fused_loras), pipeline.num_fused_loras]
        pipeline.unfuse_lora()
        figures[f"{name}, undone"] = [image(pipeline), pipeline.num_fused_loras]
        pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    pipeline.set_adapters("a")
    pipeline.fuse_lora(adapter_names=["a"])
    pipeline.unload_lora_weights()
    figures["unloaded"] = [image(pipeline), pipeline.get_list_adapters()]
    pipeline.load_lora_weights(second(), adapter_name="a")
    figures["on top"] = image(pipeline)
    as_recorded(figures)


@pytest.mark.skipif(conftest.RECORDING, reason="peft leaves a fused adapter in the weights, whatever is chosen")
def test_a_fused_adapter_goes_when_it_is_not_chosen(pipeline: Any, tmp_path: Path) -> None:
    base = image(pipeline)
    two(pipeline).set_adapters("a")
    pipeline.fuse_lora()
    other = make.stable_diffusion(tmp_path)
    other.load_lora_weights(second(), adapter_name="b")
    pipeline.set_adapters("b")
    assert image(pipeline) == pytest.approx(image(other), rel=1e-5)
    pipeline.delete_adapters(["a", "b"])
    assert image(pipeline) == base


def test_hotswap(pipeline: Any, as_recorded: AsRecorded) -> None:
    pipeline.load_lora_weights(first(), adapter_name="h")
    pipeline.load_lora_weights(lora_of(unet(), "unet", seed=9), adapter_name="h", hotswap=True)
    figures = {"same rank": image(pipeline)}
    pipeline.unload_lora_weights()
    pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(first(), adapter_name="h")
    others = {
        "larger": lora_of(unet(), "unet", rank=6),
        "smaller": lora_of(unet(), "unet", rank=2),
        "fewer layers": second(),
    }
    for name, tensors in others.items():
        pipeline.load_lora_weights(tensors, adapter_name="h", hotswap=True)
        figures[name] = image(pipeline)
    pipeline.set_adapters("h", 0.5)
    figures["half"] = [image(pipeline), pipeline.get_active_adapters()]
    as_recorded(figures)


def test_a_compiled_model_is_not_compiled_again_for_a_hotswap(pipeline: Any, as_recorded: AsRecorded) -> None:
    pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(first(), adapter_name="h")
    torch._dynamo.reset()
    pipeline.unet.compile(backend="eager", fullgraph=True)
    figures = [image(pipeline)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (6, 2):
            pipeline.load_lora_weights(lora_of(unet(), "unet", rank=rank), adapter_name="h", hotswap=True)
            figures.append(image(pipeline))
    as_recorded({"images": figures})


def test_wrong_calls(pipeline: Any, as_recorded: AsRecorded) -> None:
    pipeline.load_lora_weights(first(), adapter_name="a")
    unfit = {key: tensor[:, :1] if "lora_A" in key else tensor for key, tensor in second().items()}
    calls: dict[str, Callable[[], Any]] = {
        "name taken": lambda: pipeline.load_lora_weights(first(), adapter_name="a"),
        "no such name": lambda: pipeline.set_adapters("nobody"),
        "weights": lambda: pipeline.set_adapters(["a"], [1.0, 2.0]),
        "nothing to swap": lambda: pipeline.load_lora_weights(first(), adapter_name="b", hotswap=True),
        "too late": lambda: pipeline.enable_lora_hotswap(target_rank=8),
        "shapes": lambda: pipeline.load_lora_weights(unfit, adapter_name="b"),
    }
    figures: dict[str, Any] = {name: refused(call) for name, call in calls.items()}
    figures["after"] = [image(pipeline), pipeline.get_list_adapters()]
    as_recorded(figures)


def refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (ValueError, RuntimeError):
        return True
    return False


def test_train(tmp_path: Path, pipeline: Any, as_recorded: AsRecorded) -> None:
    model = pipeline.unet
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*make.UNET_TARGETS]))
    make.drawn_adapter(model).enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
        loss = model.train()(x, torch.tensor([3, 7]), text).sample.pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    tensors = peft.get_peft_model_state_dict(model)
    metadata = {"unet": model.peft_config["default"].to_dict()}
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=tensors, unet_lora_adapter_metadata=metadata["unet"])
    other = make.stable_diffusion(tmp_path)
    other.load_lora_weights(str(tmp_path))
    as_recorded({"trained": len(trained), "losses": losses, "keys": sorted(tensors), "images": [image(pipeline)]})
    assert image(other) == pytest.approx(image(pipeline), rel=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"lora_alpha": 8},
    "DoRA": {"use_dora": True},
    "bias": {"lora_bias": True},
    "LoHaConfig": {"alpha": 8},
    "LoKrConfig": {"alpha": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_model(kind: str, tmp_path: Path, pipeline: Any, as_recorded: AsRecorded) -> None:
    config = getattr(peft, kind if kind.endswith("Config") else "LoraConfig")
    model = pipeline.unet
    model.add_adapter(config(r=4, target_modules=[*make.UNET_TARGETS], **KINDS[kind]), "style")
    make.drawn_adapter(model)
    figures: dict[str, Any] = {"image": image(pipeline), "active": model.active_adapters()}
    keys = sorted(peft.get_peft_model_state_dict(model, adapter_name="style"))
    figures["scaled"] = image(pipeline, cross_attention_kwargs={"scale": 0.5})
    model.set_adapters("style", 0.5)
    figures["half"] = image(pipeline)
    if kind != "bias":  # the layers have none that could take it
        model.fuse_lora()
        figures["fused"] = image(pipeline)
        model.unfuse_lora()
    model.disable_adapters()
    figures["disabled"] = image(pipeline)
    model.enable_adapters()
    model.save_lora_adapter(tmp_path, adapter_name="style")
    if kind != "LoHaConfig":  # diffusers reads none
        pipeline.unet = unet()
        pipeline.unet.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", use_safetensors=True)
        figures["loaded"] = image(pipeline)
    as_recorded({**figures, "keys": [len(keys), *keys[:4]]})


@pytest.mark.parametrize("late", [False, True])
def test_half_precision(late: bool, pipeline: Any, as_recorded: AsRecorded) -> None:
    if not late:
        pipeline.to(torch.bfloat16)
    pipeline.load_lora_weights(with_text_encoder(), adapter_name="a")
    pipeline.to(torch.bfloat16)
    models: list[nn.Module] = [pipeline.unet, pipeline.text_encoder]
    dtypes = [sorted({str(p.dtype) for n, p in model.named_parameters() if "lora_" in n}) for model in models]
    as_recorded({"dtypes": dtypes, "image": round(image(pipeline) / 20)})


def test_copies_casts_and_offloads(pipeline: Any, as_recorded: AsRecorded) -> None:
    pipeline.load_lora_weights(first(), adapter_name="a")
    copied = copy.deepcopy(pipeline.unet)
    pipeline.set_adapters("a", 0.1)
    figures = {"own": image(pipeline)}
    pipeline.unet = copied
    figures["copy"] = image(pipeline)
    pipeline.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    figures["offloaded"] = image(pipeline)
    pipeline.unet = unet()
    pipeline.load_lora_weights(first(), adapter_name="a")
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    figures["casts"] = image(pipeline)
    as_recorded(figures)


def test_a_compiled_model(pipeline: Any, as_recorded: AsRecorded) -> None:
    pipeline.load_lora_weights(first(), adapter_name="a")
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    figures = {"image": image(pipeline)}
    pipeline.unet.set_adapters("a", 0.5)
    figures["half"] = image(pipeline)
    pipeline.unet.delete_adapters("a")
    figures["deleted"] = image(pipeline)
    as_recorded(figures)


# -- a transformer -----------------------------------------------------------------------------------------------


def flux_lora(targets: tuple[str, ...] = make.FLUX_TARGETS, channels: int = 16, **options: Any) -> Any:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = flux(channels)

    tensors = lora_of(Named(), "", targets, **options)
    return {key.removeprefix("."): tensor for key, tensor in tensors.items()}


def test_flux(as_recorded: AsRecorded) -> None:
    pipeline = make.flux_pipeline()
    model = pipeline.transformer
    pipeline.load_lora_weights(flux_lora(), adapter_name="a")
    figures: dict[str, Any] = {"a": flux_output(model)}
    figures["scale"] = flux_output(model, joint_attention_kwargs={"scale": 0.5})
    more = ("to_q", "proj_out", "norm.linear", "x_embedder", "context_embedder")
    pipeline.load_lora_weights(flux_lora(more, rank=2, seed=2), adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.3, 0.8])
    figures["both"] = [flux_output(model), pipeline.get_list_adapters()]
    pipeline.fuse_lora()
    figures["fused"] = flux_output(model)
    pipeline.unfuse_lora()
    pipeline.delete_adapters("a")
    figures["b"] = flux_output(model)
    pipeline.unload_lora_weights()
    pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(flux_lora(), adapter_name="h")
    pipeline.load_lora_weights(flux_lora(rank=6), adapter_name="h", hotswap=True)
    figures["swapped"] = flux_output(model)
    as_recorded(figures)


@pytest.mark.parametrize("after", [False, True])
def test_a_flux_lora_that_widens_the_input(after: bool, as_recorded: AsRecorded) -> None:
    pipeline = make.flux_pipeline()
    model = pipeline.transformer
    base = flux_output(model)
    if after:
        pipeline.load_lora_weights(flux_lora(), adapter_name="a")
    pipeline.load_lora_weights(flux_lora(("to_q", "x_embedder"), channels=32), adapter_name="control")
    figures = {"channels": model.config.in_channels, "control": flux_output(model, 32)}
    if after:
        pipeline.set_adapters(["a", "control"], [0.4, 0.3])
        figures["both"] = flux_output(model, 32)
        pipeline.delete_adapters("a")
    pipeline.fuse_lora()
    figures["fused"] = flux_output(model, 32)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights(reset_to_overwritten_params=True)
    assert flux_output(model) == pytest.approx(base, abs=1e-3)
    as_recorded(figures)


SHADOWS: dict[str, dict[str, Any]] = {
    "mirror": {},
    "own embedders": {"share_embeddings": False},
    "small": {"shadow_num_attention_heads": 1, "shadow_intermediate_size": 8},
    "on disk": {"shadow_model": "small", "share_embeddings": False},
}


def sums(model: Any, part: str) -> dict[str, float]:
    """Return the sum of the values of each tensor of an adapter that has a part of that name."""
    state = peft.get_peft_model_state_dict(model)
    return {key: float(tensor.double().abs().sum()) for key, tensor in state.items() if part in key}


def shadow_gradients(model: Any) -> list[Any]:
    """Return the number of an adapter's gradients and their sum, after a step of training."""
    model.train()
    model.zero_grad()
    model(**make.flux2_inputs(), return_dict=False)[0].square().mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "shadow_" in name and p.grad is not None]
    return [len(gradients), float(sum(gradient.abs().sum() for gradient in gradients))]


@pytest.mark.parametrize("kind", SHADOWS)
def test_a_shadow_beside_flux_2(kind: str, tmp_path: Path, monkeypatch: Any, as_recorded: AsRecorded) -> None:
    monkeypatch.chdir(tmp_path)
    make.flux2(heads=1, layers=1).save_pretrained("small")
    blocks = {"target_modules": r"single_transformer_blocks\.\d+$", "shadow_alpha": 2.0, "shadow_dropout": 0.0}
    model = peft.get_peft_model(make.flux2(), peft.ShadowConfig(**blocks, **SHADOWS[kind]))
    figures: dict[str, Any] = {"start": sums(model, "shadow_backbone"), "projection": sums(model, "shadow_projection")}
    shapes = {key: tuple(tensor.shape) for key, tensor in peft.get_peft_model_state_dict(model).items()}
    peft.set_peft_model_state_dict(model, make.drawn({key: s for key, s in shapes.items() if "backbone" not in key}, 3))
    with torch.no_grad():
        made = model(**make.flux2_inputs(), return_dict=False)[0]
    figures["output"] = float(made.abs().sum())
    figures["gradients"] = shadow_gradients(model)
    model.get_base_model().enable_gradient_checkpointing()
    figures["checkpointed"] = shadow_gradients(model)
    model.save_pretrained("saved")
    again = peft.PeftModel.from_pretrained(make.flux2(), "saved")
    with torch.no_grad():
        assert torch.allclose(again(**make.flux2_inputs(), return_dict=False)[0], made, atol=1e-5)
    with pytest.raises(NotImplementedError, match="not supported for Diffusers models"):
        model.base_model.unload_shadow()
    as_recorded(figures)


def test_a_shadow_that_does_not_fit_flux_2(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        config = peft.ShadowConfig(target_modules=r"single_transformer_blocks\.\d+$", **options)
        with pytest.raises(ValueError, match=match):
            peft.get_peft_model(make.flux2(), config)

    refused("preserve the base attention head dimension", shadow_hidden_size=10, shadow_num_attention_heads=1)
    refused("must be between 1", shadow_num_attention_heads=3)
    refused("shadow_num_hidden_layers=5|between 1 and 2 layers", shadow_num_hidden_layers=5)
    make.flux2(heads=3).save_pretrained(tmp_path / "wide")
    refused("wider than the base|between 1 and the base value", shadow_model=str(tmp_path / "wide"))
