"""``veneer generate``."""

from __future__ import annotations

import json as json_module
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from veneer.cli import options as shared
from veneer.cli.generation_options import GenerationOptions, generation
from veneer.cli.options import PATH_OR_ID, given_base, switch
from veneer.cli.terminal import decoding_stdin, print_warnings, progress
from veneer.errors import UsageError
from veneer.printing import quiet

if TYPE_CHECKING:
    from veneer.peft_model.peft_model import PeftModel


@click.command()
@click.argument("path", type=PATH_OR_ID, help="An adapter, a set of adapters or a model.")
@shared.base_argument
@click.option("--prompt", required=True, help="What to say to it; - reads standard input.")
@shared.base
@click.option("--adapter", help='Which adapter of a set; "__base__" is the base alone.')
@switch("--merge", "Merge the adapter into the base first.")
@generation(128)
@shared.revision
@shared.as_json
@shared.local_files_only
def generate(
    path: str,
    base_argument: str | None,
    prompt: str,
    base: str | None,
    adapter: str | None,
    merge: bool,
    generation: GenerationOptions,
    device: str | None,
    json: bool,
    **loading: Any,
) -> None:
    """Answer a prompt, word by word.

    Example: veneer generate path/to/adapter path/to/base --prompt "Hello"
    """
    base = given_base(base_argument, base)
    text = _read_prompt() if prompt == "-" else prompt
    if generation.template and not text.strip():
        raise UsageError("The prompt is empty.", hint="Give a text, or --no-chat to go on from the first token.")
    with quiet() as warnings:
        with progress("loading"):
            from veneer.cli.load_generator import load_generator, seed_sampling
            from veneer.cli.text_generator import system_message

            generator = load_generator(
                path,
                generation,
                device,
                base=base,
                merge=merge and adapter is None,
                **loading,
            )
            model = generator.model
            if merge and adapter is not None:
                _merge(model, adapter)
            generator.check_system(generation.system)
            inputs = generator.encode([*system_message(generation.system), {"role": "user", "content": text}])
        print_warnings([*warnings, *(model.load_report.warnings if model.load_report else ())])
        warnings.clear()
        started = time.perf_counter()
        seed_sampling(generation.seed)
        with _chosen(model, None if merge else adapter):
            [(answer, tokens)] = generator.answers(inputs, None if json else generator.streamer())
        seconds = time.perf_counter() - started
        active = model.active_adapters if adapter is None else [adapter]
    print_warnings(warnings)
    if json:
        report = model.load_report.to_dict() if model.load_report else {}
        result = {"prompt": text, "answer": answer, "adapters": active, "new_tokens": tokens, "seconds": seconds}
        print(json_module.dumps({**result, "load_report": report}, indent=2))


def _read_prompt() -> str:
    with decoding_stdin():
        return sys.stdin.read()


def _merge(model: PeftModel, adapter: str) -> None:
    """Merge one adapter of a set, as ``load(merge=True)`` does with the active ones."""
    from veneer.patches.selection import BASE

    if adapter == BASE:
        raise UsageError(
            f"--merge puts an adapter into the base, and --adapter {BASE} asks for the base alone.",
            hint="Leave out one of the two.",
        )
    model.set_adapter(adapter)
    model.merge_and_unload()
    if model.load_report is not None:
        model.load_report.merged = True


def _chosen(model: PeftModel, adapter: str | None) -> Any:
    if adapter is None:
        return nullcontext()
    from veneer.patches.selection import BASE

    return model.disable_adapter() if adapter == BASE else model.using(adapter)
