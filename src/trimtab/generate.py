"""Continue prompts with a host, steered by an adapter or alone."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from transformers import GenerationConfig, StoppingCriteria

from trimtab.backends.chat import chat_ids, prompt_ids
from trimtab.backends.hf import HFModel, quiet_transformers
from trimtab.backends.open import open_host
from trimtab.backends.padding import check_padding
from trimtab.config import DRAFT_TOKENS, CarrierName, GenerateConfig, MountConfig, is_hosted
from trimtab.errors import AdapterError, InputError
from trimtab.mount import mount
from trimtab.steering.outgrown import Outgrown, outgrown_note
from trimtab.steering.processor import (
    DEFAULT_CARRIERS,
    chats_of,
    check_carriers,
    mixture_of,
    open_live,
    steered_by,
)
from trimtab.steering.processor import steered as steered
from trimtab.store.manifest import read_manifest
from trimtab.text.stream import TextStream
from trimtab.types import Advance, OnNote, OnText, Progress, silent


@dataclass(frozen=True)
class GenerateResult:
    """Continuations, in the order of their prompts.

    Attributes:
        texts: The continuations, without stop strings and special tokens.
        tokens: How many tokens each took, the end token not counted.
        wall_sec: Time that the generation took, without opening and mounting.
        level: Of a host behind an API: what was used of it, in words.
        notes: What else is to be said: of a host behind an API what it took at most and in fact;
            of a text that its small model could read no further, that it ends there.
        is_cut_short: Of a host behind an API: the budget of tokens has ended a text.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    wall_sec: float
    level: str = ""
    notes: tuple[str, ...] = ()
    is_cut_short: bool = False

    def summary(self) -> str:
        """How much text came, and how fast."""
        total = sum(self.tokens)
        return (
            f"{len(self.texts)} continuations, {total} tokens in {self.wall_sec:.1f} s"
            f" ({total / max(self.wall_sec, 1e-9):.1f} a second)"
        )


def generate(
    config: GenerateConfig,
    *,
    host: HFModel | None = None,
    progress: Progress = silent,
    on_text: OnText | None = None,
    on_note: OnNote | None = None,
) -> GenerateResult:
    """Continue prompts, as one batch; with an encoder-decoder, a prompt is the source of a target.

    A host behind an API (openai:MODEL, anthropic:MODEL) is asked over the network.

    A continuation ends at max_new_tokens, at an end token, at a stop string (which is cut off),
    or where the positions of the host end, or those of the expert that steers it.

    Args:
        config: Host, prompts, adapter and sampling.
        host: The host that the configuration names, if it is open already.
        progress: Shows the opening, the mounting and the tokens.
        on_text: Gets each piece of text as soon as it is certain; the pieces of a prompt
            together are its text.
        on_note: Gets what a host behind an API is used for, and what that costs; and each other
            note of the result.

    Raises:
        InputError: A prompt is empty or too long, a stop string is empty, or carriers are named
            without an adapter.
        AdapterError: The adapter is broken or lacks a carrier.
        ModelError: The host cannot be opened, has no chat template and is to chat, or reads the
            padding that prompts of different lengths need; or a prompt is longer than the expert
            can read.
    """
    _check_words(config)
    if is_hosted(config.host):
        return _generate_hosted(config, progress, on_text, on_note)
    carriers = _check(config)
    host = host or open_host(config, progress)
    encode = chat_ids if config.chat else prompt_ids
    prompts = [encode(host, prompt) for prompt in config.prompt]
    limit = _new_tokens(host, prompts, config.max_new_tokens)
    check_padding(host, prompts)
    with (
        _ready(config, host, carriers, progress) as outgrown,
        progress("generating (tokens)", limit) as advance,
        quiet_transformers(),
        torch.random.fork_rng(devices=_used_gpus()),
    ):
        start_sec = time.monotonic()
        follower = _Follower(host, config, on_text, advance, outgrown)
        torch.manual_seed(config.seed)
        host.model.generate(
            **host.padded(prompts),
            generation_config=_settings(config, host, limit),
            stopping_criteria=[follower],
        )  # pyright: ignore[reportCallIssue]
        result = follower.result(time.monotonic() - start_sec, limit)
    for note in result.notes:
        if on_note is not None:
            on_note(note)
    return result


def _used_gpus() -> range:
    # Those that nothing has used yet have no state, and asking for it would start each of them.
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _generate_hosted(
    config: GenerateConfig, progress: Progress, on_text: OnText | None, on_note: OnNote | None
) -> GenerateResult:
    # Imported here: what it needs is in an extra.
    from trimtab.hosted.generating import generate_hosted

    start_sec = time.monotonic()
    done = generate_hosted(config, progress=progress, on_text=on_text, on_note=on_note)
    wall_sec = time.monotonic() - start_sec
    return GenerateResult(
        done.texts, done.tokens, wall_sec, done.level, done.notes, done.is_cut_short
    )


def _check_words(config: GenerateConfig) -> None:
    for number, prompt in enumerate(config.prompt, start=1):
        if not prompt:
            raise InputError(f"prompt {number} is empty", hint="give at least one character")
        if not _is_text(prompt):
            raise InputError(
                f"prompt {number} is not UTF-8 text", hint="convert it, for example with iconv"
            )
    if "" in config.stop:
        raise InputError("a stop string is empty", hint="leave it out")
    if config.adapter is None and config.carriers:
        raise InputError(
            f"carriers {', '.join(config.carriers)} are named, but no adapter",
            hint="give --adapter",
        )


def _check(config: GenerateConfig) -> tuple[CarrierName, ...]:
    """Refuse carriers that are not there before anything large is opened; say which steer."""
    if config.adapter is None:
        return ()
    manifest = read_manifest(config.adapter)
    if config.carriers is not None:
        check_carriers(manifest.name, tuple(manifest.carriers), config.carriers)
        return config.carriers
    carriers: tuple[CarrierName, ...] = tuple(
        name for name in DEFAULT_CARRIERS if name in manifest.carriers
    )
    if not carriers:
        raise AdapterError(
            f"the adapter {manifest.name} carries {', '.join(manifest.carriers)} only,"
            " which is not used unless named",
            hint=f"use --carriers {','.join(manifest.carriers)}",
        )
    return carriers


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        # The shell passed on bytes that are no characters.
        return False
    return True


@contextmanager
def _ready(
    config: GenerateConfig, host: HFModel, carriers: Sequence[CarrierName], progress: Progress
) -> Iterator[Outgrown]:
    """Steer the host's `generate` inside the context as is asked for."""
    if config.adapter is None or not config.strength:
        yield Outgrown()
        return
    seat = {"adapter": config.adapter, "host": config.host, "dtype": config.dtype}
    seat |= {"carriers": tuple(carriers), "host_keys": config.host_keys}
    mounted = mount(MountConfig.model_validate(seat), host=host, progress=progress)
    live = None
    if "expert" in carriers:
        live = open_live(
            mounted,
            host,
            small=config.small,
            dtype=config.dtype,
            progress=progress,
            draft_tokens=DRAFT_TOKENS if config.draft_tokens is None else config.draft_tokens,
        )
    mixture = mixture_of(host, mounted, carriers, config.strength, live)
    chats = chats_of(host, mixture, config.prompt if config.chat else ())
    with steered_by(host, mixture, chats) as outgrown:
        yield outgrown


def _new_tokens(host: HFModel, prompts: Sequence[Sequence[int]], asked: int) -> int:
    room = host.max_tokens
    if room is None:
        return asked
    if host.is_encoder_decoder:
        # The source has positions of its own; the decoder's start takes one of the target's.
        return min(asked, room - 1)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) >= room:
        raise InputError(
            f"prompt {longest + 1} has {len(prompts[longest])} tokens, and {host.ref} has"
            f" positions for {room}",
            hint="shorten the prompt, or take a host with a longer context",
        )
    return min(asked, room - len(prompts[longest]))


def _settings(config: GenerateConfig, host: HFModel, limit: int) -> GenerationConfig:
    # What is not said here comes from the model's own settings, which may sample or penalise.
    options: dict[str, Any] = {
        "max_new_tokens": limit,
        "do_sample": config.temperature > 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "eos_token_id": sorted(host.end_ids) or None,
        "pad_token_id": host.pad_id,
    }
    if config.temperature > 0:
        options |= {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
        }
    return GenerationConfig(**options)


@final
class _Follower(StoppingCriteria):
    """Reads each new token: gives out text, and ends a row at an end token or a stop string."""

    def __init__(
        self,
        host: HFModel,
        config: GenerateConfig,
        on_text: OnText | None,
        advance: Advance,
        outgrown: Outgrown,
    ) -> None:
        self._token_bytes = host.vocabulary.token_bytes
        # A target is a text of its own: the space that a tokenizer puts first is not in it.
        self._spare = host.is_encoder_decoder and host.vocabulary.prefix_space
        self._begun = [False for _ in config.prompt]
        self._end_ids = host.end_ids
        self._streams = [TextStream(config.stop) for _ in config.prompt]
        self._tokens = [0 for _ in config.prompt]
        self._done = [False for _ in config.prompt]
        self._ended_outgrown: list[int] = []
        self._on_text = on_text
        self._advance = advance
        self._outgrown = outgrown

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        del scores, options
        for row, token_id in enumerate(input_ids[:, -1].tolist()):
            if not self._done[row]:
                self._read(row, token_id)
                self._end_outgrown(row)
        self._advance(1)
        return torch.tensor(self._done, device=input_ids.device)

    def _read(self, row: int, token_id: int) -> None:
        if token_id in self._end_ids:
            self._done[row] = True
            return
        self._tokens[row] += 1
        text = self._token_bytes[token_id] or b""
        if text and self._spare and not self._begun[row]:
            self._begun[row], text = True, text.removeprefix(b" ")
        self._say(row, self._streams[row].add(text))
        self._done[row] = self._streams[row].stopped

    def _end_outgrown(self, row: int) -> None:
        if row in self._outgrown.rows and not self._done[row]:
            self._done[row] = True
            self._ended_outgrown.append(row)

    def _say(self, row: int, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(row, text)

    def result(self, wall_sec: float, limit: int) -> GenerateResult:
        """Give out what was held back, and put the result of at most some tokens together."""
        for row, stream in enumerate(self._streams):
            self._say(row, stream.finish())
        texts = tuple(stream.text for stream in self._streams)
        small = self._outgrown.small
        notes = tuple(
            outgrown_note(small, row + 1, self._tokens[row])
            for row in self._ended_outgrown
            # Else it has all the tokens that were asked for.
            if small and self._tokens[row] < limit
        )
        return GenerateResult(texts, tuple(self._tokens), wall_sec, notes=notes)
