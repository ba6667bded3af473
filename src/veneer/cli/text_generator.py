"""Generates the text of answers for ``generate`` and ``chat``: from messages to tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.cli.generation_options import GenerationOptions
from veneer.errors import ConfigError, UsageError, VeneerError
from veneer.peft_model.stop_strings import before_stop, settled, stopping_criterion
from veneer.printing import first_line, printable_prose

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.peft_model.peft_model import PeftModel

Message = dict[str, str]

_OTHER_TOKENIZER = "Is it this model's? An adapter's own tokenizer comes before the base's."


class TextGenerator:
    """Generates answers by a model and its tokenizer, always with the same options."""

    def __init__(self, model: PeftModel, tokenizer: Any, options: GenerationOptions) -> None:
        if not model.can_generate():
            raise ConfigError(
                f"{type(model.get_base_model()).__name__} does not generate text.",
                hint="Load a model with a language head.",
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options

    @property
    def uses_template(self) -> bool:
        """True where messages go through the tokenizer's chat template."""
        return self.options.template and bool(self.tokenizer.chat_template)

    def check_system(self, system: str | None) -> None:
        """Raise ``UsageError`` for a system message where there is no chat template."""
        if system and not self.uses_template:
            raise UsageError(
                "--system needs a chat template, and the tokenizer has none or --no-chat is given.",
                hint="Put the instruction into the prompt.",
            )

    def encode(self, messages: Sequence[Message]) -> Any:
        """Return the tokens of a conversation, a line for each message where there is no chat template."""
        inputs = self._templated(messages) if self.uses_template else self._plain(messages)
        _check_tokens(inputs["input_ids"], self.model)
        return inputs

    def answers(self, inputs: Any, streamer: Any = None, **choice: Any) -> list[tuple[str, int]]:
        """Return the answer to each row of ``inputs``, and the number of its tokens.

        Args:
            inputs: as :meth:`encode` returns them.
            streamer: gets the tokens as they come.
            **choice: of the adapters, as :meth:`PeftModel.generate` has it.
        """
        import torch

        tokenizer, options = self.tokenizer, dict(self.options.keywords, **choice)
        # An encoder-decoder's output does not begin with the prompt.
        prompt_length = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        if self.options.stops:
            criterion = stopping_criterion(partial(_decoded, tokenizer), prompt_length, self.options.stops)
            options["stopping_criteria"] = [criterion]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.inference_mode():
            try:
                rows = self.model.generate(
                    **inputs.to(self.model.device), streamer=streamer, pad_token_id=pad, **options
                )
            except ValueError as error:  # how transformers refuses what generation_config.json asks for
                if isinstance(error, VeneerError):
                    raise
                raise ConfigError(
                    f"transformers refuses to generate: {first_line(error)}.",
                    hint="See the base's generation_config.json.",
                ) from error
        return [(self.text(row[prompt_length:]), len(row) - prompt_length) for row in rows]

    def text(self, tokens: Tensor) -> str:
        """Return the text of an answer's tokens, up to the first stop string."""
        return before_stop(_decoded(self.tokenizer, tokens, skip_special_tokens=True), self.options.stops)

    def streamer(self) -> Any:
        """Make a streamer that prints each word of an answer as it comes, in a form that cannot steer the terminal.

        Its attribute ``shown`` is what it has printed so far.
        """
        from transformers import TextStreamer

        stops = self.options.stops

        class Printed(TextStreamer):
            text = shown = ready = ""

            def put(self, value: Any) -> None:
                self._print(super().put, value)

            def end(self) -> None:
                self._print(super().end)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                self.text += text
                shown = before_stop(self.text, stops) if stream_end else settled(self.text, stops)
                self.ready = shown[len(self.shown) :] + "\n" * stream_end
                self.shown = shown

            def _print(self, decode: Any, *tokens: Any) -> None:
                with _by_tokenizer("put the answer together"):
                    decode(*tokens)
                # Through a pipe too, whose end may be a terminal; --json has the text as it is.
                print(printable_prose(self.ready), end="", flush=True)
                self.ready = ""

        return Printed(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _plain(self, messages: Sequence[Message]) -> Any:
        with _by_tokenizer("take the prompt apart"):
            inputs = self.tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
        if not inputs["input_ids"].numel():
            raise UsageError("The prompt is empty: it gives no tokens.", hint="Say something with --prompt.")
        return inputs

    def _templated(self, messages: Sequence[Message]) -> Any:
        """Apply the chat template. It is a program, if a confined one, and can fail in any way that programs do."""
        hint = "--no-chat leaves it out."
        try:
            with transformers_errors_as(ConfigError, "The tokenizer's chat template refuses", hint):
                inputs = self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        except MemoryError as error:
            raise ConfigError("The tokenizer's chat template asks for more memory than there is.", hint=hint) from error
        if not inputs["input_ids"].numel():
            raise ConfigError("The tokenizer's chat template makes no tokens of the prompt.", hint=hint)
        return inputs


def system_message(text: str | None) -> list[Message]:
    """Return the messages that a conversation with this system message begins with."""
    return [{"role": "system", "content": text}] if text else []


def _by_tokenizer(what: str) -> AbstractContextManager[None]:
    return transformers_errors_as(ConfigError, f"The tokenizer cannot {what}", _OTHER_TOKENIZER)


def _decoded(tokenizer: Any, tokens: Tensor, **options: Any) -> str:
    with _by_tokenizer("put the answer together"):
        return str(tokenizer.decode(tokens, **options))


def _check_tokens(tokens: Tensor, model: PeftModel) -> None:
    """Raise ``ConfigError`` for a token that the model has no embedding of."""
    rows = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= rows:
        raise ConfigError(
            f"The tokenizer gives the token {int(tokens.max())}, and the model knows {rows}.", hint=_OTHER_TOKENIZER
        )
