"""Compares merging from disk to disk with `cp -r` and with peft: seconds and peak memory of whole processes.

Veneer's output is on the disk when its process ends; that of the others is on its way there, so the time until then
stands beside.

The models have random weights: "135M" the shape of SmolLM2-135M, "1B" that of TinyLlama, "large" that of Llama 3 8B
with as many layers as --layers says (32 take 16 GB). bfloat16, LoRA r=16 on all linear layers.

    python benchmarks/merge_to_disk.py [--models 135M 1B] [--sides cp veneer peft] [--layers 6] [--data LIMIT_IN_MB]

`--data` limits the memory of Veneer's processes (RLIMIT_DATA: all but mapped files). `--keep` writes what was measured
into `merge_to_disk.json`, from which `make bench` makes its table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1B": {
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "large": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
RESULTS_FILE = Path(__file__).parent / "merge_to_disk.json"
VENEER = "import sys, veneer; veneer.merge(sys.argv[1], sys.argv[2], out=sys.argv[3])"
PEFT = (
    "import sys, torch, transformers, peft\n"
    "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)\n"
    "peft.PeftModel.from_pretrained(base, sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[3])\n"
)


def make(name: str, layers: int, folder: Path) -> None:
    """Write a base, a file at a time, and an adapter of it; no more than one file's tensors are in memory."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import veneer

    config = transformers.LlamaConfig(**{"num_hidden_layers": layers, **SHAPES[name]}, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    (folder / "base").mkdir(parents=True)
    config.save_pretrained(folder / "base")
    torch.manual_seed(0)
    values = (torch.randn(1 << 24) * 0.02).bfloat16()
    parts: list[dict[str, Any]] = [{}]
    for key, parameter in model.named_parameters():
        if sum(t.nbytes for t in parts[-1].values()) > 2e9:
            _save(parts[-1], folder, len(parts), save_file)
            parts[-1] = dict.fromkeys(parts[-1])
            parts.append({})
        repeated = values.repeat(-(-parameter.numel() // len(values)))
        parts[-1][key] = repeated[: parameter.numel()].view(parameter.shape).clone()
    _save(parts[-1], folder, len(parts), save_file)
    index = {key: f"model-{i:05d}.safetensors" for i, part in enumerate(parts, start=1) for key in part}
    if len(parts) == 1:
        (folder / "base" / "model-00001.safetensors").rename(folder / "base" / "model.safetensors")
    else:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "base" / "model.safetensors.index.json").write_text(text)
    lora = veneer.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    lora.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tensors = {}
    for key, module in model.named_modules():
        if key.rpartition(".")[2] in lora.target_modules:
            out, inner = module.weight.shape
            tensors[f"base_model.model.{key}.lora_A.weight"] = torch.randn(16, inner) * 0.02
            tensors[f"base_model.model.{key}.lora_B.weight"] = torch.randn(out, 16) * 0.02
    lora.save_pretrained(folder / "adapter")
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def _save(part: dict[str, Any], folder: Path, number: int, save_file: Any) -> None:
    save_file(part, folder / "base" / f"model-{number:05d}.safetensors", metadata={"format": "pt"})


def run(command: list[Any], limit: int | None) -> tuple[float, float, float]:
    """Measure the seconds of a process, those until its output is on the disk, and its peak memory in MB."""

    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))

    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], preexec_fn=before, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed: {process.returncode}")
    seconds = time.perf_counter() - started
    os.sync()
    return seconds, time.perf_counter() - started, usage.ru_maxrss / 1024


def table(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    lines = ["| base | side | memory limit | seconds | until on the disk | peak MB |", "|---|---|---|---|---|---|"]
    for row in results.values():
        limit = "" if row["limit"] is None else f"{row['limit']} MB"
        times = f"{row['seconds']:.1f} | {row['on disk']:.1f} | {row['peak']:.0f}"
        lines.append(f"| {row['model']}, {row['GB']:.1f} GB | {row['side']} | {limit} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135M", "1B"], choices=SHAPES)
    parser.add_argument("--sides", nargs="+", default=["cp", "veneer", "peft"], choices=["cp", "veneer", "peft"])
    parser.add_argument("--layers", type=int, default=6, help="of the large model")
    parser.add_argument("--data", type=int, help="limit of the process's own memory in MB (RLIMIT_DATA)")
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--keep", action="store_true", help="write the figures beside those kept before")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS_FILE.read_text()) if asked.keep and RESULTS_FILE.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        print(f"{'model':8}{'side':8}{'seconds':>10}{'on disk':>10}{'peak MB':>10}", flush=True)
        for name in asked.models:
            folder = work / (name if name != "large" else f"{name}{asked.layers}")
            if not folder.exists():
                make(name, asked.layers, folder)
            for side in asked.sides:
                base, adapter, out = folder / "base", folder / "adapter", folder / "out"
                code = {"veneer": VENEER, "peft": PEFT}.get(side)
                command = ["cp", "-r", base, out] if code is None else [sys.executable, "-c", code, adapter, base, out]
                limit = asked.data if side == "veneer" else None
                seconds, on_disk, peak = run(command, limit)
                print(f"{name:8}{side:8}{seconds:10.2f}{on_disk:10.2f}{peak:10.0f}", flush=True)
                shutil.rmtree(out)
                size = sum(path.stat().st_size for path in base.iterdir()) / 1e9
                row = {"model": name, "GB": size, "side": side, "limit": limit}
                results[f"{name} {side} {limit}"] = {**row, "seconds": seconds, "on disk": on_disk, "peak": peak}
    if asked.keep:
        RESULTS_FILE.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
