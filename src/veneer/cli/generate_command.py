"""``veneer generate``."""

from __future__ import annotations

import json as json_module
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.cli.options import Base, BaseArgument, Device, Dtype, Json, Local, Revision, given_base
from veneer.cli.stop_strings import before_stop, settled, stopping_criterion
from veneer.cli.terminal import print_warnings, progress
from veneer.errors import ConfigError, UsageError, VeneerError
from veneer.printing import first_line, printable_prose, quiet

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.peft_model.peft_model import PeftModel

_OTHER_TOKENIZER = "Is it this model's? An adapter's own tokenizer comes before the base's."


def generate(
    path: Annotated[str, typer.Argument(help="An adapter, a set of adapters or a model.")],
    prompt: Annotated[str, typer.Option(help="What to say to it; - reads standard input.")],
    base_argument: BaseArgument = None,
    base: Base = None,
    adapter: Annotated[str | None, typer.Option(help='Which adapter of a set; "__base__" is the base alone.')] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base first.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="At most this many tokens.")
    ] = 128,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message of the chat.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token; by default 1 with --top-p or --top-k.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens with this probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from this many tokens; 0: from all.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    json: Json = False,
    local_files_only: Local = False,
) -> None:
    """Answer a prompt, word by word."""
    base = given_base(base_argument, base)
    options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p, top_k)}
    stops = _checked(stop or [])
    text = _read_prompt() if prompt == "-" else prompt
    with quiet() as warnings:
        with progress("loading"):
            from veneer.benching.measure.machine import device_of
            from veneer.peft_model.load import load
            from veneer.peft_model.tokenizer import load_tokenizer

            torch_device = None if device is None else device_of(device)
            model = load(
                path,
                base=base,
                merge=merge and adapter is None,
                dtype=dtype,
                revision=revision,
                local_files_only=local_files_only,
            )
            if merge and adapter is not None:
                _merge(model, adapter)
            if torch_device is not None:
                model.to(torch_device)
            tokenizer = load_tokenizer(model)
            inputs = _inputs(tokenizer, text, system, chat)
        print_warnings([*warnings, *(model.load_report.warnings if model.load_report else ())])
        warnings.clear()
        started = time.perf_counter()
        with _chosen(model, None if merge else adapter):
            answer, tokens = _answer(model, tokenizer, inputs, not json, seed, stops, **options)
        seconds = time.perf_counter() - started
        active = model.active_adapters if adapter is None else [adapter]
    print_warnings(warnings)
    if json:
        report = model.load_report.to_dict() if model.load_report else {}
        result = {"prompt": text, "answer": answer, "adapters": active, "new_tokens": tokens, "seconds": seconds}
        print(json_module.dumps({**result, "load_report": report}, indent=2))


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """Return the sampling options of ``generate``; without any, the likeliest token is taken."""
    limits = {name: limit for name, limit in (("top_p", top_p), ("top_k", top_k)) if limit is not None}
    if temperature is None:
        temperature = 1.0 if limits else 0.0
    if temperature:
        return {"do_sample": True, "temperature": temperature, **limits}
    if limits:
        raise UsageError(
            "--temperature 0 takes the likeliest token, and --top-p and --top-k are for sampling.",
            hint="Leave out one of them.",
        )
    return {"do_sample": False}


def _checked(stops: list[str]) -> list[str]:
    if "" in stops:
        raise UsageError("--stop is an empty string.", hint="Give the text that ends the answer.")
    return stops


def _read_prompt() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("Standard input is no text in this terminal's encoding.", hint="Give it as UTF-8.") from error


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


def _inputs(tokenizer: Any, text: str, system: str | None, chat: bool) -> Any:
    if chat and tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        return _templated(tokenizer, messages)
    if system:
        raise UsageError(
            "--system needs a chat template, and the tokenizer has none or --no-chat is given.",
            hint="Put the instruction into the prompt.",
        )
    with _by_tokenizer("take the prompt apart"):
        inputs = tokenizer(text, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise UsageError("The prompt is empty: it gives no tokens.", hint="Say something with --prompt.")
    return inputs


def _by_tokenizer(what: str) -> AbstractContextManager[None]:
    return transformers_errors_as(ConfigError, f"The tokenizer cannot {what}", _OTHER_TOKENIZER)


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """Apply the chat template. It is a program, if a confined one, and can fail in any way that programs do."""
    hint = "--no-chat leaves it out."
    try:
        with transformers_errors_as(ConfigError, "The tokenizer's chat template refuses", hint):
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    except MemoryError as error:
        raise ConfigError("The tokenizer's chat template asks for more memory than there is.", hint=hint) from error
    if not inputs["input_ids"].numel():
        raise ConfigError("The tokenizer's chat template makes no tokens of the prompt.", hint=hint)
    return inputs


def _check_tokens(tokens: Tensor, model: PeftModel) -> None:
    """Raise ``ConfigError`` for a token that the model has no embedding of."""
    rows = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= rows:
        raise ConfigError(
            f"The tokenizer gives the token {int(tokens.max())}, and the model knows {rows}.", hint=_OTHER_TOKENIZER
        )


def _answer(
    model: PeftModel, tokenizer: Any, inputs: Any, stream: bool, seed: int | None, stops: list[str], **options: Any
) -> tuple[str, int]:
    import torch

    if not model.can_generate():
        raise ConfigError(
            f"{type(model.get_base_model()).__name__} does not generate text.",
            hint="Load a model with a language head.",
        )
    if seed is not None:
        torch.manual_seed(seed)
    _check_tokens(inputs["input_ids"], model)
    streamer = _streamer(tokenizer, stops) if stream else None
    # An encoder-decoder's output does not begin with the prompt.
    prompt_length = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    if stops:
        options["stopping_criteria"] = [stopping_criterion(partial(_decoded, tokenizer), prompt_length, stops)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        try:
            ids = model.generate(**inputs.to(model.device), streamer=streamer, pad_token_id=pad, **options)[0]
        except ValueError as error:  # how transformers refuses what generation_config.json asks for
            if isinstance(error, VeneerError):
                raise
            raise ConfigError(
                f"transformers refuses to generate: {first_line(error)}.", hint="See the base's generation_config.json."
            ) from error
    new = ids[prompt_length:]
    return before_stop(_decoded(tokenizer, new, skip_special_tokens=True), stops), len(new)


def _decoded(tokenizer: Any, tokens: Tensor, **options: Any) -> str:
    with _by_tokenizer("put the answer together"):
        return str(tokenizer.decode(tokens, **options))


def _streamer(tokenizer: Any, stops: list[str]) -> Any:
    """Make a streamer that prints each word of the answer as it comes, in a form that cannot steer the terminal."""
    from transformers import TextStreamer

    class Printed(TextStreamer):
        text = ready = ""
        printed = 0

        def put(self, value: Any) -> None:
            self._print(super().put, value)

        def end(self) -> None:
            self._print(super().end)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            shown = before_stop(self.text, stops) if stream_end else settled(self.text, stops)
            self.ready = shown[self.printed :] + "\n" * stream_end
            self.printed = len(shown)

        def _print(self, decode: Any, *tokens: Any) -> None:
            with _by_tokenizer("put the answer together"):
                decode(*tokens)
            # Through a pipe too, whose end may be a terminal; --json has the text as it is.
            print(printable_prose(self.ready), end="", flush=True)
            self.ready = ""

    return Printed(tokenizer, skip_prompt=True, skip_special_tokens=True)
