"""Veneer beside peft on the demo's base: attaching, switching, decoding. CPU, bfloat16, LoRA r=16, all linear layers.

Each figure is the median over fresh processes that alternate between the two, since this kind of machine drifts
by up to a factor of two within minutes. The ratios hold; the absolute times are this machine's today.

    python benchmarks/first.py [--base FOLDER] [--rounds 3] [--tokens 32]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAPTERS = 16
FIGURES = {
    "first": "attach the first adapter",
    "last": f"attach adapter {ADAPTERS}",
    "switch": "switch the active adapter",
    "unmerged": "decode a token, unmerged",
    "merge": "merge_and_unload",
    "merged": "decode a token, merged",
}


def timed(action: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action(*arguments, **options)
    return time.perf_counter() - start, result


def make_adapter(base: Path, folder: Path) -> None:
    """A random adapter whose every tensor is non-zero: nothing can be skipped as having no effect."""
    import torch
    import transformers

    import veneer

    torch.manual_seed(0)
    config = veneer.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = veneer.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    model.to(torch.bfloat16).save_pretrained(folder)


def measure(side: str, base: Path, adapter: Path, tokens: int) -> dict[str, float]:
    """All figures of one side, in seconds, in this process."""
    import torch
    import transformers

    library = __import__(side)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}
    found["first"], model = timed(library.PeftModel.from_pretrained, model, adapter)
    for index in range(2, ADAPTERS + 1):
        found["last"], _ = timed(model.load_adapter, adapter, adapter_name=f"a{index}")
    names = ["a2", "default"] * 10
    found["switch"] = statistics.median(timed(model.set_adapter, name)[0] for name in names)
    found["unmerged"] = decode(model, tokens)
    found["merge"], model = timed(model.merge_and_unload)
    found["merged"] = decode(model, tokens)
    return found


def decode(model: Any, tokens: int) -> float:
    """Seconds a token: the best of four greedy generations."""
    import torch

    ids = torch.arange(5, 25)[None]
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    return min(timed(model.generate, **prompt, **settings)[0] for _ in range(4)) / tokens


def in_fresh_process(side: str, base: Path, adapter: Path, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--base", base, "--adapter", adapter, "--tokens", tokens]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a model folder; the demo's base unless given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--side", choices=("veneer", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(measure(asked.side, asked.base, asked.adapter, asked.tokens)))
        return
    from veneer.demo.base import demo_base

    # The table is the output: no progress bars, and no warnings that are peft's own.
    os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore")
    base = asked.base or demo_base()
    with tempfile.TemporaryDirectory() as folder:
        make_adapter(base, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {"veneer": [], "peft": []}
        for _ in range(asked.rounds):
            for side, results in runs.items():
                results.append(in_fresh_process(side, base, Path(folder), asked.tokens))
    show(runs)


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'milliseconds':28}{'veneer':>10}{'peft':>10}{'peft/veneer':>13}")
    for key, label in FIGURES.items():
        ours, theirs = (1e3 * statistics.median(run[key] for run in runs[side]) for side in ("veneer", "peft"))
        print(f"{label:28}{ours:10.3f}{theirs:10.3f}{theirs / ours:13.2f}")
    ours, theirs = (statistics.median(r["unmerged"] / r["merged"] for r in runs[side]) for side in ("veneer", "peft"))
    print(f"{'decode, unmerged / merged':28}{ours:10.2f}{theirs:10.2f}")


if __name__ == "__main__":
    main()
