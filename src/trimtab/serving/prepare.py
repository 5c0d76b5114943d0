"""From a checked request to what the engine is asked."""

import secrets
from collections.abc import Callable, Sequence
from typing import Literal, final

from trimtab.backends.chat import conversation_prompt, prompt_ids
from trimtab.config import ServeConfig
from trimtab.errors import InputError
from trimtab.serving.adapters import Adapters
from trimtab.serving.choose import Choosing
from trimtab.serving.protocol import ChatRequest, CompletionRequest, Request
from trimtab.serving.refusals import ApiError
from trimtab.serving.work import Event, Job, Options, Prompt, Steered
from trimtab.steering.several import Several

COMPLETION_TOKENS = 16
"""Length of a completion where a request does not say, as OpenAI has it."""

MAX_ANSWERS = 256
"""Of all prompts of a request together."""


@final
class Preparer:
    """Turns requests into jobs."""

    def __init__(self, config: ServeConfig, adapters: Adapters) -> None:
        """Keep what requests are checked against.

        Args:
            config: The server's.
            adapters: Its adapters, and the host.
        """
        self._adapters = adapters
        self._host = adapters.host
        self._config = config
        room = self._host.max_tokens
        self.context_tokens = min(config.context_tokens, room or config.context_tokens)
        longest = max(len(text or b"") for text in self._host.vocabulary.token_bytes)
        self._most_bytes = self.context_tokens * longest

    def job(self, request: Request, tell: Callable[[Event], None], owner: str = "") -> Job:
        """Prepare a request.

        Args:
            request: Checked by itself.
            tell: As for `Job`.
            owner: As for `Job`.

        Raises:
            ApiError: It cannot be answered as it is.
            UnknownModel: Its model is not served.
            TrimtabError: It asks for what its adapters or the host do not have.
        """
        several = self._several(request)
        if isinstance(request, CompletionRequest):
            prompts, steered = self._prompts(request), _plain(several)
        else:
            assert isinstance(request, ChatRequest)
            prompt, steered = self._chat(request, several)
            prompts = [prompt]
        options = self._options(request, prompts)
        return Job(
            prompts,
            options,
            steered=steered,
            tell=tell,
            time_limit_sec=self._config.time_limit_sec,
            owner=owner,
        )

    def _several(self, request: Request) -> Several | None:
        asked = request.trimtab
        chosen = self._adapters.chosen(request.model, asked.carriers, asked.strength)
        return self._adapters.mixture(chosen) if chosen else None

    def _prompts(self, request: CompletionRequest) -> list[Prompt]:
        given = request.prompt
        if isinstance(given, str):
            return [self._text(given)]
        texts = [part for part in given if isinstance(part, str)]
        ids = [part for part in given if isinstance(part, int)]
        several = [part for part in given if isinstance(part, list)]
        if ids:
            return [self._ids(ids)]
        # A request holds prompts of one kind.
        return [self._text(text) for text in texts] + [self._ids(one) for one in several]

    def _text(self, text: str) -> Prompt:
        self._check_text(text, "prompt")
        if not text:
            raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
        return Prompt(tuple(prompt_ids(self._host, text)), len(self._host.context_ids()))

    def _ids(self, ids: Sequence[int]) -> Prompt:
        vocab = len(self._host.vocabulary)
        unknown = next((i for i in ids if i >= vocab), None)
        if unknown is not None:
            message = f"the prompt has the token {unknown}, and the host has {vocab} tokens"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return Prompt(tuple(ids))

    def _check_text(self, text: str, param: str) -> None:
        """Refuse what no tokenizer need read to know that it cannot be answered."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InputError(
                f"{param} holds half a character (a lone surrogate)", hint="send whole characters"
            ) from None
        if size > self._most_bytes:
            raise ApiError(
                400,
                f"{param} has {size:,} bytes, and prompt and answer may have {self.context_tokens}"
                f" tokens together, which are {self._most_bytes:,} bytes at most",
                code="context_length_exceeded",
                param=param,
            )

    def _chat(self, request: ChatRequest, several: Several | None) -> tuple[Prompt, Steered | None]:
        if not self._host.tokenizer.chat_template:
            raise ApiError(
                400,
                f"{self._adapters.host_name} has no chat template: ask /v1/completions, or serve an"
                " instruction-tuned host",
                param="model",
                code="no_chat_template",
            )
        roles = {"developer": "system"}
        messages = [
            {"role": roles.get(message.role, message.role), "content": message.text}
            for message in request.messages
        ]
        for message in messages:
            self._check_text(message["content"], "messages")
        if several is None:
            chat = conversation_prompt(self._host, messages)
            return Prompt(chat.token_ids), None
        lives = [mixture.steering.live for mixture in several.mixtures]
        smalls = [live.pair.reference if live else None for live in lives]
        chats = tuple(conversation_prompt(self._host, messages, small) for small in smalls)
        return Prompt(chats[0].token_ids), Steered(several, chats)

    def _options(self, request: Request, prompts: Sequence[Prompt]) -> Options:
        answers = request.n or 1
        if answers > self._config.slots or answers * len(prompts) > MAX_ANSWERS:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with {answers} answers each are too many: at most"
                f" {self._config.slots} answers to a prompt, and {MAX_ANSWERS} in all",
                param="n",
                code="invalid_value",
            )
        return Options(
            max_tokens=self._max_tokens(request, prompts),
            answers=answers,
            choosing=Choosing(
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=request.top_k or 0,
                logit_bias=self._bias(request),
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
            ),
            seed=secrets.randbits(62) if request.seed is None else request.seed,
            stop=request.stops,
            echo=isinstance(request, CompletionRequest) and bool(request.echo),
            top_logprobs=_top_logprobs(request),
            # Who scores a text by echo asks for one token more, and takes the last one away.
            tells_end=isinstance(request, CompletionRequest),
            trace=self._trace(request),
        )

    def _trace(self, request: Request) -> Literal["none", "bare", "text"]:
        if not request.trimtab.trace:
            return "none"
        asked = self._config.trace_text
        # Whoever may ask on a machine of their own may read the adapter's files as well.
        return "text" if (self._config.keys is None if asked is None else asked) else "bare"

    def _max_tokens(self, request: Request, prompts: Sequence[Prompt]) -> int:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        room = self.context_tokens - longest
        asked = request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            asked = request.max_completion_tokens
        if asked is None:
            asked = COMPLETION_TOKENS if isinstance(request, CompletionRequest) else max(room, 1)
        if room < min(asked, 1):
            raise ApiError(
                400,
                f"the prompt has {longest} tokens, and prompt and answer may have"
                f" {self.context_tokens} together",
                code="context_length_exceeded",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        return min(asked, room)

    def _bias(self, request: Request) -> dict[int, float]:
        found = {int(key): float(value) for key, value in (request.logit_bias or {}).items()}
        vocab = len(self._host.vocabulary)
        unknown = next((key for key in found if key >= vocab), None)
        if unknown is not None:
            raise ApiError(
                400,
                f"logit_bias names the token {unknown}, and the host has {vocab} tokens",
                param="logit_bias",
                code="invalid_value",
            )
        return found


def _plain(several: Several | None) -> Steered | None:
    return None if several is None else Steered(several, (None,) * len(several.mixtures))


def _top_logprobs(request: Request) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatRequest)
    return (request.top_logprobs or 0) if request.logprobs else None
