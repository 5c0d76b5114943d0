"""What vLLM is told to load: one name, behind which each of its two runners finds its interface."""

# vLLM is not installed where types are checked.
# pyright: reportUntypedBaseClass=false

from functools import cache
from typing import Any, final

from torch import Tensor
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as V1LogitsProcessor,
)
from vllm.v1.sample.logits_processor.builtin import (  # pyright: ignore[reportMissingImports]
    process_dict_updates,
)
from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as V2LogitsProcessor,
)

from trimtab.errors import TrimtabError
from trimtab.vllm.batch import Known, Slots, steer_v1, steer_v2
from trimtab.vllm.plugin import Plugin
from trimtab.vllm.settings import Settings, read_settings


@cache
def _settings() -> Settings:
    return read_settings()


def check_request(params: Any) -> None:
    """Refuse a request before it reaches the engine, where an error would end all others too.

    A steered prompt is read anew: what is cached of it has no states, and these are the evidence
    for how far its adapters are trusted.

    Args:
        params: The request's SamplingParams.

    Raises:
        ValueError: It asks for what is not there.
    """
    try:
        asked = _settings().asked(params.extra_args)
    except TrimtabError as error:
        raise ValueError(str(error)) from error
    if asked:
        params.skip_reading_prefix_cache = True


@final
class V1Steering(V1LogitsProcessor):
    """For the first runner, which names a batch's requests by their rows."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Mount the adapters; arguments are vLLM's."""
        del device, is_pin_memory
        self._plugin = Plugin(vllm_config)
        self._known: dict[int, Known] = {}

    def is_argmax_invariant(self) -> bool:
        """Steering changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that come, go and move."""
        process_dict_updates(self._known, batch_update, self._begin)

    def apply(self, logits: Tensor) -> Tensor:
        """Steer a step."""
        steer_v1(self._plugin, self._known, logits)
        return logits

    def _begin(self, params: Any, prompt: list[int] | None, output: list[int]) -> Known:
        prompt = prompt or []
        return Known(prompt, output, self._plugin.request(params, prompt))


@final
class V2Steering(V2LogitsProcessor):
    """For the second runner, which keeps each request in a slot."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        """Mount the adapters; arguments are vLLM's."""
        self._plugin = Plugin(vllm_config)
        self._slots = Slots(self._plugin, req_states)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Begin a request in a slot; whether anything steers it."""
        return self._slots.begin(req_idx, sampling_params)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Steer a step."""
        steer_v2(self._plugin, self._slots, logits, ctx)
        return logits


@final
class Steering(V1LogitsProcessor, V2LogitsProcessor):
    """A logits processor of either runner: making one gives that of the runner that makes it.

    vLLM checks that a class has its runner's interface, and which runner will run is decided after
    the class has been named: this one has both.
    """

    def __new__(cls, vllm_config: Any, *rest: Any) -> Any:
        """Make the runner's own processor: the first runner gives two more arguments."""
        return V2Steering(vllm_config, *rest) if len(rest) == 1 else V1Steering(vllm_config, *rest)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request that asks for what is not there, with a ValueError."""
        check_request(sampling_params)
