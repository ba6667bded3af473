"""Defines the measurements: a function for each section, run in a fresh process for one side, the same for both.

    python benchmarks/workloads.py SECTION MODEL DTYPE SIDE      prints {figure: seconds, megabytes or a ratio}

``SIDE`` is ``veneer`` or ``peft``; both offer the calls used here under the same names. An adapter is LoRA with r=16
on all linear layers unless a section says otherwise. What is to be compared within a section runs in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import materials

Figures = dict[str, float]
Action = Callable[[], Any]


def timed(action: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action(*arguments, **options)
    return time.perf_counter() - start, result


def in_turns(actions: Mapping[str, Action], times: int) -> Figures:
    """Return the median seconds of each action, run in turns after one untimed turn."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(times + 1):
        for name, action in actions.items():
            seconds = timed(action)[0]
            if turn:
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def named(prefix: str, figures: Figures, divisor: int = 1) -> Figures:
    return {f"{prefix} {name}": value / divisor for name, value in figures.items()}


def peak() -> float:
    """Return the peak memory of this process in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def own_memory() -> float:
    """Return the memory of this process in megabytes, without pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@dataclass(frozen=True)
class Bench:
    """One side of a comparison: the library, the base model, the dtype."""

    side: str
    model: str
    dtype: str

    @property
    def library(self) -> Any:
        return __import__(self.side)

    @property
    def large(self) -> bool:
        return self.model == "1B"

    @property
    def prompt(self) -> int:
        """The tokens of a prefill: those of the targets; on the large model as many as take seconds."""
        return 64 if self.large else 512

    @property
    def few(self) -> int:
        """The repeats of an action that takes seconds."""
        return 1 if self.large else 2

    def base(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        folder = materials.base(self.model)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype)).eval()

    def adapted(self, method: str = "LoRA", **options: Any) -> Any:
        folder = materials.adapter(self.model, method)
        return self.library.PeftModel.from_pretrained(self.base(), folder, **options).eval()

    def with_adapters(self, count: int) -> Any:
        """Make a model with the adapters ``a0``, ``a1`` ..., each in memory of its own."""
        folders = [materials.adapter(self.model, copy=index + 1) for index in range(count)]
        model = self.library.PeftModel.from_pretrained(self.base(), folders[0], adapter_name="a0").eval()
        for index in range(1, count):
            model.load_adapter(folders[index], adapter_name=f"a{index}")
        return model


# -- forward passes ----------------------------------------------------------------------------------------


def tokens(rows: int, length: int) -> Any:
    import torch

    return torch.randint(5, 30000, (rows, length), generator=torch.Generator().manual_seed(1))


def decode(model: Any, steps: int, rows: int = 1, prompt: int = 20, **choice: Any) -> Action:
    """Decode ``steps`` tokens a row; the prefill is not timed."""
    import torch
    from transformers import DynamicCache

    ids, one = tokens(rows, prompt), tokens(rows, 1)
    with torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, **choice).past_key_values

    @torch.inference_mode()
    def run() -> None:
        for _ in range(steps):
            model(input_ids=one, past_key_values=cache, use_cache=True, **choice)
        cache.crop(-steps)

    return run


def prefill(model: Any, length: int, rows: int = 1, **choice: Any) -> Action:
    import torch

    ids = tokens(rows, length)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1, **choice)

    return run


# -- sections ----------------------------------------------------------------------------------------------

# How far the peer is followed: each attach takes longer than the one before, and a thousand would take an hour.
LAST = {("veneer", "135M"): 1000, ("veneer", "1B"): 100, ("peft", "135M"): 16, ("peft", "1B"): 4}
# Seconds after which no further adapter is attached.
LONG = 90


def attach(bench: Bench) -> Figures:
    """Measure attaching adapters to a model in memory, one after the other; then switching between two.

    It is one file each time: a thousand of its size would take 10 GB of disk. Each adapter has tensors of its own.
    """
    import torch

    folder, base = materials.adapter(bench.model), bench.base()
    for parameter in base.parameters():
        parameter.sum()  # reads what is memory-mapped: the base's files are not what is measured
    # Imports are not what is measured either, early or late ones: see the section "process".
    tiny = bench.library.LoraConfig(target_modules=["0"])
    bench.library.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), tiny)
    attach_to = bench.library.PeftModel.from_pretrained
    first, model = timed(attach_to, base, folder)
    times = [first]
    before = own_memory()
    for index in range(2, LAST[bench.side, bench.model] + 1):
        times.append(timed(model.load_adapter, folder, adapter_name=f"a{index}")[0])
        if sum(times) > LONG:
            break
    figures = {"attach 1": first, "attach 2": times[1], "attach, MB": (own_memory() - before) / (len(times) - 1)}
    # With its two neighbours: now and then one of them meets Python's collection of garbage.
    figures.update({f"attach {i}": statistics.median(times[i - 3 : i]) for i in (16, 100, 1000) if i <= len(times)})
    switches = [timed(model.set_adapter, name)[0] for name in ["a2", "default"] * 20]
    return {**figures, "switch": statistics.median(switches)}


def forward(bench: Bench) -> Figures:
    """Measure decoding and a prefill of the base alone, with an adapter merged, and with one unmerged.

    All three run on one set of weights, for time depends on where these lie (by up to a quarter), not on their values.
    """
    merged = bench.adapted().merge_and_unload()
    unmerged = bench.library.PeftModel.from_pretrained(on_the_same_weights(merged), materials.adapter(bench.model))
    models = {"base": on_the_same_weights(merged), "merged": merged, "unmerged": unmerged.eval()}
    steps, turns = (4, 3) if bench.large else (16, 9)
    decodes = in_turns({name: decode(model, steps) for name, model in models.items()}, turns)
    prefills = in_turns({name: prefill(model, bench.prompt) for name, model in models.items()}, bench.few)
    return {**named("decode", decodes, steps), **named("prefill", prefills)}


def on_the_same_weights(model: Any) -> Any:
    """Copy a model's modules over the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def train(bench: Bench) -> Figures:
    """Measure a training step on 4 rows of 16 tokens, one on the large model: forward, backward, AdamW."""
    import torch

    model = bench.adapted(is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = tokens(1 if bench.large else 4, 16)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return in_turns({"train step": step}, 1 if bench.large else 3)


def mixed(bench: Bench) -> Figures:
    """Measure decoding and a prefill of 8 rows with 1 to 8 adapters, and with one in the usual way."""
    model, length, steps = bench.with_adapters(8), bench.prompt // 8, 2 if bench.large else 8
    choices = {str(count): [f"a{row % count}" for row in range(8)] for count in (1, 2, 4, 8)}
    decodes = {name: decode(model, steps, 8, adapter_names=rows) for name, rows in choices.items()}
    prefills = {name: prefill(model, length, 8, adapter_names=rows) for name, rows in choices.items()}
    model.set_adapter("a0")
    decodes["one"], prefills["one"] = decode(model, steps, 8), prefill(model, length, 8)
    return {
        **named("mixed decode", in_turns(decodes, bench.few), steps),
        **named("mixed prefill", in_turns(prefills, bench.few)),
    }


def mixed64(bench: Bench) -> Figures:
    """Measure decoding of 64 rows with 64 adapters, and with one."""
    model = bench.with_adapters(64)
    many = decode(model, 4, 64, 4, adapter_names=[f"a{row}" for row in range(64)])
    model.set_adapter("a0")
    one = decode(model, 4, 64, 4)
    return named("64 rows decode", in_turns({"64": many, "one": one}, 4), 4)


def merge(bench: Bench) -> Figures:
    """Measure merging in memory, the weights resident; unmerging; and merging for good."""
    model = bench.adapted()
    for parameter in model.parameters():
        parameter.sum()
    merges, unmerges = [], []
    for _ in range(2 if bench.large else 5):
        merges.append(timed(model.merge_adapter)[0])
        unmerges.append(timed(model.unmerge_adapter)[0])
    final = timed(model.merge_and_unload)[0]
    return {
        "merge": statistics.median(merges),
        "unmerge": statistics.median(unmerges),
        "merge and unload": final,
    }


def load(bench: Bench) -> Figures:
    """Measure loading a merged model from files, beside loading the base alone."""
    import torch

    folder = materials.adapter(bench.model)
    options = {"base": materials.base(bench.model), "dtype": getattr(torch, bench.dtype), "merge": True}
    ways = {
        "peft": lambda: bench.library.PeftModel.from_pretrained(bench.base(), folder).merge_and_unload(),
        "veneer": lambda: bench.library.load(folder, **options),
    }
    figures = in_turns({"load base": bench.base, "load merged": ways[bench.side]}, 1 if bench.large else 3)
    return {**figures, "peak of load merged, MB": peak()}


def save(bench: Bench) -> Figures:
    """Measure saving an adapter."""
    model = bench.adapted()
    with tempfile.TemporaryDirectory() as folder:
        return in_turns({"save": lambda: model.save_pretrained(folder)}, 5)


def memory(bench: Bench) -> Figures:
    """Measure the process's peak memory with one adapter in use."""
    prefill(bench.adapted(), 64)()
    return {"peak in use, MB": peak()}


def methods(bench: Bench, method: str) -> Figures:
    """Measure a method unmerged beside the base: the ratios of decoding and of a prefill of 64 tokens."""
    plain, model = bench.base(), bench.adapted(method)
    return {
        "decode": beside(decode(plain, 8), decode(model, 8)),
        "prefill": beside(prefill(plain, 64), prefill(model, 64)),
    }


def beside(base: Action, own: Action) -> float:
    """Return the time as a multiple of the base's, the median over turns; an action of seconds is run once."""
    first = timed(own)[0]
    if first > 5:
        return first / in_turns({"base": base}, 3)["base"]
    timed(base)
    return statistics.median([timed(own)[0] / timed(base)[0] for _ in range(9 if first < 1.5 else 3)])


def process(bench: Bench) -> Figures:
    """Time whole processes: the import, after torch and transformers and alone; ``inspect``."""

    def whole(*command: str) -> float:
        arguments = [sys.executable, *command]
        return min(timed(subprocess.run, arguments, check=True, stdout=subprocess.DEVNULL)[0] for _ in range(3))

    code = (
        "import time, torch, transformers; transformers.AutoModelForCausalLM; start = time.perf_counter(); "
        f"import {bench.side}; {bench.side}.PeftModel; print(time.perf_counter() - start)"
    )
    figures = {
        "import after torch": min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    }
    figures["import"] = whole("-c", f"import {bench.side}") - whole("-c", "pass")
    if bench.side == "veneer":
        without = "import sys, veneer; veneer.inspect(sys.argv[1]); assert 'torch' not in sys.modules"
        whole("-c", without, str(materials.adapter("135M")))
        figures["inspect"] = whole("-m", "veneer", "inspect", str(materials.adapter("135M")), "--json")
    return figures


SECTIONS: Mapping[str, Callable[..., Figures]] = {
    section.__name__: section
    for section in (attach, forward, train, mixed, mixed64, merge, load, save, memory, methods, process)
}


def options(doc: str | None) -> argparse.ArgumentParser:
    """Make the options of a script that measures one model in one process, and keeps its figures."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("135M", "1B"), default="135M")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--keep", action="store_true", help="keep the figures")
    return parser


def hush() -> None:
    """Leave standard output to the figures: no progress bars, and no warnings that are peft's own."""
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", help=f"{', '.join(SECTIONS)}; methods with one of them, as in methods:LoRA")
    parser.add_argument("model", choices=("135M", "1B"))
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("side", choices=("veneer", "peft"))
    asked = parser.parse_args()
    hush()
    section, _, method = asked.section.partition(":")
    figures = SECTIONS[section](Bench(asked.side, asked.model, asked.dtype), *([method] if method else []))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
