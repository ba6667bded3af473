"""Run as a program: what each step of a model's life adds to this process's memory, in MiB, as JSON on stdout."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import veneer

# Float32 matrices of 16 MiB: 128 MiB altogether.
LAYERS, WIDTH = 8, 2048
LIBC = ctypes.CDLL("libc.so.6")
# mallopt's M_MMAP_THRESHOLD: freed blocks go back at once, so that the resident size is what is held.
THRESHOLD = -3


class Base(nn.Module):
    """A model that is all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measured(step: Callable[[], object]) -> dict[str, float]:
    """What a step adds to the resident size: at its peak, and after it."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    peak = status("VmHWM") - before
    settle()
    return {"peak": peak, "held": status("VmRSS") - before}


def settle() -> None:
    gc.collect()
    LIBC.malloc_trim(0)


def main() -> None:
    torch.set_num_threads(1)
    LIBC.mallopt(THRESHOLD, 65536)
    config = veneer.LoraConfig(target_modules=[f"layers.{i}" for i in range(LAYERS)], init_lora_weights=False)
    model = veneer.get_peft_model(Base(), config, seed=1).eval()
    x = torch.randn(1, WIDTH)

    def switch() -> None:
        for name in ("b", "default"):
            model.set_adapter(name)
            model(x)

    def mixed() -> None:
        with model.adapters.using(model.adapters.rows(["b", "default"])):
            model(torch.cat([x, x]))

    def round_trip() -> None:
        model.add_adapter("b", config, seed=2)
        switch()
        mixed()
        model.merge_adapter()
        model.unmerge_adapter()
        model.delete_adapter("b")
        model.set_adapter("default")

    round_trip()  # what is loaded or built once is not of interest
    steps: dict[str, Callable[[], object]] = {
        "attach": lambda: model.add_adapter("b", config, seed=2),
        "switch": switch,
        "mixed batch": mixed,
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "merge for good": model.merge_and_unload,
    }
    json.dump({name: measured(step) for name, step in steps.items()}, sys.stdout)


if __name__ == "__main__":
    main()
