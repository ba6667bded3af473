"""Merges from disk to disk of adapters for models that have some blocks several times (``layer_replication``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.checkpoints.test_older_layouts import moe
from tests.models import LLAMA, build, gap, inputs, logits
from tests.random_adapters import config, edit_config, enlarge, same_bits, saved, saved_base
from veneer.errors import ConfigError, MergeError, UnsupportedError
from veneer.merging.work.pieces import MergeLayer

CLOSE = 1e-5
RANGES = [[1, 2], [0, 2]]
ORDER = [1, 0, 1]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Make ``base/`` in two files, and ``adapter/``."""
    base: Any = build("llama")
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    saved(tmp_path / "adapter", layer_replication=RANGES)
    return tmp_path


def merge(world: Path, out: str = "out", **options: Any) -> veneer.MergeReport:
    return veneer.merge(world / "adapter", world / "base", out=world / out, **options)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def values(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def block(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}.weight"


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "60KB"), (torch.bfloat16, "30KB")])
def test_it_has_the_bits_of_a_merge_in_memory(dtype: torch.dtype, size: str, tmp_path: Path) -> None:
    base: Any = build("llama").to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size=size)
    saved(tmp_path / "adapter", layer_replication=RANGES)
    report = merge(tmp_path)
    memory: Any = veneer.load(tmp_path / "adapter", base=tmp_path / "base").merge_and_unload()
    memory.save_pretrained(tmp_path / "memory")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert same_bits(after, weights(tmp_path / "memory"))
    again, told = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(logits(again.eval(), inputs("llama")), logits(memory, inputs("llama")))
    for new, old in enumerate(ORDER):
        assert torch.equal(after[block(new, "self_attn.k_proj")], before[block(old, "self_attn.k_proj")])
        assert not torch.equal(after[block(new, "self_attn.q_proj")], before[block(old, "self_attn.q_proj")])
    assert not torch.equal(after[block(0, "self_attn.q_proj")], after[block(2, "self_attn.q_proj")])
    assert values(tmp_path / "out") == {**values(tmp_path / "base"), "num_hidden_layers": 3}
    assert any("3 blocks" in warning for warning in report.warnings)


def test_its_files_are_no_larger_than_the_largest_of_the_base(world: Path) -> None:
    merge(world)
    sizes = {
        name: [sum(t.nbytes for t in load_file(path).values()) for path in (world / name).glob("model-*.safetensors")]
        for name in ("base", "out")
    }
    assert len(sizes["base"]) == 2
    assert len(sizes["out"]) > 1
    assert max(sizes["out"]) <= max(sizes["base"])
    index = json.loads((world / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes["out"])
    assert index["weight_map"].keys() == weights(world / "out").keys()
    merge(world, "one", max_shard_size="1MB")
    assert [path.name for path in (world / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert same_bits(weights(world / "one"), weights(world / "out"))


def _sliding() -> nn.Module:
    types = ["sliding_attention", "full_attention"]
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=3, layer_types=types))


def _without_rope() -> nn.Module:
    return tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**LLAMA, no_rope_layers=[0, 1]))


# A base, the architecture whose inputs and targets it has, and what the output's config says of its blocks.
FAMILIES: Mapping[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "qwen2": (_sliding, "qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "smollm3": (_without_rope, "llama", {"no_rope_layers": [1, 0, 1]}),
    "gpt2": (lambda: build("gpt2"), "gpt2", {"n_layer": 3}),
    "bert": (lambda: build("bert"), "bert", {"num_hidden_layers": 3}),
    "mixtral": (lambda: moe("mixtral"), "llama", {"num_hidden_layers": 3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_another_family(family: str, tmp_path: Path) -> None:
    make, arch, told = FAMILIES[family]
    torch.manual_seed(0)
    base: Any = make().eval()
    base.save_pretrained(tmp_path / "base")
    plain = logits(base, inputs(arch))
    targets = {"target_modules": ["q_proj", "v_proj"]} if arch == "llama" else {}
    model = veneer.get_peft_model(base, config(arch, layer_replication=RANGES, **targets), seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    merged = logits(veneer.load(tmp_path / "out"), inputs(arch))
    assert gap(merged, logits(model, inputs(arch))) < CLOSE
    assert gap(merged, plain) > 0.02
    assert values(tmp_path / "out").items() >= told.items()


def test_it_is_proved_and_taken_back(world: Path) -> None:
    # Blocks 0 and 2 lie at the same bytes of the base, and only one of them is changed.
    saved(world / "adapter", layer_replication=RANGES, layers_to_transform=[0])
    merge(world, reversible=True)
    assert veneer.verify(world / "out", adapter=world / "adapter", base=world / "base").passed
    assert veneer.verify(world / "out", adapter=world / "adapter", base=world / "base", sample=3, logits=False).passed
    veneer.unmerge(world / "out", out=world / "from-delta")
    veneer.unmerge(world / "out", out=world / "from-base", base=world / "base")
    for path in (world / "base").iterdir():
        assert (world / "from-delta" / path.name).read_bytes() == path.read_bytes()
        assert (world / "from-base" / path.name).read_bytes() == path.read_bytes()
    odd = block(2, "self_attn.k_proj")
    file = next(path for path in (world / "out").glob("*.safetensors") if odd in load_file(path))
    save_file({n: t + 1 if n == odd else t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    report = veneer.verify(world / "out", adapter=world / "adapter", base=world / "base", logits=False)
    assert report.different == [odd]


def test_it_goes_on_where_it_was_cut_off(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(world, "right")
    run = MergeLayer.run

    def dying(self: MergeLayer, sink: Any) -> Any:
        if self.outputs[0].startswith("model.layers.2."):
            raise KeyboardInterrupt
        return run(self, sink)

    with monkeypatch.context() as patch:
        patch.setattr(MergeLayer, "run", dying)
        with pytest.raises(KeyboardInterrupt):
            merge(world, resume=True)
    assert json.loads((world / ".out.merging" / "journal.json").read_text())["finished"]
    merge(world, resume=True)
    assert same_bits(weights(world / "out"), weights(world / "right"))


def test_what_cannot_be_is_refused(world: Path) -> None:
    saved(world / "plain")
    with pytest.raises(MergeError, match="different blocks"):
        veneer.merge([world / "adapter", world / "plain"], world / "base", out=world / "out")
    edit_config(world / "adapter", layer_replication=[[0, 9]])
    with pytest.raises(ConfigError, match="no range of this model's 2 blocks"):
        merge(world)
    edit_config(world / "adapter", layer_replication=RANGES)
    with pytest.raises(UnsupportedError, match="blocks of OPTForCausalLM were not found"):
        veneer.merge(world / "adapter", saved_base(world / "opt", "opt"), out=world / "out")
    uneven: Any = moe("qwen2_moe")
    uneven.config.mlp_only_layers = [0]
    uneven.save_pretrained(world / "uneven")
    with pytest.raises(UnsupportedError, match="differ by their number"):
        veneer.merge(world / "adapter", world / "uneven", out=world / "out")
    assert not (world / "out").exists()
