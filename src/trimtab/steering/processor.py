"""Steer a transformers model's own `generate`, and leave the model as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from trimtab.align.strings import token_lengths
from trimtab.anchors import Reading
from trimtab.backends.chat import ChatPrompt, chat_prompt
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.live import Live
from trimtab.backends.positions import positions_follow_length, takes_cache
from trimtab.config import DRAFT_TOKENS, CarrierName, Dtype
from trimtab.errors import AdapterError, ModelError
from trimtab.steering.beside import open_beside
from trimtab.steering.drafting import Drafter
from trimtab.steering.evidence import Mixture
from trimtab.steering.mounted import Mounted
from trimtab.steering.outgrown import EndsOutgrown, Outgrown
from trimtab.steering.predictors import Steering
from trimtab.steering.rows import blend_on, row_of
from trimtab.steering.scores import SteeringProcessor, Trace
from trimtab.steering.speculative import Speculation
from trimtab.types import Progress, silent

Host = HFModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""An open model, or a live transformers model with its tokenizer."""

DEFAULT_CARRIERS: tuple[CarrierName, ...] = ("head", "memory")

# Each asks the model for something else than one state for one next token.
_REFUSED = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "custom_generate",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "guidance_scale",
    "inputs_embeds",
)

# All that a drafted generation takes beside settings: anything else is for the model itself, or
# remembers the steps before.
_DRAFTED_INPUTS = frozenset(
    (
        "inputs",
        "input_ids",
        "attention_mask",
        "generation_config",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "streamer",
    )
)

# These keep more than tokens and scores of a step.
_PLAIN_DECODING = (
    "num_beams",
    "num_return_sequences",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
    "stop_strings",
    "token_healing",
    "watermarking_config",
)

# What asks for nothing, beside 0: hub files of Gemma 2 and 3 name a hybrid cache, which
# transformers takes for none.
_SAME_AS_NONE = {
    "guidance_scale": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "cache_implementation": "hybrid",
}


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
    of the model are never steered. Where the expert steers, a row ends when its text has become
    longer than the small models can read.

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
        mixture = mixture_of(opened, mounted, carriers, strength, live)
        with steered_by(opened, mixture, chats_of(opened, mixture, messages)):
            yield opened.model


def chats_of(host: HFModel, mixture: Mixture, messages: Sequence[str]) -> list[ChatPrompt]:
    """Users' messages as the host and the small models that steer it read them.

    Raises:
        ModelError: The host has no chat template.
    """
    live = mixture.steering.live
    small = live.pair.reference if live else None
    return [chat_prompt(host, message, small) for message in messages]


def open_live(
    mounted: Mounted,
    host: HFModel,
    *,
    small: str | None = None,
    dtype: Dtype = "auto",
    progress: Progress = silent,
    draft_tokens: int = DRAFT_TOKENS,
) -> Live:
    """Open an adapter's expert and its reference, on the CPU, to run beside a host.

    Args and errors are those of `open_beside`, and of `Live`.
    """
    pair = open_beside(
        mounted.manifest, mounted.folder, small=small, dtype=dtype, progress=progress
    )
    return Live(pair, host, draft_tokens=draft_tokens)


def mixture_of(
    host: HFModel,
    mounted: Mounted,
    carriers: Sequence[CarrierName],
    strength: float,
    live: Live | None,
) -> Mixture:
    """The predictors of a mounted adapter; arguments and errors are those of `steered`."""
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
            blend=blend_on(mounted.manifest.blend, reads_source=host.is_encoder_decoder),
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
def steered_by(
    host: HFModel, mixture: Mixture, chats: Sequence[ChatPrompt] = ()
) -> Iterator[Outgrown]:
    """Steer a host's `generate` inside the context by carriers that are seated on it already.

    Args:
        host: The host.
        mixture: What steers.
        chats: What each prompt answers, where these are chats.

    Yields:
        Which rows of the last call ended since the small models can read no further.

    Raises:
        ModelError: As `steered`.
    """
    model: Any = host.model
    if "generate" in vars(model):
        raise ModelError(
            f"{host.ref} has a `generate` of its own: it is being steered already",
            hint="leave the other context first",
        )
    plain, trace = model.generate, Trace()
    live = mixture.steering.live
    outgrown = Outgrown(live.pair.reference if live else None)

    def generate(*args: Any, **options: Any) -> Any:
        _check_decoding(model, args, options)
        mask = options.get(
            "decoder_attention_mask" if host.is_encoder_decoder else "attention_mask"
        )
        ours = SteeringProcessor(host, mixture, trace, mask, chats)
        if live and live.draft_tokens and _may_draft(host, args, options):
            streamer = options.pop("streamer", None)
            options["custom_generate"] = Speculation(
                ours, Drafter(live, host), host.max_tokens, streamer
            )
        processors = options.pop("logits_processor", None) or ()
        criteria = options.pop("stopping_criteria", None) or ()
        with trace.running():
            return plain(
                *args,
                logits_processor=LogitsProcessorList([ours, *processors]),
                # First, so that the others may know of the rows that end.
                stopping_criteria=StoppingCriteriaList([EndsOutgrown(ours, outgrown), *criteria]),
                **options,
            )

    base: Any = model.base_model
    # OPT's head passes its base model over and calls the decoder in it.
    trunk = model.get_decoder() if host.is_encoder_decoder else getattr(base, "decoder", base)
    handle = trunk.register_forward_hook(trace.hook)
    try:
        model.generate = generate
        yield outgrown
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


def _may_draft(host: HFModel, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a generation has one row, and nothing else than decoding it is asked for."""
    model: Any = host.model
    configs = [*args[1:2], options.get("generation_config"), model.generation_config]
    ids = options.get("input_ids", options.get("inputs", args[0] if args else None))
    one_row = isinstance(ids, Tensor) and ids.shape[0] == 1 and ids.shape[1] > 0
    given = {name for name, value in options.items() if value is not None}
    known = given <= _DRAFTED_INPUTS | vars(GenerationConfig()).keys()
    if not one_row or not known or _is_padded(ids, configs, options) or host.is_encoder_decoder:
        return False
    # What a recurrent layer has read cannot be taken back.
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    keeps = _value("use_cache", configs, options) in (None, True)
    others = any(_asked(name, configs, options) for name in _PLAIN_DECODING)
    goes_on = takes_cache(host) and cache.is_croppable and not model._is_stateful
    return keeps and not others and goes_on and not positions_follow_length(host)


def _is_padded(ids: Tensor, configs: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a prompt has padding: by its mask, or by what transformers takes for it without."""
    mask, pad = options.get("attention_mask"), _value("pad_token_id", configs, options)
    if mask is not None:
        return not bool((mask == 1).all())
    if pad is None:
        return False
    ends = _value("eos_token_id", configs, options)
    is_end = ends is not None and bool((torch.as_tensor(ends) == pad).any())
    return not is_end and bool((ids == pad).any())


def _value(name: str, configs: Sequence[Any], options: Mapping[str, Any]) -> Any:
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _asked(name: str, configs: Sequence[Any], options: Mapping[str, Any]) -> bool:
    value = _value(name, configs, options)
    is_plain = isinstance(value, int | float | str)
    return value is not None and not (is_plain and value in (0, _SAME_AS_NONE.get(name)))
