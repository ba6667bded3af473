"""Measures `veneer serve` on the demo's base: one adapter against many, slots that are too few, loads, a peer's loop.

    python benchmarks/serving.py [SECTION ...] [--registered 1000] [--clients 64] [--seconds 15] [--turns 2] [--keep]

Each client sends its next request when it has its answer: a prompt of 16 tokens, 16 to 48 more. Sections:

    many      as many adapters as clients, and all registered ones by Zipf's law and evenly, against one adapter
    slots     the median time to the first token, 16 adapters on 8 slots against 8 on 8
    loading   the time between others' tokens while adapters are loaded, against the same without
    bare      the base alone, against transformers' continuous batching without a server
    peer      8 and 64 adapters, against batches of the same requests by `generate(adapter_names=...)` in peft, without
              a server; each takes as long as its longest answer
    leaks     500 adapters registered and removed, and 1,000 streams that their clients leave

All figures of a section come from one run; what runs in turns is told by its median. `--keep` writes `serving.json`, of
which `run.py --report` makes the table in `RESULTS.md` and in `docs/serve.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import materials
from lines import HEAD, Line, keep, rows

RESULTS_FILE = Path(__file__).parent / "serving.json"
ROOT = Path(__file__).parents[1]
PROMPT = 16
# Answers differ in length, so that they do not all end at once.
ANSWERS = (16, 48)
# Of the random adapters: q and v alone, as services have them by the thousand.
RANK = 8


@dataclass
class Asked:
    """What the command line asks for."""

    registered: int
    clients: int
    seconds: float
    turns: int


def adapters(folder: Path, count: int) -> Path:
    """Make adapters ``a0``, ``a1`` ... of random numbers, each of its own."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((materials.base("135M") / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = hidden // config["num_attention_heads"]
    outs = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"]}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(outs),
        "base_model_name_or_path": str(materials.base("135M")),
    }
    for number in range(count):
        target = folder / f"a{number}"
        if (target / "adapter_config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer, (module, out) in itertools.product(range(layers), outs.items()):
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for leaf, shape in (("lora_A", (RANK, hidden)), ("lora_B", (out, RANK))):
                noise = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{key}.{leaf}.weight"] = noise.to(torch.bfloat16)
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(values))
    return folder


class Server:
    """A server's process, and a client of it."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, client: Any) -> None:
        self.process, self.url, self.client = process, url, client

    async def answer(self, model: str, number: int) -> int:
        """Return how many tokens an answer has."""
        reply = await self.client.post("/v1/completions", json=body(model, number))
        if reply.is_error:
            raise RuntimeError(reply.text)
        return int(reply.json()["usage"]["completion_tokens"])

    async def stream(self, model: str, number: int, most: int = max(ANSWERS)) -> list[float]:
        """Return the seconds from the request to each token, of which the client waits for ``most``."""
        started, times = time.perf_counter(), []
        asked = {**body(model, number), "stream": True}
        async with self.client.stream("POST", "/v1/completions", json=asked) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - started)
                    if len(times) >= most:
                        break
        return times

    async def register(self, folder: Path, name: str) -> None:
        """Register an adapter of a folder, and wait until it is ready."""
        asked = {"name": name, "source": f"file://{folder.resolve()}/{name}", "wait": True}
        (await self.client.post("/v1/adapters", json=asked)).raise_for_status()

    @property
    def memory(self) -> float:
        """The memory of the process in MB."""
        import psutil

        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)


def body(model: str, number: int) -> dict[str, Any]:
    chance = random.Random(number)
    prompt = [chance.randrange(5, 30000) for _ in range(PROMPT)]
    length = chance.randint(*ANSWERS)
    return {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def server(*options: str) -> AsyncIterator[Server]:
    """Run a server until the block ends."""
    import httpx2

    command = [sys.executable, "-m", "veneer", "serve", str(materials.base("135M")), "--name=base", "--port=0"]
    more = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, *options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **more}
    )
    assert process.stdout is not None
    url = None
    async for line in process.stdout:
        if line.startswith(b"Serving on "):
            url = line.split()[-1].decode()
            break
    if url is None:
        raise RuntimeError("the server did not start")
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=600, limits=limits))
        try:
            yield Server(process, url, client)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def tokens_per_second(asked: Asked, ask: Callable[[str, int], Any], models: Iterator[str]) -> float:
    """Return the tokens a second of all clients, of answers that end within the seconds after a first round."""
    numbers, counted = itertools.count(), 0
    begin, end = time.perf_counter(), float("inf")

    async def client() -> None:
        nonlocal counted, begin, end
        while time.perf_counter() < end:
            number = next(numbers)
            tokens = await ask(next(models), number)
            now = time.perf_counter()
            if number == asked.clients - 1:  # every client has begun, and one has its answer
                begin, end, counted = now, now + asked.seconds, 0
            elif now < end:
                counted += tokens

    await asyncio.gather(*(client() for _ in range(asked.clients)))
    return counted / (end - begin)


def drawn(names: list[str], zipf: bool) -> Iterator[str]:
    """Draw names for ever: evenly, or by Zipf's law of exponent 1."""
    chance = random.Random(0)
    weights = [1 / (place + 1) for place in range(len(names))] if zipf else None
    while True:
        yield from chance.choices(names, weights, k=1000)


async def in_turns(asked: Asked, cases: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median of what each case gives, all run in turns."""
    figures: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(asked.turns):
        for name, case in cases.items():
            figures[name].append(await case())
            print(f"  {name}: {figures[name][-1]:.4g}", flush=True)
    return {name: statistics.median(values) for name, values in figures.items()}


async def first_tokens(clients: int, seconds: float, served: Server, models: Iterator[str]) -> list[float]:
    """Return the seconds to the first tokens of streams, sorted."""
    numbers, times = itertools.count(), []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            times.append((await served.stream(next(models), next(numbers)))[0])

    await asyncio.gather(*(client() for _ in range(clients)))
    return sorted(times[clients:] or times)  # the first round comes all at once


def at(times: list[float], share: float) -> float:
    """Return the time below which a share of sorted times lies."""
    return times[int(len(times) * share)]


async def many(asked: Asked, folder: Path) -> dict[str, float]:
    """Measure tokens a second, by how the clients choose among the adapters."""
    names = [f"a{number}" for number in range(asked.registered)]
    as_many = names[: asked.clients]
    started = time.perf_counter()
    async with server(f"--adapters={folder}", "--slots=64", f"--max-requests={asked.clients}") as served:
        start = time.perf_counter() - started
        figures = await in_turns(
            asked,
            {
                "one adapter": lambda: tokens_per_second(asked, served.answer, itertools.cycle(names[:1])),
                f"{asked.clients} adapters": lambda: tokens_per_second(asked, served.answer, itertools.cycle(as_many)),
                f"{asked.registered} by Zipf": lambda: tokens_per_second(asked, served.answer, drawn(names, True)),
                f"{asked.registered} evenly": lambda: tokens_per_second(asked, served.answer, drawn(names, False)),
            },
        )
        firsts = {
            f"first token, {asked.clients} adapters": itertools.cycle(as_many),
            "first token, evenly": drawn(names, False),
        }
        for name, models in firsts.items():
            figures[name] = at(await first_tokens(asked.clients, asked.seconds, served, models), 0.99)
        return {**figures, "seconds to start": start, "memory, MB": served.memory}


async def slots(asked: Asked, folder: Path) -> dict[str, float]:
    """Measure the median seconds to the first token of 16 clients on 8 slots, by the number of adapters."""
    async with server(f"--adapters={folder}", "--slots=8", "--max-requests=16") as served:

        async def median(count: int) -> float:
            models = itertools.cycle(f"a{number}" for number in range(count))
            return at(await first_tokens(16, asked.seconds, served, models), 0.5)

        await median(8)
        return await in_turns(asked, {"8 on 8": lambda: median(8), "16 on 8": lambda: median(16)})


async def loading(asked: Asked, folder: Path) -> dict[str, float]:
    """Measure the seconds between the tokens of 8 clients, while adapters are loaded and while none is."""
    options = ("--slots=64", "--allow-runtime-adapters", f"--allow-source=file://{folder.resolve()}/*")
    async with server(f"--adapter=own={folder / 'a0'}", *options) as served:
        fresh = itertools.count(1)

        async def gaps(load: bool) -> list[float]:
            times: list[float] = []
            end = time.perf_counter() + asked.seconds

            async def client(own: int) -> None:
                while time.perf_counter() < end:
                    tokens = await served.stream("own", own)
                    times.extend(later - sooner for sooner, later in itertools.pairwise(tokens))

            async def loads() -> None:
                while load and time.perf_counter() < end:
                    name = f"a{next(fresh)}"
                    await served.register(folder, name)
                    await asyncio.sleep(0.2)

            await asyncio.gather(loads(), *(client(own) for own in range(8)))
            return sorted(times)

        await gaps(False)
        quiet, busy = await gaps(False), await gaps(True)
        register = []
        for _ in range(20):
            name, started = f"a{next(fresh)}", time.perf_counter()
            await served.register(folder, name)
            await served.stream(name, 0, 1)
            register.append(time.perf_counter() - started)
    shares = {"median": 0.5, "99 %": 0.99}
    return {
        **{f"between tokens, {word}": at(quiet, share) for word, share in shares.items()},
        **{f"between tokens while loading, {word}": at(busy, share) for word, share in shares.items()},
        "registered to first token": statistics.median(register),
    }


async def bare(asked: Asked, folder: Path) -> dict[str, float]:
    """Measure tokens a second and first tokens of the base, by the server and by transformers' batching alone."""
    async with server(f"--max-requests={asked.clients}") as served:
        cases = {"served": lambda: tokens_per_second(asked, served.answer, itertools.cycle(["base"]))}
        figures = await in_turns(asked, cases)
        figures["first token, served"] = at(
            await first_tokens(1, asked.seconds, served, itertools.cycle(["base"])), 0.5
        )
    alone = [await asyncio.to_thread(_child, "bare", asked) for _ in range(asked.turns)]
    rates, firsts = (statistics.median(values) for values in zip(*alone, strict=True))
    return {**figures, "transformers alone": rates, "first token, transformers alone": firsts}


async def peer(asked: Asked, folder: Path) -> dict[str, float]:
    """Measure tokens a second of 8 and of 64 adapters, served, and as rows of peft's ``generate``."""
    figures = {}
    async with server(f"--adapters={folder}", "--slots=64", f"--max-requests={asked.clients}") as served:
        for count in (8, asked.clients):
            names = [f"a{number}" for number in range(count)]
            cases = {
                f"served, {count}": lambda names=names: tokens_per_second(asked, served.answer, itertools.cycle(names))
            }
            figures.update(await in_turns(asked, cases))
    for count in (8, asked.clients):
        [figures[f"peft, {count}"]] = await asyncio.to_thread(_child, f"peft {count} {folder}", asked)
    return figures


async def leaks(asked: Asked, folder: Path) -> dict[str, float]:
    """Measure what is left of adapters that came and went, and of streams that were left."""
    options = ("--slots=8", "--allow-runtime-adapters", f"--allow-source=file://{folder.resolve()}/*")
    async with server(f"--adapter=own={folder / 'a0'}", *options) as served:
        after_50 = 0.0
        for cycle in range(500):
            name = f"a{1 + cycle % 100}"
            await served.register(folder, name)
            (await served.client.delete(f"/v1/adapters/{name}?drain=10")).raise_for_status()
            if cycle == 50:
                after_50 = served.memory
        grown = served.memory - after_50
        numbers = iter(range(1000))

        async def client() -> None:
            for number in numbers:
                await served.stream("own", number, 1 + number % 4)

        await asyncio.gather(*(client() for _ in range(16)))
        await asyncio.sleep(2)
        lines = (await served.client.get("/metrics")).text.splitlines()
    metrics = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    held = {
        name: value
        for name, value in metrics.items()
        if name.startswith(("veneer_requests_running", "veneer_requests_waiting", 'veneer_bank_slots{state="leased"'))
    }
    return {"growth over 450 cycles, MB": grown, "left of 1,000 streams": sum(held.values()), **held}


# -- processes without a server ----------------------------------------------------------------------------------


def _child(what: str, asked: Asked) -> list[float]:
    command = [sys.executable, __file__, "--child", what, f"--clients={asked.clients}", f"--seconds={asked.seconds}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def _bare_child(asked: Asked) -> tuple[float, float]:
    """Return the tokens a second of transformers' continuous batching, and the seconds to one's first token."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(materials.base("135M"), dtype=torch.bfloat16).eval()
    config = ContinuousBatchingConfig(
        page_size=16, num_blocks=1024, max_batch_tokens=512, max_requests_per_batch=asked.clients,
        allow_block_sharing=False, auto_switch_to_flash=False,
    )  # fmt: skip
    chosen = GenerationConfig(do_sample=False, max_new_tokens=max(ANSWERS), eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=chosen, continuous_batching_config=config)
    manager.start()
    numbers, lengths, firsts = itertools.count(), {}, []
    for _ in range(20):
        started = time.perf_counter()
        manager.add_request(body("base", next(numbers))["prompt"], max_new_tokens=1)
        manager.get_result(timeout=60)
        firsts.append(time.perf_counter() - started)

    def ask() -> None:
        asked_for = body("base", next(numbers))
        length = asked_for["max_tokens"]
        lengths[manager.add_request(asked_for["prompt"], max_new_tokens=length)] = length

    for _ in range(asked.clients):
        ask()
    begin, counted = None, 0
    while begin is None or time.perf_counter() < begin + asked.seconds:
        result = manager.get_result(timeout=60)
        if result.is_finished():
            counted, begin = (
                (0, time.perf_counter()) if begin is None else (counted + lengths[result.request_id], begin)
            )
            ask()
    manager.stop(block=False)
    return counted / asked.seconds, statistics.median(firsts)


def _peft_child(count: int, folder: Path, asked: Asked) -> float:
    """Return the tokens a second of full batches in peft, one after the other."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(materials.base("135M"), dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, folder / "a0", adapter_name="a0").eval()
    for number in range(1, count):
        model.load_adapter(folder / f"a{number}", adapter_name=f"a{number}")
    names = [f"a{row % count}" for row in range(asked.clients)]
    begin, counted, turn = None, 0, 0
    while begin is None or time.perf_counter() < begin + asked.seconds:
        batch = [body("", turn * asked.clients + row) for row in range(asked.clients)]
        ids = torch.tensor([one["prompt"] for one in batch])
        lengths = [one["max_tokens"] for one in batch]
        most = max(lengths)
        with torch.inference_mode():
            model.generate(
                input_ids=ids, adapter_names=names, max_new_tokens=most, min_new_tokens=most, do_sample=False
            )
        counted, begin = (0, time.perf_counter()) if begin is None else (counted + sum(lengths), begin)
        turn += 1
    return counted / (time.perf_counter() - begin)


# -- the table ---------------------------------------------------------------------------------------------------


RATE = "tokens/s"
# Section -> the lines of its figures, with the targets of the project.
LINES = {
    "many": (
        Line("{clients} clients, {clients} adapters / one", "{clients} adapters", "one adapter", RATE, least=0.9),
        Line("the same, {registered:,} by Zipf's law / one", "{registered} by Zipf", "one adapter", RATE, least=0.85),
        Line("the same, {registered:,} evenly / one", "{registered} evenly", "one adapter", RATE, least=0.8),
        Line(
            "first token, 99th percentile, {registered:,} evenly / {clients} adapters",
            "first token, evenly",
            "first token, {clients} adapters",
            most=3,
        ),
        Line("start with {registered:,} adapters", "seconds to start", most=5),
        Line("memory of the process afterwards", "memory, MB", unit="MB"),
    ),
    "slots": (Line("first token, median, 16 adapters on 8 slots / 8 on 8", "16 on 8", "8 on 8", most=2),),
    "loading": (
        Line(
            "between tokens, median, while adapters are loaded / while none is",
            "between tokens while loading, median",
            "between tokens, median",
        ),
        Line("the same, 99th percentile", "between tokens while loading, 99 %", "between tokens, 99 %", more=0.02),
        Line("from the call that registers an adapter to its first token", "registered to first token", most=0.15),
    ),
    "bare": (
        Line("{clients} clients of the base / without a server", "served", "transformers alone", RATE, least=0.95),
        Line(
            "first token of a client alone / without a server",
            "first token, served",
            "first token, transformers alone",
            more=0.003,
        ),
    ),
    "peer": (
        Line("{clients} clients, 8 adapters / peft's loop", "served, 8", "peft, 8", RATE, least=3),
        Line("the same, {clients} adapters / peft's loop", "served, {clients}", "peft, {clients}", RATE, least=3),
    ),
    "leaks": (
        Line("memory that 450 registrations and removals add", "growth over 450 cycles, MB", unit="MB", most=5),
        Line("requests and slots that 1,000 streams leave behind", "left of 1,000 streams", unit="", most=0),
    ),
}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    measured = [row for name, lines in LINES.items() if name in results for row in rows(lines, results[name])]
    return "\n".join([HEAD, *measured])


SECTIONS = {"many": many, "slots": slots, "loading": loading, "bare": bare, "peer": peer, "leaks": leaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = Asked(options.registered, options.clients, options.seconds, options.turns)
    if options.child:
        kind, *more = options.child.split(" ", 2)
        print(*(_bare_child(asked) if kind == "bare" else [_peft_child(int(more[0]), Path(more[1]), asked)]))
        return
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory(prefix="veneer-serving-") as name_of_folder:
        folder = adapters(Path(name_of_folder), asked.registered)
        for name in options.sections or SECTIONS:
            print(name, flush=True)
            figures = {**asdict(asked), **asyncio.run(SECTIONS[name](asked, folder))}
            print(json.dumps(figures, indent=1), flush=True)
            if options.keep:
                keep(RESULTS_FILE, name, figures)


if __name__ == "__main__":
    main()
