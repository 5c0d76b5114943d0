"""Settings of hosts behind an API, which verbs that can use one share. No torch."""

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from trimtab.config.base import Config

API_SCHEMES = ("openai:", "anthropic:")
"""What the name of a host behind an API begins with; the service's own name of a model follows."""

_WEB = ("http://", "https://")

ApiLevel = Literal["auto", "top-k", "text"]


def is_hosted(host: str) -> bool:
    """Whether a host's name is that of a model behind an API."""
    return host.startswith(API_SCHEMES)


def check_api_url(host: str, api_url: str | None) -> None:
    """Refuse an address that nothing would use.

    Raises:
        ValueError: It is given for another host.
    """
    if api_url is not None and not is_hosted(host):
        raise ValueError("--api-url is for a host openai:MODEL or anthropic:MODEL")


class HostedOptions(Config):
    """What a verb asks of a model behind an API."""

    # An address that is refused may hold a secret.
    model_config = ConfigDict(hide_input_in_errors=True)

    api_url: str | None = None
    """Address of an API up to its version, such as http://127.0.0.1:8080/v1, for a host
    openai:MODEL or anthropic:MODEL (default: the service's own). The key is read from the
    environment: TRIMTAB_API_KEY; at the services' own addresses OPENAI_API_KEY or
    ANTHROPIC_API_KEY."""
    api_tokenizer: str | None = None
    """The API's tokenizer: tiktoken:NAME, folder with a tokenizer.json, GGUF file, or tiny:NAME
    (default: told from the strings that the API returns)."""
    api_level: ApiLevel = "auto"
    """top-k: blend with the returned logprobs; text: choose among candidates; auto: the best that
    the API allows."""
    api_top_logprobs: int = Field(default=20, ge=1, le=1_000_000)
    """Log-probabilities to ask for at each token; fewer are taken if the API refuses."""
    api_candidates: int = Field(default=8, ge=2, le=128)
    """Continuations among which the small models choose where there are no logprobs."""
    api_draft_tokens: int = Field(default=0, ge=0, le=100_000)
    """In a chat where candidates are chosen, show the host the expert's own answer beside the
    message, up to so many of the expert's tokens (default: none)."""
    api_budget_tokens: int | None = Field(default=None, ge=1)
    """Stop before a run has used more tokens than this, of prompts and answers."""
    api_price_in: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    """US dollars for a million tokens of prompts, for the estimate and the cost of a run."""
    api_price_out: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    """US dollars for a million tokens of answers."""
    api_requests_per_min: float | None = Field(default=None, gt=0, le=1e6, allow_inf_nan=False)
    """Send at most so many requests a minute (default: as fast as the API allows)."""
    api_timeout_sec: float = Field(default=120.0, gt=0, le=3600)
    """Give up an answer that takes longer, and ask again."""
    api_attempts: int = Field(default=8, ge=1, le=100)
    """Times that a request is sent before the run ends with an error."""
    api_cache: bool = True
    """Keep answers on disk, so that the same command goes on where it was interrupted, and no
    answer is paid twice."""

    @field_validator("api_url")
    @classmethod
    def _without_last_slash(cls, url: str | None) -> str | None:
        return url and url.rstrip("/")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, values: object) -> object:
        # Before the field is looked at: an error of the field itself would repeat its value.
        given = values if isinstance(values, dict) else {}
        url, host = given.get("api_url"), given.get("host")
        if isinstance(url, str) and not url.startswith(_WEB):
            raise ValueError("--api-url: expected an address that begins with http:// or https://")
        addresses = [a for a in (url, host) if isinstance(a, str) and a.startswith(_WEB)]
        if any(sign in address for address in addresses for sign in "@?#"):
            raise ValueError(
                "the address of the API holds a user name, a query or a fragment, which may be a"
                " secret; give the address alone, and the key in TRIMTAB_API_KEY"
            )
        return values

    @model_validator(mode="after")
    def _both_prices(self) -> "HostedOptions":
        if (self.api_price_in is None) != (self.api_price_out is None):
            raise ValueError("give both --api-price-in and --api-price-out, or neither")
        return self


class ProbeConfig(HostedOptions):
    """Find out what a host lets us see, and which carriers can steer it."""

    host: str
    """Host as for generate, or the address of an API that serves one model."""

    @model_validator(mode="after")
    def _api_is_used(self) -> "ProbeConfig":
        check_api_url(self.host, self.api_url)
        return self
