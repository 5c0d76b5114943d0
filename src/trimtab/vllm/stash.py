"""What a host's forward pass leaves for the logits processor, which is shown logits alone.

vLLM runs `forward` over the tokens of all requests, one after another, and then
`compute_logits` over the states of those after which a token is to be chosen. A subclass of the
host's own class keeps both. Needs no vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """A forward pass over a batch.

    Attributes:
        token_ids: All tokens that were read, request after request, shape [tokens].
        positions: Place of each in its own request, shape [tokens].
        hidden: Final states, shape [tokens, hidden]. All three may be longer than the batch: what
            follows its tokens is padding.
    """

    token_ids: Tensor
    positions: Tensor
    hidden: Tensor


@final
class Stash:
    """Keeps a forward pass until the logits processor has seen it; unembeds more of its states."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._running: Pass | None = None
        self._kept: tuple[Pass | None, Tensor] | None = None
        self._head: Callable[[Tensor], Tensor] | None = None
        self._device = torch.device("cpu")

    def clear(self) -> None:
        """Let go of all states: a pass that begins needs their memory."""
        self._running = self._kept = None

    def keep_pass(self, token_ids: Tensor | None, positions: Tensor, hidden: Any) -> None:
        """Keep what `forward` was given and returned, if that is states."""
        if isinstance(hidden, Tensor) and token_ids is not None:
            self._running = Pass(token_ids, positions, hidden)

    def keep_sampled(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Keep what `compute_logits` was given, and how to compute more logits."""
        self._kept, self._running = (self._running, hidden), None
        self._head, self._device = head, hidden.device

    def take(self) -> tuple[Pass | None, Tensor] | None:
        """The last pass, and the states after which tokens are chosen; each is given once.

        There is no pass where the host ran as a recorded CUDA graph, which calls no Python; so it
        does where each request has read one token.
        """
        kept, self._kept = self._kept, None
        return kept

    @property
    def device(self) -> torch.device:
        """Where the host's states are."""
        return self._device

    def logits(self, hidden: Tensor, /) -> Tensor:
        """The host's own logits, shape [rows, vocab], for states of shape [rows, hidden]."""
        assert self._head is not None
        return self._head(hidden)


_STASHES: dict[int, Stash] = {}


def stash_of(engine: object) -> Stash:
    """The stash of an engine in this process, which its host and its processor share.

    Args:
        engine: The engine's configuration, by its identity.
    """
    return _STASHES.setdefault(id(engine), Stash())


@cache
def stashing(base: type) -> type:
    """A model class that leaves its states in its engine's stash, and is otherwise the same.

    Args:
        base: A decoder-only language model of vLLM.
    """
    parent: Any = base

    class Stashing(parent):
        # vLLM gives what the signature names.
        @wraps(parent.__init__)
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._trimtab_stash = stash_of(options.get("vllm_config"))

        def forward(
            self, input_ids: Tensor | None, positions: Tensor, *args: Any, **options: Any
        ) -> Any:
            self._trimtab_stash.clear()
            hidden = super().forward(input_ids, positions, *args, **options)
            self._trimtab_stash.keep_pass(input_ids, positions, hidden)
            return hidden

        def compute_logits(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            head = super().compute_logits
            self._trimtab_stash.keep_sampled(hidden_states, head)
            return head(hidden_states, *args, **options)

    Stashing.__name__ = Stashing.__qualname__ = base.__name__
    return Stashing
