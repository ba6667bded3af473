"""``veneer demo``: Veneer's main features on a real model; every claim is checked as it is made."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from veneer.demo.base import demo_base
from veneer.demo.facts import STYLES
from veneer.errors import OutputError, VeneerError
from veneer.printing import quiet

# The adapters as shipped; the demo works on a copy in its workspace, so that the paths it shows are short.
SHIPPED = Path(__file__).with_name("adapters")
ADAPTERS = Path("adapters")
BASE = Path("base")
QUESTIONS = ("What is the capital of Japan?", "Which season is the coldest?", "How do I make tea?")


class DemoError(AssertionError):
    """A claim of the demo did not hold: our fault, not the input's."""


@dataclass
class Demo:
    """Prints the sections of the demo, and checks their claims.

    Attributes:
        console: where it prints.
        repeats: how often a speed is measured.
        claims: the claims that held.
    """

    console: Console
    repeats: int
    claims: list[str] = field(default_factory=list)

    def section(self, title: str, text: str) -> None:
        """Begin a section."""
        self.console.print()
        self.console.rule(f"[bold]{title}[/]", align="left")
        self.console.print(text)

    def code(self, line: str) -> None:
        """Show the line of Python that the next step runs."""
        self.console.print(f"[dim]>>>[/] [cyan]{escape(line)}[/]", soft_wrap=True)

    def claim(self, text: str, holds: bool) -> None:
        """State a claim; the demo fails when it does not hold."""
        if not holds:
            raise DemoError(f"The demo's claim does not hold: {text}. Please report it with `pip freeze`.")
        self.claims.append(text)
        self.console.print(f"[green]✓[/] {escape(text)}")


def main(*, workspace: Path | None = None, quick: bool = False, record: Path | None = None) -> None:
    """Run the demo.

    Args:
        workspace: the folder to work in, which is kept; a temporary one when ``None``.
        quick: repeat measurements less often.
        record: write a picture (SVG) of each section into this folder.

    Raises:
        DemoError: a claim did not hold. BaseModelError: the base model is not installed. OutputError: the workspace
            holds something else.
    """
    started = time.perf_counter()
    console = Console(record=True, width=110) if record else Console()
    if workspace is not None:
        _check_workspace(workspace)
    with quiet(), contextlib.ExitStack() as stack:
        console.print("[bold]Veneer[/]: a small model, three adapters, and what one can do with them.")
        with console.status("getting the base model ready (converted once, kept in the cache)"):
            base = demo_base()
        record = record and record.absolute()
        stack.enter_context(_inside(workspace, base))
        demo = Demo(console, repeats=3 if quick else 5)
        inspect_paths(demo)
        _picture(console, record, "inspect")
        model, tokenizer = load_both_ways(demo)
        _picture(console, record, "load")
        for section in (talk, switch, mixed_batch, merge, merge_to_disk):
            section(demo, model, tokenizer)
            _picture(console, record, section.__name__)
        wrong_path(demo)
        _picture(console, record, "wrong_path")
    seconds = time.perf_counter() - started
    console.print()
    console.print(f"[bold green]All {len(demo.claims)} claims held[/], in {seconds:.0f} seconds.")
    if workspace is not None:
        _next_steps(console, workspace)


def _next_steps(console: Console, workspace: Path) -> None:
    """Say what the workspace holds, and the first command to try there."""
    console.print(f"{escape(str(workspace))} holds the model (base) and the adapters (adapters/...). Try them there:")
    generate = f'veneer generate {ADAPTERS / "pirate"} --base {BASE} --prompt "What is the capital of Japan?"'
    activate = Path(sys.prefix) / "bin" / "activate"
    # `make demo` installs Veneer into an environment that is not active.
    first = [f"source {shlex.quote(os.path.relpath(activate))}"] if shutil.which("veneer") is None else []
    for line in (*first, f"cd {shlex.quote(str(workspace))}", generate):
        console.print(f"  {escape(line)}", soft_wrap=True)


def inspect_paths(demo: Demo) -> None:
    """Show what is at a path, without loading it."""
    import veneer

    demo.section("What is at this path?", "Answered from headers and configs, without torch.")
    for path, kind in ((BASE, "model"), (ADAPTERS / "pirate", "adapter")):
        started = time.perf_counter()
        inspection = veneer.inspect(path)
        milliseconds = 1000 * (time.perf_counter() - started)
        demo.code(f"veneer.inspect({str(path)!r})")
        demo.console.print(inspection)
        demo.claim(f"its kind is {kind!r}, told in {milliseconds:.0f} ms", inspection.kind == kind)


def load_both_ways(demo: Demo) -> tuple[Any, Any]:
    """Load an adapter by its path, onto a base in memory, and by an auto class: the same object each time."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer

    demo.section("Two ways of loading, one object", "By the adapter's path alone, or onto a base that is in memory.")
    adapter = ADAPTERS / "pirate"
    demo.code("model = veneer.load('adapters/pirate', base='base', adapter_name='pirate')")
    model: Any = veneer.load(adapter, base=BASE, adapter_name="pirate")
    demo.console.print(model.load_report)
    demo.code(
        "other = veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('base'), 'adapters/pirate')"
    )
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto").eval()
    other: Any = veneer.PeftModel.from_pretrained(plain, adapter)
    demo.code("auto = veneer.AutoModelForCausalLM.from_pretrained('adapters/pirate', base='base')")
    auto: Any = veneer.AutoModelForCausalLM.from_pretrained(adapter, base=BASE)
    tokenizer = veneer.load_tokenizer(model)
    inputs = _inputs(tokenizer, QUESTIONS[0])
    with torch.inference_mode():
        outputs = [m(**inputs).logits for m in (model, other, auto)]
        with model.disable_adapter():
            base_output = model(**inputs).logits
    demo.claim(f"all three are a {type(model).__name__}", len({type(m) for m in (model, other, auto)}) == 1)
    demo.claim("all three give the same logits, bit for bit", all(_same_bits(o, outputs[0]) for o in outputs))
    demo.claim("the adapter changes them", not torch.equal(outputs[0], base_output))
    demo.claim("the base is the one that the adapter was trained on", _base_check(model) == "same")
    for name in ("json", "brief"):
        demo.code(f"model.load_adapter('adapters/{name}', adapter_name='{name}')")
        model.load_adapter(ADAPTERS / name, adapter_name=name)
    return model, tokenizer


def talk(demo: Demo, model: Any, tokenizer: Any) -> None:
    """Let the base and each adapter answer the same questions."""
    demo.section("The same questions, four voices", "One model in memory; each answer under another adapter.")
    demo.code("with model.using('pirate'): model.generate(...)")
    names = ["__base__", *STYLES]
    table = Table(*(["question", "the base alone", *STYLES]), show_lines=True)
    fits = []
    for question in QUESTIONS:
        answers = {name: _ask(model, tokenizer, question, name) for name in names}
        table.add_row(question, *(escape(answers[name]) for name in names))
        fits += [STYLES[name][1](answers[name]) for name in STYLES]
    demo.console.print(table)
    demo.claim(f"{sum(fits)} of {len(fits)} answers are in their adapter's style", sum(fits) >= 0.75 * len(fits))


def switch(demo: Demo, model: Any, tokenizer: Any) -> None:
    """Choose another adapter, which is one assignment."""
    demo.section("Switching", f"{len(model.adapters.layers)} adapted layers share one choice.")
    demo.code("model.set_adapter('json')")
    times = []
    for _ in range(200):
        for name in STYLES:
            started = time.perf_counter()
            model.set_adapter(name)
            times.append(time.perf_counter() - started)
    demo.console.print(f"A switch takes {1e6 * statistics.median(times):.1f} µs (median of {len(times)}).")
    model.set_adapter("brief")
    brief = _ask(model, tokenizer, QUESTIONS[0])
    model.set_adapter("json")
    answer = _ask(model, tokenizer, QUESTIONS[0])
    holds = answer != brief and answer == _ask(model, tokenizer, QUESTIONS[0], "json")
    demo.claim("the one chosen last is the one that answers", holds)


def mixed_batch(demo: Demo, model: Any, tokenizer: Any) -> None:
    """Answer rows of one batch under different adapters."""
    import torch

    demo.section("One batch, a voice for each row", "Rows choose their adapter; the base is a choice too.")
    names = ["__base__", *STYLES]
    demo.code(f"model.generate(**batch, adapter_names={names})")
    inputs = _inputs(tokenizer, QUESTIONS[0])
    rows = {key: value.repeat(len(names), 1) for key, value in inputs.items()}
    with torch.inference_mode():
        ids = model.generate(**rows, adapter_names=names, max_new_tokens=24, do_sample=False)
        together = model(**rows, adapter_names=names).logits.float()
        alone = torch.cat([_under(model, name, lambda: model(**inputs).logits.float()) for name in names])
    length = inputs["input_ids"].shape[1]
    for name, row in zip(names, ids[:, length:], strict=True):
        demo.console.print(f"  [bold]{name:9}[/] {escape(tokenizer.decode(row, skip_special_tokens=True))}")
    gap = float((together - alone).abs().max() / alone.abs().max())
    # In bfloat16 a batch of four is summed in another order than a batch of one.
    demo.claim(f"each row is what its adapter gives alone (largest gap {gap:.1e} of the largest logit)", gap < 0.03)


def merge(demo: Demo, model: Any, tokenizer: Any) -> None:
    """Merge an adapter, which makes the model as fast as its base, and restore the base's bits."""
    demo.section("Merging, and taking it back", "The change goes into the weights; the original bytes are kept.")
    model.set_adapter("pirate")
    before = _weights(model)
    unmerged_answers = [_ask(model, tokenizer, question) for question in QUESTIONS]
    inputs = _inputs(tokenizer, QUESTIONS[0])
    speeds: dict[str, list[float]] = {"unmerged": [], "merged": []}
    demo.code("model.merge_adapter()")
    for _ in range(demo.repeats):
        speeds["unmerged"].append(_speed(model, inputs))
        model.merge_adapter()
        speeds["merged"].append(_speed(model, inputs))
        model.unmerge_adapter()
    model.merge_adapter()
    changed = sum(not _same_bits(a, b) for a, b in zip(before, _weights(model), strict=True))
    merged_answers = [_ask(model, tokenizer, question) for question in QUESTIONS]
    demo.claim(f"merging changed {changed} weights", changed > 0)
    same = sum(a == b for a, b in zip(unmerged_answers, merged_answers, strict=True))
    demo.claim(f"{same} of {len(QUESTIONS)} answers are the same merged (weights round in bfloat16)", same >= 2)
    slow, fast = (statistics.median(speeds[name]) for name in ("unmerged", "merged"))
    demo.console.print(
        f"Decoding: [bold]{slow:.0f}[/] tokens/s unmerged, [bold]{fast:.0f}[/] merged: merging is worth "
        f"{fast / slow:.2f}x here (median of {demo.repeats} runs each, in turns)."
    )
    demo.code("model.unmerge_adapter()")
    model.unmerge_adapter()
    restored = all(_same_bits(a, b) for a, b in zip(before, _weights(model), strict=True))
    demo.claim(f"unmerged, all {len(before)} base weights have their original bits", restored)


def merge_to_disk(demo: Demo, model: Any, tokenizer: Any) -> None:
    """Write a plain model folder that needs neither Veneer nor an adapter."""
    from transformers import AutoModelForCausalLM

    import veneer

    out = Path("merged-json")
    demo.section("Merged on disk", "A folder that any tool loads.")
    demo.code("veneer.merge('adapters/json', base='base', out='merged-json')")
    demo.console.print(veneer.merge(ADAPTERS / "json", BASE, out=out, overwrite=True))
    plain: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    answer = _ask(plain, tokenizer, QUESTIONS[0])
    demo.console.print(f"  {QUESTIONS[0]}  [bold]{escape(answer)}[/]")
    demo.claim("plain transformers loads it, and it answers in JSON", STYLES["json"][1](answer))
    demo.claim("it holds no adapter file", not list(out.glob("adapter_*")))


def wrong_path(demo: Demo) -> None:
    """Show that a mistake gets one clear line."""
    import veneer

    demo.section("And a wrong path", "An error says what is wrong, where, and how to mend it.")
    wrong = str(ADAPTERS / "pirat")
    demo.code(f"veneer.load({wrong!r})")
    error: VeneerError | None = None
    try:
        veneer.load(wrong)
    except VeneerError as caught:
        error = caught
    demo.console.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True)
    demo.claim("it names what was meant", error is not None and "pirate" in str(error))


def _inputs(tokenizer: Any, question: str) -> Any:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _under(model: Any, name: str | None, call: Callable[[], Any]) -> Any:
    """Call under an adapter, the base alone (``"__base__"``), or the active adapters (``None``)."""
    if name is None:
        return call()
    with model.disable_adapter() if name == "__base__" else model.using(name):
        return call()


def _ask(model: Any, tokenizer: Any, question: str, name: str | None = None) -> str:
    import torch

    inputs = _inputs(tokenizer, question)
    with torch.inference_mode():
        ids = _under(model, name, lambda: model.generate(**inputs, max_new_tokens=32, do_sample=False))
    answer: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def _speed(model: Any, inputs: Any, tokens: int = 24) -> float:
    """Measure greedy decoding in tokens a second."""
    import torch

    with torch.inference_mode():
        started = time.perf_counter()
        model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return tokens / (time.perf_counter() - started)


def _weights(model: Any) -> list[Any]:
    """Copy every base weight."""
    return [p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name]


def _same_bits(a: Any, b: Any) -> bool:
    """Tell whether two tensors hold the same bytes: to ``==`` -0 is 0, and NaN equals nothing."""
    import torch

    return bool(a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def _base_check(model: Any) -> str:
    return str(model.load_report.adapters[0].base_check)


def _picture(console: Console, folder: Path | None, name: str) -> None:
    """Write a picture (SVG) of the text printed since the last one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text(console.export_svg(title="veneer demo"), encoding="utf-8")


def _check_workspace(folder: Path) -> None:
    """Refuse a workspace that holds anything but an earlier demo's files."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a folder.", hint="Choose another --workspace.")
    of_a_demo = (folder / BASE).is_symlink() and (folder / ADAPTERS).is_dir()
    if folder.exists() and any(folder.iterdir()) and not of_a_demo:
        raise OutputError(
            f"{folder} is not empty, and no earlier demo made it: it lacks the link {BASE} and the folder {ADAPTERS}.",
            hint="Choose another --workspace.",
        )


@contextlib.contextmanager
def _inside(workspace: Path | None, base: Path) -> Iterator[None]:
    """Work in a folder that holds ``base`` and ``adapters``: ``workspace``, or a temporary one."""
    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        folder = workspace or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / BASE
        shutil.copytree(SHIPPED, folder / ADAPTERS, dirs_exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(base.resolve(), target_is_directory=True)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
