"""Requests as OpenAI's clients send them, checked; what is not supported is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trimtab.config import CarrierName

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
_INT64 = 2**63 - 1

Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Texts = Annotated[list[str], Field(min_length=1)]
Probable = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_INT64)]], Field(min_length=1)]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What a client is told where there is no answer."""

    error: ErrorDetail


class TrimtabOptions(BaseModel):
    """What OpenAI's protocol has no words for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    carriers: list[CarrierName] | None = None
    strength: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    trace: bool = False


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=1024)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=_INT64)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: Stop | list[Stop] | None = None
    seed: int | None = Field(default=None, ge=-_INT64, le=_INT64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0, le=_INT64)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    trimtab: TrimtabOptions = TrimtabOptions()
    # Words for the operator of a service, which change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} strings may end an answer")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _biases_are_of_tokens(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 19):
                raise ValueError(f"{key!r} is no token id")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """A stream's last chunk counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Probable | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _is_supported(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported: ask for n answers and choose")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is of use with echo only")
        return self


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(BaseModel):
    """How an answer is to look: as text, since nothing else is supported."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT64)
    logprobs: bool | None = None
    top_logprobs: Probable | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _is_supported(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if all(message.role != "user" for message in self.messages):
            raise ValueError("a chat needs at least one message of the user")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1")
        return self
