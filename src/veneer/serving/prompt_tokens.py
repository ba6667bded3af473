"""Turns conversations and texts into tokens, and tokens into text, by the base's tokenizer or an adapter's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.errors import SourceError, UsageError
from veneer.files.json_file import read_json
from veneer.printing import first_line
from veneer.serving.adapter_tokenizers import AdapterTokenizers
from veneer.serving.serving_errors import AdapterInvalidError, InvalidRequestError

_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerChoice:
    """Names whose chat template and whose tokenizer an adapter is served with.

    Attributes:
        chat_template: ``adapter``, ``base``, or ``None`` where neither has one.
        tokenizer: ``adapter`` or ``base``.
        unfit: why a tokenizer that the adapter brings is not used.
    """

    chat_template: str | None
    tokenizer: str
    unfit: str | None


class PromptTokenizer:
    """Applies chat templates and a tokenizer; any thread may call it.

    Args:
        tokenizer: transformers' tokenizer of the base, or of an adapter.
        rows: how many tokens the base has an embedding of.
    """

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self._tokenizer, self._rows = tokenizer, rows
        tokenizer("")  # sets it to cut off nothing, which is no job for several threads at once
        names = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*names, "self", "conversations", "messages", "documents", "tools"}
        self._adapters = AdapterTokenizers(tokenizer, rows)

    def of(self, folder: Path) -> PromptTokenizer:
        """Return the tokenizer for an adapter: the one in its folder where the base can be asked with it.

        Raises:
            AdapterInvalidError: it cannot be read.
        """
        own = self._adapters.of(folder)
        return self if own is None or own.tokenizer is None else PromptTokenizer(own.tokenizer, self._rows)

    def choice(self, folder: Path) -> TokenizerChoice:
        """Tell what an adapter is served with: its own chat template and tokenizer, or the base's.

        Raises:
            AdapterInvalidError: its own cannot be read.
        """
        own, template = self._adapters.of(folder), own_template(folder)
        has_own = own is not None and own.tokenizer is not None
        base_template = "base" if self.has_template else None
        return TokenizerChoice(
            chat_template=base_template if template is None else "adapter",
            tokenizer="adapter" if has_own else "base",
            unfit=None if own is None else own.unfit,
        )

    @property
    def has_template(self) -> bool:
        """True where the base's tokenizer brings a chat template."""
        return bool(self._tokenizer.chat_template)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        options: Mapping[str, Any],
        generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """Return the tokens of a conversation under the base's chat template.

        Args:
            messages: with the keys ``role`` and ``content``.
            options: what the template itself takes.
            generation_prompt: end with what begins an answer.

        Raises:
            InvalidRequestError: there is no template, or it refuses the conversation.
        """
        self._check_options(options)
        if not self.has_template:
            raise InvalidRequestError(
                "This model has no chat template.",
                hint="Use /v1/completions with a `prompt`, or an adapter that brings a template.",
                param="messages",
            )
        with transformers_errors_as(UsageError, "The chat template refuses", "Look at the roles and their order."):
            inputs = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=generation_prompt,
                tokenize=True,
                return_dict=True,
                **options,
            )
        return self._checked(inputs["input_ids"], "messages")

    def template_variables(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a chat template is given beside the conversation: the special tokens, and the client's options.

        Raises:
            InvalidRequestError: an option is the server's to set.
        """
        self._check_options(options)
        return {**self._tokenizer.special_tokens_map, **options}

    def check_template(self) -> None:
        """Raise ``SourceError`` where the base's chat template has a syntax error."""
        import jinja2

        if not self.has_template:
            return
        try:
            self._tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise SourceError(
                f"The base's chat template is not valid, line {error.lineno}: {first_line(error).rstrip('.')}.",
                hint="Mend it in the base's chat_template.jinja or tokenizer_config.json.",
            ) from error
        except Exception:  # it may refuse this conversation, and think better of another
            return

    def text(self, prompt: str, special_tokens: bool = True, param: str = "prompt") -> tuple[int, ...]:
        """Return the tokens of a text, which comes from a field of the request."""
        with transformers_errors_as(UsageError, "The tokenizer cannot take the prompt apart", ""):
            tokens = self._tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
        return self._checked(tokens, param)

    def checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return tokens that a client gave, of which the base has all.

        Raises:
            InvalidRequestError: it lacks one, or there are none.
        """
        return self._checked(tokens, "prompt")

    def check_bias(self, tokens: Iterable[int]) -> None:
        """Raise ``InvalidRequestError`` for a token with a bias that the base does not have."""
        self._checked(tuple(tokens), "logit_bias", empty=True)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones with it."""
        with transformers_errors_as(UsageError, "The tokenizer cannot put the tokens together", ""):
            return str(self._tokenizer.decode(list(self._checked(tokens, "tokens", empty=True))))

    def token_text(self, token: int) -> str:
        """Return the text of one token; of a part of a character the replacement character."""
        return str(self._tokenizer.decode([token]))

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name in self._reserved:
                raise InvalidRequestError(
                    f"`chat_template_kwargs.{name}` is the server's to set.",
                    hint="Give what the chat template itself takes.",
                    param="chat_template_kwargs",
                )

    def _checked(self, tokens: Sequence[int], param: str, empty: bool = False) -> tuple[int, ...]:
        if not tokens and not empty:
            raise InvalidRequestError("The prompt gives no tokens.", hint="Say something.", param=param)
        unknown = next((token for token in tokens if not 0 <= token < self._rows), None)
        if unknown is not None:
            message = f"The model has no token {unknown}: it has {self._rows}."
            raise InvalidRequestError(message, hint="Is the tokenizer this model's?", param=param)
        return tuple(tokens)


def own_template(folder: Path) -> str | None:
    """Return the chat template that an adapter's folder brings, ``None`` where it brings none.

    Raises:
        AdapterInvalidError: it cannot be read.
    """
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.is_file():
        return _read(jinja)
    if not config.is_file():
        return None
    try:
        template = read_json(config).get("chat_template")
    except SourceError as error:  # which names a folder of this machine
        raise AdapterInvalidError("The adapter's tokenizer_config.json cannot be read.") from error
    if isinstance(template, list):  # several, by their names
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if not isinstance(template, str):
        return None
    _check_size(config, len(template))
    return template


def _check_size(file: Path, size: int) -> None:
    if size > _TEMPLATE_BYTES:
        raise AdapterInvalidError(
            f"The chat template in the adapter's {file.name} has more than {_TEMPLATE_BYTES} bytes."
        )


def _read(file: Path) -> str:
    _check_size(file, file.stat().st_size)
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise AdapterInvalidError(f"The adapter's {file.name} is no text in UTF-8.") from error
