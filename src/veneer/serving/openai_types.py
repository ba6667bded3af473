"""Describes the bodies that the server takes: OpenAI's, a few fields more, and nothing that it would ignore."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

from veneer.serving.engine_types import Sampling

# Fields that clients send although they ask for nothing -> the values which ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stop": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_BIAS = 100.0

Name = Annotated[StrictStr, Field(min_length=1, max_length=300)]
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class RequestBody(BaseModel):
    """The base of all bodies: a field that is not declared is refused, and one that is null was not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None and not _is_neutral(name, value)}


def _is_neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL.get(name, ()))


class StreamOptions(RequestBody):
    """How an answer is streamed."""

    include_usage: bool = False


class SamplingBody(RequestBody):
    """The fields of all bodies that have text generated."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = []
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-_BIAS, le=_BIAS)]] = {}
    ignore_eos: bool = False
    timeout: float | None = Field(None, gt=0)
    user: str | None = Field(None, max_length=256)

    def sampling(self, max_tokens: int, top_logprobs: int | None, offset: int = 0) -> Sampling:
        """Return the settings for the engine.

        Args:
            max_tokens: the limit, where the body has none.
            top_logprobs: how many alternatives to report; ``None`` for no log-probabilities.
            offset: the choice's number, by which choices of one seed differ.
        """
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            seed=None if self.seed is None else (self.seed + offset) % 2**63,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            top_logprobs=top_logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            ignore_eos=self.ignore_eos,
        )


class TextPart(RequestBody):
    """A part of a message's content; images and sound are not taken."""

    type: Literal["text"]
    text: str


class ChatMessage(RequestBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str | None = Field(None, max_length=64)

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **({"name": self.name} if self.name else {})}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]


class StreamingBody(SamplingBody):
    """The fields of OpenAI's two bodies that have text generated."""

    model: Name
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="after")
    def _check_stream_options(self) -> StreamingBody:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        return self


class ChatBody(StreamingBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, under either of the two names that OpenAI gave it."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are reported with each token; ``None`` for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class CompletionBody(StreamingBody):
    """The body of ``POST /v1/completions``."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=32)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=32)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or its tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class PromptBody(RequestBody):
    """The fields of a body whose prompt is a chat or a text."""

    messages: Messages | None = None
    prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_prompt(self) -> PromptBody:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`")
        return self


class CompareBody(SamplingBody, PromptBody):
    """The body of ``POST /v1/compare``: a chat or a text, and the models that answer it together."""

    models: Annotated[list[Name], Field(min_length=2, max_length=8)]
    stream: bool = True


class TokenizeBody(PromptBody):
    """The body of ``POST /tokenize``."""

    model: Name | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(RequestBody):
    """The body of ``POST /detokenize``."""

    model: Name | None = None
    tokens: list[Token] = Field(max_length=1_000_000)


class RegistrationBody(RequestBody):
    """The body of ``POST /v1/adapters``."""

    name: Name
    source: Annotated[str, Field(min_length=1, max_length=2000)]
    revision: str | None = Field(None, max_length=200)
    subfolder: str | None = Field(None, max_length=500)
    digest: str | None = Field(None, pattern=r"^sha256:[0-9a-f]{64}$")
    replace: bool = False
    pin: bool = False
    wait: bool = False


class RollbackBody(RequestBody):
    """The body of ``POST /v1/adapters/NAME/rollback``."""

    to: str | None = Field(None, pattern=r"^(sha256:)?[0-9a-f]{6,64}$")


class AliasBody(RequestBody):
    """The body of ``POST /v1/adapters/NAME/alias``."""

    alias: Name


class LoadLoraBody(RequestBody):
    """The body of vLLM's ``POST /v1/load_lora_adapter``."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=2000)]
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadLoraBody(RequestBody):
    """The body of vLLM's ``POST /v1/unload_lora_adapter``; the number stands beside the name, and is not needed."""

    lora_name: Name
    lora_int_id: int | None = None
