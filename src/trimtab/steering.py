"""What a mounted adapter makes of a host's next-token scores, whatever runs the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from trimtab.blend import HOST_ALONE, BlendWeights, evidence_weights, log_linear, mix
from trimtab.carriers.head import MountedHead
from trimtab.carriers.memory import CONTEXT_BYTES, MountedMemory
from trimtab.unembedding import Unembedding

TRUST_PRIOR = 0.5
"""Weight of the steered distribution before any evidence. At one half, following the evidence
costs at most ln 2 nats over the tokens that it counts, against host and steered alike."""

EVIDENCE_TOKENS = 256
"""Last tokens of a prompt that count as evidence: each needs a row of logits, and by then the
evidence has long decided where the two differ."""

CHUNK_POSITIONS = 64
"""Positions whose logits are held at once: 64 rows of 262,144 tokens are 67 MB in float32."""

_GATE_LIMIT = 1 - 1e-6


class LiveExpert(Protocol):
    """Expert and reference that run beside the host."""

    def logprobs(self, contexts: list[bytes], host_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """What expert and reference say next, over the host's tokens.

        Args:
            contexts: All bytes before each row.
            host_logprobs: The host's own, shape [rows, vocab].

        Returns:
            Natural-log probabilities of expert and reference, each of shape [rows, vocab].
        """
        ...


@final
@dataclass(frozen=True)
class Steering:
    """The chosen carriers of an adapter, seated on one host.

    Attributes:
        strength: How far to follow them, in [0, 2]; multiplies the head's shift, the memory's
            gate, and the blend's distance from the host alone.
        head: Shifts the logits.
        memory: Is mixed in, by its gate.
        live: Expert and reference beside the host.
        blend: Exponents of the live blend at strength 1.
    """

    strength: float
    head: MountedHead | None = None
    memory: MountedMemory | None = None
    live: LiveExpert | None = None
    blend: BlendWeights = HOST_ALONE

    def logprobs(self, logits: Tensor, hidden: Tensor, contexts: Sequence[bytes]) -> Tensor:
        """Steer the host's scores: first the head, then the live blend, then the memory.

        Args:
            logits: The host's own, after cap and scale, shape [rows, vocab].
            hidden: The states that gave them, shape [rows, hidden].
            contexts: All bytes of text before each row's next token.

        Returns:
            Natural-log probabilities in float32, shape [rows, vocab]; each row sums to one.
        """
        logits = logits.float()
        if self.head is not None:
            logits = logits + self.strength * self.head.shift(hidden)
        logprobs = logits.log_softmax(-1)
        if self.live is not None:
            expert, reference = self.live.logprobs(list(contexts), logprobs)
            weights = blend_at(self.blend, self.strength)
            logprobs = log_linear(logprobs, expert, reference, weights)
        if self.memory is not None:
            logprobs = self._remember(self.memory, logprobs, hidden, contexts)
        return logprobs

    def _remember(
        self, memory: MountedMemory, logprobs: Tensor, hidden: Tensor, contexts: Sequence[bytes]
    ) -> Tensor:
        # The search over keys runs on the CPU, and the gate reads its results.
        steered = logprobs.cpu()
        answer = memory.ask(hidden.cpu(), last_bytes(contexts))
        gate = answer.gate(steered, memory.memory.gate) * self.strength
        gate = gate.clamp(max=_GATE_LIMIT)[:, None]
        mixed = mix(steered, answer.probs(steered.shape[-1]).log(), gate)
        # Entries whose continuation no host token begins leave their share of the mass unused.
        return mixed.log_softmax(-1).to(logprobs.device)


def blend_at(weights: BlendWeights, strength: float) -> BlendWeights:
    """Go from the host alone (strength 0) through a blend (1) and beyond it."""
    return BlendWeights(
        1.0 + strength * (weights.host - 1.0),
        strength * weights.expert,
        strength * weights.reference,
    )


def last_bytes(contexts: Sequence[bytes]) -> Tensor:
    """The last bytes before each row, last byte first, zero padded: [rows, CONTEXT_BYTES]."""
    ends = (text[-CONTEXT_BYTES:][::-1].ljust(CONTEXT_BYTES, b"\0") for text in contexts)
    joined = torch.frombuffer(bytearray(b"".join(ends)), dtype=torch.uint8)
    return joined.reshape(-1, CONTEXT_BYTES)


def text_before(token_bytes: Sequence[bytes | None]) -> bytes:
    """The text that tokens stand for; special tokens contribute nothing."""
    return b"".join(text for text in token_bytes if text)


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that a host has read, without padding.

    Attributes:
        token_ids: Shape [seq].
        token_bytes: Bytes of each token, None for special ones.
        hidden: The host's states, shape [states, hidden], of the last `states` tokens (fewer
            than seq where the first tokens were read by an earlier call).
    """

    token_ids: Tensor
    token_bytes: tuple[bytes | None, ...]
    hidden: Tensor


def prompt_trust(steering: Steering, unembedding: Unembedding, prompt: ReadPrompt) -> float:
    """How far a prompt itself speaks for the steered distribution against the bare host.

    Host and steered host are weighed as predictors of the prompt's tokens of text, each given
    the tokens before it (`evidence_weights`). On text that the adapter does not help, the host
    takes over.

    Args:
        steering: What would steer.
        unembedding: The host's.
        prompt: What the host has read.

    Returns:
        Weight of the steered distribution in [0, 1]; TRUST_PRIOR without evidence.
    """
    first = len(prompt.token_ids) - len(prompt.hidden)
    asked = [
        position
        for position in range(first, len(prompt.token_ids) - 1)
        if prompt.token_bytes[position + 1]
    ]
    scores = [
        _both_logprobs(steering, unembedding, prompt, positions)
        for positions in torch.tensor(asked[-EVIDENCE_TOKENS:]).split(CHUNK_POSITIONS)
        if len(positions)
    ]
    if not scores:
        return TRUST_PRIOR
    prior = torch.tensor([1 - TRUST_PRIOR, TRUST_PRIOR])
    return float(evidence_weights(torch.cat(scores, 1), prior)[1, -1])


def _both_logprobs(
    steering: Steering, unembedding: Unembedding, prompt: ReadPrompt, positions: Tensor
) -> Tensor:
    """What host and steered host gave to the tokens after some positions, shape [2, positions]."""
    first = len(prompt.token_ids) - len(prompt.hidden)
    hidden = prompt.hidden[(positions - first).to(prompt.hidden.device)]
    logits = unembedding.logits(hidden.to(unembedding.weight.device)).float()
    contexts = [text_before(prompt.token_bytes[: p + 1]) for p in positions.tolist()]
    steered = steering.logprobs(logits, hidden, contexts)
    followed = prompt.token_ids[positions + 1, None].to(logits.device)
    rows = [each.gather(1, followed)[:, 0] for each in (logits.log_softmax(-1), steered)]
    return torch.stack(rows).cpu()
