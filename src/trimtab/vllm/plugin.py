"""What both of vLLM's runners need of the plugin: adapters, requests, and the host's states."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from trimtab.align.strings import token_lengths
from trimtab.errors import ModelError
from trimtab.vllm.host import mixture, seated
from trimtab.vllm.requests import SteeredRequest, bytes_before
from trimtab.vllm.settings import read_settings
from trimtab.vllm.stash import Pass, stash_of
from trimtab.vllm.steering import SteeredRow, steer


@final
class Plugin:
    """The adapters on one host, and the requests that they steer."""

    def __init__(self, engine: Any) -> None:
        """Mount the adapters.

        Args:
            engine: vLLM's configuration.

        Raises:
            TrimtabError: Settings, an adapter or the host cannot be used.
        """
        check_engine(engine)
        self._settings = read_settings()
        model = engine.model_config
        ref = model.model if model.revision is None else f"{model.model}@{model.revision}"
        self._adapters = seated(self._settings, ref)
        self._vocabulary = self._adapters.host.vocabulary
        self._is_text = token_lengths(self._vocabulary) > 0
        self._stash = stash_of(engine)
        if model.get_vocab_size() != len(self._vocabulary):
            raise ModelError(
                f"vLLM computes {model.get_vocab_size()} logits, and the head of"
                f" {self._adapters.host.ref} has {len(self._vocabulary)} rows",
                hint="name the checkpoint that vLLM runs as host",
            )

    def request(self, params: Any, prompt: Sequence[int]) -> SteeredRequest | None:
        """A request as vLLM begins it; None where nothing steers it.

        Args:
            params: Its SamplingParams, which have been checked.
            prompt: Token ids.
        """
        asked = self._settings.asked(params.extra_args)
        several = mixture(self._adapters, asked) if asked else None
        return SteeredRequest(several, prompt, self._vocabulary) if several else None

    def is_steered(self, params: Any) -> bool:
        """Whether anything steers a request, by its SamplingParams."""
        return self._settings.asked(params.extra_args) is not None

    def row(self, place: int, request: SteeredRequest, token_ids: Sequence[int]) -> SteeredRow:
        """A row that is to be steered, whose text is these tokens or ends in them."""
        return SteeredRow(place, request, bytes_before(token_ids, self._vocabulary))

    def states(self, rows: int) -> tuple[Pass | None, Tensor]:
        """What the host's pass has left.

        Args:
            rows: Number of rows of logits.

        Raises:
            RuntimeError: The logits are of other states.
        """
        kept = self._stash.take()
        if kept is None or len(kept[1]) != rows:
            found = "none" if kept is None else f"{len(kept[1])}"
            raise RuntimeError(
                f"Trimtab was shown {rows} rows of logits and {found} of the host's states: the"
                " host's class was not replaced (VLLM_PLUGINS must not leave out trimtab), or vLLM"
                " computes logits in a way that this version of the plugin does not know"
            )
        return kept

    def hear(
        self,
        requests: Mapping[int, SteeredRequest],
        read: Pass | None,
        spans: Sequence[range],
        sampled: Tensor,
    ) -> None:
        """Let requests hear of their own part of a pass, as long as their prompts are read.

        Args:
            requests: Steered ones, by row.
            read: The pass, if there is one.
            spans: Part of the pass of each row; empty without a pass.
            sampled: State of the last token of each row, shape [rows, hidden].
        """
        for row, request in requests.items():
            if request.weights is not None:
                continue
            if read is None:
                # As a recorded graph runs, each request has read one token.
                request.hear(request.next, sampled[row : row + 1], self._stash)
            else:
                start = int(read.positions[spans[row].start])
                hidden = read.hidden[spans[row].start : spans[row].stop]
                request.hear(start, hidden, self._stash)

    def steer(self, logits: Tensor, hidden: Tensor, rows: Sequence[SteeredRow]) -> None:
        """Steer rows in place; arguments are those of `steering.steer`."""
        self._is_text = self._is_text.to(logits.device)
        with torch.inference_mode():
            steer(logits, hidden, rows, self._is_text)


def check_engine(engine: Any) -> None:
    """Refuse what would steer wrongly or not at all.

    Args:
        engine: vLLM's configuration.

    Raises:
        ModelError: The engine is set up in such a way.
    """
    model, parallel = engine.model_config, engine.parallel_config
    reasons = {
        "an encoder-decoder": model.is_encoder_decoder,
        "a host that reads more than text": model.is_multimodal_model,
        "prompts that are embeddings": model.enable_prompt_embeds,
        "LoRA (--enable-lora)": engine.lora_config is not None,
        "keys and values from elsewhere (KV transfer)": engine.kv_transfer_config is not None,
        "speculative decoding": engine.speculative_config is not None,
        "batch-sharded sampling": getattr(parallel, "enable_batch_sharded_sampling", False),
        "CUDA graphs of whole mixed batches": _records_prompts(engine),
    }
    found = [reason for reason, there in reasons.items() if there]
    if found:
        raise ModelError(
            f"Trimtab cannot steer vLLM with {' and '.join(found)}",
            hint="see docs/vllm.md; cudagraph_mode FULL_AND_PIECEWISE and PIECEWISE can be steered",
        )


def _records_prompts(engine: Any) -> bool:
    mode = getattr(engine.compilation_config, "cudagraph_mode", None)
    mixed = mode.mixed_mode() if mode is not None and hasattr(mode, "mixed_mode") else None
    return getattr(mixed, "name", "") == "FULL"
