"""Steer a transformers model's own `generate`, and leave the model as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab.align.strings import token_lengths
from trimtab.anchors import Reading
from trimtab.backends.chat import ChatPrompt, chat_prompt
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.live import Live
from trimtab.config import DRAFT_TOKENS, CarrierName, Dtype
from trimtab.errors import AdapterError, ModelError
from trimtab.steering.beside import open_beside
from trimtab.steering.drafting import Drafter
from trimtab.steering.evidence import Mixture
from trimtab.steering.mounted import Mounted
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
    "custom_generate",
    "guidance_scale",
    "inputs_embeds",
)

# These keep more than tokens and scores of a step, or remember the steps before.
_PLAIN_INPUTS = frozenset(
    ("logits_processor", "past_key_values", "position_ids", "synced_gpus", "custom_generate")
)
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
        mixture = mixture_of(opened, mounted, carriers, strength, live)
        beside = mixture.steering.live
        small = beside.pair.reference if beside else None
        chats = [chat_prompt(opened, message, small) for message in messages]
        with steered_by(opened, mixture, chats):
            yield opened.model


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
def steered_by(host: HFModel, mixture: Mixture, chats: Sequence[ChatPrompt] = ()) -> Iterator[None]:
    """Steer a host's `generate` inside the context by carriers that are seated on it already.

    Args:
        host: The host.
        mixture: What steers.
        chats: What each prompt answers, where these are chats.

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

    def generate(*args: Any, **options: Any) -> Any:
        _check_decoding(model, args, options)
        mask = options.get(
            "decoder_attention_mask" if host.is_encoder_decoder else "attention_mask"
        )
        ours, live = SteeringProcessor(host, mixture, trace, mask, chats), mixture.steering.live
        if live and live.draft_tokens and _may_draft(host, args, options):
            streamer = options.pop("streamer", None)
            options["custom_generate"] = Speculation(
                ours, Drafter(live, host), host.max_tokens, streamer
            )
        given = options.pop("logits_processor", None) or ()
        with trace.running():
            return plain(*args, logits_processor=LogitsProcessorList([ours, *given]), **options)

    base: Any = model.base_model
    # OPT's head passes its base model over and calls the decoder in it.
    trunk = model.get_decoder() if host.is_encoder_decoder else getattr(base, "decoder", base)
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


def _may_draft(host: HFModel, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a generation has one row, and nothing else than decoding it is asked for."""
    model: Any = host.model
    configs = [*args[1:2], options.get("generation_config"), model.generation_config]
    ids = options.get("input_ids", options.get("inputs", args[0] if args else None))
    mask = options.get("attention_mask")
    one_row = isinstance(ids, Tensor) and ids.shape[0] == 1 and ids.shape[1] > 0
    padded = mask is not None and not bool((mask == 1).all())
    given = {name for name, value in options.items() if value is not None}
    if not one_row or padded or host.is_encoder_decoder or given & _PLAIN_INPUTS:
        return False
    # What a recurrent layer has read cannot be taken back.
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    keeps = options.get("use_cache", _first("use_cache", configs)) in (None, True)
    others = any(_asked(name, configs, options) for name in _PLAIN_DECODING)
    return keeps and not others and not model._is_stateful and cache.is_croppable


def _first(name: str, configs: Sequence[Any]) -> Any:
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _asked(name: str, configs: Sequence[Any], options: Mapping[str, Any]) -> bool:
    value = options.get(name)
    value = _first(name, configs) if value is None else value
    # A guidance of 1 is none, and so is one beam; but True is no number here.
    is_none = value is None or (isinstance(value, int | float) and value in (0, 1))
    return value is True or not is_none
