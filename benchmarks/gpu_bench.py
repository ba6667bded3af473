"""Measures LoRA on one GPU: peft, Veneer, and the frozen or merged base as the limit.

    python benchmarks/gpu_bench.py [--out DIR] [--only train,decode] [--seconds 340]     one H100, under 6 minutes
    python benchmarks/gpu_bench.py --smoke                                               tiny, on the CPU

Nothing is downloaded, and the weights are random. A section runs all sides on one set of weights, one after the other,
adapters put on and taken off. Absolute times go to the log; what is judged are ratios taken in one run. Written are
``gpu_bench.json`` and the same as a table, ``gpu_bench.md``.

    ceilings   what a copy and a bfloat16 product reach here
    layer      one 4096 x 4096 layer, forward and backward
    train      a step on the 1B shape: time, and peak memory above the weights
    decode     a token: eager, and the linear layers alone in a CUDA graph; kernels, operations and waits of a pass
    prefill    2,048 tokens
    mixed      8 and 64 rows, each its own adapter, beside one adapter for all; the products by three ways of torch
    manage     attaching, the first pass after a switch, merging, unmerging
    big        decode and prefill, training with checkpointing, on the 8B shape
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import veneer

PLACES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "tiny": (64, 128, 2, 4, 2),
    "1B": (2048, 5632, 22, 32, 4),
    "8B": (4096, 14336, 32, 32, 8),
}
RANK = 16
LIBRARIES: Mapping[str, Any] = {"peft": peft, "peft bf16": peft, "veneer": veneer}
DTYPE = torch.bfloat16


@dataclass
class Figure:
    """One figure; it passes while it stays below ``limit``."""

    section: str
    what: str
    side: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def verdict(self) -> str:
        """Whether it passes; empty where it is not judged."""
        return "" if self.limit is None else "met" if self.value <= self.limit else "missed"


class Report:
    """Collects figures, and prints each as it comes."""

    def __init__(self, smoke: bool) -> None:
        self.smoke, self.figures, self.began = smoke, list[Figure](), time.perf_counter()

    @property
    def seconds(self) -> float:
        """The time since it began."""
        return time.perf_counter() - self.began

    def add(self, section: str, what: str, side: str, value: float, unit: str, limit: float | None = None) -> None:
        """Add a figure; a tiny shape on a CPU is not judged."""
        figure = Figure(section, what, side, value, unit, None if self.smoke else limit)
        self.figures.append(figure)
        bound = f"  (at most {limit:g}: {figure.verdict})" if figure.verdict else ""
        print(f"{self.seconds:6.1f}s {section:8} {what:46} {side:10} {value:10.3f} {unit}{bound}", flush=True)

    def ratio(self, section: str, what: str, times: Mapping[str, float], other: str, limit: float | None) -> None:
        """Add what Veneer takes as a multiple of another side."""
        self.add(section, f"{what} / {other}", "veneer", times["veneer"] / times[other], "x", limit)

    def write(self, folder: Path, device: str) -> None:
        """Write all figures as JSON and as a table."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"device": device, "torch": torch.__version__, "figures": [asdict(figure) for figure in self.figures]}
        (folder / "gpu_bench.json").write_text(json.dumps(facts, indent=1) + "\n")
        lines = [
            f"# {device}, torch {torch.__version__}",
            "",
            "| | what | side | | at most | |",
            "|---|---|---|---|---|---|",
        ]
        for f in self.figures:
            limit = "" if f.limit is None else f"{f.limit:g}"
            lines.append(f"| {f.section} | {f.what} | {f.side} | {f.value:.3f} {f.unit} | {limit} | {f.verdict} |")
        (folder / "gpu_bench.md").write_text("\n".join(lines) + "\n")


class Machine:
    """Measures on the GPU, or with ``smoke`` on the CPU, where the figures mean nothing."""

    def __init__(self, smoke: bool) -> None:
        self.smoke, self.device = smoke, "cpu" if smoke else "cuda"

    def wait(self) -> None:
        """Wait for the device."""
        if not self.smoke:
            torch.cuda.synchronize()

    def once(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Return the time of one call in ms, and its result."""
        self.wait()
        before = time.perf_counter()
        result = action()
        self.wait()
        return (time.perf_counter() - before) * 1e3, result

    def ms(self, action: Callable[[], Any], repeats: int = 7, warm: int = 2) -> float:
        """Return the median time of a call in ms, the device waited for each time."""
        repeats = min(repeats, 2) if self.smoke else repeats
        return statistics.median([self.once(action)[0] for _ in range(warm + repeats)][warm:])

    def device_ms(self, action: Callable[[], Any], repeats: int = 20, warm: int = 5) -> float:
        """Return the same by the device's own clock, without the wait for the host."""
        if self.smoke:
            return self.ms(action, warm=1)
        for _ in range(warm):
            action()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in pairs:
            start.record()
            action()
            end.record()
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    def graph_ms(self, action: Callable[[], Any]) -> float:
        """Return the time of one replay as a CUDA graph."""
        if self.smoke:
            return self.ms(action)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                action()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return self.device_ms(graph.replay, 30)

    def peak_mb(self, action: Callable[[], Any]) -> float:
        """Return the most memory taken while a call runs, above what was taken before."""
        if self.smoke:
            action()
            return 1.0
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def waits(self, action: Callable[[], Any]) -> int:
        """Return how often the host waits for the device inside a call."""
        if self.smoke:
            return 0
        action()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in told)

    def kernels(self, action: Callable[[], Any]) -> int:
        """Return the number of kernels that a call launches."""
        if self.smoke:
            return 0
        from torch.profiler import ProfilerActivity, profile

        action()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            action()
            self.wait()
        return sum("CUDA" in str(event.device_type) and "Memcpy" not in event.name for event in seen.events())


class Operations(TorchDispatchMode):
    """Counts the operations that make something: no views, no detach."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or "detach" in str(function) or "view" in str(function))
        return function(*args, **(kwargs or {}))


# -- models and adapters ---------------------------------------------------------------------------------------


def base(machine: Machine, shape: str) -> Any:
    """A frozen Llama of a shape, in bfloat16."""
    hidden, inner, blocks, heads, key_heads = SHAPES["tiny" if machine.smoke else shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=256 if machine.smoke else 32000,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval().requires_grad_(False)


def adapter(model: nn.Module, folder: Path) -> Path:
    """A folder with a LoRA on all seven kinds of layers, in bfloat16, every tensor random."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(PLACES)):
            key = f"base_model.model.{name}.lora_"
            tensors[key + "A.weight"] = torch.randn(RANK, module.in_features).mul_(0.02).to(DTYPE)
            tensors[key + "B.weight"] = torch.randn(module.out_features, RANK).mul_(0.02).to(DTYPE)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": PLACES}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "none"}))
    return folder


@contextlib.contextmanager
def loaded(side: str, model: Any, folder: Path) -> Iterator[Any]:
    """Put an adapter on a model for inference, and take it off afterwards."""
    if side == "merged":
        yield model
        return
    options = {"autocast_adapter_dtype": False} if side == "peft bf16" else {}
    adapted = LIBRARIES[side].PeftModel.from_pretrained(model, folder, **options).eval()
    try:
        yield adapted
    finally:
        adapted.unload()
        gc.collect()


@contextlib.contextmanager
def trained(side: str, model: Any, dropout: float) -> Iterator[Any]:
    """Put a new adapter to be trained on a model, and take it off afterwards."""
    if side == "frozen":
        yield model.train()
        model.eval()
        return
    options = {"r": RANK, "lora_alpha": RANK, "lora_dropout": dropout, "target_modules": PLACES}
    library = LIBRARIES[side]
    adapted = library.get_peft_model(model, library.LoraConfig(task_type="CAUSAL_LM", **options)).train()
    try:
        yield adapted
    finally:
        adapted.unload()
        model.requires_grad_(False).eval()
        gc.collect()


def inner_model(model: Any) -> Any:
    """The base of a model with adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tokens(machine: Machine, rows: int, length: int) -> Tensor:
    """Random ids, shape ``(rows, length)``."""
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(1)).to(machine.device)


def autocast(machine: Machine, on: bool) -> contextlib.AbstractContextManager[Any]:
    """A block under autocast, or a plain one."""
    return torch.autocast(machine.device, DTYPE) if on else contextlib.nullcontext()


# -- sections --------------------------------------------------------------------------------------------------


def ceilings(report: Report, machine: Machine) -> None:
    """Measure what the device reaches."""
    size = 256 if machine.smoke else 8192
    a, b = torch.randn(2, size, size, device=machine.device).to(DTYPE)
    teraflops = 2 * size**3 / machine.device_ms(lambda: a @ b) / 1e9
    report.add("ceilings", f"bfloat16 product {size}", "torch", teraflops, "TFLOP/s")
    source = torch.empty(2**20 if machine.smoke else 2**30, dtype=DTYPE, device=machine.device)
    target = torch.empty_like(source)
    rate = 4 * source.numel() / machine.device_ms(lambda: target.copy_(source)) / 1e6
    report.add("ceilings", "copy, read and written", "torch", rate, "GB/s")


def layer(report: Report, machine: Machine) -> None:
    """Measure one layer forward and backward."""
    size, counts = (64, (32,)) if machine.smoke else (4096, (1024, 8192))
    for count in counts:
        x = torch.randn(count, size, device=machine.device).to(DTYPE).requires_grad_()
        for what, dropout, casts in (("", 0.0, False), (" dropout", 0.1, False), (" autocast", 0.0, True)):
            times = {}
            for side in ("frozen", "peft", "veneer"):
                step = layer_step(machine, side, x, dropout, casts)
                times[side] = machine.device_ms(step, 10, 3)
                label = f"{size} x {size}, {count} tokens{what}"
                report.add("layer", label, side, times[side], "ms")
                report.add("layer", label + ", peak", side, machine.peak_mb(step), "MB")
            # A frozen layer's two products, and what little more has to be read and written.
            long = count > 2048
            report.ratio("layer", f"{count} tokens{what}", times, "frozen", 1.35 if long else None)
            report.ratio("layer", f"{count} tokens{what}", times, "peft", 0.8 if long else None)


def layer_step(machine: Machine, side: str, x: Tensor, dropout: float, casts: bool) -> Callable[[], None]:
    """A step through one layer, adapted by ``side``."""
    torch.manual_seed(0)
    size = x.shape[-1]
    module: Any = nn.Sequential(nn.Linear(size, size, bias=False)).to(machine.device, DTYPE).requires_grad_(False)
    if side != "frozen":
        options = {"r": RANK, "lora_alpha": RANK, "lora_dropout": dropout, "target_modules": ["0"]}
        library = LIBRARIES[side]
        module = library.get_peft_model(module, library.LoraConfig(**options)).train()
    adapted, grad = inner_model(module)[0], torch.randn_like(x)

    def step() -> None:
        with autocast(machine, casts):
            y = adapted(x)
        y.backward(grad)
        x.grad = None

    return step


TRAINING = (
    ("float32 adapters", 0.0, False, False),
    ("dropout 0.05", 0.05, False, False),
    ("autocast, dropout", 0.05, True, False),
    ("autocast, checkpointing", 0.0, True, True),
)


def train(report: Report, machine: Machine, shape: str = "1B", cases: Any = TRAINING) -> None:
    """Measure whole steps."""
    rows, length = (2, 16) if machine.smoke else (8, 1024)
    model, ids = base(machine, shape), tokens(machine, rows, length)
    for what, dropout, casts, checkpointed in cases:
        times, peaks = {}, {}
        for side in ("frozen", "peft", "veneer"):
            with trained(side, model, dropout) as adapted, checkpointing(adapted, checkpointed):
                step = train_step(machine, adapted, ids, casts)
                times[side] = machine.ms(step, 4)
                peaks[side] = machine.peak_mb(step)
            report.add("train", f"{shape}, {rows} x {length}, {what}", side, times[side], "ms")
            report.add("train", f"{shape}, {what}, peak above weights", side, peaks[side], "MB")
        report.ratio("train", f"{shape}, {what}: step", times, "peft", 0.9)
        report.ratio("train", f"{shape}, {what}: step", times, "frozen", 1.25)
        report.ratio("train", f"{shape}, {what}: peak", peaks, "peft", 0.85 if checkpointed else 0.7)


@contextlib.contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Checkpoint the blocks inside."""
    if on:
        inner_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield
    if on:
        inner_model(model).gradient_checkpointing_disable()


def train_step(machine: Machine, model: Any, ids: Tensor, casts: bool) -> Callable[[], None]:
    """A step whose gradient reaches the input, so that all sides compute the same."""
    embeds = inner_model(model).get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        with autocast(machine, casts):
            loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        embeds.grad = None

    return step


def decoding(machine: Machine, model: Any, rows: int, steps: int, **choice: Any) -> Callable[[], None]:
    """Some tokens behind a prompt of 32."""
    one = tokens(machine, rows, 1)
    with torch.no_grad():
        prompt = tokens(machine, rows, 32)
        cache = model(input_ids=prompt, past_key_values=DynamicCache(), use_cache=True, **choice).past_key_values

    @torch.no_grad()
    def run() -> None:
        for _ in range(steps):
            model(input_ids=one, past_key_values=cache, use_cache=True, **choice)
        cache.crop(-steps)

    return run


def linear_layers(model: Any, x: Tensor) -> Callable[[], None]:
    """All adapted layers of a model, on inputs of the right shapes, without what lies between."""
    blocks = [(block.self_attn, block.mlp) for block in inner_model(model).model.layers]

    @torch.no_grad()
    def run() -> None:
        for attention, mlp in blocks:
            q = attention.q_proj(x)
            attention.k_proj(x), attention.v_proj(x), attention.o_proj(q)
            gate = mlp.gate_proj(x)
            mlp.up_proj(x), mlp.down_proj(gate)

    return run


def prefilling(machine: Machine, model: Any, length: int) -> Callable[[], None]:
    """A pass over a prompt."""
    ids = tokens(machine, 1, length)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return run


def decode(report: Report, machine: Machine, shape: str = "1B") -> None:
    """Measure a token after the other, and a prompt."""
    model, steps, length = base(machine, shape), 2 if machine.smoke else 8, 32 if machine.smoke else 2048
    x = torch.randn(1, 1, model.config.hidden_size, device=machine.device).to(DTYPE)
    eager: dict[int, dict[str, float]] = {1: {}, 8: {}}
    graphs: dict[str, float] = {}
    prefills: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = adapter(model, Path(folder) / "a")
        for side in ("merged", *LIBRARIES):
            with loaded(side, model, place) as adapted:
                for rows, times in eager.items():
                    times[side] = machine.ms(decoding(machine, adapted, rows, steps)) / steps
                    report.add("decode", f"{shape}, {rows} rows, eager", side, times[side], "ms/token")
                one = decoding(machine, adapted, 1, 1)
                with Operations() as operations:
                    one()
                report.add("decode", f"{shape}, operations of a pass", side, operations.count, "")
                report.add("decode", f"{shape}, kernels of a pass", side, machine.kernels(one), "")
                none = 0 if side == "veneer" else None
                report.add("decode", f"{shape}, waits of a pass", side, machine.waits(one), "", none)
                graphs[side] = machine.graph_ms(linear_layers(adapted, x))
                report.add("decode", f"{shape}, linear layers, CUDA graph", side, graphs[side], "ms")
                prefills[side] = machine.ms(prefilling(machine, adapted, length))
                report.add("prefill", f"{shape}, {length} tokens", side, prefills[side], "ms")
    for rows, times in eager.items():
        report.ratio("decode", f"{shape}, {rows} rows, eager", times, "merged", 1.25)
    report.ratio("decode", f"{shape}, graph", graphs, "merged", 1.3 if shape == "8B" else 1.7)
    report.ratio("prefill", f"{shape}, {length} tokens", prefills, "merged", 1.15)


def mixed(report: Report, machine: Machine) -> None:
    """Measure batches whose rows have adapters of their own."""
    model, counts = base(machine, "1B"), (2, 4) if machine.smoke else (8, 64)
    with tempfile.TemporaryDirectory() as folder:
        places = [adapter(model, Path(folder) / "a0")]
        places += [Path(shutil.copytree(places[0], Path(folder) / f"a{n}")) for n in range(1, max(counts))]
        for side in ("peft", "veneer"):
            with loaded(side, model, places[0]) as adapted:
                for count in counts:
                    if side == "veneer" or count <= 8:  # each that peft attaches takes longer than the one before
                        mixed_rows(report, machine, side, adapted, places[:count])
    products(report, machine)


def mixed_rows(report: Report, machine: Machine, side: str, model: Any, places: list[Path]) -> None:
    """Measure as many rows as there are adapters."""
    names = [place.name for place in places]
    for name, place in zip(names, places, strict=True):
        if name not in model.peft_config:
            model.load_adapter(place, adapter_name=name)
    model.set_adapter(names[0])
    count, steps = len(names), 2 if machine.smoke else 4
    one = machine.ms(decoding(machine, model, count, steps), 3) / steps
    run = decoding(machine, model, count, steps, adapter_names=names)
    many = machine.ms(run, 3) / steps
    judged = side == "veneer"
    report.add("mixed", f"{count} rows, {count} adapters, eager", side, many, "ms/token")
    report.add("mixed", f"{count} adapters / one", side, many / one, "x", 1.25 if judged else None)
    report.add(
        "mixed", f"{count} adapters, waits of a pass", side, machine.waits(run) / steps, "", 0 if judged else None
    )
    if judged:
        x = torch.randn(count, 1, model.config.hidden_size, device=machine.device).to(DTYPE)
        single = machine.graph_ms(linear_layers(model, x))
        with model.adapters.using(model.adapters.rows(names)):
            together = machine.graph_ms(linear_layers(model, x))
        report.add("mixed", f"{count} adapters / one, linear layers, graph", side, together / single, "x", 1.25)


def products(report: Report, machine: Machine) -> None:
    """Measure the change of one layer for rows of several adapters, by three ways of torch."""
    size = 64 if machine.smoke else 4096
    for count, each in ((8, 1), (64, 1), (8, 64), (64, 16)):
        what = f"{count} adapters x {each} rows, {size}, graph"
        for name, way in product_ways(machine, size, count, each).items():
            try:
                report.add("mixed", what, name, machine.graph_ms(way) * 1e3, "us")
            except RuntimeError as error:
                print(f"mixed {what} {name}: {str(error)[:100]}")


def product_ways(machine: Machine, size: int, count: int, each: int) -> dict[str, Callable[[], Any]]:
    """The ways by name."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=machine.device).to(DTYPE)

    x, y, down, up = (
        random(count, each, size),
        random(count, each, size),
        random(count, size, RANK),
        random(count, RANK, size),
    )
    ways: dict[str, Callable[[], Any]] = {
        "bmm, add": lambda: y.add_(torch.bmm(torch.bmm(x, down), up)),
        "baddbmm": lambda: y.baddbmm_(torch.bmm(x, down), up),
    }
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is not None and not machine.smoke:
        flat, out = x.flatten(0, 1), y.flatten(0, 1)
        ends = torch.arange(each, count * each + 1, each, dtype=torch.int32, device=machine.device)
        ways["grouped"] = lambda: out.add_(grouped(grouped(flat, down, offs=ends), up, offs=ends))
    return ways


def manage(report: Report, machine: Machine) -> None:
    """Measure what is done with adapters between passes."""
    model = base(machine, "1B")
    times: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = adapter(model, Path(folder) / "a")
        for side in ("peft", "veneer"):
            for what, value in managed(machine, LIBRARIES[side], model, place).items():
                times.setdefault(what, {})[side] = value
                report.add("manage", what, side, value, "ms")
            gc.collect()
    for what, limit in (("attach the first", 0.2), ("attach the second", 0.05), ("merge", 1.0), ("unmerge", 0.2)):
        report.ratio("manage", what, times[what], "peft", limit)


def managed(machine: Machine, library: Any, model: Any, place: Path) -> dict[str, float]:
    """The least time of each in ms."""
    times: dict[str, float] = {}

    def timed(what: str, action: Callable[[], Any]) -> Any:
        took, result = machine.once(action)
        times[what] = min(times.get(what, took), took)
        return result

    library.PeftModel.from_pretrained(model, place).unload()  # late imports
    adapted = timed("attach the first", lambda: library.PeftModel.from_pretrained(model, place).eval())
    timed("attach the second", lambda: adapted.load_adapter(place, adapter_name="b"))
    one = decoding(machine, adapted, 1, 1)
    times["a token"] = machine.ms(one)
    for name in ("b", "default", "b", "default"):
        adapted.set_adapter(name)
        timed("first token after a switch", one)
    for _ in range(3):
        timed("merge", adapted.merge_adapter)
        timed("unmerge", adapted.unmerge_adapter)
    adapted.unload()
    return times


def big(report: Report, machine: Machine) -> None:
    """Measure the 8B shape."""
    if not machine.smoke:
        decode(report, machine, "8B")
        train(report, machine, "8B", TRAINING[3:])


SECTIONS: dict[str, Callable[[Report, Machine], None]] = {
    "ceilings": ceilings,
    "layer": layer,
    "train": train,
    "decode": decode,
    "mixed": mixed,
    "manage": manage,
    "big": big,
}


def main() -> None:
    """Measure the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder that is written to")
    parser.add_argument("--seconds", type=float, default=340, help="no section is begun after so long")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no section {min(unknown)}; there are {', '.join(SECTIONS)}")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke runs a tiny version on the CPU")
    report, machine = Report(options.smoke), Machine(options.smoke)
    device = "CPU" if options.smoke else torch.cuda.get_device_name()
    failed = []
    for name in names:
        if report.seconds > options.seconds:
            print(f"{name}: not begun, time is up")
            continue
        try:
            SECTIONS[name](report, machine)
        except Exception as error:  # the other sections' figures are worth having
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        gc.collect()
        report.write(options.out, device)
    verdicts = [figure.verdict for figure in report.figures if figure.verdict]
    print(f"\n{verdicts.count('met')} of {len(verdicts)} met, {report.seconds:.0f} s")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
