"""transformers' own integration of adapters, with Veneer in the place of peft, against the same with peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from tests.as_peft.process import printed
from tests.models import build, inputs, logits
from tests.random_adapters import saved

OPEN = """
    import torch
    from tests.models import build, inputs, logits
    def moved(x, y): return bool((x - y).abs().max() > 1e-3)
    model = build("llama")
    batch = inputs("llama")
    base = logits(model, batch)
"""


def values(lines: list[str]) -> dict[str, Any]:
    return dict(line.split(" ", 1) for line in lines)


def test_add_adapter_and_choose() -> None:
    lines = printed(
        OPEN
        + """
    from peft import LoraConfig
    for name, targets in {"a": ["q_proj"], "b": ["v_proj"]}.items():
        model.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False), name)
    b = logits(model, batch)
    model.set_adapter("a")
    a = logits(model, batch)
    model.set_adapter(["a", "b"])
    both = logits(model, batch)
    print("active", model.active_adapters())
    model.disable_adapters()
    print("off", torch.equal(logits(model, batch), base))
    model.enable_adapters()
    print("on", torch.equal(logits(model, batch), both), moved(a, base), moved(b, base), moved(both, a))
    model.delete_adapter("b")
    print("deleted", torch.allclose(logits(model, batch), a), list(model.peft_config))
    model.delete_adapter("a")
    print("plain", torch.equal(logits(model, batch), base), hasattr(model, "peft_config"))
    """
    )
    assert values(lines) == {
        "active": "['a', 'b']",
        "off": "True",
        "on": "True True True True",
        "deleted": "True ['a']",
        "plain": "True False",
    }


def test_load_adapter_answers_as_with_peft(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", seed=1)
    model = build("llama")
    model.load_adapter(str(folder))
    expected = logits(model, inputs("llama"))
    torch.save(expected, tmp_path / "expected.pt")
    lines = printed(
        OPEN
        + f"""
    folder, expected = {str(folder)!r}, torch.load({str(tmp_path / "expected.pt")!r})
    print("info", model.load_adapter(folder).missing_keys)
    print("same", torch.allclose(logits(model, batch), expected, atol=1e-5))
    model.save_pretrained({str(tmp_path / "again")!r})
    other = build("llama")
    other.load_adapter({str(tmp_path / "again")!r}, adapter_name="x")
    print("again", torch.equal(logits(other, batch), logits(model, batch)))
    import copy, pickle
    print("copy", torch.equal(logits(copy.deepcopy(model), batch), logits(model, batch)))
    print("pickle", torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), logits(model, batch)))
    """
    )
    assert values(lines) == {"info": "set()", "same": "True", "again": "True", "copy": "True", "pickle": "True"}


def test_a_second_adapter_is_active_at_once_as_with_peft() -> None:
    model = build("llama")
    for name in ("a", "b"):
        model.__dict__.pop("peft_config", None)  # of which peft warns
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model, name)
    expected = model.model.layers[0].self_attn.q_proj.active_adapters
    lines = printed(
        OPEN
        + """
    import peft
    for name in ("a", "b"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model, name)
    print(model.model.layers[0].self_attn.q_proj.active_adapters)
    """
    )
    assert lines == [str(expected)]
