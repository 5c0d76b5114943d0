"""Continue prompts with a host behind an API, at the best level that it allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch

from trimtab.backends.chat import chat_ids, prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.pair import Pair
from trimtab.config import GenerateConfig
from trimtab.errors import AdapterError, InputError, ModelError
from trimtab.hosted.blending import Blender
from trimtab.hosted.context import expert_draft
from trimtab.hosted.estimating import Plan, planned_alone, planned_candidates, planned_steps
from trimtab.hosted.host import HostedModel
from trimtab.hosted.level import Level, check_sampling, in_words, level_of, own_draws
from trimtab.hosted.opening import opened, price_of
from trimtab.hosted.requests import Prefix, Wanted
from trimtab.hosted.reranking import best_of, check_room
from trimtab.hosted.tokens import ToldTokens
from trimtab.hosted.writing import Sampling, Task, Writer
from trimtab.steering.beside import open_beside
from trimtab.steering.evidence import Mixture
from trimtab.steering.outgrown import outgrown_note
from trimtab.steering.predictors import Steering
from trimtab.store.adapter_schema import AdapterManifest
from trimtab.store.manifest import read_manifest
from trimtab.text.stream import TextStream
from trimtab.types import Advance, OnNote, OnText, Progress, silent

CANDIDATE_TEMPERATURE = 0.8
"""Of candidates, where the run itself is greedy: they must differ."""

_MOST_PROMPTS = 1_000_000
"""Of a run: further ones would share their draws with another seed's."""

_MOST_CANDIDATES = 128
"""For a prompt, as the settings allow: further ones would share draws with the next prompt's."""


@dataclass(frozen=True)
class HostedResult:
    """Continuations of a host behind an API.

    Attributes:
        texts: In the order of the prompts.
        tokens: How many tokens each took; by the API's own count where it shows none.
        level: What was used of the host, in words.
        notes: What the run has used, and what a reader of the texts should know.
        is_cut_short: The budget has ended a text before its end.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    level: str
    notes: tuple[str, ...]
    is_cut_short: bool = False


def generate_hosted(
    config: GenerateConfig,
    *,
    progress: Progress = silent,
    on_text: OnText | None = None,
    on_note: OnNote | None = None,
) -> HostedResult:
    """Continue prompts, one after another; prompts and stop strings are checked already.

    Args:
        config: Host, prompts, adapter and sampling.
        progress: Shows the opening and the tokens.
        on_text: Gets the text of each prompt.
        on_note: Gets what is used and what it will cost, before the first request, and what it has
            cost, at the end.

    Raises:
        AdapterError: The adapter has no expert, or other carriers are named.
        ModelError: The API cannot do what is asked, refuses, or has failed at every attempt.
        InputError: As for `opened` and `check_sampling`.
    """
    manifest = _check(config)
    with opened(config.host, config, progress=progress, on_note=on_note) as host:
        host.check_way(chat=config.chat)
        level = level_of(config, host.by, steered=manifest is not None)
        check_sampling(config, host.by, level)
        pair = _open_pair(config, manifest, progress)
        tasks = [_task(config, prompt, host, pair) for prompt in config.prompt]
        _check_room(tasks, pair, level)
        if config.api_draft_tokens:
            tasks = _with_drafts(config, tasks, pair, level)
        words = in_words(config, host.by, level)
        notes = [f"{config.host}: {words}", *own_draws(config, host.by, level)]
        if host.client.ledger.calls:
            asked = host.client.ledger.summary(price_of(config))
            notes.append(f"asked {host.client.address.url} what it is: {asked}")
        plan = _plan(config, host, tasks, level)
        notes.append(plan.in_words(price_of(config), host.way_of_counting(chat=config.chat)))
        for note in notes:
            _tell(on_note, note)
        run = _Run(config, host, pair, manifest, on_text)
        try:
            with progress("generating (tokens)", len(tasks) * config.max_new_tokens) as advance:
                done = run.all(level, tasks, advance)
        finally:
            # What was used is to be paid, however the run has ended.
            used = f"used {host.client.ledger.summary(price_of(config))}"
            _tell(on_note, used)
        after = _ends(config, done, pair)
        for note in after:
            _tell(on_note, note)
    return HostedResult(
        tuple(one.text for one in done),
        tuple(one.tokens for one in done),
        words,
        (*notes, used, *after),
        any(one.is_cut_short for one in done),
    )


def _ends(config: GenerateConfig, done: Sequence["_Done"], pair: Pair | None) -> list[str]:
    """Why texts ended that neither the host nor the adapter has ended."""
    notes = [
        outgrown_note(pair.reference, number, one.tokens)
        for number, one in enumerate(done, start=1)
        if pair and one.is_outgrown
    ]
    if any(one.is_cut_short for one in done):
        goes_on = ": the same command with a larger one goes on" if config.api_cache else ""
        notes.append(f"stopped by the budget of tokens{goes_on}")
    return notes


@dataclass(frozen=True)
class _Done:
    """One continuation.

    Attributes:
        text: What was written.
        tokens: How many tokens it took.
        is_cut_short: The budget has ended it.
        is_outgrown: It has become longer than the small models can read.
    """

    text: str
    tokens: int
    is_cut_short: bool = False
    is_outgrown: bool = False


@final
class _Run:
    """Continues prompts of one run."""

    def __init__(
        self,
        config: GenerateConfig,
        host: HostedModel,
        pair: Pair | None,
        manifest: AdapterManifest | None,
        on_text: OnText | None,
    ) -> None:
        self._config = config
        self._host = host
        self._pair = pair
        self._manifest = manifest
        self._on_text = on_text

    def all(self, level: Level, tasks: Sequence[Task], advance: Advance) -> list[_Done]:
        """Continue all prompts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.seed)
            return [self.one(level, number, task, advance) for number, task in enumerate(tasks)]

    def one(self, level: Level, number: int, task: Task, advance: Advance) -> _Done:
        """Continue one prompt."""
        if level == "top-k":
            return self._blended(number, task, advance)
        return self._among_candidates(level, number, task, advance)

    def _blended(self, number: int, task: Task, advance: Advance) -> _Done:
        stream = TextStream(self._config.stop)
        writer = Writer(self._host, self._blender(), task, _sampling(self._config, number), stream)
        for piece in writer.pieces(advance):
            self._say(number, piece)
        self._say(number, stream.finish())
        return _Done(stream.text, writer.tokens, writer.is_cut_short, writer.is_outgrown)

    def _blender(self) -> Blender:
        assert self._manifest is not None
        self._live.forget(0)
        steering = Steering(
            ("live",), live=self._live, blend=self._manifest.blend, strength=self._config.strength
        )
        by_ids = self._host.takes_tokens and not self._config.chat
        return Blender(Mixture(steering), self._live, self._host.tokens, by_ids=by_ids)

    @cached_property
    def _live(self) -> Live:
        """Expert and reference, aligned once for all prompts."""
        assert self._pair is not None
        tokens = self._host.tokens or ToldTokens.of((), ())
        return Live(self._pair, tokens, draft_tokens=self._config.draft_tokens or 0)

    def _among_candidates(self, level: Level, number: int, task: Task, advance: Advance) -> _Done:
        """The host's own continuation, or the one of several that the small models choose."""
        count = 1 if level == "alone" else self._config.api_candidates
        temperature = self._config.temperature
        if level == "text" and not temperature:
            temperature = CANDIDATE_TEMPERATURE
        wanted = Wanted(
            task.max_new_tokens, temperature=temperature, top_p=self._config.top_p, count=count
        )
        prefix = self._host.prefix(
            "" if task.chat else task.prompt,
            task.sent if task.chat else None,
            list(task.prompt_ids),
        )
        asked, is_cut_short = self._asked(prefix, wanted, number)
        if not asked:
            return _Done("", 0, is_cut_short)
        texts = [_stopped(text, self._config.stop) for text in asked]
        best = 0
        if self._pair is not None and level == "text":
            best = best_of(self._pair, task.prompt, texts, task.small_ids)
        advance(task.max_new_tokens)
        self._say(number, texts[best])
        tokens = self._host.count(texts[best]) if texts[best] else 0
        return _Done(texts[best], tokens, is_cut_short)

    def _asked(self, prefix: Prefix, wanted: Wanted, number: int) -> tuple[list[str], bool]:
        """The host's continuations, and whether the budget has ended them."""
        # Without draws, equal prompts have equal answers, whatever the seed.
        is_drawn = bool(wanted.temperature) or not self._host.by.takes_temperature
        ordinal = _sampling(self._config, number).draw * _MOST_CANDIDATES if is_drawn else 0
        texts = list[str]()
        # Some servers give fewer than they are asked for, and say nothing.
        while missing := wanted.count - len(texts):
            each = replace(wanted, count=missing if self._host.by.several else 1)
            if not self._host.allows(prefix, each):
                return texts, True
            choices = self._host.go_on(prefix, each, ordinal=ordinal).choices
            texts += [choice.text for choice in choices[: each.count]]
            ordinal += 1
        return texts, False

    def _say(self, number: int, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(number, text)


def _check(config: GenerateConfig) -> AdapterManifest | None:
    """Refuse what cannot work before anything is sent; the adapter, where one steers."""
    if config.host_keys or config.device_map:
        raise InputError(
            f"{config.host} runs elsewhere: --host-keys and --device-map do nothing there",
            hint="leave them out",
        )
    if config.adapter is None or not config.strength:
        return None
    manifest = read_manifest(config.adapter)
    others = [name for name in config.carriers or () if name != "expert"]
    if others:
        raise AdapterError(
            f"{' and '.join(others)} read{'s' if len(others) == 1 else ''} a host's hidden states,"
            f" and {config.host} shows none",
            hint="use --carriers expert",
        )
    if "expert" not in manifest.carriers:
        raise AdapterError(
            f"the adapter {manifest.name} carries {', '.join(manifest.carriers)}, and a host"
            " behind an API is steered by the expert alone",
            hint="make the carrier with `trimtab fit --carriers head,memory,expert`",
        )
    return manifest


def _sampling(config: GenerateConfig, number: int = 0) -> Sampling:
    """How tokens of a prompt's continuation are chosen."""
    draw = config.seed * _MOST_PROMPTS + number
    return Sampling(config.temperature, config.top_p, config.top_k, draw)


def _plan(config: GenerateConfig, host: HostedModel, tasks: Sequence[Task], level: Level) -> Plan:
    if level == "alone":
        return planned_alone(host, tasks)
    if level == "text":
        return planned_candidates(host, tasks, config.api_candidates)
    drafts_itself = config.chat or not host.by.echo or _sampling(config).is_plain
    return planned_steps(host, tasks, config.draft_tokens or 0, drafts_itself=drafts_itself)


def _open_pair(
    config: GenerateConfig, manifest: AdapterManifest | None, progress: Progress
) -> Pair | None:
    if manifest is None or config.adapter is None:
        return None
    try:
        return open_beside(
            manifest, config.adapter, small=config.small, dtype=config.dtype, progress=progress
        )
    except ModelError as error:
        if config.small:
            raise
        # Head and memory, which need no small model, cannot steer here.
        raise ModelError(
            error.message,
            hint="name the place where it lies with --small: a host behind an API is steered by"
            " the expert alone",
        ) from error


def _with_drafts(
    config: GenerateConfig, tasks: Sequence[Task], pair: Pair | None, level: Level
) -> list[Task]:
    """The same tasks, each with what the expert would answer."""
    if pair is None or level != "text" or not config.chat:
        raise InputError(
            "a draft of the expert's is shown in a chat where candidates are chosen, and this is"
            f" {'a chat' if config.chat else 'no chat'} at level {level}",
            hint="give --chat, an adapter and --api-level text, or leave out --api-draft-tokens",
        )
    return [
        replace(task, draft=expert_draft(pair, task.small_ids or (), config.api_draft_tokens))
        for task in tasks
    ]


def _task(config: GenerateConfig, prompt: str, host: HostedModel, pair: Pair | None) -> Task:
    small_ids = None
    if config.chat and pair is not None:
        small_ids = tuple(_small_ids(pair.reference, prompt))
    ids: tuple[int, ...] = ()
    if host.tokens is not None and not config.chat:
        ids = (*host.tokens.context_ids(), *host.tokens.encode(prompt))
    return Task(prompt, config.chat, config.max_new_tokens, small_ids, ids)


def _check_room(tasks: Sequence[Task], pair: Pair | None, level: Level) -> None:
    """Refuse prompts after which candidates would be paid that nobody here can read."""
    if pair is None or level != "text":
        return
    for task in tasks:
        check_room(pair.reference, task.prompt, task.max_new_tokens, task.small_ids)


def _small_ids(small: HFModel, message: str) -> list[int]:
    """What a small model reads before an answer: under its own chat template, if it has one."""
    return chat_ids(small, message) if small.tokenizer.chat_template else prompt_ids(small, message)


def _stopped(text: str, stop: Sequence[str]) -> str:
    stream = TextStream(stop)
    stream.add(text.encode())
    stream.finish()
    return stream.text


def _tell(on_note: OnNote | None, note: str) -> None:
    if on_note is not None:
        on_note(note)
