"""Ways to decode, side by side: each over the same prompts as the bare host, in turns."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bench.speed.lockstep import proxy_tuned
from bench.speed.models import Models
from bench.speed.roofline import Passes, Size, Work, counted
from bench.speed.timing import Clock, Figure
from trimtab.backends.hf import quiet_transformers
from trimtab.carriers.search import LISTED_ENTRIES, PROBED_SHARE, list_count
from trimtab.config import CarrierName
from trimtab.steering.evidence import Mixture
from trimtab.steering.field import CANDIDATES
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Steering
from trimtab.steering.processor import mixture_of, steered_by

HOST, SMALL = "host", "small"
WARM_UP_TOKENS = 3

Decode = Callable[[Tensor, int, Clock], Tensor]
"""From a prompt [1, tokens], a number of new tokens and a clock that is told of each, to both."""


@dataclass(frozen=True)
class Way:
    """A way to decode.

    Attributes:
        name: Its row.
        decode: Writes text, inside `steers`.
        steers: What is done to the host for as long as the way is used.
        sizes: What a pass of each model that runs costs, by name; the models' trunks are counted.
        models: These models, by the same names.
        beside: What else a token costs at least.
    """

    name: str
    decode: Decode
    steers: Callable[[], AbstractContextManager[object]]
    sizes: Mapping[str, Size]
    models: Mapping[str, PreTrainedModel]
    beside: Work = field(default_factory=Work)


@dataclass
class Tally:
    """What a way has come to.

    Attributes:
        sec_per_token: One figure a turn.
        first_sec: Seconds to a first token, one a turn: the mean over its prompts.
        tokens: New tokens, over all turns, the first of each prompt left out.
        passes: Of each model, over the same.
        texts: The last turn's.
    """

    sec_per_token: list[float] = field(default_factory=list)
    first_sec: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: dict[str, Passes] = field(default_factory=dict)
    texts: list[list[int]] = field(default_factory=list)

    def per_token(self, name: str) -> tuple[float, float]:
        """Passes of a model, and tokens that it read, for each new token."""
        found, count = self.passes.get(name, Passes()), max(1, self.tokens)
        return found.passes / count, found.tokens / count


def ways_of(models: Models, names: Sequence[str]) -> list[Way]:
    """The bare host, then the ways of some rows, their models open."""
    host = models.host.model
    own = {HOST: Size.of(host)}

    def on_host(
        name: str,
        steers: Any,
        decode: Decode,
        beside: Work,
        *,
        pair: bool,
        drafts: bool = False,
    ) -> Way:
        sizes, running = dict(own), {HOST: host}
        if pair:
            running["pair"] = models.pair.reference.model
            sizes["pair"] = Size.of(running["pair"])
        if drafts and (light := models.live.ahead.light) is not None:
            running["draft"] = light.model.model
            sizes["draft"] = Size.of(running["draft"], head=light.head)
        return Way(name, decode, steers, sizes, running, beside)

    plain = _plain(models, host)
    made: dict[str, Callable[[], Way]] = {
        HOST: lambda: on_host(HOST, nullcontext, plain, Work(), pair=False),
        "head": lambda: on_host(
            "head", _carrying(models, models.mounted, ("head",)), plain, _head(models), pair=False
        ),
        "memory-1m": lambda: on_host(
            "memory-1m",
            _carrying(models, models.mounted_large, ("memory",)),
            plain,
            _memory(models),
            pair=False,
        ),
        "head+memory-1m": lambda: on_host(
            "head+memory-1m",
            _carrying(models, models.mounted_large, ("head", "memory")),
            plain,
            _head(models) + _memory(models),
            pair=False,
        ),
        "live-plain": lambda: on_host("live-plain", _beside(models, 0), plain, Work(), pair=True),
        "live-speculative": lambda: on_host(
            "live-speculative",
            _beside(models, models.material.settings.draft_tokens),
            plain,
            Work(),
            pair=True,
            drafts=True,
        ),
        "lockstep-proxy": lambda: _lockstep(models, own),
        "assisted": lambda: _assisted(models, own),
        "peft-lora": lambda: _lora(models),
        SMALL: lambda: _small(models),
    }
    return [made[name]() for name in (HOST, *names)]


def _settings(models: Models, new_tokens: int) -> GenerationConfig:
    host = models.host
    ends = sorted(host.end_ids)
    # What is not said here would come from the model's own settings.
    return GenerationConfig(
        max_new_tokens=new_tokens,
        # As many tokens in every way. `min_new_tokens` would look for the ends in the whole
        # vocabulary at each place, which weighs on ways that look at more places than one a token.
        sequence_bias=[[[end], -math.inf] for end in ends] or None,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=host.pad_id,
    )


def _plain(models: Models, model: PreTrainedModel) -> Decode:
    def decode(prompt: Tensor, new_tokens: int, clock: Clock) -> Tensor:
        called: Any = model
        return called.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=_settings(models, new_tokens),
            streamer=clock,
        )

    return decode


def _carrying(models: Models, mounted: Mounted, carriers: Sequence[CarrierName]) -> Any:
    mixture = mixture_of(models.host, mounted, carriers, 1.0, None)
    return lambda: steered_by(models.host, mixture)


def _beside(models: Models, draft_tokens: int) -> Any:
    live = models.live

    @contextmanager
    def steers() -> Iterator[None]:
        live.draft_tokens = draft_tokens
        with steered_by(models.host, Mixture(Steering(("live",), live=live))):
            yield

    return steers


def _head(models: Models) -> Work:
    """The rows of the candidates, which are all that a head is asked about."""
    head = models.mounted.head
    assert head is not None
    count = min(CANDIDATES, len(head.rows)) * (head.rows.shape[1] + 1)
    return Work(4.0 * count, 2.0 * count)


def _memory(models: Models) -> Work:
    """The keys that a question is compared with, as they are stored, and the centres of lists."""
    memory = models.mounted_large.memory
    assert memory is not None
    keys = memory.memory.keys
    if len(keys) < LISTED_ENTRIES:
        return Work(float(keys.nbytes), 2.0 * keys.numel())
    read = keys.numel() / PROBED_SHARE
    centres = float(list_count(len(keys)) * keys.shape[1])
    return Work(read * keys.element_size() + 4.0 * centres, 2.0 * (read + centres))


def _lockstep(models: Models, own: Mapping[str, Size]) -> Way:
    proxy, banned = models.proxy, sorted(models.host.end_ids)
    small = {"expert": proxy.expert, "antiexpert": proxy.antiexpert}
    return Way(
        "lockstep-proxy",
        lambda prompt, tokens, clock: proxy_tuned(proxy, prompt, tokens, clock, banned=banned),
        nullcontext,
        dict(own) | {name: Size.of(model) for name, model in small.items()},
        {HOST: proxy.host} | small,
    )


def _assisted(models: Models, own: Mapping[str, Size]) -> Way:
    host: Any = models.host.model
    small, options = models.small, {}
    if not models.material.pair.is_one_vocabulary:
        options = {"tokenizer": models.host.tokenizer, "assistant_tokenizer": small.tokenizer}

    def decode(prompt: Tensor, new_tokens: int, clock: Clock) -> Tensor:
        return host.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=_settings(models, new_tokens),
            assistant_model=small.model,
            streamer=clock,
            **options,
        )

    return Way(
        "assisted",
        decode,
        nullcontext,
        dict(own) | {"assistant": Size.of(small.model)},
        {HOST: host, "assistant": small.model},
    )


def _lora(models: Models) -> Way:
    model = models.lora_host
    sizes = {HOST: Size.of(model, lora=True)}
    return Way("peft-lora", _plain(models, model), nullcontext, sizes, {HOST: model})


def _small(models: Models) -> Way:
    """The small model alone, which says what two more passes of it must cost."""
    model, vocab = models.small.model, len(models.small.unembedding.weight)

    def decode(prompt: Tensor, new_tokens: int, clock: Clock) -> Tensor:
        called: Any = model
        # As many tokens as the host's prompt has; which they are costs nothing.
        return called.generate(
            prompt % vocab,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, pad_token_id=models.small.pad_id
            ),
            eos_token_id=None,
            streamer=clock,
        )

    return Way(SMALL, decode, nullcontext, {SMALL: Size.of(model)}, {SMALL: model})


def take_turns(
    models: Models,
    ways: Sequence[Way],
    *,
    after_each: Callable[[Mapping[str, Tally]], None] = lambda _: None,
) -> dict[str, Tally]:
    """Time all ways in each repetition, in another order each time; the host twice.

    What else the machine does then meets all of them alike, and each is compared with the host of
    its own repetition, on the same prompts.

    Args:
        models: The open models.
        ways: The bare host first.
        after_each: Is told of what has been found after each repetition.
    """
    settings, (host, *others) = models.material.settings, ways
    tallies = {way.name: Tally() for way in ways}
    total = settings.repetitions * (len(others) + 2) + len(ways)
    with models.material.display.progress("decoding (turns)", total) as advance:
        warm = models.material.prompts(models.host, 0)[:1]
        for way in ways:
            _turn(way, warm, WARM_UP_TOKENS)
            advance(1)
        for repetition in range(settings.repetitions):
            prompts = models.material.prompts(models.host, repetition)
            first = repetition * len(others) // settings.repetitions
            order = [*others[first:], *others[:first]]
            half = (len(order) + 1) // 2
            turns = [host, *order[:half], host, *order[half:]]
            found: list[tuple[str, _Turn]] = []
            for way in turns:
                found.append((way.name, _turn(way, prompts, settings.new_tokens)))
                advance(1)
            _add(tallies, found)
            after_each(tallies)
    return tallies


@dataclass(frozen=True)
class _Turn:
    sec: float
    first_sec: float
    tokens: int
    passes: Mapping[str, Passes]
    texts: list[list[int]]


def _turn(way: Way, prompts: Sequence[Tensor], new_tokens: int) -> _Turn:
    sec, first_sec, tokens, texts, clocks = 0.0, 0.0, 0, [], [Clock()]
    counting = counted(way.models, lambda: clocks[-1].has_begun)
    with way.steers(), counting as passes, quiet_transformers():
        for prompt in prompts:
            clocks.append(clock := Clock())
            ids = way.decode(prompt, new_tokens, clock)
            sec, first_sec = sec + clock.sec, first_sec + clock.first_sec / len(prompts)
            tokens += clock.tokens
            texts.append(ids[0, prompt.shape[1] :].tolist())
    return _Turn(sec, first_sec, tokens, passes, texts)


def _add(tallies: Mapping[str, Tally], found: Sequence[tuple[str, _Turn]]) -> None:
    """Put a repetition's turns together: a way that had two counts once, with both."""
    for name, tally in tallies.items():
        turns = [turn for other, turn in found if other == name]
        tokens = sum(turn.tokens for turn in turns)
        tally.sec_per_token.append(sum(turn.sec for turn in turns) / max(1, tokens))
        tally.first_sec.append(sum(turn.first_sec for turn in turns) / len(turns))
        tally.tokens += tokens
        tally.texts = turns[-1].texts
        for model, passes in ((m, p) for turn in turns for m, p in turn.passes.items()):
            kept = tally.passes.setdefault(model, Passes())
            kept.passes += passes.passes
            kept.tokens += passes.tokens


def ratio(tally: Tally, host: Tally) -> Figure:
    """Time per token over the bare host's of the same repetition."""
    pairs = zip(tally.sec_per_token, host.sec_per_token, strict=True)
    return Figure.of([ours / alone for ours, alone in pairs])


def work_of(way: Way, tally: Tally, context: float) -> Work:
    """What a new token must move and compute, by the passes that were counted."""
    work = way.beside
    for name, size in way.sizes.items():
        passes, tokens = tally.per_token(name)
        work += size.passes(passes, tokens, context)
    return work
