"""Steer a transformers model's own `generate`, and leave the model as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab.align.strings import token_lengths
from trimtab.anchors import Reading
from trimtab.backends.chat import ChatPrompt, chat_prompt
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.live import Live, LiveReading
from trimtab.config import CarrierName, Dtype
from trimtab.errors import AdapterError, ModelError
from trimtab.steering.beside import open_beside
from trimtab.steering.evidence import (
    Mixture,
    ReadPrompt,
    last_text,
    readable,
    text_before,
    text_ids,
)
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Rows, Steering
from trimtab.steering.rows import row_of
from trimtab.types import Progress, silent

Host = HFModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""An open model, or a live transformers model with its tokenizer."""

DEFAULT_CARRIERS: tuple[CarrierName, ...] = ("head", "memory")

# Each asks the model for something else than one state for one next token.
_REFUSED = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "custom_generate",
    "guidance_scale",
    "inputs_embeds",
)


@contextmanager
def steered(
    host: Host,
    mounted: Mounted,
    *,
    carriers: Sequence[CarrierName] = DEFAULT_CARRIERS,
    strength: float = 1.0,
    live: Live | None = None,
    messages: Sequence[str] = (),
) -> Iterator[PreTrainedModel]:
    """Steer a model's `generate` inside the context; outside it is as it was, exactly.

    Greedy decoding, sampling, beam search, several sequences a prompt and batches padded on the
    left are covered; assisted decoding, guidance, custom decoding, `inputs_embeds` and
    `generate_batch` are not. How far the adapter is trusted follows from how well it predicts
    each prompt (`prompt_weights`). At strength 0 the model is untouched, bit for bit. Plain calls
    of the model are never steered.

    Of an encoder-decoder the target is steered: carriers read the target so far and never the
    source, and all that is no text, a target's end above all, stays as likely as the host has it.

    Args:
        host: The host on which the adapter is mounted.
        mounted: What `mount` returned for it.
        carriers: Which carriers steer.
        strength: How far to follow them, in [0, 2].
        live: Runs the expert, where it is among the carriers (default: opened with `open_live`).
        messages: The users' messages, where the prompts of `generate` are these, in this order,
            under the host's chat template. The small models then read them under their own.

    Raises:
        AdapterError: The adapter lacks a carrier, or is mounted on another host.
        ModelError: The model is being steered already, the expert's base cannot be opened, there
            are messages and the host has no chat template, or (inside, from `generate`) a way of
            decoding is asked for that cannot be steered, or prompts are not those of the messages.
    """
    with _adopted(host) as opened:
        check_carriers(mounted.manifest.name, tuple(mounted.manifest.carriers), carriers)
        if not strength:
            yield opened.model
            return
        mixture = _mixture(opened, mounted, carriers, strength, live)
        beside = mixture.steering.live
        small = beside.pair.reference if beside else None
        chats = [chat_prompt(opened, message, small) for message in messages]
        with _generate_replaced(opened, mixture, chats):
            yield opened.model


def open_live(
    mounted: Mounted,
    host: HFModel,
    *,
    small: str | None = None,
    dtype: Dtype = "auto",
    progress: Progress = silent,
) -> Live:
    """Open an adapter's expert and its reference, on the CPU, to run beside a host.

    Args and errors are those of `open_beside`.
    """
    pair = open_beside(
        mounted.manifest, mounted.folder, small=small, dtype=dtype, progress=progress
    )
    return Live(pair, host)


def _mixture(
    host: HFModel,
    mounted: Mounted,
    carriers: Sequence[CarrierName],
    strength: float,
    live: Live | None,
) -> Mixture:
    heads = {"head": mounted.head} if mounted.head and "head" in carriers else {}
    memories = {"memory": mounted.memory} if mounted.memory and "memory" in carriers else {}
    for carrier in (*heads.values(), *memories.values()):
        _check_width(host, mounted, carrier.reading)
    beside = (live or open_live(mounted, host)) if "expert" in carriers else None
    # When a target ends follows from its source, which the small models do not read.
    own = token_lengths(host.vocabulary) == 0 if host.is_encoder_decoder else None
    return Mixture(
        Steering(
            (row_of(carriers),),
            heads,
            memories,
            live=beside,
            blend=mounted.manifest.blend,
            strength=strength,
            own=own,
        )
    )


def check_carriers(name: str, carried: Sequence[CarrierName], asked: Sequence[CarrierName]) -> None:
    """Refuse carriers that an adapter does not carry.

    Raises:
        AdapterError: One is missing, or none is asked for.
    """
    missing = [carrier for carrier in asked if carrier not in carried]
    if missing or not asked:
        raise AdapterError(
            f"the adapter {name} carries {', '.join(carried)},"
            f" and {', '.join(missing) or 'nothing'} was asked for",
            hint=f"use --carriers {','.join(carried)}, or make the carrier with `trimtab fit`",
        )


def _check_width(host: HFModel, mounted: Mounted, reading: Reading) -> None:
    expected, width = reading.matrix.shape[1], host.unembedding.weight.shape[1]
    if expected != width:
        raise AdapterError(
            f"{mounted.manifest.name} is mounted on {mounted.host_ref} with {expected} hidden"
            f" features, and {host.ref} has {width}",
            hint="mount the adapter on this host",
        )


@contextmanager
def _adopted(host: Host) -> Iterator[HFModel]:
    if isinstance(host, HFModel):
        yield host
        return
    model, tokenizer = host
    # Adopting a model puts all of it into evaluation mode.
    training = {module: module.training for module in model.modules()}
    try:
        yield adopt_model(model.name_or_path or type(model).__name__, model, tokenizer)
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _generate_replaced(
    host: HFModel, mixture: Mixture, chats: Sequence[ChatPrompt]
) -> Iterator[None]:
    model: Any = host.model
    if "generate" in vars(model):
        raise ModelError(
            f"{host.ref} has a `generate` of its own: it is being steered already",
            hint="leave the other context first",
        )
    plain, trace = model.generate, _Trace()

    def generate(*args: Any, **options: Any) -> Any:
        _check_decoding(model, args, options)
        mask = options.get(
            "decoder_attention_mask" if host.is_encoder_decoder else "attention_mask"
        )
        ours = SteeringProcessor(host, mixture, trace, mask, chats)
        given = options.pop("logits_processor", None) or ()
        with trace.running():
            return plain(*args, logits_processor=LogitsProcessorList([ours, *given]), **options)

    trunk = model.get_decoder() if host.is_encoder_decoder else model.base_model
    handle = trunk.register_forward_hook(trace.hook)
    try:
        model.generate = generate
        yield
    finally:
        handle.remove()
        vars(model).pop("generate", None)


def _check_decoding(model: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    # transformers' signature is (inputs, generation_config, logits_processor, ...).
    configs = [*args[1:2], options.get("generation_config"), model.generation_config]
    refused = [name for name in _REFUSED if _asked(name, configs, options)]
    if len(args) > 2:
        refused.append("more than two arguments without a name")
    if options.get("cache_implementation") == "paged":
        refused.append("a paged cache")
    if refused:
        raise ModelError(
            f"generate was asked for {', '.join(refused)}, which cannot be steered",
            hint="use greedy decoding, sampling or beam search over input_ids",
        )


def _asked(name: str, configs: Sequence[Any], options: Mapping[str, Any]) -> bool:
    given = [options.get(name), *(getattr(config, name, None) for config in configs)]
    value = next((value for value in given if value is not None), None)
    # A guidance of 1 is none.
    return value is not None and not (isinstance(value, int | float) and value in (0, 1))


@final
class _Trace:
    """Keeps the final hidden states that a model computes while a generation runs."""

    def __init__(self) -> None:
        self._parts: list[Tensor] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        self._parts = []
        try:
            yield
        finally:
            self._parts = None

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if self._parts is not None:
            self._parts.append(output[0].detach())

    def take(self) -> Tensor:
        """States since the last call, shape [rows, seq, hidden]: one, or all of a prompt."""
        parts, self._parts = self._parts or [], []
        return torch.cat(parts, 1)


@final
class SteeringProcessor(LogitsProcessor):
    """Replaces the host's scores by steered log-probabilities, for one call of `generate`."""

    def __init__(
        self,
        host: HFModel,
        mixture: Mixture,
        trace: _Trace,
        mask: Tensor | None,
        chats: Sequence[ChatPrompt] = (),
    ) -> None:
        """Prepare for prompts with this attention mask, shape [prompts, seq], if there is one."""
        self._host = host
        self._mixture = mixture
        self._trace = trace
        self._mask = mask
        self._chats = chats
        self._is_text = token_lengths(host.vocabulary) > 0
        self._prompt_tokens = 0
        self._weights: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steer the scores, shape [rows, vocab], of the tokens after input_ids [rows, seq].

        Tokens that other processors have forbidden stay so.
        """
        states = self._trace.take()
        rows = self._rows(input_ids)
        spelled = [self._spelled(row.tolist()) for row in rows]
        if self._weights is None:
            self._prompt_tokens = input_ids.shape[1]
            self._chats = _chat_of_each(self._host, self._chats, rows)
            prompts = [
                ReadPrompt(row, text, state[-len(row) :], chat)
                for row, text, state, chat in zip(
                    rows, spelled, states, self._chats or [None] * len(rows), strict=True
                )
            ]
            self._weights = self._weigh(prompts)
        if scores[:, self._is_text.to(scores.device)].isneginf().all():
            # A forced token, such as the language that a target begins with: nothing to steer.
            return scores
        contexts, questions = self._read(rows, spelled, input_ids.shape[1] - self._prompt_tokens)
        asked = Rows(scores.float(), states[:, -1], contexts, questions)
        return self._mixture.logprobs(asked, self._weights)

    def _spelled(self, token_ids: Sequence[int]) -> tuple[bytes | None, ...]:
        """The bytes of each token; of a target without the space that its tokenizer puts first."""
        vocabulary = self._host.vocabulary
        pieces = [vocabulary.token_bytes[i] for i in token_ids]
        first = next((place for place, piece in enumerate(pieces) if piece), None)
        if self._host.is_encoder_decoder and vocabulary.prefix_space and first is not None:
            pieces[first] = (pieces[first] or b"").removeprefix(b" ")
        return tuple(pieces)

    def _read(
        self, rows: Sequence[Tensor], spelled: Sequence[Sequence[bytes | None]], new_tokens: int
    ) -> tuple[tuple[bytes, ...], tuple[tuple[LiveReading, range], ...]]:
        """The text before each row's next token, and how the expert has read it."""
        starts = [len(text) - new_tokens if self._chats else 0 for text in spelled]
        ids = [
            text_ids(row, text, start, len(text))
            for row, text, start in zip(rows, spelled, starts, strict=True)
        ]
        # Where a prompt ends says nothing about how the host would read what follows it.
        lasts = [
            last_text(row, text, len(text)) if new_tokens else None
            for row, text in zip(rows, spelled, strict=True)
        ]
        answers = [text_before(text[start:]) for text, start in zip(spelled, starts, strict=True)]
        if not self._chats:
            return tuple(answers), self._ask(answers, ids, lasts)
        contexts = tuple(
            text_before(text[chat.message.start : chat.message.stop]) + answer
            for text, chat, answer in zip(spelled, self._chats, answers, strict=True)
        )
        return contexts, self._ask(answers, ids, lasts)

    def _ask(
        self,
        contexts: Sequence[bytes],
        host_ids: Sequence[Sequence[int]],
        host_lasts: Sequence[int | None],
    ) -> tuple[tuple[LiveReading, range], ...]:
        """Let the expert read on, where there is one: row i continues row i of the call before."""
        live = self._mixture.steering.live
        if live is None:
            return ()
        starts = [chat.small_ids for chat in self._chats] or [None] * len(contexts)
        readings = (
            live.read([readable(context)], host_ids=[ids], host_lasts=[last], start=start, row=row)
            for row, (context, ids, last, start) in enumerate(
                zip(contexts, host_ids, host_lasts, starts, strict=True)
            )
        )
        return tuple((reading, range(1)) for reading in readings)

    def _rows(self, input_ids: Tensor) -> list[Tensor]:
        """Token ids of each row without the padding of its prompt."""
        ids = input_ids.cpu()
        if self._mask is None:
            return list(ids)
        # Beams and several sequences of one prompt follow each other.
        mask = self._mask.cpu().bool().repeat_interleave(len(ids) // len(self._mask), 0)
        new = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.bool)
        return [row[kept] for row, kept in zip(ids, torch.cat([mask, new], 1), strict=True)]

    def _weigh(self, prompts: Sequence[ReadPrompt]) -> Tensor:
        """Trust in each predictor by each prompt, shape [predictors, prompts]."""
        known: dict[tuple[int, ...], Tensor] = {}
        keys = [tuple(prompt.token_ids.tolist()) for prompt in prompts]
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in known:
                known[key] = self._mixture.weigh(self._host.unembedding, prompt)
        return torch.stack([known[key] for key in keys], 1)


def _chat_of_each(
    host: HFModel, chats: Sequence[ChatPrompt], rows: Sequence[Tensor]
) -> Sequence[ChatPrompt]:
    """What each row answers, where these are chats: a prompt's rows follow each other."""
    each = [chat for chat in chats for _ in range(len(rows) // len(chats))]
    # The rows of an encoder-decoder are answers alone.
    same = host.is_encoder_decoder or all(
        list(chat.token_ids) == row.tolist() for chat, row in zip(each, rows, strict=False)
    )
    if chats and not (same and len(each) == len(rows)):
        raise ModelError(
            f"generate was given other prompts than the {len(chats)} messages under the chat"
            f" template of {host.ref}",
            hint="give it one prompt a message, in order, up to where the answer begins",
        )
    return each
